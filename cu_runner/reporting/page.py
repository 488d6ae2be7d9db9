"""The sections of a report's page."""

from __future__ import annotations

import base64
from collections.abc import Callable
from html import escape
from pathlib import Path

from cu_runner.evaluators.metrics import ENOUGH_UA
from cu_runner.reporting.contrast import Compose, again, contrast
from cu_runner.reporting.page_data import (
    Samples,
    Shown,
    costs,
    drift_by_layer,
    network_position,
    provenance,
    sample_images,
)
from cu_runner.reporting.page_html import document, legend, named, plot, scrolled, table
from cu_runner.reporting.page_plots import (
    PERCENTAGES,
    format_percent,
    layer_panel,
    metric_panel,
    publish,
    tradeoff_panel,
    write_costs,
    write_heat_map,
)
from cu_runner.runtime.lazy import pd

NAMES = PERCENTAGES | {"RA_C_retained": "RA-C retained", "drift_l2": "drift"}


MEANINGS = {
    "UA": "100 minus the mean accuracy on images prompted with the concepts unlearned so far, in percent. High: they are gone.",
    "RA-I": "accuracy on images of retained concepts of the same domain, in percent. High: the neighbours are still there.",
    "RA-C": "accuracy in the other domain, on all images, in percent; RA-C retained: on images of retained concepts only.",
    "drift": "L2 distance of the trained weights from those of the untouched model: how far, not how well.",
}


MOST_COLUMNS = 26  # of a heat map or a sample grid side by side: what a printed page holds


MOST_RUNS = 6  # columns of a table with a column per run


MOST_REQUESTS = 14  # columns of a table with a column per request


WIDE = 20  # columns from which on print is smaller


PRINTED = (
    552,
    940,
    40,
)  # pixels of sample images across and down a printed page, and of one at most


DAGGER, DOUBLE_DAGGER, DASH = "\N{DAGGER}", "\N{DOUBLE DAGGER}", "\N{EN DASH}"


def write_page(
    runs: list[Shown], plots: Path, details: int, remarks: list[str], compose: Compose
) -> str:
    """The whole page as text; its plots also as PNG and SVG files.

    Args:
        plots: existing folder for the pictures.
        details: of so many runs, the first ones, accuracy matrix, samples and configuration are given.
        remarks: lines for the end of the summary.
        compose: what makes a configuration of a command line, to check the commands that are printed.

    Raises:
        StoreError: a file of a run is damaged.
    """
    sequences = ", ".join(dict.fromkeys(shown.run.sequence for shown in runs))
    detailed = runs[:details]
    sections = {
        "Summary": summary(runs, remarks),
        "After each request": metrics(runs, plots),
        "Trade-off": tradeoff(runs, plots),
        "Every concept": heat_maps(detailed, plots),
        "Samples": samples(detailed),
        "Drift by layer": layers(runs, plots),
        "Cost": cost(runs, plots),
        "Configuration": configurations(detailed, compose),
    }
    who = runs[0].title if len(runs) == 1 else f"{len(runs)} runs"
    lead = (
        "What was forgotten (UA), what its neighbours (<span>RA-I</span>) and the rest of the model (<span>RA-C</span>) kept, and "
        "how far the weights moved (drift), after each request to unlearn a concept."
    )
    return document(f"{who} on {sequences}", lead, sections)


def show(value: float, form: str = ".1f") -> str:
    return DASH if pd.isna(value) else format(value, form)


def form_of(name: str) -> str:
    """How the numbers of a column of metrics.csv are written."""
    return "#.4g" if name == "drift_l2" else ".1f"


def footmark(mark: str) -> str:
    """Beside a number, outside its column."""
    return f'<span class="mark">{mark}</span>'


def summary(runs: list[Shown], remarks: list[str]) -> str:
    rows, notes = [], []
    for shown in runs:
        rows.append(
            [
                named(shown, shown.label),
                shown.extent,
                *(show(shown.last[name], form_of(name)) for name in NAMES),
            ]
        )
        if shown.last["UA"] < ENOUGH_UA:
            rows[-1][2] += footmark(DAGGER)
    if any(shown.last["UA"] < ENOUGH_UA for shown in runs):
        notes.append(
            f"{DAGGER} UA is under {ENOUGH_UA:.0f}: less was forgotten, so the retention is not comparable."
        )
    if stopped := [
        shown.label for shown in runs if shown.run.config["setting"].get("stop_at") is not None
    ]:
        notes.append(
            f"Requests end when the evaluator that also judges measures a given UA: {', '.join(stopped)}."
        )
    parts = [
        part
        for part in ("model", "evaluator")
        if len({shown.run.records[0][f"{part}_sha256"] for shown in runs}) > 1
    ]
    if parts:
        notes.append(
            f"Not all runs have the same weights of the {' and the '.join(parts)} (see Configuration): compare those that do."
        )
    meanings = "".join(f"<dt>{name}</dt><dd>{meaning}</dd>" for name, meaning in MEANINGS.items())
    lines = "".join(f'<p class="note">{escape(note)}</p>' for note in notes + remarks)
    numbers = table(["run", "requests", *NAMES.values()], rows, "After the last finished request")
    return f"{numbers}{contrasts(runs)}{lines}<dl>{meanings}</dl>\n"


