"""The untouched model draws the first steps, the unlearned one finishes (diffusion completion,
arXiv 2412.17614).

A model that only learned to begin otherwise still draws the concept once it is begun. The images
are the evaluation's, by name.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.models.sampling import make_scheduler
from cu_runner.recovery.base import (
    Cost,
    Lab,
    Probe,
    ProbeImage,
    evaluation_images,
    require_distinct,
)
from cu_runner.schema.settings import Every

Share = Annotated[float, Field(ge=0, le=1)]


class Completion(Probe):
    """Finishes images that the untouched model has begun. dose: percent of the steps."""

    def __init__(
        self,
        shares: list[Share],
        *,
        images: PositiveInt = 4,
        every: Every = 1,
        controls: PositiveInt = 4,
    ) -> None:
        """
        Args:
            shares: of the denoising steps, that the untouched model takes; at least one step of
                a share above 0.
            images: of a concept, for each share.
            every, controls: as for Probe.
        """
        super().__init__(every, controls)
        require_distinct("recovery.completion.shares", shares)
        self._shares, self._number = shares, images

    def images(self, lab: Lab, concepts: list[Concept]) -> list[ProbeImage]:
        """Return evaluation images, each begun by the untouched model."""
        steps = len(make_scheduler(lab.model, lab.settings).timesteps)
        return [
            image
            for share in self._shares
            for image in evaluation_images(
                lab.sequence,
                concepts,
                self._number,
                dose=100 * share,
                untouched_steps=max(round(share * steps), int(share > 0)),
            )
        ]

    def cost(self, sequence: Sequence, concepts: int) -> Cost:
        """Return the images of so many concepts, for every share."""
        return Cost(images=self._number * len(self._shares) * concepts)
