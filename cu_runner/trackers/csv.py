"""Plain CSV files that grow with a run: outputs/csv/SEQUENCE/RUN/training.csv and requests.csv.

For `tail -f`, a spreadsheet or a script of one's own: a training step is in the file as soon as it
is made, where the run directory has its losses when the request is committed.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cu_runner.store.files import write_atomic
from cu_runner.trackers.base import TrackedRun, Tracker

if TYPE_CHECKING:
    from cu_runner.store.records import Row

Line = dict[str, str]


class CsvFile:
    """Rows that are appended one by one, in the order of some columns that number them.

    The first row that is appended replaces what an earlier process wrote from there on. A row with
    a column that no row had is appended to a file that is written anew, with that column at its
    end.
    """

    def __init__(self, path: Path, keys: tuple[str, ...]) -> None:
        """Take the file, which may be there. keys: the columns that number its rows."""
        self._path, self._keys = path, keys
        self._columns: list[str] | None = None  # None: nothing is appended yet

    def append(self, row: Mapping[str, object]) -> None:
        """Write a row, and hand it to the system at once; None becomes an empty cell."""
        line = {name: "" if value is None else str(value) for name, value in row.items()}
        if self._columns is None:
            place = self._place(line)
            kept = [old for old in self._read() if self._place(old) < place]
            self._rewrite(kept, line)
        elif new := [name for name in line if name not in self._columns]:
            self._columns += new
            self._rewrite(self._read(), line)
        with self._path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self._columns or [], restval="", lineterminator="\n").writerow(
                line
            )

    def _rewrite(self, kept: list[Line], line: Line) -> None:
        """Write the file anew with rows that are kept, and the columns of these and of the line."""
        self._columns = list(dict.fromkeys(name for each in (*kept, line) for name in each))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        write_atomic(self._path, text.getvalue().encode())

    def _read(self) -> list[Line]:
        """Return the whole rows of the file; a last one that a kill cut short is none."""
        if not self._path.exists():
            return []
        text = self._path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        rows = csv.DictReader(io.StringIO(whole, newline=""))
        return [{name: value or "" for name, value in row.items()} for row in rows]

    def _place(self, line: Line) -> list[float]:
        return [float(line[name]) for name in self._keys]


class Csv(Tracker):
    """training.csv: request, step, loss and its parts. requests.csv: as metrics.csv of the run."""

    title = "the CSV tracker"

    def __init__(self) -> None:
        """Take nothing: the files lie under paths.outputs."""
        self._training: CsvFile | None = None
        self._requests: CsvFile | None = None

    def begin(self, run: TrackedRun) -> None:
        """Make the folder; a resumed run goes on with its files."""
        folder = run.folder("csv")
        os.makedirs(folder, exist_ok=True)
        self._training = CsvFile(folder / "training.csv", ("request", "step"))
        self._requests = CsvFile(folder / "requests.csv", ("request",))

    def log_step(self, request: int, row: Mapping[str, float]) -> None:
        """Append a training step."""
        assert self._training is not None
        self._training.append({"request": request, "step": int(row["step"]), **without_step(row)})

    def log_request(self, row: Row, grid: bytes | None, training: bytes | None) -> None:
        """Append the row of a request."""
        assert self._requests is not None
        self._requests.append(row.flat())


def without_step(row: Mapping[str, float]) -> dict[str, float]:
    """Return what a training step logged, without its number."""
    return {name: value for name, value in row.items() if name != "step"}
