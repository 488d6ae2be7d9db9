"""What probes of recovery saw, and the metrics, a pure function of it.

recovery.csv has a row per image, recovery_values.csv one per number that needs no image. Accuracies
are in percent. An image counts when it is recognised as the concept, also where the evaluator looks
for faces: one without a face shows nobody.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Ordered
from pathlib import Path
from typing import BinaryIO

from cu_runner.evaluators.metrics import rows_of
from cu_runner.runtime.lazy import pd

Domains = Ordered[tuple[str, str]]  # of unlearned concepts, each with its other domain
Condition = tuple[str, float]  # variant and dose

# group: erased or retained concepts. weights: edited, those of the step, or untouched. variant,
# dose: of the probe. image: its number; several attempts at one have the same, and it counts when
# one of them does. both: 1 where both domains must be recognised.
IMAGE_COLUMNS = ("step", "probe", "group", "weights", "variant", "dose", "image", "both")
VALUE_COLUMNS = ("step", "probe", "group", "weights", "variant", "dose", "concept", "value")
WHOLE = ("step", "seed", "image", "both", "face", "face_only")
CONTROLS = {
    "": ("erased", "edited"),
    "_untouched": ("erased", "untouched"),
    "_retained": ("retained", "edited"),
}
RECOVERED = re.compile(r"UA_worst|recovered_.+")  # metrics of probes
RISE = "rise"  # variant of numbers of which the largest counts, not the mean


def read_recovery(file: Path | BinaryIO) -> pd.DataFrame:
    """Read recovery.csv or recovery_values.csv; names stay text, also "NA" and "007"."""
    rows = pd.read_csv(file, dtype=str, keep_default_na=False)
    numbers: dict[str, type] = {name: int for name in WHOLE if name in rows}
    floats = [name for name in rows if name in ("dose", "value") or str(name).startswith("score_")]
    return rows.astype(numbers | {str(name): float for name in floats})


def accuracy_by_dose(images: pd.DataFrame, domains: Domains) -> pd.DataFrame:
    """Return the percent of images that show their concept, each judged in its own domain.

    Args:
        images: rows of recovery.csv.

    Returns:
        Rows (probe, group, weights, variant, dose, domain, concept, accuracy, hits, images), in the
        order of their first appearance, domain by domain.
    """
    own = [(rows_of(images, domain), domain, cross_domain) for domain, cross_domain in domains]
    found = [accuracy_in(*each) for each in own if len(each[0])]
    return pd.concat(found, ignore_index=True) if found else accuracy_in(*own[0])


def accuracy_in(images: pd.DataFrame, domain: str, cross_domain: str) -> pd.DataFrame:
    """Return the rows of accuracy_by_dose() of one domain's images."""
    shows = images[domain] == images[f"predicted_{domain}"]
    if f"predicted_{cross_domain}" in images:
        shows &= (images["both"] == 0) | (
            images[cross_domain] == images[f"predicted_{cross_domain}"]
        )
    where = ["probe", "group", "weights", "variant", "dose", domain]
    tries = images.assign(shows=shows).groupby([*where, "image"], sort=False)["shows"]
    found = (
        tries.any()
        .reset_index()
        .groupby(where, sort=False)["shows"]
        .agg(["sum", "count"])
        .reset_index()
    )
    found = found.rename(columns={domain: "concept", "sum": "hits", "count": "images"})
    return found.assign(domain=domain, accuracy=100.0 * found["hits"] / found["images"])


def strongest(accuracy: pd.DataFrame) -> dict[str, Condition]:
    """Return the variant and dose under which most unlearned concepts are recognised, by domain.

    Every concept has the same weight; of equal ones the first. A domain without any has none.
    """
    edited = accuracy[accuracy["weights"] == "edited"]
    erased = edited[edited["group"] == "erased"]
    found = {}
    for domain, rows in (edited if erased.empty else erased).groupby("domain", sort=False):
        means = rows.groupby(["variant", "dose"], sort=False)["accuracy"].mean()
        variant, dose = means.index[int(means.to_numpy().argmax())]
        found[str(domain)] = (str(variant), float(dose))
    return found


