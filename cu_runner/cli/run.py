"""cu-run: compose -> build -> run.

The only place that instantiates, and the only one that talks to the terminal.

Exit status: 0 done, 1 the run failed, 2 the configuration cannot be run, 130 interrupted, 128 + its
number for another signal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cu_runner import __version__
from cu_runner.cli.console import logging_to, quiet_libraries, say, without_reader
from cu_runner.cli.failures import FREE, ending_of, one_line_failures
from cu_runner.cli.help import help_text
from cu_runner.runtime import distributed
from cu_runner.runtime.devices import choose_device, device_name, limit_threads
from cu_runner.runtime.signals import StopSignals
from cu_runner.runtime.user_code import raised_in
from cu_runner.store.layout import CONFIG
from cu_runner.store.run_directory import RunStore
from cu_runner.sweeps.job_note import note_job

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from cu_runner.config.run_config import RunConfig
    from cu_runner.trackers.base import TrackedRun

LOG = "run.log"
logger = logging.getLogger("cu_runner.cli")  # __name__ is another under `python -m`


@without_reader
def main() -> None:
    """Call `cu-run` with its command line."""
    arguments = sys.argv[1:]
    if arguments in (["--help"], ["-h"]):
        print(help_text())
        return
    if arguments == ["--version"]:
        print(f"cu-run {__version__}")
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here, not to Hydra's own printer
    # threads that wait long by spinning starve each other on a shared machine
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    logging.raiseExceptions = False  # a log line that finds the disk full is not worth a traceback
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    statuses: list[int] = []
    with one_line_failures("cu-run", statuses):
        import hydra

        import cu_runner.config.resolvers  # noqa: F401, for --cfg job --resolve
        from cu_runner.config.permissions import check_command, refuse_repeated_keys
        from cu_runner.runtime.paths import config_dir

        options = check_command(arguments)
        refuse_repeated_keys(options.overrides, options.multirun)

        def job(config: DictConfig) -> None:
            # its failure is caught here, so that it does not end a sweep
            with one_line_failures("cu-run", statuses, lambda line: note_job(error=line)):
                run_job(config)

        hydra.main(config_path=str(config_dir()), config_name="config", version_base="1.3")(job)()
    sys.exit(max(statuses, default=0))


def run_job(config: DictConfig) -> None:
    """Check a composed job, and run it."""
    from hydra.core.hydra_config import HydraConfig

    from cu_runner.config.command import recorded_command, words_of
    from cu_runner.config.compose import parse

    plan = parse(config)
    distributed.start(plan.spine.device)
    if not plan.spine.dry_run:
        note_job(run=str(plan.directory.absolute()))
    run_plan(plan, recorded_command("cu-run", words_of(HydraConfig.get())))


def run_plan(plan: RunConfig, command: str, ending: str = "run") -> None:
    """Build the parts of a run, run it, print its table.

    Args:
        command: that makes it again.
        ending: what the last line calls its directory.
    """
    from cu_runner.runner.forecast import forecast
    from cu_runner.runner.training import check_composition
    from cu_runner.store.signature import signature

    distributed.start(plan.spine.device)
    if plan.spine.dry_run:
        regularizers = {name: node.build() for name, node in plan.regularizers.items()}
        method = plan.method.build()
        method.check(plan.sequence.build())
        check_composition(method, regularizers, plan.spine.train)
        say(forecast(plan))
        return
    with (
        leaving_nothing_unstarted(plan),
        StopSignals() as stop,
        RunStore(
            plan.directory,
            plan.resolved,
            signature,
            command=command,
            code=plan.code,
            allow_other_code=plan.spine.allow_other_code,
        ) as store,
        logging_to(plan.directory / LOG) if distributed.is_main() else contextlib.nullcontext(),
    ):
        if distributed.is_main():  # for whoever wants to watch its files; again at the end
            say(f"{ending}: {plan.directory}")
        if is_finished(store):
            logger.info("complete already; nothing to do")
        else:
            for note in plan.notes:
                logger.warning("%s", note)
            with advising_on_memory(plan):
                execute(plan, store, command, stop)
        if distributed.is_main():
            say_what_is_left_out(plan)
            print_table(plan.directory / "metrics.csv")
    if distributed.is_main():
        say(f"{ending}: {plan.directory}")


@contextlib.contextmanager
def advising_on_memory(plan: RunConfig) -> Iterator[None]:
    """Let an error of memory name what of this run's settings would need less of it."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":
            from cu_runner.runner.preflight import less_memory

            vars(error)["advice"] = less_memory(plan) or FREE
        raise


