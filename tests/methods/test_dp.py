"""DP: the published formula for one target, least squares for several, what it keeps."""

import dataclasses

import numpy as np
import pytest
import torch

from cu_runner.methods.dp import DP, double_projection
from cu_runner.request.images import RetainSet
from cu_runner.request.text_subspace import principal_columns

OUT, WIDTH = 4, 12


def rows(number: int, seed: int, width: int = WIDTH) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(number, width, generator=draw, dtype=torch.float64)


@pytest.fixture
def bases():
    """Five safe rows, an orthonormal basis of their span [D, 5], and one of the rest [D, 7]."""
    kept = rows(5, 3)
    safe = principal_columns(kept.T)
    return kept, safe, torch.linalg.qr(safe, mode="complete").Q[:, 5:]


def test_one_target_by_the_published_formula(bases):
    kept, safe, free = bases
    W, c, S = rows(OUT, 0).numpy(), rows(1, 1)[0].numpy(), kept.T.numpy()
    proxy = S @ np.linalg.pinv(S.T @ S) @ S.T @ c
    U = np.linalg.svd(S)[0][:, 5:]
    x = U.T @ c
    expected = W @ np.outer(proxy - c, x) @ U.T / (x @ x)
    gram = torch.from_numpy(np.outer(c, c))
    moved = double_projection(gram, safe, free, ridge=0.0)
    np.testing.assert_allclose(W @ moved.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose((W + W @ moved.numpy()) @ c, W @ proxy, atol=1e-12)
    np.testing.assert_allclose(moved.numpy() @ S, 0, atol=1e-12)


def test_the_two_spaces_need_not_fill_the_text():
    """One safe direction, one free: c = (1, 2, 3) goes to (1, 2, 3) + (1 - 1, 0 - 2, 0 - 3)."""
    eye = torch.eye(3, dtype=torch.float64)
    c = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    moved = double_projection(torch.outer(c, c), eye[:, :1], eye[:, 2:], ridge=0.0)
    assert (c + moved @ c).tolist() == pytest.approx([1, 0, 0])
    assert moved[:, :2].abs().max() == 0
    half = double_projection(torch.outer(c, c), eye[:, :1], eye[:, 2:], ridge=9.0)
    torch.testing.assert_close(half, moved / 2)  # x^2 = 9


@pytest.mark.parametrize(("number", "directions"), [(3, 7), (20, 7), (3, 4), (20, 4)])
def test_several_targets_are_least_squares(bases, number, directions):
    """Any number arrives exactly where all that is not safe may change."""
    kept, safe, free = bases
    free, targets = free[:, :directions], rows(number, 1)
    moved = double_projection(targets.T @ targets, safe, free, ridge=0.0)
    assert (moved @ kept.T).abs().max() < 1e-10
    proxies = targets @ safe @ safe.T
    solution, *_ = np.linalg.lstsq(
        (targets @ free).numpy(), (proxies - targets).numpy(), rcond=None
    )
    np.testing.assert_allclose(moved.numpy(), solution.T @ free.T.numpy(), atol=1e-9)
    left = (targets + targets @ moved.T - proxies).abs().max()
    assert (left < 1e-9) if directions == 7 or number == 3 else (left > 1e-3)


def test_targets_go_to_their_proxies_and_safe_names_stay(make_scope):
    scope = make_scope(request=2)
    method = DP(retain=RetainSet("names", prompts=8))
    text = method.batch(scope, 0)
    found = method.solve(method.solved(scope), text)
    columns = text.preserved.double().T
    proxies = columns @ torch.linalg.pinv(columns) @ text.concept.double().T
    torch.testing.assert_close(text.anchor.double(), proxies.T, rtol=1e-5, atol=1e-5)
    for name, weight in found.items():
        old, new = scope.base[name].double(), weight.double()
        assert (new - old).norm() > 0.01 * old.norm()
        assert ((new - old) @ columns).norm() < 1e-5 * (old @ columns).norm()
        gap = new @ text.concept.double().T - old @ proxies
        assert gap.norm() < 1e-4 * (old @ (text.concept.double().T - proxies)).norm()


def test_safe_text_that_spans_the_targets_is_one_line(make_scope):
    scope = make_scope()
    method = DP(retain=RetainSet("names", prompts=8))
    text = method.batch(scope, 0)
    full = dataclasses.replace(text, preserved=torch.cat([text.preserved, text.concept]))
    with pytest.raises(ValueError, match=r"^method=dp: the 9 safe positions span all of the targ"):
        method.solve(method.solved(scope), full)
    less = DP(energy=0.9, retain=method.retain)
    assert less.solve(method.solved(scope), full).keys() == scope.base.keys()


def test_bad_settings_are_one_line(in_process):
    status, _, err = in_process(
        "sequence=smoke", "method=dp", "method.energy=1.5", "wandb.mode=disabled"
    )
    assert (status, err.count("\n")) == (2, 1)
    assert "method.energy=1.5" in err
