"""Statistics of the studies.

Correlations with intervals, how near two names are as text, what a change of weights does to it,
intervals of what pairs of names show.

Shapes: B prompts, L tokens, D text width, out attention width.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch.nn.functional as F
from torch import Tensor

from cu_runner.models.diffusion import DiffusionModel

NORMAL = 1.959964  # half width of the central 95% of a standard normal
RESAMPLES = 500


@dataclass(frozen=True)
class Correlation:
    """A coefficient, its 95% interval (NaN below four points) and the number of points."""

    value: float
    low: float
    high: float
    number: int


def pearson(x: pd.Series, y: pd.Series) -> Correlation:
    """Return the linear correlation; its interval by Fisher's z, whose variance is 1 / (n - 3)."""
    return with_interval(x, y, 1.0)


def spearman(x: pd.Series, y: pd.Series) -> Correlation:
    """Return the rank correlation, equal values with their mean rank.

    z has the variance 1.06 / (n - 3) (Fieller et al. 1957).
    """
    return with_interval(x.rank(), y.rank(), 1.06)


def with_interval(x: pd.Series, y: pd.Series, variance: float) -> Correlation:
    """Return Pearson's r of two series, row by row; NaN where one is constant.

    The interval is tanh(atanh r -+ 1.96 sqrt(variance / (n - 3))).
    """
    number = len(x)
    if number < 2 or x.nunique() == 1 or y.nunique() == 1:
        return Correlation(float("nan"), float("nan"), float("nan"), number)
    r = float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))
    if number < 4 or abs(r) == 1:  # z is infinite at 1: the interval is the point
        end = float("nan") if number < 4 else r
        return Correlation(r, end, end, number)
    half = NORMAL * np.sqrt(variance / (number - 3))
    return Correlation(
        r, float(np.tanh(np.arctanh(r) - half)), float(np.tanh(np.arctanh(r) + half)), number
    )


def text_similarity(
    model: DiffusionModel, names: list[str], targets: list[str], domain: str
) -> pd.DataFrame:
    """Return cosines of the whole text-encoder outputs, all L x D values of "NAME Domain".

    Rows: names, columns: targets. That is the paper's "X Style" (Lee et al. 2026, arXiv
    2511.07970).
    """
    units = [
        F.normalize(
            model.encode_prompts([f"{name} {domain.capitalize()}" for name in group])
            .hidden.flatten(1)
            .double(),
            dim=1,
        ).cpu()
        for group in (names, targets)
    ]
    return pd.DataFrame((units[0] @ units[1].T).numpy(), index=names, columns=targets)


def near_and_far(similarity: pd.Series) -> tuple[list[str], list[str]]:
    """Return the more similar half of the names, most similar first, and the rest.

    The middle one of an odd number is far.
    """
    names = similarity.sort_values(ascending=False, kind="stable").index.tolist()
    return names[: len(names) // 2], names[len(names) // 2 :]


def output_change(base: Mapping[str, Tensor], delta: Mapping[str, Tensor], text: Tensor) -> float:
    """Return ||(W' - W) X|| / ||W X||, the squares summed over all layers and tokens.

    Args:
        base: weights W [out, D] of every key and value. delta: W' - W of those that changed.
        text: X, encoded prompts [B, L, D].
    """
    tokens = text.double().flatten(0, 1).T
    change = sum((delta[name].double() @ tokens).square().sum() for name in base if name in delta)
    return float(
        (change / sum((weight.double() @ tokens).square().sum() for weight in base.values())) ** 0.5
    )


def distinct_pairs(matrix: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Return the entries of a symmetric matrix [n, n] for all pairs among items [m], as a vector.

    Items may come several times, as in a resample; a pair of an item with itself is left out.
    """
    rows, columns = np.triu_indices(len(items), 1)
    rows, columns = items[rows], items[columns]
    return matrix[rows, columns][rows != columns]


def resamples(number: int) -> list[np.ndarray]:
    """Return RESAMPLES draws of so many items with repeats, always the same; those of one item
    alone, which has no pair, are left out.
    """
    generator = np.random.default_rng(0)
    drawn = (generator.integers(number, size=number) for _ in range(RESAMPLES))
    return [items for items in drawn if len(np.unique(items)) > 1]


def over_items(number: int, values: Iterable[float]) -> tuple[float, float]:
    """Return the 95% interval of a statistic of pairs, by resampling the items that are paired.

    Pairs that share an item are not independent, so items are drawn and not pairs (the vertex
    bootstrap of Snijders & Borgatti 1999). Percentiles; NaN with fewer than three items.

    Args:
        number: of items. values: of the statistic, one for each of resamples().
    """
    if number < 3:
        return float("nan"), float("nan")
    low, high = np.nanpercentile([*values], (2.5, 97.5))
    return float(low), float(high)
