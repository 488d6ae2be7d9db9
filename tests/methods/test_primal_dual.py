"""Constrained unlearning, the formulas: dual ascent, targets against one-dimensional densities,
sample weights, ratios.
"""

import math

import pytest
import torch

from cu_runner.methods._primal_dual import (
    DualAscent,
    Duals,
    dual_step,
    group_means,
    moving_average,
    snr_weights,
)
from cu_runner.methods.forward_kl import ForwardKL, forget_weights, shorten
from cu_runner.methods.likelihood import density_ratio, repelled_target, spread_shares
from cu_runner.methods.reverse_kl import alpha_from_lambda, combined_target, limit_lambda
from cu_runner.models.process import VariancePreserving

NAN = float("nan")


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(x: torch.Tensor, mean: float, deviation: float) -> torch.Tensor:
    return torch.exp(-0.5 * ((x - mean) / deviation) ** 2) / (deviation * math.sqrt(2 * math.pi))


def score(density: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """d log density / dx on a regular grid."""
    return torch.gradient(density.log(), spacing=(x,))[0]


# -------------------------------------------------------------------------------------- dual ascent
def test_dual_step_goes_up_with_a_violation_and_stops_at_zero():
    moved = dual_step(tensor(0.2, 0.1, 0.0), tensor(1.5, -2.0, 0.0), 0.1)
    torch.testing.assert_close(moved, tensor(0.35, 0.0, 0.0))


def test_moving_average_starts_with_the_first_value_and_skips_missing_ones():
    mean = moving_average(tensor(NAN, 4.0, 4.0, NAN), tensor(3.0, NAN, 9.0, NAN), 0.8)
    torch.testing.assert_close(mean, tensor(3.0, 4.0, 5.0, NAN), equal_nan=True)


def test_group_means():
    found = group_means(torch.tensor([1.0, 2.0, 5.0, 4.0]), [0, 2, 0, 2], 3)
    torch.testing.assert_close(found, tensor(3.0, NAN, 3.0), equal_nan=True)


def duals(sense: str = "at least", cap: float = 0.25, **settings) -> Duals:
    """Two constraints with initial values 2 and 4, and bounds 3 and 5."""
    chosen = {"step_size": 0.1, "every": 2, "decay": 0.5} | settings
    return Duals(
        DualAscent(**chosen),
        tensor(2.0, 4.0),
        tensor(3.0, 5.0),
        sense,
        lambda lam: lam.clamp(max=cap),
    )


def test_violations_are_in_units_of_the_initial_value():
    torch.testing.assert_close(duals("at least").violation(tensor(2.0, 7.0)), tensor(0.5, -0.5))
    torch.testing.assert_close(duals("at most").violation(tensor(2.0, 7.0)), tensor(-0.5, 0.5))


def test_a_dual_step_every_second_step_on_the_running_mean():
    state, seen = duals(), []
    for value in (
        0.0,
        2.0,
        1.0,
        3.0,
    ):  # running means 0, 1, 1, 2; violations of the first constraint 1.5, 1, 1, 0.5
        state.note(tensor(value, 9.0))
        state.advance()
        seen.append(state.lam.tolist())
    assert [lam for lam, _ in seen] == pytest.approx([0.0, 0.1, 0.1, 0.15])
    assert all(lam == 0 for _, lam in seen)
    assert state.mean[0] == 2.0


def test_noting_alone_moves_nothing():
    """A regularizer that calls backward to score weights leaves the duals as they were."""
    state = duals(every=1)
    for value in (0.0, 1.0, 2.0):
        logs = state.note(tensor(value, 9.0))
    assert state.lam.tolist() == [0, 0]
    assert state.mean.isnan().all()
    assert logs == {"lambda": 0.0, "constraint": 2.0, "constraint_mean": 2.0}
    state.advance()
    assert state.mean.tolist() == [2.0, 9.0]  # of the last alone


def test_status_tells_a_cap_from_too_few_steps():
    state = duals(every=1)
    assert state.status(tensor(3.0, 5.0)) == ["feasible", "feasible"]
    assert state.status(tensor(2.95, 4.0)) == [
        "feasible",
        "unfinished",
    ]  # 0.025 of the initial value is noise, 0.25 is not
    for _ in range(3):
        state.note(tensor(0.0, 4.9))
        state.advance()
    torch.testing.assert_close(state.lam, tensor(0.25, 0.0075))
    assert state.status(tensor(0.5, 4.0)) == ["infeasible", "unfinished"]
    assert state.status(tensor(3.5, 5.5)) == ["feasible", "feasible"]
    record = state.record(["torch light", "fog bank"], tensor(0.5, 4.0))
    assert record["status"] == "infeasible"
    assert record["constraints"]["torch light"] == {
        "lambda": 0.25,
        "initial": 2.0,
        "bound": 3.0,
        "final": 0.5,
        "status": "infeasible",
    }
    assert record["note"].startswith(
        "infeasible: lambda is stuck at its cap and the constraint on torch light is violated"
    )
    assert "note" not in state.record(["torch light", "fog bank"], tensor(3.5, 5.5))


# --------------------------------------------------------------------------------------- reverse KL
def test_alpha_from_lambda():
    torch.testing.assert_close(alpha_from_lambda(tensor(0.5)), tensor(1.0))
    torch.testing.assert_close(alpha_from_lambda(tensor(0.2, 0.3)), tensor(0.4, 0.6))


@pytest.mark.parametrize(
    "lam", [(0.9,), (5.0,), (0.2, 0.1), (0.7, 0.9), (3.0, 0.0, 3.0), (0.0, 0.0)]
)
def test_limit_keeps_alpha_under_its_cap_and_lambda_in_its_domain(lam):
    limited = limit_lambda(tensor(*lam), 2.0)
    alpha = alpha_from_lambda(limited)
    assert limited.sum() < 1
    assert alpha.max() <= 2 + 1e-12
    inside = sum(lam) < 1 and alpha_from_lambda(tensor(*lam)).max() <= 2
    assert torch.equal(limited, tensor(*lam)) if inside else alpha.max() == pytest.approx(2)


def test_the_minimiser_of_reverse_kl_has_the_combined_score():
    """p ~ q prod (q/q_i)^alpha_i against -sigma s = e* on a grid, and p stationary for the
    Lagrangian with lam.
    """
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    q, q_1, q_2 = normal(x, 0, 1), normal(x, 1, 1.4), normal(x, -0.5, 1.3)
    lam = tensor(0.2, 0.3)
    alpha = alpha_from_lambda(lam)
    p = q * (q / q_1) ** alpha[0] * (q / q_2) ** alpha[1]
    p = p / torch.trapezoid(p, x)
    scores = [-score(density, x).view(1, 1, 1, -1) for density in (q, q_1, q_2)]
    target = combined_target(scores[0], torch.stack(scores[1:]), alpha).flatten()
    torch.testing.assert_close(target, -score(p, x), atol=1e-6, rtol=1e-6)
    # d/dp [KL(p||q) - sum lam_i KL(p||q_i)] is the same at every x
    slope = (p / q).log() - lam[0] * (p / q_1).log() - lam[1] * (p / q_2).log() + (1 - lam.sum())
    assert slope.max() - slope.min() < 1e-9


def test_alpha_one_and_the_empty_prompt_is_esd():
    null, concept = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    esd = null - 1.0 * (concept - null)
    assert torch.equal(combined_target(null, concept[None], torch.ones(1)), esd)
    assert torch.equal(combined_target(null, concept[None], torch.zeros(1)), null)


def test_snr_weights_sum_to_half_the_range_of_log_snr():
    alphas = torch.linspace(0.999, 0.01, 50, dtype=torch.float64)
    weights = snr_weights(alphas.logit())
    assert weights[0] == 0
    assert (weights[1:] > 0).all()
    assert weights.sum().item() == pytest.approx(
        (alphas[0].logit() - alphas[-1].logit()).item() / 2
    )
    ratio = (alphas[9] / (1 - alphas[9])) / (alphas[10] / (1 - alphas[10]))
    assert weights[10].item() == pytest.approx(0.5 * math.log(ratio))
    dark = snr_weights(torch.tensor([0.9, 0.5, 0.0]).logit())
    assert dark.tolist() == pytest.approx([0, math.log(9) / 2, 0])


def test_snr_weighted_errors_add_up_to_the_divergence_of_gaussians():
    """KL(N(m, 1) || N(0, 1)) = m^2 / 2 from the two models' noise predictions at all levels."""
    alphas, shift = torch.linspace(14, -14, 4001, dtype=torch.float64).sigmoid(), 0.7
    # x_t is N(sqrt(ab) m, 1) under p and N(0, 1) under q, and e = -sqrt(1 - ab) score
    difference = -(1 - alphas).sqrt() * alphas.sqrt() * shift
    assert (snr_weights(alphas.logit()) * difference**2).sum().item() == pytest.approx(
        shift**2 / 2, rel=1e-3
    )


# --------------------------------------------------------------------------------------- forward KL
def test_forget_weights():
    weights = forget_weights(tensor(0.0, 0.1, 0.3), tensor(20, 20, 30), 100)
    torch.testing.assert_close(weights, tensor(0.01, 0.005, 0.0))
    assert forget_weights(tensor(0.4), tensor(20), 100).item() == pytest.approx(-0.01)


def test_at_the_cap_the_minimiser_is_retraining_without_the_group():
    """Least squares on a Gaussian's mean: sum_j v_j (x_j - m)^2; 30 forget and 70 kept samples."""
    draw = torch.Generator().manual_seed(0)
    forget = 3 + torch.randn(30, generator=draw, dtype=torch.float64)
    kept = torch.randn(70, generator=draw, dtype=torch.float64)

    def minimiser(lam: float) -> float:
        v = forget_weights(tensor(lam), tensor(30), 100)
        return ((v * forget.sum() + kept.sum() / 100) / (30 * v + 0.7)).item()

    assert minimiser(0.0) == pytest.approx(torch.cat([forget, kept]).mean().item())
    assert minimiser(0.3) == pytest.approx(kept.mean().item())
    assert kept.mean() < minimiser(0.15) < minimiser(0.0)
    assert minimiser(0.5) < kept.mean()  # beyond the cap the fit is pushed away from the group


def test_an_ascending_gradient_is_kept_short():
    descent, ascent = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 20.0])
    torch.testing.assert_close(shorten(ascent, descent, 0.5), torch.tensor([0.0, 2.5]))
    assert torch.equal(shorten(ascent, descent, 10.0), ascent)
    assert torch.equal(shorten(torch.zeros(2), descent, 0.5), torch.zeros(2))


