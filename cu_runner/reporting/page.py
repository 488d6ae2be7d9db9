"""What the page of a report shows, as plain values for its template, page.html.j2."""

from __future__ import annotations

import base64
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cu_runner.evaluators.metrics import ENOUGH_UA
from cu_runner.reporting.page_data import (
    Samples,
    Shown,
    contrast,
    costs,
    drift_by_layer,
    network_position,
    provenance,
    sample_images,
)
from cu_runner.reporting.page_plots import (
    COLOURS,
    PERCENTAGES,
    LineStyle,
    format_percent,
    layer_panel,
    line_style,
    metric_panel,
    publish,
    tradeoff_panel,
    write_costs,
    write_heat_map,
)
from cu_runner.runtime.lazy import pd

NAMES = PERCENTAGES | {"RA_C_retained": "RA-C retained", "drift_l2": "drift"}


COST_NAMES = {
    "train_seconds": "training, s",
    "eval_seconds": "evaluation, s",
    "train_steps": "steps",
    "peak_memory_mb": "memory, MB",
}


MOST_COLUMNS = 26  # of a heat map or a sample grid side by side: what a printed page holds


MOST_RUNS = 6  # columns of a table with a column per run


MOST_REQUESTS = 14  # columns of a table with a column per request


PRINTED = (552, 940, 40)  # pixels of samples across and down a printed page, and of one at most


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


@dataclass(frozen=True)
class Plot:
    """A plot as SVG text, and its numbers."""

    svg: str
    description: str
    tables: list[Table]


@dataclass(frozen=True)
class Part:
    """Some rows and columns of an accuracy matrix, in percent; jpeg: their samples, in base64, or "".

    kinds: "gone" where a concept is unlearned by then, "blank" where it was not measured, or "".
    """

    requests: list[int]
    concepts: list[str]
    values: list[list[float]]
    kinds: list[list[str]]
    jpeg: str = ""


@dataclass(frozen=True)
class Details:
    """What is shown of a single run. pictures: below one another, and in each side by side."""

    shown: Shown
    numbers: list[Part]
    samples: Samples
    pictures: list[list[Part]]
    side: int  # pixels of a sample in print
    facts: dict[str, str]
    config: str


