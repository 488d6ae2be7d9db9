"""Gradient ascent, random labels, SalUn: losses by hand, labels, the mask; what every method of
this kind must do.
"""

import csv
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import SMOKE, run_directory

from cu_runner.concepts.requests import plan_requests
from cu_runner.methods._forgetting import flat_gradient
from cu_runner.methods.erasediff import EraseDiff
from cu_runner.methods.gradient_ascent import GradientAscent
from cu_runner.methods.random_label import RandomLabel
from cu_runner.methods.rgd import RGD
from cu_runner.methods.salun import SalUn, saliency_mask
from cu_runner.models.parameters import assign, snapshot
from cu_runner.request.images import RetainSet
from cu_runner.request.name_sources import NameSource
from cu_runner.runner.training import erase

SMALL = {"num_images": 6, "retain": RetainSet(prompts=8, images=8)}
METHODS = {
    "gradient_ascent": lambda: GradientAscent(retain_weight=0.5, **SMALL),
    "random_label": lambda: RandomLabel(**SMALL),
    "salun": lambda: SalUn(**SMALL),
    "erasediff": lambda: EraseDiff(**SMALL),
    "rgd": lambda: RGD(**SMALL),
}
MORE = {"gradient_ascent": ["method.retain_weight=0.5"]}


@pytest.fixture
def scope(make_scope):
    """A scope whose weights are trained, as erase makes them."""
    scope = make_scope()
    for parameter in scope.params.values():
        parameter.requires_grad_(True)
    return scope


def first_batch(method, scope):
    method.begin_request(scope)
    return method.batch(scope, 0)


def diffusion(scope, batch):
    """The diffusion loss of a batch under its images' own prompts."""
    return (
        (scope.model.predict(batch.noisy, batch.timesteps, batch.texts[0]) - batch.wanted)
        .pow(2)
        .mean()
    )


def recording(scope):
    """A scope that notes the prompts of which images are asked for, and the list."""
    asked: list[list[str]] = []

    def anchors(prompts, number):
        asked.append(prompts)
        return scope.anchors(prompts, number)

    return dataclasses.replace(scope, anchors=anchors), asked


# ------------------------------------------------------------- every method on the concept's images
@pytest.mark.parametrize(
    "name",
    ["gradient_ascent"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name != "gradient_ascent"],
)
def test_runs_from_the_command_with_a_projection(in_process, filled_cache, tmp_path, name):
    small = [
        "method.num_images=4",
        "method.retain.images=4",
        "method.retain.prompts=4",
        *MORE.get(name, []),
    ]
    overrides = [override for override in SMOKE if not override.startswith("method.")]
    chosen = (f"method={name}", "reg=gradproj", "train.steps=2")
    status, out, err = in_process(*overrides, *small, *chosen)
    assert (status, err) == (0, "")
    directory = run_directory(out, tmp_path)
    assert len(list((directory / "steps").glob("*/step.json"))) == 3
    with (directory / "steps/02/training.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2"]
    assert len({row["loss"] for row in rows}) == len({row["retain_loss"] for row in rows}) == 2


@pytest.mark.parametrize("name", METHODS)
def test_a_request_leaves_nothing_for_the_next(make_scope, settings, name):
    method = METHODS[name]()
    first = make_scope(1)
    erase(first, method, {}, settings(steps=2))
    unlearned = snapshot(first.params)
    assert any(not torch.equal(unlearned[key], first.base[key]) for key in unlearned)
    assign(first.params, first.base)
    second = make_scope(2)
    erase(second, method, {}, settings(steps=2))
    after_another = snapshot(second.params)
    assign(second.params, second.base)
    erase(second, METHODS[name](), {}, settings(steps=2))
    assert all(
        torch.equal(parameter, after_another[key]) for key, parameter in second.params.items()
    )
    assert any(not torch.equal(unlearned[key], after_another[key]) for key in unlearned)


