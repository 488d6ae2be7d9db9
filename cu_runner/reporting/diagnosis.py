"""How a run fails and what to try: the signatures of Lee et al. 2026 (arXiv 2511.07970).

SIGNATURES is the whole rule. A condition holds only where the 95% interval of a quantity lies on
one side of its limit: what few images cannot decide is not said. No number of a run depends on it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from cu_runner.evaluators.metrics import Measured, rows_of
from cu_runner.reporting.intervals import of_sum, over_images
from cu_runner.runtime.lazy import pd
from cu_runner.store.layout import PREDICTIONS
from cu_runner.store.records import name_requests
from cu_runner.store.run_record import RunRecord

Interval = tuple[float, float]
UNKNOWN: Interval = (-math.inf, math.inf)  # of what was not measured: no condition on it holds
images_interval = functools.cache(over_images)  # a millisecond each; many come again
COUNTED = ("UA", "UA_current", "UA_previous", "RA_I", "RA_C")  # shares of images


@dataclass(frozen=True)
class Condition:
    """Whether a quantity lies surely above one limit and below another."""

    quantity: str
    above: float = -math.inf
    below: float = math.inf

    def holds(self, table: pd.DataFrame) -> bool:
        """Tell whether the whole interval after the table's last request is between the limits."""
        low, high = QUANTITIES[self.quantity](table)
        return low > self.above and high < self.below


@dataclass(frozen=True)
class Signature:
    """How a run fails, by what it shows, and what to try.

    shows: words for the metrics of a row; those before any request are named with "base_" before.
    unless: a signature that explains this one, which is then not said.
    """

    name: str
    conditions: tuple[Condition, ...]
    shows: str
    attempt: str
    unless: str = ""


# Limits are in percent or points, and chosen here; the paper's runs with interference keep 15 to 18
# of RA-I.
SIGNATURES = (
    Signature(
        "rebound",
        (Condition("rebound", above=5),),
        "UA of earlier concepts is {UA_previous:.1f}, less than at their own requests",
        "protect earlier targets (reg=gradproj with reg.gradproj.earlier=true, or reg=nullspace "
        "with reg.nullspace.earlier=1)",
    ),
    Signature(
        "weak forgetting",
        (Condition("UA", below=90),),
        "UA is {UA:.1f}",
        "another step size (train.lr), more steps (train.steps), or another weight of the method "
        "or the regularizer",
        unless="rebound",
    ),
    Signature(
        "drift",
        (Condition("UA", above=80), Condition("RA_C lost", above=10)),
        "RA-C fell from {base_RA_C:.1f} to {RA_C:.1f} at UA {UA:.1f}",
        "a stronger penalty (reg=l2 with a larger reg.l2.weight), merging (reg=merge), or fewer "
        "trained weights (reg=selft)",
    ),
    Signature(
        "interference",
        (
            Condition("RA_I before", above=50),
            Condition("RA_I", below=25),
            Condition("RA_C lost", below=15),
        ),
        "RA-I is {RA_I:.1f} while RA-C keeps {RA_C:.1f}",
        "projection (reg=gradproj or reg=nullspace)",
    ),
    Signature(
        "degraded images",
        (Condition("CLIP score lost", above=10),),
        "the CLIP score fell from {base_clip_score:.1f} to {clip_score:.1f}",
        "smaller steps (train.lr) or fewer of them, or a penalty (reg=l2)",
    ),
    Signature(
        "far images",
        (Condition("FID grown", above=50),),
        "FID to the reference rose from {base_fid:.1f} to {fid:.1f}",
        "smaller steps (train.lr) or fewer of them, or a penalty (reg=l2)",
    ),
)


# ------------------------------------------------------------------------------------- quantities
def share(row: pd.Series, name: str) -> Interval:
    """Return the interval of a percentage of a row over its images (Wilson 1927)."""
    if name not in row or pd.isna(row[name]) or not row[f"{name}_images"] > 0:
        return UNKNOWN
    return images_interval(float(row[name]), int(row[f"{name}_images"]))


def difference(one: tuple[float, Interval], other: tuple[float, Interval]) -> Interval:
    """Return the interval of a difference of two shares (Newcombe 1998, method 10).

    It takes them as independent; the images have the same noise at every request, and the true
    interval is narrower.
    """
    if UNKNOWN in (one[1], other[1]):
        return UNKNOWN
    return of_sum([(1, *one), (-1, *other)])


def lost(table: pd.DataFrame, name: str) -> Interval:
    """Return the points of a percentage that are gone since before the first request."""
    first, last = table.iloc[0], table.iloc[-1]
    return difference((first[name], share(first, name)), (last[name], share(last, name)))


def rebound(table: pd.DataFrame) -> Interval:
    """Return UA of the earlier concepts at their own requests minus what it is now, in points."""
    if "UA_current" not in table or "UA_previous" not in table:
        return UNKNOWN
    if "request" in table and (table["request"].diff().iloc[1:] != 1).any():
        return UNKNOWN  # some concepts were not measured at their own requests
    own, last = table.iloc[1:-1].dropna(subset="UA_current"), table.iloc[-1]
    number = int(own["UA_current_images"].sum())
    if not number:
        return UNKNOWN
    then = float((own["UA_current"] * own["UA_current_images"]).sum() / number)
    now = (last["UA_previous"], share(last, "UA_previous"))
    return difference((then, images_interval(then, number)), now)


