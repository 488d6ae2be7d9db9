"""run(): the untouched model first, then request by request: weights -> unlearn -> save -> evaluate -> commit.

The unit of restart is the request. Randomness is derived from (seed, request, purpose), and the weights of every request start from
the saved delta of the one before: a run that was killed anywhere and started again ends where an undisturbed one does, bitwise on a
CPU. On a GPU some backward kernels are not deterministic, and two undisturbed runs differ in the last bits as well.
"""

import importlib.metadata
import io
import json
import logging
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import psutil
import safetensors.torch
import torch
from torch import Tensor

from cu_runner.concepts import Request, Sequence
from cu_runner.evaluation import Evaluation, compute_metrics, draw_grid, evaluate, metrics_as_dict
from cu_runner.evaluators.base import Evaluator
from cu_runner.methods.base import Method, Scope
from cu_runner.models import DiffusionModel
from cu_runner.params import assign, drift, select_parameters, snapshot, subtract
from cu_runner.regularizers.base import Regularizer
from cu_runner.sampling import generate
from cu_runner.seeding import RandomSource, derive_seed
from cu_runner.settings import EvalSettings, TrainSettings
from cu_runner.store import DELTA, GRID, METRICS, PREDICTIONS, Cache, RunStore, Step, StoreError, read_delta, to_json
from cu_runner.tracking import Tracker
from cu_runner.training import TrainingReport, erase

logger = logging.getLogger(__name__)

ANCHOR_SEED = 0  # the anchor set of a prompt list is one and the same for every run


