"""cu-eval: measure a run's stored weights again, with another evaluator, sampler, seeds or device. Nothing is trained.

    cu-eval outputs/runs/shapecanvas_style/conabl-none-sequential-s0-ec91c30b 'sequence.seeds=[1,2,3]'

The result is a directory of the same form under <run>/evaluations, with predictions, grids and metrics of every step but no
weights: reports and tables read it like a run. It resumes, and what is complete is not made again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.config.run_config import RunConfig
from cu_runner.evaluators.base import Evaluator
from cu_runner.evaluators.evaluate import check_labels, evaluate
from cu_runner.evaluators.grid import draw_grid
from cu_runner.evaluators.metrics import step_metrics
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.parameters import assign, select_parameters, snapshot
from cu_runner.retention.base import Retention
from cu_runner.runtime.devices import choose_device
from cu_runner.runtime.lazy import nn, pd
from cu_runner.runtime.provenance import made_with
from cu_runner.schema.errors import StoreError
from cu_runner.store.cache import Cache
from cu_runner.store.files import read_delta, sha256_of, to_csv, to_json
from cu_runner.store.layout import GRID, METRICS, PREDICTIONS
from cu_runner.store.records import Step
from cu_runner.store.run_directory import RunStore
from cu_runner.store.run_record import RunRecord

if TYPE_CHECKING:
    from torch import Tensor

NOT_MEASURED = (  # the columns of a row that are the run's own, however its weights are measured
    "request",
    "concept",
    "drift_l2",
    "drift_l1",
    "drift_fraction",
    "step_l2",
    "train_steps",
    "train_seconds",
    "eval_seconds",
    "peak_memory_mb",
)


@dataclass(frozen=True)
class Instruments:
    """What measures weights: the model, its trained weights and how they were before the run, and what looks at images."""

    model: DiffusionModel
    params: dict[str, nn.Parameter]
    base: dict[str, Tensor]
    fingerprint: str
    evaluator: Evaluator
    sequence: Sequence
    retention: Retention | None


def load(run: RunRecord, plan: RunConfig) -> Instruments:
    """Raises StoreError for another model than the run's, and what loading raises."""
    device, sequence = choose_device(plan.spine), plan.sequence.build()
    model, evaluator = plan.model.build(device=device), plan.evaluator.build(device=device)
    model.speed_up(plan.spine.speed)
    check_labels(sequence, evaluator)
    fingerprint = model.fingerprint()
    if fingerprint != run.records[0]["model_sha256"]:
        raise StoreError(
            f"{run.directory}: was made with another model; restore it or give model.path=..."
        )
    params = select_parameters(model.unet, plan.method.build().params)
    model.lower_frozen(params)
    base = snapshot(params)
    retention = plan.retention.build(device=device) if plan.retention else None
    if retention:
        retention.begin(
            model,
            fingerprint,
            plan.spine.eval,
            Cache(Path(plan.spine.paths.outputs) / "cache", plan.code),
        )
    return Instruments(model, params, base, fingerprint, evaluator, sequence, retention)


def measure_again(
    run: RunRecord, plan: RunConfig, store: RunStore, instruments: Instruments | None = None
) -> Iterator[Step]:
    """Every finished step of the run, measured as the plan says; those that are there already come from the store.

    Args:
        instruments: of load(); needed, and loaded here without one, when a step is not there yet.

    Raises:
        StoreError: weights that are damaged or do not fit the model, or another model than the run's.
    """
    steps = store.finished()
    yield from steps
    if len(steps) == len(run.records):
        return
    instruments = instruments or load(run, plan)
    model, retention = instruments.model, instruments.retention
    for index in range(len(steps), len(run.records)):
        started, record = time.monotonic(), run.records[index]
        if index:
            path = run.weights(index)
            if not path.is_file() or sha256_of(path) != record["files"][path.name]:
                raise StoreError(
                    f"{path}: is missing or damaged (its sha256 is not the one in step.json); restore it"
                )
            delta = read_delta(path, instruments.base)
            assign(
                instruments.params,
                instruments.base,
                {name: change.to(model.device) for name, change in delta.items()},
            )
        unlearned = run.unlearned(index)
        predictions, grid = sample(instruments, unlearned, index, record["row"]["concept"], plan)
        measured = step_metrics(predictions, unlearned, instruments.sequence) | (
            retention.measure(index) if retention else {}
        )
        files = {PREDICTIONS: to_csv(predictions), GRID: grid, METRICS: to_json(measured)}
        kept = {name: value for name, value in record["row"].items() if name in NOT_MEASURED}
        row = {name: kept.pop(name) for name in ("request", "concept")} | measured | kept
        row["eval_seconds"] = round(time.monotonic() - started, 2)
        provenance = {
            "targets": record["targets"],
            "run_sha256": record["sha256"],
            "run_code": record["code"],
            "weights": os.path.relpath(run.weights(index), store.directory) if index else None,
            "model_sha256": instruments.fingerprint,
            "evaluator_sha256": instruments.evaluator.fingerprint(),
            **made_with(model.device),
            "training": record["training"],
        }
        if retention:
            provenance["retention_sha256"] = retention.fingerprint()
        steps.append(store.save_step(index, files, provenance, row, steps[-1] if steps else None))
        yield steps[-1]


def sample(
    instruments: Instruments, unlearned: list[str], index: int, label: str, plan: RunConfig
) -> tuple[pd.DataFrame, bytes]:
    """predictions.csv and grid.png of one step, as the run itself would make them. label: of its request."""
    sequence = instruments.sequence
    targets = unlearned if index else [concept.name for concept in sequence.targets]
    concepts = [*(Concept(name, sequence.domain) for name in targets), *sequence.retain]
    evaluation = evaluate(
        instruments.model, instruments.evaluator, sequence, concepts, index, plan.spine.eval
    )
    title = f"after request {index}: {label}" if index else "the untouched model"
    return evaluation.predictions, draw_grid(evaluation.thumbnails, unlearned, title)
