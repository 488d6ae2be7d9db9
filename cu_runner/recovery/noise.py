"""Other noise on the way and larger noise at the start: the best of several attempts (arXiv
2501.19066, Sec. 4: eta and the scale of the first noise, judged by the classifier).
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveInt

from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.process import is_flow
from cu_runner.models.sampling import make_scheduler
from cu_runner.models.schedulers import largest_eta
from cu_runner.recovery.base import (
    Cost,
    Lab,
    Probe,
    ProbeImage,
    evaluation_images,
    require_distinct,
)
from cu_runner.schema.settings import EvalSettings, Every

Scale = Annotated[float, Field(gt=0, le=10)]


class Noise(Probe):
    """An image counts when one of its attempts shows the concept."""

    def __init__(
        self,
        etas: list[NonNegativeFloat],
        scales: list[Scale],
        *,
        scheduler: str = "DDIMScheduler",
        images: PositiveInt = 2,
        every: Every = "last",
        controls: PositiveInt = 2,
    ) -> None:
        """
        Args:
            etas: of the scheduler, which must take one: 0 adds no noise on the way.
            scales: factors of the first noise.
            scheduler: a diffusers scheduler by class name.
            images: of a concept; each is tried with every eta and every scale.
            every, controls: as for Probe.
        """
        super().__init__(every, controls)
        require_distinct("recovery.noise.etas", etas)
        require_distinct("recovery.noise.scales", scales)
        self._etas, self._scales, self._scheduler = etas, scales, scheduler
        self._number = images

    def images(self, lab: Lab, concepts: list[Concept]) -> list[ProbeImage]:
        """Return every attempt."""
        return [
            image
            for eta in self._etas
            for scale in self._scales
            for image in evaluation_images(
                lab.sequence,
                concepts,
                self._number,
                eta=float(eta),
                noise_scale=float(scale),
                scheduler=self._scheduler,
            )
        ]

    def check_model(
        self, model: DiffusionModel, sequence: Sequence, settings: EvalSettings
    ) -> None:
        """Raise ValueError for a flow, or an eta that the scheduler cannot take."""
        if is_flow(model.scheduler):
            raise ValueError(
                "recovery.noise: draws with an eta of DDIM; the model is a rectified flow and has "
                "none; leave it out"
            )
        try:
            scheduler = make_scheduler(model, replace(settings, scheduler=self._scheduler))
        except ValueError as error:
            raise ValueError(f"recovery.noise.{error}") from None
        if "eta" not in inspect.signature(scheduler.step).parameters:
            raise ValueError(
                f"recovery.noise.scheduler={self._scheduler}: takes no eta; use DDIMScheduler"
            )
        most = largest_eta(scheduler)
        if max(self._etas) > most:
            raise ValueError(
                f"recovery.noise.etas: {max(self._etas):g} is more noise than "
                f"{len(scheduler.timesteps)} steps of this model's schedule can take; "
                f"at most {int(1000 * most) / 1000:g}"
            )

    def cost(self, sequence: Sequence, concepts: int) -> Cost:
        """Return the attempts at the images of so many concepts."""
        return Cost(images=self._number * len(self._etas) * len(self._scales) * concepts)
