"""Runs of several seeds: their labels, and the metrics over the requests with intervals.

A study takes `seed=0,1,2` on its command line; the label of a run ends with its seed.
"""

import math

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from study import PANELS, Study, panels

from cu_runner.reporting.diagnosis import COUNTED, with_images
from cu_runner.reporting.intervals import of_sum, over_images, over_seeds, widest
from cu_runner.store.run_record import RunRecord

SEEDS = ["0", "1", "2"]
MARK = ", seed "
METRICS = ("UA", "RA_I", "RA_C")
INTERVALS = (
    "from, to: the 95% interval over seeds (Student's t), never narrower than that over images "
    "(Wilson's)."
)
ONE_SEED = "One seed each: from, to is the 95% interval over images (Wilson's) alone."
PAIRED = (
    "from, to: the 95% interval over seeds, paired (Student's t), never narrower than that over "
    "images (Newcombe's)."
)
PAIRED_ONCE = "One seed each: from, to is the 95% interval over images (Newcombe's) alone."


def take_seeds(study: Study) -> tuple[list[int], Study]:
    """Return the seeds that the user names, or three, and the study without them.

    Raises ValueError for one that is no whole number.
    """
    named, study = study.take("seed", SEEDS)
    if wrong := [seed for seed in named if not seed.isdecimal()]:
        raise ValueError(f"seed={wrong[0]}: a study takes whole numbers, seed=0,1,2")
    return [int(seed) for seed in named], study


def with_seeds(cells: dict[str, list[str]], seeds: list[int]) -> dict[str, list[str]]:
    """Return every cell once per seed, labelled "LABEL, seed N"."""
    return {
        f"{label}{MARK}{seed}": [*cell, f"seed={seed}"]
        for label, cell in cells.items()
        for seed in seeds
    }


def without_seed(label: str) -> str:
    return label.rpartition(MARK)[0]


def number_of_seeds(labels: list[str]) -> int:
    """Return how many seeds a run has at most."""
    return int(pd.Series([without_seed(label) for label in labels]).value_counts().max())


def remark(labels: list[str]) -> str:
    """Return what the intervals of these runs are."""
    return INTERVALS if number_of_seeds(labels) > 1 else ONE_SEED


def interval(values: list[float], images: int) -> tuple[float, float, float]:
    """Return mean and 95% interval of a percentage over seeds.

    images: of one seed. All seeds have the same evaluation noise: they are no further images.
    """
    mean, half = over_seeds(values)
    return mean, *widest(mean, half, over_images(mean, images))


def counted(runs: dict[str, RunRecord]) -> dict[str, pd.DataFrame]:
    """Return the tables of runs, with the number of images behind every percentage."""
    return {label: with_images(run) for label, run in runs.items()}


def curves(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return each metric after each request: mean over seeds, and its 95% interval.

    Columns: run, request, metric, seeds, mean, from, to. The interval of drift is over seeds alone.
    A request that one of the seeds has not evaluated is left out.
    """
    rows = []
    for run, labels in groups(tables).items():
        seeds = [tables[label].set_index("request") for label in labels]
        for request in sorted(set.intersection(*(set(table.index) for table in seeds))):
            for metric in PANELS:
                values = [float(table[metric].loc[request]) for table in seeds]
                if metric in COUNTED:
                    images = int(seeds[0][f"{metric}_images"].loc[request])
                    mean, low, high = interval(values, images)
                else:
                    mean, half = over_seeds(values)
                    low, high = (math.nan,) * 2 if half is None else (mean - half, mean + half)
                row = {"run": run, "request": request, "metric": metric, "seeds": len(values)}
                rows.append(row | {"mean": mean, "from": low, "to": high})
    return pd.DataFrame(rows)


def groups(tables: dict[str, pd.DataFrame]) -> dict[str, list[str]]:
    """Return the labels of the seeds of each run."""
    found: dict[str, list[str]] = {}
    for label in tables:
        found.setdefault(without_seed(label), []).append(label)
    return found


def last_with_intervals(found: pd.DataFrame) -> pd.DataFrame:
    """Return a row per run of curves(): seeds, and each metric's mean, from, to at the end."""
    rows = []
    for run, table in found.groupby("run", sort=False):
        last = table[table["request"] == table["request"].max()].set_index("metric")
        row = {"run": run, "request": int(last["request"].iloc[0]), "seeds": last["seeds"].iloc[0]}
        for metric in PANELS:
            row[metric] = last.loc[metric, "mean"]
            if metric != "drift_l2":
                row[f"{metric} from"], row[f"{metric} to"] = last.loc[metric, ["from", "to"]]
        rows.append(row)
    return pd.DataFrame(rows)


def differences(tables: dict[str, pd.DataFrame], pairs: dict[str, tuple[str, str]]) -> pd.DataFrame:
    """Return each metric of one run less that of another after the last request, in points.

    Means over the seeds that both have. from, to: the 95% interval over seeds, paired (Student's
    t), never narrower than that over images (Newcombe's from Wilson's).

    Args:
        tables: of counted(), by label with a seed.
        pairs: both runs without their seeds, by the name of their difference.
    """
    rows = []
    found = groups(tables)
    for name, pair in pairs.items():
        lasts = [
            {label.rpartition(MARK)[2]: tables[label].iloc[-1] for label in found.get(run, ())}
            for run in pair
        ]
        seeds = sorted(lasts[0].keys() & lasts[1].keys())
        if not seeds:  # all runs of one diverged
            continue
        for metric in METRICS:
            values = [np.array([float(own[seed][metric]) for seed in seeds]) for own in lasts]
            mean, half = over_seeds((values[0] - values[1]).tolist())
            terms = []
            for sign, value, own in zip((1, -1), values, lasts, strict=True):
                images = int(own[seeds[0]][f"{metric}_images"])
                terms.append((sign, value.mean(), over_images(value.mean(), images)))
            low, high = of_sum(terms)
            row = {"difference": name, "metric": metric, "seeds": len(seeds)}
            row |= {"points": mean, "from": min(low, mean - (half or 0.0))}
            rows.append(row | {"to": max(high, mean + (half or 0.0))})
    return pd.DataFrame(rows)


def remark_of_differences(labels: list[str]) -> str:
    """Return what the intervals of differences() are."""
    return PAIRED if number_of_seeds(labels) > 1 else PAIRED_ONCE


def draw_bands(found: pd.DataFrame) -> Figure:
    """Draw UA, RA-I, RA-C and drift over the requests, with their intervals."""
    figure, axes = panels(1, len(PANELS))
    for axis, (metric, title) in zip(axes, PANELS.items(), strict=True):
        for run, table in found[found["metric"] == metric].groupby("run", sort=False):
            # with gaps (eval.every) the points show where it was measured
            style = "-" if len(table) > table["request"].max() else "o-"
            (line,) = axis.plot(table["request"], table["mean"], style, markersize=3, label=run)
            axis.fill_between(
                table["request"], table["from"], table["to"], alpha=0.15, color=line.get_color()
            )
        axis.set(xlabel="request", title=title)
        if metric != "drift_l2":
            axis.set_ylim(-3, 103)
    axes[0].legend(fontsize=7, loc="lower left")
    return figure