def contrasts(runs: list[Shown]) -> str:
    """What differs between runs of one method, list of regularizers, sequence and seed."""
    alike: dict[tuple[str, str, int], list[Shown]] = {}
    for shown in runs:
        alike.setdefault((shown.run.label, shown.run.sequence, shown.run.seed), []).append(shown)
    parts = []
    for (label, *_), group in alike.items():
        if len(group) == 1:
            continue
        found = contrast([shown.run for shown in group])
        if not found:
            parts.append(
                f'<p class="note">{escape(label)}: one configuration, in {len(group)} directories.</p>'
            )
            continue
        cells = [[text_cell(value) for value in values] for values in found.values()]
        caption = f"Settings in which the runs of {label} differ"
        parts.append(run_columns(group, "setting", list(map(escape, found)), cells, caption))
    return "".join(parts)


def text_cell(value: object) -> str:
    return f'<td class="text">{DASH if value is None else escape(str(value))}</td>'


def run_columns(
    runs: list[Shown], head: str, names: list[str], cells: list[list[str]], caption: str
) -> str:
    """Tables with a column per run, MOST_RUNS side by side. names: of the rows; cells: HTML, by row, in the order of the runs."""
    return "".join(
        table(
            [head, *(named(runs[number]) for number in part)],
            [
                [name, *(row[number] for number in part)]
                for name, row in zip(names, cells, strict=True)
            ],
            caption,
        )
        for part in blocks(len(runs), MOST_RUNS)
    )


def by_request(runs: list[Shown], name: str) -> str:
    """A column of metrics.csv: rows runs, columns requests, MOST_REQUESTS side by side."""
    parts = []
    for part in blocks(max(len(shown.run.records) for shown in runs), MOST_REQUESTS):
        rows = [
            [
                named(shown),
                *(show(value, form_of(name)) for value in shown.run.table[name].reindex(part)),
            ]
            for shown in runs
        ]
        parts.append(table(["run", *map(str, part)], rows, f"{NAMES[name]} after request"))
    return "".join(parts)


def metrics(runs: list[Shown], plots: Path) -> str:
    titles = {"UA": "UA, %", "RA_I": "RA-I, %", "RA_C": "RA-C, %", "drift_l2": "drift, L2 norm"}
    drawn = publish(
        [metric_panel(runs, name, title) for name, title in titles.items()], runs, plots, "metrics"
    )
    figures = [
        plot(svg, f"{NAMES[name]} against the request, one line per run", by_request(runs, name))
        for name, svg in zip(titles, drawn, strict=True)
    ]
    return f'{legend(runs)}<div class="plots">{"".join(figures)}</div>\n'


def tradeoff(runs: list[Shown], plots: Path) -> str:
    drawn = publish(
        [tradeoff_panel(runs, name) for name in ("RA_I", "RA_C")], runs, plots, "tradeoff"
    )
    figures = []
    for name, svg in zip(("RA_I", "RA_C"), drawn, strict=True):
        rows = [[named(shown), show(shown.last["UA"]), show(shown.last[name])] for shown in runs]
        numbers = table(
            ["run", "UA", NAMES[name]],
            rows,
            f"UA and {NAMES[name]} after the last finished request",
        )
        figures.append(
            plot(
                svg,
                f"{NAMES[name]} against UA after the last finished request, one point per run",
                numbers,
            )
        )
    return (
        f"<p>Each run after its last finished request; up and to the right is better. The dashed line is UA {ENOUGH_UA:.0f}.</p>"
        f'{legend(runs)}<div class="plots">{"".join(figures)}</div>\n'
    )