@pytest.mark.parametrize("name", METHODS)
def test_a_request_of_two_concepts_trains_on_images_of_both(make_scope, sequence, settings, name):
    request = plan_requests(sequence, "simultaneous")[1]
    scope, asked = recording(dataclasses.replace(make_scope(batch_size=8), request=request))
    report = erase(scope, METHODS[name](), {}, settings(steps=1))
    assert all("torch light" in prompt for prompt in asked[0])
    assert all("snow drift" in prompt for prompt in asked[1])
    assert not any(
        target in prompt for prompt in asked[2] for target in ("torch light", "snow drift")
    )
    assert len(report.logs) == 1


@pytest.mark.parametrize("name", METHODS)
def test_every_weight_of_the_unet_gets_a_gradient(make_scope, name):
    scope = make_scope(group="full")
    for parameter in scope.params.values():
        parameter.requires_grad_(True)
    method = METHODS[name]()
    before = snapshot(scope.params)
    method.backward(scope, first_batch(method, scope))
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all()
        for parameter in scope.params.values()
    )
    assert sum(parameter.grad.norm() > 0 for parameter in scope.params.values()) > 0.9 * len(
        scope.params
    )
    assert all(torch.equal(parameter, before[key]) for key, parameter in scope.params.items())


# ---------------------------------------------------------------------------------- gradient ascent
def test_gradient_ascent_is_minus_the_diffusion_loss_and_makes_no_retained_images(scope):
    scope, asked = recording(scope)
    method = GradientAscent(num_images=6)
    batch = first_batch(method, scope)
    loss, logs = method.loss(scope, batch)
    assert batch.retain is None
    assert asked == [
        [target for target, _ in scope.sequence.training_pairs(scope.request.targets[0])]
    ]
    assert loss.item() == pytest.approx(-diffusion(scope, batch.forget).item(), rel=1e-6)
    assert logs == {"forget_loss": loss.item()}


@pytest.mark.parametrize("name", ["gradient_ascent", "random_label"])
def test_the_retain_term_is_a_weighted_diffusion_loss(scope, name):
    kind = {"gradient_ascent": GradientAscent, "random_label": RandomLabel}[name]
    method = kind(retain_weight=0.75, **SMALL)
    batch = first_batch(method, scope)
    loss, logs = method.loss(scope, batch)
    kept = diffusion(scope, batch.retain).item()
    assert logs["retain_loss"] == pytest.approx(kept, rel=1e-6)
    assert loss.item() == pytest.approx(logs["forget_loss"] + 0.75 * kept, rel=1e-5)


def test_a_step_of_gradient_ascent_raises_the_diffusion_loss(scope):
    method = GradientAscent(num_images=6)
    batch = first_batch(method, scope)
    before = diffusion(scope, batch.forget).item()
    method.backward(scope, batch)
    with torch.no_grad():
        for parameter in scope.params.values():
            parameter -= 0.05 * parameter.grad
        assert diffusion(scope, batch.forget).item() > before


# ------------------------------------------------------------------------------------- random label
def test_labels_are_other_names_in_the_images_own_prompt(make_scope):
    scope = make_scope()
    method = RandomLabel(num_images=60)
    (labels,) = method._labels(scope)
    captions = scope.sequence.captions
    for i, label in enumerate(labels):
        start = f"a {captions[i % len(captions)]} in the style of "
        assert label.startswith(start)
        name = label.removeprefix(start)
        assert name in scope.sequence.vocabulary
        assert name not in ("torch light", "lava flow", "fog bank")  # the target, the retained
    assert len(set(labels)) > 30
    assert method._labels(make_scope()) == [labels]
    assert method._labels(make_scope(seed=1)) != [labels]


def test_labels_are_prompts_of_the_retain_set_when_asked_for(make_scope):
    scope = make_scope()
    retain = RetainSet(source="anchors")
    (labels,) = RandomLabel(label="prompt", num_images=60, retain=retain)._labels(scope)
    assert set(labels) == set(retain.read(scope))


def test_no_other_name_is_an_error(make_scope):
    scope = make_scope()
    alone = dataclasses.replace(
        scope, sequence=dataclasses.replace(scope.sequence, vocabulary=("torch light",))
    )
    with pytest.raises(
        ValueError, match=r"^method.label=name: no name is left .*; use label=prompt$"
    ):
        RandomLabel(**SMALL).begin_request(alone)


