"""Minimum-variance direction: its closed form, what is left alone, the token, the change."""

import dataclasses
import json
import math

import pytest
import torch
from conftest import SMOKE, run_directory
from doubles import Pull

from cu_runner.methods.conabl import ConAbl
from cu_runner.methods.uce import UCE
from cu_runner.models.parameters import assign, snapshot, subtract
from cu_runner.regularizers.minvar import MinVar, minimum_variance_direction, name_texts
from cu_runner.request.text_subspace import in_context
from cu_runner.runner.training import erase


def rows(number: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(
        number, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


# ---------------------------------------------------------------------------------- the closed form
def test_by_hand():
    """C = diag(3, 0), lam = 1, t = (2, 1): (C + I)^-1 t = (1/2, 1), t^T that = 2."""
    d = minimum_variance_direction(
        torch.tensor([2.0, 1.0]), torch.diag(torch.tensor([3.0, 0.0])), 1.0
    )
    torch.testing.assert_close(d, torch.tensor([0.25, 0.5]))
    assert d.dtype == torch.float32


def test_hears_the_target_and_no_other_direction_that_hears_it_has_less_variance():
    X, t = rows(40, 12), rows(1, 12, seed=1)[0]
    C = X.T @ X
    d = minimum_variance_direction(t, C, 0.7)
    assert (d @ t).item() == pytest.approx(1)

    def variance(v: torch.Tensor) -> float:
        return (v @ C @ v + 0.7 * v @ v).item()

    for seed in range(2, 12):
        aside = rows(1, 12, seed=seed)[0]
        aside = aside - (aside @ t) / (t @ t) * t  # d + aside hears the target as well
        assert variance(d + 0.1 * aside) > variance(d)
        assert variance(d - 0.1 * aside) > variance(d)


def test_the_limits_of_lam():
    """A large one leaves t itself; a small one hears nothing of a span that t is not in."""
    t, X = rows(1, 8, seed=1)[0], rows(5, 8)
    far = minimum_variance_direction(t, X.T @ X, 1e9)
    torch.testing.assert_close(far, t / (t @ t), rtol=1e-6, atol=1e-9)
    near = minimum_variance_direction(t, X.T @ X, 1e-9)
    assert (X @ near).abs().max() < 1e-6


def test_what_has_no_direction_is_refused():
    with pytest.raises(ValueError, match="t is zero"):
        minimum_variance_direction(torch.zeros(3), torch.eye(3), 1.0)
    with pytest.raises(ValueError, match=r"no inverse with lam=0; give a lam above 0"):
        minimum_variance_direction(torch.ones(3), torch.zeros(3, 3), 0)


# ---------------------------------------------------------------------------------- what it is told
def test_texts_of_a_name_are_split_at_its_own_tokens(model):
    """Of lava flow, two tokens: the positions of two prompts are told apart by hand."""
    contexts = ["a ball in the style of {concept}", "{concept} and a box"]
    placed = [in_context("lava flow", context) for context in contexts]
    texts = name_texts(model, placed)
    hidden = model.encode_prompts([prompt for prompt, *_ in placed]).hidden.double()
    first, second = (
        list(range(*model.token_span("lava flow", prompt).indices(99))) for prompt, *_ in placed
    )
    assert len(first) == len(second) == len(texts.own) == 2
    torch.testing.assert_close(texts.own, (hidden[0, first] + hidden[1, second]) / 2)
    one = hidden[0, first[1]], hidden[1, second[1]]
    torch.testing.assert_close(texts.own_square[1], sum(torch.outer(x, x) for x in one) / 2)
    rest = [hidden[0, i] for i in range(hidden.shape[1]) if i not in first]
    rest += [hidden[1, i] for i in range(hidden.shape[1]) if i not in second]
    torch.testing.assert_close(texts.around, sum(torch.outer(x, x) for x in rest) / len(rest))


@pytest.fixture
def started(make_scope):
    """Returns make(request=1, **options) -> a regularizer that has begun, its scope and record."""

    def make(request: int = 1, **options: object):
        scope, regularizer = make_scope(request=request), MinVar(**options)
        record = regularizer.begin_request(scope, ConAbl(num_anchors=4))
        return regularizer, scope, record

    return make


def own_token(model, name: str, token: int = 0) -> torch.Tensor:
    """The mean of a name's token over the captions of the smoke sequence."""
    prompts = [f"a {caption} in the style of {name}" for caption in ("ball", "box", "tent", "hoop")]
    hidden = model.encode_prompts(prompts).hidden
    start = model.token_span(name, prompts[0]).start
    return hidden[:, start + token].mean(0)


def test_the_target_is_heard_and_names_and_other_positions_are_not(started, model):
    regularizer, _, record = started(ridge=0.001)
    (entry,) = record["targets"]
    assert entry["target"] == "torch light"
    d = regularizer._D[0]
    assert (d @ own_token(model, "torch light", entry["token"])).item() == pytest.approx(
        1, abs=1e-4
    )
    for name in ("blaze", "ember", "stone"):
        assert abs((d @ own_token(model, name)).item()) < 0.1
    empty = model.encode_prompts([""]).hidden[0]
    assert (empty @ d).abs().max() < 0.1
    assert entry["heard_of_names"] < entry["heard_of_unknown_names"] < 1
    assert entry["target_against_kept"] > 100


def test_no_retained_name_is_read(started, make_scope, model, monkeypatch):
    """Neither domain's: no prompt that is encoded for it holds one."""
    asked = []
    encode = model.encode_prompts
    monkeypatch.setattr(
        model, "encode_prompts", lambda prompts: asked.extend(prompts) or encode(prompts)
    )
    scope = make_scope()
    MinVar().begin_request(scope, ConAbl(num_anchors=4))
    retained = [concept.name for concept in (*scope.sequence.retain, *scope.sequence.cross_retain)]
    assert len(asked) > 50
    assert not [prompt for prompt in asked for name in retained if name in prompt]


def test_earlier_targets_are_among_what_is_left_alone(started, model):
    regularizer, _, record = started(request=2, ridge=0.001)
    assert record["targets"][0]["target"] == "snow drift"
    assert record["kept_names"] == 21  # 24 of the vocabulary without 2 targets, 2 retained, + 1
    assert abs((regularizer._D[0] @ own_token(model, "torch light")).item()) < 0.1


def test_the_best_token_is_the_one_that_is_told_apart_best(started):
    """Of "torch light", by the variance of the direction itself."""
    found = {}
    for token in ("first", "last", "best"):
        _, _, record = started(token=token, ridge=0.01)
        found[token] = record["targets"][0]
    best = found["best"]
    assert {found["first"]["token"], found["last"]["token"]} == {0, 1}
    assert best in (found["first"], found["last"])
    other = next(entry for entry in found.values() if entry["token"] != best["token"])
    assert best["target_against_kept"] > other["target_against_kept"]


def test_the_ridge_is_the_one_by_which_unknown_names_are_heard_least(started):
    _, _, record = started(token="first")
    chosen = record["targets"][0]
    for ridge in (chosen["ridge"] / 10, chosen["ridge"] * 10):
        _, _, other = started(token="first", ridge=ridge)
        assert other["targets"][0]["heard_of_unknown_names"] > chosen["heard_of_unknown_names"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"contexts": ()}, "reg.minvar.contexts is empty"),
        ({"contexts": ("no name",)}, "reg.minvar.contexts"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        MinVar(**options)


def test_other_weights_than_keys_and_values_are_refused(make_scope):
    with pytest.raises(
        ValueError, match=r"trains \d+ other weights; choose method.params=kv_xattn"
    ):
        MinVar().begin_request(make_scope(group="xattn"), ConAbl(num_anchors=4))


# --------------------------------------------------------------------------------------- the change
def test_every_change_is_along_the_direction(make_scope, settings):
    chosen = settings(steps=3, lr=0.1)
    scope, regularizer = dataclasses.replace(make_scope(), train=chosen), MinVar()
    erase(scope, ConAbl(num_anchors=4), {"minvar": regularizer}, chosen)
    change = subtract(scope.params, scope.base)
    assign(scope.params, scope.base)
    d = regularizer._D[0]
    off = torch.eye(len(d)) - torch.outer(d, d) / (d @ d)
    for name, delta in change.items():
        assert delta.norm() > 0, name
        assert (delta @ off).norm() < 1e-4 * delta.norm(), name  # rounding of the sum W + a d^T


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_is_moved_by_the_optimiser_of_train(make_scope, settings, optimizer):
    """W = W_start + a d^T with a a leaf of its own, one step of torch's own optimiser by hand."""
    scope, regularizer = make_scope(), MinVar(settle=1.0)
    chosen = settings(steps=1, lr=0.2, optimizer=optimizer, weight_decay=0.0)
    scope = dataclasses.replace(scope, train=chosen)
    erase(scope, Pull(), {"minvar": regularizer}, chosen)
    found = subtract(scope.params, scope.base)
    assign(scope.params, scope.base)
    d, t = regularizer._D[0], regularizer._T[0]
    for name, weight in scope.base.items():
        a = torch.zeros(len(weight), requires_grad=True)
        size = (weight @ t).square().mean().sqrt().item()
        kind = torch.optim.Adam if optimizer == "adam" else torch.optim.SGD
        by_hand = kind([a], lr=0.2 * size)
        (0.5 * (weight + torch.outer(a, d) - 1).square().sum()).backward()
        by_hand.step()
        torch.testing.assert_close(
            found[name],
            torch.outer(a.detach(), d),
            rtol=1e-3,
            atol=2**-23 * weight.abs().max().item(),
        )


def test_of_a_closed_form_the_change_at_the_target_is_taken(make_scope, settings):
    plain, scope = make_scope(), make_scope()
    erase(plain, UCE(), {}, settings())
    wanted = subtract(plain.params, plain.base)
    assign(plain.params, plain.base)
    regularizer = MinVar()
    erase(scope, UCE(), {"minvar": regularizer}, settings())
    found = subtract(scope.params, scope.base)
    assign(scope.params, scope.base)
    d, t = regularizer._D[0], regularizer._T[0]
    for name, change in found.items():
        torch.testing.assert_close(change @ t, wanted[name] @ t, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(change, torch.outer(wanted[name] @ t, d), rtol=1e-3, atol=1e-5)


def test_steps_settle(make_scope, settings):
    """Of ten steps the last four are 0.3 times as large: with sgd and a constant gradient."""
    scope, regularizer = make_scope(), MinVar(settle=0.6)
    chosen = settings(steps=10, lr=100.0, optimizer="sgd", weight_decay=0.0)
    scope = dataclasses.replace(scope, train=chosen)
    name, seen = next(iter(scope.params)), []
    regularizer.begin_request(scope, ConAbl(num_anchors=4))
    for _ in range(10):
        before = snapshot(scope.params)
        for parameter in scope.params.values():
            parameter.grad = torch.ones_like(parameter)
        regularizer.on_step(scope.params, before)
        seen.append((scope.params[name] - before[name]).norm().item())
    assign(scope.params, scope.base)
    assert seen[:6] == pytest.approx([seen[0]] * 6, rel=1e-3)
    assert seen[6:] == pytest.approx([0.3 * seen[0]] * 4, rel=1e-3)


# ------------------------------------------------------------------------------------------ command
def test_by_the_command(in_process, filled_cache, tmp_path):
    status, out, err = in_process(*SMOKE, "reg=minvar", "train.lr=0.1", "method.loss=output")
    assert (status, err) == (0, "")
    directory = run_directory(out, tmp_path)
    step = json.loads((directory / "steps/02/step.json").read_text())
    (entry,) = step["training"]["regularizers"]["minvar"]["targets"]
    assert entry["target"] == "snow drift"
    assert math.isfinite(entry["target_against_kept"])
