"""What an unlearning method provides. Subclass Method, put a YAML beside it in conf/method, and it runs.

Shapes: B batch, C latent channels, H W latent size, L tokens, D text width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
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


class Method(ABC, Generic[Batch]):
    """An unlearning loss and the batches it is computed on; beyond that, whatever of a step a method wants to do its own way."""

    params: ParameterGroup = "kv_xattn"  # which weights are trained
    closed_form: bool = False  # True: one step sets the weights; there is no loss, and no gradient, for regularizers to change

    def begin_request(self, scope: Scope) -> None:
        """Prepare for a request: anchor sets, teachers, masks. State of an earlier request must not survive it."""

    @abstractmethod
    def batches(self, scope: Scope) -> Iterator[Batch]:
        """An endless stream; batch number n depends on the request, the weights and n alone."""

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
