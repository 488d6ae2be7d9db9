"""cu-sweep: what became of the jobs of a sweep: done, running, queued, pending, or failed and why; and how to run the rest.

    cu-sweep status outputs/sweeps/2026-01-31_12-00-00

Nothing is written and no lock is taken from a run. Exit status: 0, 1 a job failed, 2 the folder is no sweep's, 130 interrupted.
"""

from __future__ import annotations

import fcntl
import getpass
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cu_runner.schema.errors import SweepError
from cu_runner.store.layout import JOB, SWEEP

SUBMITIT = (
    ".submitit"  # folder of hydra/launcher=slurm and local_processes: logs and pickles by job id
)


TAIL = 8192  # bytes of a log in which its last line is looked for


WAITING = (
    "PENDING",
    "CONFIGURING",
    "REQUEUED",
    "SUSPENDED",
)  # states of squeue; every other one that it lists is running


State = Literal["done", "running", "queued", "pending", "failed"]


@dataclass(frozen=True)
class Job:
    """A job of a sweep: its number and command, the run that it makes (None if it cannot be composed), and what became of it.

    queued: in SLURM's queue. pending: not begun, or the sweep ended before it. why: of a failure, one line.
    """

    sweep: str
    number: int
    state: State
    why: str
    run: str | None
    command: list[str]


def read_sweep(folder: Path) -> list[Job]:
    """The jobs of a sweep in their order. Raises SweepError."""
    whole = read_note(folder / SWEEP)
    paths = sorted(
        folder.glob(f"*/{JOB}"), key=lambda path: (len(path.parent.name), path.parent.name)
    )
    queue = read_queue() if str(whole["launcher"]).endswith("SlurmLauncher") else {}
    return [
        read_job(path, number, queue, alone=len(paths) == 1) for number, path in enumerate(paths)
    ]


def read_note(path: Path) -> dict[str, object]:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        note["command"], note["git_commit"]
    except (OSError, ValueError, KeyError, TypeError):
        raise SweepError(
            f"{path}: cannot be read; give the folder of a sweep, outputs/sweeps/DATE"
        ) from None
    return note


def read_queue() -> dict[str, str]:
    """State by job id of the user's jobs in SLURM's queue, array jobs as ARRAY_INDEX; empty on a machine without SLURM."""
    if shutil.which("squeue") is None:
        return {}
    command = ["squeue", "--noheader", "--array", "--format=%i %T", f"--user={getpass.getuser()}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        raise SweepError(
            "squeue: gave no answer within a minute; try again when SLURM's controller is well"
        ) from None
    if done.returncode != 0:
        raise SweepError(f"squeue: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return dict(line.split() for line in done.stdout.splitlines())


def read_job(path: Path, number: int, queue: dict[str, str], alone: bool) -> Job:
    """One job, from its note, its run directory, its log and the queue. alone: it is the only job, and so in no array."""
    note = read_note(path)
    run = Path(str(note["run"])) if "run" in note else None
    logs = submitit_folder(path.parent.parent / SUBMITIT, note, path.parent.name, alone)
    state, why = "pending", ""
    if (
        run is not None
        and is_done(run)
        and ("error" not in note or (run / "summary.json").stat().st_mtime >= path.stat().st_mtime)
    ):
        state = "done"
    elif run is not None and is_locked(run / ".lock"):
        state = "running"
    elif logs is not None and logs.name in queue:
        state = "queued" if queue[logs.name] in WAITING else "running"
    elif "error" in note:
        state, why = "failed", str(note["error"])
    else:
        since = path.stat().st_mtime
        written = [*(logs.glob("*_log.err") if logs else ()), *([run / "run.log"] if run else ())]
        recent = [
            file
            for file in written
            if file.is_file() and file.stat().st_mtime >= since and file.stat().st_size
        ]
        if recent:
            last = max(recent, key=lambda file: file.stat().st_mtime)
            state, why = (
                "failed",
                f"ended without a message; last line of {last.name}: {last_line(last)}",
            )
    return Job(
        str(path.parent.parent),
        number,
        state,
        why,
        None if run is None else str(run),
        list(note["command"]),
    )


def submitit_folder(root: Path, note: dict[str, object], number: str, alone: bool) -> Path | None:
    """Where the submitted job's logs lie: by the id that it noted when it began, or its index in SLURM's array before that."""
    if "job_id" in note:
        return root / str(note["job_id"])
    return next(
        (
            entry
            for entry in root.glob("*")
            if (alone and entry.name.isdecimal()) or entry.name.endswith(f"_{number}")
        ),
        None,
    )


def is_done(run: Path) -> bool:
    """Whether summary.json stands for the run's last step."""
    try:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        last = max((run / "steps").glob("*/step.json"), key=lambda path: int(path.parent.name))
        return summary["sha256"] == json.loads(last.read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_locked(path: Path) -> bool:
    """Whether a process of this machine holds a run's lock: a shared lock, let go at once, is refused then."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def last_line(path: Path) -> str:
    """The last line of a log that is not empty."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - TAIL, 0))
        lines = [
            line.strip()
            for line in file.read().decode(errors="replace").splitlines()
            if line.strip()
        ]
    return lines[-1] if lines else "none"
