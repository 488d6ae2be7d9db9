"""Metrics from hand-written predictions, worked out by hand."""

import json

import pandas as pd
import pytest

from cu_runner.evaluation import accuracy_per_concept, compute_metrics, metrics_as_dict

# style, predicted style, object, predicted object
ROWS = [
    ("a", "a", "cat", "cat"), ("a", "x", "dog", "dog"), ("a", "y", "cat", "dog"), ("a", "x", "dog", "dog"),  # style 1/4
    ("b", "b", "cat", "cat"), ("b", "b", "dog", "cat"),  # style 2/2
    ("c", "x", "cat", "cat"), ("c", "y", "dog", "cat"),  # style 0/2
    ("r", "r", "cat", "cat"), ("r", "r", "dog", "dog"), ("r", "s", "cat", "dog"),  # style 2/3
    ("s", "s", "cat", "cat"),  # style 1/1
]  # fmt: skip


@pytest.fixture
def predictions():
    return pd.DataFrame(ROWS, columns=["style", "predicted_style", "object", "predicted_object"])


def test_accuracy_per_concept(predictions):
    assert accuracy_per_concept(predictions, "style") == pytest.approx({"a": 25.0, "b": 100.0, "c": 0.0, "r": 200 / 3, "s": 100.0})
    assert list(accuracy_per_concept(predictions, "object")) == ["cat", "dog"]


def test_all_six_metrics(predictions):
    metrics = compute_metrics(predictions, "style", "object", ["c"], ["a", "b"], ["r", "s"])
    assert pytest.approx(100 - (25 + 100 + 0) / 3) == metrics.UA  # mean over concepts, not over images
    assert metrics.UA_current == pytest.approx(100.0)
    assert metrics.UA_previous == pytest.approx(100 - (25 + 100) / 2)
    assert pytest.approx((200 / 3 + 100) / 2) == metrics.RA_I
    assert pytest.approx(100 * 8 / 12) == metrics.RA_C  # over all images, the unlearned ones included
    assert metrics.RA_C_retained == pytest.approx(100 * 3 / 4)


def test_undefined_metrics_are_none(predictions):
    base = compute_metrics(predictions, "style", "object", [], [], ["r", "s"])
    assert (base.UA, base.UA_current, base.UA_previous) == (None, None, None)
    first = compute_metrics(predictions, "style", "object", ["a"], [], ["r"])
    assert (first.UA, first.UA_current, first.UA_previous) == (75.0, 75.0, None)


def test_other_domain_as_target(predictions):
    metrics = compute_metrics(predictions, "object", "style", ["cat"], [], ["dog"])
    assert pytest.approx(100 - 100 * 5 / 7) == metrics.UA  # cats: 7 images, 5 right
    assert pytest.approx(100 * 3 / 5) == metrics.RA_I
    assert pytest.approx(100 * 6 / 12) == metrics.RA_C


def test_missing_concepts_are_an_error(predictions):
    with pytest.raises(ValueError, match=r"^predictions hold no image of q, z; the evaluation is incomplete$"):
        compute_metrics(predictions, "style", "object", ["q"], ["a"], ["r", "z"])


def test_metrics_as_dict_is_json_to_a_thousandth(predictions):
    metrics = metrics_as_dict(compute_metrics(predictions, "style", "object", ["c"], [], ["r"]))
    assert json.loads(json.dumps(metrics)) == {
        "UA": 100.0, "RA_I": 66.667, "RA_C": 66.667, "RA_C_retained": 66.667, "UA_current": 100.0, "UA_previous": None,
    }  # fmt: skip
