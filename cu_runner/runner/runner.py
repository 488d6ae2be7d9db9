"""The untouched model first, then request by request: weights, unlearn, save, evaluate, commit.

The unit of restart is the request, and within it the step that its checkpoint was saved after.
Randomness is derived from (seed, request, purpose), and the weights of every request start from the
saved delta of the one before: a run that was killed anywhere and started again ends where an
undisturbed one does, bitwise on a CPU. On a GPU some backward kernels are not deterministic, and
two undisturbed runs differ in the last bits as well.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Ordered
from typing import TYPE_CHECKING

import psutil

from cu_runner.concepts.requests import Request
from cu_runner.concepts.sequence import Concept
from cu_runner.config.run_config import RunConfig
from cu_runner.evaluators.metrics import forgotten_of, measured_by
from cu_runner.models.parameters import Drift, drift, snapshot, subtract
from cu_runner.request.anchors import AnchorImages
from cu_runner.request.scope import Scope
from cu_runner.runner.before import Before
from cu_runner.runner.early_stop import EarlyStop, LossLeft
from cu_runner.runner.measure import Instruments, describe, warn_of_unrecognised
from cu_runner.runner.parts import RunParts
from cu_runner.runner.probing import Prober
from cu_runner.runner.recheck import train_again
from cu_runner.runner.saved_state import SavedState
from cu_runner.runner.training import Training, check_composition, erase
from cu_runner.runner.weights import TrainedWeights, changes_so_far
from cu_runner.runtime import distributed
from cu_runner.runtime.devices import forget_peak_memory, peak_memory_mb
from cu_runner.runtime.lazy import pd, torch
from cu_runner.runtime.provenance import made_with
from cu_runner.runtime.seeding import RandomSource
from cu_runner.runtime.signals import StopSignals
from cu_runner.schema.json_files import parse_json
from cu_runner.store.cache import Cache
from cu_runner.store.checkpoint import Checkpoint
from cu_runner.store.files import from_safetensors, to_csv, to_json, to_safetensors
from cu_runner.store.layout import DELTA, MERGED, TRAINING
from cu_runner.store.records import UNMEASURED, Metrics, Row, StepRecord, StepResult, TrainingRecord
from cu_runner.store.run_directory import RunStore
from cu_runner.trackers.mirror import Mirror

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


class Runner:
    """Makes the steps of a run that are missing. Call run()."""

    def __init__(
        self,
        plan: RunConfig,
        parts: RunParts,
        store: RunStore,
        cache: Cache,
        tracker: Mirror,
        stop: StopSignals | None = None,
        remarks: Callable[[list[StepRecord]], list[str]] = lambda steps: [],
    ) -> None:
        """Take what a run is made of and where it writes.

        Args:
            stop: receives the signals that ask the run to stop; None receives none.
            remarks: lines for the log on the last of the finished steps, after each request.
        """
        self.plan, self.parts, self.store, self.cache = plan, parts, store, cache
        self.tracker, self.stop, self.remarks = tracker, stop or StopSignals(), remarks
        self.shown_steps: int | None = None  # of training, up to which the progress counts
        self._first_step: float | None = None  # seconds from the start of the process

    def run(self) -> list[StepRecord]:
        """Make every step that is not finished yet; return all of them.

        Raises:
            StoreError: the run directory is damaged. TrainingError: the loss is not finite.
                ValueError: the sequence names a concept that the evaluator cannot predict.
        """
        spine, parts = self.plan.spine, self.parts
        check_composition(parts.method, parts.regularizers, spine.train)
        self.instruments = self.take_instruments()
        own = parts.regularizers.values()
        self.weights = TrainedWeights.of(parts.model, parts.method, own, parts.sequence)
        self.device = parts.model.device
        told = (self.instruments, self.weights, self.cache)
        self.prober = Prober.of(self.plan, parts.probes, self.store, *told)
        self._checkpoint = Checkpoint(self.store.directory, spine.train.save_every, self.device)
        steps = self.store.proven()
        self.tracker.begin([step.row for step in steps])
        if not steps:
            steps.append(self._evaluate_base())
        else:
            self.instruments.check_begun(steps[0], self.store)
            # the process before may have died between the last step's commit and its mirror
            self.tracker.log(steps[-1], self.store.step_dir(steps[-1].index))
        for request in parts.requests[len(steps) - 1 :]:
            steps.append(self._serve(request, steps))
            self.store.write_metrics(steps)
            for remark in self.remarks(steps):
                logger.info("   %s", remark)
        self._checkpoint.remove()  # of a request whose process died right after its commit
        self.store.write_metrics(steps)
        self.store.write_summary(steps)
        return steps

    def take_instruments(self) -> Instruments:
        """Return what the weights are measured with."""
        parts = self.parts
        judges = (parts.evaluator, parts.sequence, parts.retention, self.plan.spine.eval)
        return Instruments.begin(parts.model, *judges, self.cache)

    def anchors(self, prompts: list[str], number: int, *, mirrored: bool = False) -> Tensor:
        """Return latents of the untouched model's images of prompts, as Scope.anchors says."""
        images = AnchorImages(
            self.parts.model,
            self.instruments.model_sha256,
            self.weights.params,
            self.weights.base,
            self.plan.spine.anchors,
            self.cache,
            self.plan.spine.eval.batch_size,
        )
        return images.latents(prompts, number, mirrored=mirrored)

    def stage(self, name: str) -> None:
        """Take note of what the run does next: a run itself does not."""

    def measured(self, erased: Ordered[Concept]) -> Ordered[Concept]:
        """Return those of the unlearned concepts whose images are made after a request: all."""
        return erased

    def _evaluate_base(self) -> StepRecord:
        """Measure the untouched model on every concept of the sequence; cached across runs."""
        self.stage("images")
        started = time.monotonic()
        files, metrics = self.instruments.measure(0, [], "", self.cache)
        seconds = {"train": 0.0, "eval": time.monotonic() - started}
        files, metrics = self.prober.add(0, [], files, metrics, seconds)
        step = self._commit(None, files, self._row(None, metrics, seconds), seconds, None)
        if distributed.is_main():
            warn_of_unrecognised(step.row)
        return step

    def _serve(self, request: Request, steps: list[StepRecord]) -> StepRecord:
        """Serve one request: weights, unlearn, save, evaluate, commit."""
        started, parent = time.monotonic(), steps[-1]
        forget_peak_memory(self.device)
        continues = request.start == "previous" and parent.index > 0
        place = self.store.step_dir(parent.index)
        self.weights.set(self.weights.read(place / DELTA) if continues else None)
        kept = self.weights.are_gates and (continues or parent.index == 0) and parent.evaluated
        earlier = Before.of(self.parts.model, place, parent, self.plan.code) if kept else None
        scope = self._scope(request)
        files, training = self._unlearn(scope, parent)
        delta = self.weights.place(from_safetensors(files[DELTA]))
        # What is measured is what is saved: base + delta can differ from theta in the last bit.
        self.weights.set(delta)
        step_l2 = drift(subtract(self.weights.params, scope.start)).l2
        erased: Ordered[Concept] = request.erased
        if (merged := self._merge(scope, delta, steps)) is not None:
            erased = [each.targets[-1] for each in self.parts.requests[: request.index]]
            delta = merged
            files[MERGED] = to_safetensors(merged)
            self.weights.set(merged)
        trained, shown = time.monotonic(), self.measured(erased)
        seconds = {"train": trained - started, "eval": 0.0}
        seen: dict[str, bytes] = {}
        metrics = dict(UNMEASURED)
        if self.plan.spine.eval.is_due(request.index, len(self.parts.requests)):  # else left out
            told = (request.index, shown, request.label, None, self.store.step_dir(0))
            seen, metrics = self.instruments.measure(*told, None, earlier)
            seconds["eval"] = time.monotonic() - trained
            seen, metrics = self.prober.add(request.index, shown, seen, metrics, seconds)
        row = self._row(request, metrics, seconds, drift(delta), step_l2, training.steps)
        with self.stop.deferred():
            step = self._commit(request, files | seen, row, seconds, parent, training)
            self._checkpoint.remove()
        return step

    def _scope(self, request: Request) -> Scope:
        """Return what methods and regularizers see of a request that starts with the weights."""
        return Scope(
            model=self.parts.model,
            sequence=self.parts.sequence.facing(request.targets[-1]),
            request=request,
            params=self.weights.params,
            start=snapshot(self.weights.params),
            base=self.weights.base,
            rng=RandomSource(self.plan.spine.seed, request.number),
            train=self.plan.spine.train,
            anchors=self.anchors,
        )

    def _unlearn(self, scope: Scope, parent: StepRecord) -> tuple[dict[str, bytes], TrainingRecord]:
        """Return delta.safetensors and training.csv of a request, and the record of its training.

        What starts from the base model does not depend on other requests: it is cached, and shared
        by independent and merging runs. Training that was interrupted goes on from its checkpoint.
        """
        parts, spine, request = self.parts, self.plan.spine, scope.request
        judged = self.plan.setting.stop_at is not None
        key: dict[str, object] = {
            "model": self.instruments.model_sha256,
            "device": self.device.type,
            "torch": torch.__version__,
            "settings": self.plan.training_key,
            "request": request.index,
            "targets": [concept.name for concept in request.targets],
            "judge": self.instruments.evaluator_sha256 if judged else None,
        }
        if request.start == "base" and (files := self.cache.fetch("deltas", key)) is not None:
            record = parse_json(files.pop("record.json"))
            return files, TrainingRecord(**record, cached=True)
        place = {"parent": parent.sha256, "signature": self.store.signature}
        saved = SavedState(self._checkpoint, request, key | place, self.plan)
        self.store.goes_on |= saved.mixed
        told = (lambda: self._unlearning_accuracy(request), saved.early_stop)
        early_stop = EarlyStop(self.plan.setting, *told, LossLeft(scope, parts.method))
        report = erase(
            scope,
            parts.method,
            parts.regularizers,
            spine.train,
            lambda training: self.after_step(training, early_stop, saved),
            saved.training,
            self.stop.deferred,
            self.stage,
            self.shown_steps,
        )
        trained = (self.plan, parts.method, parts.regularizers)
        again = train_again(request, *trained, self._scope, self.stop)
        files = {
            DELTA: to_safetensors(subtract(self.weights.params, self.weights.base)),
            TRAINING: to_csv(pd.DataFrame(report.logs)),
        }
        own = [name for name, each in parts.regularizers.items() if each.acts_on != ("weights",)]
        record = {
            "steps": len(report.logs),
            "method": report.method,
            "regularizers": {name: report.regularizers[name] for name in own},
            "early_stop": early_stop.seen,
            "again": again,
        }
        if request.start == "base" and not saved.mixed:  # no one code made it
            self.cache.put("deltas", key, files | {"record.json": to_json(record)})
        return files, TrainingRecord(**record)

    def after_step(self, training: Training, early_stop: EarlyStop, saved: SavedState) -> None:
        """Mirror a training step; decide whether training ends, is saved, or stops after it."""
        self._note_first_step()
        self.tracker.log_step(saved.request.index, training.last)
        training.ended = early_stop(training.done)
        last = training.ended or training.done == training.steps
        self.stop.share()
        due = distributed.from_main(lambda: self._checkpoint.is_due(training.done, last))
        if self.stop.received or due:
            distributed.from_main(self.store.require_here)
            saved.save(training, early_stop)
        self.stop.check()

    def _unlearning_accuracy(self, request: Request) -> float:
        """Measure UA of the weights as they are, in percent; 0 where no image shows a face."""
        predictions = self.instruments.sample(list(request.erased), request.index).predictions
        names = [concept.name for concept in request.erased]
        return forgotten_of(predictions, measured_by(self.parts.sequence), names) or 0.0

    def _merge(
        self, scope: Scope, delta: dict[str, Tensor], steps: list[StepRecord]
    ) -> dict[str, Tensor] | None:
        """Return what a regularizer makes of this delta and the earlier ones; None if none does."""
        files = [self.store.step_dir(step.index) / DELTA for step in steps[1:]]
        told = (list(delta), changes_so_far(files, delta), scope)
        for regularizer in self.parts.regularizers.values():
            if (merged := regularizer.post_request(*told)) is not None:
                return self.weights.given_back(regularizer, merged)
        return None

    def _note_first_step(self) -> None:
        if self._first_step is None:
            self._first_step = time.time() - psutil.Process().create_time()
            logger.debug("first training step %.1f s after the process began", self._first_step)

    def _row(
        self,
        request: Request | None,
        metrics: Metrics,
        seconds: dict[str, float],
        size: Drift | None = None,
        step_l2: float = 0.0,
        train_steps: int = 0,
    ) -> Row:
        """Return a step's row of metrics.csv."""
        size = size or Drift(0.0, 0.0, 0.0)
        return Row(
            request=request.index if request else 0,
            concept=request.label if request else "",
            metrics=metrics,
            drift_l2=size.l2,
            drift_l1=size.l1,
            drift_fraction=size.fraction,
            step_l2=step_l2,
            train_steps=train_steps,
            train_seconds=round(seconds["train"], 2),
            eval_seconds=round(seconds["eval"], 2),
            peak_memory_mb=round(peak_memory_mb(self.device)),
        )

    def _commit(
        self,
        request: Request | None,
        files: dict[str, bytes],
        row: Row,
        seconds: dict[str, float],
        parent: StepRecord | None,
        training: TrainingRecord | None = None,
    ) -> StepRecord:
        """Save a step, mirror it, and say what it brought."""
        result = StepResult(
            index=row.request,
            files=files,
            row=row,
            targets=[concept.name for concept in request.targets] if request else [],
            **self.instruments.hashes(),
            training=training or TrainingRecord(),
            seconds={**seconds, "start_to_first_step": self._first_step},
            **vars(made_with(self.device)),
        )
        step = self.store.save_step(result, parent)
        self.tracker.log(step, self.store.step_dir(step.index))
        logger.info("%s", describe(row, len(self.parts.requests)))
        if recovered := self.prober.describe(row):
            logger.info("   %s", recovered)
        if note := step.training.method.get("note"):
            logger.warning("   request %d: %s", row.request, note)
        return step
