"""Does a concept suffer more, the more its text resembles that of the unlearned one? With and
without projection.

    python scripts/studies/sensitivity.py [OVERRIDE ...] [--output DIR]

Unlearns the first concept of the sequence alone, until its UA is 95, and measures every other name
of the vocabulary that the evaluator knows, with four concepts of the other domain. Correlated with
the similarity of "X Style" to the target's (Lee et al. 2026, arXiv 2511.07970): accuracy, its drop,
and the change of keys and values on the concept's evaluation prompts. The projection must not name
what is measured: where its auxiliary names are the vocabulary, there are four runs, each measuring
a quarter. 5 runs of one request.
"""

import json
from pathlib import Path

import pandas as pd
import safetensors.torch
from matplotlib.figure import Figure
from study import Study, as_markdown, command, finished, first_targets, panels, with_stopped
from study_statistics import output_change, pearson, spearman, text_similarity

from cu_runner.concepts.sequence import Sequence
from cu_runner.evaluators.metrics import accuracy_per_concept
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.parameters import select_parameters
from cu_runner.store.run_record import RunRecord

PAPER = Path(__file__).with_name("paper_similarity.csv")
PAPER_KV = (
    0.835  # r of the change of K/V outputs against similarity, as published; its points were not
)
MEASURES = {
    "after": "accuracy after (%)",
    "drop": "drop of accuracy (points)",
    "kv_change": "relative change of K/V outputs",
}
COLUMNS = ["run", "fold", "concept", "similarity", "before", "after", "drop", "kv_change"]
FOLDS = 4
CROSS = 4  # concepts of the other domain
FORGOTTEN = 95.0  # UA that ends the request: settings of twelve requests may not forget in one
LONGEST = 10  # times the tuned number of steps, at which it ends all the same
CHECKS = 3  # of UA in the tuned number of steps
COLOURS = {"none": "#444444", "gradproj": "#d95f02"}


def cells(study: Study, sequence: Sequence, known: list[str]) -> dict[str, list[str]]:
    """One run without projection, and one with it per fold of the measured names.

    Labels are "REG, FOLD".
    """
    target = sequence.targets[0]
    measured = [name for name in sequence.vocabulary if name in known and name != target.name]
    shared = [f"sequence.name={sequence.name}_sensitivity", *first_targets(study, 1)]
    if not study.gives("sequence.cross_retain"):
        cross = [concept.name for concept in sequence.cross_retain[:CROSS]]
        shared.append(f"sequence.cross_retain={json.dumps(cross)}")
    auxiliary = study.plan(["reg=gradproj"]).resolved["reg"]["gradproj"]["auxiliary"]
    folds = FOLDS if auxiliary["source"] == "vocabulary" else 1
    groups = {"none, all": measured} | {
        f"gradproj, {i + 1} of {folds}": measured[i::folds] for i in range(folds)
    }
    found = {}
    for label, names in groups.items():
        reg = f"reg={label.partition(',')[0]}"
        ends = until_forgotten(study, study.plan([reg]).spine.train.steps)
        found[label] = [reg, *shared, *ends, f"sequence.retain={json.dumps(names)}"]
    return found


def until_forgotten(study: Study, steps: int) -> list[str]:
    """Return what makes a request of so many steps go on until it forgot.

    A user who says when a request ends, by its steps, its loss or its UA, is left alone.
    """
    if study.gives("train.steps", "setting.stop_loss", "setting.stop_at"):
        return []
    interval = (
        [] if study.gives("setting.interval") else [f"setting.interval={steps // CHECKS or 1}"]
    )
    return [f"++setting.stop_at={FORGOTTEN}", *interval, f"train.steps={LONGEST * steps}"]


def what_was_forgotten(runs: dict[str, RunRecord]) -> pd.DataFrame:
    """Return one row per run: UA of the unlearned concept, steps that it took, drift."""
    rows = [
        {
            "run": label,
            "UA": run.table["UA"].iloc[-1],
            "steps": run.table["train_steps"].iloc[-1],
            "drift": run.table["drift_l2"].iloc[-1],
        }
        for label, run in runs.items()
    ]
    return pd.DataFrame(rows)


