"""Do the weights that SelFT chooses belong to the concept, to the method, or to chance? (Lee et al.
2026, arXiv 2511.07970, Sec. 5)

    python scripts/studies/masks.py [OVERRIDE ...] [--output DIR]

The mask that SelFT makes of the untouched model for each concept of the sequence alone, by three
methods, with three seeds, scored by the method's loss and along a sampling trajectory. The overlap
of two masks is |A and B| / |A or B| (Jaccard), beside what two masks of the same sizes have by
chance: placed anywhere, placed at random within each layer, and chosen as SelFT does, by |theta *
gradient|, of gradients that are noise. Nothing is trained: masks.md has the number of masks.
"""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from study import Study, as_markdown, command, panels
from study_statistics import distinct_pairs, over_items, resamples
from torch import Tensor
from tqdm import tqdm

from cu_runner.concepts.requests import plan_requests
from cu_runner.config.run_config import RunConfig
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.regularizers.selft import SelFT, topk_mask
from cu_runner.reporting.intervals import over_seeds
from cu_runner.request.anchors import AnchorImages
from cu_runner.request.scope import Scope
from cu_runner.runner.weights import TrainedWeights
from cu_runner.runtime.devices import choose_device, limit_threads
from cu_runner.runtime.lazy import torch
from cu_runner.runtime.seeding import RandomSource
from cu_runner.store.cache import Cache
from cu_runner.store.files import from_safetensors, to_safetensors

# By method, what makes it train the keys and values alone, as the others do. The loss of SculpMem
# is that of ConAbl, and so would its masks be.
METHODS = {"conabl": [], "esd": ["method.variant=esd-x-strict"], "gradient_ascent": []}
SEEDS = (0, 1, 2)
RANDOM = "random gradients"
FIRST = f"conabl, loss, seed {SEEDS[0]}"
TRAJECTORY = f"conabl, trajectory, seed {SEEDS[0]}"
MEASURES = ("jaccard", "by chance", "by chance within layers")

Mask = dict[str, Tensor]  # by parameter, True where it may move
Masks = dict[str, list[Mask]]  # by setting, one for each concept


def cells(study: Study) -> dict[str, list[str]]:
    """Return the settings that are scored; labels are "METHOD, SCORING, SEED".

    The masks of all are as large as ConAbl's.
    """
    fraction = []
    if not study.gives("reg.selft.fraction"):
        tuned = study.plan(["method=conabl", "reg=selft"]).resolved["reg"]["selft"]["fraction"]
        fraction = [f"reg.selft.fraction={tuned}"]
    settings = [("conabl", "loss", seed) for seed in SEEDS]
    settings += [(name, "loss", SEEDS[0]) for name in METHODS if name != "conabl"]
    settings += [("conabl", "trajectory", SEEDS[0])]
    return {
        f"{name}, {scoring}, seed {seed}": [
            f"method={name}",
            *METHODS[name],
            "reg=selft",
            *fraction,
            f"reg.selft.scoring={scoring}",
            f"seed={seed}",
        ]
        for name, scoring, seed in settings
    }


# ------------------------------------------------------------ masks
def make_masks(plan: RunConfig, model: DiffusionModel) -> Iterator[Mask]:
    """Yield the mask of each concept of the sequence, each from the untouched model."""
    sequence, spine = plan.sequence.build(), plan.spine
    method, selft = plan.method.build(), plan.regularizers["selft"].build()
    assert isinstance(selft, SelFT)
    weights, fingerprint = TrainedWeights.of(model, method), model.fingerprint()
    cache = Cache(Path(spine.paths.outputs) / "cache", plan.code)
    images = AnchorImages(
        model,
        fingerprint,
        weights.params,
        weights.base,
        spine.anchors,
        cache,
        spine.eval.batch_size,
    )
    for request in plan_requests(sequence, "independent"):
        scope = Scope(
            model=model,
            sequence=sequence,
            request=request,
            params=weights.params,
            start=weights.base,
            base=weights.base,
            rng=RandomSource(spine.seed, request.index),
            train=spine.train,
            anchors=images.latents,
        )
        key = {
            "model": fingerprint,
            "device": model.device.type,
            "torch": torch.__version__,
            "settings": plan.training_key,
            "request": request.index,
        }
        if (files := cache.fetch("masks", key)) is None:
            for parameter in weights.params.values():
                parameter.requires_grad_(True)
            method.begin_request(scope)
            mask = selft.choose(scope, method)
            for parameter in weights.params.values():
                parameter.requires_grad_(False)
            files = {"mask.safetensors": to_safetensors(mask)}
            cache.put("masks", key, files)
        yield from_safetensors(files["mask.safetensors"])


