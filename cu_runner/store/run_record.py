"""Finished and unfinished runs, read back from their directories, for tables, reports and studies.

Nothing here writes or locks. A number is taken from step.json, which carries its own sha256 and
that of the step before it, never from metrics.csv, which a user may have opened in a spreadsheet.
Large files (deltas) are read only by those who need them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from cu_runner.evaluators.metrics import (
    Measured,
    accuracy_per_concept,
    measured_in,
    read_predictions,
    rows_of,
)
from cu_runner.runtime.lazy import pd
from cu_runner.schema.errors import StoreError
from cu_runner.schema.json_files import parse_json
from cu_runner.schema.values import ConfigTree
from cu_runner.store.directories import first_name
from cu_runner.store.files import command_in, sha256_of
from cu_runner.store.layout import (
    CONFIG,
    DELTA,
    EVALUATIONS,
    JOB,
    MERGED,
    PREDICTIONS,
    STEP,
    SUMMARY,
    step_dir,
)
from cu_runner.store.records import StepRecord, as_table, read_chain

if TYPE_CHECKING:
    from cu_runner.runtime.code_identity import CodeIdentity

FOLDERS = "give run directories or folders that hold some (outputs/runs/...)"


@dataclass(frozen=True)
class RunRecord:
    """A run directory: its configuration and the records of its finished steps.

    records: of the untouched model first. command: what makes the run again, as config.yaml records
    it; None if it was made by the Python interface.
    """

    directory: Path
    config: ConfigTree
    records: list[StepRecord]
    command: str | None = None

    @cached_property
    def table(self) -> pd.DataFrame:
        """Return the rows of metrics.csv, in percent; UA of the untouched model is NaN."""
        rows = as_table([record.row for record in self.records])
        return rows.astype({name: float for name in rows.columns if name.startswith(("UA", "RA"))})

    @property
    def num_requests(self) -> int:
        """Return how many requests there are, finished or not."""
        if self.config["setting"].get("last_only"):
            return 1
        return len(self.config["sequence"]["targets"])

    @property
    def complete(self) -> bool:
        """Tell whether every request is finished."""
        return len(self.records) == self.num_requests + 1

    @property
    def sequence(self) -> str:
        """Return the name of the sequence."""
        return str(self.config["sequence"]["name"])

    @property
    def method(self) -> str:
        """Return the public name of the method: what the directory's name begins with."""
        name = first_name(self.directory.name)
        return name.removesuffix(f"-{self.regularizers}-{self.plan}-s{self.seed}-{name[-8:]}")

    @property
    def regularizers(self) -> str:
        """Return their public names joined by "+", in hook order; "none" without any."""
        return "+".join(self.config["reg"]) or "none"

    @property
    def plan(self) -> str:
        """Return sequential, independent or simultaneous."""
        return str(self.config["setting"]["plan"])

    @property
    def seed(self) -> int:
        """Return the seed of training."""
        return int(self.config["seed"])

    @property
    def label(self) -> str:
        """Return a short name: "conabl + gradproj", and the setting if it is simultaneous."""
        parts = [self.method] + ([] if self.regularizers == "none" else [self.regularizers])
        return " + ".join(parts) + (f", {self.plan}" if self.plan == "simultaneous" else "")

    @property
    def codes(self) -> list[CodeIdentity]:
        """Return the code of each step; of an evaluation, also that of the trained weights."""
        both = [code for record in self.records for code in (record.code, record.run_code)]
        return [code for code in both if code is not None]

    def same_code_as(self, other: RunRecord) -> bool:
        """Tell whether no file and no library that both name differs in any step.

        It does in a run that other code went on with.
        """
        different = {code.sha256: code for run in (self, other) for code in run.codes}
        pairs = itertools.combinations(different.values(), 2)
        return all(one.agrees_with(two) for one, two in pairs)

    def step_dir(self, index: int) -> Path:
        """Return the folder of a step."""
        return step_dir(self.directory, index)

    def weights(self, index: int) -> Path:
        """Return the file of theta_n - theta_base that a step was measured with.

        It is the merged one where there is a merge. An evaluation (cu-eval) has none of its own; it
        names that of its run, from its own directory.
        """
        record = self.records[index]
        if record.weights is not None:
            return (self.directory / record.weights).resolve()
        return self.step_dir(index) / (MERGED if MERGED in record.files else DELTA)

    @property
    def is_evaluation(self) -> bool:
        """Tell whether cu-eval made it, from the weights of another run."""
        return self.records[0].run_sha256 is not None

    def unlearned(self, index: int) -> list[str]:
        """Return the concepts that a step's weights have unlearned, in order: UA is over these."""
        if self.plan == "independent" and self.weights(index).name != MERGED:
            return self.records[index].targets
        return [name for name, first in self.requested.items() if first <= index]

    @cached_property
    def requested(self) -> dict[str, int]:
        """Return the request that first unlearned a concept, by concept, in their order."""
        first: dict[str, int] = {}
        for index, record in enumerate(self.records):
            for name in record.targets:
                first.setdefault(name, index)
        return first

    def require(self, index: int, name: str) -> None:
        """Raise StoreError unless a file of a step is the one that its step.json names."""
        self._require(self.step_dir(index) / name, index)

    def require_weights(self, index: int) -> None:
        """Raise StoreError unless the weights of a step are those that its step.json names."""
        self._require(self.weights(index), index)

    def _require(self, path: Path, index: int) -> None:
        if not path.is_file() or sha256_of(path) != self.records[index].files.get(path.name):
            raise StoreError(
                f"{path}: is missing or damaged (its sha256 is not the one in {STEP}); restore it"
            )

    def predictions(self, index: int) -> pd.DataFrame:
        """Read predictions.csv of a step: one row per image."""
        return read_predictions(self.step_dir(index) / PREDICTIONS)

    def accuracy_matrix(self) -> pd.DataFrame:
        """Return the percent of images recognised: rows concepts, columns requests from 0 on.

        Targets come in order, then the retained concepts. NaN where a concept was not measured: a
        target before its request, and every concept after a request that was not evaluated.
        """
        columns: dict[int, pd.Series] = {}
        for index, record in enumerate(self.records):
            found: dict[str, float] = {}
            rows = self.predictions(index) if record.evaluated else pd.DataFrame()
            for part in self.measured if record.evaluated else ():
                found |= accuracy_per_concept(rows_of(rows, part.domain), part.domain)
            columns[index] = pd.Series(found, dtype=float)
        order = list(self.requested)
        rest = [name for name in self.targets if name not in order]
        return pd.DataFrame(columns).reindex([*order, *rest, *self.retained])

    @property
    def measured(self) -> list[Measured]:
        """Return what is measured, domain by domain."""
        return measured_in(self.config["sequence"])

    @property
    def domains(self) -> list[tuple[str, str]]:
        """Return the domains of the targets, each with the other domain of its images."""
        return [(part.domain, part.cross_domain) for part in self.measured]

    @property
    def targets(self) -> list[str]:
        """Return the targets of the sequence, as its file lists them."""
        mixed = "domains" in self.config["sequence"]
        return [
            str(next(iter(each.values()))) if mixed else str(each)
            for each in self.config["sequence"]["targets"]
        ]

    @property
    def retained(self) -> list[str]:
        """Return the retained concepts of every domain."""
        return [name for part in self.measured for name in part.retain]


