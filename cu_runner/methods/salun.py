"""SalUn: random labels, trained in the salient weights alone (Fan et al., ICLR 2024, arXiv
2310.12508).

Salient are the weights with the largest gradient of the concept's diffusion loss at the start of
the request, summed over its images (the released code scores a prediction with guidance 7.5
instead). The code masks the gradient; momentum, decay and regularizers' penalties could still move
the rest, so here the step is masked too. A regularizer of the step that mixes weights (gradproj
with apply=update, nullspace) comes after it and fills the mask again.

Shapes: P trainable weights in one vector.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from cu_runner.methods._forgetting import flat_gradient, split
from cu_runner.methods.random_label import RandomLabel
from cu_runner.models.parameters import gradients, largest, snapshot
from cu_runner.request.images import RetainSet, diffusion_loss
from cu_runner.request.scope import Scope
from cu_runner.runtime.lazy import nn, torch, without_gradients
from cu_runner.schema.settings import ParameterGroup

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer


def saliency_mask(scores: Tensor, fraction: float) -> Tensor:
    """Return a mask, bool [P], of exactly floor(fraction * P) entries of scores [P].

    They are those of the largest magnitude, of equal ones the first. m = 1(|grad L_forget| >=
    gamma), gamma the quantile of that fraction   (Fan et al. 2024, Sec. 4).
    """
    return largest(scores.abs(), int(fraction * len(scores)))


class SalUn(RandomLabel):
    """Random labels under a saliency mask."""

    masks_step = True

    def __init__(
        self,
        fraction: Annotated[float, Field(gt=0, le=1)] = 0.5,
        label: Literal["name", "prompt"] = "name",
        retain_weight: NonNegativeFloat = 0.1,
        num_images: PositiveInt = 200,
        retain: RetainSet = RetainSet(),
        params: ParameterGroup = "kv_xattn",
    ) -> None:
        """
        Args:
            fraction: of all trainable weights together, those that are trained.
            label, retain_weight, num_images, retain, params: as for RandomLabel.
        """
        super().__init__(label, retain_weight, num_images, retain, params)
        self.fraction = fraction

    def begin_request(self, scope: Scope) -> None:
        """Make the images and labels, and the mask.

        The mask takes about one pass over the images of a concept: their number / batch size
        backward passes.
        """
        super().begin_request(scope)
        scores = torch.zeros(())
        for step in range(math.ceil(max(self._forget.sizes) / scope.batch_size)):
            batch = self._forget.draw(scope.rng.generator("saliency", step), scope.batch_size)
            scores = scores + flat_gradient(diffusion_loss(scope.model, batch), scope.params)
        self._mask = saliency_mask(scores, self.fraction)

    def on_gradients(self, params: dict[str, nn.Parameter]) -> None:
        """Mask the gradients as published; clipping then measures only what is trained."""
        kept = dict(zip(params, split(self._mask, params), strict=True))
        for name, gradient in gradients(params).items():
            gradient *= kept[name]

    @without_gradients
    def update(self, scope: Scope, optimizer: Optimizer) -> None:
        """Take the optimiser's step and undo it outside the mask."""
        before = snapshot(scope.params)
        optimizer.step()
        for (name, parameter), kept in zip(
            scope.params.items(), split(self._mask, scope.params), strict=True
        ):
            parameter.copy_(torch.where(kept, parameter, before[name]))

    def end_request(self, scope: Scope) -> dict[str, object]:
        """Return how many weights were trained."""
        return {"trained_weights": int(self._mask.sum()), "of": len(self._mask)}
