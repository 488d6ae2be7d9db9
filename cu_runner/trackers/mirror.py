"""All trackers of a run at once. One that fails is left out from there on: no run stops for it."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cu_runner.runtime.lazy import pd
from cu_runner.runtime.user_code import place_of
from cu_runner.schema.errors import MirrorError, one_line
from cu_runner.store.layout import GRID, TRAINING
from cu_runner.trackers.base import Ending, TrackedRun, Tracker

if TYPE_CHECKING:
    from cu_runner.store.records import Row, StepRecord
    from cu_runner.store.run_record import RunRecord

logger = logging.getLogger(__name__)


class Mirror:
    """Tells every tracker of a run what happens in it."""

    def __init__(
        self, trackers: Mapping[str, Tracker], run: TrackedRun | None = None, must: bool = False
    ) -> None:
        """Take the trackers, which are begun by begin().

        Args:
            trackers: by public name.
            run: what they are told as they begin; without any tracker it may be None.
            must: a tracker that fails raises MirrorError; otherwise a line in the log says so, and
                it is left out from there on.
        """
        self._run, self._must = run, must
        self._waiting = dict(trackers)
        self._begun: dict[str, Tracker] = {}

    def begin(self, rows: list[Row]) -> None:
        """Open the trackers. rows: of the steps that are finished already."""
        if self._run is None:
            return
        run = replace(self._run, rows=tuple(rows))
        self._begun, self._waiting = self._waiting, {}
        self._each(lambda tracker: tracker.begin(run))

    def log_step(self, request: int, row: Mapping[str, float]) -> None:
        """Tell of a training step of a request, as it is made: its row of training.csv."""
        self._each(lambda tracker: tracker.log_step(request, row))

    def log(self, step: StepRecord, folder: Path) -> None:
        """Tell of a committed step, which lies in a folder; of one from the cache with its losses.

        Nobody saw these being made.
        """
        if not self._begun:
            return
        training = (folder / TRAINING).read_bytes() if TRAINING in step.files else None
        if training is not None and step.training.cached:
            for row in steps_in(training):
                self.log_step(step.index, row)
        grid = (folder / GRID).read_bytes() if step.evaluated else None
        self._each(lambda tracker: tracker.log_request(step.row, grid, training))

    def log_accuracy(self, matrix: pd.DataFrame) -> None:
        """Tell of the accuracy of every concept (rows) after every request (columns), percent."""
        self._each(lambda tracker: tracker.log_accuracy(matrix))

    def finish(self, ending: Ending) -> None:
        """Close the trackers when all is written or uploaded."""
        self._each(lambda tracker: tracker.finish(ending))
        self._begun = {}

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._begun.items()):
            try:
                call(tracker)
            except Exception as error:  # they fail in many ways; the run goes on and says so
                del self._begun[name]
                self._give_up(tracker, error)

    def _give_up(self, tracker: Tracker, error: Exception) -> None:
        if self._must:
            raise MirrorError(one_line(error)) from error
        place = f"{where}: {type(error).__name__}: " if (where := place_of(error)) else ""
        reason = f"{place}{one_line(error)}"
        logger.warning(
            "%s is not written from here on: %s (%s)", tracker.title, reason, tracker.remedy
        )


def steps_in(training: bytes) -> Iterator[dict[str, float]]:
    """Yield the rows of a training.csv as trackers take them: what a step logged, by name."""
    for row in pd.read_csv(io.BytesIO(training)).to_dict("records"):
        yield {str(name): float(value) for name, value in row.items() if not pd.isna(value)}


def send(run: RunRecord, tracker: Tracker, outputs: Path) -> None:
    """Tell a tracker of a run after the fact, as if it had been told while the run ran.

    Args:
        run: finished or not.
        outputs: the folder under which the tracker writes files of its own.

    Raises:
        MirrorError: the tracker did not take all of it.
    """
    tracked = TrackedRun(
        run.directory,
        outputs,
        run.config,
        run.sequence,
        run.method,
        tuple(run.config["reg"]),
        run.command,
        {"device": run.records[-1].device},
    )
    mirror = Mirror({"tracker": tracker}, tracked, must=True)
    mirror.begin([])
    for index, record in enumerate(run.records):
        folder = run.step_dir(index)
        if TRAINING in record.files and not record.training.cached:
            for row in steps_in((folder / TRAINING).read_bytes()):
                mirror.log_step(index, row)
        mirror.log(record, folder)
    mirror.log_accuracy(run.accuracy_matrix())
    unfinished = f"{len(run.records) - 1} of {run.num_requests} requests are finished"
    ending = Ending("finished") if run.complete else Ending("interrupted", 1, unfinished)
    mirror.finish(ending)