def test_ascent_needs_a_stop_out_of_the_bounds_way():
    with pytest.raises(
        ValueError,
        match=r"^method.cap=1.5: beyond 1 the loss ascends without bound; set method.ascent_stop",
    ):
        ForwardKL(cap=1.5)
    with pytest.raises(ValueError, match=r"^method.ascent_stop=0.4: must exceed method.bound=0.5"):
        ForwardKL(cap=1.5, ascent_stop=0.4)
    assert ForwardKL(cap=1.5, ascent_stop=0.6).cap == 1.5


# --------------------------------------------------------------------------------------- likelihood
def test_density_ratio():
    null, concept = (
        torch.tensor([[5.0, 3.0], [1.0, 1.0], [1.0, 3.0]]),
        torch.tensor([[4.0, 2.0], [0.0, -80.0], [3.0, 7.0]]),
    )
    ratio = density_ratio(null, concept, 0.5, 4.0)
    assert ratio.tolist() == pytest.approx([math.exp(0.5), 4.0, math.exp(-1.5)])


def test_repelled_target():
    reference, null, concepts = (
        torch.full((2, 1, 1, 1), 3.0),
        torch.ones(2, 1, 1, 1),
        torch.full((2, 2, 1, 1, 1), 2.0),
    )
    push = torch.tensor([[0.1, 0.2], [0.0, 0.5]])  # [m, B]
    assert repelled_target(reference, null, concepts, push).flatten().tolist() == pytest.approx(
        [2.9, 2.3]
    )


