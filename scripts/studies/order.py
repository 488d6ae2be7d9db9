"""How much does the order of the requests matter, beside the seed?

    python scripts/studies/order.py [OVERRIDE ...] [--output DIR]

The same concepts in four orders, and in the first order with three seeds, without regularizer and
with gradient projection: mean, standard deviation and range of the metrics after the last request.
12 runs of the sequence; order.md has their seconds. The last request is needed alone, for all but
the picture: eval.every=last.
"""

import pandas as pd
from matplotlib.figure import Figure
from study import (
    Study,
    as_markdown,
    command,
    finished,
    last_rows,
    panels,
    plot_over_requests,
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


def spread(table: pd.DataFrame) -> pd.DataFrame:
    """Of the rows of last_rows: mean, standard deviation (n - 1), smallest and largest of each
    metric, by what varies.
    """
    parts = table["run"].str.split(", ", expand=True).set_axis(["reg", "order", "seed"], axis=1)
    rows = []
    for varied, fixed, value in (
        ("order", "seed", f"seed {SEEDS[0]}"),
        ("seed", "order", ORDERS[0]),
    ):
        for reg, group in table[parts[fixed] == value].groupby(parts["reg"], sort=False):
            for metric in ("UA", "RA_I", "RA_C"):
                row = {
                    "run": reg,
                    "varied": varied,
                    "n": len(group),
                    "metric": metric,
                    "mean": group[metric].mean(),
                }
                rows.append(
                    row
                    | {
                        "sd": group[metric].std(),
                        "from": group[metric].min(),
                        "to": group[metric].max(),
                    }
                )
    return pd.DataFrame(rows)


def draw(tables: dict[str, pd.DataFrame]) -> Figure:
    """Solid: orders. Dotted: seeds."""
    figure, axes = panels(1, 4)
    plot_over_requests(
        axes,
        {label: table[table["RA_I"].notna()] for label, table in tables.items()},
        {label: "-" if label.endswith(f"seed {SEEDS[0]}") else ":" for label in tables},
    )
    kinds = {}
    for axis in axes:
        for line in axis.get_lines():
            name = line.get_label().partition(",")[0]
            line.set_color(REGULARIZERS[name])
            kinds.setdefault(
                f"{name}, {'orders' if line.get_linestyle() == '-' else 'other seeds'}", line
            )
    axes[0].legend(kinds.values(), kinds, fontsize=7, loc="lower right")
    return figure


def main(study: Study) -> None:
    runs = study.run(cells(), gaps=True)
    tables = {label: run.table for label, run in finished(runs).items()}
    table = last_rows(tables)
    shown = with_stopped(table, runs)
    text = (
        "Spread of the metrics after the last "
        f"request:\n\n{as_markdown(spread(table))}\n\nAll runs:\n\n{as_markdown(shown)}"
    )
    study.write(shown, draw(tables), text)


if __name__ == "__main__":
    command(main, __doc__)
