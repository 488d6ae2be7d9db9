"""The tables on the page of a report, as plain values for its template."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cu_runner.evaluators.metrics import ENOUGH_UA
from cu_runner.reporting.estimates import SHARES, Estimate
from cu_runner.reporting.page_groups import Group, contrast
from cu_runner.reporting.page_plots import LineStyle, line_style
from cu_runner.reporting.table_formats import DAGGER, DOUBLE_DAGGER
from cu_runner.runtime.lazy import pd

NAMES = SHARES | {"drift_l2": "drift"}
COST_NAMES = {
    "train_seconds": "training, s",
    "eval_seconds": "evaluation, s",
    "train_steps": "steps",
    "peak_memory_mb": "memory, MB",
}
MOST_GROUPS = 6  # columns of a table with a column per group
MOST_COLUMNS = 26  # of a heat map side by side: what a printed page holds
MOST_REQUESTS = 14  # columns of a table with a column per request
DASH = "\N{EN DASH}"


@dataclass(frozen=True)
class Cell:
    """A cell of a table, if it is more than a number."""

    text: str
    style: LineStyle | None = None  # of the group that it names
    mark: str = ""  # beside the number, outside its column
    below: str = ""  # below the number, and smaller: its interval
    is_prose: bool = False
    bar: str = ""  # its length in percent


Row = list[str | Cell]


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row names it."""

    caption: str
    head: Row
    rows: list[Row]


@dataclass(frozen=True)
class Part:
    """Some rows and columns of a heat map, in percent.

    kinds: "gone" where a concept is unlearned by then, "blank" where it was not measured, or "".
    """

    requests: list[int]
    concepts: list[str]
    values: list[list[float]]
    kinds: list[list[str]]


def part_of(
    table: pd.DataFrame, unlearned: np.ndarray, rows: Sequence[int], columns: Sequence[int]
) -> Part:
    """Return a part of a heat map, by the places of its rows and columns.

    Args:
        table: rows concepts, columns requests; NaN where not measured.
        unlearned: True where a cell is of a concept that is unlearned by then, of the same shape.
    """
    cut = np.ix_(rows, columns)
    values = table.to_numpy()[cut]
    kinds = np.where(np.isnan(values), "blank", np.where(unlearned[cut], "gone", ""))
    requests = [int(table.columns[column]) for column in columns]
    concepts = [str(table.index[row]) for row in rows]
    return Part(requests, concepts, values.tolist(), kinds.tolist())


def named(group: Group, label: str | None = None) -> Cell:
    """Return the cell that names a group; without a label by its title: how far it is."""
    return Cell(label or group.title, line_style(group.number))


def number(value: float, name: str = "") -> str:
    """Return a number as written in a column of metrics.csv; a dash if it was not measured."""
    return DASH if pd.isna(value) else format(value, "#.4g" if name == "drift_l2" else ".1f")


def estimated(estimate: Estimate, name: str = "", mark: str = "") -> str | Cell:
    """Return a number, and of several seeds the interval below it."""
    text, interval = number(estimate.mean, name), ""
    if estimate.half is not None and text != DASH:
        interval = f"({' to '.join(number(end, name) for end in estimate.ends)})"
    return Cell(text, mark=mark, below=interval) if mark or interval else text


def with_interval(estimate: Estimate) -> str | Cell:
    """Return a number with its interval below it, also of one seed."""
    text = number(estimate.mean)
    if text == DASH or pd.isna(estimate.ends[0]):
        return text
    return Cell(text, below=f"({' to '.join(number(end) for end in estimate.ends)})")