def layers(runs: list[Shown], plots: Path) -> str:
    drifts = [drift_by_layer(shown.run) for shown in runs]
    found = sorted({layer for drift in drifts for layer in drift}, key=network_position)
    if not found:
        return "<p>No request is finished.</p>"
    kinds = {"keys": ".to_k", "values": ".to_v"}
    groups = {
        kind: [layer for layer in found if layer.endswith(ending)] for kind, ending in kinds.items()
    }
    groups["all other layers"] = [
        layer for layer in found if not layer.endswith(tuple(kinds.values()))
    ]
    groups = {kind: chosen for kind, chosen in groups.items() if chosen}
    drawn = publish(
        [layer_panel(runs, drifts, chosen, kind) for kind, chosen in groups.items()],
        runs,
        plots,
        "layers",
    )
    figures = []
    for (kind, chosen), svg in zip(groups.items(), drawn, strict=True):
        cells = [
            [show(drift.get(layer, float("nan")), "#.4g") for drift in drifts] for layer in chosen
        ]
        numbers = run_columns(
            runs,
            "layer",
            list(map(escape, chosen)),
            cells,
            f"L2 norm of the drift of each layer: {kind}",
        )
        figures.append(
            plot(svg, f"L2 norm of the drift of each layer, {kind}, one line per run", numbers)
        )
    return (
        "<p>L2 norm of the drift of each trained layer after the last finished request, in the order of the network.</p>"
        f'{legend(runs)}<div class="plots">{"".join(figures)}</div>\n'
    )


def cost(runs: list[Shown], plots: Path) -> str:
    found = costs(runs)
    write_costs(runs, found, plots)
    columns = {
        "train_seconds": "training, s",
        "eval_seconds": "evaluation, s",
        "train_steps": "steps",
        "peak_memory_mb": "memory, MB",
    }
    largest = found[list(columns)].max()
    rows = []
    for shown, row in zip(runs, found.to_dict("records"), strict=True):
        mark = footmark(DOUBLE_DAGGER) if row["cached"] else ""
        bars = [
            f'<td class="bar" style="--v:{100 * row[name] / (largest[name] or 1):.1f}">{row[name]:,.0f}'
            f"{mark if name == 'train_seconds' else ''}</td>"
            for name in columns
        ]
        rows.append(
            [
                named(shown, shown.label),
                shown.extent,
                *bars,
                f'<td class="text">{escape(row["device"])}</td>',
            ]
        )
    note = (
        "Seconds are wall time on the device named, shared with whatever else ran there. Sums over the finished requests; the "
        "evaluation of the untouched model, which runs share through a cache, is not counted. Memory is the peak of the process, "
        "or on a GPU that of the device."
    )
    lines = [note]
    if found["cached"].any():
        lines.append(
            f"{DOUBLE_DAGGER} Weights of some requests were found in the cache: their steps count, their training seconds do not."
        )
    head = ["run", "requests", *columns.values(), "device"]
    return "".join(f'<p class="note">{line}</p>' for line in lines) + table(
        head, rows, "Cost of all finished requests"
    )


def per_run(runs: list[Shown], section: Callable[[Shown], str]) -> str:
    return "".join(f"<h3>{escape(shown.title)}</h3>\n{section(shown)}" for shown in runs)


def heat_maps(runs: list[Shown], plots: Path) -> str:
    def section(shown: Shown) -> str:
        write_heat_map(shown, plots)
        return heat_map(shown)

    return (
        "<p>Percent of images that are recognised as the concept that they were prompted with. "
        '<span class="key"></span>kept, or not yet requested: high is good. '
        '<span class="key gone"></span>unlearned by then: low is good, and a number that grows again is a rebound. '
        "Empty: not measured.</p>\n" + per_run(runs, section)
    )


