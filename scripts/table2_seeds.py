"""Table 2 over seeds whose runs were made on different days: docs/table2.csv has a line per run.

    cu-table table2 --run --seeds 1,2 eval.every=last               # makes the runs
    python scripts/table2_seeds.py --seeds 1,2 eval.every=last      # takes in those that are done
    python scripts/table2_seeds.py                                  # the page again, no run needed

Writes docs/table2.md: what `cu-table table2 --seeds ...` prints where all runs are on one machine,
without its mark of runs by other code; the page names the commits. A line whose run would have
another signature today is refused by name.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from cu_runner.cli.console import say
from cu_runner.cli.failures import one_line_failures
from cu_runner.cli.fill_table import footnotes
from cu_runner.cli.table import seed_list
from cu_runner.reporting.estimates import image_counts, of_shares
from cu_runner.reporting.table_cells import Cell, Measured, as_frame, make_cells, orderings, rows_of
from cu_runner.reporting.table_formats import FilledTable, as_markdown
from cu_runner.reporting.table_spec import Table, read_table
from cu_runner.schema.errors import ConfigError

NAME = "table2"
DOCS = Path(__file__).parent.parent / "docs"
LINES, PAGE = DOCS / f"{NAME}.csv", DOCS / f"{NAME}.md"
KEY = ["column", "row", "seed"]


def finished(cells: list[Cell], metrics: list[str]) -> Iterator[dict[str, object]]:
    """Yield a line per complete run: its metrics after the last request, on how many images each
    rests, and the commit of the code that made it.
    """
    for cell in cells:
        for run in cell.runs:
            end = run.records[-1]
            counts = image_counts(run, end.index)
            line = {"column": cell.column, "row": cell.row, "seed": run.seed}
            line |= {metric: round(end.row.metrics[metric], 3) for metric in metrics}
            line |= {f"{metric}_images": counts[metric] for metric in metrics}
            yield line | {"run": run.directory.name, "commit": str(end.git_commit)[:7]}


def require_same(lines: pd.DataFrame, cells: list[Cell], remedy: str) -> None:
    """Refuse with ConfigError a line whose run is not that of its place in the table."""
    runs = {
        (cell.column, cell.row, plan.spine.seed): plan.directory.name
        for cell in cells
        for plan in cell.plans
    }
    for line in lines.itertuples():
        if line.run != (today := runs.get((line.column, line.row, line.seed))):
            raise ConfigError(
                f"{line.column}, {line.row}, seed {line.seed}: {line.run} is not the run of the "
                f"table, which is {today or 'none'}; {remedy}"
            )


def require_all(lines: pd.DataFrame, cells: list[Cell]) -> None:
    """Refuse with ConfigError a cell that has no line."""
    known = set(zip(lines["column"], lines["row"], strict=True))
    if lacking := [cell for cell in cells if (cell.column, cell.row) not in known]:
        raise ConfigError(f"{LINES}: no run of {lacking[0].column}, {lacking[0].row}; take one in")


def measured(lines: pd.DataFrame, table: Table, cells: list[Cell]) -> pd.DataFrame:
    """Return what table_cells.measure() does of runs, from the lines in their place."""
    rows: list[Measured] = []
    for cell in cells:
        here = lines[(lines["column"] == cell.column) & (lines["row"] == cell.row)]
        known = {
            metric: of_shares(here[metric].tolist(), here[f"{metric}_images"].iloc[0])
            for metric in table.metrics
        }
        rows += rows_of(cell, table, known, here["run"].tolist(), other_code=False)
    return as_frame(rows)


def page(lines: pd.DataFrame, table: Table, cells: list[Cell]) -> str:
    """Return docs/table2.md."""
    numbers, seeds = measured(lines, table, cells), sorted(set(lines["seed"]))
    made = ", ".join(sorted(set(lines["commit"])))
    numbers_of = lines.groupby(["column", "row"]).size()
    fewer = [f"{column}, {row}: {n}" for (column, row), n in numbers_of.items() if n < len(seeds)]
    notes = [
        "After the last of 12 requests; docs/results.md says what it shows. Each run is a line of "
        f"{LINES.name}; they were made by the code of the commits {made}."
    ]
    notes += [f"Fewer seeds: {'; '.join(fewer)}."] if fewer else []
    filled = FilledTable(
        NAME,
        table.title,
        next(iter(table.experiments.values())).model,
        paper_model=table.targets.model,
        measured=numbers,
        footnotes=notes + footnotes(table, numbers, seeds),
        ordered=orderings(numbers, table.targets.tolerance),
        missing=[],
    )
    return as_markdown(filled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="of the runs that are taken in")
    parser.add_argument("--seeds", type=seed_list, default=[], help="of the runs to take in")
    arguments = parser.parse_intermixed_args()
    if arguments.overrides and not arguments.seeds:
        parser.error("overrides are those of runs to take in: give --seeds too")
    with one_line_failures("table2_seeds"):
        _, table = read_table(NAME)
        experiment = next(iter(table.experiments.values()))
        lines = pd.read_csv(LINES)
        seeds = sorted({*map(int, lines["seed"]), *arguments.seeds})
        cells = list(make_cells(table, experiment, seeds, [], []))
        if arguments.seeds:
            asked = list(make_cells(table, experiment, arguments.seeds, arguments.overrides, []))
            found = pd.DataFrame(finished(asked, table.metrics), columns=lines.columns)
            require_same(found, cells, "leave out the overrides that change results")
            say(f"taken in: {len(found)} of {sum(len(cell.plans) for cell in asked)} runs")
            lines = pd.concat([lines, found]).drop_duplicates(KEY, keep="last")
        require_same(lines, cells, f"take its line out of {LINES}, or take in a run of today")
        require_all(lines, cells)
        order = {(cell.column, cell.row): place for place, cell in enumerate(cells)}
        places = [order[place] for place in zip(lines["column"], lines["row"], strict=True)]
        lines = lines.assign(place=places).sort_values(["place", "seed"]).drop(columns="place")
        lines.to_csv(LINES, index=False)
        PAGE.write_text(page(lines, table, cells), encoding="utf-8")


if __name__ == "__main__":
    main()
