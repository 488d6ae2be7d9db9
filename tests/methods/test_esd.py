"""ESD: its target worked out by hand in both forms, its samples, its variants."""

import dataclasses
import itertools

import diffusers
import pytest
import torch
import torch.nn.functional as F
from conftest import run_directory
from torch import nn

from cu_runner.concepts.requests import plan_requests
from cu_runner.methods.esd import ESD, erasing_target
from cu_runner.models.parameters import assign, select_parameters, snapshot
from cu_runner.models.sampling import sample_partly
from cu_runner.runner.training import erase
from cu_runner.schema.settings import Sampler

STEPS = 4  # of the sampler


@pytest.fixture
def scope(make_scope):
    """A scope in which current, start and base weights are three different ones."""
    scope = make_scope()
    draw = torch.Generator().manual_seed(3)
    shift = {
        name: 0.2 * torch.randn(weight.shape, generator=draw) for name, weight in scope.base.items()
    }
    with torch.no_grad():
        for name, parameter in scope.params.items():
            parameter.add_(shift[name])
    for parameter in scope.params.values():
        parameter.requires_grad_(True)
    return dataclasses.replace(
        scope, start={name: weight - shift[name] for name, weight in scope.base.items()}
    )


def late_batch(scope):
    """One that is not pure noise: there a v-model's noise prediction is the noise itself, whatever
    the text.
    """
    return min(stream(scope, 4), key=lambda batch: batch.timesteps[0].item())


def stream(scope, number: int, **options) -> list:
    return [ESD(sampler_steps=STEPS, **options).batch(scope, step) for step in range(number)]


def equal(a, b) -> bool:
    return (
        torch.equal(a.noisy, b.noisy)
        and torch.equal(a.timesteps, b.timesteps)
        and a.prompts == b.prompts
    )


# ------------------------------------------------------------------------------------------- target
def test_target_closed_form():
    empty, concept = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5])
    assert erasing_target(empty, concept, 0.0).tolist() == [1.0, -2.0]
    assert erasing_target(empty, concept, 1.0).tolist() == [-1.0, -4.5]
    assert erasing_target(empty, concept, 2.0).tolist() == [-3.0, -7.0]


