"""A sweeper for jobs that are no product of values, and a launcher that starts as many as fit.

They stand in this package because Hydra looks for them nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import LocalLauncher
from omegaconf import DictConfig

POLL = 0.2  # seconds between two looks at the jobs


class ListedJobs(Sweeper):
    """Launches the jobs of a JSON file at once (submission.read_jobs).

    Each with its own overrides, then the command line's.
    """

    def __init__(self, file: str) -> None:
        self.file = file

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[object]:
        from cu_runner.sweeps.submission import read_jobs

        jobs = [[*job, *arguments] for job in read_jobs(self.file)]
        self.validate_batch_is_legal(jobs)
        return [result.return_value for result in self.launcher.launch(jobs, initial_job_idx=0)]


class LocalProcesses(LocalLauncher):
    """Jobs in processes of their own on this machine, as many at once as fit on it.

    at_once: how many; None is one per GPU, or as many as have num_threads cores each.
    """

    def __init__(self, at_once: int | None, **params: object) -> None:
        super().__init__(**params)
        self.at_once = at_once

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        import submitit

        from cu_runner.cli.console import say
        from cu_runner.store.layout import JOB
        from cu_runner.sweeps import side_by_side

        config, total = self.config, len(job_overrides)
        free = side_by_side.places_for(config.device, config.num_threads, self.at_once)
        say(side_by_side.describe_start(total, len(free), config.num_threads))
        executor = submitit.LocalExecutor(folder=self.params["submitit_folder"])
        executor.update_parameters(timeout_min=self.params["timeout_min"])
        waiting, running, ended = dict(enumerate(job_overrides, initial_job_idx)), {}, {}
        while waiting or running:
            while waiting and free:
                number, place = min(waiting), free.pop(0)
                seen = tuple(filter(None, place.split(",")))
                # names of GPUs need not be numbers, which update_parameters() asks for
                executor.parameters |= {"visible_gpus": seen, "gpus_per_node": len(seen)}
                state = (number, f"job_id_for_{number}", Singleton.get_state())
                job = executor.submit(self, list(waiting.pop(number)), "hydra.sweep.dir", *state)
                running[number] = (job, place)
            for number, (job, place) in list(running.items()):
                if job.done():
                    ended[number] = running.pop(number)[0]
                    free.append(place)
                    note = Path(config.hydra.sweep.dir) / str(number) / JOB
                    if note.is_file():
                        say(side_by_side.describe_end(note, len(ended), total))
                    else:  # a dry run
                        say(side_by_side.without_launcher(job.stdout() or ""))
            time.sleep(POLL)
        return [ended[number].results()[0] for number in sorted(ended)]
