"""Does a concept suffer more, the nearer its text is to the unlearned one's, in models of any size?

    python scripts/studies/sizes.py models=[DIR,DIR,...] [seed=0,1,2] [OVERRIDE ...] [--output DIR]

Sensitivity without regularizer (sensitivity.py; Lee et al. 2026, arXiv 2511.07970: r = -0.627) in
each of the models, diffusers directories of one kind: other sizes, other training sets. The
correlation of similarity with the accuracy after the request, its drop, and the change of keys and
values, per model; whether the models differ (Cochran's Q). A run of one request, until the concept
is forgotten, per model and seed.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sensitivity import MEASURES, PAPER, cells, per_concept, what_was_forgotten
from study import Study, as_markdown, command, finished, panels, with_stopped
from study_seeds import groups, take_seeds, with_seeds, without_seed
from study_statistics import Correlation, pearson

from cu_runner.models.diffusion import DiffusionModel
from cu_runner.store.run_record import RunRecord

ALL = "none, all"  # the cell of sensitivity.py that measures every name

ON_STABLE_DIFFUSION = (
    "models=[DIR,DIR] experiment=unlearncanvas_style evaluator.paths.style=DIR "
    "evaluator.paths.object=DIR --output unlearncanvas"
)


def names_of(places: list[str]) -> dict[str, str]:
    """Return the directories by a short label: as many of the last parts as tell them apart.

    Raises ValueError for fewer than two, or one that is named twice.
    """
    paths = [Path(place) for place in places]
    if len(paths) < 2 or len(set(paths)) < len(paths):
        raise ValueError(
            f"models=[{','.join(places)}]: give two or more different diffusers directories, "
            "models=[DIR,DIR,...]"
        )
    for number in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-number:]) for path in paths]
        if len(set(labels)) == len(labels):
            break
    return dict(zip(labels, places, strict=True))


def size_of(model: DiffusionModel) -> dict[str, int]:
    """Return how large the UNet is, how many cross-attention layers it has, and the text width."""
    keys = [
        module for name, module in model.denoiser.named_modules() if name.endswith("attn2.to_k")
    ]
    return {
        "UNet, thousand weights": sum(each.numel() for each in model.denoiser.parameters()) // 1000,
        "cross-attention layers": len(keys),
        "text width": keys[0].in_features,
    }


def over_seeds_per_concept(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return per_concept() of each model, means over its seeds. tables: by label with a seed."""
    parts = []
    for model, labels in groups(tables).items():
        columns = ["similarity", "before", *MEASURES]
        every = pd.concat([tables[label] for label in labels])
        mean = every.groupby("concept", sort=False)[columns].mean().reset_index()
        parts.append(mean.assign(model=model, seeds=len(labels)))
    return pd.concat(parts)[["model", "seeds", "concept", "similarity", "before", *MEASURES]]


def holds(found: Correlation, sign: int) -> str:
    """Return whether a correlation has a sign: yes, no, or open where its interval holds zero."""
    ends = sorted((sign * found.low, sign * found.high))
    if np.isnan(ends).any() or ends[0] <= 0 <= ends[1]:
        return "open"
    return "yes" if ends[0] > 0 else "no"


def correlations(table: pd.DataFrame, paper: pd.DataFrame) -> pd.DataFrame:
    """Return similarity against every measure per model, and the paper's points."""
    pairs = [
        (model, measure, group["similarity"], group[measure])
        for model, group in table.groupby("model", sort=False)
        for measure in MEASURES
    ]
    pairs.append(
        ("the paper's points", "after", paper["cosine_similarity"], paper["accuracy_percent"])
    )
    rows = []
    for model, measure, x, y in pairs:
        found = pearson(x, y)
        row = {"model": model, "similarity against": MEASURES[measure], "n": found.number}
        row |= {"Pearson r": found.value, "from": found.low, "to": found.high}
        rows.append(row | {"nearer suffers more": holds(found, -1 if measure == "after" else 1)})
    return pd.DataFrame(rows)