@dataclass
class Runner:
    """Everything a run is made of. Call run()."""

    model: DiffusionModel
    evaluator: Evaluator
    sequence: Sequence
    method: Method
    regularizers: dict[str, Regularizer]
    requests: list[Request]
    store: RunStore
    cache: Cache
    tracker: Tracker
    train: TrainSettings
    eval: EvalSettings
    seed: int
    _first_step: float | None = field(default=None, init=False)  # seconds from the start of the process

    def run(self) -> list[Step]:
        """Make every step that is not finished yet; returns all of them.

        Raises:
            StoreError: the run directory is damaged. TrainingError: the loss is not finite. ValueError: the sequence names a
            concept that the evaluator cannot predict.
        """
        self._check_labels()
        self._fingerprint, self._judge = self.model.fingerprint(), self.evaluator.fingerprint()
        self._params = select_parameters(self.model.unet, self.method.params)
        self._base = snapshot(self._params)
        steps = self.store.finished()
        if not steps:
            steps.append(self._evaluate_base())
        else:
            self._check_base(steps[0])
            # the process before may have died between the last step's commit and its mirror
            self.tracker.log(steps[-1].index, steps[-1].row, (steps[-1].directory / GRID).read_bytes())
        for request in self.requests[len(steps) - 1 :]:
            steps.append(self._serve(request, steps))
            self.store.write_metrics([step.row for step in steps])
        self.store.write_metrics([step.row for step in steps])
        self.store.write_summary(self._summary(steps))
        return steps

    # ------------------------------------------------------------------------------------------------ checks
    def _check_labels(self) -> None:
        """Every concept whose accuracy is measured must be a label of the evaluator."""
        labels, sequence = self.evaluator.labels(), self.sequence
        for concept in (*sequence.targets, *sequence.retain, *sequence.cross_retain):
            if concept.name not in labels.get(concept.domain, []):
                known = ", ".join(labels.get(concept.domain, [])[:5]) or "none"
                raise ValueError(f"sequence: the evaluator has no {concept.domain} {concept.name!r} (it knows {known}, ...)")

    def _check_base(self, base: Step) -> None:
        """A run continues only on the model and the evaluator that it began with."""
        record = json.loads((base.directory / "step.json").read_text(encoding="utf-8"))
        for name, now in (("model", self._fingerprint), ("evaluator", self._judge)):
            if record[f"{name}_sha256"] != now:
                raise StoreError(
                    f"{self.store.directory}: was begun with other weights of the {name}; restore them or move the run away"
                )

    # ------------------------------------------------------------------------------------------------ step 0
    def _evaluate_base(self) -> Step:
        """Measure the untouched model on every concept of the sequence; cached across runs."""
        started = time.monotonic()
        sequence = self.sequence
        concepts = [*sequence.targets, *sequence.retain]
        key = {
            "model": self._fingerprint,
            "evaluator": self._judge,
            "precision": self.model.precision,
            "prompts": [sequence.evaluation_prompt(concept, cross) for concept in concepts for cross in sequence.cross_retain],
            "seeds": list(sequence.seeds),
            "sampler": [self.eval.steps, float(self.eval.guidance)],
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
        table = pd.read_csv(io.BytesIO(files[PREDICTIONS]))
        seconds = {"train": 0.0, "eval": time.monotonic() - started}
        return self._commit(0, None, files, table, {}, {}, seconds, None)

    # -------------------------------------------------------------------------------------------- one request
    def _serve(self, request: Request, steps: list[Step]) -> Step:
        """One request, as DESIGN.md section 5 tells it."""
        started = time.monotonic()
        parent = steps[-1]
        if request.start == "previous" and parent.index > 0:
            assign(self._params, self._base, self._load(parent))
        else:
            assign(self._params, self._base)
        start = snapshot(self._params)
        scope = Scope(
            model=self.model,
            sequence=self.sequence,
            request=request,
            params=self._params,
            start=start,
            base=self._base,
            rng=RandomSource(self.seed, request.index),
            batch_size=self.train.batch_size,
            anchors=self._anchor_latents,
        )
        report = erase(scope, self.method, self.regularizers, self.train, self._note_first_step)
        delta = subtract(self._params, self._base)
        # What is measured is what is saved: base + delta can differ from theta in the last bit.
        assign(self._params, self._base, delta)
        trained = time.monotonic()
        evaluation = self._sample([*request.erased, *self.sequence.retain], request.index)
        unlearned = [concept.name for concept in request.erased]
        title = f"after request {request.index}: {request.label}"
        files = {
            DELTA: safetensors.torch.save({name: change.cpu().contiguous() for name, change in delta.items()}),
            PREDICTIONS: to_csv(evaluation.predictions),
            GRID: draw_grid(evaluation.thumbnails, unlearned, title),
        }
        seconds = {"train": trained - started, "eval": time.monotonic() - trained}
        change = {"delta": delta, "step": subtract(self._params, start)}
        table = pd.read_csv(io.BytesIO(files[PREDICTIONS]))
        return self._commit(request.index, request, files, table, change, self._training_record(report), seconds, parent)

    def _note_first_step(self, step: int) -> None:
        if self._first_step is None:
            self._first_step = time.time() - psutil.Process().create_time()
            logger.debug("first training step %.1f s after the start of the process", self._first_step)

    def _load(self, step: Step) -> dict[str, Tensor]:
        delta = read_delta(step.directory / DELTA, self._base)
        return {name: change.to(self.model.device) for name, change in delta.items()}

    def _sample(self, concepts: list, step: int) -> Evaluation:
        return evaluate(
            self.model,
            self.evaluator,
            self.sequence,
            concepts,
            step,
            steps=self.eval.steps,
            guidance=self.eval.guidance,
            batch_size=self.eval.batch_size,
        )

    def _anchor_latents(self, prompts: list[str], number: int) -> Tensor:
        """Latents [number, C, H, W] of images that the untouched model makes of the prompts, in turn; cached across runs."""
        captions = [prompts[i % len(prompts)] for i in range(number)]
        sampler = self.model.sampler
        key = {
            "model": self._fingerprint,
            "prompts": captions,
            "sampler": [sampler.steps, float(sampler.guidance)],
            "precision": self.model.precision,
            "device": self.model.device.type,
            "torch": torch.__version__,
        }
        files = self.cache.fetch("anchors", key)
        if files is None:
            now = snapshot(self._params)
            assign(self._params, self._base)
            images = generate(
                self.model,
                captions,
                [derive_seed("anchor", ANCHOR_SEED, i) for i in range(number)],
                steps=sampler.steps,
                guidance=sampler.guidance,
                batch_size=self.eval.batch_size,
            )
            latents = torch.cat([self.model.encode_images(batch) for batch in images])
            assign(self._params, now)
            files = {"latents.safetensors": safetensors.torch.save({"latents": latents.cpu().contiguous()})}
            self.cache.put("anchors", key, files)
        return safetensors.torch.load(files["latents.safetensors"])["latents"]

    @staticmethod
    def _training_record(report: TrainingReport) -> dict[str, object]:
        return {"regularizers": report.records, "first_loss": report.losses[0], "last_loss": report.losses[-1]}

    # ------------------------------------------------------------------------------------------------ commit
    def _commit(
        self,
        index: int,
        request: Request | None,
        files: dict[str, bytes],
        predictions: pd.DataFrame,
        change: dict[str, dict[str, Tensor]],
        training: dict[str, object],
        seconds: dict[str, float],
        parent: Step | None,
    ) -> Step:
        sequence = self.sequence
        current = [concept.name for concept in request.targets] if request else []
        previous = [concept.name for concept in request.erased if concept.name not in current] if request else []
        retain = [concept.name for concept in sequence.retain]
        metrics = metrics_as_dict(compute_metrics(predictions, sequence.domain, sequence.cross_domain, current, previous, retain))
        size = drift(change["delta"]) if change else None
        row = {
            "request": index,
            "concept": request.label if request else "",
            **metrics,
            "drift_l2": size.l2 if size else 0.0,
            "drift_l1": size.l1 if size else 0.0,
            "drift_fraction": size.fraction if size else 0.0,
            "step_l2": drift(change["step"]).l2 if change else 0.0,
            "train_steps": self.train.steps if request else 0,
            "train_seconds": round(seconds["train"], 2),
            "eval_seconds": round(seconds["eval"], 2),
            "peak_memory_mb": round(peak_memory_mb(self.model.device)),
        }
        record = {
            "targets": current,
            "model_sha256": self._fingerprint,
            "evaluator_sha256": self._judge,
            "training": training,
            "seconds": seconds | {"start_to_first_step": self._first_step},
            "versions": versions(),
            "device": device_name(self.model.device),
            "git_commit": git_commit(),
        }
        files = files | {METRICS: to_json(metrics)}
        step = self.store.save_step(index, files, record, row, parent)
        self.tracker.log(index, row, files[GRID])
        logger.info("%s", describe(row, len(self.requests)))
        return step

    def _summary(self, steps: list[Step]) -> dict[str, object]:
        last = steps[-1]
        return {
            "signature": self.store.signature,
            "requests": len(self.requests),
            "sha256": last.sha256,
            "metrics": {name: last.row[name] for name in ("UA", "RA_I", "RA_C", "RA_C_retained", "drift_l2")},
            "seconds": round(sum(float(step.row["train_seconds"]) + float(step.row["eval_seconds"]) for step in steps), 1),
        }


def describe(row: dict[str, object], total: int) -> str:
    """The line that the terminal shows for a step."""
    width = len(str(total))
    ua = "    -" if row["UA"] is None else f"{row['UA']:5.1f}"
    cost = f"{row['train_seconds']:.0f} s train, {row['eval_seconds']:.0f} s eval"
    head = f"{row['request']:>{width}}/{total}  {row['concept'] or 'untouched model':<18}"
    return f"{head} UA {ua}  RA-I {row['RA_I']:5.1f}  RA-C {row['RA_C']:5.1f}  drift {row['drift_l2']:7.3f}  ({cost})"


def to_csv(table: pd.DataFrame) -> bytes:
    return table.to_csv(index=False).encode()


def peak_memory_mb(device: torch.device) -> float:
    """Peak device memory on a GPU; on a CPU the peak resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"


def versions() -> dict[str, str]:
    names = ("torch", "diffusers", "transformers", "numpy", "cu_runner")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def git_commit() -> str | None:
    """The commit of the checkout that this code runs from; None for an installed package."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return None
    return found.stdout.strip() or None
