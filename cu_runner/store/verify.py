"""Is a run directory what it says? The chain of hashes from the base model to the last step, and the numbers from their sources.

Unlike the runner, which stops at the first thing that is wrong, this looks at everything and changes nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors
import yaml

from cu_runner.concepts.sequence import Sequence
from cu_runner.evaluators.metrics import read_predictions, step_metrics
from cu_runner.models.parameters import drift
from cu_runner.runtime.lazy import pd
from cu_runner.schema.errors import StoreError
from cu_runner.store.directories import first_name
from cu_runner.store.files import has_intact_header, read_tensor, sha256_of, to_csv
from cu_runner.store.layout import METRICS, PREDICTIONS, STEP
from cu_runner.store.records import continues, is_intact, parse_record
from cu_runner.store.run_record import RunRecord
from cu_runner.store.signature import signature

ROUNDING = 1e-5  # relative; a sum over millions of weights depends on its order in the last digits


@dataclass(frozen=True)
class Finding:
    """One check. ok: None where it could not be made. detail: what differs, or why there is nothing to compare."""

    what: str
    ok: bool | None
    detail: str = ""


def verify_run(directory: Path, sequence: Sequence, config: dict[str, object]) -> Iterator[Finding]:
    """Every check of a run directory that needs neither its model nor its evaluator.

    Args:
        sequence: of the run; its configuration, as config.yaml holds it.
    """
    yield from verify_configuration(directory, config)
    records = []
    for path in sorted((directory / "steps").glob(f"[0-9]*/{STEP}")):
        index = int(path.parent.name)
        record = parse_record(path)
        if record is None or not is_intact(record):
            yield Finding(
                f"steps/{path.parent.name}/{STEP}",
                False,
                "is unreadable or does not match its own sha256",
            )
            return
        parent = records[-1]["sha256"] if records else None
        linked = record["index"] == index == len(records) and continues(record, parent)
        same = record["signature"] == signature(config)
        wrong = [] if linked else ["does not continue the step before it"]
        wrong += [] if same else ["belongs to another configuration"]
        begun = records[0] if records else record
        names = [
            name
            for name in ("model_sha256", "evaluator_sha256", "retention_sha256")
            if record.get(name) != begun.get(name)
        ]
        wrong += [f"{name} is not that of step 0" for name in names]
        yield Finding(f"steps/{path.parent.name}: chain", not wrong, "; ".join(wrong))
        yield from verify_files(path.parent, record)
        if not linked:
            return
        records.append(record)
    if not records:
        yield Finding("steps", False, "no step is finished")
        return
    run = RunRecord(directory, config, records)
    for index in range(len(records)):
        yield from verify_numbers(run, index, sequence)
    yield verify_table(run)


def verify_configuration(directory: Path, config: dict[str, object]) -> Iterator[Finding]:
    """config.yaml against its own hash and against the name of the directory."""
    intact = has_intact_header((directory / "config.yaml").read_bytes())
    yield Finding(
        "config.yaml", intact, "" if intact else "does not match the sha256 in its first line"
    )
    named = first_name(directory.name).rpartition("-")[2]
    found = signature(config)[:8]
    detail = (
        "" if named == found else f"the name ends in {named}, the configuration hashes to {found}"
    )
    yield Finding("name of the directory", named == found, detail)


def verify_files(directory: Path, record: dict[str, object]) -> Iterator[Finding]:
    """Every file that a step names against its sha256, and no file besides."""
    for name, expected in record["files"].items():
        path = directory / name
        found = sha256_of(path) if path.is_file() else None
        detail = (
            ""
            if found == expected
            else "is missing"
            if found is None
            else "is damaged: another sha256 than in step.json"
        )
        yield Finding(f"steps/{directory.name}/{name}", found == expected, detail)
    more = sorted({path.name for path in directory.iterdir()} - set(record["files"]) - {STEP})
    if more:
        yield Finding(
            f"steps/{directory.name}", False, f"holds files that no step names: {', '.join(more)}"
        )


def verify_numbers(run: RunRecord, index: int, sequence: Sequence) -> Iterator[Finding]:
    """The metrics of a step from its predictions, its drift from its weights."""
    row, place = run.records[index]["row"], f"steps/{index:02d}"
    try:
        predictions = read_predictions(run.step_dir(index) / PREDICTIONS)
        found = step_metrics(predictions, run.unlearned(index) if index else [], sequence)
        stored = json.loads((run.step_dir(index) / METRICS).read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise ValueError(f"{METRICS} holds no metrics")
    except (OSError, ValueError, KeyError) as error:
        yield Finding(f"{place}: metrics", False, f"cannot be computed: {error}")
    else:
        wrong = [
            f"{name} is {row.get(name)} in step.json, {stored.get(name)} in {METRICS}, {value} from the predictions"
            for name, value in found.items()
            if not value == row.get(name) == stored.get(name)
        ]
        yield Finding(f"{place}: metrics from predictions.csv", not wrong, "; ".join(wrong))
    if not index:
        return
    path = run.weights(index)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = list(file.keys())
        size = drift({name: read_tensor(path, name) for name in names}).l2
    except (OSError, safetensors.SafetensorError) as error:
        yield Finding(f"{place}: drift", False, f"cannot be computed: {error}")
        return
    same = math.isclose(size, row["drift_l2"], rel_tol=ROUNDING)
    yield Finding(
        f"{place}: drift from {path.name}",
        same,
        "" if same else f"{row['drift_l2']} in step.json, {size} from it",
    )


def verify_table(run: RunRecord) -> Finding:
    """metrics.csv against the rows of the steps."""
    try:
        same = (run.directory / "metrics.csv").read_bytes() == to_csv(
            pd.DataFrame([record["row"] for record in run.records])
        )
    except OSError:
        return Finding("metrics.csv", False, "is missing; the run's own command writes it anew")
    return Finding(
        "metrics.csv",
        same,
        "" if same else "differs from the steps; the run's own command writes it anew",
    )


def read_config(directory: Path) -> dict[str, object]:
    """config.yaml. Raises StoreError."""
    try:
        config = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
        config["sequence"]["name"], config["reg"], config["method"]
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        raise StoreError(
            f"{directory}: holds no readable config.yaml; give a run directory or a packed run"
        ) from None
    return config
