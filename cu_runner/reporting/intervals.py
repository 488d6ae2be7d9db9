"""95% intervals of what a run measures: over seeds, over images, and of differences."""

from __future__ import annotations

import math

from scipy.stats import binomtest, sem
from scipy.stats import t as student_t

LEVEL = 0.95


def over_seeds(values: list[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its interval by Student's t; None for a single value, which has none."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, float(student_t.ppf((1 + LEVEL) / 2, len(values) - 1) * sem(values))


def over_images(percent: float, num_images: int) -> tuple[float, float]:
    """Both ends, in percent, of the interval of a share of images, to the nearest image (Wilson 1927); NaN of NaN.

    It holds the chance of which noise an image got, and nothing of how a run would differ with another seed.
    """
    if math.isnan(percent):
        return math.nan, math.nan
    low, high = binomtest(round(percent / 100 * num_images), num_images).proportion_ci(
        LEVEL, method="wilson"
    )
    return 100 * low, 100 * high


def of_sum(terms: list[tuple[int, float, tuple[float, float]]]) -> tuple[float, float]:
    """The interval of a sum of independent numbers, from those of each: of two shares, Newcombe's (1998, method 10).

    Args:
        terms: sign (1 or -1), value and both ends of the interval of each.
    """
    total = below = above = 0.0
    for sign, value, (low, high) in terms:
        total += sign * value
        below += (value - low if sign > 0 else high - value) ** 2
        above += (high - value if sign > 0 else value - low) ** 2
    return total - math.sqrt(below), total + math.sqrt(above)