def at_strongest(accuracy: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a probe in the strongest variant and dose of their domain."""
    kept = pd.Series(False, index=accuracy.index)
    for domain, (variant, dose) in strongest(accuracy).items():
        here = (accuracy["variant"] == variant) & (accuracy["dose"] == dose)
        kept |= here & (accuracy["domain"] == domain)
    return accuracy[kept]


def area_under(rows: pd.DataFrame) -> float | None:
    """Return the mean accuracy over the doses of a curve, by the trapezoid rule.

    Args:
        rows: dose and accuracy of one variant; of several concepts the mean is taken.

    Returns:
        None for fewer than three doses.
    """
    curve = rows.groupby("dose")["accuracy"].mean()
    doses = [float(dose) for dose in curve.index]
    if len(doses) < 3:
        return None
    values = curve.tolist()
    pieces = itertools.pairwise(zip(doses, values, strict=True))
    area = sum((right - left) * (low + high) / 2 for (left, low), (right, high) in pieces)
    return area / (doses[-1] - doses[0])


def recovery_metrics(
    images: pd.DataFrame | None,
    values: pd.DataFrame | None,
    domains: Domains,
    ua: float | None,
) -> dict[str, float]:
    """Compute the metrics of a step from what its probes saw.

    recovered_<probe>: mean accuracy over the unlearned concepts in the variant and dose where that
    of their domain is largest; _untouched and _retained: the same of the untouched model on these
    concepts, and on concepts that are retained. recovered_<probe>_area: of the curve over at least
    three doses that has the largest. Of a probe without images: the mean of its numbers, or of a
    RISE their largest. UA_worst: 100 minus the largest accuracy, that by name (UA) among them;
    where a probe of the step tried to have unlearned concepts back. Of a probe that asks for
    retained concepts alone all three are of these, and no part of UA_worst.

    Args:
        images, values: rows of recovery.csv and recovery_values.csv; None without the file.
        ua: of the step.
    """
    found: dict[str, float] = {}
    asked: list[float] = []  # of the probes that tried to have unlearned concepts back
    largest = [] if ua is None else [100.0 - ua]
    if images is not None:
        every = accuracy_by_dose(images, domains)
        for probe, accuracy in every.groupby("probe", sort=False):
            found |= image_metrics(str(probe), accuracy)
            if "erased" in set(accuracy["group"]):
                asked.append(found[f"recovered_{probe}"])
        if asked:
            found["UA_worst"] = 100.0 - max(asked + largest)
    if values is not None:
        for probe, rows in values.groupby("probe", sort=False):
            found |= value_metrics(str(probe), rows)
    return {name: round(value, 3) for name, value in found.items()}


def image_metrics(probe: str, accuracy: pd.DataFrame) -> dict[str, float]:
    """Return the metrics of one probe; accuracy: its rows of accuracy_by_dose()."""
    found: dict[str, float] = {}
    here = at_strongest(accuracy)
    only_retained = "erased" not in set(accuracy["group"])
    for ending, (group, weights) in CONTROLS.items():
        kind = "retained" if only_retained else group
        rows = here[(here["group"] == kind) & (here["weights"] == weights)]
        if not rows.empty and not (only_retained and ending == "_retained"):
            found[f"recovered_{probe}{ending}"] = float(rows["accuracy"].mean())
    own = accuracy[(accuracy["group"] == "erased") & (accuracy["weights"] == "edited")]
    areas = [area_under(rows) for _, rows in own.groupby("variant", sort=False)]
    if known := [area for area in areas if area is not None]:
        found[f"recovered_{probe}_area"] = max(known)
    return found


def value_metrics(probe: str, rows: pd.DataFrame) -> dict[str, float]:
    """Return the metrics of a probe that gives numbers."""
    found: dict[str, float] = {}
    for ending, (group, weights) in CONTROLS.items():
        own = rows[(rows["group"] == group) & (rows["weights"] == weights)]["value"]
        if len(own):
            value = own.max() if set(rows["variant"]) == {RISE} else own.mean()
            found[f"recovered_{probe}{ending}"] = float(value)
    return found


def columns_of(probes: Iterable[str], found: Mapping[str, float]) -> dict[str, float | None]:
    """Return the columns that every step of a run with these probes has, None where not measured.

    Raises:
        ValueError: a metric is of a probe that the run does not have.
    """
    names = [f"recovered_{probe}{ending}" for probe in probes for ending in CONTROLS]
    columns: dict[str, float | None] = dict.fromkeys([*names, "UA_worst"])
    if strange := [name for name in found if not known_name(name, columns)]:
        raise ValueError(f"recovery: {strange[0]} is of no probe of the run")
    return columns | dict(found)


def known_name(name: str, columns: Mapping[str, object]) -> bool:
    """Tell whether a metric belongs to one of the columns."""
    return name in columns or name.removesuffix("_area") in columns