def homogeneity(found: list[Correlation]) -> tuple[float, float]:
    """Return Cochran's Q of correlations, sum (n_i - 3) (z_i - mean z)^2, and its p.

    z = atanh r, the mean weighted by n_i - 3; Q is chi-squared with k - 1 degrees of freedom if all
    are one correlation of independent points (Hedges & Olkin 1985, Sec. 11.B). The models are
    measured on the same names: p is rough.
    """
    from scipy.stats import chi2

    known = [each for each in found if each.number > 3 and abs(each.value) < 1]
    if len(known) < 2:
        return float("nan"), float("nan")
    z = np.arctanh([each.value for each in known])
    weights = np.array([each.number - 3 for each in known])
    q = float(weights @ (z - weights @ z / weights.sum()) ** 2)
    return q, float(chi2.sf(q, len(known) - 1))


def differences(table: pd.DataFrame) -> pd.DataFrame:
    """Return for every measure whether the models' correlations differ."""
    rows = []
    for measure, title in MEASURES.items():
        found = [
            pearson(group["similarity"], group[measure])
            for _, group in table.groupby("model", sort=False)
        ]
        q, p = homogeneity(found)
        rows.append({"similarity against": title, "models": len(found), "Q": q, "p": p})
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame) -> Figure:
    """Accuracy after the request against similarity, a panel per model."""
    models = table["model"].unique()
    figure, axes = panels(1, len(models))
    for axis, model in zip(axes, models, strict=True):
        group = table[table["model"] == model]
        axis.plot(group["similarity"], group["after"], "o", ms=3, alpha=0.6, color="#444444")
        axis.set(xlabel="similarity to the unlearned concept", title=model, ylim=(-3, 103))
    axes[0].set_ylabel(MEASURES["after"])
    return figure


def main(study: Study) -> None:
    seeds, study = take_seeds(study)
    places, study = study.take("models", [])
    models = names_of(places)
    plan, paper = study.plan([]), pd.read_csv(PAPER, comment="#")
    sequence = plan.sequence.build()
    known = plan.evaluator.build(device="cpu").labels()[sequence.domain]
    cell = cells(study, sequence, known)[ALL]
    paths = {label: f"model.path={json.dumps(place)}" for label, place in models.items()}
    runs = study.run(with_seeds({label: [*cell, path] for label, path in paths.items()}, seeds))
    tables: dict[str, pd.DataFrame] = {}
    sizes = []
    for label, path in paths.items():
        model = study.plan([path]).model.build(device="cpu")
        sizes.append({"model": label, **size_of(model)})
        own: dict[str, RunRecord] = {
            each: run for each, run in finished(runs).items() if without_seed(each) == label
        }
        tables |= {each: per_concept(model, {ALL: run}) for each, run in own.items()}
    table = over_seeds_per_concept(tables)
    means = table.drop(columns="concept").groupby("model", sort=False).mean().reset_index()
    text = (
        f"Unlearned: {sequence.targets[0].name}, without regularizer; accuracies are means over "
        "seeds. Correlations with the similarity to it, with 95% intervals over concepts "
        "(Fisher's z); open: the interval holds zero:\n\n"
    )
    text += f"{as_markdown(with_stopped(correlations(table, paper), runs), digits=3)}\n\n"
    text += (
        "Whether the models' correlations differ (Cochran's Q; the same names are measured in all, "
        f"p is rough):\n\n{as_markdown(differences(table), digits=3)}\n\n"
    )
    text += f"Means over the measured concepts:\n\n{as_markdown(means, digits=3)}\n\n"
    forgotten = with_stopped(what_was_forgotten(finished(runs)), runs)
    text += f"What was forgotten, and in how many steps:\n\n{as_markdown(forgotten)}\n\n"
    text += f"The models:\n\n{as_markdown(pd.DataFrame(sizes))}"
    study.write(with_stopped(table, runs), draw(table), text, ON_STABLE_DIFFUSION)


if __name__ == "__main__":
    command(main, __doc__)
