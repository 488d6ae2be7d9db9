"""The cells of cu-table: the runs that belong there, what they measured, and how rows compare."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

from cu_runner.config.compose import compose_all
from cu_runner.config.run_config import RunConfig
from cu_runner.evaluators.metrics import ENOUGH_UA
from cu_runner.reporting.code_differences import made_by_other_code
from cu_runner.reporting.estimates import Estimate, image_counts, of_shares, of_sizes
from cu_runner.reporting.intervals import of_sum
from cu_runner.reporting.table_spec import Experiment, Overrides, Table
from cu_runner.runtime.lazy import pd
from cu_runner.schema.errors import StoreError
from cu_runner.store.layout import STEP
from cu_runner.store.proof import require_true
from cu_runner.store.run_record import RunRecord, read_run


@dataclass(frozen=True)
class Cell:
    """One place of the table: the runs that belong there, one per seed.

    runs: those of them that are complete.
    """

    method: str
    column: str
    row: str
    commands: list[Overrides]
    plans: list[RunConfig]
    runs: list[RunRecord]

    def missing(self) -> list[Overrides]:
        """Return the overrides of the runs that are not complete."""
        done = {run.directory for run in self.runs}
        pairs = zip(self.commands, self.plans, strict=True)
        return [command for command, plan in pairs if plan.directory not in done]


def make_cells(
    table: Table, experiment: Experiment, seeds: list[int], more: Overrides, tree: list[str]
) -> Iterator[Cell]:
    """Compose every cell and open the directories that are there.

    Args:
        more: overrides of every run.
        tree: --config-dir=DIR, if there is one.

    Raises:
        ConfigError: a cell cannot be composed, or an error of Hydra's own; of several cells an
            ExceptionGroup.
    """
    commands = {
        place: [[*command, *seed, *more] for seed in [[f"seed={seed}"] for seed in seeds] or [[]]]
        for place, command in overrides_of_cells(table, experiment)
    }
    plans = iter(compose_all([[*tree, *command] for each in commands.values() for command in each]))
    for place, each in commands.items():
        own = list(itertools.islice(plans, len(each)))
        begun = [plan for plan in own if (plan.directory / "steps/00" / STEP).exists()]
        runs = [open_run(plan) for plan in begun]
        yield Cell(*place, each, own, [run for run in runs if run.complete])


def overrides_of_cells(
    table: Table, experiment: Experiment
) -> Iterator[tuple[tuple[str, str, str], Overrides]]:
    """Yield method, column and row of every cell, and its overrides."""
    for method, chosen in experiment.methods.items():
        for column, where in experiment.columns.items():
            for row, overrides in table.rows.items():
                own = overrides[column] if isinstance(overrides, dict) else overrides
                yield (method, column, row), [*where, *chosen, *own]


def open_run(plan: RunConfig) -> RunRecord:
    """Return the run in the directory of a plan. Raises StoreError if it was moved to there."""
    run = read_run(plan.directory)
    if run.records[0].signature != plan.signature:
        what = "holds a run of another configuration; move it back to where it was made"
        raise StoreError(f"{plan.directory}: {what}")
    require_true(run, [len(run.records) - 1])
    return run


@dataclass(frozen=True)
class Measured:
    """A metric of a cell, in percent: our mean over seeds and the published number.

    ours: NaN where the runs do not measure the metric, None where runs are missing. half: of its
    interval over seeds. images_low, images_high: its interval over the images of all seeds. low,
    high: the wider of the two, within 0 and 100.
    untouched, retained: what the same probe of recovery finds of the unlearned concepts in the
    untouched model, and of retained ones; None of a metric without these.
    comparable: UA of our cell is at least 95. tuned: the settings were searched for this method
    with these regularizers. other_code: a run of ours was made by other code than the first run of
    the table, or by several. source: of the published number. runs: their directories.
    """

    method: str
    column: str
    row: str
    metric: str
    ours: float | None
    half: float | None
    images_low: float | None
    images_high: float | None
    low: float | None
    high: float | None
    untouched: float | None
    retained: float | None
    seeds: int
    comparable: bool | None
    tuned: bool
    other_code: bool
    paper: float | None
    source: str
    runs: str


def measure(cells: list[Cell], table: Table) -> pd.DataFrame:
    """Return a row (Measured) per cell and metric."""
    shown = [run for cell in cells if not cell.missing() for run in cell.runs]
    marks = zip(shown, made_by_other_code(shown), strict=True)
    marked = {run.directory for run, differs in marks if differs}
    probes = [metric for metric in table.metrics if is_probe(metric)]
    wanted = ["UA", *table.metrics, *map(untouched_of, probes), *map(retained_of, probes)]
    rows: list[Measured] = []
    for cell in cells:
        known = {} if cell.missing() else estimates_at_end(cell.runs, wanted)
        runs = [str(run.directory) for run in cell.runs]
        other_code = any(run.directory in marked for run in cell.runs)
        rows += rows_of(cell, table, known, runs, other_code=other_code)
    return as_frame(rows)


def rows_of(
    cell: Cell, table: Table, known: dict[str, Estimate], runs: list[str], *, other_code: bool
) -> Iterator[Measured]:
    """Yield what is known of a cell, a row per metric of the table.

    Args:
        known: UA, the metrics and the controls of probes; nothing where runs are missing.
        runs: the directories of those that are there.
    """
    values = table.targets.values if table.targets else {}
    published = values.get(cell.method, {}).get(cell.column, {}).get(cell.row, {})
    for metric in table.metrics:
        number, found = published.get(metric), known.get(metric)
        probed = found and is_probe(metric)
        yield Measured(
            cell.method,
            cell.column,
            cell.row,
            metric,
            ours=found.mean if found else None,
            half=found.half if found else None,
            images_low=found.images[0] if found else None,
            images_high=found.images[1] if found else None,
            low=found.ends[0] if found else None,
            high=found.ends[1] if found else None,
            untouched=known[untouched_of(metric)].mean if probed else None,
            retained=known[retained_of(metric)].mean if probed else None,
            seeds=len(runs) if found else 0,
            comparable=known["UA"].mean >= ENOUGH_UA if found else None,
            tuned=cell.plans[0].tuned,
            other_code=other_code,
            paper=None if number is None else float(number),
            source="none" if number is None else str(published.get("source", "none")),
            runs=" ".join(runs),
        )


def as_frame(rows: list[Measured]) -> pd.DataFrame:
    """Return the rows as a table, also without any."""
    return pd.DataFrame(rows, columns=[field.name for field in fields(Measured)])


def is_probe(metric: str) -> bool:
    """Tell whether a metric is what a probe of recovery finds."""
    return metric.startswith("recovered_")


def untouched_of(metric: str) -> str:
    """Return the column of what a probe finds in the untouched model, beside one of its own."""
    return f"{metric}_untouched"


def retained_of(metric: str) -> str:
    """Return the column of what a probe finds of retained concepts."""
    return f"{metric}_retained"


def estimates_at_end(runs: list[RunRecord], metrics: list[str]) -> dict[str, Estimate]:
    """Return shares of images after the last request, over the seeds of a cell."""
    counts = image_counts(runs[0], len(runs[0].records) - 1)
    last = [run.table.iloc[-1] for run in runs]
    found = {}
    for metric in metrics:
        given = [entry.get(metric) for entry in last]
        values = [math.nan if value is None else float(value) for value in given]
        number = counts.get(metric)  # what is no share of images has no interval over them
        found[metric] = of_sizes(values) if number is None else of_shares(values, number)
    return found


@dataclass(frozen=True)
class Pair:
    """Two rows that the paper orders in a metric, and by how much each differs.

    low, high: the 95% interval of our difference, from those of both: of the seeds, but no narrower
    than that of the images, since a few seeds can agree by chance. verdict: holds | reversed |
    undecided (the interval holds 0). comparable: both of ours have UA of at least 95, or UA itself
    is compared.
    """

    method: str
    column: str
    metric: str
    higher: str
    lower: str
    paper: float
    ours: float
    low: float
    high: float
    verdict: str
    comparable: bool


def orderings(measured: pd.DataFrame, tolerance: float) -> pd.DataFrame:
    """Return every Pair of rows whose published numbers differ by more than the tolerance."""
    pairs = []
    known = measured.dropna(subset=["ours", "paper"])
    for (method, column, metric), group in known.groupby(
        ["method", "column", "metric"], sort=False
    ):
        for one, other in itertools.combinations(group.to_dict("records"), 2):
            high, low = (one, other) if one["paper"] > other["paper"] else (other, one)
            if high["paper"] - low["paper"] <= tolerance:
                continue
            terms = [
                (sign, entry["ours"], (entry["low"], entry["high"]))
                for sign, entry in ((1, high), (-1, low))
            ]
            ends = of_sum(terms)
            pair = Pair(
                method=str(method),
                column=str(column),
                metric=str(metric),
                higher=str(high["row"]),
                lower=str(low["row"]),
                paper=high["paper"] - low["paper"],
                ours=high["ours"] - low["ours"],
                low=ends[0],
                high=ends[1],
                verdict="holds" if ends[0] > 0 else "reversed" if ends[1] < 0 else "undecided",
                comparable=metric == "UA" or bool(high["comparable"] and low["comparable"]),
            )
            pairs.append(pair)
    return pd.DataFrame(pairs, columns=[field.name for field in fields(Pair)])
