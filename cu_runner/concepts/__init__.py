"""Concepts, sequences of requests to unlearn them, and the lists that they are read from."""

from cu_runner.concepts.mixed_sequence import make_mixed_sequence
from cu_runner.concepts.requests import Request, plan_requests
from cu_runner.concepts.sequence import Concept, ImagePrompt, Sequence
from cu_runner.concepts.sequence_file import make_sequence

__all__ = [
    "Concept",
    "ImagePrompt",
    "Request",
    "Sequence",
    "make_mixed_sequence",
    "make_sequence",
    "plan_requests",
]
