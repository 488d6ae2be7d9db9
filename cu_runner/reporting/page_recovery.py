"""What the page of a report shows of the probes of recovery: a table, heat maps, and curves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from cu_runner.reporting.estimates import UNKNOWN, Estimate, of_hits
from cu_runner.reporting.intervals import over_images, over_seeds
from cu_runner.reporting.page_curves import Curve, curve_of, stem
from cu_runner.reporting.page_groups import Group
from cu_runner.reporting.page_plots import draw_heat_map
from cu_runner.reporting.page_tables import (
    DASH,
    MOST_COLUMNS,
    Cell,
    Part,
    Row,
    Table,
    number,
    part_of,
    parts_of,
    with_interval,
)
from cu_runner.reporting.recovery_data import Seen, Steps, counts, read_seen
from cu_runner.runtime.lazy import pd
from cu_runner.store.run_record import RunRecord

CONTROL_ROWS = {"_untouched": "untouched model, mean", "_retained": "retained concepts, mean"}
HEAD = ("probe", "request", "strongest", "recovered", "images", "untouched", "retained")


@dataclass(frozen=True)
class HeatMap:
    """What a probe saw of every concept after each request; the last rows are its controls.

    numbers: the mean over the seeds, in parts side by side. seeds: the same of single ones, with
    the seed. first: name of the first control's row; "" without controls. intervals: images of the
    concepts, of all seeds together, in tables side by side; none of a probe that gives numbers.
    """

    caption: str
    numbers: list[Part]
    seeds: list[tuple[int, list[Part]]]
    first: str
    intervals: list[Table]


@dataclass(frozen=True)
class Recovery:
    """What is shown of the probes of a group.

    said: UA by name and under the strongest probe, in words; "" where no image was made. table:
    every probe at its last measurement. seeds: the same of single seeds. probes: the heat map of
    each probe, and its curve if it has one.
    """

    said: str
    table: Table
    seeds: list[Table]
    probes: list[tuple[HeatMap, Curve | None]]


def recovery_of(group: Group, plots: Path, most: int) -> Recovery | None:
    """Return everything of the probes of a group, and write their plots.

    Args:
        plots: existing folder for the pictures.
        most: of so many seeds, numbers of their own are given.

    Returns:
        None where no probe has measured.

    Raises:
        StoreError: a file of a run is damaged.
    """
    seen = [read_seen(run) for run in group.runs]
    if not seen[0]:
        return None
    requests = sorted({index for steps in seen[0].values() for index in steps})
    probes: list[tuple[HeatMap, Curve | None]] = []
    rows: list[Row] = []
    alone: list[Row] = []
    for place, name in enumerate(seen[0]):
        each = [probes_of_run[name] for probes_of_run in seen]
        heat_map = heat_map_of(group, name, each, requests, plots, most)
        probes.append((heat_map, curve_of(group, name, each, plots, place)))
        rows.append([name, *numbers_of(each)])
        for run, steps in list(zip(group.runs, each, strict=True))[:most]:
            alone.append([name, str(run.seed), *numbers_of([steps])])
    caption = f"Recovered under each probe at its last measurement, %: {group.label}"
    seeds = Table(f"{caption}, single seeds", [HEAD[0], "seed", *HEAD[1:]], alone)
    return Recovery(
        said=worst_in_words(group),
        table=Table(caption, list(HEAD), rows),
        seeds=[seeds] if len(group.runs) > 1 else [],
        probes=probes,
    )


def worst_in_words(group: Group) -> str:
    """Return UA by name and under the strongest probe, after the last request that has both."""
    tables = [run.table for run in group.runs]
    if "UA_worst" not in tables[0]:
        return ""
    known = tables[0].index[tables[0]["UA_worst"].notna()]
    if known.empty:
        return ""
    last = known[-1]
    by_name, worst = (
        number(float(np.mean([table[name].loc[last] for table in tables])))
        for name in ("UA", "UA_worst")
    )
    return f"After request {last}: UA by name {by_name}; under the strongest probe {worst}."


# --------------------------------------------------------------------------------------- the table
def numbers_of(each: list[Steps]) -> Row:
    """Return the cells of HEAD after the first, at the last request after which a probe measured.

    Args:
        each: what the probe saw, of every seed.
    """
    last = max(each[0])
    seen = [steps[last] for steps in each]
    hits, images = counts([one.at_strongest() for one in seen])
    return [
        str(last),
        "; ".join(dict.fromkeys(where(one) for one in seen)),
        with_interval(estimate_of([one.means[""] for one in seen], hits, images)),
        f"{hits} of {images}" if images else DASH,
        *(number(float(np.mean([one.means[ending] for one in seen]))) for ending in CONTROL_ROWS),
    ]


def where(seen: Seen) -> str:
    """Return the strongest variant and dose in words; without the dose where all doses are 0.

    With the domain where those of domains differ.
    """
    has_doses = set(seen.of("")["dose"]) != {0.0}
    words = {}
    for domain, (variant, dose) in (seen.strongest or {}).items():
        parts = [variant] if variant else []
        words[domain] = ", ".join([*parts, *([f"dose {dose:g}"] if has_doses else [])]) or DASH
    if len(set(words.values())) < 2:
        return next(iter(words.values()), DASH)
    return "; ".join(f"{domain}: {said}" for domain, said in words.items())


def estimate_of(values: list[float], hits: int, images: int) -> Estimate:
    """Return the mean over seeds. Where no image was made, its interval is over the seeds alone."""
    if images:
        return of_hits(values, hits, images)
    mean, half = over_seeds(values)  # may be below 0
    return Estimate(mean, half, UNKNOWN, UNKNOWN if half is None else (mean - half, mean + half))


# ----------------------------------------------------------------------------------- the heat maps
def heat_map_of(
    group: Group, name: str, each: list[Steps], requests: list[int], plots: Path, most: int
) -> HeatMap:
    """Return the heat map of a probe, and write it as recovered-<number>-<probe>-<first run>.

    Args:
        each: what the probe saw, of every seed.
        requests: the columns.
        most: of so many seeds, heat maps of their own are given.
    """
    runs = list(zip(group.runs, each, strict=True))
    concepts = [concepts_of(run, steps, requests) for run, steps in runs]
    controls = [controls_of(steps, requests) for _, steps in runs]
    tables = [pd.concat(pair) for pair in zip(concepts, controls, strict=True)]
    whole = sum(tables[1:], tables[0]) / len(tables)
    is_concept = np.arange(len(whole)) < len(concepts[0])
    has_erased = any(seen.has_erased for seen in each[0].values())
    unlearned = whole.notna().to_numpy() & is_concept[:, None] & has_erased
    has_images = any(seen.strongest is not None for seen in each[0].values())
    across = parts_of(len(requests), MOST_COLUMNS)
    rows = range(len(whole))
    what = f"recognised under {name}, %" if has_images else f"numbers of {name}"
    draw_heat_map(f"{group.title}: {what}", whole, unlearned, stem(group, plots, "recovered", name))
    words = f"Recognised under {name} after each request, %"
    words = words if has_images else f"Numbers of {name} after each request"
    caption = f"{words}: {group.label}"
    names = [str(concept) for concept in concepts[0].index]
    return HeatMap(
        caption=caption,
        numbers=[part_of(whole, unlearned, rows, part) for part in across],
        seeds=[
            (run.seed, [part_of(table, unlearned, rows, part) for part in across])
            for (run, _), table in list(zip(runs, tables, strict=True))[:most]
            if len(runs) > 1
        ],
        first=str(controls[0].index[0]) if len(controls[0]) else "",
        intervals=[
            intervals_of(f"{caption}, intervals", each, names, [requests[place] for place in part])
            for part in across
            if has_images
        ],
    )


def intervals_of(
    caption: str, each: list[Steps], concepts: list[str], requests: list[int]
) -> Table:
    """Return how many images show each concept after each request, and the interval of that share.

    Args:
        each: what the probe saw, of every seed.
    """
    cells: dict[int, dict[str, Cell]] = {}
    for request in requests:
        if seen := [steps[request].at_strongest() for steps in each if request in steps]:
            found = pd.concat(seen).groupby("concept")[["hits", "images"]].sum().itertuples()
            cells[request] = {str(name): share_of(int(own), int(of)) for name, own, of in found}
    rows: list[Row] = [
        [concept, *(cells.get(request, {}).get(concept, "") for request in requests)]
        for concept in concepts
    ]
    return Table(caption, ["request", *map(str, requests)], rows)


@cache  # few counts, many cells
def share_of(hits: int, images: int) -> Cell:
    """Return "3 of 4" with its interval below it."""
    low, high = over_images(100 * hits / images, images)
    return Cell(f"{hits} of {images}", below=f"({number(low)} to {number(high)})")


def concepts_of(run: RunRecord, steps: Steps, requests: list[int]) -> pd.DataFrame:
    """Return what a probe saw of each concept, in the order of unlearning, by request.

    NaN where it was not measured.
    """
    columns = {index: steps[index].by_concept() for index in requests if index in steps}
    table = pd.DataFrame(columns)
    order = dict.fromkeys([*run.requested, *run.retained, *table.index])
    known = [name for name in order if name in table.index]
    return table.reindex(index=known, columns=requests)


def controls_of(steps: Steps, requests: list[int]) -> pd.DataFrame:
    """Return the means of a probe's controls by request, without a control that has none."""
    means = {
        index: {row: steps[index].means[ending] for ending, row in CONTROL_ROWS.items()}
        for index in requests
        if index in steps
    }
    table = pd.DataFrame(means, index=list(CONTROL_ROWS.values()), dtype=float)
    return table.reindex(columns=requests).dropna(how="all")
