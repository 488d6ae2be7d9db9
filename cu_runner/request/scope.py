"""What one request offers to methods and regularizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cu_runner.concepts.requests import Request
from cu_runner.concepts.sequence import Sequence
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.runtime.lazy import nn
from cu_runner.runtime.seeding import RandomSource
from cu_runner.schema.settings import TrainSettings

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Scope:
    """What methods and regularizers may see of the request at hand.

    params: the trainable weights by name; they change under the optimiser. start: their values at
    the start of the request. base: their values in the untouched model. anchors: image latents of
    prompts, made by the untouched model and cached.
    """

    model: DiffusionModel
    sequence: Sequence
    request: Request
    params: dict[str, nn.Parameter]
    start: dict[str, Tensor]
    base: dict[str, Tensor]
    rng: RandomSource
    train: TrainSettings
    anchors: Callable[
        ..., Tensor
    ]  # (prompts, number of images, mirrored=False) -> latents [number, C, H, W]

    @property
    def batch_size(self) -> int:
        """Return how many images a step trains on."""
        return self.train.batch_size

    @property
    def steps(self) -> int:
        """Return how many optimiser steps the request has at most."""
        return self.train.steps


class Resumable:
    """Something that changes from step to step, and that a request which goes on in its middle
    needs back.

    begin_request comes first then too, with the weights of the request's start: what it makes must
    not be listed here.
    """

    changing: tuple[str, ...] = ()  # attributes: tensors, numbers, lists and dictionaries of them

    def state(self) -> dict[str, object]:
        """Return what changes, as it is now; later steps may change it in place."""
        return {name: getattr(self, name) for name in self.changing}

    def restore(self, state: dict[str, object]) -> None:
        """Take what state() gave."""
        for name in self.changing:
            setattr(self, name, state[name])
