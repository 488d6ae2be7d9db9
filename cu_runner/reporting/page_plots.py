"""The plots of a report: drawn by matplotlib, written as PNG and SVG.

And as SVG text for a page, coloured by its CSS variables.
"""

from __future__ import annotations

import io
import logging
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from cu_runner.evaluators.metrics import ENOUGH_UA
from cu_runner.reporting.estimates import NOTHING, SHARES, Estimate
from cu_runner.reporting.page_data import short_layer
from cu_runner.reporting.page_groups import Group
from cu_runner.runtime.lazy import pd

logging.getLogger("matplotlib").setLevel(logging.ERROR)


# name of the CSS variable -> colour on light and on dark paper. The series are distinct in all
# three kinds of colour blindness (smallest OKLab distance 0.10, under the simulation of Machado et
# al. 2009) and have a contrast of at least 3 to the paper.
COLOURS = {
    "paper": ("#ffffff", "#15181d"),
    "ink": ("#1d2430", "#e4e7ec"),
    "quiet": ("#5b6472", "#a3abb8"),
    "rule": ("#d9dde3", "#343a44"),
    "series-0": ("#1933c2", "#4a74f2"),
    "series-1": ("#7e4a00", "#f09a07"),
    "series-2": ("#26847a", "#b2f2b3"),
    "series-3": ("#d55ce2", "#e3aefb"),
    "series-4": ("#9a9a06", "#d3412c"),
    "series-5": ("#2d333a", "#8b929b"),
    # Of a cell of a heat map at 100%: black numbers on light and white ones on dark have a contrast
    # of at least 4.5 to every shade.
    "known": ("#5b93d6", "#2f6fb5"),  # a concept that the model is to keep
    "gone": ("#e07b45", "#b5551f"),  # an unlearned concept
    "number": ("#000000", "#ffffff"),
}
SERIES = [light for name, (light, _) in COLOURS.items() if name.startswith("series")]
DASHES = ((), (5, 2), (1.5, 1.5), (7, 2, 1.5, 2))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MOST_NUMBERS = 600  # cells of a heat map that still have room for their numbers
MOST_TICKS = 24
BAND, BARS = 0.16, 0.55  # opacity of intervals
THIN = 0.8  # points
STYLE = mpl.RcParams(
    {
        "font.size": 9,
        "text.color": COLOURS["ink"][0],
        "text.parse_math": False,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.titlecolor": COLOURS["ink"][0],
        "axes.labelcolor": COLOURS["quiet"][0],
        "axes.edgecolor": COLOURS["rule"][0],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": COLOURS["rule"][0],
        "grid.linewidth": 0.6,
        "xtick.color": COLOURS["rule"][0],
        "xtick.labelcolor": COLOURS["quiet"][0],
        "ytick.color": COLOURS["rule"][0],
        "ytick.labelcolor": COLOURS["quiet"][0],
        "lines.linewidth": 1.4,
        "lines.markersize": 3.6,
        "legend.frameon": False,
        "svg.hashsalt": "report",
    }
)


Panel = Callable[[Axes], None]
Legend = list[tuple[str, "LineStyle"]]


@dataclass(frozen=True)
class LineStyle:
    """Colour, dashes and marker of a group; 168 groups differ in at least one.

    is_thin: of a line that another is compared with; it has no marker.
    """

    colour: int
    dashes: tuple[float, ...]
    marker: str
    is_thin: bool = False

    def set_on(self, line: Line2D) -> Line2D:
        """Give a line of matplotlib this style, and return it."""
        dashes = (0, self.dashes) if self.dashes else "-"
        line.set(color=SERIES[self.colour], linestyle=dashes, marker=self.marker)
        if self.is_thin:
            line.set(linewidth=THIN)
        return line


def line_style(number: int) -> LineStyle:
    """Return the style of a group by its number: colours first, then dashes; markers turn."""
    colour, turn = number % len(SERIES), number // len(SERIES)
    return LineStyle(colour, DASHES[turn % len(DASHES)], MARKERS[number % len(MARKERS)])


def publish(panels: list[Panel], groups: list[Group], folder: Path, stem: str) -> list[str]:
    """Write the panels with a legend to `folder` as stem.png and stem.svg.

    Returns:
        Each panel alone as SVG text for a page.
    """
    legend = [(group.title, line_style(group.number)) for group in groups]
    with mpl.rc_context(STYLE):
        save(draw(panels, legend), folder / stem)
        return [inline(draw([panel], []), f"{stem}-{i}") for i, panel in enumerate(panels)]


