"""What cu-table does with its options: compose, run what is missing, write the files, print."""

from __future__ import annotations

import argparse
import functools
import shlex
import time
from collections.abc import Iterable
from pathlib import Path

from cu_runner.cli.console import own_tree, say
from cu_runner.config.command import changes_results, key_of
from cu_runner.reporting.table_cells import Cell, make_cells, measure, orderings
from cu_runner.reporting.table_formats import (
    DOUBLE_DAGGER,
    LESS_FORGOTTEN,
    SECTION,
    FilledTable,
    as_csv,
    as_latex,
    as_markdown,
)
from cu_runner.reporting.table_spec import Overrides, Table, read_table
from cu_runner.runner.forecast import work_of
from cu_runner.runtime.lazy import pd
from cu_runner.schema.errors import ConfigError, LaunchError
from cu_runner.store.files import write_atomic
from cu_runner.store.layout import SWEEP
from cu_runner.store.run_record import RunRecord
from cu_runner.sweeps.make_runs import LAST, cu_runs, diverged, submit
from cu_runner.sweeps.status import read_sweep


def produce(arguments: argparse.Namespace) -> None:
    """Compose, run what is missing if asked to, write the files, print the table."""
    name, table = read_table(arguments.table)
    chosen = arguments.experiment or next(iter(table.experiments))
    if chosen not in table.experiments:
        raise ConfigError(
            f"--experiment {chosen}: not in table {name}; allowed: {', '.join(table.experiments)}"
        )
    experiment = table.experiments[chosen]
    refuse_places(table, arguments.overrides)
    if arguments.seeds and any(override.startswith("seed=") for override in arguments.overrides):
        raise ConfigError("--seeds and seed=: both set the seed; give one of them")
    tree = own_tree(arguments)
    read = functools.partial(
        make_cells, table, experiment, arguments.seeds, arguments.overrides, tree
    )
    cells = list(read())
    if arguments.run and any(cell.missing() for cell in cells):
        run_missing(cells, name, arguments)
        cells = list(read())
    measured = measure(cells, table)
    filled = FilledTable(
        name,
        table.title,
        experiment.model,
        paper_model=table.targets.model if table.targets else None,
        measured=measured,
        footnotes=settings_of_all(arguments.overrides)
        + footnotes(table, measured, arguments.seeds),
        ordered=orderings(measured, table.targets.tolerance) if table.targets else None,
        missing=[
            shlex.join(["cu-run", *tree, *command]) for cell in cells for command in cell.missing()
        ],
    )
    text, stem = as_markdown(filled), f"{name}-{chosen}"
    files = {f"{stem}.md": text, f"{stem}.csv": as_csv(measured), f"{stem}.tex": as_latex(filled)}
    if filled.ordered is not None:
        files[f"{stem}-orderings.csv"] = as_csv(filled.ordered)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        write_atomic(arguments.output / file, content.encode())
    say(f"{text}\ntable: {arguments.output / stem}.md")


def refuse_places(table: Table, overrides: Overrides) -> None:
    """Refuse with ConfigError an override that a row, a column or the model sets."""
    places = {"model", "sequence", "method", "reg", "setting", "experiment"}
    places |= {key_of(override) for own in table.overrides() for override in own}
    for override in overrides:
        if key_of(override) == "dry_run":
            said = "a table has none; without --run it runs nothing and lists what is missing"
            raise ConfigError(f"dry_run: {said}")
        if key_of(override) in places:
            said = "rows, columns and model are the table's own"
            raise ConfigError(f"{override}: {said}; leave it out, or write a table of yours")


def settings_of_all(overrides: Overrides) -> list[str]:
    """Return a note with the user's overrides of every run, but for those that change no result."""
    shown = list(filter(changes_results, overrides))
    return [f"Every run with {shlex.join(shown)}."] if shown else []


