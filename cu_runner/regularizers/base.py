"""What a regularizer may do; every hook defaults to doing nothing.

The list order of regularizers is the order of every hook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from cu_runner.concepts.sequence import Sequence
from cu_runner.methods.base import Batch, Method
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.request.scope import Resumable, Scope
from cu_runner.runtime.lazy import nn

if TYPE_CHECKING:
    from torch import Tensor

Stage = Literal["loss", "gradient", "step", "weights"]


class Regularizer(Resumable):
    """Hooks of one request, in the order in which they are called."""

    # what the hooks change; the loop keeps the weights before a step only for "step"
    acts_on: tuple[Stage, ...] = ()
    # True: it takes a step of its own from the gradients, in the place of the optimiser's
    makes_step: bool = False
    # True: own_weights() gives the weights that requests change, in place of the method's
    has_weights: bool = False
    independent_starts: bool = False  # True: every request must start from the base model (merging)

    # what it does with the words of a prompt, as Method.reads_words
    reads_words: str = ""
    # whether it needs all or any of the trained weights to be linear in the text encoder's output
    linear: Literal["all", "any"] | None = None
    one_text: bool = False  # True: it hears a name in one place of a prompt's text

    def check(self, method: Method[Batch]) -> None:
        """Raise ValueError for a method that it does not go with, before anything is measured."""

    def own_weights(
        self, model: DiffusionModel, sequence: Sequence, method: Method[Batch]
    ) -> dict[str, nn.Parameter]:
        """Add weights to the model, and return them; they change no image yet.

        Called before anything is measured, with has_weights alone.
        """
        return {}

    def begin_request(self, scope: Scope, method: Method[Batch]) -> dict[str, object]:
        """Prepare for a request.

        Return what the run directory should record of it (lists, numbers), or nothing.
        """
        return {}

    def penalty(self, params: dict[str, nn.Parameter]) -> Tensor | None:
        """Return a scalar to add to the loss, or None."""
        return None

    def on_gradients(self, params: dict[str, nn.Parameter]) -> None:
        """Change the gradients in place, before clipping."""

    def on_step(self, params: dict[str, nn.Parameter], before: dict[str, Tensor]) -> None:
        """Change the weights in place after the optimiser's step.

        before: their values ahead of it."""

    def post_request(
        self, names: list[str], deltas: Callable[[str], Tensor], scope: Scope
    ) -> dict[str, Tensor] | None:
        """Return the weights to use in place of this request's, as a delta from the base model by
        name.

        None keeps them. deltas(name) gives the changes [N, ...] of one weight by the N requests so
        far, each trained from the base model; they are read from disk when asked for, so that they
        are never all in memory. scope is the last request's; begin_request() was not called for it
        where its training was cached.
        """
        return None