def draw(panels: list[Panel], legend: Legend) -> Figure:
    """Return panels in a row, and below them a legend."""
    width = 4.1 * len(panels)  # inches
    entry = 0.6 + 0.07 * max((len(label) for label, _ in legend), default=0)
    columns = max(1, min(len(legend), int(width / entry)))
    lines = -(-len(legend) // columns)
    figure = Figure(figsize=(width, 2.9 + 0.19 * lines), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axes)
    if legend:
        handles = [style.set_on(Line2D([], [])) for _, style in legend]
        figure.legend(
            handles,
            [label for label, _ in legend],
            loc="outside lower center",
            ncols=columns,
            fontsize=8,
        )
    return figure


def save(figure: Figure, stem: Path) -> None:
    """Write a figure as PNG and SVG."""
    with warnings.catch_warnings():
        # a script that the font lacks is drawn as boxes; the page has the names as text
        warnings.simplefilter("ignore")
        figure.savefig(f"{stem}.png", dpi=150)
        figure.set_layout_engine("none")  # what has its place keeps it
        figure.savefig(f"{stem}.svg", metadata={"Date": None})


def inline(figure: Figure, name: str) -> str:
    """Return SVG to stand in an HTML page.

    It has no namespaces, ids of its own, the page's font, and colours as CSS variables.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg ") :]
    text = re.sub(
        r"<metadata>.*?</metadata>|<style .*?</style>|<!--.*?-->", "", text, flags=re.DOTALL
    )
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    text = f'<svg viewBox="{box[1]}"' + text[text.index(">") :]
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", text).replace("xlink:href", "href")
    text = re.sub(r"font: [^;\"]*?([\d.]+px)[^;\"]*", r"font-size: \1", text)
    for variable, (light, _) in COLOURS.items():
        text = text.replace(light, f"var(--{variable})")
    return re.sub(r"\n\s*", "\n", text).strip()


def draw_means(axes: Axes, group: Group, estimates: list[Estimate]) -> None:
    """Draw the line of a group, and as a band the interval over its seeds; gaps where it is NaN.

    Requests that were not evaluated are passed over.
    """
    places = [
        place
        for place, estimate in enumerate(estimates)
        if place in group.evaluated or not math.isnan(estimate.mean)
    ]
    style = line_style(group.number)
    shown = [estimates[place] for place in places]
    style.set_on(*axes.plot(places, [estimate.mean for estimate in shown]))
    if len(group.runs) > 1:
        low, high = ([estimate.ends[end] for estimate in shown] for end in (0, 1))
        axes.fill_between(places, low, high, color=SERIES[style.colour], alpha=BAND, linewidth=0)


def metric_panel(groups: list[Group], name: str, title: str) -> Panel:
    """Return a panel of a column of metrics.csv against the request, groups over one another."""

    def panel(axes: Axes) -> None:
        for group in groups:
            draw_means(axes, group, group.estimates[name])
        most = max(group.last for group in groups)
        axes.set(title=title, xlabel="request", xlim=(-0.04 * most - 0.1, 1.04 * most + 0.1))
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
        if name in SHARES:
            axes.set_ylim(-3, 103)
        else:
            axes.set_ylim(bottom=0)

    return panel


def tradeoff_panel(groups: list[Group], name: str) -> Panel:
    """Return a panel of a retention against UA after the last finished request.

    Right of the line, retention can be compared. Of several seeds, bars are the intervals of both.
    """

    def panel(axes: Axes) -> None:
        lowest = 88.0
        for group in groups:
            x, y = group.at_end("UA"), group.at_end(name)
            if math.isnan(x.mean):
                continue
            style = line_style(group.number)
            style.set_on(*axes.plot(x.mean, y.mean, markersize=7)).set_linestyle("")
            lowest = min(lowest, x.mean)
            if len(group.runs) > 1:
                for ends in ((x.ends, (y.mean, y.mean)), ((x.mean, x.mean), y.ends)):
                    axes.plot(*ends, color=SERIES[style.colour], alpha=BARS, linewidth=1.2)
                lowest = min(lowest, x.ends[0])
        axes.axvline(ENOUGH_UA, color=COLOURS["quiet"][0], linewidth=0.8, linestyle=(0, (4, 3)))
        title = f"{SHARES[name]} against UA, %"
        axes.set(title=title, xlabel="UA", ylim=(-3, 103), xlim=(lowest - 2, 101))

    return panel


def layer_panel(
    groups: list[Group], norms: list[dict[str, Estimate]], layers: list[str], title: str
) -> Panel:
    """Return a panel of the L2 drift of these layers, in network order, groups over one another.

    norms: of each group by layer.
    """

    def panel(axes: Axes) -> None:
        for group, known in zip(groups, norms, strict=True):
            draw_means(axes, group, [known.get(layer, NOTHING) for layer in layers])
        ticks = range(0, len(layers), -(-len(layers) // MOST_TICKS))
        axes.set_xticks(
            ticks, [short_layer(layers[tick]) for tick in ticks], rotation=90, fontsize=7.5
        )
        axes.set(title=title)
        axes.set_ylim(bottom=0)

    return panel


def write_costs(groups: list[Group], cost: pd.DataFrame, folder: Path) -> None:
    """Write cost.png and cost.svg: a bar per group for seconds, steps and memory."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 1.2 + 0.24 * len(groups)), layout="constrained")
        seconds, steps, memory = figure.subplots(1, 3, sharey=True)
        places, first, second = range(len(groups)), COLOURS["known"][0], COLOURS["quiet"][0]
        seconds.barh(places, cost["train_seconds"], color=first, label="training")
        seconds.barh(
            places,
            cost["eval_seconds"],
            left=cost["train_seconds"],
            color=second,
            label="evaluation",
        )
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
        steps.barh(places, cost["train_steps"], color=first)
        memory.barh(places, cost["peak_memory_mb"], color=first)
        titles = {seconds: "seconds", steps: "training steps", memory: "peak memory, MB"}
        for axes, title in titles.items():
            axes.set(title=title)
            axes.grid(axis="y", visible=False)
        seconds.set_yticks(places, [group.title for group in groups])
        seconds.invert_yaxis()
        save(figure, folder / "cost")


def write_heat_map(group: Group, folder: Path) -> None:
    """Write accuracy-<number>-<first run>.png and .svg: rows concepts, columns requests."""
    title = f"{group.title}: accuracy, %"
    stem = folder / f"accuracy-{group.number + 1}-{group.first.directory.name}"
    draw_heat_map(title, group.accuracy, group.unlearned.to_numpy(), stem)


def draw_heat_map(title: str, table: pd.DataFrame, unlearned: np.ndarray, stem: Path) -> None:
    """Write a heat map of percentages as stem.png and stem.svg: rows concepts, columns requests.

    Args:
        table: NaN where not measured. unlearned: cells of another colour, of the same shape.
    """
    accuracy = table.to_numpy()
    rows, columns = accuracy.shape
    roomy = rows * columns <= MOST_NUMBERS
    width, height = (0.42, 0.23) if roomy else (0.15, 0.15)  # inches of a cell
    size = max(2.2 + width * columns, 0.09 * len(title)), 0.9 + height * rows
    with mpl.rc_context(STYLE), mpl.rc_context({"axes.grid": False}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        gone, known = (to_rgb(COLOURS[name][0]) for name in ("gone", "known"))
        full = np.where(unlearned[..., None], gone, known)
        share = np.nan_to_num(accuracy).clip(0, 100)[..., None] / 100
        x, y = np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5
        mesh = axes.pcolormesh(x, y, 1 - share * (1 - full), rasterized=not roomy)
        axes.invert_yaxis()
        if roomy:
            mesh.set(edgecolor=COLOURS["paper"][0], linewidth=0.8)
            for row, column in np.argwhere(~np.isnan(accuracy)):
                text = format_percent(accuracy[row, column])
                colour = COLOURS["number"][0]
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
        below, left = unlearned.nonzero()
        axes.hlines(below + 0.46, left - 0.5, left + 0.5, color=COLOURS["gone"][0], linewidth=1.5)
        step = 1 if roomy else 5
        axes.set_xticks(range(0, columns, step), map(str, table.columns[::step]))
        axes.set_yticks(range(rows), table.index, fontsize=9 if roomy else 7)
        axes.set_xlabel("request")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        save(figure, stem)


def format_percent(value: float) -> str:
    """Return "87.5", "100"."""
    return f"{value:.1f}".removesuffix(".0")
