"""What the page of a report shows, as plain values for its template, page.html.j2."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cu_runner.evaluators.metrics import ENOUGH_UA
from cu_runner.reporting.code_differences import made_by_other_code
from cu_runner.reporting.diagnosis import by_signature
from cu_runner.reporting.page_data import (
    Samples,
    Shown,
    costs,
    drift_by_layer,
    network_position,
    provenance,
    sample_images,
)
from cu_runner.reporting.page_plots import (
    COLOURS,
    format_percent,
    layer_panel,
    metric_panel,
    publish,
    tradeoff_panel,
    write_costs,
    write_heat_map,
)
from cu_runner.reporting.page_tables import (
    DAGGER,
    DOUBLE_DAGGER,
    NAMES,
    Cell,
    Table,
    by_request,
    by_run,
    contrasts,
    cost,
    named,
    number,
    parts_of,
    summary,
)

MOST_COLUMNS = 26  # of a heat map or a sample grid side by side: what a printed page holds
PRINTED = (552, 940, 40)  # pixels of samples across and down a printed page, and of one at most


@dataclass(frozen=True)
class Plot:
    """A plot as SVG text, and its numbers."""

    svg: str
    description: str
    tables: list[Table]


@dataclass(frozen=True)
class Part:
    """Some rows and columns of an accuracy matrix, in percent.

    jpeg: their samples, in base64, or "". kinds: "gone" where a concept is unlearned by then,
    "blank" where it was not measured, or "".
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
    found = costs(runs)
    write_costs(runs, found, plots)
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
        cost=cost(runs, found),
        has_cached=bool(found["cached"].any()),
        details=[details_of(shown, plots) for shown in runs[:details]],
    )


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
        if len({getattr(shown.run.records[0], f"{part}_sha256") for shown in runs}) > 1
    ]
    if differing:
        which = " and the ".join(differing)
        found.append(
            f"Not all runs have the same weights of the {which} (see Configuration): "
            "compare those that do."
        )
    different = made_by_other_code(shown.run for shown in runs)
    if any(different):
        labels = [shown.label for shown, differs in zip(runs, different, strict=True) if differs]
        what = "Made by other code than the first of the runs, or by several"
        found.append(f"{what} (see Configuration): {', '.join(labels)}.")
    return found + by_signature({shown.label: shown.run for shown in runs})


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
    facts = {"directory": str(place), "signature": run.records[0].signature}
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