def masks_of_noise(plan: RunConfig, model: DiffusionModel) -> list[Mask]:
    """Return as many masks as the sequence has concepts, of gradients from a standard normal."""
    selft = plan.regularizers["selft"].build()
    assert isinstance(selft, SelFT)
    params, masks = TrainedWeights.of(model, plan.method.build()).base, []
    for number in range(len(plan.sequence.build().targets)):
        generator = RandomSource(plan.spine.seed, number).generator(RANDOM)
        noise = {
            name: torch.randn(weight.shape, generator=generator).to(weight.device)
            for name, weight in params.items()
        }
        mask = topk_mask(params, noise, selft.fraction)
        masks.append({name: part.cpu() for name, part in mask.items()})
    return masks


# ------------------------------------------------------------ overlap
def expected_jaccard(first: float, second: float, common: float) -> float:
    """Return common / (first + second - common), 0 for two empty masks; counts of entries."""
    return common / (first + second - common) if first + second else 0.0


def overlap(one: Mask, two: Mask) -> dict[str, float]:
    """Return MEASURES of two masks, over the layers that both have.

    Of a and b entries out of n drawn at random a b / n are common on average (hypergeometric);
    within layers that is the sum of a_l b_l / n_l. The ratio of means stands for the mean of the
    ratio, from which it differs by a relative 1 / (a b / n).
    """
    names = sorted(one.keys() & two.keys())
    counts = np.array(
        [
            [float(each.sum()) for each in (one[name], two[name], one[name] & two[name])]
            + [one[name].numel()]
            for name in names
        ]
    )
    first, second, common, number = counts.sum(0)
    within = (counts[:, 0] * counts[:, 1] / counts[:, 3]).sum()
    commons = (common, first * second / number, within)
    return {
        name: expected_jaccard(first, second, each)
        for name, each in zip(MEASURES, commons, strict=True)
    }


