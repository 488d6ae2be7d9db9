"""Generate the evaluation images of some concepts and let the evaluator name what they show."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from cu_runner.concepts.entries import comparable
from cu_runner.concepts.sequence import Concept, ImagePrompt, Sequence
from cu_runner.evaluators.base import Evaluator, Prediction
from cu_runner.evaluators.grid import to_picture
from cu_runner.evaluators.metrics import FACE_COLUMNS, MEASURES
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.sampling import in_batches, not_finite, sample_images
from cu_runner.runtime import distributed
from cu_runner.runtime.lazy import pd, torch, without_gradients
from cu_runner.runtime.returned import is_number, kind_of, refused
from cu_runner.schema.settings import EvalSettings

if TYPE_CHECKING:
    from torch import Tensor

FACES_OF = "faces_of"  # the domain whose images must show a face, of a mixed sequence
Row = dict[str, str | int | float]


def check_labels(sequence: Sequence, evaluator: Evaluator) -> None:
    """Raise ValueError unless the evaluator knows every concept whose accuracy is measured."""
    labels = evaluator.labels()
    named = [
        concept
        for each in sequence.by_domain
        for concept in (*each.targets, *each.retain, *each.cross_retain)
    ]
    for concept in named:
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
    cells = [(image.concept, image.cross) for image in wanted]

    def draw(places: list[int], on_step: Callable[[float], None]) -> Tensor:
        prompts, seeds = zip(*((wanted[i].prompt, wanted[i].seed) for i in places), strict=True)
        return sample_images(model, list(prompts), list(seeds), settings, on_step)

    seen = look_at(
        Judge(model, evaluator, sequence, settings),
        len(wanted),
        draw,
        "evaluate",
        f"the images {f'after request {step}' if step else 'of the untouched model'}",
        step,
        pictured={cells.index(cell) for cell in set(cells)},  # what the grid shows
    )
    table, thumbnails = [], {}
    domains = {concept.name: concept.domain for concept in concepts}
    for place, shown in enumerate(wanted):
        row: dict[str, str | int | float] = {
            "step": step,
            "prompt": shown.prompt,
            **domain_columns(sequence, shown, domains[shown.concept]),
            "seed": shown.seed,
        }
        table.append(row | only_own_faces(seen[place].row, row))
        if picture := seen[place].picture:
            thumbnails[cells[place]] = picture
    return Evaluation(pd.DataFrame(table), thumbnails)


def domain_columns(sequence: Sequence, shown: ImagePrompt, domain: str) -> dict[str, str]:
    """Return what an image of a concept of a domain shows, by domain.

    Of a mixed sequence also which domain that is.
    """
    if not sequence.parts:
        return {sequence.domain: shown.concept, sequence.cross_domain: shown.cross}
    named = {domain: shown.concept, sequence.parts[domain].cross_domain: shown.cross}
    return {MEASURES: domain, **{each: named.get(each, "") for each in sequence.columns}}


def only_own_faces(seen: Row, row: Row) -> Row:
    """Return what is seen in an image; it counts whether it shows a face or not, if it need not."""
    if MEASURES not in row or (wanted := seen.get(FACES_OF)) is None:
        return seen
    kept = {name: value for name, value in seen.items() if name != FACES_OF}
    if row[MEASURES] != wanted:
        kept |= {name: 1 for name in FACE_COLUMNS.values() if name in kept}
    return kept


@dataclass(frozen=True)
class Judge:
    """What names the content of a model's images, in the domains of a sequence."""

    model: DiffusionModel
    evaluator: Evaluator
    sequence: Sequence
    settings: EvalSettings


def look_at(
    judge: Judge,
    number: int,
    draw: Callable[[list[int], Callable[[float], None]], Tensor],
    label: str,
    what: str,
    step: int,
    pictured: Container[int] = (),
) -> list[Seen]:
    """Make images batch by batch and name what each shows, in their order.

    Of several processes each takes whole batches: the images are those of a single one, bitwise.

    Args:
        number: of images.
        draw: makes a batch [B, 3, S, S] of those at some places, and tells which share is done.
        label: what the progress bar says. what: the images, in words. step: request, of an error.
        pictured: places of which the picture is kept.

    Raises:
        SamplingError: an image is not finite.
    """
    model, settings = judge.model, judge.settings
    batches = [
        range(start, min(start + settings.batch_size, number))
        for start in range(0, number, settings.batch_size)
    ]
    own = [place for batch in batches[distributed.rank() :: distributed.size()] for place in batch]
    found: list[Seen | None] = []  # of every image of this process that is done

    def look(rows: slice, on_step: Callable[[float], None]) -> list[Seen | None]:
        """Name what a batch of images shows; None for all of them where one is not finite."""
        images = draw(own[rows], on_step)
        if not images.isfinite().all():
            return [None] * len(images)
        if settings.jpeg is not None:
            images = through_jpeg(images, settings.jpeg)
        named = classify(judge.evaluator, images, judge.sequence)
        return [
            Seen(row, to_picture(image) if place in pictured else None)
            for place, row, image in zip(own[rows], named, images, strict=True)
        ]

    with distributed.alone():
        for batch in in_batches(model, len(own), settings.batch_size, label, look):
            found += batch
    parts = distributed.in_turn(dict(zip(own, found, strict=True)))
    seen = {place: image for part in parts for place, image in part.items() if image is not None}
    if len(seen) < number:
        raise not_finite(model, what, step)
    return [seen[place] for place in range(number)]


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


def check_answers(evaluator: Evaluator, found: object, kinds: Iterable[str], number: int) -> None:
    """Raise ReturnedError unless there is a label and a score for every image in every domain."""
    wanted = f"a Prediction of {number} labels and scores for every domain"
    if not isinstance(found, Mapping):
        raise refused(evaluator, "predict", kind_of(found), wanted)
    for kind in kinds:
        answer = found.get(kind)
        if not isinstance(answer, Prediction):
            raise refused(evaluator, "predict", f"{kind_of(answer)} for {kind!r}", wanted)
        sizes = [len(answer.labels), len(answer.scores)]
        if {*sizes, number if answer.faces is None else len(answer.faces)} != {number}:
            what = f"{sizes[0]} labels and {sizes[1]} scores for {kind!r} of {number} images"
            raise refused(evaluator, "predict", what, wanted)
        if strange := [label for label in answer.labels if not isinstance(label, str)]:
            raise refused(evaluator, "predict", f"{kind_of(strange[0])} as a label", wanted)
        if odd := [score for score in answer.scores if not is_number(score)]:
            raise refused(evaluator, "predict", f"{kind_of(odd[0])} as a score", wanted)


@without_gradients
def classify(
    evaluator: Evaluator, images: Tensor, sequence: Sequence
) -> list[dict[str, str | int | float]]:
    """Return the evaluator's columns of predictions.csv for each of the images [B, 3, S, S].

    Raises:
        ValueError: a score is no number.
        ReturnedError: the evaluator does not answer every image in every domain.
    """
    predictions = evaluator.predict(images)
    check_answers(evaluator, predictions, sequence.measured_domains, len(images))
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
        for own in (each.domain for each in sequence.by_domain):
            if (faces := predictions[own].faces) is not None:
                row[FACE_COLUMNS[predictions[own].faceless]] = int(faces[i])
                row |= {FACES_OF: own} if sequence.parts else {}
        found.append(row)
    return found
