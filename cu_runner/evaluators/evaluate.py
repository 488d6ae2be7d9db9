"""Generate the evaluation images of some concepts and let the evaluator name what they show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from PIL import Image

from cu_runner.concepts.sequence import Concept, ImagePrompt, Sequence
from cu_runner.evaluators.base import Evaluator
from cu_runner.evaluators.grid import to_picture
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.runtime import distributed
from cu_runner.runtime.lazy import pd, torch
from cu_runner.schema.errors import SamplingError
from cu_runner.schema.settings import EvalSettings

if TYPE_CHECKING:
    from torch import Tensor


def check_labels(sequence: Sequence, evaluator: Evaluator) -> None:
    """Every concept whose accuracy is measured must be a label of the evaluator. Raises ValueError."""
    labels = evaluator.labels()
    for concept in (*sequence.targets, *sequence.retain, *sequence.cross_retain):
        if concept.domain in sequence.measured_domains and concept.name not in labels.get(concept.domain, []):
            known = ", ".join(labels.get(concept.domain, [])[:5]) or "none"
            raise ValueError(
                f"sequence: the evaluator has no {concept.domain} {concept.name!r} (it knows {known}, ...)"
            )


@dataclass(frozen=True)
class Evaluation:
    """predictions: one row per image. thumbnails: the first image of each (concept, cross concept), uint8 [S, S, 3]."""

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
        The rows (step, prompt, <domain>, <cross domain>, seed, predicted_..., score_..., face where it is looked for) and
        thumbnails for the grid.
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
    seen: dict[int, Seen | None] = {}

    def receive(rows: slice, latents: Tensor) -> None:
        images = model.decode_latents(latents)
        judged = (
            classify(evaluator, images, sequence)
            if images.isfinite().all()
            else [None] * len(images)
        )
        for place, row, image in zip(own[rows], judged, images, strict=True):
            seen[place] = row and Seen(row, to_picture(image) if place in shown_first else None)

    with distributed.alone():
        sample_in_batches(model, [wanted[place] for place in own], settings, receive)
    seen = {place: found for part in distributed.in_turn(seen) for place, found in part.items()}
    if not all(seen.values()):
        raise SamplingError(
            f"the images after request {step} are not finite: the weights diverged; lower train.lr. Finished requests are kept"
            if step
            else f"the images of the untouched model are not finite: its checkpoint is damaged, or "
            f"model.precision={model.precision} is not for it; try fp32"
        )
    rows, thumbnails = [], {}
    for place, shown in enumerate(wanted):
        row = {
            "step": step,
            "prompt": shown.prompt,
            sequence.domain: shown.concept,
            sequence.cross_domain: shown.cross,
        }
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
    model: DiffusionModel,
    wanted: list[ImagePrompt],
    settings: EvalSettings,
    receive: Callable[[slice, Tensor], None],
) -> None:
    """Sample the wanted images batch by batch. Where GPU memory runs out, batches become half as large.

    Args:
        receive: is called in order with each batch: which of those wanted it holds, and their latents [B, C, H, W].
    """
    from cu_runner.models.sampling import halve_batches, largest_batch, progress, sample_latents
    from cu_runner.runtime.background import (
        Background,  # diffusers takes seconds, and reading metrics does not need it
    )

    done = 0
    with progress(len(wanted), "evaluate") as bar:

        def finish(rows: slice, latents: Tensor) -> None:
            nonlocal done
            receive(rows, latents)
            done = rows.stop
            bar.update(len(latents))

        while done < len(wanted):
            size = largest_batch(model, settings.batch_size)
            try:
                with Background(model.device, settings.overlap) as aside:
                    for start in range(done, len(wanted), size):
                        rows = slice(start, min(start + size, len(wanted)))
                        prompts, seeds = (
                            [image.prompt for image in wanted[rows]],
                            [image.seed for image in wanted[rows]],
                        )
                        aside.run(
                            partial(finish, rows), sample_latents(model, prompts, seeds, settings)
                        )
            except torch.OutOfMemoryError:
                if not halve_batches(model, size):
                    raise


def classify(evaluator: Evaluator, images: Tensor, sequence: Sequence) -> list[dict[str, object]]:
    """What the evaluator sees in images [B, 3, S, S]: of each its columns of predictions.csv."""
    predictions = evaluator.predict(images)
    found = []
    for i in range(len(images)):
        row: dict[str, object] = {}
        for kind in sequence.measured_domains:
            row[f"predicted_{kind}"] = predictions[kind].labels[i]
            row[f"score_{kind}"] = round(predictions[kind].scores[i], 4)
        if (faces := predictions[sequence.domain].faces) is not None:
            row["face"] = int(faces[i])
        found.append(row)
    return found
