"""How many jobs of a sweep fit on this machine at once, and the line of each that has ended."""

from __future__ import annotations

import os
from pathlib import Path

from cu_runner.runtime.devices import has_gpu
from cu_runner.runtime.lazy import torch
from cu_runner.sweeps.status import read_job

VISIBLE = "CUDA_VISIBLE_DEVICES"


def places_for(device: str, num_threads: int | None, at_once: int | None) -> list[str]:
    """Return a place for each job that may run at the same time: the GPUs that it sees.

    On GPUs each job has one of its own. On a CPU so many run as have num_threads cores each.

    Args:
        device: as the setting of that name.
        num_threads: of each job; None is as many as there are cores.
        at_once: what the user asks for instead; places are then given several times or not all.
    """
    if device == "cpu" or not has_gpu():
        cores = os.cpu_count() or 1
        found = [""] * max(cores // (num_threads or cores), 1)
    elif device in ("auto", "cuda"):
        found = visible_gpus()
    else:  # a GPU by its number, which all jobs share
        found = [",".join(visible_gpus())]
    return found if at_once is None else [found[n % len(found)] for n in range(at_once)]


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that this process sees."""
    if given := os.environ.get(VISIBLE):
        return [name.strip() for name in given.split(",")]
    return [str(number) for number in range(torch.cuda.device_count())]


def describe_start(number: int, at_once: int, threads: int | None) -> str:
    """Return the line with which jobs begin: how many there are, and how many run at once."""
    more = ""
    if at_once == 1 and number > 1 and threads is None and not has_gpu():
        more = "; each takes every core, and num_threads=1 lets as many run as there are cores"
    return f"{number} jobs, {at_once} at a time (hydra.launcher.at_once){more}"


def describe_end(note: Path, count: int, total: int) -> str:
    """Return the line of a job that has ended: its command, and what became of it."""
    job = read_job(note, int(note.parent.name), {}, total == 1)
    width, why = len(str(total)), f"  ({job.why})" if job.why else ""
    return f"{count:>{width}}/{total}  {job.state:<7} {' '.join(job.command[1:])}{why}"


def without_launcher(said: str) -> str:
    """Return what a job printed, without the lines of what launched it."""
    return "\n".join(line for line in said.splitlines() if not line.startswith("submitit "))
