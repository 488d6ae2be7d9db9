"""Do regularizers keep near neighbours of the unlearned concepts as well as far ones? (Lee et al.
2026, arXiv 2511.07970)

    python scripts/studies/semantic.py [seed=0,1,2] [OVERRIDE ...] [--output DIR]

The retained concepts are halved by the largest similarity of their text embedding to that of an
unlearned concept. Their accuracy over the requests, for every file of conf/reg; and what near ones
lost more in the end, on as many images as a difference of 10 points needs: the last weights are
measured again with further evaluation seeds. The runs are those of ablation.py, with three seeds.
The last request is needed alone, for all but the curves and their means: eval.every=last.
"""

import math
from pathlib import Path

import pandas as pd
from ablation import cells
from matplotlib.figure import Figure
from study import (
    Study,
    as_markdown,
    command,
    finished,
    panels,
    remark_unsearched,
    with_stopped,
)
from study_seeds import groups, take_seeds, with_seeds, without_seed
from study_statistics import near_and_far, text_similarity

from cu_runner.evaluators.metrics import read_predictions
from cu_runner.reporting.intervals import of_sum, over_images, over_seeds
from cu_runner.runner.remeasure import load
from cu_runner.store.files import hash_json, to_csv, write_atomic
from cu_runner.store.run_record import RunRecord

EFFECT = 10.0  # points that near concepts lose more, which shall be seen
POWER = 0.8  # the chance to see it


def accuracy_of_halves(runs: dict[str, RunRecord], near: list[str], far: list[str]) -> pd.DataFrame:
    """Mean accuracy (percent) over near and over far concepts, a row per run and evaluation."""
    rows = []
    for label, run in runs.items():
        accuracy = run.accuracy_matrix()
        halves = {"near": accuracy.loc[near].mean(), "far": accuracy.loc[far].mean()}
        table = pd.DataFrame(halves).rename_axis("request").dropna()
        rows.append(table.reset_index().assign(run=label))
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


# ------------------------------------------------------------ images enough
def images_needed(effect: float, power: float) -> int:
    """Return how many images each half needs for a difference in points to be seen.

    n = (z_.975 + z_power)^2 2 p (1 - p) / effect^2 of two shares (Fleiss et al. 2003, Sec. 4.2,
    without continuity correction) at p = 1/2, where it is largest. What was recognised before adds
    next to nothing.
    """
    from scipy.stats import norm

    z = norm.ppf(0.975) + norm.ppf(power)
    return math.ceil(z**2 * 2 * 0.25 / (effect / 100) ** 2)


def evaluation_seeds(seeds: list[int], per_seed: int) -> list[int]:
    """Return the sequence's seeds and further ones, enough for images_needed() in each half.

    per_seed: images of the smaller half with one seed.
    """
    number = max(len(seeds), math.ceil(images_needed(EFFECT, POWER) / per_seed))
    further = range(max(seeds) + 1, max(seeds) + 1 + number)
    return [*seeds, *further][:number]


def measure_retained(
    study: Study, cell: list[str], run: RunRecord, seeds: list[int]
) -> list[pd.DataFrame]:
    """Return the predictions on the retained concepts before and after all requests of a run.

    They are made with all the evaluation seeds, and kept below the outputs folder.
    """
    plan = study.plan([*cell, f"sequence.seeds={seeds}"])
    folder = Path(plan.spine.paths.outputs) / "studies/semantic"
    last, loaded, found = len(run.records) - 1, None, []
    for index in (0, last):
        record = run.records[index]
        key = {
            "weights": record.files[run.weights(index).name] if index else None,
            "model": record.model_sha256,
            "evaluator": record.evaluator_sha256,
            "device": record.device,
            "code": plan.code.images_sha256,
            "sequence": plan.resolved["sequence"],
            "sampler": plan.resolved["model"]["sampler"],
            "eval": plan.resolved["eval"],
        }
        path = folder / f"{hash_json(key)[:16]}.csv"
        if not path.is_file():
            instruments, weights, _ = loaded = loaded or load(run, plan)
            if index:
                run.require_weights(index)
            weights.set(weights.read(run.weights(index)) if index else None)
            seen = instruments.sample(list(instruments.sequence.retain), index)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, to_csv(seen.predictions))
        found.append(read_predictions(path))
    return found


def recognised(predictions: pd.DataFrame, domain: str) -> pd.DataFrame:
    """Return the share of images of each concept that are recognised as it, and their number."""
    right = predictions[domain] == predictions[f"predicted_{domain}"]
    return right.groupby(predictions[domain], sort=False).agg(["mean", "size"])


