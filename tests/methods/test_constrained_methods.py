"""Constrained unlearning on the embedded model: losses worked out from predict, samples,
duals through a request, runs.
"""

import dataclasses
import json

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import SMOKE, run_directory

from cu_runner.concepts.requests import plan_requests
from cu_runner.methods._primal_dual import DualAscent
from cu_runner.methods.forward_kl import ForwardKL
from cu_runner.methods.likelihood import Likelihood, density_ratio
from cu_runner.methods.reverse_kl import ReverseKL
from cu_runner.models.parameters import assign, snapshot
from cu_runner.models.sampling import sample_latents, sample_partly
from cu_runner.request.images import RetainSet
from cu_runner.runner.training import erase
from cu_runner.schema.settings import Sampler

RETAIN = RetainSet(source="anchors", prompts=4, images=4)
FEW = DualAscent(step_size=0.2, every=1, decay=0.5, rounds=1)
MAKE = {
    "reverse_kl": lambda **more: ReverseKL(
        **{"sampling_steps": 3, "retain": RETAIN, "dual": FEW} | more
    ),
    "forward_kl": lambda **more: ForwardKL(
        **{"num_images": 6, "num_fresh": 3, "retain": RETAIN, "dual": FEW} | more
    ),
    "likelihood": lambda **more: Likelihood(
        **{"sampling_steps": 2, "draws": 2, "temperature": 0.01, "retain": RETAIN, "dual": FEW}
        | more
    ),
}
EACH = pytest.mark.parametrize("name", MAKE)


@pytest.fixture
def scope(make_scope):
    """A scope whose weights differ from those at the start, and these from the base's."""
    scope = make_scope(batch_size=4)
    return shift(scope, start=0.05, now=0.1)


def shift(scope, start: float, now: float):
    """Start and current weights moved off the base; gradients on."""
    draw = torch.Generator().manual_seed(3)
    moved = {name: torch.randn(weight.shape, generator=draw) for name, weight in scope.base.items()}
    assign(scope.params, scope.base, {name: now * change for name, change in moved.items()})
    for parameter in scope.params.values():
        parameter.requires_grad_(True)
    return dataclasses.replace(
        scope, start={name: scope.base[name] + start * change for name, change in moved.items()}
    )


def both_targets(scope):
    """The same scope with a request of two concepts."""
    return dataclasses.replace(scope, request=plan_requests(scope.sequence, "simultaneous")[1])


def begin(method, scope):
    """begin_request as training calls it, at the start weights; then the current ones again."""
    now = snapshot(scope.params)
    assign(scope.params, scope.start)
    method.begin_request(scope)
    assign(scope.params, now)
    return method


def prompts_of(scope, concept: int, captions: list[int], kind: int) -> torch.Tensor:
    pairs = scope.sequence.training_pairs(scope.request.targets[concept])
    return scope.model.encode_prompts([pairs[caption][kind] for caption in captions])


def gradients(scope) -> list[torch.Tensor]:
    found = [parameter.grad.clone() for parameter in scope.params.values()]
    for parameter in scope.params.values():
        parameter.grad = None
    return found


def retained(scope, batch, weights) -> torch.Tensor:
    arguments = (batch.noisy, batch.timesteps, batch.texts[0])
    wanted = batch.wanted if weights is None else scope.model.predict(*arguments, weights)
    return F.mse_loss(scope.model.predict(*arguments), wanted)


