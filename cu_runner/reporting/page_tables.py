"""The tables on the page of a report, as plain values for its template."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from cu_runner.evaluators.metrics import ENOUGH_UA
from cu_runner.reporting.page_data import Shown, contrast
from cu_runner.reporting.page_plots import PERCENTAGES, LineStyle, line_style
from cu_runner.runtime.lazy import pd

NAMES = PERCENTAGES | {"RA_C_retained": "RA-C retained", "drift_l2": "drift"}
COST_NAMES = {
    "train_seconds": "training, s",
    "eval_seconds": "evaluation, s",
    "train_steps": "steps",
    "peak_memory_mb": "memory, MB",
}
MOST_RUNS = 6  # columns of a table with a column per run
MOST_REQUESTS = 14  # columns of a table with a column per request
DAGGER, DOUBLE_DAGGER, DASH = "\N{DAGGER}", "\N{DOUBLE DAGGER}", "\N{EN DASH}"


@dataclass(frozen=True)
class Cell:
    """A cell of a table, if it is more than a number."""

    text: str
    style: LineStyle | None = None  # of the run that it names
    mark: str = ""  # beside the number, outside its column
    is_prose: bool = False
    bar: str = ""  # its length in percent


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row names it."""

    caption: str
    head: list[str | Cell]
    rows: list[list[str | Cell]]


def named(shown: Shown, label: str | None = None) -> Cell:
    """Return the cell that names a run; without a label by its title, which says how far it is."""
    return Cell(label or shown.title, line_style(shown.number))


def number(value: float, name: str = "") -> str:
    """Return a number as written in a column of metrics.csv; a dash if it was not measured."""
    return DASH if pd.isna(value) else format(value, "#.4g" if name == "drift_l2" else ".1f")


def parts_of(count: int, most: int) -> list[range]:
    """Return so many rows or columns in parts of about the same size, at most `most` each."""
    size = -(-count // -(-count // most))
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def summary(runs: list[Shown]) -> Table:
    """Return the metrics of all runs after the last finished request."""
    rows: list[list[str | Cell]] = []
    for shown in runs:
        numbers: list[str | Cell] = [number(shown.last[name], name) for name in NAMES]
        if shown.last["UA"] < ENOUGH_UA:
            numbers[0] = Cell(number(shown.last["UA"]), mark=DAGGER)
        rows.append([named(shown, shown.label), shown.extent, *numbers])
    return Table("After the last finished request", ["run", "requests", *NAMES.values()], rows)


def contrasts(runs: list[Shown]) -> list[str | Table]:
    """Return what differs between runs of one method, list of regularizers, sequence and seed."""
    alike: dict[tuple[str, str, int], list[Shown]] = defaultdict(list)
    for shown in runs:
        alike[shown.run.label, shown.run.sequence, shown.run.seed].append(shown)
    found: list[str | Table] = []
    for (label, *_), group in alike.items():
        if len(group) == 1:
            continue
        rows: dict[str, list[str | Cell]] = {
            key: [Cell(DASH if value is None else str(value), is_prose=True) for value in values]
            for key, values in contrast([shown.run for shown in group]).items()
        }
        caption = f"Settings in which the runs of {label} differ"
        same = f"{label}: one configuration, in {len(group)} directories."
        found += by_run(caption, "setting", group, rows) if rows else [same]
    return found


def by_run(
    caption: str, head: str, runs: list[Shown], rows: dict[str, list[str | Cell]]
) -> list[Table]:
    """Return tables with a column per run, MOST_RUNS side by side. rows: name -> cells of runs."""
    return [
        Table(
            caption,
            [head, *(named(runs[i]) for i in part)],
            [[name, *(cells[i] for i in part)] for name, cells in rows.items()],
        )
        for part in parts_of(len(runs), MOST_RUNS)
    ]


def by_request(runs: list[Shown], name: str) -> list[Table]:
    """Return a column of metrics.csv: rows runs, columns requests, MOST_REQUESTS side by side."""
    most = max(len(shown.run.records) for shown in runs)
    columns = [(named(shown), shown.run.table[name]) for shown in runs]
    return [
        Table(
            f"{NAMES[name]} after request",
            ["run", *map(str, part)],
            [[run, *(number(value, name) for value in col.reindex(part))] for run, col in columns],
        )
        for part in parts_of(most, MOST_REQUESTS)
    ]


def cost(runs: list[Shown], found: pd.DataFrame) -> Table:
    """Return what all finished requests cost. found: of page_data.costs()."""
    largest = found[list(COST_NAMES)].max()
    rows: list[list[str | Cell]] = []
    for shown, row in zip(runs, found.to_dict("records"), strict=True):
        bars = [
            Cell(
                f"{row[name]:,.0f}",
                mark=DOUBLE_DAGGER if row["cached"] and name == "train_seconds" else "",
                bar=f"{100 * row[name] / (largest[name] or 1):.1f}",
            )
            for name in COST_NAMES
        ]
        device = Cell(row["device"], is_prose=True)
        rows.append([named(shown, shown.label), shown.extent, *bars, device])
    head: list[str | Cell] = ["run", "requests", *COST_NAMES.values(), "device"]
    return Table("Cost of all finished requests", head, rows)
