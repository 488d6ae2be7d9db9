"""Metrics, a pure function of predictions.csv (Lee et al. 2026, Sec. 4).

Accuracies are in percent. A prediction counts as right when it equals the concept that the prompt
names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cu_runner.concepts.sequence import Sequence
from cu_runner.evaluators.base import Faceless
from cu_runner.runtime.lazy import pd
from cu_runner.schema.values import ConfigTree

# Columns that tell whether an image shows a face, by what one without counts for.
FACE_COLUMNS: dict[Faceless, str] = {"excluded": "face", "forgotten": "face_only"}
# Percent; a run below it has forgotten too little for its retention to be compared with that of
# others.
ENOUGH_UA = 95.0
# Percent of the untouched model's images that must be recognised for anything to be measured; by
# chance it is a few percent.
RECOGNISED = 50.0
# Column of a mixed sequence: the domain whose concept an image is an image of.
MEASURES = "measures"


@dataclass(frozen=True)
class Measured:
    """What is measured in one domain of targets, by name."""

    domain: str
    cross_domain: str
    targets: list[str]
    retain: list[str]


def read_predictions(file: Path | BinaryIO) -> pd.DataFrame:
    """Read predictions.csv.

    Names stay text, also "NA" and "007"; step and seed are whole numbers, scores are floats.
    """
    rows = pd.read_csv(file, dtype=str, keep_default_na=False)
    names = [str(name) for name in rows]
    numbers = [name for name in names if name.startswith(("step", "seed", "face", "score_"))]
    return rows.astype({name: float if name.startswith("score_") else int for name in numbers})


def accuracy_per_concept(predictions: pd.DataFrame, domain: str) -> dict[str, float]:
    """Return the percentage of images of each concept that are recognised as it.

    Concepts come in the order of their first appearance.
    """
    right = predictions[domain] == predictions[f"predicted_{domain}"]
    percent = 100.0 * right.groupby(predictions[domain], sort=False).mean()
    return {str(concept): accuracy for concept, accuracy in percent.to_dict().items()}


def mean_accuracy(predictions: pd.DataFrame, domain: str, concepts: list[str]) -> float:
    """Return the mean accuracy in percent, every concept with the same weight.

    Raises:
        ValueError: one of them has no image.
    """
    accuracy = accuracy_per_concept(predictions, domain)
    missing = [name for name in concepts if name not in accuracy]
    if missing:
        raise ValueError(
            f"predictions hold no image of {', '.join(missing)}; the evaluation is incomplete"
        )
    return sum(accuracy[name] for name in concepts) / len(concepts)


def metrics(
    predictions: pd.DataFrame,
    unlearned: list[str],
    retain: list[str],
    cross_retain: list[str] | None,
) -> dict[str, float | None]:
    """Compute UA, RA_I, RA_C and RA_C_retained of one step, in percent.

    They are those of the released code of Lee et al. 2026. UA: 100 - mean accuracy over the
    unlearned concepts; None when there is none. RA_I: mean accuracy over the retained concepts of
    their domain. RA_C: cross-domain accuracy over all images of the cross_retain concepts, those
    prompted with unlearned concepts included; RA_C_retained: over those prompted with retained
    concepts only. For targets of several domains see mixed_metrics().

    Where the rows say whether an image shows a face, UA is over the images that do. In a column
    `face`, a concept without any leaves UA alone (None where no concept has one), and retained
    concepts are not recognised in an image without one. In a column `face_only`, a concept without
    any is forgotten, and RA_I too is over images with a face, 0 for a concept without any (released
    code of Lee et al. 2026).

    Args:
        predictions: rows of predictions.csv. The domain is the column that holds the retained
            concepts, the cross domain the one that holds the cross_retain concepts.
        cross_retain: None if the images name no concept of another domain; RA_C and RA_C_retained
            are then None.

    Raises:
        ValueError: a concept has no image, or a list of retained concepts is empty.
    """
    if not retain or cross_retain == []:
        raise ValueError("metrics: retain and cross_retain need at least one concept each")
    domain, shown = domain_of(predictions, retain), predictions
    across: dict[str, float | None] = {"RA_C": None, "RA_C_retained": None}
    if cross_retain is not None:
        cross_domain = domain_of(predictions, cross_retain)
        shown = predictions[predictions[cross_domain].isin(cross_retain)]
        right = shown[cross_domain] == shown[f"predicted_{cross_domain}"]
        across = {
            "RA_C": 100.0 * float(right.mean()),
            "RA_C_retained": 100.0 * float(right[shown[domain].isin(retain)].mean()),
        }
    return {
        "UA": unlearning_accuracy(shown, domain, unlearned),
        "RA_I": retained_accuracy(shown, domain, retain),
    } | across


def retained_accuracy(predictions: pd.DataFrame, domain: str, retain: list[str]) -> float:
    """Compute RA_I in percent. Raises ValueError for a concept without an image."""
    if "face_only" in predictions:
        return accuracy_on_faces(predictions, domain, retain)
    return mean_accuracy(predictions, domain, retain)


def accuracy_on_faces(predictions: pd.DataFrame, domain: str, concepts: list[str]) -> float:
    """Return the mean accuracy in percent over images with a face; 0 for a concept without any."""
    mean_accuracy(predictions, domain, concepts)  # every concept has an image
    accuracy = accuracy_per_concept(predictions[predictions["face_only"] == 1], domain)
    return sum(accuracy.get(name, 0.0) for name in concepts) / len(concepts)


def with_face(predictions: pd.DataFrame) -> pd.DataFrame:
    """Return the rows whose images show a face; all of them where faces are not looked for."""
    for column in FACE_COLUMNS.values():
        if column in predictions:
            return predictions[predictions[column] == 1]
    return predictions


def unlearning_accuracy(
    predictions: pd.DataFrame, domain: str, unlearned: list[str]
) -> float | None:
    """Compute UA in percent: 100 - mean accuracy over the concepts.

    Where the rows tell, it is that on images with a face, as in metrics(). None without any image.

    Raises:
        ValueError: a concept has no image at all.
    """
    if not unlearned:
        return None
    if "face_only" in predictions:
        return 100 - accuracy_on_faces(predictions, domain, unlearned)
    accuracy = mean_accuracy(predictions, domain, unlearned)
    if "face" in predictions:
        shown = with_face(predictions)
        concepts = [name for name in unlearned if name in set(shown[domain])]
        if not concepts:
            return None
        accuracy = mean_accuracy(shown, domain, concepts)
    return 100 - accuracy


def count_faceless(predictions: pd.DataFrame, domain: str, concepts: list[str]) -> int:
    """Count the images of the concepts that show no face."""
    shown = [rows[domain].isin(concepts).sum() for rows in (predictions, with_face(predictions))]
    return int(shown[0] - shown[1])


def step_metrics(
    predictions: pd.DataFrame, unlearned: list[str], sequence: Sequence
) -> dict[str, float | None]:
    """Compute the metrics of one step of a run, in percent, to a thousandth.

    They are those of metrics(), and UA_current: UA of the concept unlearned last; UA_previous: of
    the others (their rebound). Of the untouched model, which has unlearned nothing, UA is the base
    rate: that of all targets. Where faces are looked for: faceless_unlearned and
    faceless_retained, the numbers of images without one. Of a mixed sequence see mixed_metrics().
    """
    targets, retain, cross_retain = (
        [concept.name for concept in concepts]
        for concepts in (sequence.targets, sequence.retain, sequence.cross_retain)
    )
    if sequence.parts:
        return mixed_metrics(predictions, unlearned, measured_by(sequence))
    across = cross_retain if sequence.cross_domain in sequence.measured_domains else None
    return named_metrics(predictions, unlearned, sequence.domain, targets, retain, across)


def named_metrics(
    predictions: pd.DataFrame,
    unlearned: list[str],
    domain: str,
    targets: list[str],
    retain: list[str],
    cross_retain: list[str] | None,
) -> dict[str, float | None]:
    """Compute step_metrics() from the names of the concepts alone."""
    measured = metrics(predictions, unlearned, retain, cross_retain)
    if not unlearned:
        measured["UA"] = unlearning_accuracy(predictions, domain, targets)
    for name, concepts in (("UA_current", unlearned[-1:]), ("UA_previous", unlearned[:-1])):
        measured[name] = unlearning_accuracy(predictions, domain, concepts)
    if any(column in predictions for column in FACE_COLUMNS.values()):
        measured["faceless_unlearned"] = count_faceless(predictions, domain, unlearned)
        measured["faceless_retained"] = count_faceless(predictions, domain, retain)
    return {name: None if value is None else round(value, 3) for name, value in measured.items()}


def measured_by(sequence: Sequence) -> list[Measured]:
    """Return what a sequence measures, domain by domain."""
    return [
        Measured(
            part.domain,
            part.cross_domain,
            [concept.name for concept in part.targets],
            [concept.name for concept in part.retain],
        )
        for part in sequence.by_domain
    ]


def measured_in(sequence: ConfigTree) -> list[Measured]:
    """Return what the sequence of a run's config.yaml measures. Raises KeyError."""
    if "domains" not in sequence:
        domains = (str(sequence["domain"]), str(sequence["cross_domain"]))
        return [Measured(*domains, list(sequence["targets"]), list(sequence["retain"]))]
    return [
        Measured(
            str(domain),
            str(lists["cross_domain"]),
            [str(each[domain]) for each in sequence["targets"] if domain in each],
            list(lists["retain"]),
        )
        for domain, lists in sequence["domains"].items()
    ]