def lost_more(
    shares: dict[str, list[pd.DataFrame]], near: list[str], far: list[str]
) -> pd.DataFrame:
    """Return what near concepts lost more than far ones, in points, one row per run.

    Each half is the mean of its concepts. images from, to: 95% over images and seeds (Newcombe's
    from Wilson's, never narrower over seeds): of these concepts. concepts from, to: over concepts
    (Welch's t on what each lost, mean over seeds): of concepts as near and as far as these.

    Args:
        shares: by label with a seed, recognised() before and after.
    """
    from scipy.stats import ttest_ind

    halves, rows = {"near": near, "far": far}, []
    for run, labels in groups(shares).items():
        per_concept = pd.DataFrame(
            {label: 100 * (shares[label][0]["mean"] - shares[label][1]["mean"]) for label in labels}
        )
        more = (per_concept.loc[near].mean() - per_concept.loc[far].mean()).tolist()
        mean, half = over_seeds(more)
        row = {"run": run, "seeds": len(labels)}
        terms = []
        for sign, (name, concepts) in zip((1, -1), halves.items(), strict=True):
            images = int(shares[labels[0]][0]["size"].loc[concepts].sum())
            for moment, when in enumerate(("before", "after")):
                share = (
                    100
                    * pd.Series(
                        [shares[label][moment]["mean"].loc[concepts].mean() for label in labels]
                    ).mean()
                )
                row[f"{name} {when}"] = share
                own = sign if moment == 0 else -sign
                terms.append((own, share, over_images(share, images)))
            row[f"{name} images"] = images
        low, high = of_sum(terms)
        row |= {"near lost more": mean}
        row["images from"] = min(low, mean - (half or 0.0))
        row["images to"] = max(high, mean + (half or 0.0))
        concepts = per_concept.mean(axis=1)
        lost = [concepts.loc[half] for half in halves.values()]
        row |= {"concepts from": math.nan, "concepts to": math.nan}
        if any(each.nunique() > 1 for each in lost):  # where all lost the same there is no spread
            ends = ttest_ind(*lost, equal_var=False).confidence_interval(0.95)
            row |= {"concepts from": float(ends.low), "concepts to": float(ends.high)}
        rows.append(row)
    return pd.DataFrame(rows)


def draw(halves: pd.DataFrame) -> Figure:
    """Draw a panel per run, the mean over its seeds: near solid, far dashed."""
    halves = halves.assign(run=halves["run"].map(without_seed))
    halves = halves.groupby(["run", "request"], sort=False).mean().reset_index()
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
    if study.gives("sequence.seeds"):
        raise ValueError("sequence.seeds: this study chooses the evaluation seeds; leave it out")
    seeds, study = take_seeds(study)
    own = with_seeds(cells(), seeds)
    runs = study.run(own, gaps=True)
    plan = study.plan([])
    sequence = plan.sequence.build()
    names, targets = (
        [concept.name for concept in concepts] for concepts in (sequence.retain, sequence.targets)
    )
    similarity = text_similarity(plan.model.build(device="cpu"), names, targets, sequence.domain)
    nearest = similarity.max(axis=1)
    near, far = near_and_far(nearest)
    done = finished(runs)
    halves = accuracy_of_halves(done, near, far)
    shown = next(iter(done.values())).predictions(0)[sequence.domain]
    images = {"near": int(shown.isin(near).sum()), "far": int(shown.isin(far).sum())}
    per_seed = min(images.values()) // len(sequence.seeds)
    more_seeds = evaluation_seeds(list(sequence.seeds), per_seed)
    shares = {}
    for label, run in done.items():
        tables = measure_retained(study, own[label], run, more_seeds)
        shares[label] = [recognised(table, sequence.domain) for table in tables]
        print(f"measured {label}", flush=True)
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
    needed = images_needed(EFFECT, POWER)
    text = (
        f"Before and after all requests, on {len(more_seeds)} evaluation seeds: a difference of "
        f"{EFFECT:.0f} points is seen with a chance of {100 * POWER:.0f}% on {needed} images in "
        "each half.\n\n"
    )
    text += f"{as_markdown(with_stopped(lost_more(shares, near, far), runs))}\n\n"
    text += remark_unsearched(study, cells())
    text += (
        "images from, to: the 95% interval for these concepts, over images (Newcombe's from "
        "Wilson's) and, where wider, over seeds\n(Student's t). concepts from, to: for other "
        "concepts as near and as far as these (Welch's t over concepts); more images do not\n"
        "narrow it, more retained concepts do.\n\n"
    )
    text += (
        "Over the requests, on the run's own images, percent before and after all requests, and "
        "the mean over those that were evaluated:\n\n"
        f"{as_markdown(with_stopped(losses(halves, images), runs))}\n\n"
    )
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
