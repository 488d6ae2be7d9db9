"""OCE: the rotation by hand and by the published formula, what it leaves as it is."""

import dataclasses

import numpy as np
import pytest
import torch

from cu_runner.methods.oce import OCE, procrustes_objective, rotation, value_subspace
from cu_runner.models.architectures import ARCHITECTURES
from cu_runner.request.images import RetainSet

OUT, WIDTH = 5, 8
CAPTIONS = RetainSet("list", "shapecanvas_captions", prompts=8)
NAMES = RetainSet("names", prompts=8)
WEIGHTS = {"erase": 3.0, "keep_captions": 0.5, "keep_names": 0.25, "keep_weight": 0.125}


def rows(number: int, seed: int, width: int = WIDTH) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(number, width, generator=draw, dtype=torch.float64)


def test_the_published_formula():
    """The bases by QR, the terms one by one."""
    weight, targets, guides, kept, captions = (
        rows(OUT, 0),
        rows(2, 1),
        rows(1, 2),
        rows(3, 3),
        rows(9, 4),
    )
    own, other = (value_subspace(weight, each, 1.0) for each in (targets, guides))
    assert (own.shape, other.shape) == ((OUT, 2), (OUT, 1))
    found = procrustes_objective(weight, own, other, kept, captions.T @ captions / 9, **WEIGHTS)
    W = weight.numpy()
    unit = [W @ c / np.linalg.norm(W @ c) for c in targets.numpy()]
    G, _ = np.linalg.qr(np.stack(unit, axis=1))
    v = W @ guides.numpy()[0]
    expected = -3.0 * G @ G.T @ (np.eye(OUT) - np.outer(v, v) / (v @ v))
    expected += 0.5 * W @ np.mean([np.outer(c, c) for c in captions.numpy()], axis=0) @ W.T
    expected += 0.25 * sum(np.outer(W @ c, W @ c) for c in kept.numpy()) + 0.125 * W @ W.T
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_rotations_by_hand():
    """The nearest orthogonal matrix to diag(-2, 3, -5) is diag(-1, 1, -1), a rotation; that to
    diag(-2, 3, 5) is a reflection, and its last column is turned round.
    """
    for given, expected in (((-2, 3, -5), (-1, 1, -1)), ((-2, 3, 5), (-1, 1, -1))):
        R = rotation(torch.diag(torch.tensor(given, dtype=torch.float64)))
        torch.testing.assert_close(R, torch.diag(torch.tensor(expected, dtype=torch.float64)))


