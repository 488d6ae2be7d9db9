"""The measured cells of a table as Markdown, CSV and LaTeX.

What is ours and what is published never share a column.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cu_runner.evaluators.metrics import ENOUGH_UA
from cu_runner.reporting.estimates import label_of
from cu_runner.runtime.lazy import pd

VERDICTS = ("holds", "reversed", "undecided")
SECTION = "\N{SECTION SIGN}"
DAGGER, DOUBLE_DAGGER = "\N{DAGGER}", "\N{DOUBLE DAGGER}"
LESS_FORGOTTEN = (
    f"{DAGGER} UA is under {ENOUGH_UA:.0f}: less was forgotten, so the retention is not comparable."
)
SYMBOLS = {
    f" ?{DAGGER}": r"$^\\dagger$",
    f" ?{DOUBLE_DAGGER}": r"$^\\ddagger$",
    f" ?{SECTION}": r"$^\\S$",
}


@dataclass(frozen=True)
class FilledTable:
    """A measured table and what stands around it.

    model, paper_model: on what our numbers and the published ones were obtained; None without any.
    measured, ordered: of measure() and orderings() in table_cells. missing: commands still to run.
    """

    name: str
    title: str
    model: str
    paper_model: str | None
    measured: pd.DataFrame
    footnotes: list[str]
    ordered: pd.DataFrame | None
    missing: list[str]


def ours(entry: pd.Series) -> str:
    """Return "92.7", or "92.7 (90.1 to 94.8)" of several seeds; "-" of NaN.

    The marks of footnotes stand behind it, and then both controls of a probe: "[97.9, 100.0]".
    """
    if pd.isna(entry["ours"]):
        return "-"
    ends = "" if pd.isna(entry["half"]) else f" ({entry['low']:.1f} to {entry['high']:.1f})"
    marks = "" if entry["comparable"] else f" {DAGGER}"
    marks += "" if entry["tuned"] else f" {DOUBLE_DAGGER}"
    marks += f" {SECTION}" if entry["other_code"] else ""
    controls = entry[["untouched", "retained"]]
    shown = ("-" if pd.isna(control) else f"{control:.1f}" for control in controls)
    beside = f" [{', '.join(shown)}]" if controls.notna().any() else ""
    return f"{entry['ours']:.1f}{ends}{marks}{beside}"


def paper(entry: pd.Series) -> str:
    """Return the published number; "-" where there is none."""
    return "-" if pd.isna(entry["paper"]) else f"{entry['paper']:g}"


def texts(block: pd.DataFrame, paper_model: str | None) -> pd.DataFrame:
    """Return the texts of one method: rows as in the table, columns (column, side, metric)."""
    sides = {"ours": ours} | ({"paper": paper} if paper_model else {})
    shown = {
        (column, side, metric): group.set_index("row").apply(show, axis=1)
        for column, cells in block.groupby("column", sort=False)
        for side, show in sides.items()
        for metric, group in cells.groupby("metric", sort=False)
    }
    return pd.DataFrame(shown).rename_axis(index=None)


def to_markdown(lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the first line is its head."""
    head, *rows = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def as_markdown(table: FilledTable) -> str:
    """Return the page: a table per method and column, footnotes, orderings, what is to be run."""
    published = f"; published: {table.paper_model}" if table.paper_model else ""
    parts = [f"# {table.name}: {table.title}", f"Percent. Ours: {table.model}{published}."]
    for method, block in table.measured.groupby("method", sort=False):
        shown = texts(block, table.paper_model)
        for column in shown.columns.unique(0):
            cells = pd.DataFrame(shown[column]).swaplevel(axis="columns")
            cells = cells[cells.columns.unique(0)]  # ours beside the published number of a metric
            sides = {"ours": table.model, "paper": "paper"}
            head = [f"{label_of(metric)}, {sides[side]}" for metric, side in [*cells.columns]]
            rows = cells.reset_index().to_numpy().tolist()
            parts += [f"## {method}, {column}", to_markdown([["regularizer", *head], *rows])]
    parts.append("\n".join(f"- {note}" for note in table.footnotes))
    if table.ordered is not None:
        parts += ["## Do the paper's orderings hold?", *ordering_tables(table.ordered)]
    if table.missing:
        commands = "\n".join(f"    {command}" for command in table.missing)
        parts += [f"## Not run yet: {len(table.missing)}", commands]
    return "\n\n".join(parts) + "\n"


def ordering_tables(ordered: pd.DataFrame) -> list[str]:
    """Return the counts per method, column and metric, and every pair."""
    if ordered.empty:
        return ["No pair of rows has both a published number and a run of ours."]
    ordered = ordered.assign(metric=ordered["metric"].map(label_of))
    places = ["method", "column", "metric"]
    counts = [[*places, "pairs", *VERDICTS, "of these comparable"]]
    for place, group in ordered.groupby(places, sort=False):
        found = [int((group["verdict"] == verdict).sum()) for verdict in VERDICTS]
        numbers = [len(group), *found, int(group["comparable"].sum())]
        counts.append([*map(str, place), *map(str, numbers)])
    pairs = [[*places, "higher in the paper", "lower", "paper", "ours", "verdict"]]
    for entry in ordered.to_dict("records"):
        verdict = entry["verdict"] + ("" if entry["comparable"] else f" {DAGGER}")
        difference = "{ours:+.1f} ({low:.1f} to {high:.1f})".format_map(entry)
        names = [entry[name] for name in (*places, "higher", "lower")]
        pairs.append([*names, f"{entry['paper']:+.1f}", difference, verdict])
    return [to_markdown(counts), to_markdown(pairs)]


def as_csv(table: pd.DataFrame) -> str:
    """Return a table with three decimals."""
    return table.round(3).to_csv(index=False)


def as_latex(table: FilledTable) -> str:
    """Return a booktabs table per method, published numbers in columns of their own; and notes."""
    sides = {"ours": table.model, "paper": f"paper, {table.paper_model}"}
    parts = ["% needs \\usepackage{booktabs}\n"]
    for method, block in table.measured.groupby("method", sort=False):
        shown = texts(block, table.paper_model)
        heads = [
            (method, f"{column} ({sides[side]})", label_of(metric))
            for column, side, metric in map(tuple, shown.columns)
        ]
        shown.columns = pd.MultiIndex.from_tuples(heads)
        parts.append(to_latex(shown, f"l{'r' * shown.shape[1]}", "{}"))
    notes = pd.DataFrame({"": table.footnotes})
    parts.append(to_latex(notes, "p{\\linewidth}", "{{\\footnotesize {}\\par}}", is_bare=True))
    text = "\n".join(parts)
    for symbol, command in SYMBOLS.items():
        text = re.sub(symbol, command, text)
    return text


def to_latex(shown: pd.DataFrame, columns: str, form: str, is_bare: bool = False) -> str:
    """Return texts as a tabular, escaped.

    form: of a cell. is_bare: without rules, heads and names of rows.
    """
    styler = shown.style.format(form, escape="latex")
    for axis in (0, 1):
        styler = (
            styler.hide(axis=axis) if is_bare else styler.format_index(escape="latex", axis=axis)
        )
    return styler.to_latex(hrules=not is_bare, column_format=columns, multicol_align="c")
