"""Generate -> classify -> predictions.csv; metrics are a pure function of that file (PROTOCOL section 2; Lee et al. 2026, Sec. 4).

Accuracies are in percent. A prediction counts as right when it equals the concept that the prompt names.
"""

import dataclasses
import io
from dataclasses import dataclass

import pandas as pd
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from cu_runner.concepts import Concept, Sequence
from cu_runner.evaluators.base import Evaluator
from cu_runner.models import DiffusionModel
from cu_runner.sampling import generate


class SamplingError(RuntimeError):
    """The model makes no images; the message is one line."""


@dataclass(frozen=True)
class Metrics:
    """Percent, after one request; None where it is undefined (nothing unlearned yet, or no earlier request).

    UA: 100 - mean accuracy over all concepts unlearned so far. UA_current, UA_previous: the same over those of the last request
    and over the earlier ones. RA_I: accuracy over the retained concepts of the same domain. RA_C: cross-domain accuracy over all
    images, those prompted with unlearned concepts included; RA_C_retained: over images prompted with retained concepts only.
    """

    UA: float | None
    RA_I: float
    RA_C: float
    RA_C_retained: float
    UA_current: float | None
    UA_previous: float | None


def accuracy_per_concept(predictions: pd.DataFrame, domain: str) -> dict[str, float]:
    """Percent of images of each concept that are recognised as it, in order of first appearance."""
    right = predictions[domain] == predictions[f"predicted_{domain}"]
    return (100.0 * right.groupby(predictions[domain], sort=False).mean()).to_dict()


def compute_metrics(
    predictions: pd.DataFrame, domain: str, cross_domain: str, current: list[str], previous: list[str], retain: list[str]
) -> Metrics:
    """Metrics of one step from its predictions.

    Args:
        predictions: rows of predictions.csv.
        domain, cross_domain: the domain of the unlearned concepts, and the other one.
        current, previous: names unlearned by the last request, and by the requests before it.
        retain: names of the retained concepts of the domain.

    Raises:
        ValueError: a concept that a metric needs has no image.
    """
    accuracy = accuracy_per_concept(predictions, domain)
    missing = [name for name in [*current, *previous, *retain] if name not in accuracy]
    if missing:
        raise ValueError(f"predictions hold no image of {', '.join(missing)}; the evaluation is incomplete")

    def mean(names: list[str]) -> float:
        return sum(accuracy[name] for name in names) / len(names)

    right = predictions[cross_domain] == predictions[f"predicted_{cross_domain}"]
    kept = predictions[domain].isin(retain)
    return Metrics(
        UA=100 - mean(previous + current) if current or previous else None,
        RA_I=mean(retain),
        RA_C=100.0 * right.mean().item(),
        RA_C_retained=100.0 * right[kept].mean().item(),
        UA_current=100 - mean(current) if current else None,
        UA_previous=100 - mean(previous) if previous else None,
    )


@dataclass(frozen=True)
class Evaluation:
    """predictions: one row per image. thumbnails: the first seed's images by (concept, cross concept), uint8 [S, S, 3]."""

    predictions: pd.DataFrame
    thumbnails: dict[tuple[str, str], Image.Image]


def evaluate(
    model: DiffusionModel,
    evaluator: Evaluator,
    sequence: Sequence,
    concepts: list[Concept],
    step: int,
    *,
    steps: int,
    guidance: float,
    batch_size: int,
) -> Evaluation:
    """Generate and classify the grid concepts x sequence.cross_retain x sequence.seeds.

    Args:
        step: number of the request, for the rows of predictions.csv; it does not touch the noise.
        steps, guidance, batch_size: see sampling.generate.

    Returns:
        The rows (step, prompt, <domain>, <cross domain>, seed, predicted_..., score_...) and thumbnails for the grid.
    """
    domain, cross_domain = sequence.domain, sequence.cross_domain
    cells = [(concept, cross, seed) for concept in concepts for cross in sequence.cross_retain for seed in sequence.seeds]
    prompts = [sequence.evaluation_prompt(concept, cross) for concept, cross, _ in cells]
    seeds = [seed for _, _, seed in cells]
    rows, thumbnails = [], {}
    bar = tqdm(total=len(cells), desc="  evaluate", leave=False, disable=None, ncols=100, unit="image")
    for images in generate(model, prompts, seeds, steps=steps, guidance=guidance, batch_size=batch_size):
        if not images.isfinite().all():
            raise SamplingError(
                f"the images after request {step} are not finite: the weights diverged; lower train.lr. Finished requests are kept"
            )
        predictions = evaluator.predict(images)
        for i, image in enumerate(images):
            concept, cross, seed = cells[len(rows)]
            row = {"step": step, "prompt": prompts[len(rows)], domain: concept.name, cross_domain: cross.name, "seed": seed}
            for kind in (domain, cross_domain):
                row[f"predicted_{kind}"] = predictions[kind].labels[i]
                row[f"score_{kind}"] = round(predictions[kind].scores[i], 4)
            rows.append(row)
            if seed == sequence.seeds[0]:
                thumbnails[concept.name, cross.name] = to_picture(image)
        bar.update(len(images))
    bar.close()
    return Evaluation(pd.DataFrame(rows), thumbnails)


def to_picture(image: Tensor, largest: int = 128) -> Image.Image:
    """An image [3, S, S] in 0..1 as a picture of at most `largest` pixels a side."""
    picture = Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())
    picture.thumbnail((largest, largest))
    return picture


def draw_grid(thumbnails: dict[tuple[str, str], Image.Image], unlearned: list[str], title: str) -> bytes:
    """PNG of thumbnails: rows concepts, columns cross concepts; the rows of unlearned concepts have a red bar and label."""
    rows = list(dict.fromkeys(row for row, _ in thumbnails))
    columns = list(dict.fromkeys(column for _, column in thumbnails))
    side = next(iter(thumbnails.values())).width
    font, gap, left, top = ImageFont.load_default(size=12), 2, 132, 44
    canvas = Image.new("RGB", (left + len(columns) * (side + gap), top + len(rows) * (side + gap)), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((6, 5), title, fill="black", font=font)
    for x, column in enumerate(columns):
        pen.text((left + x * (side + gap) + side / 2, top - 5), column, fill="black", font=font, anchor="ms")
    for y, row in enumerate(rows):
        height = top + y * (side + gap)
        gone = row in unlearned
        pen.text((left - 12, height + side / 2), row, fill="#c00000" if gone else "black", font=font, anchor="rm")
        if gone:
            pen.rectangle((left - 7, height, left - 3, height + side - 1), fill="#c00000")
        for x, column in enumerate(columns):
            canvas.paste(thumbnails[row, column], (left + x * (side + gap), height))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()


def metrics_as_dict(metrics: Metrics) -> dict[str, float | None]:
    """For metrics.json and metrics.csv, to a thousandth of a percent."""
    return {name: None if value is None else round(value, 3) for name, value in dataclasses.asdict(metrics).items()}
