"""Finished and unfinished runs, read back from their directories: for tables, reports and studies. Nothing here writes or locks.

A number is taken from step.json, which carries its own sha256 and that of the step before it, never from metrics.csv, which a
user may have opened in a spreadsheet. Large files (deltas) are read only by those who need them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from cu_runner.evaluators.metrics import accuracy_per_concept, read_predictions
from cu_runner.runtime.code_identity import agree
from cu_runner.runtime.lazy import pd
from cu_runner.schema.errors import StoreError
from cu_runner.store.directories import first_name
from cu_runner.store.files import sha256_of
from cu_runner.store.layout import DELTA, EVALUATIONS, JOB, MERGED, PREDICTIONS, STEP
from cu_runner.store.records import continues, read_record
from cu_runner.store.run_directory import code_of, command_in


@dataclass(frozen=True)
class RunRecord:
    """A run directory: its configuration and the records (step.json) of the steps that are finished, the untouched model first.

    command: what makes it again, as config.yaml records it; None if the run was made by the Python interface.
    """

    directory: Path
    config: dict[str, object]
    records: list[dict[str, object]]
    command: str | None = None

    @cached_property
    def table(self) -> pd.DataFrame:
        """The rows of metrics.csv: request, concept, UA, RA_I, RA_C, ... in percent; UA of the untouched model is NaN."""
        rows = pd.DataFrame([record["row"] for record in self.records])
        return rows.astype({name: float for name in rows.columns if name.startswith(("UA", "RA"))})

    @property
    def num_requests(self) -> int:
        return (
            1
            if self.config["setting"].get("last_only")
            else len(self.config["sequence"]["targets"])
        )

    @property
    def complete(self) -> bool:
        return len(self.records) == self.num_requests + 1

    @property
    def sequence(self) -> str:
        return self.config["sequence"]["name"]

    @property
    def method(self) -> str:
        """The public name: what the directory's name begins with."""
        name = first_name(self.directory.name)
        return name.removesuffix(f"-{self.regularizers}-{self.plan}-s{self.seed}-{name[-8:]}")

    @property
    def regularizers(self) -> str:
        """Their public names joined by "+", in hook order; "none"."""
        return "+".join(self.config["reg"]) or "none"

    @property
    def plan(self) -> str:
        """sequential, independent or simultaneous."""
        return self.config["setting"]["plan"]

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def label(self) -> str:
        """Short name for a legend: "conabl + gradproj", with the setting when it is not the sequential one."""
        parts = [self.method] + ([] if self.regularizers == "none" else [self.regularizers])
        return " + ".join(parts) + (f", {self.plan}" if self.plan == "simultaneous" else "")

    @cached_property
    def code(self) -> tuple[str, ...]:
        """The sha256 of the code that made it: of one alone, unless other code was allowed to go on; of all that did otherwise."""
        return tuple(dict.fromkeys(str(record["sha256"]) for record in self.code_records))

    @property
    def code_records(self) -> list[dict[str, object]]:
        """What each step records of the code that made it; of an evaluation, also of the code that trained the weights."""
        return [
            record[key] for record in self.records for key in ("code", "run_code") if key in record
        ]

    def same_code_as(self, other: RunRecord) -> bool:
        """Whether no file and no library that both name differs in any step; never, of a run that other code went on with."""
        different = {
            str(record["sha256"]): record for run in (self, other) for record in run.code_records
        }
        return all(agree(one, two) for one, two in itertools.combinations(different.values(), 2))

    def step_dir(self, index: int) -> Path:
        return self.directory / "steps" / f"{index:02d}"

    def weights(self, index: int) -> Path:
        """The safetensors file of theta_n - theta_base that step `index` was measured with: merged where there is a merge.

        An evaluation (cu-eval) has none of its own; it names that of its run, from its own directory (older ones: absolutely).
        """
        record = self.records[index]
        if record.get("weights"):
            return (self.directory / record["weights"]).resolve()
        return self.step_dir(index) / (MERGED if MERGED in record["files"] else DELTA)

    @property
    def is_evaluation(self) -> bool:
        """Whether cu-eval made it, from the weights of another run."""
        return "run_sha256" in self.records[0]

    def unlearned(self, index: int) -> list[str]:
        """The concepts that the weights of a step have unlearned, in order of request: UA is over these."""
        alone = self.plan == "independent" and self.weights(index).name != MERGED
        return (
            self.records[index]["targets"]
            if alone
            else [name for name, first in self.requested.items() if first <= index]
        )

    @cached_property
    def requested(self) -> dict[str, int]:
        """The request that first unlearned a concept, by concept, in their order."""
        first: dict[str, int] = {}
        for index, record in enumerate(self.records):
            for name in record["targets"]:
                first.setdefault(name, index)
        return first

    def require(self, index: int, name: str) -> None:
        """Raises StoreError unless a file of a step is the one that its step.json names."""
        path = self.step_dir(index) / name
        if not path.is_file() or sha256_of(path) != self.records[index]["files"].get(name):
            raise StoreError(
                f"{path}: is missing or damaged (its sha256 is not the one in {STEP}); restore it"
            )

    def predictions(self, index: int) -> pd.DataFrame:
        """predictions.csv of a step: one row per image."""
        return read_predictions(self.step_dir(index) / PREDICTIONS)

    def accuracy_matrix(self) -> pd.DataFrame:
        """Percent of images recognised, rows: concepts (targets in order, then retained), columns: requests from 0 on.

        NaN where a concept was not measured: a target before its request.
        """
        sequence = self.config["sequence"]
        columns = {
            index: pd.Series(accuracy_per_concept(self.predictions(index), sequence["domain"]))
            for index in range(len(self.records))
        }
        order = list(self.requested)
        rest = [name for name in sequence["targets"] if name not in order]
        return pd.DataFrame(columns).reindex([*order, *rest, *sequence["retain"]])


