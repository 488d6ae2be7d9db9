"""cu-table: a table of a paper from run directories, beside the published numbers, and the command of every run that is missing.

A table is a YAML file of scripts/tables: rows and columns are lists of overrides, a cell is the run that they compose to. Its
signature names one directory; that one is opened and no other, so that a number can never come from another configuration.
Numbers are percent.

Exit status: 0 done, 1 a run failed, 2 the table or the configuration of a cell is wrong, 130 interrupted.
"""

import argparse
import functools
import shlex
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from cu_runner.config import RunConfig, compose
from cu_runner.evaluation import ENOUGH_UA
from cu_runner.forecast import work_of
from cu_runner.help import config_dir
from cu_runner.intervals import of_sum, over_images, over_seeds
from cu_runner.launch import LaunchError, cu_runs, diverged, submit
from cu_runner.nodes import ConfigError
from cu_runner.process import Parser, one_line_failures, whole_number
from cu_runner.runs import RunRecord, read_run
from cu_runner.signature import NOT_SCIENTIFIC
from cu_runner.store import PREDICTIONS, StoreError, write_atomic
from cu_runner.sweeps import SWEEP, read_sweep
from cu_runner.table_files import Experiment, Overrides, Table, read_table
from cu_runner.table_formats import as_csv, as_latex, as_markdown


@dataclass(frozen=True)
class Cell:
    """One place of the table: the runs that belong there, one per seed, and those of them that are complete."""

    method: str
    column: str
    row: str
    commands: list[Overrides]
    plans: list[RunConfig]
    runs: list[RunRecord]

    def missing(self) -> list[Overrides]:
        done = {run.directory for run in self.runs}
        return [command for command, plan in zip(self.commands, self.plans, strict=True) if plan.directory not in done]


def make_cells(table: Table, experiment: Experiment, seeds: list[int], more: Overrides) -> Iterator[Cell]:
    """Compose every cell and open the directories that are there. Raises ConfigError, StoreError."""
    for method, chosen in experiment.methods.items():
        for column, where in experiment.columns.items():
            for row, overrides in table.rows.items():
                own = overrides[column] if isinstance(overrides, dict) else overrides
                command = [*where, *chosen, *own]
                commands = [[*command, f"seed={seed}", *more] for seed in seeds] or [[*command, *more]]
                plans = [compose(each) for each in commands]
                runs = [open_run(plan) for plan in plans if (plan.directory / "steps" / "00" / "step.json").exists()]
                yield Cell(method, column, row, commands, plans, [run for run in runs if run.complete])


def open_run(plan: RunConfig) -> RunRecord:
    """The run in the directory of a plan. Raises StoreError when it is another one, moved or renamed to there."""
    run = read_run(plan.directory)
    if run.records[0]["signature"] != plan.signature:
        raise StoreError(f"{plan.directory}: holds a run of another configuration; move it back to where it was made")
    return run


# -------------------------------------------------------------------------------------------------------- statistics
def num_images(run: RunRecord, metric: str) -> int:
    """How many images of the last request a metric rests on; UA, where faces are looked for, on those that show one."""
    last = len(run.records) - 1
    run.require(last, PREDICTIONS)
    rows = run.predictions(last)
    if metric == "UA" and "face" in rows:
        rows = rows[rows["face"] == 1]
    sequence = run.config["sequence"]
    concepts = {"UA": run.unlearned(last), "RA_I": sequence["retain"], "RA_C_retained": sequence["retain"]}
    return int(rows[sequence["domain"]].isin(concepts[metric]).sum()) if metric in concepts else len(rows)


def measure(cells: list[Cell], table: Table) -> pd.DataFrame:
    """One row per cell and metric: our mean and half interval over seeds, the published number and its source.

    ours is NaN where the runs do not measure the metric. half: of its interval over seeds. images_low, images_high: its interval
    over the images of all seeds. comparable: UA of our cell is at least 95. tuned: the settings were searched for this method with
    these regularizers.
    """
    rows = []
    for cell in cells:
        published = {}
        if table.targets is not None:
            published = table.targets.values.get(cell.method, {}).get(cell.column, {}).get(cell.row, {})
        last = [run.table.iloc[-1] for run in cell.runs] if not cell.missing() else []
        for metric in table.metrics:
            row = {"method": cell.method, "column": cell.column, "row": cell.row, "metric": metric, "seeds": len(last)}
            row["tuned"] = cell.plans[0].tuned
            row["runs"] = " ".join(str(run.directory) for run in cell.runs)
            row |= {"paper": published.get(metric), "source": published.get("source", "none") if metric in published else "none"}
            if last:
                mean, half = over_seeds([float(entry[metric]) for entry in last])
                comparable = sum(float(entry["UA"]) for entry in last) / len(last) >= ENOUGH_UA
                row |= {"ours": mean, "half": half, "comparable": comparable}
                images = len(last) * num_images(cell.runs[0], metric)
                row["images_low"], row["images_high"] = over_images(mean, images)
            rows.append(row)
    columns = ["method", "column", "row", "metric", "ours", "half", "images_low", "images_high", "seeds", "comparable", "tuned"]
    return pd.DataFrame(rows, columns=[*columns, "paper", "source", "runs"])


