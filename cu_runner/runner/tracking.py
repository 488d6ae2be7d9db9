"""W&B as a mirror of the run directory. Nothing is ever read back from it, and a failure of it never stops a run.

Runs are grouped by sequence and method, and their job type is the list of regularizers, so that a sweep reads as a table of both.
"""

from __future__ import annotations

import io
import logging
import os
import warnings
from pathlib import Path

from PIL import Image

from cu_runner import __version__
from cu_runner.runtime.lazy import pd
from cu_runner.runtime.provenance import git_commit
from cu_runner.schema.errors import MirrorError
from cu_runner.schema.settings import WandbSettings
from cu_runner.store.layout import GRID, TRAINING
from cu_runner.store.run_record import RunRecord

logger = logging.getLogger(__name__)


FINISH_SECONDS = 60.0  # for what is not uploaded yet when a run ends; without a limit W&B waits for a lost server for ever


class Tracker:
    """Logs configuration, metrics per request and the sample grid; the id is the run directory's name, so a resume continues it."""

    def __init__(
        self,
        settings: WandbSettings,
        name: str,
        outputs: Path,
        config: dict[str, object],
        group: str,
        job_type: str,
        must: bool = False,
    ) -> None:
        """
        Args:
            name: of the run directory; also the id.
            outputs: the folder under which W&B writes its own.
            config: resolved configuration.
            group, job_type: what W&B sorts runs by.
            must: a failure of W&B is raised as MirrorError; otherwise it is logged, and nothing is mirrored from there on.
        """
        self._run, self._must = None, must
        if settings.mode == "disabled":
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import wandb  # a second of import, spared when it is disabled

        self._wandb = wandb
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
        except Exception as error:  # W&B fails in many ways; the run goes on without it and says so
            self._give_up(error)

    def log(self, step: int, row: dict[str, object], grid: bytes, training: bytes | None) -> None:
        """One finished step: its row of metrics.csv, its grid.png, and its training.csv as a table."""
        if self._run is None:
            return
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
        try:
            pictures = {"grid": self._wandb.Image(Image.open(io.BytesIO(grid)))}
            if training is not None:
                pictures["training"] = self._wandb.Table(
                    dataframe=pd.read_csv(io.BytesIO(training))
                )
            self._run.log({**numbers, "concept": row["concept"], **pictures}, step=step)
        except Exception as error:
            self._give_up(error)

    def log_accuracy(self, matrix: pd.DataFrame) -> None:
        """The accuracy of every concept after every request, as a table; rows concepts, columns requests, percent."""
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
            self._run.log(
                {"accuracy": self._wandb.Table(dataframe=table)}, step=int(matrix.columns[-1])
            )
        except Exception as error:
            self._give_up(error)

    def finish(self) -> None:
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
            "W&B is not written from here on: %s (the run directory is complete; cu-report RUN --wandb online sends it later)",
            reason,
        )


def send(run: RunRecord, settings: WandbSettings, outputs: Path) -> None:
    """Mirror a run after the fact, as if it had been mirrored while it ran (without system metrics, which nobody kept).

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
        training = run.step_dir(index) / TRAINING
        tracker.log(
            index,
            record["row"],
            (run.step_dir(index) / GRID).read_bytes(),
            training.read_bytes() if training.exists() else None,
        )
    tracker.log_accuracy(run.accuracy_matrix())
    tracker.finish()