def between_concepts(masks: list[Mask]) -> dict[str, object]:
    """Return the means of MEASURES over all pairs of concepts, with the interval of the first.

    The interval resamples concepts.
    """
    number = len(masks)
    matrices = {name: np.full((number, number), math.nan) for name in MEASURES}
    for i, j in itertools.combinations(range(number), 2):
        for name, value in overlap(masks[i], masks[j]).items():
            matrices[name][i, j] = matrices[name][j, i] = value

    def mean(name: str, items: np.ndarray) -> float:
        return float(distinct_pairs(matrices[name], items).mean())

    row: dict[str, object] = {"pairs": number * (number - 1) // 2}
    if number < 2:
        return row
    row |= {name: mean(name, np.arange(number)) for name in MEASURES}
    drawn = (mean("jaccard", items) for items in resamples(number))
    row["from"], row["to"] = over_items(number, drawn)
    return row


def of_same_concept(pairs: list[tuple[list[Mask], list[Mask]]]) -> dict[str, object]:
    """Return the means of MEASURES over concepts and pairs of settings.

    The interval of the first is Student's over concepts, each with its mean over the pairs.

    Args:
        pairs: of two settings, the masks of both by concept.
    """
    found = [
        pd.DataFrame([overlap(*both) for both in zip(*pair, strict=True)]).astype(float)
        for pair in pairs
    ]
    by_concept = sum(found) / len(found)
    mean, half = over_seeds(by_concept["jaccard"].tolist())
    row: dict[str, object] = {"pairs": len(pairs) * len(by_concept)}
    row |= by_concept.mean().to_dict()
    half = math.nan if half is None else half
    return row | {"from": max(mean - half, 0.0), "to": min(mean + half, 1.0)}


def compare(masks: Masks) -> pd.DataFrame:
    """Return one row for each comparison: what differs, what is the same, and MEASURES."""
    by_method = {name: f"{name}, loss, seed {SEEDS[0]}" for name in METHODS}
    rows = [
        {"differs": "concept", "between": label, **between_concepts(masks[label])}
        for label in [*by_method.values(), TRAJECTORY, RANDOM]
    ]
    groups = {
        ("seed", "conabl, loss"): [f"conabl, loss, seed {seed}" for seed in SEEDS],
        ("scoring", "conabl, loss and trajectory"): [FIRST, TRAJECTORY],
    }
    for pair in itertools.combinations(METHODS, 2):
        groups["method", " and ".join(pair)] = [by_method[name] for name in pair]
    for (differs, between), labels in groups.items():
        pairs = [(masks[one], masks[two]) for one, two in itertools.combinations(labels, 2)]
        rows.append({"differs": differs, "between": between, **of_same_concept(pairs)})
    table = pd.DataFrame(rows)
    table["times chance"] = table["jaccard"] / table["by chance"]
    table["times chance within layers"] = table["jaccard"] / table["by chance within layers"]
    return table


def draw(table: pd.DataFrame) -> Figure:
    """Draw the overlaps with their intervals, and both chances beside them."""
    figure, (axis,) = panels(1, 1, width=7, height=1.2 + 0.35 * len(table))
    labels = table["differs"] + ": " + table["between"]
    axis.barh(labels, table["jaccard"], color="#1b9e77", height=0.6)
    axis.hlines(labels, table["from"], table["to"], "black")
    for name, mark in (("by chance", "k|"), ("by chance within layers", "rx")):
        axis.plot(table[name], labels, mark, markersize=9, label=name)
    axis.set(xlabel="Jaccard overlap of two masks", xlim=(0, 1))
    axis.invert_yaxis()
    axis.legend(fontsize=7)
    return figure


def main(study: Study) -> None:
    own = cells(study)
    study.check_own(own)
    plans = {label: study.plan(cell) for label, cell in own.items()}
    plan = plans[FIRST]
    limit_threads(plan.spine.num_threads)
    model = plan.model.build(device=choose_device(plan.spine))
    model.speed_up(plan.spine.speed)
    masks = {}
    for label, each in plans.items():
        made = tqdm(make_masks(each, model), label, disable=None, ncols=100, leave=False)
        masks[label] = list(made)
        kept = sum(int(mask.sum()) for mask in masks[label][0].values())
        print(f"{label:<40} {len(masks[label])} masks of {kept} weights", flush=True)
    number = sum(map(len, masks.values()))
    masks[RANDOM] = masks_of_noise(plan, model)
    table = compare(masks)
    text = (
        "Jaccard overlap of two masks, means over the pairs: masks that differ in one thing and "
        f"agree in the others:\n\n{as_markdown(table, 3)}\n\n"
    )
    text += (
        "from, to: the 95% interval of the overlap; over resampled concepts where they differ, "
        "else Student's over concepts.\n"
    )
    text += (
        "by chance: of two masks of these sizes placed anywhere; within layers: that also keep how "
        "many entries they have\nin each layer, so that what is above it is no matter of layers; "
        f"{RANDOM}: what the sizes of the weights alone bring. {number} masks."
    )
    study.write(table, draw(table), text)


if __name__ == "__main__":
    command(main, __doc__)