def test_random_label_loss_closed_form_and_no_gradient_reaches_the_label(scope):
    method = RandomLabel(retain_weight=0.0, num_images=6)
    batch = first_batch(method, scope)
    assert batch.retain is None
    own, label = batch.forget.texts
    arguments = (batch.forget.noisy, batch.forget.timesteps)
    target = scope.model.predict(*arguments, label).detach()
    predicted = scope.model.predict(*arguments, own)
    loss, _ = method.loss(scope, batch)
    assert loss.item() == pytest.approx((predicted - target).pow(2).mean().item(), rel=1e-5)
    expected = flat_gradient(F.mse_loss(predicted, target), scope.params)
    torch.testing.assert_close(flat_gradient(loss, scope.params), expected, rtol=1e-4, atol=1e-9)


def test_an_image_keeps_its_own_prompt_and_its_label(make_scope):
    """Rows of one image carry one pair of texts in every batch; the number of names in use is
    bounded by names.number.
    """
    scope = make_scope(batch_size=16)
    retain = RetainSet(names=NameSource(number=3))
    method = RandomLabel(retain_weight=0.0, num_images=6, retain=retain)
    batch = first_batch(method, scope)
    own = scope.model.encode_prompts(
        [target for target, _ in scope.sequence.training_pairs(scope.request.targets[0])]
    ).hidden
    (labels,) = method._labels(scope)
    encoded = scope.model.encode_prompts(labels).hidden
    pairs = [(own[i % 4], encoded[i]) for i in range(6)]
    for row in range(16):
        assert any(
            torch.equal(batch.forget.texts[0].hidden[row], a)
            and torch.equal(batch.forget.texts[1].hidden[row], b)
            for a, b in pairs
        )
    assert len({label.split(" in ")[1] for label in labels}) <= 3


# -------------------------------------------------------------------------------------------- SalUn
def test_saliency_mask_is_exact():
    scores = torch.tensor([0.1, -5.0, 3.0, 0.0, -0.2, 1.0, 2.0])
    assert saliency_mask(scores, 0.5).tolist() == [
        False,
        True,
        True,
        False,
        False,
        False,
        True,
    ]  # floor(3.5) = 3
    assert saliency_mask(scores, 1.0).all()
    assert saliency_mask(torch.zeros(10), 0.3).sum() == 3  # ties
    assert not saliency_mask(scores, 0.1).any()


def test_the_mask_is_that_of_the_forget_loss_over_all_weights_together(scope):
    method = SalUn(fraction=0.1, **SMALL)
    method.begin_request(scope)
    scores = 0.0
    for step in range(3):  # 6 images, batch 2
        batch = method._forget.draw(scope.rng.generator("saliency", step), 2)
        scores = scores + flat_gradient(diffusion(scope, batch), scope.params)
    kept, rest = scores[method._mask].abs(), scores[~method._mask].abs()
    assert method._mask.sum() == len(scores) // 10
    assert kept.min() >= rest.max()
    assert method.end_request(scope) == {"trained_weights": len(scores) // 10, "of": len(scores)}


def test_weights_outside_the_mask_do_not_move_by_a_bit(make_scope, settings):
    """Momentum, weight decay and a gradient that the mask does not know of would all move them."""
    scope = make_scope()
    method = SalUn(fraction=0.25, **SMALL)
    erase(scope, method, {}, settings(steps=4, weight_decay=0.1))
    now = torch.cat([parameter.flatten() for parameter in scope.params.values()])
    base = torch.cat([weight.flatten() for weight in scope.base.values()])
    assert torch.equal(now[~method._mask], base[~method._mask])
    assert (now[method._mask] != base[method._mask]).double().mean() > 0.99
    for parameter in scope.params.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(scope.params.values(), lr=1e-2, weight_decay=0.1)
    method.update(scope, optimizer)
    again = torch.cat([parameter.flatten() for parameter in scope.params.values()])
    assert torch.equal(again[~method._mask], base[~method._mask])
    assert (again[method._mask] != now[method._mask]).all()


def test_a_full_mask_is_random_label(make_scope, settings):
    found = []
    for method in (SalUn(fraction=1.0, **SMALL), RandomLabel(**SMALL)):
        scope = make_scope()
        erase(scope, method, {}, settings())
        found.append(snapshot(scope.params))
        assign(scope.params, scope.base)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
