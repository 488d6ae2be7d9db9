"""SPEED: the published product of inverses, what it keeps, its filters by hand."""

import dataclasses

import numpy as np
import pytest
import torch

from cu_runner.methods.speed import (
    SPEED,
    empty_prompt,
    first_edit,
    influenced,
    k_means,
    neighbours,
    null_space,
    null_space_edit,
)
from cu_runner.request.images import RetainSet

OUT, WIDTH = 4, 12


def rows(number: int, seed: int, width: int = WIDTH) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(number, width, generator=draw, dtype=torch.float64)


@pytest.fixture
def problem():
    """W [out, D], B, A - B [D, D], targets, anchors [3, D], kept [4, D], held [2, D]."""
    weight, targets, anchors = rows(OUT, 0), rows(3, 1), rows(3, 2)
    gram, cross = targets.T @ targets / 3, (anchors - targets).T @ targets / 3
    return weight, gram, cross, targets, anchors, rows(4, 3), rows(2, 4)


def published(weight, gram, cross, P, held, ridge, relaxation):
    """W (A - B) P Q M with M = (B P + rho I)^-1, Q = I - M C2 (C2^T P M C2 + lam I)^-1 C2^T P."""
    weight, gram, cross, P, C2 = (each.numpy() for each in (weight, gram, cross, P, held.T))
    eye = np.eye(len(gram))
    M = np.linalg.inv(gram @ P + ridge * eye)
    inner = C2.T @ P @ M @ C2 + relaxation * np.eye(C2.shape[1])
    Q = eye - M @ C2 @ np.linalg.inv(inner) @ C2.T @ P
    return torch.from_numpy(weight @ cross @ P @ Q @ M)


@pytest.mark.parametrize(("ridge", "relaxation"), [(1.0, 0.0), (0.05, 0.0), (0.7, 0.5)])
def test_the_published_form(problem, ridge, relaxation):
    weight, gram, cross, _, _, kept, held = problem
    free = null_space(kept, 1e-9)
    assert free.shape == (WIDTH, WIDTH - 4)
    basis = free if relaxation else free @ null_space(held @ free)
    found = null_space_edit(weight, gram, cross, basis, held, ridge=ridge, relaxation=relaxation)
    expected = published(weight, gram, cross, free @ free.T, held, ridge, relaxation)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert found.norm() > 0.1


def test_kept_and_constrained_text_stays_and_targets_arrive(problem):
    weight, gram, cross, targets, anchors, kept, held = problem
    free = null_space(kept, 1e-9)
    basis = free @ null_space(held @ free)
    change = null_space_edit(weight, gram, cross, basis, held, ridge=1e-10, relaxation=0.0)
    assert (change @ kept.T).abs().max() < 1e-10
    assert (change @ held.T).abs().max() < 1e-10
    torch.testing.assert_close(targets @ (weight + change).T, anchors @ weight.T, rtol=0, atol=1e-6)
    relaxed = null_space_edit(weight, gram, cross, free, held, ridge=0.3, relaxation=0.5)
    assert (relaxed @ held.T).norm() > 1e-3


def test_it_is_the_minimum_of_its_objective_inside_the_null_space(problem):
    weight, gram, cross, targets, anchors, kept, _ = problem
    basis = null_space(kept, 1e-9)
    held = kept[:0]
    change = null_space_edit(weight, gram, cross, basis, held, ridge=0.3, relaxation=0.0)
    inside = (change @ basis).requires_grad_(True)
    gap = targets @ (weight + inside @ basis.T).T - anchors @ weight.T
    (gap.square().sum() / 3 + 0.3 * inside.square().sum()).backward()
    assert inside.grad.abs().max() < 1e-12


def test_null_space_by_hand():
    """The mean of c c^T is diag(2, 0.02, 0): thresholds 0.1 and 0.01 free 2 and 1."""
    given = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.2, 0.0]], dtype=torch.float64)
    for threshold, expected in ((0.1, [0, 1, 1]), (0.01, [0, 0, 1]), (3.0, [1, 1, 1])):
        basis = null_space(given, threshold)
        assert (basis @ basis.T).diagonal().tolist() == pytest.approx(expected)
    exact = null_space(given)
    assert exact.abs().flatten().tolist() == pytest.approx([0, 0, 1])
    assert torch.equal(null_space(given[:0], 0.1), torch.eye(3, dtype=torch.float64))
    assert torch.equal(null_space(torch.zeros(1, 2)).abs().sum(0), torch.ones(2))