# --------------------------------------------------------------------------------------- reverse KL
@pytest.mark.parametrize(
    ("teacher", "reference", "kind"),
    [("previous", "empty", "teacher"), ("base", "anchor", "diffusion")],
)
def test_reverse_kl_loss(scope, teacher, reference, kind):
    method = begin(
        MAKE["reverse_kl"](
            teacher=teacher, reference=reference, retain_loss=kind, retain_weight=0.5
        ),
        scope,
    )
    method.duals.lam = torch.tensor(
        [0.5], dtype=torch.float64
    )  # alpha = 1: ESD's target with eta = 1
    batch = method.batch(scope, 0)
    loss, logs = method.loss(scope, batch)
    weights = {"previous": scope.start, "base": scope.base}[teacher]
    own = prompts_of(scope, 0, batch.captions, 0)
    empty = scope.model.encode_prompts([""] * 4)
    with torch.no_grad():
        arguments = (batch.noisy, batch.timesteps)
        q = scope.model.predict(
            *arguments,
            empty if reference == "empty" else prompts_of(scope, 0, batch.captions, 1),
            weights,
        )
        concept = scope.model.predict(*arguments, own, weights)
        predicted = scope.model.predict(*arguments, own)
        kept = retained(scope, batch.retain, weights if kind == "teacher" else None)
    esd = F.mse_loss(predicted, q - (concept - q))
    assert logs["unlearn_loss"] == pytest.approx(esd.item(), rel=1e-5)
    assert loss.item() == pytest.approx(esd.item() + 0.5 * kept.item(), rel=1e-5)
    assert logs["constraint"] == pytest.approx((predicted - concept).pow(2).mean().item(), rel=1e-4)
    assert logs["lambda"] == 0.5


def test_reverse_kl_bound_is_a_multiple_of_the_divergence_at_the_start(scope):
    """b from ||e_q - e_{q,c}||^2 on samples of q, every noise level once."""
    for teacher, weights in (("previous", scope.start), ("base", scope.base)):
        method = begin(
            MAKE["reverse_kl"](teacher=teacher, reference="empty", bound=1.5, guidance=2.0), scope
        )
        now, expected = snapshot(scope.params), []
        assign(scope.params, weights)
        for n in range(3):
            generator = scope.rng.generator("initial 0", n)
            captions = torch.randint(4, (4,), generator=generator).tolist()
            seeds = torch.randint(2**31, (4,), generator=generator).tolist()
            noisy, timestep = sample_partly(scope.model, [""] * 4, seeds, Sampler(3, 2.0), n)
            texts = (scope.model.encode_prompts([""] * 4), prompts_of(scope, 0, captions, 0))
            with torch.no_grad():
                null, concept = (
                    scope.model.predict(noisy, timestep.expand(4), text) for text in texts
                )
            expected.append((null - concept).pow(2).mean().item())
        assign(scope.params, now)
        assert method.duals.initial.item() == pytest.approx(sum(expected) / 3, rel=1e-4)
        assert method.duals.bound.item() == pytest.approx(1.5 * sum(expected) / 3, rel=1e-4)


def test_reverse_kl_in_nats_weighs_noise_levels(scope):
    method = begin(MAKE["reverse_kl"](weighting="snr"), scope)
    batches = [method.batch(scope, step) for step in range(3)]
    alphas = scope.model.process.alphas_cumprod.double()
    for batch in batches:
        t = batch.timesteps[0].item()
        weight = (
            (alphas[t - 1].logit() - alphas[t].logit()) / 2 if alphas[t] > 0 else torch.tensor(0.0)
        )
        own = prompts_of(scope, 0, batch.captions, 0)
        with torch.no_grad():
            arguments = (batch.noisy, batch.timesteps, own)
            error = (
                scope.model.predict(*arguments) - scope.model.predict(*arguments, scope.start)
            ).pow(2)
        nats = 1000 * weight.item() * error.sum().item() / 4
        assert method.loss(scope, batch)[1]["constraint"] == pytest.approx(nats, rel=2e-2)


def test_reverse_kl_samples_are_the_models_own_and_visit_every_level(scope):
    method = begin(MAKE["reverse_kl"](), scope)
    batches = [method.batch(scope, step) for step in range(6)]
    levels = [batch.timesteps.unique().item() for batch in batches]
    assert sorted(levels[:3]) == sorted(levels[3:])
    assert len(set(levels)) == 3
    again = method.batch(scope, 0)
    assert torch.equal(again.noisy, batches[0].noisy)
    assign(scope.params, scope.base)
    moved = [method.batch(scope, step) for step in range(3)]
    assert [batch.timesteps[0].item() for batch in moved] == levels[:3]
    same = [torch.equal(a.noisy, b.noisy) for a, b in zip(moved, batches[:3], strict=True)]
    assert same == [
        level == max(levels) for level in levels[:3]
    ]  # pure noise is the same for all weights


