"""cu-eval: measure a run's stored weights again, with another evaluator, sampler, seeds or device. Nothing is trained.

    cu-eval outputs/runs/shapecanvas_style/conabl-none-sequential-s0-ec91c30b 'sequence.seeds=[1,2,3]'

The result is a directory of the same form under <run>/evaluations, with predictions, grids and metrics of every step but no
weights: reports and tables read it like a run. It resumes, and what is complete is not made again.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from torch import Tensor, nn

from cu_runner.concepts import Concept, Sequence
from cu_runner.config import RunConfig, check_run, revise
from cu_runner.evaluation import check_labels, draw_grid, evaluate, step_metrics
from cu_runner.evaluators.base import Evaluator
from cu_runner.models import DiffusionModel
from cu_runner.params import assign, select_parameters, snapshot
from cu_runner.process import Parser, choose_device, one_line_failures, quiet_libraries
from cu_runner.provenance import made_with
from cu_runner.retention.base import Retention
from cu_runner.runs import EVALUATIONS, RunRecord, read_run
from cu_runner.signature import signature
from cu_runner.store import GRID, METRICS, PREDICTIONS, Cache, RunStore, Step, StoreError, read_delta, sha256_of, to_csv, to_json
from cu_runner.trust import allowed_modules, refuse_unasked_pickles

NOT_MEASURED = (  # the columns of a row that are the run's own, however its weights are measured
    "request", "concept", "drift_l2", "drift_l1", "drift_fraction", "step_l2", "train_steps", "train_seconds", "eval_seconds",
    "peak_memory_mb",
)  # fmt: skip
SHOWN = ("UA", "RA_I", "RA_C", "RA_C_retained")


def main() -> None:
    """Entry point of `cu-eval`."""
    parser = Parser(prog="cu-eval", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="a run directory, as the last line of cu-run names it")
    parser.add_argument(
        "overrides", nargs="*", help="evaluator=NAME, retention=NAME, eval.steps=50, 'sequence.seeds=[1,2]', device=cpu, ..."
    )
    arguments = parser.parse_intermixed_args()
    with one_line_failures("cu-eval"):
        quiet_libraries()
        run = read_run(arguments.run.resolve())
        if run.is_evaluation:
            raise ValueError(f"{run.directory}: is an evaluation, without weights; give its run, {run.directory.parent.parent}")
        allowed = allowed_modules(arguments.overrides)
        revised = revise(run.config, arguments.overrides)
        refuse_unasked_pickles(revised, arguments.overrides)
        plan = check_run(revised, run.method, allowed=allowed)
        directory = run.directory / EVALUATIONS / f"{run.directory.name[:-8]}{plan.signature[:8]}"
        complete = len(list((directory / "steps").glob("*/step.json"))) == len(run.records)
        judge = None if complete else load(run, plan)  # what cannot be loaded leaves no directory behind
        with RunStore(directory, plan.resolved, signature) as store:
            for step in measure_again(run, plan, store, judge):
                print(compare(run.records[step.index]["row"], step.row), flush=True)
            store.write_metrics([step.row for step in store.finished()])
        print(f"evaluation: {directory}")


def compare(before: dict[str, object], after: dict[str, object]) -> str:
    """One line: each metric now, and in brackets as the run itself measured it."""
    parts = [f"{after['request']:>3}  {after['concept'] or 'untouched model':<18}"]
    for name in SHOWN:
        now, then = ("-" if row[name] is None else f"{row[name]:.1f}" for row in (after, before))
        parts.append(f"{name.replace('_', '-', 1).replace('_', ' ')} {now:>5} ({then})")
    return "  ".join(parts)


@dataclass(frozen=True)
class Judge:
    """What measures weights: the model, its trained weights and how they were before the run, and what looks at images."""

    model: DiffusionModel
    params: dict[str, nn.Parameter]
    base: dict[str, Tensor]
    fingerprint: str
    evaluator: Evaluator
    sequence: Sequence
    retention: Retention | None


def load(run: RunRecord, plan: RunConfig) -> Judge:
    """Raises StoreError for other weights of the model than the run's, and what loading raises."""
    device, sequence = choose_device(plan.spine), plan.sequence.build()
    model, evaluator = plan.model.build(device=device), plan.evaluator.build(device=device)
    model.speed_up(plan.spine.speed)
    check_labels(sequence, evaluator)
    fingerprint = model.fingerprint()
    if fingerprint != run.records[0]["model_sha256"]:
        raise StoreError(f"{run.directory}: was made with other weights of the model; restore them or give model.path=...")
    params = select_parameters(model.unet, plan.method.build().params)
    model.lower_frozen(params)
    base = snapshot(params)
    retention = plan.retention.build(device=device) if plan.retention else None
    if retention:
        retention.begin(model, fingerprint, plan.spine.eval, Cache(Path(plan.spine.paths.outputs) / "cache"))
    return Judge(model, params, base, fingerprint, evaluator, sequence, retention)


