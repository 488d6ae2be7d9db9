"""What an unlearning method provides.

Subclass Method, put a YAML of its name in conf/method, and it runs.

Shapes: B batch, C latent channels, H W latent size, L tokens, D text width.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from cu_runner.concepts.entries import comparable
from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.parameters import select_parameters
from cu_runner.request.scope import Resumable, Scope
from cu_runner.runtime.lazy import nn, torch
from cu_runner.schema.errors import TrainingError
from cu_runner.schema.settings import ParameterGroup

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

Batch = TypeVar("Batch")


class Method(Resumable, ABC, Generic[Batch]):
    """An unlearning loss and its batches, and what else of a step a method does its own way."""

    params: ParameterGroup = "kv_xattn"  # which weights are trained
    # True: one step sets the weights; there is no loss or gradient for regularizers to change
    closed_form: bool = False
    # True: one request holds all targets of the sequence, whatever the setting says
    whole_sequence: bool = False
    # comparable() name of a concept -> words by which it is unlearned besides its name
    other_words: Mapping[str, list[str]] = MappingProxyType({})
    # what it does with the words of a prompt, or their encoding, which classes do not have; "" is
    # nothing: then it also runs on a class-conditional model
    reads_words: str = ""
    # whether it needs all or any of the trained weights to be linear in the text encoder's output
    linear: Literal["all", "any"] | None = None
    one_text: bool = False  # True: it hears a name in one place of a prompt's text
    ascends: bool = False  # True: its ascent is measured by the gradient on retained images
    # whose images it trains on, and pictures of the user's may be; None: it takes none
    pictured: Literal["targets", "anchors"] | None = None
    least_pictures: int = 1  # how many of a target it needs at least
    masks_step: bool = False  # True: update() lets some weights alone that have a gradient
    scored_against: Literal["anchor", "empty"] = "anchor"  # which prompt, in scored_loss()

    def weights(self, model: DiffusionModel) -> dict[str, nn.Parameter]:
        """Return the weights of the UNet that are trained, by name: those of the group `params`.

        Called before anything is measured.

        Raises:
            ValueError: the UNet has none of them.
        """
        return select_parameters(model.denoiser, self.params)

    def check(self, sequence: Sequence) -> None:
        """Raise ValueError for a sequence that it does not go with, before anything is loaded."""

    def words_for(self, concept: Concept) -> list[str]:
        """Return the other words of a concept, in whatever spelling the method knows it."""
        return self.other_words.get(comparable(concept.name), [])

    def begin_request(self, scope: Scope) -> None:
        """Prepare for a request: anchor sets, teachers, masks.

        State of an earlier request must not survive it.
        """

    def solved(self, scope: Scope) -> Scope:
        """Return the request that is solved in place of the one at hand; that itself."""
        return scope

    @abstractmethod
    def batch(self, scope: Scope, step: int) -> Batch:
        """Return what step number `step`, counted from 0, trains on.

        It depends on the request, the weights and that number alone.
        """

    def loss(self, scope: Scope, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Return the scalar to minimise and what to log of it."""
        raise NotImplementedError(
            f"{type(self).__name__} must define loss, or backward in its place"
        )

    def trained_pass(self, model: DiffusionModel) -> AbstractContextManager[None]:
        """Return what surrounds the forward passes that are trained; SelFT scores inside it too."""
        return contextlib.nullcontext()

    def scored_loss(self, concept: Tensor, wanted: Tensor) -> Tensor:
        """Return the loss by which SelFT scores weights along a sampling trajectory.

        The released code (Lee et al. 2026) takes that of concept ablation, sum ||e(c*) - e(c)||^2,
        for every method but ESD.

        Args:
            concept, wanted: predictions [B, C, H, W] for the concept's prompt, with gradient, and
                for the one that scored_against names, without.
        """
        return (concept - wanted).pow(2).sum()

    def backward(self, scope: Scope, batch: Batch) -> dict[str, float]:
        """Add the method's gradient to .grad of scope.params; return what to log, "loss" among it.

        Override for an inner loop or several gradients. The weights must come out as they went in.
        """
        loss, logs = self._checked(self.loss(scope, batch))
        loss.backward()
        return {"loss": loss.item(), **logs}

    def _checked(self, found: object) -> tuple[Tensor, dict[str, float]]:
        """Return what loss() returned. Raises TrainingError for anything but a loss and logs."""
        match found:
            case (torch.Tensor() as loss, dict() as logs) if loss.numel() == 1:
                if loss.requires_grad:
                    return loss, logs
                what = "a loss without gradient"
            case (torch.Tensor() as loss, dict()):
                what = f"a loss of {loss.numel()} numbers"
            case _:
                what = f"a {type(found).__name__}"
        raise TrainingError(
            f"{type(self).__name__}.loss returns {what}; return (loss, logs): a tensor of one "
            "number, computed from the trained weights, and a mapping of what to log"
        )

    def on_gradients(self, params: dict[str, nn.Parameter]) -> None:
        """Change the gradients in place after the backward pass, before the regularizers do."""

    def update(self, scope: Scope, optimizer: Optimizer) -> None:
        """Move the weights.

        Override to mask or replace the optimiser's step, or to move dual variables with it.
        """
        optimizer.step()

    def end_request(self, scope: Scope) -> dict[str, object]:
        """Return what step.json records of the request: final constraints, sizes of masks."""
        return {}