@pytest.mark.parametrize("eta", [0.0, 1.0, 2.5])
def test_the_newer_form_is_the_same_target_with_eta_plus_one(eta):
    empty, concept = torch.randn(
        2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    newer = concept - (eta + 1) * (concept - empty)
    torch.testing.assert_close(erasing_target(empty, concept, eta), newer, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("teacher", ["previous", "base"])
def test_loss_closed_form(scope, teacher):
    batch = late_batch(scope)
    loss, logs = ESD(eta=1.5, teacher=teacher).loss(scope, batch)
    model, arguments = scope.model, (batch.noisy, batch.timesteps)
    null, text = model.encode_prompts(["", ""]), model.encode_prompts(batch.prompts)
    with torch.no_grad():
        predicted = model.predict(*arguments, text)
        now = snapshot(scope.params)
        assign(scope.params, {"previous": scope.start, "base": scope.base}[teacher])
        empty, concept = (model.predict(*arguments, embeddings) for embeddings in (null, text))
        assign(scope.params, now)
    assert (empty - concept).abs().max() > 0.01
    torch.testing.assert_close(
        loss.detach(), F.mse_loss(predicted, 2.5 * empty - 1.5 * concept), rtol=1e-4, atol=1e-8
    )
    assert logs == {"unlearn_loss": loss.item(), "timestep": batch.timesteps[0].item()}


def test_the_untrained_model_differs_from_its_target_by_the_guidance(make_scope):
    """With theta = q the loss is (1 + eta)^2 times the mean square of e(c*) - e(null)."""
    scope = make_scope()
    batch = late_batch(scope)
    losses = [ESD(eta=eta).loss(scope, batch)[0].item() for eta in (0.0, 1.0, 2.0)]
    assert losses[0] > 0
    assert losses == pytest.approx([losses[0], 4 * losses[0], 9 * losses[0]], rel=1e-3)


def test_no_gradient_reaches_the_teacher(scope):
    batch = late_batch(scope)
    ESD().loss(scope, batch)[0].backward()
    assert all(parameter.grad.norm() > 0 for parameter in scope.params.values())
    assert not any(weight.requires_grad for weight in (*scope.start.values(), *scope.base.values()))


# ------------------------------------------------------------------------------------------ samples
def test_a_batch_is_a_partly_denoised_sample_of_the_current_weights(scope):
    model = scope.model
    timesteps = set()
    for step, batch in enumerate(stream(scope, 6, prompt="a {caption} image in {concept} style")):
        generator = scope.rng.generator("train", step)
        stop = int(torch.randint(STEPS, (), generator=generator))
        rows = torch.randint(len(scope.sequence.captions), (2,), generator=generator).tolist()
        seeds = torch.randint(2**62, (2,), generator=generator).tolist()
        prompts = [f"a {scope.sequence.captions[row]} image in torch light style" for row in rows]
        assert batch.prompts == prompts
        noisy, timestep = sample_partly(model, prompts, seeds, Sampler(STEPS, 3.0), stop)
        assert torch.equal(batch.noisy, noisy)
        assert batch.timesteps.tolist() == [int(timestep)] * 2
        assert not batch.noisy.requires_grad
        timesteps.add(int(timestep))
    assert len(timesteps) > 2


@pytest.mark.parametrize("teacher", ["previous", "base"])
def test_samples_of_the_teacher_are_those_of_a_model_with_its_weights(scope, teacher):
    other = {name: 1.3 * weight for name, weight in scope.base.items()}
    scope = dataclasses.replace(scope, base=other)  # start, base and current are three
    now = snapshot(scope.params)
    frozen = {name: (scope.start[name].clone(), scope.base[name].clone()) for name in now}
    options = {"teacher": teacher, "prompt": "a {concept} image"}
    taught = stream(scope, 4, trajectories="teacher", **options)
    assert all(torch.equal(weight, now[name]) for name, weight in scope.params.items())
    assert all(weight.requires_grad and weight.grad is None for weight in scope.params.values())
    own = stream(scope, 4, trajectories="current", **options)
    weights = {"previous": scope.start, "base": scope.base}[teacher]
    with torch.no_grad():
        for name, parameter in scope.params.items():
            parameter.copy_(weights[name])
    denoised = 0
    for step, batch in enumerate(taught):
        generator = scope.rng.generator("train", step)
        stop = int(torch.randint(STEPS, (), generator=generator))
        torch.randint(1, (2,), generator=generator)
        seeds = torch.randint(2**62, (2,), generator=generator).tolist()
        prompts = ["a torch light image"] * 2
        noisy, timestep = sample_partly(scope.model, prompts, seeds, Sampler(STEPS, 3.0), stop)
        assert torch.equal(batch.noisy, noisy)
        assert batch.timesteps.tolist() == own[step].timesteps.tolist() == [int(timestep)] * 2
        assert not batch.noisy.requires_grad
        assert torch.equal(batch.noisy, own[step].noisy) == (stop == 0)  # else other weights
        denoised += stop > 0
    assert denoised > 0
    for name, (start, base) in frozen.items():
        assert torch.equal(scope.start[name], start)
        assert torch.equal(scope.base[name], base)


def test_batches_depend_on_weights_seed_request_and_step_alone(make_scope):
    scope = make_scope()
    first = stream(scope, 4)
    torch.manual_seed(123)
    again = stream(make_scope(), 4)
    assert all(equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a.noisy, b.noisy) for a, b in itertools.combinations(first, 2))
    for other in (make_scope(seed=1), make_scope(request=2)):
        assert not torch.equal(stream(other, 1)[0].noisy, first[0].noisy)
    with torch.no_grad():
        for parameter in scope.params.values():
            parameter.mul_(1.5)
    moved = stream(scope, 4)
    # what stops before the first step is noise, whatever the weights
    late = [
        n
        for n, batch in enumerate(first)
        if batch.timesteps[0] < first[0].timesteps.new_tensor(999)
    ]
    assert late
    assert not any(torch.equal(moved[n].noisy, first[n].noisy) for n in late)


def test_the_prompt_is_the_name_and_all_targets_are_drawn(make_scope, sequence):
    scope = make_scope(batch_size=16)
    assert set(stream(scope, 1)[0].prompts) == {"torch light"}
    both = dataclasses.replace(scope, request=plan_requests(sequence, "simultaneous")[1])
    assert set(stream(both, 1)[0].prompts) == {"torch light", "snow drift"}


@pytest.mark.parametrize(
    "prompt", ["", "an image", "{concept} of {artist}", "{concept", "{concept} {}"]
)
def test_a_prompt_that_cannot_be_filled_in_is_refused(prompt):
    with pytest.raises(
        ValueError,
        match=r"^method.prompt: .* (lacks the placeholder|has the unknown placeholder|has a brace)",
    ):
        ESD(prompt=prompt)


# ----------------------------------------------------------------------------------------- variants
@pytest.mark.parametrize(
    ("variant", "group"),
    [
        ("esd-x", "xattn"),
        ("esd-x-strict", "kv_xattn"),
        ("esd-u", "non_xattn_layers"),
        ("esd-all", "layers"),
    ],
)
def test_a_variant_trains_its_group_and_nothing_else(make_scope, settings, model, variant, group):
    method = ESD(variant, sampler_steps=STEPS)
    scope = make_scope(group=method.params)
    assert set(scope.params) == set(select_parameters(model.denoiser, group))
    before = snapshot(dict(model.denoiser.named_parameters()))
    erase(scope, method, {}, settings(steps=2))
    moved = {
        name
        for name, weight in model.denoiser.named_parameters()
        if not torch.equal(weight, before[name])
    }
    assert moved == set(scope.params)
    assert all(weight.grad is None for weight in model.denoiser.parameters())


@pytest.mark.parametrize("kind", ["sd15", "sd21_base", "sdxl", "shapecanvas"])
@pytest.mark.parametrize(("variant", "in_attn2"), [("esd-u", False), ("esd-all", True)])
def test_linear_layers_and_convolutions_are_trained_and_no_norms(
    pipelines, model, kind, variant, in_attn2
):
    """By a walk over the modules, as released."""
    unet = model.denoiser
    if kind != "shapecanvas":
        config = diffusers.UNet2DConditionModel.load_config(pipelines[kind] / "unet")
        with torch.device("meta"):
            unet = diffusers.UNet2DConditionModel.from_config(config)
    wanted, norms = set(), 0
    for name, module in unet.named_modules():
        norms += isinstance(module, nn.GroupNorm | nn.LayerNorm)
        if isinstance(module, nn.Linear | nn.Conv2d) and (in_attn2 or "attn2" not in name):
            wanted |= {f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)}
    found = select_parameters(unet, ESD(variant).params)
    assert set(found) == wanted
    assert norms > 20
    assert any("attn2" in name for name in wanted) == in_attn2
    assert list(found) == [name for name, _ in unet.named_parameters() if name in wanted]


