"""cu-eval: measure a run's stored weights again; nothing is trained.

With another evaluator, sampler, seeds or device:

    cu-eval outputs/runs/shapecanvas_style/conabl-none-sequential-s0-ec91c30b \\
            'sequence.seeds=[1,2,3]'

The result is a directory of the same form under <run>/evaluations, with predictions, grids and
metrics of every step but no weights: reports and tables read it like a run. It resumes, and what is
complete is not made again.

A checkpoint that another tool unlearned, as if one request had made it, for all targets:

    cu-eval --model DIR_OR_FILE sequence=shapecanvas_style recovery=thorough

That is cu-run method=imported method.checkpoint=DIR_OR_FILE: a run directory in outputs/runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cu_runner.cli.console import (
    Parser,
    add_config_dir,
    own_tree,
    quiet_libraries,
    say,
    without_reader,
)
from cu_runner.cli.failures import one_line_failures
from cu_runner.runtime import progress
from cu_runner.store.directories import choose_directory, first_name
from cu_runner.store.layout import EVALUATIONS, finished_steps
from cu_runner.store.run_directory import RunStore
from cu_runner.store.run_record import read_run
from cu_runner.store.signature import signature

if TYPE_CHECKING:
    from cu_runner.store.records import Row

SHOWN = ("UA", "RA_I", "RA_C", "RA_C_retained")


@without_reader
def main() -> None:
    """Call `cu-eval` with its command line."""
    parser = Parser(prog="cu-eval", description=__doc__)
    parser.add_argument(
        "run", nargs="?", help="a run directory, as the last line of cu-run names it"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        help="evaluator=NAME, retention=NAME, 'recovery=[NAME,NAME]', eval.steps=50, "
        "'sequence.seeds=[1,2]', device=...; allow_modules=... of a run of your own code; with "
        "--model all that cu-run takes",
    )
    parser.add_argument(
        "--model",
        metavar="PLACE",
        help="in place of a run: a diffusers directory, a single file, a LoRA, or a file of "
        "weights or changes by name, unlearned from model=... by another tool",
    )
    add_config_dir(parser)
    arguments = parser.parse_intermixed_args()
    words = [*([arguments.run] if arguments.run else []), *arguments.overrides]
    if not (arguments.run or arguments.model):
        parser.error("give a run directory, or --model PLACE and sequence=...")
    if arguments.model:
        if runs := [word for word in words if "=" not in word]:
            parser.error(f"{runs[0]}: --model stands in place of a run; beside it stand overrides")
        measure_import(arguments.model, words, own_tree(arguments))
        return
    with one_line_failures("cu-eval"), progress.on_stderr():
        run = read_run(Path(arguments.run).resolve())
        if run.is_evaluation:
            raise ValueError(
                f"{run.directory}: is an evaluation, without weights; "
                f"give its run, {run.directory.parent.parent}"
            )

        from cu_runner.config.command import recorded_command
        from cu_runner.config.permissions import allowed_modules, refuse_unasked_pickles
        from cu_runner.config.revise import revise
        from cu_runner.config.run_config import check_run
        from cu_runner.runner.probing import describe_recovery
        from cu_runner.runner.remeasure import load, measure_again
        from cu_runner.store.proof import require_true
        from cu_runner.store.records import left_out

        require_true(run)
        allowed = allowed_modules(arguments.overrides)
        revised = revise(run.config, arguments.overrides, arguments.config_dir)
        refuse_unasked_pickles(revised, arguments.overrides)
        plan = check_run(revised, run.method, allowed=allowed)
        plan.spine.eval.require_requests(run.num_requests)
        for note in plan.notes:
            say(f"note: {note}")
        named = f"{first_name(run.directory.name)[:-8]}{plan.signature[:8]}"
        directory = choose_directory(
            run.directory / EVALUATIONS / named, plan.code, plan.spine.fresh
        )
        complete = len(finished_steps(directory)) == len(run.records)
        if not complete:
            quiet_libraries()
        # loaded first: what cannot be loaded leaves no directory behind
        instruments = None if complete else load(run, plan)
        command = recorded_command("cu-eval", [*own_tree(arguments), *words])
        with RunStore(
            directory,
            plan.resolved,
            signature,
            command=command,
            code=plan.code,
            allow_other_code=plan.spine.allow_other_code,
        ) as store:
            for step in measure_again(run, plan, store, instruments):
                say(compare(run.records[step.index].row, step.row))
                if recovered := describe_recovery(step.row, plan.probes):
                    say(f"     {recovered}")
            steps = store.finished()
            store.write_metrics(steps)
        if lacking := left_out(steps, plan.spine.eval, run.num_requests):
            say(f"{lacking} not measured here; with fresh=true all are, anew")
        if plan.probes and not run.complete:
            say("the run is not finished: probes with every=last wait for its last request")
        say(f"evaluation: {directory}")


def measure_import(place: str, words: list[str], tree: list[str]) -> None:
    """Measure a checkpoint that another tool unlearned, as the run of method=imported.

    Args:
        words: overrides, as to cu-run.
        tree: --config-dir=DIR, if there is one.
    """
    with one_line_failures("cu-eval"):
        from cu_runner.cli.run import run_plan
        from cu_runner.config.command import key_of, recorded_command
        from cu_runner.config.compose import compose
        from cu_runner.config.permissions import refuse_repeated_keys
        from cu_runner.schema.errors import ConfigError

        for word in words:
            if key_of(word) in ("method", "method.checkpoint", "reg", "setting"):
                raise ConfigError(
                    f"{word}: --model measures a checkpoint as one request for all targets of the "
                    "sequence; leave it out"
                )
        quoted = place.replace('"', '\\"')
        own = ["method=imported", f'method.checkpoint="{quoted}"']
        refuse_repeated_keys([*own, *words], sweep=False)
        plan = compose([*tree, *own, *words])
        command = recorded_command("cu-eval", [*tree, f"--model={place}", *words])
        run_plan(plan, command, "evaluation")


def compare(before: Row, after: Row) -> str:
    """Return a line: each metric now, and in brackets as the run itself measured it."""
    parts = [f"{after.request:>3}  {after.concept or 'untouched model':<18}"]
    for name in SHOWN:
        measured = (after.metrics[name], before.metrics[name])
        now, then = ("-" if value is None else f"{value:.1f}" for value in measured)
        parts.append(f"{name.replace('_', '-', 1).replace('_', ' ')} {now:>5} ({then})")
    return "  ".join(parts)
