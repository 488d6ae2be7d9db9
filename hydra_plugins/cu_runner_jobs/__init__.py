"""A sweeper for jobs that are no product of values.

It stands in this package because Hydra looks for sweepers nowhere else.
"""

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


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
