"""The cells of cu-table: the runs that belong there, what they measured, and how rows compare."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, fields

from cu_runner.config.compose import compose
from cu_runner.config.run_config import RunConfig
from cu_runner.evaluators.metrics import ENOUGH_UA, with_face
from cu_runner.reporting.code_differences import made_by_other_code
from cu_runner.reporting.intervals import of_sum, over_images, over_seeds, widest
from cu_runner.reporting.table_spec import Experiment, Overrides, Table
from cu_runner.runtime.lazy import pd
from cu_runner.schema.errors import StoreError
from cu_runner.store.layout import PREDICTIONS, STEP
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
    """
    for method, chosen in experiment.methods.items():
        for column, where in experiment.columns.items():
            for row, overrides in table.rows.items():
                own = overrides[column] if isinstance(overrides, dict) else overrides
                command = [*where, *chosen, *own]
                commands = [[*command, f"seed={seed}", *more] for seed in seeds] or [
                    [*command, *more]
                ]
                plans = [compose([*tree, *each]) for each in commands]
                begun = [plan for plan in plans if (plan.directory / "steps/00" / STEP).exists()]
                runs = [open_run(plan) for plan in begun]
                yield Cell(
                    method, column, row, commands, plans, [run for run in runs if run.complete]
                )


def open_run(plan: RunConfig) -> RunRecord:
    """Return the run in the directory of a plan. Raises StoreError if it was moved to there."""
    run = read_run(plan.directory)
    if run.records[0].signature != plan.signature:
        what = "holds a run of another configuration; move it back to where it was made"
        raise StoreError(f"{plan.directory}: {what}")
    require_true(run, [len(run.records) - 1])
    return run


def num_images(run: RunRecord, metric: str) -> int:
    """Return how many images of the last request a metric rests on.

    UA, where faces are looked for, rests on those that show one; RA-I too where these alone count.
    """
    last = len(run.records) - 1
    run.require(last, PREDICTIONS)
    rows = run.predictions(last)
    if metric == "UA" or (metric == "RA_I" and "face_only" in rows):
        rows = with_face(rows)
    sequence = run.config["sequence"]
    concepts = {"UA": run.unlearned(last), "RA_I": sequence["retain"]}
    concepts["RA_C_retained"] = concepts["RA_I"]
    if metric not in concepts:
        return len(rows)
    return sum(concept in concepts[metric] for concept in rows[sequence["domain"]])


@dataclass(frozen=True)
class Measured:
    """A metric of a cell, in percent: our mean over seeds and the published number.

    ours: NaN where the runs do not measure the metric, None where runs are missing. half: of its
    interval over seeds. images_low, images_high: its interval over the images of all seeds. low,
    high: the wider of the two, within 0 and 100.
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
    seeds: int
    comparable: bool | None
    tuned: bool
    other_code: bool
    paper: float | None
    source: str
    runs: str


def measure(cells: list[Cell], table: Table) -> pd.DataFrame:
    """Return a row (Measured) per cell and metric."""
    values = table.targets.values if table.targets else {}
    shown = [run for cell in cells if not cell.missing() for run in cell.runs]
    marks = zip(shown, made_by_other_code(shown), strict=True)
    marked = {run.directory for run, differs in marks if differs}
    rows = []
    for cell in cells:
        published = values.get(cell.method, {}).get(cell.column, {}).get(cell.row, {})
        last = [run.table.iloc[-1] for run in cell.runs] if not cell.missing() else []
        for metric in table.metrics:
            number = published.get(metric)
            mean = half = comparable = None
            images: tuple[float, float] | tuple[None, None] = (None, None)
            ends: tuple[float, float] | tuple[None, None] = (None, None)
            if last:
                mean, half = over_seeds([float(entry[metric]) for entry in last])
                comparable = sum(float(entry["UA"]) for entry in last) / len(last) >= ENOUGH_UA
                images = over_images(mean, len(last) * num_images(cell.runs[0], metric))
                ends = widest(mean, half, images)
            row = Measured(
                cell.method,
                cell.column,
                cell.row,
                metric,
                ours=mean,
                half=half,
                images_low=images[0],
                images_high=images[1],
                low=ends[0],
                high=ends[1],
                seeds=len(last),
                comparable=comparable,
                tuned=cell.plans[0].tuned,
                other_code=any(run.directory in marked for run in cell.runs),
                paper=None if number is None else float(number),
                source="none" if number is None else str(published.get("source", "none")),
                runs=" ".join(str(run.directory) for run in cell.runs),
            )
            rows.append(row)
    return pd.DataFrame(rows, columns=[field.name for field in fields(Measured)])


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
            ends = of_sum([(1, high["ours"], ends_of(high)), (-1, low["ours"], ends_of(low))])
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


def ends_of(entry: Mapping[Hashable, float]) -> tuple[float, float]:
    """Return the ends of the interval of a row (Measured)."""
    half = None if pd.isna(entry["half"]) else float(entry["half"])
    return widest(float(entry["ours"]), half, (entry["images_low"], entry["images_high"]))
