"""run(): the untouched model first, then request by request: weights -> unlearn -> save -> evaluate -> commit.

The unit of restart is the request, and within it the step that its checkpoint was saved after. Randomness is derived from (seed,
request, purpose), and the weights of every request start from the saved delta of the one before: a run that was killed anywhere and
started again ends where an undisturbed one does, bitwise on a CPU. On a GPU some backward kernels are not deterministic, and two
undisturbed runs differ in the last bits as well.
"""

from __future__ import annotations

import io
import json
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psutil

from cu_runner.concepts.requests import Request
from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.evaluators.base import Evaluator
from cu_runner.evaluators.evaluate import Evaluation, check_labels, evaluate
from cu_runner.evaluators.grid import draw_grid
from cu_runner.evaluators.metrics import read_predictions, step_metrics, unlearning_accuracy
from cu_runner.methods.base import Method
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.parameters import Drift, assign, drift, select_parameters, snapshot, subtract
from cu_runner.regularizers.base import Regularizer
from cu_runner.request.anchors import AnchorImages, sampler_key
from cu_runner.request.scope import Scope
from cu_runner.retention.base import Retention
from cu_runner.runner.early_stop import EarlyStop
from cu_runner.runner.tracking import Tracker
from cu_runner.runner.training import Training, check_composition, erase
from cu_runner.runtime import distributed
from cu_runner.runtime.devices import peak_memory_mb
from cu_runner.runtime.lazy import pd, torch
from cu_runner.runtime.provenance import made_with
from cu_runner.runtime.seeding import RandomSource
from cu_runner.runtime.signals import StopSignals
from cu_runner.schema.errors import StoreError
from cu_runner.schema.settings import EvalSettings, PlanSettings, Sampler, Speed, TrainSettings
from cu_runner.store.cache import Cache
from cu_runner.store.checkpoint import Checkpoint
from cu_runner.store.files import (
    from_safetensors,
    read_delta,
    read_tensor,
    to_csv,
    to_json,
    to_safetensors,
)
from cu_runner.store.layout import DELTA, GRID, MERGED, METRICS, PREDICTIONS, TRAINING
from cu_runner.store.records import Step
from cu_runner.store.run_directory import RunStore

if TYPE_CHECKING:
    from torch import Tensor


def describe(row: dict[str, object], total: int) -> str:
    """The line that the terminal shows for a step."""
    width = len(str(total))
    ua, ra_i, ra_c = (
        "    -" if row[name] is None else f"{row[name]:5.1f}" for name in ("UA", "RA_I", "RA_C")
    )
    cost = f"{row['train_seconds']:.0f} s train, {row['eval_seconds']:.0f} s eval"
    head = f"{row['request']:>{width}}/{total}  {row['concept'] or 'untouched model':<18}"
    return f"{head} UA {ua}  RA-I {ra_i}  RA-C {ra_c}  drift {row['drift_l2']:7.3f}  ({cost})"


logger = logging.getLogger(__name__)


def prepare(model: DiffusionModel, speed: Speed, train: TrainSettings) -> None:
    """Make a loaded model the one that a run works with: as fast, and with as little memory, as its settings say."""
    model.speed_up(speed)
    if train.gradient_checkpointing:
        model.checkpoint_gradients()


