"""95% intervals of what a run measures: over seeds, over images, and of differences."""

from __future__ import annotations

import math

LEVEL = 0.95


def over_seeds(values: list[float]) -> tuple[float, float | None]:
    """Return the mean, and half the width of its interval by Student's t.

    A single value has none: None.
    """
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, None
    from scipy import stats

    return mean, float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * stats.sem(values))


def over_images(percent: float, num_images: int) -> tuple[float, float]:
    """Return both ends, in percent, of the interval of a share of images (Wilson 1927).

    The share is taken to the nearest image; NaN of NaN. It holds the chance of which noise an image
    got, and nothing of how a run would differ with another seed.
    """
    if math.isnan(percent):
        return math.nan, math.nan
    from scipy.stats import binomtest

    found = binomtest(round(percent / 100 * num_images), num_images)
    low, high = found.proportion_ci(LEVEL, method="wilson")
    return 100 * low, 100 * high


def widest(percent: float, half: float | None, images: tuple[float, float]) -> tuple[float, float]:
    """Return the interval of a percentage: over seeds, but never narrower than that of its images.

    A few seeds can agree by chance. It stays within 0 and 100; NaN of NaN.

    Args:
        half: of the interval over seeds; None of one seed.
        images: both ends of that over images.
    """
    if math.isnan(percent):
        return math.nan, math.nan
    low, high = min(images[0], percent - (half or 0.0)), max(images[1], percent + (half or 0.0))
    return max(low, 0.0), min(high, 100.0)


def of_sum(terms: list[tuple[int, float, tuple[float, float]]]) -> tuple[float, float]:
    """Return the interval of a sum of independent numbers, from those of each.

    Of two shares it is Newcombe's (1998, method 10).

    Args:
        terms: sign (1 or -1), value and both ends of the interval of each.
    """
    total = below = above = 0.0
    for sign, value, (low, high) in terms:
        total += sign * value
        below += (value - low if sign > 0 else high - value) ** 2
        above += (high - value if sign > 0 else value - low) ** 2
    return total - math.sqrt(below), total + math.sqrt(above)
