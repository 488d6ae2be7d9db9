"""What an unlearning method provides. Subclass Method, put a YAML beside it in conf/method, and it runs.

Shapes: B batch, C latent channels, H W latent size, L tokens, D text width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from cu_runner.concepts import Request, Sequence
from cu_runner.models import DiffusionModel
from cu_runner.params import ParameterGroup
from cu_runner.seeding import RandomSource

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Scope:
    """What methods and regularizers may see of the request at hand.

    params: the trainable weights by name; they change under the optimiser. start: their values at the start of the request.
    base: their values in the untouched model. anchors: image latents of prompts, made by the untouched model and cached.
    """

    model: DiffusionModel
    sequence: Sequence
    request: Request
    params: dict[str, nn.Parameter]
    start: dict[str, Tensor]
    base: dict[str, Tensor]
    rng: RandomSource
    batch_size: int
    steps: int  # optimiser steps of the request
    anchors: Callable[..., Tensor]  # (prompts, number of images, mirrored=False) -> latents [number, C, H, W]


class Resumable:
    """Something that changes from step to step of a request, and that a request which goes on in its middle needs back.

    begin_request comes first then too, with the weights of the request's start: what it makes must not be listed here.
    """

    changing: tuple[str, ...] = ()  # attributes: tensors, numbers, lists and dictionaries of them

    def state(self) -> dict[str, object]:
        """What changes, as it is now; later steps may change it in place."""
        return {name: getattr(self, name) for name in self.changing}

    def restore(self, state: dict[str, object]) -> None:
        """Take what state() gave."""
        for name in self.changing:
            setattr(self, name, state[name])


class Method(Resumable, ABC, Generic[Batch]):
    """An unlearning loss and the batches it is computed on; beyond that, whatever of a step a method wants to do its own way."""

    params: ParameterGroup = "kv_xattn"  # which weights are trained
    closed_form: bool = False  # True: one step sets the weights; there is no loss, and no gradient, for regularizers to change

    def begin_request(self, scope: Scope) -> None:
        """Prepare for a request: anchor sets, teachers, masks. State of an earlier request must not survive it."""

    @abstractmethod
    def batch(self, scope: Scope, step: int) -> Batch:
        """What step number `step`, from 0 on, trains on; it depends on the request, the weights and that number alone."""

    def loss(self, scope: Scope, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The scalar to minimise and what to log of it."""
        raise NotImplementedError(f"{type(self).__name__} must define loss, or backward in its place")

    def backward(self, scope: Scope, batch: Batch) -> dict[str, float]:
        """Add the method's gradient to .grad of scope.params; returns what to log, "loss" among it.

        Override for an inner loop or several gradients. The weights must come out as they went in.
        """
        loss, logs = self.loss(scope, batch)
        loss.backward()
        return {"loss": loss.item(), **logs}

    def on_gradients(self, params: dict[str, nn.Parameter]) -> None:
        """Change the gradients in place after the backward pass, before the regularizers do."""

    def update(self, scope: Scope, optimizer: Optimizer) -> None:
        """Move the weights. Override to mask or replace the optimiser's step, or to move dual variables with it."""
        optimizer.step()

    def end_request(self, scope: Scope) -> dict[str, object]:
        """What step.json records of the request: final constraints, sizes of masks."""
        return {}
