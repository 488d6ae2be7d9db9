"""Make runs by the command `cu-run`, several side by side or on a cluster, and read back what they measured."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cu_runner.runs import RunRecord, read_run

CU_RUN = str(Path(sys.executable).with_name("cu-run"))
DIVERGED = ("cu-run: training led to", "cu-run: the images after request")  # not a locked run or a full disk


class LaunchError(RuntimeError):
    """A run could not be made for a reason that says nothing about its method; the message is one line."""


def cu_run(overrides: list[str], threads: int | None = None) -> RunRecord | str:
    """Make, resume or find one run.

    Args:
        overrides: as on the command line of cu-run.
        threads: CPU threads of the run; None leaves torch's choice.

    Returns:
        The run, or the line in which cu-run says that its weights diverged: a result too.

    Raises:
        LaunchError: cu-run failed for another reason.
    """
    command = [CU_RUN, *overrides]
    limit = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    command += [] if threads is None else [f"num_threads={threads}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | limit)
    if done.stderr.startswith(DIVERGED):
        return done.stderr.strip()
    if done.returncode != 0:
        raise LaunchError(f"cu-run {' '.join(overrides)} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return read_run(Path(done.stdout.strip().splitlines()[-1].removeprefix("run: ")))


def cu_runs(jobs: list[list[str]], side_by_side: int | None = None) -> Iterator[RunRecord | str]:
    """cu_run of each, in order.

    Args:
        side_by_side: runs at a time, each with one thread if more than one; None is one per CPU core, or a single one on a GPU.
    """
    if side_by_side is None:
        import torch

        side_by_side = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    threads = 1 if side_by_side > 1 else None
    with ThreadPoolExecutor(max_workers=side_by_side) as pool:
        yield from pool.map(lambda overrides: cu_run(overrides, threads), jobs)


def submit(jobs: list[list[str]], launcher: str) -> Iterator[str]:
    """Make runs through one of Hydra's launchers (conf/hydra/launcher), all at once; a line for each that ends, in order.

    Whether a job made its run is seen in the run's directory, and why not in the sweep's.
    """

    def wait(overrides: list[str]) -> str:
        command = [CU_RUN, "--multirun", f"hydra/launcher={launcher}", *overrides]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise LaunchError(f"{launcher}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
        return f"ended on {launcher}"

    with ThreadPoolExecutor(max_workers=len(jobs)) as pool:
        yield from pool.map(wait, jobs)