@dataclass
class Runner:
    """Everything a run is made of. Call run()."""

    model: DiffusionModel
    evaluator: Evaluator
    sequence: Sequence
    method: Method
    regularizers: dict[str, Regularizer]
    requests: list[Request]
    setting: PlanSettings
    store: RunStore
    cache: Cache
    tracker: Tracker
    train: TrainSettings
    anchors: Sampler
    eval: EvalSettings
    seed: int
    training_key: dict[
        str, object
    ]  # every setting that a request from the base model depends on: names its delta in the cache
    retention: Retention | None = None  # what else the model keeps is measured too
    stop: StopSignals = field(default_factory=StopSignals)
    _first_step: float | None = field(
        default=None, init=False
    )  # seconds from the start of the process

    def run(self) -> list[Step]:
        """Make every step that is not finished yet; returns all of them.

        Raises:
            StoreError: the run directory is damaged. TrainingError: the loss is not finite. ValueError: the sequence names a
            concept that the evaluator cannot predict.
        """
        check_labels(self.sequence, self.evaluator)
        check_composition(self.method, self.regularizers)
        self._fingerprint, self._judge = self.model.fingerprint(), self.evaluator.fingerprint()
        self._params = select_parameters(self.model.unet, self.method.params)
        self.model.lower_frozen(self._params)
        self._base = snapshot(self._params)
        self._anchors = AnchorImages(
            self.model,
            self._fingerprint,
            self._params,
            self._base,
            self.anchors,
            self.cache,
            self.eval.batch_size,
        )
        self._checkpoint = Checkpoint(
            self.store.directory, self.train.save_every, self.model.device
        )
        if self.retention:
            self.retention.begin(self.model, self._fingerprint, self.eval, self.cache)
        steps = self.store.finished()
        if not steps:
            steps.append(self._evaluate_base())
        else:
            self._check_base(steps[0])
            # the process before may have died between the last step's commit and its mirror
            last = steps[-1]
            training = (last.directory / TRAINING).read_bytes() if last.index else None
            self.tracker.log(last.index, last.row, (last.directory / GRID).read_bytes(), training)
        for request in self.requests[len(steps) - 1 :]:
            steps.append(self._serve(request, steps))
            self.store.write_metrics([step.row for step in steps])
        self._checkpoint.remove()  # of a request whose process died right after its commit
        self.store.write_metrics([step.row for step in steps])
        self.store.write_summary(steps)
        return steps

    def _check_base(self, base: Step) -> None:
        """A run continues only on the model and the evaluator that it began with."""
        record = json.loads((base.directory / "step.json").read_text(encoding="utf-8"))
        judges = {"model": self._fingerprint, "evaluator": self._judge}
        judges |= {"retention": self.retention.fingerprint()} if self.retention else {}
        for name, now in judges.items():
            if record[f"{name}_sha256"] != now:
                raise StoreError(
                    f"{self.store.directory}: was begun with another {name}; restore it or move the run away"
                )

    def _evaluate_base(self) -> Step:
        """Measure the untouched model on every concept of the sequence; cached across runs."""
        started = time.monotonic()
        sequence = self.sequence
        concepts = [*sequence.targets, *sequence.retain]
        key = {
            "model": self._fingerprint,
            "evaluator": self._judge,
            "precision": self.model.precision,
            "domains": [sequence.domain, sequence.cross_domain],
            "images": [
                [image.prompt, image.seed, image.concept, image.cross]
                for image in sequence.evaluation_images(concepts)
            ],
            "sampler": sampler_key(self.model, self.eval),
            "device": self.model.device.type,
            "torch": torch.__version__,
        }
        files = self.cache.fetch("base_eval", key)
        if files is None:
            evaluation = self._sample(concepts, 0)
            files = {
                PREDICTIONS: to_csv(evaluation.predictions),
                GRID: draw_grid(evaluation.thumbnails, [], "the untouched model"),
            }
            self.cache.put("base_eval", key, files)
        kept = self.retention.measure(0) if self.retention else {}
        seconds = {"train": 0.0, "eval": time.monotonic() - started}
        return self._commit(None, [], files, kept, None, 0.0, {}, seconds, None)

    def _serve(self, request: Request, steps: list[Step]) -> Step:
        """One request: weights, unlearn, save, evaluate, commit."""
        started = time.monotonic()
        if self.model.device.type == "cuda":  # the peak of a CPU process cannot be forgotten
            torch.cuda.reset_peak_memory_stats(self.model.device)
        parent = steps[-1]
        if request.start == "previous" and parent.index > 0:
            assign(self._params, self._base, self._load(parent))
        else:
            assign(self._params, self._base)
        start = snapshot(self._params)
        files, training = self._unlearn(request, start, parent)
        delta = self._to_device(from_safetensors(files[DELTA]))
        # What is measured is what is saved: base + delta can differ from theta in the last bit.
        assign(self._params, self._base, delta)
        step_l2 = drift(subtract(self._params, start)).l2
        erased, merged = request.erased, self._merge(delta, steps)
        if merged is not None:
            erased, delta = (
                tuple(each.targets[-1] for each in self.requests[: request.index]),
                merged,
            )
            files[MERGED] = to_safetensors(merged)
            assign(self._params, self._base, merged)
        trained = time.monotonic()
        evaluation = self._sample([*erased, *self.sequence.retain], request.index)
        unlearned = [concept.name for concept in erased]
        files |= {
            PREDICTIONS: to_csv(evaluation.predictions),
            GRID: draw_grid(
                evaluation.thumbnails, unlearned, f"after request {request.index}: {request.label}"
            ),
        }
        kept = self.retention.measure(request.index) if self.retention else {}
        seconds = {"train": trained - started, "eval": time.monotonic() - trained}
        with self.stop.deferred():
            step = self._commit(
                request, unlearned, files, kept, delta, step_l2, training, seconds, parent
            )
            self._checkpoint.remove()
        return step

    def _unlearn(
        self, request: Request, start: dict[str, Tensor], parent: Step
    ) -> tuple[dict[str, bytes], dict[str, object]]:
        """delta.safetensors and training.csv of a request, and the record of its training.

        What starts from the base model does not depend on other requests: it is cached, and shared by independent and merging runs.
        Training that was interrupted goes on from its checkpoint.
        """
        key = {
            "model": self._fingerprint,
            "device": self.model.device.type,
            "torch": torch.__version__,
            "settings": self.training_key,
            "request": request.index,
            "targets": [concept.name for concept in request.targets],
            "judge": self._judge if self.setting.stop_at is not None else None,
        }
        if request.start == "base" and (files := self.cache.fetch("deltas", key)) is not None:
            return files, json.loads(files.pop("record.json")) | {"cached": True}
        scope = Scope(
            model=self.model,
            sequence=self.sequence,
            request=request,
            params=self._params,
            start=start,
            base=self._base,
            rng=RandomSource(self.seed, request.index),
            batch_size=self.train.batch_size,
            steps=self.train.steps,
            anchors=self._anchors.latents,
        )
        state = self._checkpoint.begin(
            key | {"parent": parent.sha256, "signature": self.store.signature}
        )
        early_stop = EarlyStop(
            self.setting,
            lambda: self._unlearning_accuracy(request),
            state["early_stop"] if state else [],
        )
        if state:
            logger.info(
                "   request %d goes on after step %d", request.index, len(state["training"]["rows"])
            )

        def after_step(training: Training) -> None:
            self._note_first_step()
            training.ended = early_stop(training.done)
            last = training.ended or training.done == training.steps
            self.stop.share()
            if self.stop.received or distributed.from_main(
                lambda: self._checkpoint.is_due(training.done, last)
            ):
                self._checkpoint.save({"training": training.state(), "early_stop": early_stop.seen})
            self.stop.check()

        trained = state["training"] if state else None
        report = erase(
            scope,
            self.method,
            self.regularizers,
            self.train,
            after_step,
            trained,
            self.stop.deferred,
        )
        files = {
            DELTA: to_safetensors(subtract(self._params, self._base)),
            TRAINING: to_csv(pd.DataFrame(report.logs)),
        }
        record = {
            "steps": len(report.logs),
            "method": report.method,
            "regularizers": {
                name: entry
                for name, entry in report.regularizers.items()
                if self.regularizers[name].acts_on != ("weights",)
            },
            "early_stop": early_stop.seen,
        }
        if request.start == "base":
            self.cache.put("deltas", key, files | {"record.json": to_json(record)})
        return files, record

    def _unlearning_accuracy(self, request: Request) -> float:
        """UA of the weights as they are, in percent; 0 where it cannot be told, since no image shows a face."""
        predictions = self._sample(list(request.erased), request.index).predictions
        return (
            unlearning_accuracy(
                predictions, self.sequence.domain, [concept.name for concept in request.erased]
            )
            or 0.0
        )

    def _merge(self, delta: dict[str, Tensor], steps: list[Step]) -> dict[str, Tensor] | None:
        """What a regularizer makes of this request's delta and the earlier ones; None if none of them wants to."""

        def deltas(name: str) -> Tensor:
            changes = torch.empty(len(steps), *delta[name].shape)
            for row, step in enumerate(steps[1:]):
                changes[row] = read_tensor(step.directory / DELTA, name)
            changes[-1] = delta[name]
            return changes

        for regularizer in self.regularizers.values():
            merged = regularizer.post_request(list(delta), deltas)
            if merged is not None:
                return self._to_device(merged)
        return None

    def _note_first_step(self) -> None:
        if self._first_step is None:
            self._first_step = time.time() - psutil.Process().create_time()
            logger.debug(
                "first training step %.1f s after the start of the process", self._first_step
            )

    def _to_device(self, delta: dict[str, Tensor]) -> dict[str, Tensor]:
        """In the order of the weights: safetensors returns tensors in any, and the order of a sum is seen in its last digit."""
        return {name: delta[name].to(self.model.device) for name in self._params}

    def _load(self, step: Step) -> dict[str, Tensor]:
        return self._to_device(read_delta(step.directory / DELTA, self._base))

    def _sample(self, concepts: list[Concept], step: int) -> Evaluation:
        return evaluate(self.model, self.evaluator, self.sequence, concepts, step, self.eval)

    def _commit(
        self,
        request: Request | None,
        unlearned: list[str],
        files: dict[str, bytes],
        kept: dict[str, float | None],
        delta: dict[str, Tensor] | None,
        step_l2: float,
        training: dict[str, object],
        seconds: dict[str, float],
        parent: Step | None,
    ) -> Step:
        index = request.index if request else 0
        table = read_predictions(io.BytesIO(files[PREDICTIONS]))
        measured = step_metrics(table, unlearned, self.sequence) | kept
        size = drift(delta) if delta else Drift(0.0, 0.0, 0.0)
        row = {
            "request": index,
            "concept": request.label if request else "",
            **measured,
            "drift_l2": size.l2,
            "drift_l1": size.l1,
            "drift_fraction": size.fraction,
            "step_l2": step_l2,
            "train_steps": training.get("steps", 0),
            "train_seconds": round(seconds["train"], 2),
            "eval_seconds": round(seconds["eval"], 2),
            "peak_memory_mb": round(peak_memory_mb(self.model.device)),
        }
        record = {
            "targets": [concept.name for concept in request.targets] if request else [],
            "model_sha256": self._fingerprint,
            "evaluator_sha256": self._judge,
            "training": training,
            "seconds": seconds | {"start_to_first_step": self._first_step},
            **made_with(self.model.device),
        }
        if self.retention:
            record["retention_sha256"] = self.retention.fingerprint()
        files = files | {METRICS: to_json(measured)}
        step = self.store.save_step(index, files, record, row, parent)
        self.tracker.log(index, row, files[GRID], files.get(TRAINING))
        logger.info("%s", describe(row, len(self.requests)))
        for note in filter(None, [training.get("method", {}).get("note")]):
            logger.warning("   request %d: %s", index, note)
        return step
