"""What the page of a report shows, as plain values for its template, page.html.j2."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cu_runner.evaluators.metrics import ENOUGH_UA
from cu_runner.reporting.code_differences import made_by_other_code
from cu_runner.reporting.diagnosis import by_signature
from cu_runner.reporting.estimates import NOTHING
from cu_runner.reporting.page_data import costs, drift_estimates, network_position
from cu_runner.reporting.page_details import details_of
from cu_runner.reporting.page_groups import Group
from cu_runner.reporting.page_plots import (
    COLOURS,
    format_percent,
    layer_panel,
    metric_panel,
    publish,
    tradeoff_panel,
    write_costs,
)
from cu_runner.reporting.page_tables import (
    NAMES,
    Cell,
    Table,
    by_group,
    by_request,
    contrasts,
    cost,
    estimated,
    named,
    seeds_at_end,
    seeds_by_request,
    summary,
)
from cu_runner.reporting.table_formats import DOUBLE_DAGGER, LESS_FORGOTTEN


@dataclass(frozen=True)
class Plot:
    """A plot as SVG text, its numbers, and those of single seeds."""

    svg: str
    description: str
    tables: list[Table]
    seeds: list[Table]


def write_page(groups: list[Group], plots: Path, details: int, remarks: list[str]) -> str:
    """Return the whole page as text, and write its plots as PNG and SVG files.

    Args:
        plots: existing folder for the pictures.
        details: of so many groups, the first ones, and so many seeds of each everything is given
            (page_details).
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
    found = costs(groups)
    write_costs(groups, found, plots)
    shown = [details_of(group, plots, details) for group in groups[:details]]
    return environment.get_template("page.html.j2").render(
        title=title(groups),
        colours=COLOURS,
        enough_ua=ENOUGH_UA,
        double_dagger=DOUBLE_DAGGER,
        groups=[named(group) for group in groups],
        has_seeds=any(len(group.runs) > 1 for group in groups),
        summary=summary(groups),
        seeds=seeds_at_end(groups),
        contrasts=contrasts(groups),
        notes=notes(groups) + remarks,
        metrics=metrics(groups, plots),
        tradeoff=tradeoff(groups, plots),
        layers=layers(groups, plots),
        cost=cost(groups, found),
        has_cached=bool(found["cached"].any()),
        has_recovery=any(each.recovery for each in shown),
        details=shown,
    )


def title(groups: list[Group]) -> str:
    """Return the head of the page."""
    sequences = ", ".join(dict.fromkeys(group.first.sequence for group in groups))
    count = sum(len(group.runs) for group in groups)
    several = "" if count == 1 else f", {count} seeds"
    who = f"{groups[0].title}{several}" if len(groups) == 1 else f"{count} runs"
    return f"{who} on {sequences}"


def notes(groups: list[Group]) -> list[str]:
    """Return what a reader must know of the summary."""
    found = []
    if any(len(group.runs) > 1 for group in groups):
        found.append(
            "Of several seeds: the mean, and in brackets its 95% interval, over the seeds "
            "(Student's t) or over their images (Wilson's) where that is wider, within 0 and 100."
        )
    if any(group.at_end("UA").mean < ENOUGH_UA for group in groups):
        found.append(LESS_FORGOTTEN)
    settings = [(group.label, group.first.config["setting"]) for group in groups]
    if stopped := [label for label, setting in settings if setting.get("stop_at") is not None]:
        when = "Requests end when the evaluator that also judges measures a given UA"
        found.append(f"{when}: {', '.join(stopped)}.")
    differing = [
        part
        for part in ("model", "evaluator")
        if len({getattr(group.first.records[0], f"{part}_sha256") for group in groups}) > 1
    ]
    if differing:
        which = " and the ".join(differing)
        found.append(
            f"Not all runs have the same weights of the {which} (see Configuration): "
            "compare those that do."
        )
    different = made_by_other_code(group.first for group in groups)
    if any(different):
        labels = [group.label for group, differs in zip(groups, different, strict=True) if differs]
        what = "Made by other code than the first of the runs, or by several"
        found.append(f"{what} (see Configuration): {', '.join(labels)}.")
    by_label = {
        group.label if len(group.runs) == 1 else f"{group.label}, seed {run.seed}": run
        for group in groups
        for run in group.runs
    }
    return found + by_signature(by_label)


def metrics(groups: list[Group], plots: Path) -> list[Plot]:
    """Return the metrics against the request."""
    titles = {"UA": "UA, %", "RA_I": "RA-I, %", "RA_C": "RA-C, %", "drift_l2": "drift, L2 norm"}
    panels = [metric_panel(groups, name, title) for name, title in titles.items()]
    return [
        Plot(
            svg,
            f"{NAMES[name]} against the request, one line per run or mean of seeds",
            by_request(groups, name),
            seeds_by_request(groups, name),
        )
        for name, svg in zip(titles, publish(panels, groups, plots, "metrics"), strict=True)
    ]


def tradeoff(groups: list[Group], plots: Path) -> list[Plot]:
    """Return both retentions against UA."""
    names = ("RA_I", "RA_C")
    drawn = publish([tradeoff_panel(groups, name) for name in names], groups, plots, "tradeoff")
    found = []
    for name, svg in zip(names, drawn, strict=True):
        numbers = Table(
            f"UA and {NAMES[name]} after the last finished request",
            ["run", "UA", NAMES[name]],
            [
                [named(group), estimated(group.at_end("UA")), estimated(group.at_end(name))]
                for group in groups
            ],
        )
        description = f"{NAMES[name]} against UA after the last finished request, one point per run"
        found.append(Plot(svg, f"{description} or mean of seeds", [numbers], []))
    return found


def layers(groups: list[Group], plots: Path) -> list[Plot]:
    """Return the drift of each layer: keys, values, and all other layers; [] before a request."""
    drifts = [drift_estimates(group) for group in groups]
    kinds: dict[str, list[str]] = {"keys": [], "values": [], "all other layers": []}
    for layer in sorted({layer for drift in drifts for layer in drift}, key=network_position):
        is_key, is_value = layer.endswith(".to_k"), layer.endswith(".to_v")
        kinds["keys" if is_key else "values" if is_value else "all other layers"].append(layer)
    kinds = {kind: chosen for kind, chosen in kinds.items() if chosen}
    if not kinds:
        return []
    panels = [layer_panel(groups, drifts, chosen, kind) for kind, chosen in kinds.items()]
    drawn = publish(panels, groups, plots, "layers")
    found = []
    for (kind, chosen), svg in zip(kinds.items(), drawn, strict=True):
        rows: dict[str, list[str | Cell]] = {
            layer: [estimated(drift.get(layer, NOTHING), "drift_l2") for drift in drifts]
            for layer in chosen
        }
        what = f"L2 norm of the drift of each layer: {kind}"
        description = f"{what}, one line per run or mean of seeds"
        found.append(Plot(svg, description, by_group(what, "layer", groups, rows), []))
    return found
