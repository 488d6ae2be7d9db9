"""How much does the order of the requests matter, beside the seed?

    python scripts/studies/order.py [OVERRIDE ...] [--output DIR]

The same concepts in four orders, and in the first order with three seeds, without regularizer and
with gradient projection: mean, standard deviation and range of the metrics after the last request.
12 runs of the sequence; order.md has their seconds. The last request is needed alone:
eval.every=last.
"""

import pandas as pd
from matplotlib.figure import Figure
from study import (
    ALL_RUNS,
    PANELS,
    Study,
    as_markdown,
    command,
    finished,
    last_rows,
    panels,
    with_stopped,
)

REGULARIZERS = {"none": "#444444", "gradproj": "#d95f02"}
ORDERS = ("paper", "reversed", "shuffle-1", "shuffle-2")
SEEDS = (0, 1, 2)


def cells() -> dict[str, list[str]]:
    """(regularizer, order, seed) in the label.

    The first order with the first seed is part of both groups.
    """
    settings = [(order, SEEDS[0]) for order in ORDERS] + [(ORDERS[0], seed) for seed in SEEDS[1:]]
    return {
        f"{name}, {order}, seed {seed}": [f"reg={name}", f"sequence.order={order}", f"seed={seed}"]
        for name in REGULARIZERS
        for order, seed in settings
    }


def varied_groups(table: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """Return the rows of last_rows by regularizer and by what varies in them, order or seed."""
    parts = table["run"].str.split(", ", expand=True).set_axis(["reg", "order", "seed"], axis=1)
    found = {}
    for varied, fixed, value in (
        ("order", "seed", f"seed {SEEDS[0]}"),
        ("seed", "order", ORDERS[0]),
    ):
        for reg, group in table[parts[fixed] == value].groupby(parts["reg"], sort=False):
            found[str(reg), varied] = group
    return found


def spread(table: pd.DataFrame) -> pd.DataFrame:
    """Of the rows of last_rows: mean, standard deviation (n - 1), smallest and largest of each
    metric, by what varies.
    """
    rows = []
    for (reg, varied), group in varied_groups(table).items():
        for metric in ("UA", "RA_I", "RA_C"):
            values = group[metric]
            row = {"run": reg, "varied": varied, "n": len(group), "metric": metric}
            row |= {"mean": values.mean(), "sd": values.std()}
            rows.append(row | {"from": values.min(), "to": values.max()})
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame) -> Figure:
    """Draw each run after the last request, a column for what varies."""
    groups = varied_groups(table)
    figure, axes = panels(1, len(PANELS))
    for axis, (metric, title) in zip(axes, PANELS.items(), strict=True):
        for place, ((reg, _), group) in enumerate(groups.items()):
            axis.plot([place] * len(group), group[metric], "o", alpha=0.6, color=REGULARIZERS[reg])
        labels = [f"{reg},\n{varied}s" for reg, varied in groups]
        axis.set(title=title, xticks=range(len(groups)), xlim=(-0.5, len(groups) - 0.5))
        axis.set_xticklabels(labels, fontsize=7)
        axis.set_ylim((-3, 103) if metric != "drift_l2" else (0, None))
    return figure


def main(study: Study) -> None:
    runs = study.run(cells(), gaps=True)
    table = last_rows({label: run.table for label, run in finished(runs).items()})
    shown = with_stopped(table, runs)
    text = (
        "Spread of the metrics after the last "
        f"request:\n\n{as_markdown(spread(table))}\n\n{ALL_RUNS}{as_markdown(shown)}"
    )
    study.write(shown, draw(table), text)


if __name__ == "__main__":
    command(main, __doc__)