def test_a_later_request_does_not_depend_on_an_earlier_one(make_scope, settings):
    used, fresh = ESD("esd-x-strict", sampler_steps=STEPS), ESD("esd-x-strict", sampler_steps=STEPS)
    scope = make_scope(request=1)
    erase(scope, used, {}, settings())
    results = []
    for method in (used, fresh):
        assign(scope.params, scope.base)
        second = make_scope(request=2)
        erase(second, method, {}, settings())
        results.append(snapshot(second.params))
    assert all(torch.equal(results[0][name], weight) for name, weight in results[1].items())
    assert any(not torch.equal(results[0][name], weight) for name, weight in scope.base.items())


def test_two_requests_with_gradient_projection(in_process, filled_cache, tmp_path):
    status, out, err = in_process(
        "sequence=smoke",
        "method=esd",
        "method.variant=esd-x",
        "reg=gradproj",
        "train.steps=3",
        "train.batch_size=2",
        "method.sampler_steps=2",
        "model.sampler.steps=2",
        "wandb.mode=disabled",
        "num_threads=1",
    )
    assert status == 0, err
    assert (run_directory(out, tmp_path) / "metrics.csv").read_text().count(
        "\n"
    ) == 4  # header, base, two requests


def test_a_variant_that_does_not_exist_is_refused(in_process):
    status, _, err = in_process(
        "sequence=smoke", "method=esd", "method.variant=esd-y", "wandb.mode=disabled"
    )
    assert status != 0
    assert "method.variant='esd-y'" in err
    assert "'esd-x', 'esd-x-strict', 'esd-u' or 'esd-all'" in err
