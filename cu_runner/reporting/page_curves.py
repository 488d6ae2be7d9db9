"""The curves on the page of a report: what a probe of recovery brings back, over its dose."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes

from cu_runner.evaluators.recovered import CONTROLS
from cu_runner.reporting.estimates import Estimate, of_hits
from cu_runner.reporting.page_groups import Group
from cu_runner.reporting.page_plots import (
    BAND,
    DASHES,
    SERIES,
    STYLE,
    LineStyle,
    draw,
    inline,
    line_style,
    save,
)
from cu_runner.reporting.page_tables import (
    DASH,
    MOST_REQUESTS,
    Cell,
    Table,
    number,
    parts_of,
    with_interval,
)
from cu_runner.reporting.recovery_data import Seen, Steps, counts
from cu_runner.runtime.lazy import pd

ENOUGH_DOSES = 3  # of a variant that has a curve


@dataclass(frozen=True)
class Line:
    """A line of a curve: the means over concepts and seeds by dose.

    That of a control has a thin style and is drawn without its interval.
    """

    label: str
    style: LineStyle
    estimates: dict[float, Estimate]


@dataclass(frozen=True)
class Curve:
    """A plot over the dose as SVG text, with its legend and its numbers."""

    svg: str
    description: str
    legend: list[Cell]
    tables: list[Table]


def stem(group: Group, plots: Path, what: str, probe: str) -> Path:
    """Return the path of a picture of a probe, without its suffix.

    Args:
        plots: folder of the pictures. what: is shown; the name begins with it.
    """
    safe = re.sub(r"[^\w.-]", "_", probe, flags=re.ASCII)
    return plots / f"{what}-{group.number + 1}-{safe}-{group.first.directory.name}"


def curve_of(group: Group, name: str, each: list[Steps], plots: Path, place: int) -> Curve | None:
    """Return the curve of a probe over its dose, and write it as by-dose-<number>-<probe>-<run>.

    It shows the last request after which the probe measured.

    Args:
        each: what the probe saw, of every seed.
        place: of the probe among those of the group.

    Returns:
        None where no variant has ENOUGH_DOSES.
    """
    last = max(each[0])
    lines = lines_of([steps[last] for steps in each])
    if not lines:
        return None

    def panel(axes: Axes) -> None:
        for line in lines:
            draw_line(axes, line)
        axes.set(title=f"{name}: recognised, %", xlabel="dose", ylim=(-3, 103))

    with mpl.rc_context(STYLE):
        legend = [(line.label, line.style) for line in lines]
        save(draw([panel], legend), stem(group, plots, "by-dose", name))
        svg = inline(draw([panel], []), f"by-dose-{group.number}-{place}")
    doses = sorted({dose for line in lines for dose in line.estimates})
    caption = f"Recognised under {name} by dose after request {last}, %: {group.label}"
    tables = [
        Table(
            caption,
            ["dose", *(f"{doses[i]:g}" for i in part)],
            [[named(line), *(cell_of(line, doses[i]) for i in part)] for line in lines],
        )
        for part in parts_of(len(doses), MOST_REQUESTS)
    ]
    description = f"Percent recognised under {name} against the dose, after request {last}, a line"
    description += f" per variant and control: {group.label}"
    return Curve(svg, description, [named(line) for line in lines], tables)


def lines_of(seen: list[Seen]) -> list[Line]:
    """Return the line of every variant that has ENOUGH_DOSES, and after it those of its controls.

    Args:
        seen: what the probe saw after one request, of every seed.
    """
    first = seen[0]
    if first.strongest is None:
        return []
    lines = []
    own = first.of("").groupby("variant", sort=False)["dose"].nunique()
    for place, variant in enumerate(own[own >= ENOUGH_DOSES].index):
        style = line_style(place)
        names = {
            "": "unlearned concepts" if first.has_erased else "retained concepts",
            "_untouched": "untouched model",
            "_retained": "retained concepts",
        }
        for ending, dashes in zip(CONTROLS, ((), *DASHES[1:3]), strict=True):
            estimates = by_dose([one.of(ending) for one in seen], str(variant))
            label = f"{variant}: {names[ending]}" if variant else names[ending]
            drawn = LineStyle(style.colour, dashes, "", is_thin=True) if ending else style
            if estimates:
                lines.append(Line(label, drawn, estimates))
    return lines


def by_dose(tables: list[pd.DataFrame], variant: str) -> dict[float, Estimate]:
    """Return the mean accuracy over concepts and seeds in a variant, by dose.

    Args:
        tables: rows of accuracy_by_dose(), of every seed.
    """
    own = [rows[rows["variant"] == variant] for rows in tables]
    found = {}
    for dose in sorted(set(own[0]["dose"])):
        here = [rows[rows["dose"] == dose] for rows in own]
        means = [float(rows["accuracy"].mean()) for rows in here]
        found[float(dose)] = of_hits(means, *counts(here))
    return found


def draw_line(axes: Axes, line: Line) -> None:
    """Draw a line, and its interval as a band unless it is that of a control."""
    doses, estimates = list(line.estimates), list(line.estimates.values())
    line.style.set_on(*axes.plot(doses, [estimate.mean for estimate in estimates]))
    if not line.style.is_thin:
        low, high = ([estimate.ends[end] for estimate in estimates] for end in (0, 1))
        colour = SERIES[line.style.colour]
        axes.fill_between(doses, low, high, color=colour, alpha=BAND, linewidth=0)


def named(line: Line) -> Cell:
    """Return the cell that names a line."""
    return Cell(line.label, line.style)


def cell_of(line: Line, dose: float) -> str | Cell:
    """Return the number of a line at a dose, with the interval that is drawn as a band."""
    if dose not in line.estimates:
        return DASH
    estimate = line.estimates[dose]
    return number(estimate.mean) if line.style.is_thin else with_interval(estimate)
