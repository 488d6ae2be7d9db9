"""step.json: a finished step's record, its own sha256 and its link to the step before."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, field
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from cu_runner import __version__
from cu_runner.runtime.code_identity import CodeIdentity
from cu_runner.runtime.lazy import pd
from cu_runner.schema.errors import StoreError
from cu_runner.schema.json_files import parse_json
from cu_runner.schema.settings import EvalSettings
from cu_runner.store.files import hash_json
from cu_runner.store.layout import (
    DELTA,
    FILE_NAME,
    GRID,
    METRICS,
    PREDICTIONS,
    STEP,
    finished_steps,
    step_dir,
)

STRICT = ConfigDict(extra="forbid")
Metrics = dict[str, float | int | None]  # columns of metrics.csv by name, accuracies in percent
COLUMNS = ("UA", "RA_I", "RA_C", "RA_C_retained")  # of every row, whatever else is measured
UNMEASURED: Metrics = dict.fromkeys(COLUMNS)  # metrics of a step that eval.every leaves out
# Entries that are written only where they say something.
OPTIONAL = ("retention_sha256", "allowed_other_code", "run_sha256", "weights", "run_code")


@dataclass(frozen=True, config=STRICT)
class Row:
    """A step's row of metrics.csv.

    metrics: UA, RA_I, RA_C, ... in percent, and what the retention measures. The drifts are those
    of the weights that were measured; step_l2 is the length of the request's own step.
    """

    request: int
    concept: str
    metrics: Metrics
    drift_l2: float = 0.0
    drift_l1: float = 0.0
    drift_fraction: float = 0.0
    step_l2: float = 0.0
    train_steps: int = 0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    peak_memory_mb: int = 0

    def flat(self) -> dict[str, float | int | str | None]:
        """Return the columns in the order of metrics.csv."""
        entries = asdict(self)
        metrics = entries.pop("metrics")
        first = {name: entries.pop(name) for name in ("request", "concept")}
        return first | metrics | entries

    @staticmethod
    def of(columns: Mapping[str, Any]) -> Row:
        """Return the row of such columns; what is none of its own is a metric."""
        own = {name: columns[name] for name in ROW if name in columns}
        metrics = {name: value for name, value in columns.items() if name not in ROW}
        return Row(**own, metrics=metrics)


def as_table(rows: Sequence[Row]) -> pd.DataFrame:
    """Return the rows of metrics.csv, with every column that one of them has in its place."""
    flat = [row.flat() for row in rows]
    longest = max(flat, key=len)
    names = dict.fromkeys([*longest, *(name for row in flat for name in row)])
    return pd.DataFrame(flat, columns=list(names))


ROW = tuple(name for name in Row.__dataclass_fields__ if name != "metrics")


@dataclass(frozen=True, config=STRICT)
class TrainingRecord:
    """How a request was trained.

    method, regularizers: their own records, the latter by name. early_stop: the measurements that
    could end it. again: of each earlier target the loss that was left after it; where that was too
    much, for how many steps it was trained again, and what was left then. cached: whether its
    weights came from the cache.
    """

    steps: int = 0
    method: dict[str, Any] = field(default_factory=dict)
    regularizers: dict[str, dict[str, Any]] = field(default_factory=dict)
    early_stop: list[dict[str, float]] = field(default_factory=list)
    again: list[dict[str, str | float]] = field(default_factory=list)
    cached: bool = False


@dataclass(frozen=True, config=STRICT, kw_only=True)
class StepResult:
    """What a step made, before it is linked to the one before.

    index: 0 for the untouched model, n after request n. files: contents by name. seconds: of
    training and evaluation, and from the start of the process to its first training step.
    run_sha256, weights, run_code: of an evaluation, the step that it measured, where they lie
    and what trained them.
    """

    index: int
    files: dict[str, bytes]
    row: Row
    targets: list[str]
    model_sha256: str
    evaluator_sha256: str
    retention_sha256: str | None = None
    training: TrainingRecord = TrainingRecord()
    seconds: dict[str, float | None] = field(default_factory=dict)
    versions: dict[str, str]
    device: str
    git_commit: str | None
    run_sha256: str | None = None
    weights: str | None = None
    run_code: CodeIdentity | None = None


@dataclass(frozen=True, config=STRICT, kw_only=True)
class StepRecord:
    """A finished step, as step.json holds it; its entries are those of StepResult.

    sha256: over the parent's and those of the files, what the next step must name. files: sha256 by
    name. code: that made it. allowed_other_code: whether it went on with steps of other code.
    """

    index: int
    signature: str
    parent_sha256: str
    sha256: str
    files: dict[str, str]
    targets: list[str]
    model_sha256: str
    evaluator_sha256: str
    training: TrainingRecord
    seconds: dict[str, float | None]
    versions: dict[str, str]
    device: str
    git_commit: str | None
    retention_sha256: str | None = None
    run_sha256: str | None = None
    weights: str | None = None
    run_code: CodeIdentity | None = None
    code: CodeIdentity
    allowed_other_code: bool = False
    row: Row
    record_sha256: str = ""

    @property
    def evaluated(self) -> bool:
        """Tell whether the step was evaluated: eval.every leaves some out."""
        return PREDICTIONS in self.files

    def entries(self) -> dict[str, Any]:
        """Return what step.json holds, its own sha256 last."""
        training = asdict(self.training) if self.training != TrainingRecord() else {}
        for name in ("cached", "again"):
            if not training.get(name):
                training.pop(name, None)
        entries = asdict(self) | {"row": self.row.flat(), "training": training}
        for name in OPTIONAL:
            if not entries[name]:
                del entries[name]
        del entries["record_sha256"]
        return entries | {"record_sha256": hash_json(entries)}


@dataclass(frozen=True)
class Link:
    """A place in the chain of steps.

    path: of step.json, or the folder of a step that is missing. record: None where it cannot be
    read. problem: why the chain ends here; None where it goes on.
    """

    path: Path
    record: StepRecord | None
    problem: str | None = None


def read_chain(run: Path) -> Iterator[Link]:
    """Yield the finished steps of a run in order; the first that is damaged is the last.

    Each is checked against its own sha256 and the step before. Files that it names are not read.

    Raises:
        StoreError: the run was made by another version, whose records this one does not read.
    """
    parent: str | None = None
    for position, index in enumerate(finished_steps(run)):
        if index != position:
            missing = f"step {position} is missing but step {index} is there"
            yield Link(step_dir(run, position), None, missing)
            return
        path = step_dir(run, index) / STEP
        record, problem = read_record(path)
        if record is not None and problem is None:
            above = record.model_sha256 if parent is None else parent
            if record.index != index or record.parent_sha256 != above:
                problem = "does not continue the step before it"
            parent = record.sha256
        yield Link(path, record, problem)
        if problem is not None:
            return


def read_record(path: Path) -> tuple[StepRecord | None, str | None]:
    """Read a step.json: the record, or None if it is none; and what is wrong with it, or None.

    Raises:
        StoreError: it was made by another version, whose records this one does not read.
    """
    try:
        entries = parse_json(path.read_text(encoding="utf-8"))
        written = {name: value for name, value in entries.items() if name != "record_sha256"}
        whole = entries["record_sha256"] == hash_json(written)
        if whole:
            refuse_other_version(path, entries)
        content = entries | {"row": Row.of(entries["row"])}
        record = TypeAdapter(StepRecord).validate_python(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, "cannot be read"
    whole = whole and record.sha256 == chain(record.parent_sha256, record.files)
    if not whole:
        return record, "does not match its own sha256"
    strange = what_is_strange(record)
    return (None, strange) if strange else (record, None)


def what_is_strange(record: StepRecord) -> str | None:
    """Say what a record lacks, or holds, that no step's does; None of a sound one."""
    if missing := [name for name in COLUMNS if name not in record.row.metrics]:
        return f"its row lacks {', '.join(missing)}"
    trained = record.index > 0 and record.run_sha256 is None
    seen = (PREDICTIONS, METRICS, GRID)
    left_out = record.index > 0 and not any(name in record.files for name in seen)
    needed = (*(() if left_out else seen), *([DELTA] if trained else []))
    if missing := [name for name in needed if name not in record.files]:
        return f"its files lack {', '.join(missing)}"
    if left_out and record.row.metrics != UNMEASURED:
        return "its row holds metrics, and its files no predictions"
    if foreign := [name for name in record.files if not FILE_NAME.fullmatch(name)]:
        return f"its files name {foreign[0]!r}, which is no file of a step"
    numbers = [value for value in record.row.flat().values() if isinstance(value, float)]
    if not all(map(math.isfinite, numbers)):
        return "its row holds a number that is not finite"
    return None


