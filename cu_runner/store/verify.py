"""Is a run directory what it says? The chain of hashes, and the numbers from their sources.

Unlike the runner, which stops at the first thing that is wrong, this looks at everything and
changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cu_runner.concepts.sequence import Sequence
from cu_runner.evaluators.metrics import read_predictions, step_metrics
from cu_runner.schema.errors import StoreError
from cu_runner.schema.json_files import parse_json
from cu_runner.schema.values import ConfigTree
from cu_runner.store.directories import first_name
from cu_runner.store.files import has_intact_header, sha256_of, to_csv
from cu_runner.store.layout import CONFIG, METRICS, NUMBER, PREDICTIONS, STEP, TABLE, step_dir
from cu_runner.store.leftovers import entries, obstacles
from cu_runner.store.proof import ROUNDING, recovery_of, size_of
from cu_runner.store.records import StepRecord, as_table, read_chain
from cu_runner.store.run_record import RunRecord
from cu_runner.store.signature import signature

AGAIN = "the run's own command writes it anew"
PARTS = ("model_sha256", "evaluator_sha256", "retention_sha256")


@dataclass(frozen=True)
class Finding:
    """One check. ok: None where it could not be made. detail: what differs, or why it was not."""

    what: str
    ok: bool | None
    detail: str = ""


def verify_run(directory: Path, sequence: Sequence, config: ConfigTree) -> Iterator[Finding]:
    """Yield every check of a run directory that needs neither its model nor its evaluator.

    Args:
        sequence: of the run; its configuration, as config.yaml holds it.
    """
    yield from verify_configuration(directory, config)
    yield from verify_places(directory)
    records: list[StepRecord] = []
    for index, link in enumerate(read_chain(directory)):
        place, record = f"steps/{index:02d}", link.record
        if record is None or link.problem == "does not match its own sha256":
            what = f"{place}/{STEP}" if link.path.name == STEP else place
            yield Finding(what, False, str(link.problem))
            return
        wrong = [link.problem] if link.problem else []
        if record.signature != signature(config):
            wrong.append("belongs to another configuration")
        begun = records[0] if records else record
        differing = [name for name in PARTS if getattr(record, name) != getattr(begun, name)]
        wrong += [f"{name} is not that of step 0" for name in differing]
        yield Finding(f"{place}: chain", not wrong, "; ".join(wrong))
        yield from verify_files(step_dir(directory, index), record)
        if link.problem:
            return
        records.append(record)
    if not records:
        yield Finding("steps", False, "no step is finished")
        return
    run = RunRecord(directory, config, records)
    for index in range(len(records)):
        yield from verify_numbers(run, index, sequence)
    yield verify_table(run)


def verify_configuration(directory: Path, config: ConfigTree) -> Iterator[Finding]:
    """Hold config.yaml against its own hash and against the name of the directory."""
    intact = has_intact_header((directory / CONFIG).read_bytes())
    yield Finding(CONFIG, intact, "" if intact else "does not match the sha256 in its first line")
    named, found = first_name(directory.name).rpartition("-")[2], signature(config)[:8]
    detail = f"the name ends in {named}, the configuration hashes to {found}"
    yield Finding("name of the directory", named == found, "" if named == found else detail)


def verify_places(directory: Path) -> Iterator[Finding]:
    """Look for what lies among the steps and is none."""
    for path in entries(directory):
        if not NUMBER.fullmatch(path.name):
            yield Finding(f"steps/{path.name}", None, "is no step")
        elif why := next(obstacles(path), None):
            yield Finding(f"steps/{path.name}", False, why)


def verify_files(directory: Path, record: StepRecord) -> Iterator[Finding]:
    """Hold every file that a step names against its sha256, and look for others."""
    for name, expected in record.files.items():
        path, detail = directory / name, ""
        if not path.is_file():
            detail = "is missing"
        elif sha256_of(path) != expected:
            detail = f"is damaged: another sha256 than in {STEP}"
        yield Finding(f"steps/{directory.name}/{name}", not detail, detail)
    if more := sorted({path.name for path in directory.iterdir()} - set(record.files) - {STEP}):
        strangers = f"holds files that no step names: {', '.join(more)}"
        yield Finding(f"steps/{directory.name}", False, strangers)


def verify_numbers(run: RunRecord, index: int, sequence: Sequence) -> Iterator[Finding]:
    """Compute the metrics of a step from its predictions, its drift from its weights."""
    place = f"steps/{index:02d}"
    if run.records[index].evaluated:
        yield verify_metrics(run, index, sequence)
    if not index:
        return
    path, row = run.weights(index), run.records[index].row
    try:
        size = size_of(path)
    except StoreError as error:
        yield Finding(f"{place}: drift", False, f"cannot be computed: {error}")
        return
    same = math.isclose(size, row.drift_l2, rel_tol=ROUNDING)
    detail = "" if same else f"{row.drift_l2} in {STEP}, {size} from it"
    yield Finding(f"{place}: drift from {path.name}", same, detail)


def verify_metrics(run: RunRecord, index: int, sequence: Sequence) -> Finding:
    """Hold the metrics of a step against its predictions."""
    row, place = run.records[index].row, f"steps/{index:02d}"
    try:
        predictions = read_predictions(run.step_dir(index) / PREDICTIONS)
        found = step_metrics(predictions, run.unlearned(index) if index else [], sequence)
        found |= recovery_of(run, index, found["UA"])
        stored = parse_json((run.step_dir(index) / METRICS).read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise ValueError(f"{METRICS} holds no metrics")
    except (OSError, ValueError, KeyError) as error:
        return Finding(f"{place}: metrics", False, f"cannot be computed: {error}")
    wrong = [
        f"{name} is {row.metrics.get(name)} in {STEP}, {stored.get(name)} in {METRICS}, "
        f"{value} from the predictions"
        for name, value in found.items()
        if not value == row.metrics.get(name) == stored.get(name)
    ]
    return Finding(f"{place}: metrics from {PREDICTIONS}", not wrong, "; ".join(wrong))


def verify_table(run: RunRecord) -> Finding:
    """Hold metrics.csv against the rows of the steps."""
    rows = to_csv(as_table([record.row for record in run.records]))
    try:
        same = (run.directory / TABLE).read_bytes() == rows
    except OSError:
        return Finding(TABLE, False, f"is missing; {AGAIN}")
    return Finding(TABLE, same, "" if same else f"differs from the steps; {AGAIN}")
