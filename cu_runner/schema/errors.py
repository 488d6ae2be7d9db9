"""Every exception of ours that a user can mend: its message is one line that says what to do."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """Return an error's message in one line, or its type if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return what an error says first, or its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class SamplingError(RuntimeError):
    """The model makes no images; the message is one line."""


class LaunchError(RuntimeError):
    """A run could not be made, which says nothing about its method; the message is one line."""


class ModelError(ValueError):
    """A checkpoint that cannot be used; the message is one line."""


class ConfigError(ValueError):
    """The user's configuration cannot be run; the message is one line."""


class WeightFileError(ValueError):
    """A weight file that cannot be used; the message is one line."""


class StoreError(RuntimeError):
    """The run directory cannot be used as it is; the message is one line with what to do."""


class SweepError(ValueError):
    """The folder cannot be read as a sweep; the message is one line."""


class MirrorError(RuntimeError):
    """What should be sent to a tracker was not, or not all of it."""


class HubError(RuntimeError):
    """The Hugging Face hub did not take an upload; the message is one line with what to do."""


class ReturnedError(RuntimeError):
    """A class of the user's own gives back what is of no use; the message is one line."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line."""
