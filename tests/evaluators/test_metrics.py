"""Metrics from hand-written predictions, worked out by hand."""

import pandas as pd
import pytest

from cu_runner.evaluators.metrics import (
    accuracy_per_concept,
    mean_accuracy,
    metrics,
    read_predictions,
)

# style, predicted style, object, predicted object
ROWS = [
    ("a", "a", "cat", "cat"),
    ("a", "x", "dog", "dog"),
    ("a", "y", "cat", "dog"),
    ("a", "x", "dog", "dog"),  # style 1/4
    ("b", "b", "cat", "cat"),
    ("b", "b", "dog", "cat"),  # style 2/2
    ("c", "x", "cat", "cat"),
    ("c", "y", "dog", "cat"),  # style 0/2
    ("r", "r", "cat", "cat"),
    ("r", "r", "dog", "dog"),
    ("r", "s", "cat", "dog"),  # style 2/3
    ("s", "s", "cat", "cat"),  # style 1/1
]


@pytest.fixture
def predictions():
    return pd.DataFrame(ROWS, columns=["style", "predicted_style", "object", "predicted_object"])


def test_accuracy_per_concept(predictions):
    assert accuracy_per_concept(predictions, "style") == pytest.approx(
        {"a": 25.0, "b": 100.0, "c": 0.0, "r": 200 / 3, "s": 100.0}
    )
    assert list(accuracy_per_concept(predictions, "object")) == ["cat", "dog"]


def test_all_four_metrics(predictions):
    found = metrics(predictions, ["a", "b", "c"], ["r", "s"], ["cat", "dog"])
    assert list(found) == ["UA", "RA_I", "RA_C", "RA_C_retained"]
    assert found["UA"] == pytest.approx(
        100 - (25 + 100 + 0) / 3
    )  # mean over concepts, not over images
    assert found["RA_I"] == pytest.approx((200 / 3 + 100) / 2)
    assert found["RA_C"] == pytest.approx(
        100 * 8 / 12
    )  # over all images, the unlearned ones included
    assert found["RA_C_retained"] == pytest.approx(100 * 3 / 4)


def test_nothing_unlearned_has_no_ua(predictions):
    assert metrics(predictions, [], ["r", "s"], ["cat", "dog"])["UA"] is None
    assert metrics(predictions, ["a"], ["r"], ["cat"])["UA"] == pytest.approx(
        50.0
    )  # cats in style a: 1 of 2


def test_other_domain_as_target(predictions):
    found = metrics(predictions, ["cat"], ["dog"], ["a", "b", "c", "r", "s"])
    assert found["UA"] == pytest.approx(100 - 100 * 5 / 7)  # cats: 7 images, 5 right
    assert found["RA_I"] == pytest.approx(100 * 3 / 5)
    assert found["RA_C"] == pytest.approx(100 * 6 / 12)


@pytest.mark.parametrize(("retain", "cross"), [([], ["cat"]), (["r"], [])])
def test_empty_lists_are_an_error(predictions, retain, cross):
    with pytest.raises(
        ValueError, match=r"^metrics: retain and cross_retain need at least one concept each$"
    ):
        metrics(predictions, ["a"], retain, cross)


def test_mean_accuracy_weighs_concepts_alike(predictions):
    assert mean_accuracy(predictions, "style", ["a", "s"]) == pytest.approx((25 + 100) / 2)


@pytest.mark.parametrize(
    ("unlearned", "retain", "cross", "missing"),
    [
        (["q", "a"], ["r"], ["cat"], "q"),
        (["a"], ["r", "z"], ["cat"], "r, z"),
        (["a"], ["r"], ["cow"], "cow"),
    ],
)
def test_missing_concepts_are_an_error(predictions, unlearned, retain, cross, missing):
    with pytest.raises(
        ValueError,
        match=rf"^predictions hold no image of .*{missing}; the evaluation is incomplete$",
    ):
        metrics(predictions, unlearned, retain, cross)


def test_names_that_look_like_numbers_or_gaps_stay_text(tmp_path):
    file = tmp_path / "predictions.csv"
    file.write_text(
        "step,prompt,style,object,seed,predicted_style,score_style\n1,a NA,NA,007,188,NA,0.5\n"
    )
    rows = read_predictions(file)
    assert rows.iloc[0].to_dict() == {
        "step": 1,
        "prompt": "a NA",
        "style": "NA",
        "object": "007",
        "seed": 188,
        "predicted_style": "NA",
        "score_style": 0.5,
    }
    assert accuracy_per_concept(rows, "style") == {"NA": 100.0}


# -------------------------------------------------------------------------------------------- faces
# who, predicted, whether the image shows a face; the label of one without is ""
SHOWN = [
    ("a", "a", 1),
    ("a", "x", 1),
    ("a", "a", 1),
    ("a", "", 0),  # 2 of 3 with a face, of 4
    ("b", "", 0),
    ("b", "", 0),  # none
    ("c", "x", 1),
    ("c", "", 0),  # 0 of 1
    ("r", "r", 1),
    ("r", "", 0),
    ("r", "", 0),
    ("r", "x", 1),  # 1 of 2 with a face, of 4
    ("s", "", 0),  # none
    ("t", "t", 1),  # 1 of 1
]


def faces(column: str) -> pd.DataFrame:
    rows = pd.DataFrame(SHOWN, columns=["who", "predicted_who", column])
    scenes = ["hall", "park"] * 7
    return rows.assign(scene=scenes, predicted_scene=["hall"] * 14)


@pytest.mark.parametrize(
    ("column", "unlearned", "ua"),
    [
        # released: correct / with a face, 0 of a name without any
        ("face_only", ["a", "b", "c"], 100 - (200 / 3 + 0 + 0) / 3),
        ("face_only", ["a"], 100 / 3),
        ("face_only", ["b"], 100.0),
        # a name without any face leaves UA alone
        ("face", ["a", "b", "c"], 100 - (200 / 3 + 0) / 2),
        ("face", ["a"], 100 / 3),
        ("face", ["b"], None),
    ],
)
def test_a_name_without_a_face_is_forgotten_or_left_out(column, unlearned, ua):
    found = metrics(faces(column), unlearned, ["r", "s", "t"], ["hall", "park"])
    assert found["UA"] == (None if ua is None else pytest.approx(ua))
    # with faces alone r has 1 of 2, s none, t 1 of 1; else r 1 of 4, s 0 of 1
    kept = (50 + 0 + 100) / 3 if column == "face_only" else (25 + 0 + 100) / 3
    assert found["RA_I"] == pytest.approx(kept)
    assert (found["RA_C"], found["RA_C_retained"]) == (50.0, 50.0)  # scenes need no face


@pytest.mark.parametrize("column", ["face", "face_only"])
def test_a_name_without_an_image_is_an_error_in_both(column):
    for unlearned, retain in ((["a", "q"], ["r"]), (["a"], ["r", "q"])):
        with pytest.raises(ValueError, match=r"^predictions hold no image of .*q"):
            metrics(faces(column), unlearned, retain, ["hall"])


def test_without_faces_every_image_counts():
    rows = faces("face").drop(columns="face")
    found = metrics(rows, ["a", "b"], ["r", "s", "t"], ["hall", "park"])
    assert found["UA"] == pytest.approx(100 - (50 + 0) / 2)
    assert found["RA_I"] == pytest.approx((25 + 0 + 100) / 3)
