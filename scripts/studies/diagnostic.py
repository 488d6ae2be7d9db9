"""How does plain sequential unlearning collapse, and does drift go with it? (Lee et al. 2026, arXiv
2511.07970)

    python scripts/studies/diagnostic.py [OVERRIDE ...] [--output DIR]

ConAbl without regularizer, three seeds: UA, RA-I, RA-C and drift after every request; the request
at which retention has halved; the correlation of drift with retention over requests 0 to N of a
run; how far the curves of RA-I and RA-C lie from the paper's. 3 runs of the sequence;
diagnostic.md has their seconds.
"""

import pandas as pd
from matplotlib.figure import Figure
from study import (
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
from study_statistics import pearson, spearman

from cu_runner.runtime.paths import shipped_dir

SEEDS = (0, 1, 2)
RETENTION = {"RA_I": "RA-I", "RA_C": "RA-C"}


def cells() -> dict[str, list[str]]:
    return {f"seed {seed}": ["reg=none", f"seed={seed}"] for seed in SEEDS}


def halved(table: pd.DataFrame, metric: str) -> int | str:
    """Return the first request after which the metric is below half of the untouched model's.

    "never" if there is none, "-" if it was not measured.
    """
    if pd.isna(table[metric].iloc[0]) or table[metric].iloc[1:].isna().all():
        return "-"
    below = table.loc[table[metric] < table[metric].iloc[0] / 2, "request"]
    return int(below.iloc[0]) if len(below) else "never"


def correlations(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Drift against retention over the requests, one row per run and metric, with the request at
    which the metric has halved.
    """
    rows = []
    for label, table in tables.items():
        for metric, title in RETENTION.items():
            r, rho = (measure(table["drift_l2"], table[metric]) for measure in (pearson, spearman))
            row = {"run": label, "drift against": title, "n": r.number}
            row |= {"Pearson r": r.value, "r from": r.low, "r to": r.high}
            row |= {"Spearman rho": rho.value, "rho from": rho.low, "rho to": rho.high}
            rows.append(row | {"halved at request": halved(table, metric)})
    return pd.DataFrame(rows)


def beside_paper(tables: dict[str, pd.DataFrame], domain: str) -> pd.DataFrame:
    """Compare retention over the requests with the paper's plain curves of a domain.

    Means over the requests that both have, in percent, and the mean of the absolute differences in
    percentage points. No rows for a domain that the paper has no curve of.
    """
    curves = pd.read_csv(shipped_dir("tables") / "paper_curves.csv", comment="#")
    curves = curves[(curves["column"] == domain) & (curves["row"] == "sequential")]
    rows = []
    for label, table in tables.items():
        for metric, title in RETENTION.items():
            paper = curves[curves["metric"] == metric].set_index("request")["percent"]
            both = pd.concat([table.set_index("request")[metric], paper], axis=1).dropna()
            if both.empty:
                continue
            ours, theirs = both.iloc[:, 0], both.iloc[:, 1]
            row = {"run": label, "metric": title, "requests": len(both), "mean": ours.mean()}
            row |= {"paper's mean": theirs.mean()}
            rows.append(row | {"mean absolute difference": (ours - theirs).abs().mean()})
    return pd.DataFrame(rows)


def draw(tables: dict[str, pd.DataFrame]) -> Figure:
    """Draw the metrics over the requests, then retention against drift."""
    figure, axes = panels(2, 3)
    plot_over_requests(axes[:4], tables)
    for axis, (metric, title) in zip(axes[4:], RETENTION.items(), strict=True):
        for table in tables.values():
            axis.plot(table["drift_l2"], table[metric], "o", markersize=4)
        axis.set(xlabel="drift, L2 norm", title=f"{title} (%)", ylim=(-3, 103))
    return figure


def main(study: Study) -> None:
    runs = study.run(cells())
    tables = {label: run.table for label, run in finished(runs).items()}
    text = f"After the last request:\n\n{as_markdown(with_stopped(last_rows(tables), runs))}\n\n"
    text += (
        "Drift and retention over the requests, with 95% "
        f"intervals:\n\n{as_markdown(correlations(tables), digits=3)}\n\n"
    )
    compared = beside_paper(tables, study.plan([]).sequence.build().domain)
    if len(compared):
        text += (
            "Beside the paper's curves of ConAbl without regularizer on UnlearnCanvas "
            f"(`scripts/tables/paper_curves.csv`):\n\n{as_markdown(compared)}\n\n"
        )
    text += (
        "The requests of one run follow from each other; the intervals take them as "
        "independent and are too narrow."
    )
    study.write(with_stopped(over_requests(tables), runs), draw(tables), text)


if __name__ == "__main__":
    command(main, __doc__)
