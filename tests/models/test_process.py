"""Rectified flow beside the variance-preserving process, against Gaussians computed by hand.

Data are N(m, 1) in one dimension: x_s = (1 - s) x_0 + s eps is N((1 - s) m, D) with
D = (1 - s)^2 + s^2, and E[eps | x_s] = s (x_s - (1 - s) m) / D.
"""

import diffusers
import pytest
import torch

from cu_runner.methods._primal_dual import snr_weights
from cu_runner.models.process import RectifiedFlow, VariancePreserving, is_flow, process_of

FLOW = RectifiedFlow(1000)
MEAN = 0.7


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def of_gaussian(noisy: torch.Tensor, timesteps: torch.Tensor, mean: float) -> torch.Tensor:
    """The velocity that a perfect model of N(mean, 1) predicts: (E[eps | x_s] - x_s) / (1 - s)."""
    s = (timesteps / 1000).view(-1, 1, 1, 1)
    noise = s * (noisy - (1 - s) * mean) / ((1 - s) ** 2 + s**2)
    return (noise - noisy) / (1 - s)


def test_noise_is_mixed_in_a_straight_line():
    clean, noise = torch.ones(3, 1, 2, 2), torch.full((3, 1, 2, 2), -1.0)
    timesteps = torch.tensor([0.0, 250.0, 1000.0])
    noisy = FLOW.add_noise(clean, noise, timesteps)
    assert noisy[:, 0, 0, 0].tolist() == [1.0, 0.5, -1.0]
    velocity = FLOW.target(clean, noise)
    assert velocity.unique().tolist() == [-2.0]
    # one step of Euler along a perfect prediction comes back to the image, from any level
    s = (timesteps / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy - s * velocity, clean)


def test_the_loss_of_a_perfect_model_is_the_variance_that_is_left():
    """Var[eps - x_0 | x_s] = 2 - (2 s - 1)^2 / D = 1 / D, of unit variances."""
    for level in (100.0, 500.0, 900.0):
        rows, s = 200_000, level / 1000
        clean = torch.randn(rows, 1, 1, 1, generator=generator(1)) + MEAN
        noise = torch.randn(rows, 1, 1, 1, generator=generator(2))
        timesteps = torch.full((rows,), level)
        noisy = FLOW.add_noise(clean, noise, timesteps)
        predicted = of_gaussian(noisy, timesteps, MEAN)
        loss = (predicted - FLOW.target(clean, noise)).square().mean().item()
        assert loss == pytest.approx(1 / ((1 - s) ** 2 + s**2), rel=0.02)
        shifted = of_gaussian(noisy, timesteps, MEAN + 1)
        assert (shifted - FLOW.target(clean, noise)).square().mean().item() > loss


def test_differences_of_velocity_are_differences_of_noise_times_one_minus_s():
    noisy = torch.randn(4, 1, 2, 2, generator=generator())
    timesteps = torch.tensor([10.0, 300.0, 600.0, 990.0])
    s = (timesteps / 1000).view(-1, 1, 1, 1)
    one, other = (of_gaussian(noisy, timesteps, mean) for mean in (MEAN, 0.0))
    scale = FLOW.noise_error(timesteps).view(-1, 1, 1, 1)
    by_hand = -s * (1 - s) * MEAN / ((1 - s) ** 2 + s**2)
    torch.testing.assert_close(scale * (one - other), by_hand.expand(4, 1, 2, 2))
    vp = VariancePreserving(torch.linspace(0.99, 0.01, 10), "epsilon")
    assert vp.noise_error(torch.tensor([1, 9])).tolist() == [1.0, 1.0]


def test_weighted_errors_add_up_to_the_divergence_of_gaussians():
    """KL(N(m, 1) || N(0, 1)) = m^2 / 2, from the velocities of both at all levels."""
    flow = RectifiedFlow(4000)
    levels = torch.arange(1, 4001, dtype=torch.float64)
    s = levels / 4000
    difference = -s * (1 - s) * MEAN / ((1 - s) ** 2 + s**2) / (1 - s).clamp(min=1e-9)
    weights = snr_weights(flow.log_snr()).double()
    assert weights[0] == weights[-1] == 0
    scale = flow.noise_error(levels).double()
    total = (weights * (scale * difference) ** 2).sum().item()
    assert total == pytest.approx(MEAN**2 / 2, rel=5e-3)
    assert flow.level(levels).tolist() == list(range(4000))
    assert flow.level(torch.tensor([0.2, 3999.7])).tolist() == [0, 3999]


@pytest.mark.parametrize(("shift", "median"), [(1.0, 500.0), (3.0, 750.0)])
def test_timesteps_of_training_are_logit_normal_and_shifted(shift, median):
    flow = RectifiedFlow(1000, shift)
    drawn = flow.draw(generator(), 20_000)
    assert drawn.median().item() == pytest.approx(median, abs=10)
    levels = drawn / 1000
    unshifted = levels / (shift - (shift - 1) * levels)
    logits = unshifted.double().logit()
    assert logits.mean().item() == pytest.approx(0, abs=0.03)
    assert logits.std().item() == pytest.approx(1, abs=0.03)
    shares = torch.linspace(0, 1, 101)[:-1]
    spread = flow.at(shares)
    assert (spread.diff() > 0).all()
    assert spread.min() > 0
    assert spread.max() <= 1000
    assert flow.at(torch.tensor([0.5])).item() == pytest.approx(median)


def test_whole_timesteps_of_the_variance_preserving_process():
    vp = VariancePreserving(torch.linspace(0.99, 0.01, 1000), "epsilon")
    same = torch.randint(1000, (5,), generator=generator(3))
    assert torch.equal(vp.draw(generator(3), 5), same)
    assert vp.at(torch.tensor([0.0, 0.25, 1.0])).tolist() == [0, 250, 999]
    assert vp.as_trained(torch.tensor(312.6)).item() == 313
    assert FLOW.as_trained(torch.tensor(312.6)).item() == pytest.approx(312.6)


def test_the_process_is_that_of_the_scheduler():
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    sana = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0
    )
    plain = diffusers.DPMSolverMultistepScheduler()
    assert [is_flow(each) for each in (flow, dynamic, sana, plain)] == [True, True, True, False]
    device = torch.device("cpu")
    medians = [
        process_of(each, device).at(torch.tensor([0.5])).item() for each in (flow, dynamic, sana)
    ]
    assert medians == pytest.approx([750.0, 500.0, 1000 * 2 / 3])
    assert isinstance(process_of(plain, device), VariancePreserving)
