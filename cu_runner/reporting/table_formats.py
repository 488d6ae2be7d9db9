"""The measured cells of a table (tables.py) as Markdown, CSV and LaTeX. What is ours and what is published never share a column."""

from __future__ import annotations

from collections.abc import Callable

from cu_runner.runtime.lazy import pd

NAMES = {"UA": "UA", "RA_I": "RA-I", "RA_C": "RA-C", "RA_C_retained": "RA-C retained"}


VERDICTS = ("holds", "reversed", "undecided")


def ours(entry: pd.Series, marks: tuple[str, str], plus_minus: str) -> str:
    """ "92.7", "92.7 +- 1.3", marked when its retention is not comparable, and when its settings are not tuned; "-" of NaN."""
    if pd.isna(entry["ours"]):
        return "-"
    text = f"{entry['ours']:.1f}" + (
        "" if pd.isna(entry["half"]) else f" {plus_minus} {entry['half']:.1f}"
    )
    shown = [
        mark
        for mark, holds in zip(marks, (entry["comparable"], entry["tuned"]), strict=True)
        if not holds
    ]
    return text + "".join(shown)


def paper(entry: pd.Series) -> str:
    return "-" if pd.isna(entry["paper"]) else f"{entry['paper']:g}"


def by_row(group: pd.DataFrame, show: Callable[[pd.Series], str]) -> dict[str, dict[str, str]]:
    """row -> metric -> text."""
    found: dict[str, dict[str, str]] = {}
    for _, entry in group.iterrows():
        found.setdefault(entry["row"], {})[entry["metric"]] = show(entry)
    return found


def grid(lines: list[list[str]]) -> list[str]:
    """A Markdown table; the first line is its head."""
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return [
        f"| {' | '.join(line)} |" for line in (escaped[0], ["---"] * len(escaped[0]), *escaped[1:])
    ]


def as_markdown(
    name: str,
    title: str,
    model: str,
    paper_model: str | None,
    metrics: list[str],
    measured: pd.DataFrame,
    footnotes: list[str],
    ordered: pd.DataFrame | None,
    missing: list[str],
) -> str:
    """The whole page: one table per method and column, what the marks mean, the ordering check, and the commands still to run.

    Args:
        model, paper_model: on what our numbers and the published ones were obtained; None without published numbers.
        footnotes: lines below the tables.
        ordered: of tables.orderings().
        missing: command lines of the runs that are not there.
    """
    lines = [
        f"# {name}: {title}",
        "",
        f"Percent. Ours: {model}" + (f"; published: {paper_model}." if paper_model else "."),
    ]
    for (method, column), group in measured.groupby(["method", "column"], sort=False):
        values = by_row(
            group,
            lambda entry: ours(entry, (" \N{DAGGER}", " \N{DOUBLE DAGGER}"), "\N{PLUS-MINUS SIGN}"),
        )
        published = by_row(group, paper)
        head = ["regularizer"]
        for metric in metrics:
            head += [f"{NAMES[metric]}, {model}"] + (
                [f"{NAMES[metric]}, paper"] if paper_model else []
            )
        rows = [head]
        for row, cells in values.items():
            shown = [
                [cells[metric]] + ([published[row][metric]] if paper_model else [])
                for metric in metrics
            ]
            rows.append([row, *(text for pair in shown for text in pair)])
        lines += ["", f"## {method}, {column}", "", *grid(rows)]
    lines += ["", *(f"- {note}" for note in footnotes)]
    if ordered is not None:
        lines += ["", "## Do the paper's orderings hold?", "", *ordering_lines(ordered)]
    if missing:
        lines += [
            "",
            f"## Not run yet: {len(missing)}",
            "",
            *(f"    {command}" for command in missing),
        ]
    return "\n".join(lines) + "\n"


def ordering_lines(ordered: pd.DataFrame) -> list[str]:
    """Counts per method, column and metric, then every pair."""
    if ordered.empty:
        return ["No pair of rows has both a published number and a run of ours."]
    counts = [["method", "column", "metric", "pairs", *VERDICTS, "of these comparable"]]
    for (method, column, metric), group in ordered.groupby(
        ["method", "column", "metric"], sort=False
    ):
        found = group["verdict"].value_counts()
        numbers = [
            len(group),
            *(found.get(verdict, 0) for verdict in VERDICTS),
            int(group["comparable"].sum()),
        ]
        counts.append([method, column, NAMES[metric], *map(str, numbers)])
    pairs = [
        ["method", "column", "metric", "higher in the paper", "lower", "paper", "ours", "verdict"]
    ]
    for entry in ordered.itertuples():
        verdict = entry.verdict if entry.comparable else f"{entry.verdict} \N{DAGGER}"
        difference = f"{entry.ours:+.1f} ({entry.low:.1f} to {entry.high:.1f})"
        pairs.append(
            [
                entry.method,
                entry.column,
                NAMES[entry.metric],
                entry.higher,
                entry.lower,
                f"{entry.paper:+.1f}",
                difference,
                verdict,
            ]
        )
    return [*grid(counts), "", *grid(pairs)]


def as_csv(table: pd.DataFrame) -> str:
    return table.round(3).to_csv(index=False)


def as_latex(
    model: str,
    paper_model: str | None,
    metrics: list[str],
    measured: pd.DataFrame,
    footnotes: list[str],
) -> str:
    """A booktabs table per method: rows by columns and metrics, ours and, in columns of their own, the published ones; notes."""
    parts = ["% needs \\usepackage{booktabs}"]
    for method, block in measured.groupby("method", sort=False):
        columns = list(dict.fromkeys(block["column"]))
        sides = [(model, lambda entry: ours(entry, ("$^\\dagger$", "$^\\ddagger$"), "$\\pm$"))] + (
            [(f"paper, {paper_model}", paper)] if paper_model else []
        )
        heads = [(column, side) for column in columns for side, _ in sides]
        shown = [
            by_row(block[block["column"] == column], show)
            for column in columns
            for _, show in sides
        ]
        width = len(metrics)
        parts += ["\\begin{tabular}{l" + "r" * width * len(heads) + "}", "\\toprule"]
        spans = [
            f"\\multicolumn{{{width}}}{{c}}{{{escape(f'{column} ({side})')}}}"
            for column, side in heads
        ]
        parts.append(f"{escape(str(method))} & " + " & ".join(spans) + " \\\\")
        parts.append(
            "".join(
                f"\\cmidrule(lr){{{2 + width * i}-{1 + width * (i + 1)}}}"
                for i in range(len(heads))
            )
        )
        parts.append(
            " & ".join(["", *(NAMES[metric] for _ in heads for metric in metrics)]) + " \\\\"
        )
        parts.append("\\midrule")
        for row in shown[0]:
            parts.append(
                " & ".join(
                    [escape(row), *(cells[row][metric] for cells in shown for metric in metrics)]
                )
                + " \\\\"
            )
        parts += ["\\bottomrule", "\\end{tabular}", ""]
    return "\n".join(
        [*parts, *(f"{{\\footnotesize {escape(note)}\\par}}" for note in footnotes), ""]
    )


def escape(text: str) -> str:
    """Text for LaTeX."""
    named = {"\\": "textbackslash", "~": "textasciitilde", "^": "textasciicircum"}
    shown = {"\N{DAGGER}": "$^\\dagger$", "\N{DOUBLE DAGGER}": "$^\\ddagger$"}
    shown |= {character: f"\\{character}" for character in "&%$#_{}"} | {
        key: f"\\{name}{{}}" for key, name in named.items()
    }
    return "".join(shown.get(character, character) for character in text)