def footnotes(table: Table, measured: pd.DataFrame, seeds: list[int]) -> list[str]:
    """Return what a reader must know of the numbers."""
    notes = ["One seed: there is no interval over seeds."]
    if len(seeds) > 1:
        notes = [
            f"{len(seeds)} seeds: mean and 95% interval, over them (Student's t) or over their "
            "images (Wilson's) where that is wider, within 0 and 100."
        ]
    if not measured["comparable"].dropna().all():
        notes.append(LESS_FORGOTTEN)
    if not measured.loc[measured["ours"].notna(), "tuned"].all():
        what = "The settings of this method with these regularizers were not searched"
        notes.append(f"{DOUBLE_DAGGER} {what} (conf/tuned, conf/training).")
    if measured["other_code"].any():
        what = "Made by other code than the first run of this table, or by several"
        remedy = "fresh=true makes such a run anew"
        notes.append(f"{SECTION} {what} (code in step.json): {remedy}.")
    if measured[["untouched", "retained"]].notna().any(axis=None):
        notes.append(
            "[untouched, retained]: what the same probe finds of the unlearned concepts in the "
            "untouched model, and of retained ones; a recovered accuracy says nothing without both."
        )
    for label, overrides in table.rows.items():
        if isinstance(overrides, dict):
            meant = (f"{' '.join(words)} ({column})" for column, words in overrides.items())
            notes.append(f"{label}: {', '.join(meant)}.")
    if table.targets:
        notes += [
            f"Published, {source}: {meaning}." for source, meaning in table.targets.sources.items()
        ]
        notes.append(
            "Ordering check: pairs of rows that differ by more than "
            f"{table.targets.tolerance:g} points in the paper; undecided: the 95% interval of our "
            "difference holds 0 (Newcombe's, from Wilson's over images, or over seeds where that "
            "is wider)."
        )
    return notes + table.notes


def run_missing(cells: list[Cell], name: str, arguments: argparse.Namespace) -> None:
    """Make the runs, with a line for each that ends; one whose weights diverge stays missing.

    Raises:
        LaunchError: a run failed, or not every job has ended.
    """
    pairs = [pair for cell in cells for pair in zip(cell.commands, cell.plans, strict=True)]
    plans = {tuple(command): plan for command, plan in pairs}
    steps = {key: sum(work.train_steps for work in work_of(plan)) for key, plan in plans.items()}
    commands = [command for cell in cells for command in cell.missing()]
    commands.sort(key=lambda command: -steps[tuple(command)])  # the longest must not be last
    words = [[*own_tree(arguments), *command] for command in commands]
    if not arguments.launcher:
        made = (
            (command, said(run))
            for command, run in zip(
                commands,
                cu_runs(words, arguments.jobs, evaluated=LAST),  # a table has no other
                strict=True,
            )
        )
        print_ended(made, len(commands))
        return
    outputs = Path(plans[tuple(commands[0])].spine.paths.outputs)
    folder = (outputs / "sweeps" / f"{name}_{time.strftime('%Y-%m-%d_%H-%M-%S')}").absolute()
    jobs = [command[: len(command) - len(arguments.overrides)] for command in commands]
    common = [*own_tree(arguments), *arguments.overrides]
    failure = submit(jobs, common, arguments.launcher, folder)
    if not (folder / SWEEP).exists():
        raise LaunchError(failure)
    ended = read_sweep(folder)
    became = [f"{job.state}  {job.why}" for job in ended]
    print_ended(zip(commands, became, strict=True), len(commands))
    if any(job.state != "done" and not diverged(job.why) for job in ended):
        raise LaunchError(failure or f"not every job has ended; see `cu-sweep status {folder}`")


def said(run: RunRecord | str) -> str:
    """Return what became of a run: its metrics, or the line with which it diverged."""
    if isinstance(run, str):
        return run
    return "UA {UA:.1f}  RA-I {RA_I:.1f}  RA-C {RA_C:.1f}".format(**run.table.iloc[-1])


def print_ended(runs: Iterable[tuple[Overrides, str]], number: int) -> None:
    """Print a line for each run that has ended, and what became of it."""
    for count, (command, text) in enumerate(runs, start=1):
        say(f"{count:>3}/{number}  {' '.join(command):<70}  {text}".rstrip())
