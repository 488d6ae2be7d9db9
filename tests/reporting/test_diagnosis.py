"""Signatures of failure: each on a stored curve that shows it and on one that does not, and on
curves by hand where none is stored.
"""

import math
from pathlib import Path

import pandas as pd
import pytest
from test_page import make_run

from cu_runner.reporting.diagnosis import (
    SIGNATURES,
    by_signature,
    diagnose,
    news,
    rebound,
    spell,
    with_images,
)
from cu_runner.store.run_record import read_run

ROOT = Path(__file__).parents[2]
STORED = {  # images of each concept, retained concepts
    "docs/results.csv": (16, 12),
    "docs/studies/diagnostic.csv": (16, 12),
}


def counted(table: pd.DataFrame, per_concept: int, num_retained: int) -> pd.DataFrame:
    """A stored curve, and how many images each number rests on."""
    unlearned = table["request"].replace(0, table["request"].max())
    numbers = {
        "UA": unlearned,
        "UA_current": table["request"].clip(upper=1),
        "UA_previous": unlearned - 1,
        "RA_I": num_retained,
        "RA_C": unlearned + num_retained,
    }
    return table.assign(**{f"{name}_images": per_concept * each for name, each in numbers.items()})


def stored(file: str, label: str) -> pd.DataFrame:
    table = pd.read_csv(ROOT / file, keep_default_na=False, na_values=[""])  # "none" is a label
    return counted(table[table.iloc[:, 0] == label].reset_index(drop=True), *STORED[file])


def by_hand(per_concept: int = 40, **columns: list[float]) -> pd.DataFrame:
    """Requests of a run that fails in nothing but the given columns."""
    number = len(next(iter(columns.values())))
    sound = {"UA": 98.0, "UA_current": 98.0, "UA_previous": 98.0, "RA_I": 90.0, "RA_C": 95.0}
    table = pd.DataFrame({"request": range(number)}).assign(**sound).assign(**columns)
    return counted(table, per_concept, 12)


def after(table: pd.DataFrame, request: int | None = None) -> list[str]:
    """The names of the signatures after a request, or after the last."""
    return [each.name for each in diagnose(table if request is None else table.iloc[: request + 1])]


# ---------------------------------------------------------------------------------- stored curves
@pytest.mark.parametrize(
    ("file", "label", "request_number", "expected"),
    [
        ("docs/results.csv", "none", 2, ["weak forgetting"]),  # UA 43.8
        ("docs/results.csv", "none", 5, []),  # RA-I 22.9, RA-C 97.1
        ("docs/results.csv", "none", 7, ["interference"]),  # RA-I 4.7, RA-C 95.4
        ("docs/results.csv", "none", 12, ["drift"]),  # RA-C 28.1
        ("docs/results.csv", "l2", 5, []),  # UA 85.0 of 80 images: 75.6 to 91.2
        ("docs/results.csv", "l2", 12, ["interference"]),  # RA-I 12.0, RA-C 99.2
        ("docs/results.csv", "merge", 3, []),  # RA-I 19.3, RA-C 88.8: neither stable nor falling
        ("docs/results.csv", "merge", 12, ["drift"]),  # RA-C 86.2
        ("docs/results.csv", "gradproj", 9, []),  # UA 90.3 of 144 images
        ("docs/results.csv", "gradproj", 12, []),
        ("docs/studies/diagnostic.csv", "seed 1", 12, ["drift"]),
        ("docs/studies/diagnostic.csv", "seed 1", 4, []),
    ],
)
def test_signatures_of_stored_curves(file, label, request_number, expected):
    assert after(stored(file, label), request_number) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("sequential", ["drift"]),
        ("L2", ["drift"]),
        ("SelFT", ["interference"]),  # UA 99, RA-I 17, RA-C 99
        ("simultaneous", ["interference"]),
        ("merge (TIES)", ["drift"]),
    ],
)
def test_signatures_of_the_papers_curves_on_styles(row, expected):
    """40 images per concept; the untouched model's accuracies are not plotted, 99 is taken."""
    curves = pd.read_csv(ROOT / "scripts/tables/paper_curves.csv", comment="#")
    last = curves.query("column == 'style' and row == @row and request == 12")
    base = {"request": 0, "RA_I": 99.0, "RA_C": 99.0}
    table = pd.DataFrame(
        [base, {"request": 12} | dict(zip(last.metric, last.percent, strict=True))]
    )
    assert after(counted(table, 40, 12)) == expected


