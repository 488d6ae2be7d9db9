"""Draws what probes ask for, in common batches, and nothing twice."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from cu_runner.evaluators.evaluate import Judge, look_at
from cu_runner.models.sampling import make_scheduler
from cu_runner.models.text import Text
from cu_runner.models.trajectory import Kept, Trajectory
from cu_runner.recovery.base import ProbeImage, Seen
from cu_runner.runtime.lazy import torch

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

Columns = dict[str, str | int | float]
Key = tuple[object, ...]
Heads = dict[Key, Kept]  # what the untouched model has drawn of an image, by image and steps


class Drawing:
    """Draws and names images with the weights of one step."""

    def __init__(
        self,
        judge: Judge,
        untouched: Callable[[], AbstractContextManager[None]],
        predictions: pd.DataFrame,
        step: int,
        heads: Heads,
        *,
        is_untouched: bool,
    ) -> None:
        """
        Args:
            untouched: inside it the weights are those of the untouched model.
            predictions: what the evaluation has drawn with the weights.
            step: the request, for the text of errors.
            heads: the untouched model's first steps, kept for the length of the run.
            is_untouched: whether the weights are those of the untouched model.
        """
        self._judge, self._untouched, self._step = judge, untouched, step
        self._heads, self._is_untouched = heads, is_untouched
        judged = ("predicted_", "score_", "face")
        names = [name for name in predictions if str(name).startswith(judged)]
        self._seen: dict[Key, Columns] = {
            plain_key(row["prompt"], row["seed"]): {str(name): row[name] for name in names}
            for row in predictions.to_dict("records")
        }

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """Draw everything anew inside, where the weights are others."""
        before, was_untouched = self._seen, self._is_untouched
        self._seen, self._is_untouched = {}, False
        try:
            yield
        finally:
            self._seen, self._is_untouched = before, was_untouched

    def look(self, images: list[ProbeImage]) -> list[Seen]:
        """Return what is seen in the images, in their order.

        Raises:
            SamplingError: one of them is not finite.
        """
        keys = [self._key(image) for image in images]
        new = {key: image for key, image in zip(keys, images, strict=True) if key not in self._seen}
        ordered = sorted(new.items(), key=lambda item: condition(item[1]))
        wanted = [image for _, image in ordered]

        def draw(places: list[int], on_step: Callable[[float], None]) -> Tensor:
            batch = [wanted[place] for place in places]
            groups = [list(group) for _, group in itertools.groupby(batch, condition)]
            return torch.cat([self._draw(group, on_step) for group in groups])

        if wanted:
            what = f"the images of recovery probes after request {self._step}"
            found = look_at(self._judge, len(wanted), draw, "recovery", what, self._step)
            for (key, _), each in zip(ordered, found, strict=True):
                self._seen[key] = each.row
        return [Seen(image, self._seen[key]) for key, image in zip(keys, images, strict=True)]

    def _key(self, image: ProbeImage) -> Key:
        """Return what makes an image what it is, with the weights as they are."""
        if image.text is not None:
            return (object(),)  # never the same again
        steps = 0 if self._is_untouched else image.untouched_steps
        return (image.prompt, image.seed, steps, image.eta, image.noise_scale, image.scheduler)

    def _draw(self, images: list[ProbeImage], on_step: Callable[[float], None]) -> Tensor:
        """Draw images of one condition; [B, 3, S, S]."""
        model, steps = self._judge.model, images[0].untouched_steps
        trajectory = self._begin(images)
        if steps and not self._is_untouched:
            steps = min(steps, trajectory.num_steps)
            if images[0].text is None:
                trajectory.resume(self._first_steps(images, steps))
            else:
                with self._untouched():
                    trajectory.advance(steps)
        return model.decode_latents(trajectory.advance(trajectory.num_steps, on_step))

    def _begin(self, images: list[ProbeImage]) -> Trajectory:
        """Return a batch of images of one condition at its noise."""
        model, settings, first = self._judge.model, self._judge.settings, images[0]
        if first.scheduler is not None:
            settings = dataclasses.replace(settings, scheduler=first.scheduler)
        texts = [image.text for image in images if image.text is not None]
        return Trajectory(
            model,
            make_scheduler(model, settings),
            [image.prompt for image in images],
            [image.seed for image in images],
            settings.guidance,
            eta=first.eta,
            noise_scales=[image.noise_scale for image in images],
            text=Text.cat(texts) if texts else None,
        )

    def _first_steps(self, images: list[ProbeImage], steps: int) -> list[Kept]:
        """Return the images after steps of the untouched model; it goes on from fewer of them."""
        keys = [
            (*condition(image)[1:], image.noise_scale, image.prompt, image.seed) for image in images
        ]
        if any((*key, steps) not in self._heads for key in keys):
            trajectory = self._begin(images)
            for earlier in range(steps - 1, 0, -1):
                if all((*key, earlier) in self._heads for key in keys):
                    trajectory.resume([self._heads[*key, earlier] for key in keys])
                    break
            with self._untouched():
                trajectory.advance(steps)
            for key, kept in zip(keys, trajectory.keep(), strict=True):
                self._heads[*key, steps] = kept
        return [self._heads[*key, steps] for key in keys]


def plain_key(prompt: str, seed: int) -> Key:
    """Return the key of an image as the evaluation draws it."""
    return (prompt, int(seed), 0, 0.0, 1.0, None)


def condition(image: ProbeImage) -> tuple[int, float, str, bool]:
    """Return what the images of one batch have in common."""
    return (
        image.untouched_steps,
        image.eta,
        image.scheduler or "",
        image.text is not None,
    )
