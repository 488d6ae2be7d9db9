"""What a tracker is told of a run: where it lies, what it trains, what it measured, how it ended.

Nothing is read back from a tracker: the run directory holds everything, and more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, ClassVar, Literal

from cu_runner.schema.values import ConfigTree
from cu_runner.store.records import Row

if TYPE_CHECKING:
    from cu_runner.runtime.lazy import pd

State = Literal["finished", "interrupted", "failed", "crashed"]

# Metrics by the beginning of their names: whose smallest value is the worst, whose largest.
SMALLEST = ("UA", "RA", "clip_score")
LARGEST = ("drift", "fid", "kid", "recovered_")
CONTROLS = ("_untouched", "_retained")  # of a probe: its own yardsticks, which nothing makes worse


@dataclass(frozen=True)
class Ending:
    """How a run ended.

    state: "finished"; "interrupted" by ctrl-C or a signal; "failed" for a reason that is told in a
    line; "crashed" by an error of this program. status: the exit status of the command. reason: one
    line, without secrets; None of a finished run.
    """

    state: State
    status: int = 0
    reason: str | None = None


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told as it begins.

    directory: of the run. outputs: the folder that holds runs, below which a tracker writes too.
    config: resolved. regularizers: public names, in hook order. command: that makes the run again;
    None where none does. machine: "host", "device"; what is not known is not there. rows: of the
    steps that are finished already, where a run is resumed.
    """

    directory: Path
    outputs: Path
    config: ConfigTree
    sequence: str
    method: str
    regularizers: tuple[str, ...]
    command: str | None = None
    machine: dict[str, str] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()

    @property
    def name(self) -> str:
        """Return the name of the run directory: of its kind there is one below outputs."""
        return self.directory.name

    @property
    def composition(self) -> str:
        """Return the regularizers joined by "+"; "none" without any."""
        return "+".join(self.regularizers) or "none"

    @property
    def model(self) -> str:
        """Return a short name of the model, by where its weights lie."""
        return short_name(str(self.config["model"]["path"]))

    @property
    def tags(self) -> list[str]:
        """Return the words by which runs are picked: method, regularizers, sequence, model."""
        words = [self.method, *(self.regularizers or ("none",)), self.sequence, self.model]
        return list(dict.fromkeys(words))

    def folder(self, tracker: str) -> Path:
        """Return outputs/TRACKER/SEQUENCE/NAME, where a tracker of files keeps those of the run."""
        return self.outputs / tracker / self.sequence / self.name


class Tracker:
    """Base of conf/tracker: a class with a file there is a tracker. Every hook may do nothing.

    A hook that raises ends the tracker and not the run, which says so in a line. They are called in
    this order: begin; then per request log_step after each training step, log_request when it is
    committed; log_accuracy after the last; finish. Request 0 is the untouched model. A run that was
    killed between a commit and log_request tells of that request again when it is resumed, and of
    the training steps that it makes again: what is told later replaces what was told before.

    Attributes:
        title: how lines for people call it.
        remedy: what they say on how to have later what it lacks.
    """

    title: ClassVar[str] = "the tracker"
    remedy: ClassVar[str] = "the run directory is complete"

    def check(self) -> str:
        """Say in a few words that it would work, for cu-doctor; raise if it would not."""
        return "ready"

    def begin(self, run: TrackedRun) -> None:
        """Open what is written to."""

    def log_step(self, request: int, row: Mapping[str, float]) -> None:
        """Take a training step of a request, as it is made: "step" from 1 on, "loss", its parts."""

    def log_request(self, row: Row, grid: bytes | None, training: bytes | None) -> None:
        """Take a committed request: its row of metrics.csv, its grid.png, its training.csv.

        grid: None where eval.every left the evaluation out.
        """

    def log_accuracy(self, matrix: pd.DataFrame) -> None:
        """Take the accuracy of every concept (rows) after every request (columns), in percent."""

    def finish(self, ending: Ending) -> None:
        """Close what is written to."""


def short_name(path: str) -> str:
    """Return a name of a model's place: "stable-diffusion-v1-4" of the hub, "shapecanvas" and
    "shapecanvas_flow" of ours.

    Of a directory or a file it is the last part without its ending.
    """
    package, _, inside = path.partition(":")
    if package == "package" and inside:
        parts = PurePosixPath(inside).parts
        return parts[0] if parts[-1] == "pipeline" else f"{parts[0]}_{parts[-1]}"
    last = PurePosixPath(path).name
    return last.removesuffix(".safetensors").removesuffix(".ckpt") or path


def numbers_of(row: Row) -> dict[str, float | int]:
    """Return the columns of a row that are numbers."""
    columns = row.flat().items()
    return {name: value for name, value in columns if isinstance(value, int | float)}


def worst_values(rows: Iterable[Row]) -> dict[str, float]:
    """Return the worst value that a metric had after any request, by metric.

    The smallest of accuracies and of the CLIP score, the largest of drifts, distances (FID, KID)
    and of what a probe brings back. The untouched model does not count.
    """
    worst: dict[str, float] = {}
    for row in rows:
        for name, value in numbers_of(row).items() if row.request else ():
            if name.startswith(SMALLEST):
                worst[name] = min(value, worst.get(name, value))
            elif name.startswith(LARGEST) and not name.endswith(CONTROLS):
                worst[name] = max(value, worst.get(name, value))
    return worst
