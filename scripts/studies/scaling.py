"""Over 100 requests, does retention level off or go to zero? (Lee et al. 2026, arXiv 2511.07970)

    python scripts/studies/scaling.py [seed=0,1,2] [rows=none,uce] [OVERRIDE ...] [--output DIR]

ConAbl without regularizer, with l2, gradproj, merge, nullspace and replay, and UCE; three seeds
(UCE draws nothing at random: one). The sequence is shapecanvas_style100, which measures 96 images
of retained concepts. A sequence or an experiment on the command line takes its place; the published
ones have 12 requests, and 'sequence.targets=[A,B,...]' gives one more. Of the 50 styles of
UnlearnCanvas 38 are not retained, there are no 100: the command in scaling.md names them. 19 runs;
scaling.md has the seconds of each; rows= makes some of the seven rows alone. eval.every=5 leaves
out four evaluations of five, the quarters are then means over the others.
"""

import math
from collections.abc import Sequence

import pandas as pd
import yaml
from study import (
    ALL_RUNS,
    STABLE_DIFFUSION,
    Study,
    as_markdown,
    command,
    finished,
    last_rows,
    over_requests,
    remark_unsearched,
    with_stopped,
)
from study_seeds import (
    counted,
    curves,
    draw_bands,
    groups,
    interval,
    last_with_intervals,
    remark,
    take_seeds,
    with_seeds,
)

from cu_runner.concepts.entries import read_shipped
from cu_runner.runtime.paths import config_dir

ROWS = ("none", "l2", "gradproj", "merge", "nullspace", "replay", "uce")
SEQUENCE = "sequence=shapecanvas_style100"
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


def take_rows(study: Study) -> tuple[list[str], Study]:
    """Return the rows that the user names, or all, and the study without them.

    Raises ValueError for one that there is not.
    """
    named, study = study.take("rows", list(ROWS))
    if wrong := [name for name in named if name not in ROWS]:
        raise ValueError(f"rows={wrong[0]}: no such row; allowed: {', '.join(ROWS)}")
    return [name for name in ROWS if name in named], study


def cells(study: Study, seeds: list[int], rows: Sequence[str] = ROWS) -> dict[str, list[str]]:
    shared = [] if study.gives("sequence", "experiment") else [SEQUENCE]
    regularizers = {name: [f"reg={name}", *shared] for name in rows if name != "uce"}
    runs = with_seeds(regularizers, seeds)
    if "uce" in rows:
        runs |= with_seeds({"uce": ["method=uce", "reg=none", *shared]}, [0])
    return runs


def quarters(table: pd.DataFrame, metric: str) -> list[float]:
    """Means of a metric over the four quarters of the requests, the untouched model left out."""
    values = table.set_index("request")[metric].drop(0)
    quarter = (values.index - 1) * 4 // values.index[-1]
    return values.groupby(quarter).mean().reindex(range(4)).tolist()


def fate(third: float, fourth: float) -> str:
    """Return what becomes of a metric from the third quarter of the requests to the fourth."""
    if math.isnan(third) or math.isnan(fourth):  # no request of it was evaluated
        return "-"
    if fourth < GONE:
        return "gone"
    return "level" if fourth >= third - LEVEL else "falling"


def by_quarter(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """One row per run and metric: the mean of every quarter over the seeds, and its fate.

    from, to: the interval of the last quarter; the images of all its requests have the same noise
    and count as those of its last request.
    """
    rows = []
    for run, labels in groups(tables).items():
        for metric in ("UA", "RA_I", "RA_C"):
            seeds = pd.DataFrame([quarters(tables[label], metric) for label in labels])
            images = int(tables[labels[0]][f"{metric}_images"].iloc[-1])
            mean, low, high = interval(seeds[3].tolist(), images)
            row = {"run": run, "metric": metric, "seeds": len(labels)}
            row |= {f"quarter {i + 1}": seeds[i].mean() for i in range(4)}
            row |= {"from": low, "to": high}
            rows.append(row | {"fate": fate(seeds[2].mean(), mean) if metric != "UA" else "-"})
    return pd.DataFrame(rows)


def main(study: Study) -> None:
    rows, study = take_rows(study)
    seeds, study = take_seeds(study)
    runs = study.run(cells(study, seeds, rows), gaps=True)
    done = finished(runs)
    tables, whole = counted(done), {label: run.table for label, run in done.items()}
    found, note = curves(tables), remark([*tables])
    text = f"After the last request, means over seeds. {note}\n\n"
    text += f"{as_markdown(last_with_intervals(found))}\n\n"
    text += remark_unsearched(study, cells(study, seeds[:1], rows))
    text += f"Means over the quarters of the requests:\n\n{as_markdown(by_quarter(tables))}\n\n"
    text += (
        f"gone: the last quarter is below {GONE:.0f}%; level: it is at most {LEVEL:.0f} "
        "points below the third; falling: more.\n\n"
    )
    text += f"{ALL_RUNS}{as_markdown(with_stopped(last_rows(whole), runs))}"
    study.write(
        with_stopped(over_requests(tables), runs), draw_bands(found), text, on_stable_diffusion()
    )


if __name__ == "__main__":
    command(main, __doc__)