# --------------------------------------------------------------------------------------- forward KL
def forget_terms(scope, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Diffusion losses [B] on the forget rows, of the current weights and of those at the start."""
    forget = batch.forget
    arguments = (forget.noisy, forget.timesteps, forget.texts[0])
    return tuple(
        (scope.model.predict(*arguments, weights) - forget.wanted).pow(2).flatten(1).mean(1)
        for weights in (None, scope.start)
    )


def test_forward_kl_loss_is_the_weighted_diffusion_loss_of_all_data(scope):
    method = begin(MAKE["forward_kl"](), scope)
    batch = method.batch(scope, 0)
    with torch.no_grad():
        (now, before), kept = forget_terms(scope, batch), retained(scope, batch.retain, None)
    for lam in (0.0, 0.25, 0.6):  # n = 6 of N = 10
        method.duals.lam = torch.tensor([lam], dtype=torch.float64)
        loss, logs = method.loss(scope, batch)
        assert loss.item() == pytest.approx(
            0.4 * kept.item() + (0.6 - lam) * now.mean().item(), rel=1e-5
        )
        assert logs["constraint"] == pytest.approx(
            (now.mean() / before.mean() - 1).item(), abs=1e-5
        )


def test_forward_kl_at_its_cap_trains_on_the_kept_data_alone(scope):
    method = begin(MAKE["forward_kl"](), scope)
    batch = method.batch(scope, 0)
    method.duals.lam = method.duals.limit(torch.tensor([9.0], dtype=torch.float64))
    assert method.duals.lam.item() == pytest.approx(0.6)
    method.backward(scope, batch)
    found = gradients(scope)
    (0.4 * retained(scope, batch.retain, None)).backward()
    for gradient, expected in zip(found, gradients(scope), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-7)


def test_forward_kl_ascends_beyond_its_cap_with_a_short_gradient_until_the_stop(scope):
    method = begin(MAKE["forward_kl"](cap=3.0, ascent_stop=1.0, ascent_ratio=0.1), scope)
    batch = method.batch(scope, 0)
    method.duals.lam = torch.tensor([1.8], dtype=torch.float64)  # v = 1/10 - 1.8/6 = -0.2
    logs = method.backward(scope, batch)
    found = torch.cat([gradient.flatten() for gradient in gradients(scope)])
    with torch.no_grad():
        now, _ = forget_terms(scope, batch)
    assert logs["loss"] == pytest.approx(
        0.4 * logs["retain_loss"] - 1.2 * now.mean().item(), rel=1e-4
    )
    (0.4 * retained(scope, batch.retain, None)).backward()
    descent = torch.cat([gradient.flatten() for gradient in gradients(scope)])
    assert ((found - descent).norm() / descent.norm()).item() == pytest.approx(0.1, rel=1e-3)
    (-1.2 * forget_terms(scope, batch)[0].mean()).backward()
    ascent = torch.cat([gradient.flatten() for gradient in gradients(scope)])
    assert F.cosine_similarity(found - descent, ascent, dim=0).item() == pytest.approx(1, abs=1e-4)
    method.duals.mean = torch.tensor(
        [9.0], dtype=torch.float64
    )  # the loss has grown beyond the stop
    method.backward(scope, batch)
    stopped = torch.cat([gradient.flatten() for gradient in gradients(scope)])
    torch.testing.assert_close(stopped, descent, rtol=1e-3, atol=1e-7)


def test_forward_kl_ends_on_images_that_were_not_trained_on(scope):
    scope = dataclasses.replace(scope, rng=scope.rng)
    method = begin(MAKE["forward_kl"](), scope)
    everything = scope.anchors([], 9)
    assert torch.equal(method._groups[0].latents[0], everything[:6])
    assert torch.equal(method._fresh[0], everything[6:])
    generator = scope.rng.generator("final 0", 0)
    timesteps = torch.randint(1000, (3,), generator=generator)
    noise = torch.randn((3, *scope.model.latent_shape), generator=generator)
    noisy, texts = (
        scope.model.add_noise(everything[6:], noise, timesteps),
        prompts_of(scope, 0, [2, 3, 0], 0),
    )
    with torch.no_grad():
        now, before = (
            F.mse_loss(scope.model.predict(noisy, timesteps, texts, w), noise)
            for w in (None, scope.start)
        )
        assert method.final_constraint(scope).item() == pytest.approx(
            (now / before - 1).item(), abs=1e-5
        )


# --------------------------------------------------------------------------------------- likelihood
@pytest.mark.parametrize(("teacher", "reference"), [("previous", "empty"), ("base", "anchor")])
def test_likelihood_loss(scope, teacher, reference):
    method = begin(
        MAKE["likelihood"](teacher=teacher, reference=reference, retain_weight=0.0, clip=1.02),
        scope,
    )
    method.duals.lam = torch.tensor([0.4], dtype=torch.float64)
    batch = method.batch(scope, 0)
    assert batch.retain is None
    loss, logs = method.loss(scope, batch)
    weights = {"previous": scope.start, "base": scope.base}[teacher]
    captions = [caption for caption in batch.captions for _ in range(2)]
    own, empty = prompts_of(scope, 0, captions, 0), scope.model.encode_prompts([""] * 4)
    with torch.no_grad():
        arguments = (batch.noisy, batch.timesteps)
        null, concept = (scope.model.predict(*arguments, text, weights) for text in (empty, own))
        anchor = scope.model.predict(*arguments, prompts_of(scope, 0, captions, 1), weights)
        errors = [(batch.wanted - e).pow(2).sum((1, 2, 3)).view(2, 2) for e in (null, concept)]
        ratio = density_ratio(*errors, 0.01, 1.02)
        q = null if reference == "empty" else anchor
        target = q - 0.4 * ratio.repeat_interleave(2).view(4, 1, 1, 1) * (concept - null)
        expected = F.mse_loss(scope.model.predict(*arguments, own), target)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert logs["constraint"] == pytest.approx(ratio.mean().item(), rel=1e-4)
    assert logs["push"] == pytest.approx(0.4 * ratio.max().item(), rel=1e-4)


def test_likelihood_trains_on_the_models_own_images_at_several_levels(scope):
    method = begin(MAKE["likelihood"](), scope)
    batch = method.batch(scope, 0)
    generator = scope.rng.generator("train", 0)
    torch.randperm(1, generator=generator)
    captions = torch.randint(4, (2,), generator=generator).tolist()
    seeds = torch.randint(2**31, (2,), generator=generator).tolist()
    prompts = [
        scope.sequence.training_pairs(scope.request.targets[0])[caption][0] for caption in captions
    ]
    clean = sample_latents(scope.model, prompts, seeds, Sampler(2, 1.0))
    torch.testing.assert_close(
        batch.noisy, scope.model.add_noise(clean[[0, 0, 1, 1]], batch.wanted, batch.timesteps)
    )
    assert [t // 500 for t in batch.timesteps.tolist()] == [0, 1, 0, 1]


def test_likelihood_says_when_the_target_is_no_longer_accurate(scope):
    method = begin(MAKE["likelihood"](bound=0.01, cap=3.0), scope)
    method.duals.lam = torch.tensor([3.0], dtype=torch.float64)
    method.backward(scope, method.batch(scope, 0))
    method.update(scope, torch.optim.SGD(scope.params.values(), lr=0.0))
    record = method.end_request(scope)
    assert record["largest_push"] > 1
    assert record["note"].startswith("infeasible: lambda is stuck at its cap")
    assert "; lambda r reached" in record["note"]


# ---------------------------------------------------------------------------------------- all three
@EACH
def test_scoring_with_backward_does_not_move_the_duals(scope, name):
    method = begin(MAKE[name](), scope)
    batch = method.batch(scope, 0)
    first_logs, first = method.backward(scope, batch), gradients(scope)
    second_logs, second = method.backward(scope, batch), gradients(scope)
    assert first_logs == second_logs
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert method.duals.lam.item() == 0
    method.update(scope, torch.optim.SGD(scope.params.values(), lr=0.0))
    violation = method.duals.violation(
        torch.tensor([first_logs["constraint"]], dtype=torch.float64)
    ).item()
    expected = method.duals.limit(
        torch.tensor([max(0.0, 0.2 * violation)], dtype=torch.float64)
    ).item()
    assert method.duals.lam.item() == pytest.approx(expected)


@EACH
def test_a_request_of_several_concepts_has_a_multiplier_for_each(scope, settings, name):
    scope = both_targets(scope)
    report = erase(scope, MAKE[name](), {}, settings(steps=2))
    constraints = report.method["constraints"]
    assert list(constraints) == ["torch light", "snow drift"]
    assert constraints["torch light"]["final"] != constraints["snow drift"]["final"]
    assert report.method["status"] in ("feasible", "infeasible", "unfinished")
    assert {"loss", "lambda", "constraint", "constraint_mean", "retain_loss"} <= set(report.logs[0])
    assert all(
        parameter.isfinite().all() and not parameter.requires_grad
        for parameter in scope.params.values()
    )


@EACH
def test_more_concepts_than_rows(scope, name):
    one = dataclasses.replace(scope.train, batch_size=1)
    scope = dataclasses.replace(both_targets(scope), train=one)
    method = begin(MAKE[name](), scope)
    method.backward(scope, method.batch(scope, 0))
    assert method.duals.measured.isnan().tolist() in ([True, False], [False, True])
    assert all(gradient.isfinite().all() for gradient in gradients(scope))


def train_requests(make_scope, settings, method, requests: list[int]) -> dict[str, torch.Tensor]:
    """The weights after some requests, each from the base's."""
    for request in requests:
        scope = make_scope(request=request)
        assign(scope.params, weights := scope.base)
        erase(scope, method, {}, settings(steps=3))
        after = snapshot(scope.params)
        assign(scope.params, weights)
    return after


@EACH
def test_a_request_does_not_depend_on_the_one_before(make_scope, settings, name):
    alone = train_requests(make_scope, settings, MAKE[name](), [2])
    later = train_requests(make_scope, settings, MAKE[name](), [1, 2])
    assert all(torch.equal(alone[key], later[key]) for key in alone)


@EACH
def test_a_constraint_out_of_reach_is_infeasible(scope, settings, name):
    hopeless = {
        "reverse_kl": {"bound": 1e3, "cap": 0.1},
        "forward_kl": {"bound": 1e3},
        "likelihood": {"bound": 1e-6, "cap": 0.01},
    }
    report = erase(
        scope,
        MAKE[name](**hopeless[name], dual=DualAscent(50.0, 1, 0.5, 1)),
        {},
        settings(steps=2, lr=1e-6),
    )
    assert report.method["status"] == "infeasible"
    assert report.method["note"].startswith(
        "infeasible: lambda is stuck at its cap and the constraint on torch light"
    )


SMALL = {
    "reverse_kl": ("method.sampling_steps=2", "method.dual.rounds=1"),
    "forward_kl": ("method.num_images=4", "method.num_fresh=2", "method.dual.rounds=1"),
    "likelihood": ("method.sampling_steps=2", "method.draws=2", "method.dual.rounds=1"),
}


@pytest.mark.slow
@EACH
def test_two_requests_by_the_command(in_process, filled_cache, tmp_path, name):
    small = (*(option for option in SMOKE if not option.startswith("method.")), *SMALL[name])
    status, out, err = in_process(
        *small,
        "method.retain.images=4",
        "method.retain.prompts=4",
        f"method={name}",
        "reg=gradproj",
        "train.steps=2",
    )
    assert status == 0, err
    directory = run_directory(out, tmp_path)
    for index in (1, 2):
        step = directory / f"steps/{index:02}"
        record = json.loads((step / "step.json").read_text())["training"]["method"]
        assert record["status"] in ("feasible", "infeasible", "unfinished")
        assert ("note" in record) == (record["status"] != "feasible")
        logs = pd.read_csv(step / "training.csv")
        assert len(logs) == 2
        assert logs[["lambda", "constraint", "constraint_mean"]].notna().all(axis=None)
        assert json.loads((step / "step.json").read_text())["row"]["drift_l2"] > 0
