"""Minimum-variance direction: its closed form, what is left alone, the token, the change."""

import dataclasses
import json
import math

import pytest
import torch
from conftest import SMOKE, run_directory
from doubles import Pull

from cu_runner.methods.conabl import ConAbl
from cu_runner.methods.salun import SalUn
from cu_runner.methods.uce import UCE
from cu_runner.models.parameters import assign, snapshot, subtract
from cu_runner.regularizers.merge import Merge
from cu_runner.regularizers.minvar import RIDGES, MinVar, minimum_variance_direction, name_texts
from cu_runner.regularizers.nullspace import NullSpace
from cu_runner.regularizers.selft import SelFT
from cu_runner.request.name_sources import NameSource
from cu_runner.request.text_subspace import in_context
from cu_runner.runner.training import Training, check_composition, erase


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
    own = [*hidden[0, first], *hidden[1, second]]
    torch.testing.assert_close(texts.own_squares, sum(torch.outer(x, x) for x in own) / 2)
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
    regularizer, _, record = started(token="all", ridge=0.01)
    assert record["targets"] == [found["first"], found["last"]]
    assert regularizer._D.shape[0] == 2


def test_the_ridge_is_the_one_by_which_unknown_names_are_heard_least(started):
    _, _, record = started(token="first")
    chosen = record["targets"][0]
    heard = {}
    for ridge in RIDGES:
        _, _, other = started(token="first", ridge=ridge)
        heard[ridge] = other["targets"][0]["heard_of_unknown_names"]
    assert min(heard, key=heard.get) == chosen["ridge"]
    assert heard[chosen["ridge"]] == pytest.approx(chosen["heard_of_unknown_names"])
    assert max(heard.values()) > 2 * min(heard.values())


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


def test_a_name_that_is_cut_counts_as_far_as_every_prompt_has_it(started, model, tmp_path):
    """Twenty words do not fit; of two contexts the second leaves less room."""
    file = tmp_path / "names.txt"
    file.write_text("blaze river plum " * 7 + "\nglacier")
    contexts = ("{concept}", "a ball in the style of {concept}")
    source = NameSource("file", str(file))
    _, _, record = started(names=source, contexts=contexts)
    assert record["kept_names"] == 2
    placed = [in_context("blaze river plum " * 7 + "blaze", context) for context in contexts]
    texts = name_texts(model, placed)
    assert (
        len(texts.own)
        == model.num_tokens - 1 - model.token_span("plum", "a ball in the style of plum").start
    )


def test_other_weights_than_keys_and_values_are_refused():
    with pytest.raises(ValueError, match=r"method\.params=xattn trains other weights; choose"):
        check_composition(ConAbl(params="xattn"), {"minvar": MinVar()})


@pytest.mark.parametrize(
    ("method", "others", "said"),
    [
        (SalUn(num_images=4), {}, "the method's mask of the optimiser's step would be lost"),
        (ConAbl(), {"nullspace": NullSpace()}, r"put minvar first: reg=\[minvar,nullspace\]"),
        (ConAbl(), {"selft": SelFT(0.1)}, r"use reg\.selft\.apply=update after it: reg=\[minvar,"),
    ],
)
def test_what_its_own_step_would_undo_is_refused(method, others, said):
    with pytest.raises(ValueError, match=said):
        check_composition(method, {**others, "minvar": MinVar()})


def test_what_follows_its_step_is_composed_with():
    after = {"minvar": MinVar(), "selft": SelFT(0.1, apply="update"), "merge": Merge()}
    check_composition(ConAbl(), after)


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
        regularizer.on_gradients(scope.params)
        regularizer.on_step(scope.params, before)
        seen.append((scope.params[name] - before[name]).norm().item())
    assign(scope.params, scope.base)
    assert seen[:6] == pytest.approx([seen[0]] * 6, rel=1e-3)
    assert seen[6:] == pytest.approx([0.3 * seen[0]] * 4, rel=1e-3)


def test_a_mask_after_it_holds(make_scope, settings):
    """[minvar, selft] with apply=update: what is masked stays bitwise."""
    chosen = settings(steps=2, lr=0.1)
    scope = dataclasses.replace(make_scope(), train=chosen)
    mask = SelFT(0.1, apply="update", num_batches=1)
    erase(scope, ConAbl(num_anchors=4), {"minvar": MinVar(), "selft": mask}, chosen)
    change = subtract(scope.params, scope.base)
    assign(scope.params, scope.base)
    moved = sum(int((delta != 0).sum()) for delta in change.values())
    allowed = sum(int(part.sum()) for part in mask._mask.values())
    assert 0 < moved <= allowed
    assert all(not delta[~mask._mask[name]].any() for name, delta in change.items())


def test_the_optimiser_of_the_request_has_nothing_to_move(make_scope, settings):
    """No moments of keys and values are made, and the largest norm is that of a's gradient."""
    chosen = settings(steps=1, lr=0.1, optimizer="sgd", grad_clip=1e-3, weight_decay=0.0)
    scope, regularizer = dataclasses.replace(make_scope(), train=chosen), MinVar(settle=1.0)
    training = Training(scope, Pull(), {"minvar": regularizer}, chosen)
    training.step()
    assert not training._optimizer.state
    moved = {name: regularizer._a[name] for name in scope.params}
    sizes = {name: (scope.base[name] @ regularizer._T[0]).square().mean().sqrt() for name in moved}
    gradient = torch.cat([(moved[name] / sizes[name]).flatten() for name in moved]) / 0.1
    assert gradient.norm().item() == pytest.approx(1e-3, rel=1e-3)
    assign(scope.params, scope.base)


def test_a_cumulative_closed_form_is_taken_at_all_targets_in_any_order(make_scope, settings):
    """The second request of either order ends with the same weights, along both directions."""
    found = []
    for reverse in (False, True):
        scope = make_scope(request=2)
        listed = scope.request.listed[::-1] if reverse else scope.request.listed
        scope = dataclasses.replace(
            scope, request=dataclasses.replace(scope.request, listed=listed)
        )
        with torch.no_grad():  # whatever the request before has left
            for parameter in scope.params.values():
                parameter += 0.01 if reverse else 0.02
        regularizer = MinVar()
        erase(scope, UCE(cumulative=True), {"minvar": regularizer}, settings())
        found.append(subtract(scope.params, scope.base))
        assign(scope.params, scope.base)
        assert regularizer._D.shape[0] == 2
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# ------------------------------------------------------------------------------------------ command
def test_by_the_command(in_process, filled_cache, tmp_path):
    status, out, err = in_process(*SMOKE, "reg=minvar", "train.lr=0.1", "method.loss=output")
    assert (status, err) == (0, "")
    directory = run_directory(out, tmp_path)
    step = json.loads((directory / "steps/02/step.json").read_text())
    (entry,) = step["training"]["regularizers"]["minvar"]["targets"]
    assert entry["target"] == "snow drift"
    assert math.isfinite(entry["target_against_kept"])
