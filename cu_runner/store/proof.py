"""What a step says of itself, held against its files before anything is built upon it.

Hashes alone do not show a record that was written again together with its hashes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from cu_runner.evaluators.metrics import MEASURES, measured_in, mixed_metrics, named_metrics
from cu_runner.evaluators.recovered import columns_of, read_recovery, recovery_metrics
from cu_runner.runtime.lazy import pd
from cu_runner.schema.errors import StoreError, one_line
from cu_runner.store.files import squared_norms
from cu_runner.store.layout import PREDICTIONS, RECOVERY, RECOVERY_VALUES, STEP
from cu_runner.store.run_record import RunRecord

ROUNDING = 1e-5  # relative; a sum over millions of weights depends on its order in the last digits
THOUSANDTH = 2e-3  # metrics are kept to a thousandth


def require_true(run: RunRecord, steps: Iterable[int] | None = None) -> None:
    """Raise StoreError unless metrics follow from predictions.csv, and the last drift from weights.

    Weights that were taken away where a run is only read prove nothing, and are passed over.

    Args:
        steps: whose metrics are computed again; None is all.
    """
    last = len(run.records) - 1
    for index in range(last + 1) if steps is None else steps:
        require_metrics(run, index)
    if last and (path := run.weights(last)).exists():
        size, said = size_of(path), run.records[last].row.drift_l2
        if not math.isclose(size, said, rel_tol=ROUNDING):
            raise StoreError(
                f"{path}: has drift {size:.6g}, {STEP} of its step says {said:.6g}; {remedy(run)}"
            )


def require_metrics(run: RunRecord, index: int) -> None:
    """Raise StoreError unless the metrics of a step are those of its predictions, if it has any."""
    if not run.records[index].evaluated:
        return
    path, row = run.step_dir(index) / PREDICTIONS, run.records[index].row
    run.require(index, PREDICTIONS)
    try:
        found = metrics_of(run, index, run.predictions(index))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: gives no metrics ({one_line(error)}); {remedy(run)}") from None
    for name, value in found.items():
        said = row.metrics.get(name)
        if index == 0 and said is None:  # the untouched model's UA, which older runs left out
            continue
        if value is None or said is None or not math.isclose(value, said, abs_tol=THOUSANDTH):
            if value is said is None:
                continue
            raise StoreError(
                f"{path}: gives {name} {value}, {STEP} beside it says {said}; {remedy(run)}"
            )


def metrics_of(run: RunRecord, index: int, predictions: pd.DataFrame) -> dict[str, float | None]:
    """Return the metrics of a step by what config.yaml alone says of the sequence."""
    sequence = run.config["sequence"]
    if "domains" in sequence:
        parts = measured_in(sequence)
        judged = {domain for part in parts for domain in (part.domain, part.cross_domain)}
        predictions[["prompt", "seed", MEASURES, *(f"score_{each}" for each in sorted(judged))]]
        found = mixed_metrics(predictions, run.unlearned(index) if index else [], parts)
        return found | recovery_of(run, index, found["UA"])
    domain, cross = str(sequence["domain"]), str(sequence["cross_domain"])
    measured = f"predicted_{cross}" in predictions
    predictions[["prompt", "seed", f"score_{domain}", *([f"score_{cross}"] * measured)]]  # KeyError
    found = named_metrics(
        predictions,
        run.unlearned(index) if index else [],
        domain,
        list(sequence["targets"]),
        list(sequence["retain"]),
        list(dict.fromkeys(predictions[cross])) if measured else None,
    )
    return found | recovery_of(run, index, found["UA"])


def recovery_of(run: RunRecord, index: int, ua: float | None) -> dict[str, float | None]:
    """Return what the probes of recovery add to the metrics of a step, from their files.

    Args:
        ua: of the step.
    """
    if "recovery" not in run.config:
        return {}
    tables = []
    for name in (RECOVERY, RECOVERY_VALUES):
        there = name in run.records[index].files
        if there:
            run.require(index, name)
        tables.append(read_recovery(run.step_dir(index) / name) if there else None)
    found = recovery_metrics(tables[0], tables[1], run.domains, ua)
    return columns_of(run.config["recovery"], found)


def size_of(path: Path) -> float:
    """Return the drift of a file of weights: the L2 norm of them all.

    Raises:
        StoreError: it cannot be read, or is empty.
    """
    squares = squared_norms(path)
    if not squares:
        raise StoreError(f"{path}: holds no weights; restore it")
    return math.sqrt(math.fsum(squares.values()))


def remedy(run: RunRecord) -> str:
    """Say what to do about it."""
    return f"restore the step; `cu-doctor {run.directory}` says what else differs"
