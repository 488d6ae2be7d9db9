"""Hydra's callback of sweeps: notes the jobs before the first one starts, says in the end which failed."""

from __future__ import annotations

from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from cu_runner.cli.failures import one_line_failures
from cu_runner.schema.errors import LaunchError
from cu_runner.store.layout import SWEEP
from cu_runner.sweeps.status import read_sweep
from cu_runner.sweeps.submission import note_jobs


class NoteJobs(Callback):
    """Writes the notes of a sweep, or ends the process with one line if it may not be submitted; says in the end what failed."""

    def on_multirun_start(self, config: DictConfig, **kwargs: object) -> None:
        with one_line_failures("cu-run"):
            note_jobs(config, GlobalHydra.instance().config_loader())

    def on_multirun_end(self, config: DictConfig, **kwargs: object) -> None:
        folder = Path(config.hydra.sweep.dir)
        if (
            not str(config.hydra.launcher["_target_"]).endswith(".BasicLauncher")
            and (folder / SWEEP).exists()
        ):
            with one_line_failures("cu-run"):
                refuse_failures(folder)


def refuse_failures(folder: Path) -> None:
    """Raises LaunchError if a job of a sweep that has ended did not make its run."""
    jobs = read_sweep(folder)
    if failed := [job for job in jobs if job.state != "done"]:
        why = failed[0].why or failed[0].state
        raise LaunchError(
            f"{len(failed)} of {len(jobs)} jobs did not end well, the first: {why}; see `cu-sweep status {folder}`"
        )
