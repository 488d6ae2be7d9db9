"""Replay: images of what is to be kept, made by the untouched model, train beside the unlearning
loss.

The generative replay of Shin et al., NeurIPS 2017, arXiv 1705.08690, with the untouched model for
every request as the generator.

Shapes: B batch, C latent channels, H W latent size, L tokens, D text width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat, PositiveInt

from cu_runner.methods.base import Batch, Method
from cu_runner.regularizers.base import Regularizer
from cu_runner.request.images import RetainSet
from cu_runner.request.scope import Scope
from cu_runner.runtime.lazy import F, nn, torch

if TYPE_CHECKING:
    from torch import Tensor


class Replay(Regularizer):
    """weight * mean ||e(x_t, c) - wanted||^2 over images x of prompts c to keep."""

    acts_on = ("loss",)
    changing = ("_step",)

    def __init__(
        self,
        weight: NonNegativeFloat,
        loss: Literal["model", "noise"] = "model",
        batch_size: PositiveInt | None = None,
        retain: RetainSet = RetainSet(),
    ) -> None:
        """
        Args:
            loss: "model" wants the untouched model's prediction, "noise" the true noise (the
                diffusion loss).
            batch_size: images per step; None is that of training.
            retain: what is to be kept.
        """
        self.weight, self.target_of, self.batch_size, self.retain = weight, loss, batch_size, retain

    def begin_request(self, scope: Scope, method: Method[Batch]) -> dict[str, object]:
        """Make images of the kept prompts; the first step of the request draws batch 0."""
        self._scope, self._images, self._step = scope, self.retain.images_of(scope), 0
        return {"prompts": len(self.retain.read(scope))}

    def penalty(self, params: dict[str, nn.Parameter]) -> Tensor:
        """Return the loss of the step's own batch."""
        scope, model = self._scope, self._scope.model
        batch = self._images.draw(
            scope.rng.generator("replay", self._step), self.batch_size or scope.batch_size
        )
        self._step += 1
        arguments = (batch.noisy, batch.timesteps, batch.texts[0])
        wanted = batch.wanted
        if self.target_of == "model":
            with torch.no_grad():
                wanted = model.predict(*arguments, scope.base)
        return self.weight * F.mse_loss(model.predict(*arguments), wanted)
