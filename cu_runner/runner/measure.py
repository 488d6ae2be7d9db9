"""What a step is measured with: images of weights, what is seen in them, and how it is said."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.evaluators.base import Evaluator
from cu_runner.evaluators.evaluate import Evaluation, check_labels, evaluate
from cu_runner.evaluators.grid import Pictures, draw_grid, read_grid
from cu_runner.evaluators.metrics import (
    RECOGNISED,
    measured_by,
    read_predictions,
    shown_in,
    step_metrics,
)
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.request.anchors import sampler_key
from cu_runner.request.token_limit import check_prompts
from cu_runner.retention.base import Retention
from cu_runner.runner.before import Before
from cu_runner.runtime.lazy import pd, torch
from cu_runner.runtime.returned import as_metrics, refused
from cu_runner.schema.errors import StoreError
from cu_runner.schema.settings import EvalSettings
from cu_runner.store.cache import Cache
from cu_runner.store.files import to_csv, to_json
from cu_runner.store.layout import GRID, METRICS, PREDICTIONS
from cu_runner.store.records import ROW, Metrics, Row, StepRecord
from cu_runner.store.run_directory import RunStore

logger = logging.getLogger(__name__)


class Hashes(TypedDict):
    """Of what measures a step, as step.json records them."""

    model_sha256: str
    evaluator_sha256: str
    retention_sha256: str | None


@dataclass(frozen=True)
class Instruments:
    """What measures weights: the model that has them, and what looks at its images.

    model_sha256, evaluator_sha256: their fingerprints. The retention has begun.
    """

    model: DiffusionModel
    evaluator: Evaluator
    sequence: Sequence
    retention: Retention | None
    settings: EvalSettings
    model_sha256: str
    evaluator_sha256: str

    @staticmethod
    def begin(
        model: DiffusionModel,
        evaluator: Evaluator,
        sequence: Sequence,
        retention: Retention | None,
        settings: EvalSettings,
        cache: Cache,
    ) -> Instruments:
        """Take the fingerprints of the untouched model and of what judges, and begin the retention.

        Raises:
            ValueError: the sequence names a concept that the evaluator cannot predict, or that the
                model does not read in its prompts.
        """
        check_labels(sequence, evaluator)
        check_prompts(model, sequence)
        own = model.fingerprint()
        if retention:
            retention.begin(model, own, settings, cache)
        judge = evaluator.fingerprint()
        return Instruments(model, evaluator, sequence, retention, settings, own, judge)

    def hashes(self) -> Hashes:
        """Return the fingerprints of everything that measures."""
        return {
            "model_sha256": self.model_sha256,
            "evaluator_sha256": self.evaluator_sha256,
            "retention_sha256": self.retention.fingerprint() if self.retention else None,
        }

    def check_begun(self, base: StepRecord, store: RunStore) -> None:
        """Raise StoreError unless a run was begun with the same model, evaluator and retention."""
        recorded = vars(base)
        for name, now in self.hashes().items():
            if recorded[name] != now:
                raise StoreError(
                    f"{store.directory}: was begun with another {name.removesuffix('_sha256')}; "
                    "restore it or move the run away"
                )

    def sample(
        self, concepts: list[Concept], index: int, before: Before | None = None
    ) -> Evaluation:
        """Make and judge the images of some concepts with the weights as they are.

        Args:
            before: the step before; what the UNet reads as it did there is not made again.
        """
        new = before.changed(self.model, self.sequence, concepts) if before else concepts
        judged = (self.model, self.evaluator, self.sequence, new, index, self.settings)
        seen = evaluate(*judged) if new else Evaluation(pd.DataFrame(), {})
        if before is None:
            return seen
        place = {concept.name: number for number, concept in enumerate(concepts)}
        kept = place.keys() - {concept.name for concept in new}
        rows, parts = before.predictions.assign(step=index), measured_by(self.sequence)
        rows = pd.concat([seen.predictions, rows[shown_in(rows, parts)[0].isin(kept)]])
        rows = rows.reset_index(drop=True)
        order = shown_in(rows, parts)[0].map(place).sort_values(kind="stable").index
        rows = rows.loc[order]
        shown = self._pictures(before.folder) if kept else {}
        pictures = seen.thumbnails | {cell: shown[cell] for cell in shown if cell[0] in kept}
        return Evaluation(
            rows.reset_index(drop=True),
            {cell: pictures[cell] for cell in sorted(pictures, key=lambda cell: place[cell[0]])},
        )

    def measure(
        self,
        index: int,
        unlearned: Ordered[Concept],
        label: str,
        cache: Cache | None = None,
        base: Path | None = None,
        change: str | None = None,
        before: Before | None = None,
    ) -> tuple[dict[str, bytes], Metrics]:
        """Measure the weights as they are.

        Args:
            index: of the step; 0 is the untouched model, of which every target is measured.
            unlearned: the concepts that the weights have unlearned, in order of request.
            label: of the request.
            cache: where what is seen in the images is looked for, and kept.
            base: the folder of step 0, whose pictures stand beside those of later steps.
            change: with a cache, names the weights, where they are not the untouched model's.
            before: as for sample().

        Returns:
            predictions.csv, grid.png and metrics.json, and the metrics of the step.
        """
        shown = unlearned if index else self.sequence.targets
        concepts = [*shown, *self.sequence.retained]
        names = [concept.name for concept in unlearned]
        key = self._key(concepts) if cache else {}
        key |= {"change": change, "index": index} if change else {}
        files = cache.fetch("base_eval", key) if cache else None
        if files is None:
            seen = self.sample(concepts, index, before)
            title = f"after request {index}: {label}" if index else "the untouched model"
            untouched = self._pictures(base) if base else None
            files = {
                PREDICTIONS: to_csv(seen.predictions),
                GRID: draw_grid(seen.thumbnails, names, title, untouched),
            }
            if cache:
                cache.put("base_eval", key, files)
        table = read_predictions(io.BytesIO(files[PREDICTIONS]))
        metrics: Metrics = dict(step_metrics(table, names, self.sequence))
        if self.retention:
            found = as_metrics(self.retention, "measure", self.retention.measure(index))
            if taken := [name for name in found if name in (*metrics, *ROW)]:
                what = f"a number as {taken[0]!r}, which is a column of every run"
                raise refused(self.retention, "measure", what, "names of its own")
            metrics |= found
        return files | {METRICS: to_json(metrics)}, metrics

    def _pictures(self, folder: Path) -> Pictures:
        """Return the pictures in the grid of a step: the first seed's of what was measured."""
        table = read_predictions(folder / PREDICTIONS)
        concepts, crosses = shown_in(table, measured_by(self.sequence))
        rows, columns = list(dict.fromkeys(concepts)), list(dict.fromkeys(crosses))
        found = read_grid((folder / GRID).read_bytes(), rows, columns)
        return {cell: found[cell] for cell in zip(concepts, crosses, strict=True)}

    def _key(self, concepts: list[Concept]) -> dict[str, object]:
        """Return what the images, and what is seen in them, rest on beside a change of weights."""
        sequence, model = self.sequence, self.model
        return {
            "model": self.model_sha256,
            "evaluator": self.evaluator_sha256,
            "precision": model.precision,
            "domains": list(sequence.columns),
            "images": [
                [image.prompt, image.seed, image.concept, image.cross]
                for image in sequence.evaluation_images(concepts)
            ],
            "sampler": sampler_key(model, self.settings),
            "jpeg": self.settings.jpeg,
            "device": model.device.type,
            "torch": torch.__version__,
        }


