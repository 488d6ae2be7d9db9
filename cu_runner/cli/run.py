"""cu-run: compose -> build -> run.

The only place that instantiates, and the only one that talks to the terminal.

Exit status: 0 done, 1 the run failed, 2 the configuration cannot be run, 130 interrupted, 128 + its
number for another signal.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cu_runner import __version__
from cu_runner.cli.console import logging_to, quiet_libraries
from cu_runner.cli.failures import one_line_failures
from cu_runner.cli.help import help_text
from cu_runner.runtime.devices import choose_device
from cu_runner.runtime.signals import StopSignals
from cu_runner.store.run_directory import RunStore
from cu_runner.sweeps.job_note import note_job

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from cu_runner.config.run_config import RunConfig

logger = logging.getLogger("cu_runner.cli")  # __name__ is another under `python -m`


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
        from cu_runner.config.permissions import check_command
        from cu_runner.runtime.paths import config_dir

        check_command(arguments)

        def job(config: DictConfig) -> None:
            # its failure is caught here, so that it does not end a sweep
            with one_line_failures("cu-run", statuses, lambda line: note_job(error=line)):
                run_job(config)

        hydra.main(config_path=str(config_dir()), config_name="config", version_base="1.3")(job)()
    sys.exit(max(statuses, default=0))


def run_job(config: DictConfig) -> None:
    """Check a composed job, build its parts, run it, print its table."""
    from hydra.core.hydra_config import HydraConfig

    from cu_runner.config.command import recorded_command, words_of
    from cu_runner.config.compose import parse
    from cu_runner.runner.forecast import forecast
    from cu_runner.runtime import distributed
    from cu_runner.store.run_directory import RunStore
    from cu_runner.store.signature import signature

    plan = parse(config)
    outputs = Path(plan.spine.paths.outputs)
    distributed.start(plan.spine.device)
    if plan.spine.dry_run:
        print(forecast(plan))
        return
    note_job(run=str(plan.directory.absolute()))
    command = recorded_command("cu-run", words_of(HydraConfig.get()))
    with (
        StopSignals() as stop,
        RunStore(
            plan.directory,
            plan.resolved,
            signature,
            command=command,
            code=plan.code,
            allow_other_code=plan.spine.allow_other_code,
        ) as store,
        logging_to(plan.directory / "run.log")
        if distributed.is_main()
        else contextlib.nullcontext(),
    ):
        if is_complete(plan.directory, store):
            logger.info("complete already; nothing to do")
        else:
            execute(plan, store, outputs, stop)
        if distributed.is_main():
            print_table(plan.directory / "metrics.csv")
    if distributed.is_main():
        print(f"run: {plan.directory}", flush=True)


def is_complete(directory: Path, store: RunStore) -> bool:
    """Return whether summary.json stands for the last of the finished, undamaged steps.

    Raises:
        StoreError: a step is damaged.
    """
    steps = store.finished()
    try:
        summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # missing or damaged: it is derived, the runner writes it again
        return False
    complete = (
        bool(steps) and isinstance(summary, dict) and summary.get("sha256") == steps[-1].sha256
    )
    if complete:  # what is derived is made anew: it may have been damaged or edited
        store.write_metrics([step.row for step in steps])
        store.write_summary(steps)
    return complete


def execute(plan: RunConfig, store: RunStore, outputs: Path, stop: StopSignals) -> None:
    """Build every part and make the steps that are missing."""
    from cu_runner.concepts.requests import plan_requests
    from cu_runner.runner.runner import Runner, prepare
    from cu_runner.runner.tracking import Tracker
    from cu_runner.runtime import distributed
    from cu_runner.store.cache import Cache
    from cu_runner.store.run_record import read_run

    quiet_libraries()
    spine = plan.spine
    device = choose_device(spine)
    sequence = plan.sequence.build()
    requests = plan_requests(sequence, plan.setting.plan, plan.setting.last_only)
    method = plan.method.build()
    regularizers = {name: node.build() for name, node in plan.regularizers.items()}
    logger.info(
        "%s: %d requests, method %s, reg %s",
        sequence.name,
        len(requests),
        plan.method_name,
        "+".join(regularizers) or "none",
    )
    if distributed.size() > 1:
        logger.info("%d processes", distributed.size())
    if not plan.tuned:
        logger.info(
            "no tuned settings for these regularizers in this order (conf/tuned): "
            "those of their own files hold"
        )
    model = plan.model.build(device=device)
    prepare(model, spine.speed, spine.train)
    evaluator = plan.evaluator.build(device=device)
    retention = plan.retention.build(device=device) if plan.retention else None
    tracker = Tracker(
        spine.wandb if distributed.is_main() else replace(spine.wandb, mode="disabled"),
        plan.directory.name,
        outputs,
        plan.resolved,
        group=f"{sequence.name}-{plan.method_name}",
        job_type="+".join(regularizers) or "none",
    )
    runner = Runner(
        model,
        evaluator,
        sequence,
        method,
        regularizers,
        requests,
        plan.setting,
        store,
        Cache(outputs / "cache", plan.code),
        tracker,
        spine.train,
        spine.anchors,
        spine.eval,
        spine.seed,
        plan.training_key,
        retention,
        stop,
    )
    try:
        runner.run()
        if distributed.is_main():
            tracker.log_accuracy(read_run(plan.directory).accuracy_matrix())
    finally:
        tracker.finish()


def print_table(path: Path) -> None:
    """Print metrics.csv as the final table."""
    import pandas as pd

    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    names = list(table)
    cells = table[
        ["request", "concept", *names[names.index("UA") : names.index("drift_l2") + 1]]
    ].copy()
    for name in cells.columns[2:]:
        form = ".3f" if name == "drift_l2" else ".1f" if name.startswith(("UA", "RA")) else ".5g"
        cells[name] = [format(float(value), form) if value else "-" for value in table[name]]
    print("\n" + cells.to_string(index=False) + "\n")
