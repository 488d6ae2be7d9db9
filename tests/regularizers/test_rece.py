"""RECE: the derived embedding and its erasure by hand and by the published forms; its record."""

import numpy as np
import pytest
import torch

from cu_runner.methods._closed_form import pair_sums
from cu_runner.methods.conabl import ConAbl
from cu_runner.methods.speed import SPEED
from cu_runner.methods.uce import UCE
from cu_runner.models.parameters import snapshot
from cu_runner.regularizers.rece import RECE, derived_map, erased_again
from cu_runner.request.images import RetainSet
from cu_runner.runner.training import Training, check_composition, erase

WIDTH = 6
NAMES = RetainSet("names", prompts=8)


def matrices(*shapes: tuple[int, int]) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]


def test_the_derived_embedding_is_the_minimum_of_its_objective():
    old, new = matrices((3, WIDTH), (4, WIDTH)), matrices((3, WIDTH), (4, WIDTH))
    new = [weight + 0.5 for weight in new]
    (c,) = matrices((WIDTH, 1))
    derived = (derived_map(old, new, 0.1) @ c).requires_grad_(True)
    objective = 0.1 * derived.square().sum()
    for before, after in zip(old, new, strict=True):
        objective = objective + (after @ derived - before @ c).square().sum()
    objective.backward()
    assert derived.grad.abs().max() < 1e-10


def test_what_is_not_edited_derives_itself_by_hand():
    """W0 = W1 = 3 I: G = 9 / (9 + r) I."""
    weight = [3 * torch.eye(2, dtype=torch.float64)]
    assert derived_map(weight, weight, 1.0).diagonal().tolist() == pytest.approx([0.9, 0.9])
    halved = [weight[0] / 2]  # an edit that halves is undone by doubling
    assert derived_map(weight, halved, 1e-9)[0, 0].item() == pytest.approx(2.0)


def test_the_erasure_of_the_published_form():
    old, new, attack = matrices((3, WIDTH), (3, WIDTH), (WIDTH, WIDTH))
    targets, anchors, kept = matrices((4, WIDTH), (4, WIDTH), (5, WIDTH))
    anchors = anchors + 1
    derived = targets @ attack.T
    l0, p = 0.1, 0.3
    left = l0 * new + old @ anchors.T @ derived + p * new @ kept.T @ kept
    right = l0 * torch.eye(WIDTH) + derived.T @ derived + p * kept.T @ kept
    found = erased_again(
        old,
        new,
        attack,
        targets.T @ targets,
        (anchors - targets).T @ targets,
        kept.T @ kept,
        ridge=l0,
        preserve=p,
    )
    np.testing.assert_allclose((new + found).numpy(), left @ np.linalg.inv(right), atol=1e-9)


@pytest.mark.parametrize("make", [lambda: UCE(retain=NAMES), lambda: SPEED(retain=NAMES)])
def test_a_linear_attacker_is_left_with_less_after_every_epoch(make_scope, settings, make):
    """The record against the definition, position by position."""
    method = make()
    scope = make_scope(group=method.params)
    base = snapshot(scope.params)
    plain = method.solve(method.solved(scope), method.batch(scope, 0))
    report = erase(scope, method, {"rece": RECE(epochs=2)}, settings())
    (record,) = report.regularizers["rece"]["unreached"].items()
    assert record[0] == "torch light"
    before, first, second = record[1]
    assert 0 < before < first < second
    rows = []
    for prompt in [
        f"a {caption} in the style of torch light" for caption in scope.sequence.captions
    ]:
        start = scope.model.token_span("torch light", prompt).start
        rows.append(scope.model.encode_prompts([prompt]).hidden[0, start:])
    text = torch.cat(rows).double().T
    for weights, expected in ((plain, before), (scope.params, second)):
        old, new = (
            [each[name].detach().double() for name in scope.params] for each in (base, weights)
        )
        G = derived_map(old, new, 0.1)
        gaps = [a @ G @ text - b @ text for a, b in zip(new, old, strict=True)]
        left = sum(gap.square().sum() for gap in gaps)
        whole = sum((weight @ text).square().sum() for weight in old)
        assert (left / whole).sqrt().item() == pytest.approx(expected, rel=1e-3)


def test_every_target_of_a_cumulative_method_is_erased_and_recorded(make_scope, settings):
    scope = make_scope(request=2)
    report = erase(scope, UCE(retain=NAMES, cumulative=True), {"rece": RECE()}, settings())
    assert list(report.regularizers["rece"]["unreached"]) == ["snow drift", "torch light"]
    scope = make_scope(request=2)
    report = erase(scope, UCE(retain=NAMES), {"rece": RECE()}, settings())
    assert list(report.regularizers["rece"]["unreached"]) == ["snow drift"]


def test_the_tokens_that_are_derived_from_are_an_option(make_scope):
    scope = make_scope()
    regularizer = RECE(tokens="last")
    regularizer.begin_request(scope, UCE())
    expected = pair_sums(scope, scope.request.targets[0], tokens="last").matrices
    assert torch.equal(regularizer._total, expected)


def test_a_request_that_goes_on_has_its_record(make_scope, settings):
    scope = make_scope()
    training = Training(scope, UCE(retain=NAMES), {"rece": RECE()}, settings())
    training.step()
    again = Training(make_scope(), UCE(retain=NAMES), {"rece": RECE()}, settings())
    again.restore(training.state())
    found = again.finish().regularizers
    assert found == training.finish().regularizers
    assert len(found["rece"]["unreached"]["torch light"]) == 2


def test_methods_that_train_are_refused_in_one_line(in_process):
    with pytest.raises(ValueError, match=r"^reg=rece erases what a closed form leaves"):
        check_composition(ConAbl(), {"rece": RECE()})
    status, _, err = in_process(
        "sequence=smoke", "reg=rece", "reg.rece.epochs=0", "method=uce", "wandb.mode=disabled"
    )
    assert (status, err.count("\n")) == (2, 1)
    assert "reg.rece.epochs=0" in err
