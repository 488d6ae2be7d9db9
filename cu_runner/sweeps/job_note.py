"""The notes in a sweep's folder: sweep.json of the sweep, and job.json of each of its jobs."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

from cu_runner.schema.errors import SweepError
from cu_runner.schema.json_files import parse_json
from cu_runner.store.files import to_json, write_atomic
from cu_runner.store.layout import JOB, SWEEP


@dataclass(frozen=True)
class SweepNote:
    """A sweep: its command, the class of its launcher, and the commit of the code, if known."""

    command: list[str]
    git_commit: str | None
    launcher: str


@dataclass(frozen=True)
class JobNote:
    """A job of a sweep.

    run, signature: None if its configuration cannot be composed. job_id: the launcher's, once it
    has begun. error: the line with which it ended, if it failed.
    """

    command: list[str]
    git_commit: str | None
    run: str | None = None
    signature: str | None = None
    job_id: str | None = None
    error: str | None = None


Note = TypeVar("Note", SweepNote, JobNote)


def read_sweep_note(folder: Path) -> SweepNote:
    """Read sweep.json of a sweep's folder. Raises SweepError."""
    return _read(folder / SWEEP, SweepNote)


def read_job_note(path: Path) -> JobNote:
    """Read a job.json. Raises SweepError."""
    return _read(path, JobNote)


def _read(path: Path, kind: type[Note]) -> Note:
    try:
        return kind(**parse_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        what = "cannot be read; give the folder of a sweep, outputs/sweeps/DATE"
        raise SweepError(f"{path}: {what}") from None


def write_note(path: Path, note: SweepNote | JobNote) -> None:
    """Write a note; what is None is left out, but for the commit."""
    entries = asdict(note).items()
    kept = {key: value for key, value in entries if value is not None or key == "git_commit"}
    write_atomic(path, to_json(kept))


def note_job(*, run: str | None = None, error: str | None = None) -> None:
    """Note in job.json which of a sweep's jobs has begun, its run, and with which error it ended.

    Outside of a sweep nothing is noted.
    """
    from hydra.core.hydra_config import HydraConfig

    node = HydraConfig.get()
    path = Path(node.runtime.output_dir) / JOB
    if path.is_file():  # submission.py wrote it for every job of a sweep but dry runs
        note = read_job_note(path)
        note = replace(note, job_id=str(node.job.id), run=run or note.run, error=error)
        with contextlib.suppress(OSError):  # a full disk is complained of by the run itself
            write_note(path, note)
