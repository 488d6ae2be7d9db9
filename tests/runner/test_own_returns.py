"""What classes of a user's own give back: taken where it fits, and else refused by class and
method, before it becomes an error elsewhere.
"""

import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from doubles import Pull

from cu_runner.evaluators.base import Prediction
from cu_runner.evaluators.evaluate import classify
from cu_runner.recovery.base import Cost, Number, Probe
from cu_runner.recovery.battery import Battery, listed
from cu_runner.regularizers.base import Regularizer
from cu_runner.runner.measure import Instruments
from cu_runner.runner.training import erase
from cu_runner.runner.weights import TrainedWeights
from cu_runner.schema.errors import ReturnedError

ONE = torch.ones([])


class Own(Regularizer):
    """Gives back what it is told to: {hook: value, or what makes it of the weights}."""

    def __init__(self, **found) -> None:
        self.found = found

    def begin_request(self, scope, method):
        return self.found.get("begin_request")

    def penalty(self, params):
        found = self.found.get("penalty")
        return found(params) if callable(found) else found


def train(make_scope, settings, method=None, **found):
    scope = make_scope(steps=1)
    return erase(scope, method or Pull(), {"own": Own(**found)}, settings(steps=1))


def norm(params):
    return sum(weight.pow(2).sum() for weight in params.values())


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"penalty": 0.0}, "Own.penalty returns a float; return a tensor of one number"),
        ({"penalty": lambda params: norm(params).expand(3)}, "a tensor of 3 numbers"),
        ({"penalty": lambda params: norm(params).detach()}, "a tensor without gradient"),
        ({"begin_request": [1]}, "Own.begin_request returns a list; return a mapping of names"),
        ({"begin_request": {1: 2}}, "Own.begin_request returns a dict"),
        ({"begin_request": {"a": torch.ones(2)}}, "returns a Tensor as 'a'; return a mapping"),
        ({"begin_request": {"a": {"b": object()}}}, "returns a dict as 'a'; return a mapping"),
    ],
)
def test_a_regularizer(make_scope, settings, found, said):
    with pytest.raises(ReturnedError, match=said) as error:
        train(make_scope, settings, **found)
    assert "\n" not in str(error.value)


def test_nothing_is_an_empty_record_and_a_tensor_of_one_number_is_that_number(make_scope, settings):
    assert train(make_scope, settings, penalty=norm).regularizers == {"own": {}}
    report = train(make_scope, settings, begin_request={"kept": ONE, "names": ["a"]})
    assert report.regularizers == {"own": {"kept": 1.0, "names": ["a"]}}
    assert json.dumps(report.regularizers)


@pytest.mark.parametrize(
    ("hook", "value", "said"),
    [
        ("backward", None, "Pull.backward returns nothing; return a mapping of what to log"),
        ("end_request", 3, "Pull.end_request returns a int; return a mapping"),
        ("end_request", {"sizes": torch.ones(2)}, "Pull.end_request returns a Tensor as 'sizes'"),
    ],
)
def test_a_method(make_scope, settings, hook, value, said):
    method = Pull()
    setattr(method, hook, lambda *_: value)
    with pytest.raises(ReturnedError, match=said):
        train(make_scope, settings, method)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda delta: 3, "Own.post_request returns a int; return a finite change of every"),
        (lambda delta: {}, "returns nothing for "),
        (lambda delta: {name: value[:1] for name, value in delta.items()}, r"shape \(1, .* for "),
        (lambda delta: {name: value / 0 for name, value in delta.items()}, "not finite for "),
    ],
)
def test_merged_weights(make_scope, change, said):
    scope = make_scope()
    weights = TrainedWeights(scope.params, scope.base, torch.device("cpu"))
    delta = {name: torch.ones_like(value) for name, value in scope.base.items()}
    assert weights.given_back(Own(), delta).keys() == delta.keys()
    with pytest.raises(ReturnedError, match=said):
        weights.given_back(Own(), change(delta))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "Judge.predict returns nothing; return a Prediction of 2 labels"),
        ({"style": Prediction(["a", "b"], [1.0, 1.0])}, "returns nothing for 'object'"),
        ({"style": (["a", "b"], [1, 1])}, "returns a tuple for 'style'"),
        ({"style": Prediction(["a"], [1.0])}, "returns 1 labels and 1 scores for 'style' of 2"),
        ({"style": Prediction(["a", "b"], [1.0, 1.0], [True])}, "returns 2 labels and 2 scores"),
        ({"style": Prediction([0, 1], [1.0, 1.0])}, "returns a int as a label"),
        ({"style": Prediction(["a", "b"], ["x", "y"])}, "returns a str as a score"),
    ],
)
def test_an_evaluator(sequence, found, said):
    judge = type("Judge", (), {"predict": lambda self, images: found})()
    with pytest.raises(ReturnedError, match=said):
        classify(judge, torch.zeros(2, 3, 8, 8), sequence)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "Kept.measure returns nothing; return a mapping of names to finite"),
        ({"fid": torch.ones(2)}, "returns a Tensor as 'fid'"),
        ({"fid": float("nan")}, "returns nan as 'fid'"),
        ({"UA": 3.0}, "returns a number as 'UA', which is a column of every run; return names of"),
        ({"drift_l2": 3.0}, "returns a number as 'drift_l2'"),
        ({"fid": ONE, "kid": None, "images": 3}, None),
    ],
)
def test_a_retention(model, evaluator, sequence, monkeypatch, found, said):
    kept = type("Kept", (), {"measure": lambda self, step: found})()
    own = Instruments(model, evaluator, sequence, kept, None, "", "")
    seen = evaluated(sequence)
    monkeypatch.setattr(Instruments, "sample", lambda *_: seen)
    monkeypatch.setattr("cu_runner.runner.measure.draw_grid", lambda *_: b"")
    if said is None:
        metrics = own.measure(1, sequence.targets[:1], "")[1]
        assert (metrics["fid"], metrics["kid"], metrics["images"]) == (1.0, None, 3)
        return
    with pytest.raises(ReturnedError, match=said):
        own.measure(1, sequence.targets[:1], "")


def evaluated(sequence):
    """Predictions of one image of every concept with every object, all of them right."""
    rows = [
        {"style": concept.name, "object": cross.name}
        for concept in (*sequence.targets, *sequence.retain)
        for cross in sequence.cross_retain
    ]
    table = pd.DataFrame(rows).assign(step=1, seed=0, prompt="", score_style=1.0, score_object=1.0)
    table = table.assign(predicted_style=table["style"], predicted_object=table["object"])
    return SimpleNamespace(predictions=table, thumbnails={})


class Asks(Probe):
    def cost(self, sequence, concepts):
        return Cost()


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "Asks.measure returns nothing; return a list of Seen or Number"),
        ([3], "Asks.measure returns a list with a int in it"),
        ([Number("a", float("nan"))], "Asks.measure returns nan as the value of 'a'; return a fin"),
        ([Number("a", "x")], "Asks.measure returns a str as the value of 'a'"),
    ],
)
def test_a_probe(sequence, found, said):
    battery = Battery(
        {"asks": Asks()}, {}, SimpleNamespace(sequence=sequence), "", "", {}, {}, None
    )
    lab = SimpleNamespace(step=1, is_untouched=False)
    with pytest.raises(ReturnedError, match=said):
        battery._rows(lab, "asks", "erased", found)
    (row,) = battery._rows(lab, "asks", "erased", [Number("a", ONE)]).values
    assert row["value"] == 1.0
    with pytest.raises(ReturnedError, match=r"Asks\.images returns nothing; return a list"):
        listed(Asks(), "images", None, Number)