def rows_of(predictions: pd.DataFrame, domain: str) -> pd.DataFrame:
    """Return the images of one domain's concepts; all of them of a sequence that is not mixed."""
    if MEASURES not in predictions:
        return predictions
    return predictions[predictions[MEASURES] == domain]


def shown_in(predictions: pd.DataFrame, parts: list[Measured]) -> tuple[pd.Series, pd.Series]:
    """Return of each image the concept that it is measured by, and that of the other domain."""
    first = parts[0]
    concepts, crosses = predictions[first.domain].copy(), predictions[first.cross_domain].copy()
    for part in parts[1:]:
        own = predictions[MEASURES] == part.domain
        concepts[own] = predictions[part.domain][own]
        crosses[own] = predictions[part.cross_domain][own]
    return concepts, crosses


def forgotten_of(
    predictions: pd.DataFrame, parts: list[Measured], names: list[str]
) -> float | None:
    """Compute UA in percent over concepts of several domains, each judged in its own.

    Every concept has the same weight. None without any image that counts.
    """
    found: list[tuple[float | None, int]] = []
    for part in parts:
        rows, own = rows_of(predictions, part.domain), [n for n in names if n in part.targets]
        counted = set(with_face(rows)[part.domain]) if "face" in rows else {*own}
        weight = sum(name in counted for name in own)
        found.append((unlearning_accuracy(rows, part.domain, own), weight))
    return weighted(found)