def read_run(directory: Path) -> RunRecord:
    """Read a run directory. Raises StoreError, one line, if it is none or its chain of steps is broken."""
    try:
        text = (directory / "config.yaml").read_text(encoding="utf-8")
        config = yaml.safe_load(text)
        config["sequence"]["targets"], config["reg"], config["setting"]["plan"], config["seed"]
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        raise StoreError(
            f"{directory}: holds no readable config.yaml; give a run directory, as the last line of cu-run names it"
        ) from None
    records: list[dict[str, object]] = []
    while (directory / "steps" / f"{len(records):02d}" / STEP).exists():
        record = read_record(directory / "steps" / f"{len(records):02d}")
        parent = records[-1]["sha256"] if records else None
        if not continues(record, parent) or record["index"] != len(records):
            raise StoreError(
                f"{directory}/steps/{len(records):02d}/{STEP}: does not continue the step before it"
            )
        code_of(directory, record)
        records.append(record)
    later = sorted(
        int(path.parent.name)
        for path in (directory / "steps").glob(f"*/{STEP}")
        if path.parent.name.isdecimal()
    )
    if later and later[-1] >= len(records):
        raise StoreError(
            f"{directory}/steps/{len(records):02d}/{STEP}: is missing, and step {later[-1]} is there; restore it"
        )
    if not records:
        raise StoreError(f"{directory}: no step is finished; run its cu-run command first")
    return RunRecord(directory, config, records, command_in(text))


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Run directories among the paths: themselves, or all below a folder (a sequence's, a sweep's, outputs). Raises StoreError."""
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise StoreError(
                f"{path}: no such directory; give run directories or folders that hold some (outputs/runs/...)"
            )
        if (path / "config.yaml").is_file():
            inside = [path]
        else:
            inside = sorted(
                entry.parent
                for entry in path.glob("**/config.yaml")
                if EVALUATIONS not in entry.relative_to(path).parts
            )
            inside += [
                run for entry in sorted(path.glob(f"**/{JOB}")) if (run := run_of_job(entry))
            ]
        if not inside:
            raise StoreError(
                f"{path}: holds no run; give run directories or folders that hold some (outputs/runs/...)"
            )
        found |= dict.fromkeys(inside)
    return list(found)


def run_of_job(path: Path) -> Path | None:
    """The run directory that a job of a sweep names; None for a job whose configuration cannot be run. Raises StoreError."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        return None if "error" in note and "run" not in note else Path(note["run"])
    except (OSError, ValueError, KeyError, TypeError):
        raise StoreError(f"{path}: cannot be read; give the run directories themselves") from None