def test_filters_and_neighbours_by_hand(problem):
    weight, gram, cross, *_ = problem
    literal = weight @ cross @ torch.linalg.inv(torch.eye(WIDTH, dtype=torch.float64) + gram)
    torch.testing.assert_close(first_edit(weight, gram, cross), literal, rtol=1e-9, atol=1e-12)
    change = torch.tensor([[1.0, 0.0]])
    given = torch.tensor([[1.0, 5.0], [4.0, 0.0], [-7.0, 0.0]])  # moved by 1, 4, 7: the mean is 4
    assert influenced(given, change).tolist() == [[-7.0, 0.0]]
    # singular values 3 and 2: neighbours lie along the second axis
    W = torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]], dtype=torch.float64)
    start = rows(2, 5, 3)
    near = neighbours(start, W, 500, torch.Generator().manual_seed(0)).view(2, 500, 3)
    steps = near - start[:, None]
    assert steps[..., [0, 2]].abs().max() < 1e-12
    assert steps[..., 1].std().item() == pytest.approx(1.0, abs=0.1)
    assert len(steps[..., 1].unique()) == 1000


def test_k_means_by_hand():
    """It starts at 0 and 2; the centre 2 takes 10, and 2 goes back to the first."""
    given = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    assert k_means(given, 2).tolist() == [[1.0], [10.0]]
    assert k_means(torch.zeros(3, 1), 2).tolist() == [[0.0], [0.0]]  # the second has no row


def test_the_empty_prompt_stays_and_the_target_moves(make_scope):
    scope = make_scope(group="v_xattn")
    method = SPEED(retain=RetainSet("names", prompts=8))
    text = method.batch(scope, 0)
    found = method.solve(method.solved(scope), text)
    held = empty_prompt(scope.model, 3)
    hidden = scope.model.encode_prompts([""]).hidden[0].double()
    assert torch.equal(held[0], hidden[0])
    assert held.shape == (4, hidden.shape[1])
    free = SPEED(invariant=False, retain=method.retain).solve(method.solved(scope), text)
    assert all(".attn2.to_v." in name for name in found)
    moved, unheld, edited = [], [], []
    for name, weight in found.items():
        old = scope.base[name].double()
        moved.append(((weight.double() - old) @ held.T).norm() / (old @ held.T).norm())
        unheld.append(((free[name].double() - old) @ held.T).norm() / (old @ held.T).norm())
        gap = (text.concept - text.anchor).double() @ old.T
        edited.append(
            (text.concept.double() @ weight.double().T - text.anchor @ old.float().T).norm()
            / gap.norm()
        )
    assert max(moved) < 1e-6  # single precision
    assert max(unheld) > 1e-4
    assert max(edited) < 0.1


def test_random_numbers_depend_on_the_seed_and_the_weight_alone(make_scope):
    scope = make_scope(group="v_xattn")
    retain = RetainSet("names", prompts=8)
    found = [
        SPEED(retain=retain).solve(each, SPEED(retain=retain).batch(each, 0))
        for seed in (0, 0, 1)
        for each in [
            dataclasses.replace(scope, rng=dataclasses.replace(scope.rng, seed=seed, request=0))
        ]
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not all(torch.equal(found[0][name], found[2][name]) for name in found[0])


def test_no_free_direction_is_one_line(make_scope):
    scope = make_scope(group="v_xattn")
    method = SPEED(filter_names=False, augmentations=0)
    text = method.batch(scope, 0)
    width = text.preserved.shape[1]
    full = dataclasses.replace(text, preserved=10 * width**0.5 * torch.eye(width))
    with pytest.raises(ValueError, match=rf"^method=speed: no direction .* {width} preserved pos"):
        method.solve(method.solved(scope), full)


def test_bad_settings_are_one_line(in_process):
    run = ("sequence=smoke", "method=speed", "wandb.mode=disabled")
    status, _, err = in_process(*run, "method.tokens=first")
    assert (status, err.count("\n")) == (2, 1)
    assert "method.tokens='first'" in err
    status, _, err = in_process(*run, "method.ridge=0")
    assert (status, err.count("\n")) == (2, 1)
    assert "method.ridge=0" in err