def per_concept(model: DiffusionModel, runs: dict[str, RunRecord]) -> pd.DataFrame:
    """One row per run and measured concept: COLUMNS, accuracies in percent."""
    base = select_parameters(model.denoiser, "kv_xattn")
    rows = []
    for label, run in runs.items():
        sequence = run.config["sequence"]
        domain, names = sequence["domain"], sequence["retain"]
        similarity = text_similarity(model, names, sequence["targets"], domain).iloc[:, 0]
        before, after = (accuracy_per_concept(run.predictions(index), domain) for index in (0, 1))
        prompts = run.predictions(1).groupby(domain)["prompt"].unique()
        delta = safetensors.torch.load_file(run.weights(1))
        reg, _, fold = label.partition(", ")
        for name in names:
            change = output_change(base, delta, model.encode_prompts(list(prompts[name])).hidden)
            values = (
                similarity[name],
                before[name],
                after[name],
                before[name] - after[name],
                change,
            )
            rows.append(dict(zip(COLUMNS, (reg, fold, name, *values), strict=True)))
    return pd.DataFrame(rows)


def correlations(table: pd.DataFrame, paper: pd.DataFrame) -> pd.DataFrame:
    """Similarity against every measure, per run, and the paper's two figures."""
    pairs = [
        (reg, measure, group["similarity"], group[measure])
        for reg, group in table.groupby("run", sort=False)
        for measure in MEASURES
    ]
    pairs.append(
        ("paper's points, none", "after", paper["cosine_similarity"], paper["accuracy_percent"])
    )
    rows = []
    for reg, measure, x, y in pairs:
        r, rho = pearson(x, y), spearman(x, y)
        row = {"run": reg, "similarity against": MEASURES[measure], "n": r.number}
        row |= {"Pearson r": r.value, "r from": r.low, "r to": r.high}
        rows.append(row | {"Spearman rho": rho.value, "rho from": rho.low, "rho to": rho.high})
    rows.append(
        {
            "run": "paper, none",
            "similarity against": MEASURES["kv_change"],
            "n": "-",
            "Pearson r": PAPER_KV,
        }
    )
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, paper: pd.DataFrame) -> Figure:
    """Every measure against similarity, and the paper's points."""
    figure, axes = panels(1, len(MEASURES) + 1)
    for axis, (measure, title) in zip(axes[:-1], MEASURES.items(), strict=True):
        for reg, group in table.groupby("run", sort=False):
            axis.plot(
                group["similarity"],
                group[measure],
                "o",
                markersize=3,
                alpha=0.6,
                color=COLOURS[reg],
                label=reg,
            )
        axis.set(xlabel="similarity to the unlearned concept", title=title)
    axes[0].legend(fontsize=7)
    axes[-1].plot(
        paper["cosine_similarity"],
        paper["accuracy_percent"],
        "o",
        markersize=4,
        color=COLOURS["none"],
    )
    axes[-1].set(
        xlabel="similarity to Abstractionism", title="the paper: accuracy after (%)", ylim=(-3, 103)
    )
    return figure


def main(study: Study) -> None:
    plan, paper = study.plan([]), pd.read_csv(PAPER, comment="#")
    sequence = plan.sequence.build()
    runs = study.run(
        cells(study, sequence, plan.evaluator.build(device="cpu").labels()[sequence.domain])
    )
    table = per_concept(plan.model.build(device="cpu"), finished(runs))
    means = table.drop(columns=["fold", "concept"]).groupby("run", sort=False).mean().reset_index()
    text = (
        f"Unlearned: {sequence.targets[0].name}. Correlations with the similarity to it, with "
        "95% intervals (Fisher's z):\n\n"
    )
    text += f"{as_markdown(with_stopped(correlations(table, paper), runs), digits=3)}\n\n"
    text += f"Means over the measured concepts:\n\n{as_markdown(means, digits=3)}\n\n"
    forgotten = with_stopped(what_was_forgotten(finished(runs)), runs)
    text += f"What was forgotten, and in how many steps:\n\n{as_markdown(forgotten)}"
    study.write(with_stopped(table, runs), draw(table, paper), text)


if __name__ == "__main__":
    command(main, __doc__)