def blocks(count: int, most: int) -> list[range]:
    """So many rows or columns in parts of about the same size, at most `most` each."""
    size = -(-count // -(-count // most))
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def heat_map(shown: Shown) -> str:
    """The accuracy matrix as tables with coloured cells, side by side when there are many requests."""
    caption = f"Accuracy of every concept after each request: {shown.label}"
    parts = [
        heat_table(shown, columns, caption)
        for columns in blocks(shown.accuracy.shape[1], MOST_COLUMNS)
    ]
    return scrolled(
        f'<div class="blocks{" wide" if shown.accuracy.shape[1] > WIDE else ""}">{"".join(parts)}</div>',
        caption,
    )


def heat_table(shown: Shown, columns: range, caption: str) -> str:
    accuracy, unlearned = shown.accuracy.iloc[:, columns], shown.unlearned.iloc[:, columns]
    head = "".join(f'<th scope="col">{request}</th>' for request in accuracy.columns)
    lines = []
    for concept, values, gone in zip(
        accuracy.index, accuracy.to_numpy(), unlearned.to_numpy(), strict=True
    ):
        cells = []
        for value, is_gone in zip(values, gone, strict=True):
            kind = ' class="gone"' if is_gone else ""
            cells.append(
                "<td></td>"
                if pd.isna(value)
                else f'<td{kind} style="--v:{value:g}">{format_percent(value)}</td>'
            )
        first = ' class="first"' if concept == shown.run.config["sequence"]["retain"][0] else ""
        said = (
            f'<span class="unseen">, unlearned from request {shown.run.requested[concept]} on</span>'
            if gone.any()
            else ""
        )
        lines.append(
            f'<tr{first}><th scope="row">{escape(concept)}{said}</th>{"".join(cells)}</tr>\n'
        )
    return (
        f'<table class="heat"><caption>{escape(caption)}</caption><thead><tr><th scope="col">request</th>{head}</tr></thead>\n'
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def samples(runs: list[Shown]) -> str:
    return (
        "<p>Rows are concepts, columns requests. An image keeps its noise at every request, so that what changes in a row is the "
        'model. <span class="key gone"></span>A bar marks concepts that are unlearned by then. Empty: not measured.</p>\n'
        + per_run(runs, sample_grid)
    )


def sample_grid(shown: Shown) -> str:
    """The sample images in parts that fit a printed page, side by side and below one another."""
    found = sample_images(shown)
    rows, columns = shown.accuracy.shape
    across = blocks(columns, MOST_COLUMNS)
    cell = min(PRINTED[2], PRINTED[0] // len(across[0]))
    lines = []
    for down in blocks(rows, PRINTED[1] // cell):
        lines.append(
            f'<div class="blocks">{"".join(sample_block(shown, found, down, part, cell) for part in across)}</div>'
        )
    name = f"Sample images of {shown.label}, with {found.cross_concept}, seed {found.seed}"
    return (
        f'<p class="note">Prompts with {escape(found.cross_concept)}, seed {found.seed}.</p>'
        + scrolled("".join(lines), name)
    )


def sample_block(shown: Shown, found: Samples, rows: range, columns: range, cell: int) -> str:
    """A part of the samples as one picture, its labels, and marks on its cells. cell: pixels a side of one in print."""
    parts = [
        f'<b style="grid-area:1/{x}">{shown.accuracy.columns[column]}</b>'
        for x, column in enumerate(columns, start=2)
    ]
    parts.append(f'<img style="grid-area:2/2/{len(rows) + 2}/{len(columns) + 2}" ')
    parts[-1] += f'alt="{len(rows)} by {len(columns)} sample images" '
    parts[-1] += (
        f'src="data:image/jpeg;base64,{base64.b64encode(found.jpeg(rows, columns)).decode()}">'
    )
    for y, row in enumerate(rows, start=2):
        parts.append(f'<span style="grid-area:{y}/1">{escape(shown.accuracy.index[row])}</span>')
        for x, column in enumerate(columns, start=2):
            measured = pd.notna(shown.accuracy.iat[row, column])
            kind = "blank" if not measured else "gone" if shown.unlearned.iat[row, column] else ""
            parts.append(f'<i class="{kind}" style="grid-area:{y}/{x}"></i>')
    size = f"grid-template:auto repeat({len(rows)},var(--cell))/auto repeat({len(columns)},var(--cell))"
    return f'<div class="samples" style="--print:{cell}px;{size}">{"".join(parts)}</div>'


def configurations(runs: list[Shown], compose: Compose) -> str:
    return (
        "<p>The same command again resumes a run, or prints its table; its full configuration stands here.</p>"
        + per_run(runs, lambda shown: configuration(shown, compose))
    )


def configuration(shown: Shown, compose: Compose) -> str:
    run = shown.run
    here = run.directory.is_relative_to(Path.cwd())
    directory = run.directory.relative_to(Path.cwd()) if here else run.directory
    facts = {"directory": directory, "signature": run.records[0]["signature"], **provenance(run)}
    entries = "".join(
        f"<dt>{name}</dt><dd>{escape(str(fact))}</dd>" for name, fact in facts.items()
    )
    made = again(run, compose)
    doubt = (
        f'<p class="note">This command does not make this run again: {escape(made.doubt)}.</p>'
        if made.doubt
        else ""
    )
    text = (run.directory / "config.yaml").read_text(encoding="utf-8")
    folded = f"<details{' open' if doubt else ''}><summary>config.yaml</summary><pre>{escape(text)}</pre></details>"
    return f'<dl>{entries}</dl><pre class="command">{escape(made.command)}</pre>{doubt}{folded}\n'
