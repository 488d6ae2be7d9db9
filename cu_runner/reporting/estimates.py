"""What runs measure that differ in their seed alone: a mean, and its 95% interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cu_runner.evaluators.metrics import with_face
from cu_runner.reporting.intervals import over_images, over_seeds, widest
from cu_runner.store.layout import PREDICTIONS
from cu_runner.store.run_record import RunRecord

# metrics that are shares of images, by their names in metrics.csv
SHARES = {"UA": "UA", "RA_I": "RA-I", "RA_C": "RA-C", "RA_C_retained": "RA-C retained"}
Ends = tuple[float, float]
UNKNOWN: Ends = (math.nan, math.nan)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    half: of its interval over the seeds; None of one. images: both ends of that over the images of
    all seeds; NaN of what is no share of images. ends: those of the interval that is shown.
    """

    mean: float
    half: float | None
    images: Ends
    ends: Ends


NOTHING = Estimate(math.nan, None, UNKNOWN, UNKNOWN)  # of what was not measured


def of_shares(percents: list[float], num_images: int) -> Estimate:
    """Return the estimate of a share of images, from that of each seed.

    Its interval is never narrower than that over the images, and stays within 0 and 100.

    Args:
        num_images: on which the share of one seed rests.
    """
    mean, half = over_seeds(percents)
    images = over_images(mean, len(percents) * num_images)
    return Estimate(mean, half, images, widest(mean, half, images))


def of_hits(percents: list[float], hits: int, num_images: int) -> Estimate:
    """Return the estimate of a share of images that is a mean over concepts, from that of each seed.

    Its interval over the images is that of the hits among the images of all concepts and seeds.

    Args:
        hits, num_images: of all seeds together.
    """
    mean, half = over_seeds(percents)
    images = over_images(100 * hits / num_images, num_images)
    return Estimate(mean, half, images, widest(mean, half, images))


def of_sizes(values: list[float]) -> Estimate:
    """Return the estimate of what is 0 at least; of one seed it has no interval."""
    mean, half = over_seeds(values)
    ends = UNKNOWN if half is None else (max(mean - half, 0.0), mean + half)
    return Estimate(mean, half, UNKNOWN, ends)


def image_counts(run: RunRecord, index: int) -> dict[str, int]:
    """Return on how many images of a step each metric rests.

    UA, where faces are looked for, rests on those that show one; RA-I too where these alone count.

    Raises:
        StoreError: predictions.csv is damaged.
    """
    run.require(index, PREDICTIONS)
    rows, sequence = run.predictions(index), run.config["sequence"]
    concepts, with_faces = rows[sequence["domain"]], with_face(rows)[sequence["domain"]]
    unlearned = run.unlearned(index) if index else sequence["targets"]
    near = with_faces if "face_only" in rows else concepts
    return {
        "UA": int(with_faces.isin(unlearned).sum()),
        "RA_I": int(near.isin(sequence["retain"]).sum()),
        "RA_C": len(rows),
        "RA_C_retained": int(concepts.isin(sequence["retain"]).sum()),
    }
