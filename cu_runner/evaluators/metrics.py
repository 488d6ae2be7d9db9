"""Metrics, a pure function of predictions.csv (Lee et al. 2026, Sec. 4).

Accuracies are in percent. A prediction counts as right when it equals the concept that the prompt
names.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from cu_runner.concepts.sequence import Sequence
from cu_runner.evaluators.base import Faceless
from cu_runner.runtime.lazy import pd

# Columns that tell whether an image shows a face, by what one without counts for.
FACE_COLUMNS: dict[Faceless, str] = {"excluded": "face", "forgotten": "face_only"}
# Percent; a run below it has forgotten too little for its retention to be compared with that of
# others.
ENOUGH_UA = 95.0
# Percent of the untouched model's images that must be recognised for anything to be measured; by
# chance it is a few percent.
RECOGNISED = 50.0


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
    concepts only.

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
    faceless_retained, the numbers of images without one.
    """
    targets, retain, cross_retain = (
        [concept.name for concept in concepts]
        for concepts in (sequence.targets, sequence.retain, sequence.cross_retain)
    )
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