def weighted(found: list[tuple[float | None, int]]) -> float | None:
    """Return the mean of values with their weights; None where there is nothing."""
    known = [(value, weight) for value, weight in found if value is not None and weight]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None


def mixed_metrics(
    predictions: pd.DataFrame, unlearned: list[str], parts: list[Measured]
) -> dict[str, float | None]:
    """Compute step_metrics() of a mixed sequence, whose targets are of several domains.

    An image counts in the domain whose concept it is an image of (column MEASURES), as in
    metrics(). UA: 100 - mean accuracy over all unlearned concepts, each judged in its own domain
    and with the same weight. RA_I: mean accuracy over the retained concepts of the domains of which
    a concept is unlearned, each with the same weight. RA_C: accuracy in the other domain over all
    images of those domains, those prompted with unlearned concepts included, each with the same
    weight; RA_C_retained: over those prompted with retained concepts only. Of the untouched model
    all domains count. With a single domain it is step_metrics().

    Raises:
        ValueError: a concept has no image.
    """
    so_far = [part for part in parts if {*part.targets} & {*unlearned}] or parts
    shares: dict[str, list[tuple[float | None, int]]] = {
        name: [] for name in ("RA_I", "RA_C", "RA_C_retained")
    }
    faceless = [0, 0]
    for part in so_far:
        rows = rows_of(predictions, part.domain)
        own = [name for name in unlearned if name in part.targets]
        measured = metrics(rows, own, part.retain, list(dict.fromkeys(rows[part.cross_domain])))
        weights = (len(part.retain), len(rows), int(rows[part.domain].isin(part.retain).sum()))
        for (name, found), weight in zip(shares.items(), weights, strict=True):
            found.append((measured[name], weight))
        for place, names in enumerate((own, part.retain)):
            faceless[place] += count_faceless(rows, part.domain, names)
    targets = [name for part in parts for name in part.targets]
    result = {"UA": forgotten_of(predictions, parts, unlearned or targets)}
    result |= {name: weighted(found) for name, found in shares.items()}
    for name, concepts in (("UA_current", unlearned[-1:]), ("UA_previous", unlearned[:-1])):
        result[name] = forgotten_of(predictions, parts, concepts)
    if any(column in predictions for column in FACE_COLUMNS.values()):
        result |= {"faceless_unlearned": faceless[0], "faceless_retained": faceless[1]}
    return {name: None if value is None else round(value, 3) for name, value in result.items()}


def domain_of(predictions: pd.DataFrame, concepts: list[str]) -> str:
    """Find the column of predictions that holds every one of the concepts."""
    domains = [
        name.removeprefix("predicted_")
        for name in predictions.columns
        if name.startswith("predicted_")
    ]
    for domain in domains:
        if set(concepts) <= set(predictions[domain]):
            return domain
    raise ValueError(
        f"predictions hold no image of some of {', '.join(concepts)}; the evaluation is incomplete"
    )