def measure_again(run: RunRecord, plan: RunConfig, store: RunStore, judge: Judge | None = None) -> Iterator[Step]:
    """Every finished step of the run, measured as the plan says; those that are there already come from the store.

    Args:
        judge: of load(); needed, and loaded here without one, when a step is not there yet.

    Raises:
        StoreError: weights that are damaged or do not fit the model, or other weights of the model than the run's.
    """
    steps = store.finished()
    yield from steps
    if len(steps) == len(run.records):
        return
    judge = judge or load(run, plan)
    model, retention = judge.model, judge.retention
    for index in range(len(steps), len(run.records)):
        started, record = time.monotonic(), run.records[index]
        if index:
            path = run.weights(index)
            if not path.is_file() or sha256_of(path) != record["files"][path.name]:
                raise StoreError(f"{path}: is missing or damaged (its sha256 is not the one in step.json); restore it")
            delta = read_delta(path, judge.base)
            assign(judge.params, judge.base, {name: change.to(model.device) for name, change in delta.items()})
        unlearned = run.unlearned(index)
        predictions, grid = sample(judge, unlearned, index, record["row"]["concept"], plan)
        measured = step_metrics(predictions, unlearned, judge.sequence) | (retention.measure(index) if retention else {})
        files = {PREDICTIONS: to_csv(predictions), GRID: grid, METRICS: to_json(measured)}
        kept = {name: value for name, value in record["row"].items() if name in NOT_MEASURED}
        row = {name: kept.pop(name) for name in ("request", "concept")} | measured | kept
        row["eval_seconds"] = round(time.monotonic() - started, 2)
        provenance = {
            "targets": record["targets"],
            "run_sha256": record["sha256"],
            "weights": os.path.relpath(run.weights(index), store.directory) if index else None,
            "model_sha256": judge.fingerprint,
            "evaluator_sha256": judge.evaluator.fingerprint(),
            **made_with(model.device),
            "training": record["training"],
        }
        if retention:
            provenance["retention_sha256"] = retention.fingerprint()
        steps.append(store.save_step(index, files, provenance, row, steps[-1] if steps else None))
        yield steps[-1]


def sample(judge: Judge, unlearned: list[str], index: int, label: str, plan: RunConfig) -> tuple[pd.DataFrame, bytes]:
    """predictions.csv and grid.png of one step, as the run itself would make them. label: of its request."""
    sequence = judge.sequence
    targets = unlearned if index else [concept.name for concept in sequence.targets]
    concepts = [*(Concept(name, sequence.domain) for name in targets), *sequence.retain]
    evaluation = evaluate(judge.model, judge.evaluator, sequence, concepts, index, plan.spine.eval)
    title = f"after request {index}: {label}" if index else "the untouched model"
    return evaluation.predictions, draw_grid(evaluation.thumbnails, unlearned, title)
