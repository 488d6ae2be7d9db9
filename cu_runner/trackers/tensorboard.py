"""TensorBoard: event files in outputs/tensorboard/SEQUENCE/RUN, written by torch.utils.tensorboard.

`tensorboard --logdir outputs/tensorboard` shows every run. It has one step axis per folder, so a
run has two: `requests` over requests, `training` over the training steps of all requests.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from PIL import Image

from cu_runner.schema.errors import ConfigError
from cu_runner.trackers.base import Ending, TrackedRun, Tracker, numbers_of

if TYPE_CHECKING:
    from cu_runner.store.records import Row

FLUSH_SECONDS = 10  # how long a value may wait before it is in the file


class Tensorboard(Tracker):
    """Scalars, grids, and the configuration as text."""

    title = "TensorBoard"

    def __init__(self) -> None:
        """Take nothing. Raises ConfigError where the package tensorboard is not installed."""
        if importlib.util.find_spec("tensorboard") is None:
            raise ConfigError(
                "tracker=tensorboard: the package tensorboard is not installed; "
                "pip install 'cu_runner[tensorboard]', or use tracker=csv"
            )
        self._folder: Path | None = None
        self._writers: dict[str, Any] = {}
        self._described = ""

    def begin(self, run: TrackedRun) -> None:
        """Note where the files go; they are made with their first value."""
        self._folder, self._steps = run.folder("tensorboard"), int(run.config["train"]["steps"])
        facts = {"command": run.command, **run.machine, "tags": run.tags}
        self._described = "".join(
            f"    {line}\n"  # as code, in Markdown
            for part in (facts, run.config)
            for line in yaml.safe_dump(part, sort_keys=False, allow_unicode=True).splitlines()
        )

    def log_step(self, request: int, row: Mapping[str, float]) -> None:
        """Write the losses of a step, over the step of all requests."""
        step = (request - 1) * self._steps + int(row["step"])
        writer = self._writer("training", step)
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name, value, step)

    def log_request(self, row: Row, grid: bytes | None, training: bytes | None) -> None:
        """Write the metrics of a request and its grid, and put all in the files."""
        writer = self._writer("requests", row.request)
        if self._described:
            writer.add_text("configuration", self._described, row.request)
            self._described = ""
        for name, value in numbers_of(row).items():
            if name != "request":
                writer.add_scalar(name, value, row.request)
        writer.add_text("concept", row.concept or "untouched model", row.request)
        if grid is not None:
            picture = np.asarray(Image.open(io.BytesIO(grid)).convert("RGB"))
            writer.add_image("grid", picture, row.request, dataformats="HWC")
        for each in self._writers.values():
            each.flush()

    def finish(self, ending: Ending) -> None:
        """Write how the run ended, and close the files."""
        for name, writer in self._writers.items():
            if name == "requests":
                said = f"{ending.state}: {ending.reason}" if ending.reason else ending.state
                writer.add_text("state", said)
            writer.close()

    def _writer(self, axis: str, step: int) -> Any:
        """Return the file of an axis; from its first step on it hides what earlier files have."""
        if axis not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            assert self._folder is not None
            self._writers[axis] = SummaryWriter(
                str(self._folder / axis), purge_step=step, flush_secs=FLUSH_SECONDS
            )
        return self._writers[axis]
