"""A run in small: the runner itself, on a truncated plan in a temporary directory.

The untouched model makes a few images. The first and the last request are begun as they would be,
trained for a step or two, saved, measured on a few images, and committed. Anchors are one real
batch, repeated as often as a method asks for images.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
import time
from collections.abc import Sequence as Ordered
from pathlib import Path
from typing import TYPE_CHECKING

from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.config.run_config import RunConfig
from cu_runner.evaluators.metrics import mean_accuracy, read_predictions, rows_of
from cu_runner.runner.early_stop import EarlyStop
from cu_runner.runner.measure import Instruments
from cu_runner.runner.parts import RunParts
from cu_runner.runner.runner import Runner
from cu_runner.runner.saved_state import SavedState
from cu_runner.runner.training import Training
from cu_runner.runtime.lazy import torch
from cu_runner.runtime.progress import slow
from cu_runner.store.cache import Cache
from cu_runner.store.layout import PREDICTIONS
from cu_runner.store.run_directory import RunStore
from cu_runner.store.signature import signature
from cu_runner.trackers.mirror import Mirror

if TYPE_CHECKING:
    from torch import Tensor

TRIED = 4  # concepts of each kind that images are made of
STEPS = 2  # of training; the first one warms up


class Rehearsal(Runner):
    """Runs in small. Afterwards, or after an error, its attributes tell what was found.

    stages: what was begun, in order: "images", "method", "reg.NAME", "training". accuracy: percent
    of the images of the untouched model that are recognised, by what they are of. images: their
    number.
    per_image, per_step: seconds.
    """

    def __init__(self, plan: RunConfig, parts: RunParts, folder: Path) -> None:
        """Truncate the plan; everything is written below the folder."""
        requests = [parts.requests[0], *parts.requests[1:][-1:]]
        few = [dataclasses.replace(each, index=n) for n, each in enumerate(requests, start=1)]
        settings = dataclasses.replace(plan.spine.train, save_every=None)
        judged = dataclasses.replace(plan.spine.eval, every=1)
        spine = dataclasses.replace(plan.spine, train=settings, eval=judged)
        super().__init__(
            dataclasses.replace(plan, spine=spine),
            dataclasses.replace(parts, requests=few, retention=None, probes={}),
            RunStore(folder / "run", plan.resolved, signature, code=plan.code),
            Cache(folder / "cache", plan.code),
            Mirror({}),
        )
        self.shown_steps = STEPS
        self.stages: list[str] = []
        self.accuracy: dict[str, float] = {}
        self.images = 0
        self.per_image: float | None = None
        self.per_step: float | None = None
        self._latents: Tensor | None = None
        self._noted = 0.0
        self._waiting = contextlib.ExitStack()  # says what is done if it takes long

    def take_instruments(self) -> Instruments:
        """Return what measures a few concepts, with one seed."""
        own = super().take_instruments()
        return dataclasses.replace(own, sequence=self._small())

    def _small(self) -> Sequence:
        whole = self.parts.sequence
        targets = whole.targets[:TRIED]
        number = len(targets) + sum(len(each.retain[:TRIED]) for each in whole.by_domain)
        together = math.ceil(self._together() / number)
        crosses = max(together, math.ceil(TRIED / len(targets)))

        def small(each: Sequence, targets: tuple[Concept, ...]) -> Sequence:
            return dataclasses.replace(
                each,
                targets=targets,
                retain=each.retain[:TRIED],
                cross_retain=each.cross_retain[:crosses],
                seeds=each.seeds[:1],
                parts={
                    name: small(own, tuple(one for one in own.targets if one in targets))
                    for name, own in each.parts.items()
                },
            )

        return small(whole, targets)

    def _together(self) -> int:
        """Return how many images are tried at once: on a GPU a whole batch, which may not fit."""
        on_gpu = self.parts.model.device.type == "cuda"
        return self.plan.spine.eval.batch_size if on_gpu else 1

    def anchors(self, prompts: list[str], number: int, *, mirrored: bool = False) -> Tensor:
        """Return one real batch of anchors, repeated."""
        if self._latents is None:
            self._latents = super().anchors(prompts, min(number, self._together()))
        return self._latents[[i % len(self._latents) for i in range(number)]]

    def measured(self, erased: Ordered[Concept]) -> Ordered[Concept]:
        """Return a few of the unlearned concepts."""
        return erased[-TRIED:]

    def stage(self, name: str) -> None:
        """Note what begins."""
        if name == "method" and self.per_image is None:
            self._look_at_base()
        self.stages += [name] if name not in self.stages else []
        self._waiting.close()
        self._waiting.enter_context(slow(f"{name} begins a request"))
        self._noted = time.monotonic()

    def after_step(self, training: Training, early_stop: EarlyStop, saved: SavedState) -> None:
        """Time the step, and end the request after a few."""
        self._waiting.close()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.monotonic()
        self.per_step, self._noted = now - self._noted, now
        training.ended = training.done >= STEPS

    def done(self) -> None:
        """Take note that nothing is waited for any more."""
        self._waiting.close()

    def _look_at_base(self) -> None:
        """Read what was seen in the images of the untouched model."""
        base, sequence = self.store.finished()[0], self.instruments.sequence
        found = read_predictions(self.store.step_dir(0) / PREDICTIONS)
        for each in sequence.by_domain:
            rows = rows_of(found, each.domain)
            targets = [target for target in sequence.targets if target.domain == each.domain]
            kinds = {"of the targets": targets, "of what is retained": each.retain}
            for kind, concepts in kinds.items():
                if names := [concept.name for concept in concepts]:
                    kind = f"{kind} ({each.domain})" if sequence.parts else kind
                    self.accuracy[kind] = mean_accuracy(rows, each.domain, names)
            if each.cross_domain in each.measured_domains:
                crosses = [concept.name for concept in each.cross_retain]
                across = mean_accuracy(rows, each.cross_domain, crosses)
                self.accuracy[f"of the {each.cross_domain}s"] = across
        self.images = len(found)
        self.per_image = (base.seconds["eval"] or 0.0) / len(found)


def rehearse(plan: RunConfig, parts: RunParts) -> tuple[Rehearsal, Exception | None]:
    """Run in small, and return what was found and the error that ended it."""
    with tempfile.TemporaryDirectory() as folder:
        rehearsal = Rehearsal(plan, parts, Path(folder))
        try:
            with rehearsal.store:
                rehearsal.run()
        except Exception as error:  # the caller judges it: one of ours, of torch, or a bug
            return rehearsal, error
        finally:
            rehearsal.done()
        return rehearsal, None
