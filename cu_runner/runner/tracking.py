"""W&B as a mirror of the run directory. Nothing is read back from it, and it never stops a run.

Runs are grouped by sequence and method, and their job type is the list of regularizers, so that a
sweep reads as a table of both.
"""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from cu_runner import __version__
from cu_runner.runtime.lazy import pd
from cu_runner.runtime.provenance import git_commit
from cu_runner.schema.errors import MirrorError
from cu_runner.schema.settings import WandbSettings
from cu_runner.store.layout import GRID, TRAINING
from cu_runner.store.run_record import RunRecord

if TYPE_CHECKING:
    from cu_runner.schema.values import ConfigTree
    from cu_runner.store.records import Row

logger = logging.getLogger(__name__)

# For what is not uploaded when a run ends; without a limit W&B waits for a lost server for ever.
FINISH_SECONDS = 60.0


class Tracker:
    """Logs configuration, metrics and sample grids per request, losses per training step.

    The id is the run directory's name, so that a resume continues it.
    """

    def __init__(
        self,
        settings: WandbSettings,
        name: str,
        outputs: Path,
        config: ConfigTree,
        group: str,
        job_type: str,
        must: bool = False,
    ) -> None:
        """Open the mirror.

        Args:
            name: of the run directory; also the id.
            outputs: the folder under which W&B writes its own.
            config: resolved configuration.
            group, job_type: what W&B sorts runs by.
            must: a failure of W&B is raised as MirrorError; otherwise it is logged, and nothing is
                mirrored from there on.
        """
        self._run: Any = None
        self._must = must
        if settings.mode == "disabled":
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import wandb  # a second of import, spared when it is disabled

        self._wandb = wandb
        self._apart = int(config["train"]["steps"]) + 1  # numbers from one request to the next
        try:
            self._run = wandb.init(
                mode=settings.mode,
                project=settings.project,
                entity=settings.entity,
                id=name.replace("+", "_"),
                name=name,
                group=group,
                job_type=job_type,
                resume="allow" if settings.mode == "online" else None,
                dir=str(outputs.absolute()),  # W&B's own process may have been started elsewhere
                config=config | {"code": {"version": __version__, "git_commit": git_commit()}},
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    x_disable_meta=True,
                    x_save_requirements=False,
                    finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT", FINISH_SECONDS)),
                    finish_timeout_raises=True,
                ),
            )
            self._run.define_metric("*", step_metric="request")
            self._run.define_metric("training/*", step_metric="training/step")
        except Exception as error:  # W&B fails in many ways; the run goes on without it and says so
            self._give_up(error)

    def log(self, row: Row, grid: bytes, training: bytes | None) -> None:
        """Log a finished step: its row of metrics.csv, its grid.png, its training.csv."""
        if self._run is None:
            return
        columns = row.flat()
        numbers = {name: value for name, value in columns.items() if isinstance(value, int | float)}
        try:
            pictures = {"grid": self._wandb.Image(Image.open(io.BytesIO(grid)))}
            if training is not None:
                table = pd.read_csv(io.BytesIO(training))
                pictures["training"] = self._wandb.Table(dataframe=table)
            entries = {**numbers, "concept": row.concept, **pictures}
            self._run.log(entries, step=self._place(row.request))
        except Exception as error:
            self._give_up(error)

    def log_step(self, request: int, row: Mapping[str, float]) -> None:
        """Log a training step of a request, as it is made: its row of training.csv."""
        if self._run is None:
            return
        step = (request - 1) * (self._apart - 1) + int(row["step"])  # of all requests
        losses = {f"training/{name}": value for name, value in row.items()}
        place = self._place(request - 1) + int(row["step"])
        try:
            self._run.log(losses | {"training/step": step}, step=place)
        except Exception as error:
            self._give_up(error)

    def _place(self, request: int) -> int:
        """Return the number under which W&B has a request; its training steps come before it."""
        return request * self._apart

    def log_accuracy(self, matrix: pd.DataFrame) -> None:
        """Log the accuracy of every concept (rows) after every request (columns), in percent."""
        if self._run is None:
            return
        table = (
            matrix.astype(object)
            .where(matrix.notna(), None)
            .rename(columns=str)
            .rename_axis("concept")
            .reset_index()
        )
        try:
            last = self._place(int(matrix.columns[-1]))
            self._run.log({"accuracy": self._wandb.Table(dataframe=table)}, step=last)
        except Exception as error:
            self._give_up(error)

    def finish(self) -> None:
        """Close the mirror when all is uploaded."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run, reason = None, " ".join(str(error).split()) or type(error).__name__
        if self._must:
            raise MirrorError(reason) from error
        logger.warning(
            "W&B is not written from here on: %s "
            "(the run directory is complete; cu-report RUN --wandb online sends it later)",
            reason,
        )


def send(run: RunRecord, settings: WandbSettings, outputs: Path) -> None:
    """Mirror a run after the fact, as if it had been mirrored while it ran.

    System metrics are lacking: nobody kept them.

    Raises:
        MirrorError: W&B did not take all of it.
    """
    tracker = Tracker(
        settings,
        run.directory.name,
        outputs,
        run.config,
        group=f"{run.sequence}-{run.method}",
        job_type=run.regularizers,
        must=True,
    )
    for index, record in enumerate(run.records):
        folder = run.step_dir(index)
        training = (folder / TRAINING).read_bytes() if TRAINING in record.files else None
        for step in pd.read_csv(io.BytesIO(training)).to_dict("records") if training else ():
            tracker.log_step(index, {str(name): float(value) for name, value in step.items()})
        tracker.log(record.row, (folder / GRID).read_bytes(), training)
    tracker.log_accuracy(run.accuracy_matrix())
    tracker.finish()