# ------------------------------------------------------------------------------- curves by hand
def test_a_rebound_is_said_in_place_of_weak_forgetting():
    nan = math.nan
    table = by_hand(
        UA=[1.0, 100.0, 100.0, 75.0],
        UA_current=[nan, 100.0, 100.0, 100.0],
        UA_previous=[nan, nan, 100.0, 62.5],
    )
    assert after(table) == ["rebound"]
    assert after(table.iloc[:3]) == []
    # 80 of 80 then, 50 of 80 now. Wilson's ends: 95.418 of 100, and 51.55 and 72.31 of 62.5
    low, high = rebound(table)
    assert low == pytest.approx(37.5 - math.hypot(100 - 95.418, 72.31 - 62.5), abs=0.02)
    assert high == pytest.approx(37.5 + 62.5 - 51.55, abs=0.02)
    few = table.assign(**{name: 4 for name in table if name.endswith("_images")})
    assert after(few) == []
    assert after(table.drop(columns="UA_previous")) == ["weak forgetting"]  # it is not measured


def test_a_rebound_is_no_concept_that_was_never_forgotten():
    nan = math.nan
    table = by_hand(
        UA=[1.0, 60.0, 60.0], UA_current=[nan, 60.0, 60.0], UA_previous=[nan, nan, 60.0]
    )
    assert after(table) == ["weak forgetting"]


def test_degraded_images():
    assert after(by_hand(clip_score=[30.0, 29.0, 26.0])) == ["degraded images"]
    assert after(by_hand(clip_score=[30.0, 29.0, 27.5])) == []
    assert after(by_hand(fid=[40.0, 50.0, 61.0])) == ["far images"]
    assert after(by_hand(fid=[40.0, 50.0, 59.0])) == []
    # against the untouched model's own images, whose FID is none
    assert after(by_hand(fid=[math.nan, 50.0, 90.0])) == []


def test_a_domain_that_was_never_recognised_has_not_failed():
    assert after(by_hand(RA_I=[20.0, 5.0, 5.0])) == []
    assert after(by_hand(RA_I=[90.0, 5.0, 5.0])) == ["interference"]
    assert after(by_hand(RA_C=[math.nan] * 3, RA_I=[90.0, 5.0, 5.0])) == []


def test_what_falls_before_anything_is_forgotten_is_no_drift():
    assert after(by_hand(UA=[1.0, 70.0, 70.0], RA_C=[95.0, 60.0, 60.0])) == ["weak forgetting"]
    assert after(by_hand(RA_C=[95.0, 60.0, 60.0])) == ["drift"]


def test_every_signature_says_its_numbers_and_what_to_try():
    rows = by_hand(
        UA=[1.0, 50.0], UA_previous=[math.nan, 60.0], clip_score=[30.0, 20.0], fid=[10.0, 40.0]
    )
    said = {each.name: spell(each, rows) for each in SIGNATURES}
    assert said["weak forgetting"].startswith("weak forgetting: UA is 50.0. Try another step size")
    assert "(train.lr)" in said["weak forgetting"]
    assert "fell from 30.0 to 20.0" in said["degraded images"]
    for name, tries in {
        "drift": "reg=merge",
        "interference": "reg=gradproj",
        "rebound": "reg.gradproj.earlier=true",
    }.items():
        assert tries in said[name]


# ---------------------------------------------------------------------------------------- of runs
def test_images_are_counted_from_the_untouched_models(tmp_path):
    table = with_images(read_run(make_run(tmp_path)))
    # two images of each concept, one with each cross concept; two retained concepts
    assert table["UA_images"].tolist() == [6, 2, 4, 6]
    assert table["UA_previous_images"].tolist() == [4, 0, 2, 4]
    assert table["UA_current_images"].tolist() == [2, 2, 2, 2]
    assert table["RA_I_images"].tolist() == [4, 4, 4, 4]
    assert table["RA_C_images"].tolist() == [10, 6, 8, 10]


def test_a_signature_is_news_once_and_the_report_says_since_when(tmp_path, monkeypatch):
    run = read_run(make_run(tmp_path))
    monkeypatch.setattr(
        "cu_runner.reporting.diagnosis.with_images", lambda run: stored("docs/results.csv", "none")
    )
    assert by_signature({"plain": run}) == [
        "Weak forgetting: plain (requests 1 to 2). Try another step size (train.lr), more steps "
        "(train.steps), or another weight of the method or the regularizer.",
        "Drift: plain (requests 8 to 12). Try a stronger penalty (reg=l2 with a larger "
        "reg.l2.weight), merging (reg=merge), or fewer trained weights (reg=selft).",
        "Interference: plain (requests 6 to 7). Try projection (reg=gradproj or reg=nullspace).",
    ]
    said = []
    for request in (1, 2, 6, 7, 8):
        monkeypatch.setattr(
            "cu_runner.reporting.diagnosis.with_images",
            lambda run, end=request + 1: stored("docs/results.csv", "none").iloc[:end],
        )
        said.append([line.partition(":")[0] for line in news(run)])
    assert said == [["weak forgetting"], [], ["interference"], [], ["drift"]]
