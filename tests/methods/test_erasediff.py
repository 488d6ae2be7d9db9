"""EraseDiff: the multiplier, the step by hand, inner passes that leave no trace."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from test_baselines import SMALL, diffusion, first_batch, scope  # noqa: F401, scope is a fixture

from cu_runner.methods.erasediff import EraseDiff, EraseDiffBatch, bome_multiplier
from cu_runner.models.parameters import assign, snapshot


def match(scope, batch):  # noqa: F811
    """L_f with the UNet as it is."""
    own, unrelated = batch.texts
    wanted = scope.model.predict(batch.noisy, batch.timesteps, unrelated).detach()
    return F.mse_loss(scope.model.predict(batch.noisy, batch.timesteps, own), wanted)


def gradients(scope):  # noqa: F811
    """What backward left in .grad, which is cleared."""
    found = {name: parameter.grad.clone() for name, parameter in scope.params.items()}
    for parameter in scope.params.values():
        parameter.grad = None
    return found


# --------------------------------------------------------------------------------------- multiplier
@pytest.mark.parametrize(
    ("g_retain", "expected"),
    [
        ([1.0, 7.0], 0.0),
        ([-1.0, 7.0], 1.0),
        ([0.0, 3.0], 0.5),
        ([4.0, 0.0], 0.0),
        ([0.5, 0.0], 0.25),
    ],
)
def test_bome_multiplier_closed_form(g_retain, expected):
    """[0.5 - <g_r, (2, 0)> / 4]_+."""
    assert bome_multiplier(torch.tensor(g_retain), torch.tensor([2.0, 0.0]), 0.5) == pytest.approx(
        expected, abs=1e-12
    )


def test_bome_multiplier_of_a_zero_gradient():
    assert bome_multiplier(torch.ones(3), torch.zeros(3), 0.5) == 0.5


def test_bome_makes_the_constraint_fall_at_the_rate_eta():
    draw = torch.Generator().manual_seed(0)
    active = 0
    for _ in range(50):
        g_retain, g_constraint = torch.randn(2, 8, generator=draw, dtype=torch.float64)
        lam = bome_multiplier(g_retain, g_constraint, 0.3)
        rate = ((g_retain + lam * g_constraint) @ g_constraint / g_constraint.square().sum()).item()
        assert rate == pytest.approx(0.3, abs=1e-9) if lam > 0 else rate >= 0.3
        active += lam > 0
    assert 10 < active < 50


# ----------------------------------------------------------------------------------------- the step
@pytest.mark.parametrize(("multiplier", "expected"), [("fixed", 0.7), ("bome", None)])
def test_gradient_and_logs_by_hand(scope, multiplier, expected):  # noqa: F811
    method = EraseDiff(multiplier, 0.7, 0.5, **SMALL)
    batch = first_batch(method, scope)
    logs = method.backward(scope, batch)
    found = gradients(scope)
    kept, forget = diffusion(scope, batch.outer.retain), match(scope, batch.outer.forget)
    weights = list(scope.params.values())
    g_r, g_f = torch.autograd.grad(kept, weights), torch.autograd.grad(forget, weights)
    if expected is None:
        overlap = sum((a.double() * b.double()).sum() for a, b in zip(g_r, g_f, strict=True))
        expected = max(0.5 - (overlap / sum(b.double().square().sum() for b in g_f)).item(), 0.0)
    assert logs["lam"] == pytest.approx(expected, rel=1e-5)
    for name, a, b in zip(found, g_r, g_f, strict=True):
        torch.testing.assert_close(found[name], a + expected * b, rtol=1e-4, atol=1e-8)
    assert logs["retain_loss"] == pytest.approx(kept.item(), rel=1e-5)
    assert logs["forget_loss"] == pytest.approx(forget.item(), rel=1e-5)
    assert logs["loss"] == pytest.approx(logs["retain_loss"] + logs["lam"] * logs["qhat"], rel=1e-6)


def test_the_gradient_is_added_to_what_is_there(scope):  # noqa: F811
    method = EraseDiff(**SMALL)
    batch = first_batch(method, scope)
    method.backward(scope, batch)
    alone = gradients(scope)
    for parameter in scope.params.values():
        parameter.grad = torch.ones_like(parameter)
    method.backward(scope, batch)
    assert all(torch.equal(found, 1 + alone[name]) for name, found in gradients(scope).items())


# ------------------------------------------------------------------------------------- inner passes
@pytest.mark.parametrize("inner_optimizer", ["adam", "sgd"])
def test_inner_passes_leave_no_trace(scope, inner_optimizer):  # noqa: F811
    """Weights bitwise as they were; no optimiser state from one step to the next; the same gradient
    whatever K.
    """
    before = snapshot(scope.params)
    seen = []
    for num_inner in (0, 2):
        method = EraseDiff(
            num_inner=num_inner, inner_optimizer=inner_optimizer, inner_lr=1e-2, **SMALL
        )
        batch = first_batch(method, scope)
        logs = method.backward(scope, batch)
        seen.append(gradients(scope))
        assert method.backward(scope, batch) == logs
        gradients(scope)
        assert logs["qhat"] == 0 if num_inner == 0 else abs(logs["qhat"]) > 1e-6
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])
    assert all(
        torch.equal(parameter, before[name]) and parameter.requires_grad
        for name, parameter in scope.params.items()
    )


@pytest.mark.parametrize("inner_optimizer", ["adam", "sgd"])
def test_qhat_by_hand(scope, inner_optimizer):  # noqa: F811
    """theta_K made in the UNet itself: plain steps, or Adam's, on each inner batch in turn."""
    method = EraseDiff(num_inner=3, inner_optimizer=inner_optimizer, inner_lr=1e-3, **SMALL)
    batch = first_batch(method, scope)
    logs = method.backward(scope, batch)
    gradients(scope)
    assert len(batch.inner) == 3
    assert not any(
        torch.equal(a.wanted, b.wanted)
        for a, b in itertools.combinations([*batch.inner, batch.outer.forget], 2)
    )
    before, weights = snapshot(scope.params), list(scope.params.values())
    outer = match(scope, batch.outer.forget).item()
    first, second = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    for k, inner in enumerate(batch.inner):
        found = torch.autograd.grad(match(scope, inner), weights)
        with torch.no_grad():
            for i, (weight, gradient) in enumerate(zip(weights, found, strict=True)):
                first[i] = 0.9 * first[i] + 0.1 * gradient
                second[i] = 0.999 * second[i] + 0.001 * gradient**2
                corrected = (second[i] / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8
                adam = first[i] / (1 - 0.9 ** (k + 1)) / corrected
                weight -= 1e-3 * (adam if inner_optimizer == "adam" else gradient)
    reached = match(scope, batch.outer.forget).item()
    assign(scope.params, before)
    assert logs["qhat"] == pytest.approx(outer - reached, rel=2e-3, abs=1e-7)


def test_qhat_is_positive_where_the_passes_lower_the_loss(scope):  # noqa: F811
    method = EraseDiff(inner_optimizer="sgd", inner_lr=1e-2, **SMALL)
    batch = first_batch(method, scope)
    logs = method.backward(scope, EraseDiffBatch([batch.outer.forget] * 3, batch.outer))
    assert 0 < logs["qhat"] < logs["forget_loss"]


# ---------------------------------------------------------------------------------------- the texts
@pytest.mark.parametrize(
    ("unrelated", "expected"), [(None, "a {}"), ("", ""), ("a blue thing", "a blue thing")]
)
def test_the_unrelated_prompt(make_scope, unrelated, expected):
    scope = make_scope(batch_size=8)  # noqa: F811
    batch = first_batch(EraseDiff(unrelated=unrelated, **SMALL), scope).outer.forget
    own = scope.model.encode_prompts(
        [f"a {caption} in the style of torch light" for caption in scope.sequence.captions]
    ).hidden
    other = scope.model.encode_prompts(
        [expected.format(caption) for caption in scope.sequence.captions]
    ).hidden
    for row in range(8):
        assert any(
            torch.equal(batch.texts[0].hidden[row], a)
            and torch.equal(batch.texts[1].hidden[row], b)
            for a, b in zip(own, other, strict=True)
        )
