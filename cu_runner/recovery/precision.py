"""Weights rounded to fewer bits: does what was unlearned come back? (In language models it does:
Zhang et al. 2025, arXiv 2410.16454.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.models.quantised import is_quantised
from cu_runner.recovery.base import (
    Cost,
    Lab,
    Number,
    Probe,
    Seen,
    evaluation_images,
    require_distinct,
    restored,
)
from cu_runner.runtime.lazy import torch
from cu_runner.schema.settings import Every

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["bf16", "fp16", "int8"]


class Precision(Probe):
    """Rounds every weight of the UNet, and draws images of the evaluation. variant: the kind."""

    def __init__(
        self,
        kinds: list[Kind],
        *,
        images: PositiveInt = 4,
        every: Every = "last",
        controls: PositiveInt = 4,
    ) -> None:
        """
        Args:
            kinds: bf16, fp16, or int8: 255 levels per row of a weight, the largest at its end.
            images: of a concept, for each kind.
            every, controls: as for Probe.
        """
        super().__init__(every, controls)
        require_distinct("recovery.precision.kinds", kinds)
        self._kinds, self._number = kinds, images

    def measure(self, lab: Lab, concepts: list[Concept]) -> list[Seen | Number]:
        """Return what is seen in the images of the rounded weights."""
        found: list[Seen | Number] = []
        named = lab.model.denoiser.named_parameters()
        # what is held in eight bits already is left alone
        weights = {name: weight for name, weight in named if not is_quantised(weight)}
        for kind in self._kinds:
            with lab.changed(), restored(weights):
                with torch.no_grad():
                    for weight in weights.values():
                        weight.copy_(rounded(weight, kind))
                found += lab.look(
                    evaluation_images(lab.sequence, concepts, self._number, variant=kind)
                )
        return found

    def cost(self, sequence: Sequence, concepts: int) -> Cost:
        """Return the images of so many concepts, for every kind."""
        return Cost(images=self._number * len(self._kinds) * concepts)


def rounded(weight: Tensor, kind: Kind) -> Tensor:
    """Return a weight [out, ...] as it is after a way through fewer bits."""
    exact = weight.dtype
    weight = weight.float()
    if kind == "bf16":
        return weight.bfloat16().to(exact)
    if kind == "fp16":
        return weight.half().to(exact)
    rows = weight.flatten(1) if weight.ndim > 1 else weight[None]
    step = rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / 127
    return ((rows / step).round() * step).view_as(weight).to(exact)
