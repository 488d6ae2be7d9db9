"""Over 100 requests, does retention level off or go to zero?

    python scripts/studies/scaling.py [OVERRIDE ...] [--output DIR]

Without regularizer, with l2, gradproj, merge, and the combination of the paper's that keeps most.
The sequence is shapecanvas_style100, with two objects instead of eight: 12,524 images a run instead
of 50,096. A sequence or an experiment on the command line takes its place; the published ones have
12 requests, and 'sequence.targets=[A,B,...]' gives one more. Of the 50 styles of UnlearnCanvas 38
are not retained: the command in scaling.md names them, there are no 100. 5 runs; scaling.md has the
seconds of each.
"""

import pandas as pd
import yaml
from matplotlib.figure import Figure
from study import (
    STABLE_DIFFUSION,
    Study,
    as_markdown,
    command,
    finished,
    last_rows,
    over_requests,
    panels,
    plot_over_requests,
    with_stopped,
)

from cu_runner.concepts.entries import read_shipped
from cu_runner.runtime.paths import config_dir

REGULARIZERS = ("none", "l2", "gradproj", "merge", "gradproj_l1")
SEQUENCE = "sequence=shapecanvas_style100"
CROSS_RETAIN = "sequence.cross_retain=[tree,star]"
GONE = 5.0  # percent: a last quarter below it
LEVEL = 2.0  # points: a last quarter that has lost at most so many


NO_STYLE = "Seed_Images"  # of UnlearnCanvas: the photos that were styled


def on_stable_diffusion() -> str:
    """Return the overrides of the longest sequence on UnlearnCanvas.

    Its published targets, then every style that is not retained.
    """
    sequence = yaml.safe_load(
        (config_dir() / "sequence/unlearncanvas_style.yaml").read_text(encoding="utf-8")
    )
    others = set(read_shipped(sequence["vocabulary"])) - {
        NO_STYLE,
        *sequence["targets"],
        *sequence["retain"],
    }
    return (
        f"{STABLE_DIFFUSION} "
        f"'sequence.targets=[{','.join([*sequence['targets'], *sorted(others)])}]'"
    )


def cells(study: Study) -> dict[str, list[str]]:
    shared = [] if study.gives("sequence", "experiment") else [SEQUENCE]
    shared += [CROSS_RETAIN] if shared and not study.gives("sequence.cross_retain") else []
    return {name: [f"reg={name}", *shared] for name in REGULARIZERS}


def quarters(table: pd.DataFrame, metric: str) -> list[float]:
    """Means of a metric over the four quarters of the requests, the untouched model left out."""
    values = table.loc[table["request"] > 0, metric].reset_index(drop=True)
    return values.groupby(values.index * 4 // len(values)).mean().reindex(range(4)).tolist()


def fate(third: float, fourth: float) -> str:
    """Return what becomes of a metric from the third quarter of the requests to the fourth."""
    if fourth < GONE:
        return "gone"
    return "level" if fourth >= third - LEVEL else "falling"


def by_quarter(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """One row per run and metric: the mean of every quarter, and its fate."""
    rows = []
    for label, table in tables.items():
        for metric in ("UA", "RA_I", "RA_C"):
            means = quarters(table, metric)
            ends = {"fate": fate(means[2], means[3]) if metric != "UA" else "-"}
            rows.append(
                {"run": label, "metric": metric}
                | {f"quarter {i + 1}": mean for i, mean in enumerate(means)}
                | ends
            )
    return pd.DataFrame(rows)


def draw(tables: dict[str, pd.DataFrame]) -> Figure:
    figure, axes = panels(1, 4)
    plot_over_requests(axes, tables, dict.fromkeys(tables, "-"))
    return figure


def main(study: Study) -> None:
    runs = study.run(cells(study))
    tables = {label: run.table for label, run in finished(runs).items()}
    text = f"After the last request:\n\n{as_markdown(with_stopped(last_rows(tables), runs))}\n\n"
    text += f"Means over the quarters of the requests:\n\n{as_markdown(by_quarter(tables))}\n\n"
    text += (
        f"gone: the last quarter is below {GONE:.0f}%; level: it is at most {LEVEL:.0f} "
        "points below the third; falling: more."
    )
    study.write(
        with_stopped(over_requests(tables), runs), draw(tables), text, on_stable_diffusion()
    )


if __name__ == "__main__":
    command(main, __doc__)