def relative_change(table: pd.DataFrame, name: str) -> Interval:
    """Return the change of a score since before the first request, in percent of it.

    A point: no row holds its spread. A CLIP score varies between prompts by about a tenth of its
    mean: with 20 images a change of 10% is three standard errors.
    """
    if name not in table or table[name].iloc[[0, -1]].isna().any() or not table[name].iloc[0] > 0:
        return UNKNOWN
    change = 100 * (table[name].iloc[-1] / table[name].iloc[0] - 1)
    return change, change


def negative(interval: Interval) -> Interval:
    """Return the interval of minus a number."""
    return -interval[1], -interval[0]


QUANTITIES: dict[str, Callable[[pd.DataFrame], Interval]] = {
    "UA": lambda table: share(table.iloc[-1], "UA"),
    "RA_I": lambda table: share(table.iloc[-1], "RA_I"),
    "RA_I before": lambda table: share(table.iloc[0], "RA_I"),
    "RA_C lost": lambda table: lost(table, "RA_C"),
    "rebound": rebound,
    "CLIP score lost": lambda table: negative(relative_change(table, "clip_score")),
    # of the untouched model FID is measured against a folder of images only, not against itself
    "FID grown": lambda table: relative_change(table, "fid"),
}


# ----------------------------------------------------------------------------------------- of a run
def diagnose(table: pd.DataFrame) -> list[Signature]:
    """Return the signatures that a run shows after the last row of a table.

    Args:
        table: rows of metrics.csv from request 0 on, and beside each of COUNTED how many images it
            rests on, in NAME_images.
    """
    if len(table) < 2:
        return []
    found = [
        each for each in SIGNATURES if all(condition.holds(table) for condition in each.conditions)
    ]
    names = {each.name for each in found}
    return [each for each in found if each.unless not in names]


def with_images(run: RunRecord) -> pd.DataFrame:
    """Return the evaluated rows of a run, and beside each of COUNTED on how many images it rests.

    The untouched model's images are those of every later step. Images without a face are taken
    off: UA is over those with one.

    Raises:
        StoreError: the predictions of step 0 are damaged.
    """
    run.require(0, PREDICTIONS)
    shown = [(rows_of(run.predictions(0), part.domain), part) for part in run.measured]
    images = pd.concat([own[part.domain].value_counts() for own, part in shown])
    crossed = pd.concat([crossed_of(run, own, part) for own, part in shown])
    evaluated = [index for index, record in enumerate(run.records) if record.evaluated]
    table, rows = run.table.iloc[evaluated], []
    for index in evaluated:
        unlearned = run.unlearned(index) if index else run.targets
        so_far = [part for part in run.measured if {*part.targets} & {*unlearned}] or run.measured
        retained = [name for part in so_far for name in part.retain]
        kinds = {"UA": unlearned, "UA_current": unlearned[-1:], "UA_previous": unlearned[:-1]}
        counts = {name: count(images, names) for name, names in kinds.items()}
        if "faceless_unlearned" in table:
            gone = int(table["faceless_unlearned"].loc[index])
            counts = {name: max(number - gone, 0) for name, number in counts.items()}
        counts["RA_I"] = count(images, retained)
        counts["RA_C"] = count(crossed, [*unlearned, *retained])
        rows.append({f"{name}_images": counts[name] for name in COUNTED})
    return table.join(pd.DataFrame(rows, index=table.index))


def crossed_of(run: RunRecord, rows: pd.DataFrame, part: Measured) -> pd.Series:
    """Return how many images of each concept RA-C rests on, in one domain."""
    concepts, sequence = rows[part.domain], run.config["sequence"]
    if "domains" in sequence:  # every image shows something of the other domain
        return concepts.value_counts()
    if part.cross_domain not in rows:
        return concepts.value_counts() * 0
    return concepts[rows[part.cross_domain].isin(sequence["cross_retain"])].value_counts()


def count(images: pd.Series, names: list[str]) -> int:
    """Return how many images the concepts have together; none for one that has no image."""
    return int(images.reindex(names).fillna(0).sum())


def spell(signature: Signature, table: pd.DataFrame) -> str:
    """Return what a run shows after the last row of a table, and what to try, as a sentence."""
    first, last = (
        {str(name): row[name] for name in row.index} for row in (table.iloc[0], table.iloc[-1])
    )
    shows = signature.shows.format(**last, **{f"base_{name}": first[name] for name in first})
    return f"{signature.name}: {shows}. Try {signature.attempt}."


def news(run: RunRecord) -> list[str]:
    """Return a sentence for each signature that the last request of a run shows and the one before
    it did not; none after a request that was not evaluated.
    """
    if not run.records[-1].evaluated:
        return []
    table = with_images(run)
    known = {each.name for each in diagnose(table.iloc[:-1])}
    return [spell(each, table) for each in diagnose(table) if each.name not in known]


def by_signature(runs: dict[str, RunRecord]) -> list[str]:
    """Return a sentence for each signature that some runs show, with them and their requests.

    runs: by label.
    """
    seen: dict[str, list[str]] = {}
    for label, run in runs.items():
        table = with_images(run)
        shown = [
            {each.name for each in diagnose(table.iloc[: end + 1])} for end in range(len(table))
        ]
        for signature in SIGNATURES:
            ends = [end for end, names in enumerate(shown) if signature.name in names]
            if requests := [int(table["request"].iloc[end]) for end in ends]:
                seen.setdefault(signature.name, []).append(f"{label} ({name_requests(requests)})")
    return [
        f"{each.name.capitalize()}: {', '.join(seen[each.name])}. Try {each.attempt}."
        for each in SIGNATURES
        if each.name in seen
    ]
