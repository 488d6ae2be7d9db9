"""Hydra's callback of sweeps: notes the jobs beforehand, says at the end what failed."""

from __future__ import annotations

import shlex
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from cu_runner.cli.console import say
from cu_runner.cli.failures import one_line_failures
from cu_runner.schema.errors import LaunchError
from cu_runner.store.layout import SWEEP
from cu_runner.sweeps.status import read_sweep
from cu_runner.sweeps.submission import note_jobs


class NoteJobs(Callback):
    """The notes of a sweep; it ends with one line if it may not be submitted, or if jobs failed."""

    def on_multirun_start(self, config: DictConfig, **kwargs: object) -> None:
        """Write the notes of all jobs, and say where they lie."""
        with one_line_failures("cu-run"):
            note_jobs(config, GlobalHydra.instance().config_loader())
        folder = Path(config.hydra.sweep.dir)
        if (folder / SWEEP).exists():  # not of dry runs
            said = shlex.join(["cu-sweep", "status", str(folder)])
            say(f"sweep: {folder}; `{said}` tells what became of each job")

    def on_multirun_end(self, config: DictConfig, **kwargs: object) -> None:
        """Say which jobs failed, of those that ran in processes of their own."""
        folder = Path(config.hydra.sweep.dir)
        in_process = str(config.hydra.launcher["_target_"]).endswith(".BasicLauncher")
        if not in_process and (folder / SWEEP).exists():
            with one_line_failures("cu-run"):
                refuse_failures(folder)


def refuse_failures(folder: Path) -> None:
    """Raise LaunchError if a job of a sweep that has ended did not make its run."""
    jobs = read_sweep(folder)
    if failed := [job for job in jobs if job.state != "done"]:
        why = failed[0].why or failed[0].state
        raise LaunchError(
            f"{len(failed)} of {len(jobs)} jobs did not end well, the first: {why}; "
            f"see `cu-sweep status {folder}`"
        )
