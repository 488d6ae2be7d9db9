"""Generate the evaluation images of some concepts and let the evaluator name what they show."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from cu_runner.concepts.entries import comparable
from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.evaluators.base import Evaluator
from cu_runner.evaluators.grid import to_picture
from cu_runner.evaluators.metrics import FACE_COLUMNS
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.sampling import generate, not_finite
from cu_runner.runtime import distributed
from cu_runner.runtime.lazy import pd, torch, without_gradients
from cu_runner.schema.settings import EvalSettings

if TYPE_CHECKING:
    from torch import Tensor


def check_labels(sequence: Sequence, evaluator: Evaluator) -> None:
    """Raise ValueError unless the evaluator knows every concept whose accuracy is measured."""
    labels = evaluator.labels()
    for concept in (*sequence.targets, *sequence.retain, *sequence.cross_retain):
        if concept.domain in sequence.measured_domains and concept.name not in labels.get(
            concept.domain, []
        ):
            own = labels.get(concept.domain, [])
            alike = [label for label in own if comparable(label) == comparable(concept.name)]
            known = ", ".join(alike or own[:5]) or "none"
            raise ValueError(
                f"sequence: the evaluator has no {concept.domain} {concept.name!r} "
                f"(it knows {known}{'' if alike else ', ...'})"
            )


@dataclass(frozen=True)
class Evaluation:
    """What was measured after one request.

    predictions: one row per image. thumbnails: the first image of each (concept, cross concept),
    uint8 [S, S, 3].
    """

    predictions: pd.DataFrame
    thumbnails: dict[tuple[str, str], Image.Image]


def evaluate(
    model: DiffusionModel,
    evaluator: Evaluator,
    sequence: Sequence,
    concepts: list[Concept],
    step: int,
    settings: EvalSettings,
) -> Evaluation:
    """Generate and classify the sequence's evaluation images of the concepts.

    Args:
        step: number of the request, for the rows of predictions.csv; it does not touch the noise.

    Returns:
        The rows (step, prompt, <domain>, <cross domain>, seed, predicted_..., score_..., and one of
        FACE_COLUMNS where faces are looked for) and thumbnails for the grid.

    Raises:
        SamplingError: an image is not finite.
    """
    wanted = sequence.evaluation_images(concepts)
    batches = [
        range(start, min(start + settings.batch_size, len(wanted)))
        for start in range(0, len(wanted), settings.batch_size)
    ]
    # of several processes each takes whole batches: the images are those of a single one, bitwise
    own = [place for batch in batches[distributed.rank() :: distributed.size()] for place in batch]
    cells = [(image.concept, image.cross) for image in wanted]
    shown_first = {cells.index(cell) for cell in set(cells)}  # what the grid shows
    found: list[Seen | None] = []  # of every image of this process that is done

    def look(images: Tensor) -> list[Seen | None]:
        """Name what a batch of images shows; None for all of them where one is not finite."""
        if not images.isfinite().all():
            return [None] * len(images)
        if settings.jpeg is not None:
            images = through_jpeg(images, settings.jpeg)
        rows = classify(evaluator, images, sequence)
        return [
            Seen(row, to_picture(image) if place in shown_first else None)
            for place, row, image in zip(own[len(found) :], rows, images, strict=False)
        ]

    prompts, seeds = [wanted[place].prompt for place in own], [wanted[place].seed for place in own]
    with distributed.alone():
        for batch in generate(
            model,
            prompts,
            seeds,
            settings,
            batch_size=settings.batch_size,
            label="evaluate",
            transform=look,
        ):
            found += batch
    parts = distributed.in_turn(dict(zip(own, found, strict=True)))
    seen = {place: image for part in parts for place, image in part.items() if image is not None}
    if len(seen) < len(wanted):
        after = f"after request {step}" if step else "of the untouched model"
        raise not_finite(model, f"the images {after}", step)
    table, thumbnails = [], {}
    for place, shown in enumerate(wanted):
        row: dict[str, str | int | float] = {
            "step": step,
            "prompt": shown.prompt,
            sequence.domain: shown.concept,
            sequence.cross_domain: shown.cross,
            "seed": shown.seed,
        }
        table.append(row | seen[place].row)
        if picture := seen[place].picture:
            thumbnails[cells[place]] = picture
    return Evaluation(pd.DataFrame(table), thumbnails)


def through_jpeg(images: Tensor, quality: int) -> Tensor:
    """Return images [B, 3, S, S] in 0..1 as they are read back from JPEG files."""
    read = []
    for image in images:
        file = io.BytesIO()
        to_picture(image, max(image.shape)).save(file, "JPEG", quality=quality)
        pixels = bytearray(Image.open(file).tobytes())
        read.append(torch.frombuffer(pixels, dtype=torch.uint8).view(*image.shape[1:], 3))
    return torch.stack(read).permute(0, 3, 1, 2).float().div(255).to(images.device)


@dataclass(frozen=True)
class Seen:
    """What an image shows: its columns of predictions.csv, and its picture if the grid has it."""

    row: dict[str, str | int | float]
    picture: Image.Image | None


@without_gradients
def classify(
    evaluator: Evaluator, images: Tensor, sequence: Sequence
) -> list[dict[str, str | int | float]]:
    """Return the evaluator's columns of predictions.csv for each of the images [B, 3, S, S].

    Raises:
        ValueError: a score is no number.
    """
    predictions = evaluator.predict(images)
    for kind in sequence.measured_domains:
        if not all(math.isfinite(score) for score in predictions[kind].scores):
            raise ValueError(
                f"evaluator: its judge of {kind} answers NaN to a finite image, so its labels mean "
                "nothing; its weights or its mean and std are damaged: give another one"
            )
    found = []
    for i in range(len(images)):
        row: dict[str, str | int | float] = {}
        for kind in sequence.measured_domains:
            row[f"predicted_{kind}"] = predictions[kind].labels[i]
            row[f"score_{kind}"] = round(predictions[kind].scores[i], 4)
        if (faces := predictions[sequence.domain].faces) is not None:
            row[FACE_COLUMNS[predictions[sequence.domain].faceless]] = int(faces[i])
        found.append(row)
    return found