@contextlib.contextmanager
def leaving_nothing_unstarted(plan: RunConfig) -> Iterator[None]:
    """Remove the directory of a run that was refused before it made anything.

    That is by bad input, and not by the user's own code, whose traceback is in the log.
    """
    directory = plan.directory
    folders = [directory, *directory.parents[:2], Path(plan.spine.paths.outputs)]
    made = [folder for folder in folders if not folder.exists()]
    try:
        yield
    except ValueError as error:
        unstarted = directory in made and not (directory / "steps").exists()
        if unstarted and distributed.is_main() and not raised_in(error, list(plan.allowed)):
            for name in (CONFIG, LOG, ".lock"):
                (directory / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a folder that holds something else
                for folder in made:
                    folder.rmdir()
            vars(error).pop("log", None)
        raise


def is_finished(store: RunStore) -> bool:
    """Tell whether every step is there and undamaged. Raises StoreError on damage.

    What is derived from the steps is then made anew: it may have been damaged or edited.
    """
    from cu_runner.store.run_record import is_complete

    steps = store.proven()
    if not is_complete(store.directory):
        return False
    store.write_metrics(steps)
    store.write_summary(steps)
    return True


def say_what_is_left_out(plan: RunConfig) -> None:
    """Log which requests lack an evaluation that this configuration asks for."""
    from cu_runner.store.records import left_out
    from cu_runner.store.run_record import read_run

    steps = read_run(plan.directory).records  # the records alone: the weights may be large
    if lacking := left_out(steps, plan.spine.eval, len(steps) - 1):
        measures = f"`cu-eval {plan.directory}` measures every request"
        logger.info("%s not evaluated (an earlier eval.every): %s", lacking, measures)


def execute(plan: RunConfig, store: RunStore, command: str, stop: StopSignals) -> None:
    """Build every part and make the steps that are missing."""
    from cu_runner.reporting.diagnosis import news
    from cu_runner.runner.parts import build_parts
    from cu_runner.runner.runner import Runner
    from cu_runner.store.cache import Cache
    from cu_runner.store.records import StepRecord
    from cu_runner.store.run_record import RunRecord, read_run
    from cu_runner.trackers.base import Ending
    from cu_runner.trackers.mirror import Mirror

    quiet_libraries()
    limit_threads(plan.spine.num_threads)
    # first: a tracker whose package is missing is told before a model is loaded
    chosen = plan.trackers if distributed.is_main() else {}
    trackers = {name: node.build() for name, node in chosen.items()}
    device = choose_device(plan.spine)
    parts = build_parts(plan, device)
    mirror = Mirror(trackers, tracked(plan, command, device))

    def remarks(steps: list[StepRecord]) -> list[str]:
        if plan.method.made.whole_sequence:  # nothing is trained: no setting to advise on
            return []
        return news(RunRecord(plan.directory, plan.resolved, steps))

    cache = Cache(Path(plan.spine.paths.outputs) / "cache", plan.code)
    try:
        Runner(plan, parts, store, cache, mirror, stop, remarks).run()
        if distributed.is_main():
            mirror.log_accuracy(read_run(plan.directory).accuracy_matrix())
    except BaseException as error:
        mirror.finish(ending_of(error))
        raise
    mirror.finish(Ending("finished"))


def tracked(plan: RunConfig, command: str, device: str) -> TrackedRun:
    """Return what trackers are told of a run."""
    from cu_runner.trackers.base import TrackedRun

    return TrackedRun(
        plan.directory,
        Path(plan.spine.paths.outputs),
        plan.resolved,
        str(plan.sequence.arguments["name"]),
        plan.method_name,
        tuple(plan.regularizers),
        command,
        {"host": platform.node(), "device": device_name(device)},
    )


def print_table(path: Path) -> None:
    """Print metrics.csv as the final table."""
    import pandas as pd

    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    names = [str(name) for name in table]
    shown = names[names.index("UA") : names.index("drift_l2") + 1]
    columns: dict[str, list[str]] = {}
    for name in shown:
        percent = name.startswith(("UA", "RA", "recovered"))
        form = ".3f" if name == "drift_l2" else ".1f" if percent else ".5g"
        columns[name] = [format(float(value), form) if value else "-" for value in table[name]]
    for name in shown:
        controls = [f"{name}_untouched", f"{name}_retained"]
        if set(controls) <= set(columns):
            beside = map(columns.pop, controls)
            columns[name] = [
                own if set(both) == {"-"} else f"{own} [{', '.join(both)}]"
                for own, *both in zip(columns[name], *beside, strict=True)
            ]
    cells = table[["request", "concept"]].assign(**columns)
    say("\n" + cells.to_string(index=False) + "\n")
    if any("[" in cell for column in columns.values() for cell in column):
        say("[untouched, retained]: the same of the untouched model, and of retained concepts\n")