def unrecognised(row: Row) -> list[str]:
    """Return what too few images of the untouched model show, with the percentage that does."""
    ua, ra_i, ra_c = (row.metrics[name] for name in ("UA", "RA_I", "RA_C"))
    shares = {
        "targets": None if ua is None else 100 - ua,
        "retained concepts": ra_i,
        "the other domain": ra_c,
    }
    return [
        f"{what} {share:.0f}%"
        for what, share in shares.items()
        if share is not None and share < RECOGNISED
    ]


def warn_of_unrecognised(row: Row) -> None:
    """Log a warning where the untouched model's images show too little."""
    if weak := unrecognised(row):
        logger.warning(
            "   the untouched model is hardly recognised (%s): what it does not show cannot be "
            "forgotten or kept. Check prompts and labels; cu-doctor with the same words helps",
            ", ".join(weak),
        )


def describe(row: Row, total: int) -> str:
    """Return the line that the terminal shows for a step."""
    width = len(str(total))
    shown = (row.metrics[name] for name in ("UA", "RA_I", "RA_C"))
    ua, ra_i, ra_c = ("    -" if value is None else f"{value:5.1f}" for value in shown)
    cost = f"{row.train_seconds:.0f} s train, {row.eval_seconds:.0f} s eval"
    head = f"{row.request:>{width}}/{total}  {row.concept or 'untouched model':<18}"
    return f"{head} UA {ua}  RA-I {ra_i}  RA-C {ra_c}  drift {row.drift_l2:7.3f}  ({cost})"
