"""Generate -> classify -> predictions.csv; metrics are a pure function of that file (Lee et al. 2026, Sec. 4).

Accuracies are in percent. A prediction counts as right when it equals the concept that the prompt names.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import pandas as pd
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cu_runner import parallel
from cu_runner.concepts import Concept, ImagePrompt, Sequence
from cu_runner.evaluators.base import Evaluator
from cu_runner.settings import EvalSettings

if TYPE_CHECKING:
    from cu_runner.models import DiffusionModel

ENOUGH_UA = 95.0  # percent; a run below it has forgotten too little for its retention to be compared with that of others


class SamplingError(RuntimeError):
    """The model makes no images; the message is one line."""


def read_predictions(file: Path | BinaryIO) -> pd.DataFrame:
    """predictions.csv. Names stay text, also "NA" and "007"; step and seed are whole numbers, scores are floats."""
    rows = pd.read_csv(file, dtype=str, keep_default_na=False)
    return rows.astype(
        {name: float if name.startswith("score_") else int for name in rows if name.startswith(("step", "seed", "face", "score_"))}
    )


def accuracy_per_concept(predictions: pd.DataFrame, domain: str) -> dict[str, float]:
    """Percent of images of each concept that are recognised as it, in order of first appearance."""
    right = predictions[domain] == predictions[f"predicted_{domain}"]
    return (100.0 * right.groupby(predictions[domain], sort=False).mean()).to_dict()


def mean_accuracy(predictions: pd.DataFrame, domain: str, concepts: list[str]) -> float:
    """Percent, every concept with the same weight. Raises ValueError when one of them has no image."""
    accuracy = accuracy_per_concept(predictions, domain)
    missing = [name for name in concepts if name not in accuracy]
    if missing:
        raise ValueError(f"predictions hold no image of {', '.join(missing)}; the evaluation is incomplete")
    return sum(accuracy[name] for name in concepts) / len(concepts)


def metrics(
    predictions: pd.DataFrame, unlearned: list[str], retain: list[str], cross_retain: list[str] | None
) -> dict[str, float | None]:
    """UA, RA_I, RA_C and RA_C_retained of one step, in percent (released code of Lee et al. 2026).

    UA: 100 - mean accuracy over the unlearned concepts; None when there is none. RA_I: mean accuracy over the retained concepts of
    their domain. RA_C: cross-domain accuracy over all images of the cross_retain concepts, those prompted with unlearned concepts
    included; RA_C_retained: over those prompted with retained concepts only.

    Where the rows say whether an image shows a face, UA is over the images that do, and None when none does: an image without one
    is neither a success nor a failure of unlearning. Retained concepts are not recognised in such an image.

    Args:
        predictions: rows of predictions.csv. The domain is the column that holds the retained concepts, the cross domain the one
            that holds the cross_retain concepts.
        cross_retain: None if the images name no concept of another domain; RA_C and RA_C_retained are then None.

    Raises:
        ValueError: a concept has no image, or a list of retained concepts is empty.
    """
    if not retain or cross_retain == []:
        raise ValueError("metrics: retain and cross_retain need at least one concept each")
    domain, shown, across = domain_of(predictions, retain), predictions, {"RA_C": None, "RA_C_retained": None}
    if cross_retain is not None:
        cross_domain = domain_of(predictions, cross_retain)
        shown = predictions[predictions[cross_domain].isin(cross_retain)]
        right = shown[cross_domain] == shown[f"predicted_{cross_domain}"]
        across = {"RA_C": 100.0 * right.mean().item(), "RA_C_retained": 100.0 * right[shown[domain].isin(retain)].mean().item()}
    return {"UA": unlearning_accuracy(shown, domain, unlearned), "RA_I": mean_accuracy(shown, domain, retain)} | across


def unlearning_accuracy(predictions: pd.DataFrame, domain: str, unlearned: list[str]) -> float | None:
    """UA in percent: 100 - mean accuracy over the concepts, on images with a face where the rows tell. None without any image.

    Raises:
        ValueError: a concept has no image at all.
    """
    if not unlearned:
        return None
    accuracy = mean_accuracy(predictions, domain, unlearned)
    if "face" in predictions:
        with_face = predictions[predictions["face"] == 1]
        concepts = [name for name in unlearned if name in set(with_face[domain])]
        if not concepts:
            return None
        accuracy = mean_accuracy(with_face, domain, concepts)
    return 100 - accuracy


def count_faceless(predictions: pd.DataFrame, domain: str, concepts: list[str]) -> int:
    """How many images of the concepts show no face."""
    return int((predictions["face"] == 0)[predictions[domain].isin(concepts)].sum())


def step_metrics(predictions: pd.DataFrame, unlearned: list[str], sequence: Sequence) -> dict[str, float | None]:
    """The metrics of one step of a run, in percent, to a thousandth.

    Those of metrics(), and UA_current: UA of the concept unlearned last; UA_previous: of the others (their rebound). Where faces
    are looked for: faceless_unlearned and faceless_retained, the numbers of images without one.
    """
    retain, cross_retain = ([concept.name for concept in concepts] for concepts in (sequence.retain, sequence.cross_retain))
    measured = metrics(predictions, unlearned, retain, cross_retain if sequence.cross_domain in sequence.judged else None)
    for name, concepts in (("UA_current", unlearned[-1:]), ("UA_previous", unlearned[:-1])):
        measured[name] = unlearning_accuracy(predictions, sequence.domain, concepts)
    if "face" in predictions:
        measured["faceless_unlearned"] = count_faceless(predictions, sequence.domain, unlearned)
        measured["faceless_retained"] = count_faceless(predictions, sequence.domain, retain)
    return {name: None if value is None else round(value, 3) for name, value in measured.items()}


def describe(row: dict[str, object], total: int) -> str:
    """The line that the terminal shows for a step."""
    width = len(str(total))
    ua, ra_i, ra_c = ("    -" if row[name] is None else f"{row[name]:5.1f}" for name in ("UA", "RA_I", "RA_C"))
    cost = f"{row['train_seconds']:.0f} s train, {row['eval_seconds']:.0f} s eval"
    head = f"{row['request']:>{width}}/{total}  {row['concept'] or 'untouched model':<18}"
    return f"{head} UA {ua}  RA-I {ra_i}  RA-C {ra_c}  drift {row['drift_l2']:7.3f}  ({cost})"


def domain_of(predictions: pd.DataFrame, concepts: list[str]) -> str:
    """The column of predictions that holds every one of the concepts."""
    domains = [name.removeprefix("predicted_") for name in predictions.columns if name.startswith("predicted_")]
    for domain in domains:
        if set(concepts) <= set(predictions[domain]):
            return domain
    raise ValueError(f"predictions hold no image of some of {', '.join(concepts)}; the evaluation is incomplete")


def check_labels(sequence: Sequence, evaluator: Evaluator) -> None:
    """Every concept whose accuracy is measured must be a label of the evaluator. Raises ValueError."""
    labels = evaluator.labels()
    for concept in (*sequence.targets, *sequence.retain, *sequence.cross_retain):
        if concept.domain in sequence.judged and concept.name not in labels.get(concept.domain, []):
            known = ", ".join(labels.get(concept.domain, [])[:5]) or "none"
            raise ValueError(f"sequence: the evaluator has no {concept.domain} {concept.name!r} (it knows {known}, ...)")


@dataclass(frozen=True)
class Evaluation:
    """predictions: one row per image. thumbnails: the first image of each (concept, cross concept), uint8 [S, S, 3]."""

    predictions: pd.DataFrame
    thumbnails: dict[tuple[str, str], Image.Image]


def evaluate(
    model: "DiffusionModel", evaluator: Evaluator, sequence: Sequence, concepts: list[Concept], step: int, settings: EvalSettings
) -> Evaluation:
    """Generate and classify the sequence's evaluation images of the concepts.

    Args:
        step: number of the request, for the rows of predictions.csv; it does not touch the noise.

    Returns:
        The rows (step, prompt, <domain>, <cross domain>, seed, predicted_..., score_..., face where it is looked for) and
        thumbnails for the grid.
    """
    wanted = sequence.evaluation_images(concepts)
    batches = [range(start, min(start + settings.batch_size, len(wanted))) for start in range(0, len(wanted), settings.batch_size)]
    # of several processes each takes whole batches: the images are those of a single one, bitwise
    own = [place for batch in batches[parallel.rank() :: parallel.size()] for place in batch]
    cells = [(image.concept, image.cross) for image in wanted]
    shown_first = {cells.index(cell) for cell in set(cells)}  # what the grid shows
    seen: dict[int, Seen | None] = {}

    def look(rows: slice, latents: Tensor) -> None:
        images = model.decode_latents(latents)
        judged = judge(evaluator, images, sequence) if images.isfinite().all() else [None] * len(images)
        for place, row, image in zip(own[rows], judged, images, strict=True):
            seen[place] = row and Seen(row, to_picture(image) if place in shown_first else None)

    with parallel.alone():
        sample_in_batches(model, [wanted[place] for place in own], settings, look)
    seen = {place: found for part in parallel.in_turn(seen) for place, found in part.items()}
    if not all(seen.values()):
        raise SamplingError(
            f"the images after request {step} are not finite: the weights diverged; lower train.lr. Finished requests are kept"
            if step
            else f"the images of the untouched model are not finite: its checkpoint is damaged, or "
            f"model.precision={model.precision} is not for it; try fp32"
        )
    rows, thumbnails = [], {}
    for place, shown in enumerate(wanted):
        row = {"step": step, "prompt": shown.prompt, sequence.domain: shown.concept, sequence.cross_domain: shown.cross}
        rows.append(row | {"seed": shown.seed} | seen[place].row)
        if place in shown_first:
            thumbnails[cells[place]] = seen[place].picture
    return Evaluation(pd.DataFrame(rows), thumbnails)


@dataclass(frozen=True)
class Seen:
    """What was seen in one image. row: its columns of predictions.csv. picture: for the grid, where it shows this image."""

    row: dict[str, object]
    picture: Image.Image | None


def sample_in_batches(
    model: "DiffusionModel", wanted: list[ImagePrompt], settings: EvalSettings, look: Callable[[slice, Tensor], None]
) -> None:
    """Sample the wanted images batch by batch. Where GPU memory runs out, batches become half as large.

    Args:
        look: is called in order with each batch: which of those wanted it holds, and their latents [B, C, H, W].
    """
    from cu_runner.aside import Aside  # diffusers takes seconds, and reading metrics does not need it
    from cu_runner.sampling import halve_batches, largest_batch, progress, sample_latents

    done = 0
    with progress(len(wanted), "evaluate") as bar:

        def finish(rows: slice, latents: Tensor) -> None:
            nonlocal done
            look(rows, latents)
            done = rows.stop
            bar.update(len(latents))

        while done < len(wanted):
            size = largest_batch(model, settings.batch_size)
            try:
                with Aside(model.device, settings.overlap) as aside:
                    for start in range(done, len(wanted), size):
                        rows = slice(start, min(start + size, len(wanted)))
                        prompts, seeds = [image.prompt for image in wanted[rows]], [image.seed for image in wanted[rows]]
                        aside.run(partial(finish, rows), sample_latents(model, prompts, seeds, settings))
            except torch.OutOfMemoryError:
                if not halve_batches(model, size):
                    raise


def judge(evaluator: Evaluator, images: Tensor, sequence: Sequence) -> list[dict[str, object]]:
    """What the evaluator sees in images [B, 3, S, S]: of each its columns of predictions.csv."""
    predictions = evaluator.predict(images)
    found = []
    for i in range(len(images)):
        row: dict[str, object] = {}
        for kind in sequence.judged:
            row[f"predicted_{kind}"] = predictions[kind].labels[i]
            row[f"score_{kind}"] = round(predictions[kind].scores[i], 4)
        if (faces := predictions[sequence.domain].faces) is not None:
            row["face"] = int(faces[i])
        found.append(row)
    return found


def to_picture(image: Tensor, largest: int = 128) -> Image.Image:
    """An image [3, S, S] in 0..1 as a picture of at most `largest` pixels a side."""
    picture = Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())
    picture.thumbnail((largest, largest))
    return picture


GRID_LEFT, GRID_TOP, GRID_GAP = 132, 44, 2  # pixels of a grid: margin for the labels of rows and of columns, space between images


def draw_grid(thumbnails: dict[tuple[str, str], Image.Image], unlearned: list[str], title: str) -> bytes:
    """PNG of thumbnails: rows concepts, columns cross concepts; the rows of unlearned concepts have a red bar and label."""
    rows = list(dict.fromkeys(row for row, _ in thumbnails))
    columns = list(dict.fromkeys(column for _, column in thumbnails))
    side = next(iter(thumbnails.values())).width
    font, gap, left, top = ImageFont.load_default(size=12), GRID_GAP, GRID_LEFT, GRID_TOP
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
            if (row, column) in thumbnails:
                canvas.paste(thumbnails[row, column], (left + x * (side + gap), height))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()


def read_grid(png: bytes, rows: list[str], columns: list[str]) -> dict[tuple[str, str], Image.Image]:
    """The thumbnails of a grid that draw_grid made. rows: its concepts from the top; columns: its cross concepts from the left."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    side = (picture.width - GRID_LEFT) // len(columns) - GRID_GAP
    cells = [(row, column, x, y) for y, row in enumerate(rows) for x, column in enumerate(columns)]
    corners = {(row, column): (GRID_LEFT + x * (side + GRID_GAP), GRID_TOP + y * (side + GRID_GAP)) for row, column, x, y in cells}
    return {cell: picture.crop((left, top, left + side, top + side)) for cell, (left, top) in corners.items()}