def orderings(measured: pd.DataFrame, tolerance: float) -> pd.DataFrame:
    """Every pair of rows that the paper orders in a metric, and whether ours are in the same order.

    low, high: the 95% interval of our difference, from those of both: of the seeds, but no narrower than that of the images, since
    a few seeds can agree by chance. verdict: holds | reversed | undecided (the interval holds 0). comparable: both of ours have UA
    of at least 95, or UA itself is compared.
    """
    pairs = []
    known = measured.dropna(subset=["ours", "paper"])
    for (method, column, metric), group in known.groupby(["method", "column", "metric"], sort=False):
        entries = list(group.itertuples())
        for i, first in enumerate(entries):
            for second in entries[i + 1 :]:
                high, low = (first, second) if first.paper > second.paper else (second, first)
                if high.paper - low.paper <= tolerance:
                    continue
                ends = of_sum([(1, high.ours, widest(high)), (-1, low.ours, widest(low))])
                verdict = "holds" if ends[0] > 0 else "reversed" if ends[1] < 0 else "undecided"
                pair = {"method": method, "column": column, "metric": metric, "higher": high.row, "lower": low.row}
                pair |= {"paper": high.paper - low.paper, "ours": high.ours - low.ours, "low": ends[0], "high": ends[1]}
                comparable = bool(metric == "UA" or (high.comparable and low.comparable))
                pairs.append(pair | {"verdict": verdict, "comparable": comparable})
    columns = ["method", "column", "metric", "higher", "lower", "paper", "ours", "low", "high", "verdict", "comparable"]
    return pd.DataFrame(pairs, columns=columns)


def widest(entry: tuple) -> tuple[float, float]:
    """Both ends of a measured row's interval: over images, widened to that over seeds where that reaches further."""
    half = 0.0 if pd.isna(entry.half) else entry.half
    return min(entry.images_low, entry.ours - half), max(entry.images_high, entry.ours + half)