@pytest.mark.parametrize("seed", range(4))
def test_it_is_orthogonal_a_rotation_and_the_best(seed):
    M = rows(OUT, seed, OUT)
    R = rotation(M)
    torch.testing.assert_close(R @ R.T, torch.eye(OUT, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.linalg.det(R).item() == pytest.approx(1.0)
    U, _, Vh = torch.linalg.svd(M)
    if torch.linalg.det(U @ Vh) > 0:  # then nothing was turned round
        others = [torch.linalg.qr(rows(OUT, 100 + i, OUT)).Q for i in range(200)]
        assert all((R * M).sum() > (other * M).sum() for other in others)


def test_a_subspace_has_the_rank_of_its_columns():
    """Two equal guides are one direction; energy drops what holds little."""
    weight = torch.eye(3, dtype=torch.float64)
    first, second = torch.eye(3, dtype=torch.float64)[:2]
    assert value_subspace(weight, torch.stack([first, first]), 1.0).shape == (3, 1)
    three = torch.stack([first, 7 * first, first + second])
    both = value_subspace(weight, three, 1.0)
    torch.testing.assert_close(both @ both.T, torch.diag(torch.tensor([1.0, 1.0, 0.0]).double()))
    # units: e1, e1, (e1 + e2) / sqrt 2; the top direction holds (3 + sqrt 5) / 6 of 3
    assert value_subspace(weight, three, 0.87).shape == (3, 1)
    assert value_subspace(weight, three, 0.88).shape == (3, 2)


def test_a_target_is_turned_away_and_the_norms_of_columns_stay():
    """A large weight of the target alone: its value goes to its negative."""
    weight, target, guide = rows(4, 0), rows(1, 1), rows(1, 2)
    own, other = (value_subspace(weight, each, 1.0) for each in (target, guide))
    M = procrustes_objective(
        weight,
        own,
        other * 0,
        target[:0],
        torch.zeros(WIDTH, WIDTH, dtype=torch.float64),
        erase=1e4,
        keep_captions=0.0,
        keep_names=0.0,
        keep_weight=1.0,
    )
    turned = rotation(M) @ weight
    before, after = (each @ target[0] / (each @ target[0]).norm() for each in (weight, turned))
    assert (before @ after).item() < -0.99
    torch.testing.assert_close(turned.T @ turned, weight.T @ weight, rtol=0, atol=1e-12)


def test_weights_of_a_request_are_turned(make_scope):
    scope = make_scope(group="v_xattn")
    method = OCE(captions=CAPTIONS, retain=NAMES)
    found = method.solve(method.solved(scope), method.batch(scope, 0))
    assert found.keys() == scope.base.keys()
    for name, weight in found.items():
        assert ARCHITECTURES["UNet2DConditionModel"].roles.linear.search(name)
        old, new = scope.base[name].double(), weight.double()
        assert (new - old).norm() > 0.01 * old.norm()
        torch.testing.assert_close(new.T @ new, old.T @ old, rtol=0, atol=1e-5)
    guided = OCE(captions=CAPTIONS, retain=NAMES, guides=("river", "ember"))
    other = guided.solve(method.solved(scope), guided.batch(scope, 0))
    assert not any(torch.equal(other[name], weight) for name, weight in found.items())


def test_captions_count_without_their_padding(make_scope):
    scope = make_scope()
    model, method = scope.model, OCE(captions=CAPTIONS)
    prompts = CAPTIONS.read(scope)
    tokens = [
        row
        for prompt in prompts
        for row in model.encode_prompts([prompt]).hidden[0][
            : len(model.tokenizer(prompt).input_ids)
        ]
    ]
    assert len(tokens) < len(prompts) * model.num_tokens
    stacked = torch.stack(tokens).double()
    expected = stacked.T @ stacked / len(tokens)
    torch.testing.assert_close(method._mean_of_captions(scope), expected, rtol=1e-9, atol=1e-9)


def test_targets_that_span_all_outputs_are_one_line(make_scope):
    """Every position of the training prompts spans the 64 outputs of some weights."""
    scope = make_scope(group="v_xattn", request=2)
    method = OCE(captions=CAPTIONS, retain=NAMES, tokens="all")
    with pytest.raises(
        ValueError, match=r"^method=oce: the targets' values span all 64 outputs of .*; lower"
    ):
        method.solve(method.solved(scope), method.batch(scope, 0))
    less = OCE(captions=CAPTIONS, retain=NAMES, tokens="all", energy=0.5)
    assert less.solve(less.solved(scope), less.batch(scope, 0)).keys() == scope.base.keys()


def test_bad_settings_are_one_line(in_process):
    run = ("sequence=smoke", "method=oce", "wandb.mode=disabled")
    for bad, words in (
        (["method.energy=0"], "method.energy=0"),
        (["method.captions.source=list", "method.captions.name=coco"], "coco: no such list"),
        (["method.params=full"], "method.params='full'"),
    ):
        status, _, err = in_process(*run, *bad)
        assert (status, err.count("\n")) == (2, 1)
        assert words in err


def test_later_requests_preserve_earlier_targets_only_one_by_one(make_scope):
    scope = make_scope(group="v_xattn", request=2)
    whole, single = (
        OCE(captions=CAPTIONS, retain=NAMES, cumulative=value).batch(scope, 0)
        for value in (True, False)
    )
    assert len(single.preserved) == len(whole.preserved) + 1
    assert torch.equal(single.concept, whole.concept)
    assert dataclasses.asdict(single).keys() == {"concept", "anchor", "preserved"}
