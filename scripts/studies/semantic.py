"""Do regularizers keep near neighbours of the unlearned concepts as well as far ones? (Lee et al.
2026, arXiv 2511.07970)

    python scripts/studies/semantic.py [OVERRIDE ...] [--output DIR]

The retained concepts are halved by the largest similarity of their text embedding to that of an
unlearned concept; the accuracy of both halves over the requests, for every file of conf/reg. The
runs are those of ablation.py.
"""

import math

import pandas as pd
from ablation import cells
from matplotlib.figure import Figure
from study import Study, as_markdown, command, finished, panels, with_stopped
from study_statistics import near_and_far, text_similarity

from cu_runner.reporting.intervals import of_sum, over_images
from cu_runner.store.run_record import RunRecord


def accuracy_of_halves(runs: dict[str, RunRecord], near: list[str], far: list[str]) -> pd.DataFrame:
    """Mean accuracy (percent) over near and over far concepts, one row per run and request."""
    rows = []
    for label, run in runs.items():
        accuracy = run.accuracy_matrix()
        halves = {"near": accuracy.loc[near].mean(), "far": accuracy.loc[far].mean()}
        rows.append(pd.DataFrame(halves).rename_axis("request").reset_index().assign(run=label))
    return pd.concat(rows)[["run", "request", "near", "far"]]


def losses(halves: pd.DataFrame, images: dict[str, int]) -> pd.DataFrame:
    """One row per run: both halves before all requests, after them and on the mean over them.

    Beside them the points that near lost more.

    images: of one request, by half. The same noise comes at every request: the mean rests on no
    more of them than one request.
    """
    rows = []
    for label, table in halves.groupby("run", sort=False):
        moments = {
            "before": table.iloc[0],
            "after": table.iloc[-1],
            "mean": table[["near", "far"]].iloc[1:].mean(),
        }
        row = {
            f"{half} {moment}": value[half]
            for half in ("near", "far")
            for moment, value in moments.items()
        }
        for moment in ("after", "mean"):
            lost = {
                half: row[f"{half} before"] - row[f"{half} {moment}"] for half in ("near", "far")
            }
            row[f"near lost more, {moment}"] = lost["near"] - lost["far"]
            signs = {
                ("near", "before"): 1,
                ("near", moment): -1,
                ("far", "before"): -1,
                ("far", moment): 1,
            }
            shares = [
                (sign, row[f"{half} {when}"], images[half]) for (half, when), sign in signs.items()
            ]
            terms = [(sign, share, over_images(share, number)) for sign, share, number in shares]
            row[f"{moment} from"], row[f"{moment} to"] = of_sum(terms)
        rows.append({"run": label, **row})
    return pd.DataFrame(rows)


def draw(halves: pd.DataFrame) -> Figure:
    """Draw a panel per run: near solid, far dashed."""
    labels = halves["run"].unique()
    figure, axes = panels(math.ceil(len(labels) / 4), 4, height=2.4)
    for axis in axes[len(labels) :]:
        axis.set_visible(False)
    for axis, label in zip(axes[: len(labels)], labels, strict=True):
        table = halves[halves["run"] == label]
        axis.plot(
            table["request"], table["near"], "o-", markersize=3, color="#d95f02", label="near half"
        )
        axis.plot(
            table["request"], table["far"], "o--", markersize=3, color="#1b9e77", label="far half"
        )
        axis.set(title=label, ylim=(-3, 103), ylabel="accuracy (%)", xlabel="request")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(fontsize=7, loc="lower left")
    return figure


def main(study: Study) -> None:
    runs = study.run(cells())
    plan = study.plan([])
    sequence = plan.sequence.build()
    names, targets = (
        [concept.name for concept in concepts] for concepts in (sequence.retain, sequence.targets)
    )
    similarity = text_similarity(plan.model.build(device="cpu"), names, targets, sequence.domain)
    nearest = similarity.max(axis=1)
    near, far = near_and_far(nearest)
    halves = accuracy_of_halves(finished(runs), near, far)
    shown = next(iter(finished(runs).values())).predictions(0)[sequence.domain]
    images = {"near": int(shown.isin(near).sum()), "far": int(shown.isin(far).sum())}
    chosen = [
        {
            "concept": name,
            "half": half,
            "nearest target": similarity.loc[name].idxmax(),
            "similarity": nearest[name],
        }
        for half, group in (("near", near), ("far", far))
        for name in group
    ]
    text = "Accuracy in percent before and after all requests, and its mean over them:\n\n"
    text += f"{as_markdown(with_stopped(losses(halves, images), runs))}\n\n"
    text += (
        f"from, to: the 95% interval of what near lost more, over images ({images['near']} "
        f"near, {images['far']} far; Newcombe's\n"
    )
    text += (
        "from Wilson's, the four accuracies as if independent); it holds nothing of how "
        "another seed would differ.\n\n"
    )
    text += f"The halves:\n\n{as_markdown(pd.DataFrame(chosen), digits=3)}"
    study.write(with_stopped(halves, runs), draw(halves), text)


if __name__ == "__main__":
    command(main, __doc__)