def read_config(directory: Path) -> tuple[ConfigTree, str]:
    """Read config.yaml of a run directory, and its text. Raises StoreError."""
    try:
        text = (directory / CONFIG).read_text(encoding="utf-8")
        config = yaml.safe_load(text)
        config["sequence"]["targets"], config["reg"], config["setting"]["plan"], config["seed"]
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, RecursionError):
        raise StoreError(
            f"{directory}: holds no readable config.yaml; give a run directory or a packed run"
        ) from None
    return config, text


def read_run(directory: Path) -> RunRecord:
    """Read a run directory. Raises StoreError if it is none or its chain of steps is broken."""
    config, text = read_config(directory)
    records = []
    for link in read_chain(directory):
        if link.record is None or link.problem is not None:
            raise StoreError(f"{link.path}: {link.problem}; restore it")
        records.append(link.record)
    if not records:
        raise StoreError(f"{directory}: no step is finished; run its cu-run command first")
    return RunRecord(directory, config, records, command_in(text))


def is_complete(directory: Path) -> bool:
    """Tell whether summary.json stands for the last of the finished, undamaged steps of a run."""
    try:
        summary = parse_json((directory / SUMMARY).read_text(encoding="utf-8"))
        links = list(read_chain(directory))
        last = links[-1]
        return last.problem is None and summary["sha256"] == getattr(last.record, "sha256", None)
    except (OSError, ValueError, KeyError, TypeError, IndexError):  # missing, or damaged
        return False


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Find the run directories among the paths: themselves, or all below a folder.

    A folder is a sequence's, a sweep's, or outputs. Raises StoreError.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise StoreError(f"{path}: no such directory; {FOLDERS}")
        if (path / CONFIG).is_file():
            inside = [path]
        else:
            configs = sorted(path.glob(f"**/{CONFIG}"))
            jobs = sorted(path.glob(f"**/{JOB}"))
            inside = [
                entry.parent
                for entry in configs
                if EVALUATIONS not in entry.relative_to(path).parts
            ]
            inside += [run for job in jobs if (run := run_of_job(job))]
        if not inside:
            raise StoreError(f"{path}: holds no run; {FOLDERS}")
        found |= dict.fromkeys(inside)
    return list(found)


def run_of_job(path: Path) -> Path | None:
    """Return the run directory that a sweep's job names; None if it cannot be run.

    Raises StoreError for a note that cannot be read.
    """
    try:
        note = parse_json(path.read_text(encoding="utf-8"))
        return None if "error" in note and "run" not in note else Path(note["run"])
    except (OSError, ValueError, KeyError, TypeError):
        raise StoreError(f"{path}: cannot be read; give the run directories themselves") from None