@pytest.mark.parametrize(("lam", "error"), [(0.2, 0.0085), (1.0, 0.171), (4.0, 1.17)])
def test_first_order_error_of_the_likelihood_target(lam, error):
    """q has modes at -2.8 and 2.8, c is the upper one; at ab = 1/2 the exact score of p ~ q
    exp(-lam r) against the target's.
    """
    x = torch.linspace(-12, 12, 3001, dtype=torch.float64)
    y = torch.linspace(-8, 8, 801, dtype=torch.float64)
    spread = normal(y[:, None] - math.sqrt(0.5) * x, 0, math.sqrt(0.5))  # x_t = y given x_0 = x

    concept = normal(x, 2.8, 1)
    q = (concept + normal(x, -2.8, 1)) / 2
    assert torch.trapezoid(q * concept / q, x).item() == pytest.approx(1)  # E_q[r] = 1
    p = q * torch.exp(-lam * concept / q)
    noisy_q, noisy_c, noisy_p = spread @ q, spread @ concept, spread @ p
    # scores have the sign of -e, so e* = e_q - push (e_c - e_null) reads the same for them
    rows = [score(density, y).view(-1, 1, 1, 1) for density in (noisy_q, noisy_c, noisy_p)]
    target = repelled_target(rows[0], rows[0], rows[1][None], (lam * noisy_c / noisy_q)[None])
    wrong = (noisy_p * (target - rows[2]).flatten() ** 2).sum() / (
        noisy_p * rows[2].flatten() ** 2
    ).sum()
    assert wrong.sqrt().item() == pytest.approx(error, rel=0.02)


def test_timesteps_of_an_image_fall_into_equal_parts():
    shares = spread_shares(torch.Generator().manual_seed(0), 50, 4)
    found = VariancePreserving(torch.ones(1000), "epsilon").at(shares)
    assert found.shape == (50, 4)
    assert torch.equal(found // 250, torch.arange(4).expand(50, 4))
    assert found.unique().numel() > 150
