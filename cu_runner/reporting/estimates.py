"""What runs measure that differ in their seed alone: a mean, and its 95% interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cu_runner.evaluators.metrics import rows_of, with_face
from cu_runner.evaluators.recovered import CONTROLS, accuracy_by_dose, at_strongest, read_recovery
from cu_runner.reporting.intervals import over_images, over_seeds, widest
from cu_runner.store.layout import PREDICTIONS, RECOVERY
from cu_runner.store.run_record import RunRecord

# metrics that are shares of images, by their names in metrics.csv
SHARES = {"UA": "UA", "RA_I": "RA-I", "RA_C": "RA-C", "RA_C_retained": "RA-C retained"}
Ends = tuple[float, float]
UNKNOWN: Ends = (math.nan, math.nan)


def label_of(metric: str) -> str:
    """Return a metric as tables call it: recovered_noise is "under noise"."""
    if metric == "UA_worst":
        return "worst UA"
    return SHARES.get(metric) or f"under {metric.removeprefix('recovered_').replace('_', ', ')}"


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
    """Return the estimate of a mean over concepts, each with its own share of images.

    Args:
        percents: the mean over the concepts, of each seed.
        hits, num_images: images that were recognised, and all images, of all concepts and seeds
            together: the interval over the images is that of their share.
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
    """Return on how many images of a step each metric rests; {} of one that was not evaluated.

    UA, where faces are looked for, rests on those that show one; RA-I too where these alone count.

    Raises:
        StoreError: predictions.csv is damaged.
    """
    if not run.records[index].evaluated:
        return {}
    run.require(index, PREDICTIONS)
    rows, unlearned = run.predictions(index), run.unlearned(index) if index else run.targets
    so_far = [part for part in run.measured if {*part.targets} & {*unlearned}]
    own = dict.fromkeys(("UA", "RA_I", "RA_C", "RA_C_retained"), 0)
    for part in so_far or run.measured:
        shown = rows_of(rows, part.domain)
        concepts, with_faces = shown[part.domain], with_face(shown)[part.domain]
        near = with_faces if "face_only" in rows else concepts
        own["UA"] += int(with_faces.isin(unlearned).sum())
        own["RA_I"] += int(near.isin(part.retain).sum())
        own["RA_C"] += len(shown)
        own["RA_C_retained"] += int(concepts.isin(part.retain).sum())
    return own | recovered_counts(run, index, own["UA"])


def recovered_counts(run: RunRecord, index: int, by_name: int) -> dict[str, int]:
    """Return on how many images each accuracy of a probe rests; UA_worst on the fewest of them.

    Args:
        by_name: on how many images UA rests.

    Raises:
        StoreError: recovery.csv is damaged.
    """
    if RECOVERY not in run.records[index].files:
        return {}
    run.require(index, RECOVERY)
    rows = read_recovery(run.step_dir(index) / RECOVERY)
    counts: dict[str, int] = {}
    asked: list[int] = []
    for probe, found in accuracy_by_dose(rows, run.domains).groupby("probe", sort=False):
        here = at_strongest(found)
        only_retained = "erased" not in set(found["group"])
        for ending, (group, weights) in CONTROLS.items():
            kind = "retained" if only_retained else group
            own = here[(here["group"] == kind) & (here["weights"] == weights)]
            counts[f"recovered_{probe}{ending}"] = int(own["images"].sum())
        if not only_retained:
            asked.append(counts[f"recovered_{probe}"])
    return {name: count for name, count in counts.items() if count} | {
        "UA_worst": min([by_name, *asked])
    }