# ----------------------------------------------------------------------------------------------------------- command
def main() -> None:
    """Entry point of `cu-table`."""
    launchers = sorted(path.stem for path in (config_dir() / "hydra/launcher").glob("*.yaml"))
    parser = Parser(prog="cu-table", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("table", help="name of a file of scripts/tables, or path of your own")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE for every run, as for cu-run: model.path=...")
    parser.add_argument("--experiment", help="which model and sequences, from the table's own list; default: the first")
    parser.add_argument("--seeds", type=seed_list, default=[], help="0,1,2: several seeds become mean and 95%% interval")
    parser.add_argument("--run", action="store_true", help="make the runs that are missing")
    parser.add_argument("--jobs", type=whole_number, help="runs side by side; default: one per core, or one on a GPU")
    parser.add_argument("--launcher", choices=launchers, help="make them on a cluster, by this file of conf/hydra/launcher")
    parser.add_argument("--output", type=Path, default=Path("outputs/tables"), help="where the files go")
    arguments = parser.parse_intermixed_args()
    with one_line_failures("cu-table"):
        produce(arguments)


def seed_list(text: str) -> list[int]:
    try:
        seeds = [int(entry) for entry in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers; give 0,1,2") from None
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r} names a seed twice, which is one run; give each once")
    return seeds


def produce(arguments: argparse.Namespace) -> None:
    """Compose, run what is missing if asked to, write the files, print the table."""
    name, table = read_table(arguments.table)
    chosen = arguments.experiment or next(iter(table.experiments))
    if chosen not in table.experiments:
        raise ConfigError(f"--experiment {chosen}: not in table {name}; allowed: {', '.join(table.experiments)}")
    experiment = table.experiments[chosen]
    refuse_places(table, arguments.overrides)
    if arguments.seeds and any(override.startswith("seed=") for override in arguments.overrides):
        raise ConfigError("--seeds and seed=: both set the seed; give one of them")
    read = functools.partial(make_cells, table, experiment, arguments.seeds, arguments.overrides)
    cells = list(read())
    if arguments.run and any(cell.missing() for cell in cells):
        run_missing(cells, name, arguments)
        cells = list(read())
    measured = measure(cells, table)
    ordered = orderings(measured, table.targets.tolerance) if table.targets else None
    missing = [shlex.join(["cu-run", *command]) for cell in cells for command in cell.missing()]
    paper_model = table.targets.model if table.targets else None
    notes = [*settings_of_all(arguments.overrides), *footnotes(table, measured, arguments.seeds)]
    text = as_markdown(name, table.title, experiment.model, paper_model, table.metrics, measured, notes, ordered, missing)
    arguments.output.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-{chosen}"
    write_atomic(arguments.output / f"{stem}.md", text.encode())
    write_atomic(arguments.output / f"{stem}.csv", as_csv(measured).encode())
    write_atomic(arguments.output / f"{stem}.tex", as_latex(experiment.model, paper_model, table.metrics, measured, notes).encode())
    if ordered is not None:
        write_atomic(arguments.output / f"{stem}-orderings.csv", as_csv(ordered).encode())
    print(f"{text}\ntable: {arguments.output / stem}.md")


def refuse_places(table: Table, overrides: Overrides) -> None:
    """Raises ConfigError for an override that would make a cell another one than its row, its column and its model say."""
    places = {"model", "sequence", "method", "reg", "setting", "experiment"}
    places |= {key_of(override) for own in table.overrides() for override in own}
    for override in overrides:
        if key_of(override) == "dry_run":
            raise ConfigError("dry_run: a table has none; without --run it runs nothing and lists what is missing")
        if key_of(override) in places:
            raise ConfigError(f"{override}: rows, columns and model are the table's own; leave it out, or write a table of yours")


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def settings_of_all(overrides: Overrides) -> list[str]:
    """A note with the overrides that the user gave every run, but for those that change no result."""
    shown = [each for each in overrides if not f"{key_of(each)}.".startswith(tuple(f"{name}." for name in NOT_SCIENTIFIC))]
    return [f"Every run with {shlex.join(shown)}."] if shown else []


def footnotes(table: Table, measured: pd.DataFrame, seeds: list[int]) -> list[str]:
    """What a reader must know of the numbers."""
    count = max(len(seeds), 1)
    notes = [
        f"{count} seeds: mean and 95% interval over them (Student's t)."
        if count > 1
        else "One seed: there is no interval over seeds."
    ]
    if not measured["comparable"].dropna().all():
        notes.append(f"\N{DAGGER} UA is under {ENOUGH_UA:.0f}: less was forgotten, so the retention is not comparable.")
    if not measured.loc[measured["ours"].notna(), "tuned"].all():
        notes.append("\N{DOUBLE DAGGER} The settings of this method with these regularizers were not searched (conf/tuned).")
    if table.targets:
        notes += [f"Published, {source}: {meaning}." for source, meaning in table.targets.sources.items()]
        notes.append(
            f"Ordering check: pairs of rows that differ by more than {table.targets.tolerance:g} points in the paper; undecided: "
            "the 95% interval of our difference holds 0 (Newcombe's, from Wilson's over images, or over seeds where that is wider)."
        )
    return notes + table.notes


def run_missing(cells: list[Cell], name: str, arguments: argparse.Namespace) -> None:
    """Make the runs, with a line for each that ends. Raises LaunchError; a run whose weights diverge stays missing."""
    plans = {tuple(command): plan for cell in cells for command, plan in zip(cell.commands, cell.plans, strict=True)}
    commands = [command for cell in cells for command in cell.missing()]
    commands.sort(
        key=lambda command: -sum(work.train_steps for work in work_of(plans[tuple(command)]))
    )  # the longest must not be last
    if not arguments.launcher:
        made = ((command, said(run)) for command, run in zip(commands, cu_runs(commands, arguments.jobs), strict=True))
        print_ended(made, len(commands))
        return
    outputs = Path(plans[tuple(commands[0])].spine.paths.outputs)
    folder = (outputs / "sweeps" / f"{name}_{time.strftime('%Y-%m-%d_%H-%M-%S')}").absolute()
    jobs = [command[: len(command) - len(arguments.overrides)] for command in commands]
    failure = submit(jobs, arguments.overrides, arguments.launcher, folder)
    if not (folder / SWEEP).exists():
        raise LaunchError(failure)
    ended = read_sweep(folder)
    print_ended(((command, f"{job.state}  {job.why}") for command, job in zip(commands, ended, strict=True)), len(commands))
    if any(job.state != "done" and not diverged(job.why) for job in ended):
        raise LaunchError(failure or f"not every job has ended; see `cu-sweep status {folder}`")


def said(run: RunRecord | str) -> str:
    return run if isinstance(run, str) else "UA {UA:.1f}  RA-I {RA_I:.1f}  RA-C {RA_C:.1f}".format(**run.table.iloc[-1])


def print_ended(runs: Iterable[tuple[Overrides, str]], number: int) -> None:
    """A line for each run that has ended, and what became of it."""
    for count, (command, text) in enumerate(runs, start=1):
        print(f"{count:>3}/{number}  {' '.join(command):<70}  {text}".rstrip(), flush=True)
