"""cu-table: a table of a paper from run directories, beside the published numbers, and the command of every run that is missing.

A table is a YAML file of scripts/tables: rows and columns are lists of overrides, a cell is the run that they compose to. Its
signature names one directory; that one is opened and no other, so that a number can never come from another configuration.
Numbers are percent.

Exit status: 0 done, 1 a run failed, 2 the table or the configuration of a cell is wrong, 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cu_runner.config.compose import compose
from cu_runner.config.run_config import RunConfig
from cu_runner.evaluators.metrics import ENOUGH_UA
from cu_runner.reporting.intervals import of_sum, over_images, over_seeds
from cu_runner.reporting.table_spec import Experiment, Overrides, Table
from cu_runner.runtime.lazy import pd
from cu_runner.schema.errors import StoreError
from cu_runner.store.layout import PREDICTIONS
from cu_runner.store.run_record import RunRecord, read_run


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
        return [
            command
            for command, plan in zip(self.commands, self.plans, strict=True)
            if plan.directory not in done
        ]


def make_cells(
    table: Table, experiment: Experiment, seeds: list[int], more: Overrides
) -> Iterator[Cell]:
    """Compose every cell and open the directories that are there. Raises ConfigError, StoreError."""
    for method, chosen in experiment.methods.items():
        for column, where in experiment.columns.items():
            for row, overrides in table.rows.items():
                own = overrides[column] if isinstance(overrides, dict) else overrides
                command = [*where, *chosen, *own]
                commands = [[*command, f"seed={seed}", *more] for seed in seeds] or [
                    [*command, *more]
                ]
                plans = [compose(each) for each in commands]
                runs = [
                    open_run(plan)
                    for plan in plans
                    if (plan.directory / "steps" / "00" / "step.json").exists()
                ]
                yield Cell(
                    method, column, row, commands, plans, [run for run in runs if run.complete]
                )


def open_run(plan: RunConfig) -> RunRecord:
    """The run in the directory of a plan. Raises StoreError when it is another one, moved or renamed to there."""
    run = read_run(plan.directory)
    if run.records[0]["signature"] != plan.signature:
        raise StoreError(
            f"{plan.directory}: holds a run of another configuration; move it back to where it was made"
        )
    return run


def num_images(run: RunRecord, metric: str) -> int:
    """How many images of the last request a metric rests on; UA, where faces are looked for, on those that show one."""
    last = len(run.records) - 1
    run.require(last, PREDICTIONS)
    rows = run.predictions(last)
    if metric == "UA" and "face" in rows:
        rows = rows[rows["face"] == 1]
    sequence = run.config["sequence"]
    concepts = {
        "UA": run.unlearned(last),
        "RA_I": sequence["retain"],
        "RA_C_retained": sequence["retain"],
    }
    return (
        int(rows[sequence["domain"]].isin(concepts[metric]).sum())
        if metric in concepts
        else len(rows)
    )


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
            published = (
                table.targets.values.get(cell.method, {}).get(cell.column, {}).get(cell.row, {})
            )
        last = [run.table.iloc[-1] for run in cell.runs] if not cell.missing() else []
        for metric in table.metrics:
            row = {
                "method": cell.method,
                "column": cell.column,
                "row": cell.row,
                "metric": metric,
                "seeds": len(last),
            }
            row["tuned"] = cell.plans[0].tuned
            row["runs"] = " ".join(str(run.directory) for run in cell.runs)
            row |= {
                "paper": published.get(metric),
                "source": published.get("source", "none") if metric in published else "none",
            }
            if last:
                mean, half = over_seeds([float(entry[metric]) for entry in last])
                comparable = sum(float(entry["UA"]) for entry in last) / len(last) >= ENOUGH_UA
                row |= {"ours": mean, "half": half, "comparable": comparable}
                images = len(last) * num_images(cell.runs[0], metric)
                row["images_low"], row["images_high"] = over_images(mean, images)
            rows.append(row)
    columns = [
        "method",
        "column",
        "row",
        "metric",
        "ours",
        "half",
        "images_low",
        "images_high",
        "seeds",
        "comparable",
        "tuned",
    ]
    return pd.DataFrame(rows, columns=[*columns, "paper", "source", "runs"])


def orderings(measured: pd.DataFrame, tolerance: float) -> pd.DataFrame:
    """Every pair of rows that the paper orders in a metric, and whether ours are in the same order.

    low, high: the 95% interval of our difference, from those of both: of the seeds, but no narrower than that of the images, since
    a few seeds can agree by chance. verdict: holds | reversed | undecided (the interval holds 0). comparable: both of ours have UA
    of at least 95, or UA itself is compared.
    """
    pairs = []
    known = measured.dropna(subset=["ours", "paper"])
    for (method, column, metric), group in known.groupby(
        ["method", "column", "metric"], sort=False
    ):
        entries = list(group.itertuples())
        for i, first in enumerate(entries):
            for second in entries[i + 1 :]:
                high, low = (first, second) if first.paper > second.paper else (second, first)
                if high.paper - low.paper <= tolerance:
                    continue
                ends = of_sum([(1, high.ours, widest(high)), (-1, low.ours, widest(low))])
                verdict = "holds" if ends[0] > 0 else "reversed" if ends[1] < 0 else "undecided"
                pair = {
                    "method": method,
                    "column": column,
                    "metric": metric,
                    "higher": high.row,
                    "lower": low.row,
                }
                pair |= {
                    "paper": high.paper - low.paper,
                    "ours": high.ours - low.ours,
                    "low": ends[0],
                    "high": ends[1],
                }
                comparable = bool(metric == "UA" or (high.comparable and low.comparable))
                pairs.append(pair | {"verdict": verdict, "comparable": comparable})
    columns = [
        "method",
        "column",
        "metric",
        "higher",
        "lower",
        "paper",
        "ours",
        "low",
        "high",
        "verdict",
        "comparable",
    ]
    return pd.DataFrame(pairs, columns=columns)


def widest(entry: tuple) -> tuple[float, float]:
    """Both ends of a measured row's interval: over images, widened to that over seeds where that reaches further."""
    half = 0.0 if pd.isna(entry.half) else entry.half
    return min(entry.images_low, entry.ours - half), max(entry.images_high, entry.ours + half)
