"""Do the keys and values of cross-attention keep names as far apart as their texts are, before and
after unlearning? (Lee et al. 2026, arXiv 2511.07970, Sec. 7)

    python scripts/studies/neighbourhood.py [OVERRIDE ...] [--output DIR]

What a change of keys and values does to a concept reaches its neighbours if W_K and W_V preserve
distances. A name x is the mean text-encoder output over its own tokens; the distances |x - y| of
all pairs of names are ranked against |W x - W y|, per layer and over all layers together:
Spearman's correlation for the untouched model, after the last request, and the difference. Without
regularizer and with gradient projection, three seeds. 6 runs of the sequence, those of order.py.
The last request is needed alone: eval.every=last.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import safetensors.torch
from matplotlib.figure import Figure
from scipy.spatial.distance import pdist, squareform
from scipy.stats import rankdata
from study import Study, as_markdown, command, finished, panels, with_stopped
from study_statistics import distinct_pairs, over_items, resamples
from torch import Tensor

from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.models.parameters import select_parameters, snapshot
from cu_runner.request.text_subspace import concept_vectors
from cu_runner.store.run_record import RunRecord

REGULARIZERS = ("none", "gradproj")
SEEDS = (0, 1, 2)
KINDS = {"keys": ".to_k.", "values": ".to_v."}
ALL = "all layers"
Distances = dict[tuple[str, str], np.ndarray]  # [K, K] by kind and layer
Rhos = dict[tuple[str, str], np.ndarray]  # [1 + resamples] by kind and layer


def cells() -> dict[str, list[str]]:
    return {
        f"{name}, seed {seed}": [f"reg={name}", f"seed={seed}"]
        for name in REGULARIZERS
        for seed in SEEDS
    }


def names_of(sequence: Sequence) -> list[Concept]:
    """Return the targets, the retained concepts, and every other name of the vocabulary."""
    named = {concept.name: concept for concept in (*sequence.targets, *sequence.retain)}
    for label in sequence.vocabulary:
        spelling = sequence.prompt_name(label)
        named.setdefault(label, Concept(label, sequence.domain, spelling=spelling))
    return list(named.values())


def distances(vectors: Tensor) -> np.ndarray:
    """Return the Euclidean distances [K, K] of the rows of vectors [K, D]."""
    return np.asarray(squareform(pdist(vectors.double().cpu().numpy())))


def distances_of_outputs(weights: Mapping[str, Tensor], text: Tensor) -> Distances:
    """Return the distances of W x for every key and value, and for all layers side by side.

    Args:
        weights: W [out, D] by name. text: x as rows, [K, D].
    """
    found: Distances = {}
    for kind, mark in KINDS.items():
        # |W x - W y|^2 over layers side by side is the sum over the layers
        squares = np.zeros((len(text), len(text)))
        for name, weight in weights.items():
            if mark in name:
                layer = name.partition(".attn2.")[0]
                found[kind, layer] = distances(text @ weight.T)
                squares += found[kind, layer] ** 2
        found[kind, ALL] = np.sqrt(squares)
    return found


def ranks_of_pairs(matrix: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Return the ranks of the entries of a matrix [K, K] for all pairs of items, as a vector."""
    return np.asarray(rankdata(distinct_pairs(matrix, items)))


def correlation(one: np.ndarray, two: np.ndarray) -> float:
    """Return the linear correlation of two vectors; NaN where one is constant."""
    if np.ptp(one) == 0 or np.ptp(two) == 0:
        return float("nan")
    return float(np.corrcoef(one, two)[0, 1])


def rhos(text: np.ndarray, outputs: Distances) -> Rhos:
    """Return Spearman's correlation of the distances of texts [K, K] with those of each output.

    First of all names, then of each of resamples().
    """
    drawn = [np.arange(len(text)), *resamples(len(text))]
    ranks = [ranks_of_pairs(text, items) for items in drawn]
    return {
        place: np.array(
            [
                correlation(rank, ranks_of_pairs(matrix, items))
                for rank, items in zip(ranks, drawn, strict=True)
            ]
        )
        for place, matrix in outputs.items()
    }


