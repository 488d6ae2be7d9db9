"""Weights & Biases: configuration, metrics and samples per request, losses per training step.

Runs are grouped by sequence and method, and their job type is the list of regularizers, so that a
sweep reads as a table of both. The id is the run directory's name, so that a resume continues it.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from PIL import Image
from pydantic import Field

from cu_runner import __version__
from cu_runner.runtime.lazy import pd
from cu_runner.runtime.provenance import git_commit
from cu_runner.schema.errors import one_line
from cu_runner.schema.settings import WandbMode
from cu_runner.trackers.base import Ending, TrackedRun, Tracker, numbers_of, worst_values

if TYPE_CHECKING:
    from cu_runner.store.records import Row

# For what is not uploaded when a run ends; without a limit W&B waits for a lost server for ever.
FINISH_SECONDS = 60.0
LONGEST_TAG = 64  # characters that W&B takes
PER_REQUEST = ("grid", "training", "accuracy", "concept")  # beside the columns of metrics.csv


class Wandb(Tracker):
    """A run of W&B. Its number of a request is request * (train.steps + 1), so that the training
    steps of the request lie before it.

    The summary holds the last value of every metric under its own name, the worst one that it had
    after any request as "worst/NAME", and "state": running, finished, interrupted, failed, crashed.
    """

    title = "W&B"
    remedy = "the run directory is complete; cu-report RUN --wandb online sends it later"

    def __init__(
        self, mode: WandbMode, project: Annotated[str, Field(min_length=1)], entity: str | None
    ) -> None:
        """
        Args:
            mode: offline, online or disabled.
            project, entity: of W&B; entity None is the default of whoever is logged in.
        """
        self._mode, self._project, self._entity = mode, project, entity
        self._run: Any = None
        self._rows: dict[int, Row] = {}
        self._defined: set[str] = set()

    def check(self) -> str:
        """Check that there is a login where one is needed, and that the server answers."""
        if self._mode != "online":
            return f"mode {self._mode}: no login is needed"
        import wandb

        try:
            wandb.login(verify=True, timeout=15)
            return f"logged in as {wandb.Api(timeout=15).viewer.username}"
        except Exception as error:  # W&B fails in many ways; in each nothing would be written
            advice = "run `wandb login`, or use wandb.mode=offline"
            raise RuntimeError(f"{one_line(error)[:200]}; {advice}") from None

    def begin(self, run: TrackedRun) -> None:
        """Open the run, or go on with it."""
        if self._mode == "disabled":
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import wandb  # a second of import, spared when it is disabled

        self._wandb = wandb
        self._apart = int(run.config["train"]["steps"]) + 1  # numbers from one request to the next
        self._rows = {row.request: row for row in run.rows}
        origin = {
            "code": {"version": __version__, "git_commit": git_commit()},
            "command": run.command,
            "machine": run.machine,
        }
        self._run = wandb.init(
            mode=self._mode,
            project=self._project,
            entity=self._entity,
            id=run.name.replace("+", "_"),
            name=run.name,
            group=f"{run.sequence}-{run.method}",
            job_type=run.composition,
            tags=[tag[:LONGEST_TAG] for tag in run.tags],
            resume="allow" if self._mode == "online" else None,
            dir=str(run.outputs.absolute()),  # W&B's own process may have been started elsewhere
            config=run.config | origin,
            settings=wandb.Settings(
                silent=True,
                console="off",
                x_disable_meta=True,
                x_save_requirements=False,
                finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT", FINISH_SECONDS)),
                finish_timeout_raises=True,
            ),
        )
        self._run.define_metric("training/*", step_metric="training/step")
        self._define("request", *PER_REQUEST)
        self._run.summary.update({"state": "running"})

    def log_step(self, request: int, row: Mapping[str, float]) -> None:
        """Log the losses of a step, over the step of all requests."""
        if self._run is None:
            return
        step = (request - 1) * (self._apart - 1) + int(row["step"])  # of all requests
        losses = {f"training/{name}": value for name, value in row.items()}
        place = self._place(request - 1) + int(row["step"])
        self._run.log(losses | {"training/step": step}, step=place)

    def log_request(self, row: Row, grid: bytes | None, training: bytes | None) -> None:
        """Log the metrics of a request, its grid and its losses as a table."""
        if self._run is None:
            return
        numbers = numbers_of(row)
        self._define(*numbers)
        pictures = {}
        if grid is not None:
            pictures["grid"] = self._wandb.Image(Image.open(io.BytesIO(grid)))
        if training is not None:
            table = pd.read_csv(io.BytesIO(training))
            pictures["training"] = self._wandb.Table(dataframe=table)
        entries = {**numbers, "concept": row.concept, **pictures}
        self._run.log(entries, step=self._place(row.request))
        self._rows[row.request] = row
        worst = worst_values(self._rows.values())
        self._run.summary.update({f"worst/{name}": value for name, value in worst.items()})

    def log_accuracy(self, matrix: pd.DataFrame) -> None:
        """Log the matrix as a table."""
        if self._run is None:
            return
        table = (
            matrix.astype(object)
            .where(matrix.notna(), None)
            .rename(columns=str)
            .rename_axis("concept")
            .reset_index()
        )
        last = self._place(int(matrix.columns[-1]))
        self._run.log({"accuracy": self._wandb.Table(dataframe=table)}, step=last)

    def finish(self, ending: Ending) -> None:
        """Close the run when all is uploaded; W&B calls it failed where the status is not 0."""
        if self._run is None:
            return
        reason = {"reason": ending.reason} if ending.reason else {}
        self._run.summary.update({"state": ending.state, **reason})
        self._run.finish(exit_code=ending.status)

    def _place(self, request: int) -> int:
        """Return the number under which W&B has a request; its training steps come before it."""
        return request * self._apart

    def _define(self, *names: str) -> None:
        """Let the request be the x axis of metrics."""
        for name in sorted(set(names) - self._defined):
            self._run.define_metric(name, step_metric=None if name == "request" else "request")
            self._defined.add(name)