def write_page(runs: list[Shown], plots: Path, details: int, remarks: list[str]) -> str:
    """Return the whole page as text, and write its plots as PNG and SVG files.

    Args:
        plots: existing folder for the pictures.
        details: of so many runs, the first ones, everything is given (see Details).
        remarks: lines for the end of the summary.

    Raises:
        StoreError: a file of a run is damaged.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["percent"] = format_percent
    sequences = ", ".join(dict.fromkeys(shown.run.sequence for shown in runs))
    who = runs[0].title if len(runs) == 1 else f"{len(runs)} runs"
    cost_table, has_cached = cost(runs, plots)
    return environment.get_template("page.html.j2").render(
        title=f"{who} on {sequences}",
        colours=COLOURS,
        enough_ua=ENOUGH_UA,
        double_dagger=DOUBLE_DAGGER,
        runs=[named(shown) for shown in runs],
        summary=summary(runs),
        contrasts=contrasts(runs),
        notes=notes(runs) + remarks,
        metrics=metrics(runs, plots),
        tradeoff=tradeoff(runs, plots),
        layers=layers(runs, plots),
        cost=cost_table,
        has_cached=has_cached,
        details=[details_of(shown, plots) for shown in runs[:details]],
    )


def named(shown: Shown, label: str | None = None) -> Cell:
    """Return the cell that names a run; without a label by its title, which says if it is unfinished."""
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


def notes(runs: list[Shown]) -> list[str]:
    """Return what a reader must know of the summary."""
    found = []
    if any(shown.last["UA"] < ENOUGH_UA for shown in runs):
        why = "less was forgotten, so the retention is not comparable"
        found.append(f"{DAGGER} UA is under {ENOUGH_UA:.0f}: {why}.")
    settings = [(shown.label, shown.run.config["setting"]) for shown in runs]
    if stopped := [label for label, setting in settings if setting.get("stop_at") is not None]:
        when = "Requests end when the evaluator that also judges measures a given UA"
        found.append(f"{when}: {', '.join(stopped)}.")
    differing = [
        part
        for part in ("model", "evaluator")
        if len({shown.run.records[0][f"{part}_sha256"] for shown in runs}) > 1
    ]
    if differing:
        which = " and the ".join(differing)
        found.append(
            f"Not all runs have the same weights of the {which} (see Configuration): "
            "compare those that do."
        )
    return found


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
    """Return tables with a column per run, MOST_RUNS side by side. rows: name -> cells of the runs."""
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


def metrics(runs: list[Shown], plots: Path) -> list[Plot]:
    """Return the metrics against the request."""
    titles = {"UA": "UA, %", "RA_I": "RA-I, %", "RA_C": "RA-C, %", "drift_l2": "drift, L2 norm"}
    panels = [metric_panel(runs, name, title) for name, title in titles.items()]
    return [
        Plot(svg, f"{NAMES[name]} against the request, one line per run", by_request(runs, name))
        for name, svg in zip(titles, publish(panels, runs, plots, "metrics"), strict=True)
    ]


def tradeoff(runs: list[Shown], plots: Path) -> list[Plot]:
    """Return both retentions against UA."""
    names = ("RA_I", "RA_C")
    drawn = publish([tradeoff_panel(runs, name) for name in names], runs, plots, "tradeoff")
    found = []
    for name, svg in zip(names, drawn, strict=True):
        numbers = Table(
            f"UA and {NAMES[name]} after the last finished request",
            ["run", "UA", NAMES[name]],
            [[named(shown), number(shown.last["UA"]), number(shown.last[name])] for shown in runs],
        )
        description = f"{NAMES[name]} against UA after the last finished request, one point per run"
        found.append(Plot(svg, description, [numbers]))
    return found


def layers(runs: list[Shown], plots: Path) -> list[Plot]:
    """Return the drift of each layer: keys, values, and all other layers; [] before a request."""
    drifts = [drift_by_layer(shown.run) for shown in runs]
    kinds: dict[str, list[str]] = {"keys": [], "values": [], "all other layers": []}
    for layer in sorted({layer for drift in drifts for layer in drift}, key=network_position):
        is_key, is_value = layer.endswith(".to_k"), layer.endswith(".to_v")
        kinds["keys" if is_key else "values" if is_value else "all other layers"].append(layer)
    kinds = {kind: chosen for kind, chosen in kinds.items() if chosen}
    if not kinds:
        return []
    panels = [layer_panel(runs, drifts, chosen, kind) for kind, chosen in kinds.items()]
    found = []
    for (kind, chosen), svg in zip(
        kinds.items(), publish(panels, runs, plots, "layers"), strict=True
    ):
        rows: dict[str, list[str | Cell]] = {
            layer: [number(drift.get(layer, float("nan")), "drift_l2") for drift in drifts]
            for layer in chosen
        }
        tables = by_run(f"L2 norm of the drift of each layer: {kind}", "layer", runs, rows)
        found.append(
            Plot(svg, f"L2 norm of the drift of each layer, {kind}, one line per run", tables)
        )
    return found


def cost(runs: list[Shown], plots: Path) -> tuple[Table, bool]:
    """Return what all finished requests cost, and whether weights of some came from the cache."""
    found = costs(runs)
    write_costs(runs, found, plots)
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
    return Table("Cost of all finished requests", head, rows), bool(found["cached"].any())


def details_of(shown: Shown, plots: Path) -> Details:
    """Return everything of a run, and write its accuracy matrix as a picture."""
    write_heat_map(shown, plots)
    run, samples = shown.run, sample_images(shown)
    rows, columns = shown.accuracy.shape
    across = parts_of(columns, MOST_COLUMNS)
    side = min(PRINTED[2], PRINTED[0] // len(across[0]))
    down = parts_of(rows, PRINTED[1] // side)
    place, here = run.directory, Path.cwd()
    place = place.relative_to(here) if place.is_relative_to(here) else place
    facts = {"directory": str(place), "signature": str(run.records[0]["signature"])}
    return Details(
        shown,
        numbers=[part_of(shown, range(rows), part) for part in across],
        samples=samples,
        pictures=[[part_of(shown, y, x, samples.jpeg(y, x)) for x in across] for y in down],
        side=side,
        facts=facts | provenance(run),
        config=(run.directory / "config.yaml").read_text(encoding="utf-8"),
    )


def part_of(shown: Shown, rows: range, columns: range, jpeg: bytes = b"") -> Part:
    """Return a part of the accuracy matrix of a run."""
    cut = np.ix_(rows, columns)
    values, gone = shown.accuracy.to_numpy()[cut], shown.unlearned.to_numpy()[cut]
    kinds = np.where(np.isnan(values), "blank", np.where(gone, "gone", ""))
    concepts = [str(shown.accuracy.index[row]) for row in rows]
    picture = base64.b64encode(jpeg).decode()
    return Part(list(columns), concepts, values.tolist(), kinds.tolist(), picture)
