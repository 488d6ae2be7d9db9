"""What became of the jobs of a sweep: done, running, queued, pending, or failed and why.

Nothing is written and no lock is taken from a run.
"""

from __future__ import annotations

import getpass
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from cu_runner.schema.errors import SweepError
from cu_runner.store.layout import JOB
from cu_runner.store.locks import LOCK, is_held
from cu_runner.store.run_record import is_complete
from cu_runner.sweeps.job_note import JobNote, read_job_note, read_sweep_note

# folder of hydra/launcher=slurm and local_processes: logs and pickles by job id
SUBMITIT = ".submitit"
TAIL = 8192  # bytes of a log in which its last line is looked for
# states of squeue; every other one that it lists is running
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "SUSPENDED")
State = Literal["done", "running", "queued", "failed", "pending"]
STATES: tuple[State, ...] = get_args(State)


@dataclass(frozen=True)
class Job:
    """A job of a sweep: its number and command, its run, and what became of it.

    queued: in SLURM's queue. pending: not begun, or the sweep ended before it. why: of a failure,
    one line. run: None if it cannot be composed.
    """

    sweep: str
    number: int
    state: State
    why: str
    run: str | None
    command: list[str]


def read_sweep(folder: Path) -> list[Job]:
    """Return the jobs of a sweep in their order. Raises SweepError."""
    launcher = read_sweep_note(folder).launcher
    paths = sorted(
        folder.glob(f"*/{JOB}"), key=lambda path: (len(path.parent.name), path.parent.name)
    )
    queue = read_queue() if launcher.endswith("SlurmLauncher") else {}
    alone = len(paths) == 1
    return [read_job(path, number, queue, alone) for number, path in enumerate(paths)]


def read_queue() -> dict[str, str]:
    """Return the state by job id of the user's jobs in SLURM's queue, array jobs as ARRAY_INDEX.

    It is empty on a machine without SLURM.
    """
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
    """Return one job, from its note, its run directory, its log and the queue.

    alone: it is the only job, and so in no array.
    """
    note = read_job_note(path)
    logs = submitit_folder(path.parent.parent / SUBMITIT, note, path.parent.name, alone)
    state, why = state_of(path, note, logs, queue)
    return Job(str(path.parent.parent), number, state, why, note.run, list(note.command))


def state_of(
    path: Path, note: JobNote, logs: Path | None, queue: dict[str, str]
) -> tuple[State, str]:
    """Return what became of a job, and why if it failed."""
    run = None if note.run is None else Path(note.run)
    noted = path.stat().st_mtime
    if run is not None and is_complete(run):
        later = (run / "summary.json").stat().st_mtime >= noted
        if note.error is None or later:
            return "done", ""
    if run is not None and is_held(run / LOCK):
        return "running", ""
    if logs is not None and logs.name in queue:
        return ("queued" if queue[logs.name] in WAITING else "running"), ""
    if note.error is not None:
        return "failed", note.error
    written = [*(logs.glob("*_log.err") if logs else ()), *([run / "run.log"] if run else ())]
    sizes = {file: file.stat() for file in written if file.is_file()}
    recent = {
        file: entry.st_mtime
        for file, entry in sizes.items()
        if entry.st_size and entry.st_mtime >= noted
    }
    if not recent:
        return "pending", ""
    last = max(recent, key=lambda file: recent[file])
    return "failed", f"ended without a message; last line of {last.name}: {last_line(last)}"


def submitit_folder(root: Path, note: JobNote, number: str, alone: bool) -> Path | None:
    """Return where the submitted job's logs lie.

    That is by the id that it noted when it began, or its index in SLURM's array before that.
    """
    if note.job_id is not None:
        return root / note.job_id
    for entry in root.glob("*"):
        if (alone and entry.name.isdecimal()) or entry.name.endswith(f"_{number}"):
            return entry
    return None


def last_line(path: Path) -> str:
    """Return the last line of a log that is not empty."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - TAIL, 0))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "none")