def left_out(steps: Sequence[StepRecord], asked: EvalSettings, last: int) -> str:
    """Name the requests of a run that lack an evaluation that is asked for; "" if none.

    "request 3 was", "requests 1 to 11 were": with the verb.
    last: of its requests.
    """
    due = [step.index for step in steps if not step.evaluated and asked.is_due(step.index, last)]
    return f"{name_requests(due)} {'was' if len(due) == 1 else 'were'}" if due else ""


def name_requests(numbers: Sequence[int]) -> str:
    """Return rising numbers of requests, one at least, as "request 3" or "requests 2, 4 to 12"."""
    parts = []
    for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}")
    return f"request{'' if len(numbers) == 1 else 's'} {', '.join(parts)}"


def refuse_other_version(path: Path, entries: Mapping[str, Any]) -> None:
    """Refuse with StoreError the record of a version that writes others."""
    version = str(entries["versions"].get("cu_runner", "of unknown version"))
    if version.split(".")[:2] != __version__.split(".")[:2]:
        raise StoreError(
            f"{path.parent.parent.parent}: was made by cu_runner {version}, whose runs this one "
            f"({__version__}) does not read; move it away and make it again"
        )


def chain(parent: str | None, files: Mapping[str, str]) -> str:
    """Return the sha256 of a step: over its parent's and those of its files.

    It stands for all steps from the base model on.
    """
    return hash_json([parent, sorted(files.items())])
