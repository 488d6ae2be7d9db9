"""Make runs by the command `cu-run`, several side by side or on a cluster, and read them back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cu_runner.config.command import key_of, last_of_each
from cu_runner.runtime.lazy import torch
from cu_runner.schema.errors import LaunchError
from cu_runner.store.files import to_json, write_atomic
from cu_runner.store.records import name_requests
from cu_runner.store.run_record import RunRecord, read_run

CU_RUN = str(Path(sys.executable).with_name("cu-run"))
# how cu-run's line begins; not that of a locked run or a full disk
DIVERGED = ("training led to", "the images after request")
LAST = (-1,)  # as `evaluated` of the functions below: the last request alone


def cu_run(
    overrides: list[str], threads: int | None = None, *, evaluated: tuple[int, ...] | None = None
) -> RunRecord | str:
    """Make, resume or find one run.

    Args:
        overrides: as on the command line of cu-run.
        threads: CPU threads of the run; None leaves torch's choice.
        evaluated: numbers of the requests whose evaluation is needed, negative ones counted from
            the end; those that a short run does not have are left out. None: every one.

    Returns:
        The run, or the line in which cu-run says that its weights diverged: a result too.

    Raises:
        LaunchError: cu-run failed for another reason, or a finished run lacks an evaluation.
    """
    command = [CU_RUN, *last_of_each(overrides)]
    limit = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    asked = any(key_of(override) == "num_threads" for override in overrides)
    command += [] if threads is None or asked else [f"num_threads={threads}"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | limit
    )
    if diverged(done.stderr):
        return done.stderr.strip()
    if done.returncode != 0:
        raise LaunchError(f"cu-run {' '.join(overrides)} failed: {last_line(done.stderr)}")
    run = read_run(Path(done.stdout.strip().splitlines()[-1].removeprefix("run: ")))
    if lacking := unevaluated(run, evaluated):
        raise LaunchError(
            f"{run.directory}: not evaluated (eval.every): {name_requests(lacking)}; needed here: "
            "move the directory away, or give another paths.outputs"
        )
    return run


def unevaluated(run: RunRecord, needed: tuple[int, ...] | None) -> list[int]:
    """Return the requests that are needed, as in cu_run, and that the run did not evaluate."""
    steps = {step.index: step for step in run.records}
    numbers = steps if needed is None else {n + len(steps) * (n < 0) for n in needed}
    return sorted(n for n in numbers if n in steps and not steps[n].evaluated)


def diverged(line: str) -> bool:
    """Return whether a run's error says that its weights diverged."""
    return line.removeprefix("cu-run: ").startswith(DIVERGED)


def cu_runs(
    jobs: list[list[str]],
    side_by_side: int | None = None,
    *,
    evaluated: tuple[int, ...] | None = None,
) -> Iterator[RunRecord | str]:
    """Yield what cu_run returns of each, in order.

    Args:
        side_by_side: runs at a time, each with one thread if more than one; None is one per CPU
            core, or a single one on a GPU.
        evaluated: as of cu_run.
    """
    for job in jobs:
        if evaluated is None and any(key_of(override) == "eval.every" for override in job):
            raise LaunchError("eval.every: what is made of these runs needs every request")
    if side_by_side is None:
        side_by_side = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    threads = 1 if side_by_side > 1 else None
    with ThreadPoolExecutor(max_workers=side_by_side) as pool:
        yield from pool.map(lambda overrides: cu_run(overrides, threads, evaluated=evaluated), jobs)


def submit(jobs: list[list[str]], common: list[str], launcher: str, folder: Path) -> str:
    """Make runs through one of Hydra's launchers (conf/hydra/launcher), as one sweep.

    It returns when all of them have ended.

    Args:
        jobs: the overrides of each run.
        common: --config-dir and further overrides of all runs, from the user's command line.
        launcher: name of a file of conf/hydra/launcher.
        folder: of the sweep, where cu_runner.sweeps reads what became of each.

    Returns:
        What cu-run said of failures, in a line; empty if there was none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "jobs.json"
    write_atomic(file, to_json(jobs))
    options = [
        f"hydra/launcher={launcher}",
        "hydra/sweeper=listed",
        f"hydra.sweeper.file={file}",
        f"hydra.sweep.dir={folder}",
    ]
    command = [CU_RUN, "--multirun", *common, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else last_line(done.stderr).removeprefix("cu-run: ")


def last_line(said: str) -> str:
    """Return the last line of what a command said on stderr."""
    return (said.strip() or "no message").splitlines()[-1]