def parts_of(count: int, most: int) -> list[range]:
    """Return so many rows or columns in parts of about the same size, at most `most` each."""
    size = -(-count // -(-count // most))
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def summary(groups: list[Group]) -> Table:
    """Return the metrics of all groups after the last finished request."""
    rows: list[Row] = []
    for group in groups:
        marks = {"UA": DAGGER} if group.at_end("UA").mean < ENOUGH_UA else {}
        numbers = [estimated(group.at_end(name), name, marks.get(name, "")) for name in NAMES]
        states = ", ".join(dict.fromkeys(outcome.state for outcome in group.outcomes))
        extent = Cell(group.extent, below=states)
        rows.append([named(group, group.label), group.seeds, extent, *numbers])
    head: Row = ["run", "seeds", "requests", *NAMES.values()]
    return Table("After the last finished request", head, rows)


def seeds_at_end(groups: list[Group]) -> list[Table]:
    """Return the metrics of each seed after the last finished request, of groups of several."""
    rows: list[Row] = [
        [named(group), str(run.seed), *(number(run.table[name].iloc[-1], name) for name in NAMES)]
        for group in groups
        if len(group.runs) > 1
        for run in group.runs
    ]
    head: Row = ["run", "seed", *NAMES.values()]
    return [Table("Single seeds after the last finished request", head, rows)] if rows else []


def contrasts(groups: list[Group]) -> list[str | Table]:
    """Return in what groups of one method, list of regularizers and sequence differ."""
    alike: dict[tuple[str, str], list[Group]] = defaultdict(list)
    for group in groups:
        alike[group.first.label, group.first.sequence].append(group)
    found: list[str | Table] = []
    for (label, _), beside in alike.items():
        if len(beside) == 1:
            continue
        rows: dict[str, Row] = {
            key: [Cell(DASH if value is None else str(value), is_prose=True) for value in values]
            for key, values in contrast(beside).items()
        }
        caption = f"What keeps the runs of {label} apart"
        same = f"{label}: one configuration, in {len(beside)} directories."
        found += by_group(caption, "what", beside, rows) if rows else [same]
    return found


def by_group(caption: str, head: str, groups: list[Group], rows: dict[str, Row]) -> list[Table]:
    """Return tables with a column per group, MOST_GROUPS side by side.

    rows: name -> cells of the groups.
    """
    return [
        Table(
            caption,
            [head, *(named(groups[i]) for i in part)],
            [[name, *(cells[i] for i in part)] for name, cells in rows.items()],
        )
        for part in parts_of(len(groups), MOST_GROUPS)
    ]


def by_request(groups: list[Group], name: str) -> list[Table]:
    """Return a column of metrics.csv: rows groups, columns requests."""
    rows: list[Row] = [
        [named(group), *(estimated(each, name) for each in group.estimates[name])]
        for group in groups
    ]
    return in_parts(f"{NAMES[name]} after request", ["run"], rows)


def seeds_by_request(groups: list[Group], name: str) -> list[Table]:
    """Return a column of metrics.csv of each seed, of groups of several."""
    rows: list[Row] = [
        [named(group), str(run.seed), *(number(value, name) for value in run.table[name])]
        for group in groups
        if len(group.runs) > 1
        for run in group.runs
    ]
    return in_parts(f"{NAMES[name]} after request, single seeds", ["run", "seed"], rows)


def in_parts(caption: str, head: Row, rows: list[Row]) -> list[Table]:
    """Return tables with a column per request, MOST_REQUESTS side by side; [] without rows.

    head: of the cells that name a row; from request 0 on follow the others, and may end early.
    """
    names = len(head)
    most = max((len(row) for row in rows), default=names) - names
    full = [[*row, *[DASH] * (most + names - len(row))] for row in rows]
    return [
        Table(
            caption,
            [*head, *map(str, part)],
            [row[:names] + row[names + part.start : names + part.stop] for row in full],
        )
        for part in (parts_of(most, MOST_REQUESTS) if rows else [])
    ]


def cost(groups: list[Group], found: pd.DataFrame) -> Table:
    """Return what all finished requests cost. found: of page_data.costs()."""
    largest = found[list(COST_NAMES)].max()
    rows: list[Row] = []
    for group, row in zip(groups, found.to_dict("records"), strict=True):
        bars = [
            Cell(
                f"{row[name]:,.0f}",
                mark=DOUBLE_DAGGER if row["cached"] and name == "train_seconds" else "",
                bar=f"{100 * row[name] / (largest[name] or 1):.1f}",
            )
            for name in COST_NAMES
        ]
        device = Cell(row["device"], is_prose=True)
        rows.append([named(group, group.label), group.seeds, group.extent, *bars, device])
    head: Row = ["run", "seeds", "requests", *COST_NAMES.values(), "device"]
    return Table("Cost of all finished requests", head, rows)