def compare(number: int, before: Rhos, after: Rhos) -> pd.DataFrame:
    """Return one row per kind and layer: rho before, after, their difference, with intervals.

    Args:
        number: of names.
    """
    rows = []
    for (kind, layer), base in before.items():
        moved = after[kind, layer]
        row: dict[str, object] = {"of": kind, "layer": layer}
        for name, values in (("before", base), ("after", moved), ("change", moved - base)):
            low, high = over_items(number, values[1:])
            row |= {name: values[0], f"{name} from": low, f"{name} to": high}
        rows.append(row)
    return pd.DataFrame(rows)


def table_of(
    runs: dict[str, RunRecord],
    text: Tensor,
    base: Mapping[str, Tensor],
    groups: dict[str, np.ndarray],
) -> pd.DataFrame:
    """Return the rows of compare() for every run and group of names.

    Args:
        text: of all names as rows, [K, D]. base: W by name in the untouched model.
        groups: places of the names of each.
    """
    tables = []
    for group, places in groups.items():
        rows = text[places]
        apart = distances(rows)
        before = rhos(apart, distances_of_outputs(base, rows))  # the same for every run
        for label, run in runs.items():
            delta = safetensors.torch.load_file(run.weights(len(run.records) - 1))
            changed = {name: weight + delta.get(name, 0) for name, weight in base.items()}
            after = rhos(apart, distances_of_outputs(changed, rows))
            table = compare(len(places), before, after)
            table.insert(0, "names", f"{group} ({len(places)})")
            table.insert(0, "run", label)
            tables.append(table)
    return pd.concat(tables, ignore_index=True)


def draw(table: pd.DataFrame) -> Figure:
    """Rho per layer of all names: before in grey, after in the colour of the run."""
    shown = table[table["names"] == table["names"].iloc[0]]
    labels = shown["run"].unique()
    figure, axes = panels(len(KINDS), len(labels), width=2.6, height=2.8)
    for row, kind in enumerate(KINDS):
        for column, label in enumerate(labels):
            axis = axes[row * len(labels) + column]
            lines = shown[(shown["run"] == label) & (shown["of"] == kind)]
            for moment, colour in (("before", "#888888"), ("after", "#d95f02")):
                # of resamples: an interval need not hold the value
                places = range(len(lines))
                axis.vlines(places, lines[f"{moment} from"], lines[f"{moment} to"], colour)
                axis.plot(places, lines[moment], "o", markersize=3, color=colour, label=moment)
            axis.set(title=f"{label}: {kind}", xlabel="layer; last: all", ylim=(-0.1, 1.05))
    axes[0].set_ylabel("Spearman rho")
    axes[0].legend(fontsize=7, loc="lower left")
    return figure


def main(study: Study) -> None:
    runs = study.run(cells(), gaps=True)
    plan = study.plan([])
    sequence, model = plan.sequence.build(), plan.model.build(device="cpu")
    concepts = names_of(sequence)
    spellings = [concept.prompt_name for concept in concepts]
    text = concept_vectors(model, spellings, sequence.bare_prompt).T
    base = snapshot(select_parameters(model.denoiser, "kv_xattn"))
    targets = {concept.name for concept in sequence.targets}
    others = [place for place, concept in enumerate(concepts) if concept.name not in targets]
    groups = {"all": np.arange(len(concepts)), "never unlearned": np.array(others)}
    table = table_of(finished(runs), text, base, groups)
    whole = table[table["layer"] == ALL].drop(columns="layer")
    first = table[table["run"] == next(iter(finished(runs)))]
    by_layer = first[(first["layer"] != ALL) & (first["names"] == first["names"].iloc[0])]
    page = (
        "Spearman's correlation of the distances of names as text with those of their keys and "
        f"values, all layers\ntogether:\n\n{as_markdown(with_stopped(whole, runs), 3)}\n\n"
    )
    page += (
        "from, to: 95% intervals over resampled names; they hold nothing of how another seed would "
        "differ: the runs show it.\n\nLayer by layer, "
        f"{first['run'].iloc[0]}, all names (the other runs are in {study.name}.csv):\n\n"
        f"{as_markdown(by_layer.drop(columns=['run', 'names']), 3)}"
    )
    study.write(with_stopped(table, runs), draw(table), page)


if __name__ == "__main__":
    command(main, __doc__)
