"""Concept ablation: its loss worked out from predict_noise, its teachers, its batches."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from cu_runner.methods.conabl import ConAbl

NUM_ANCHORS = 6


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
    start = {name: weight - shift[name] for name, weight in scope.base.items()}
    return dataclasses.replace(scope, start=start)


def first_batch(method: ConAbl, scope):
    method.begin_request(scope)
    return method.batch(scope, 0)


@torch.no_grad()
def by_hand(scope, batch, wanted: str) -> torch.Tensor:
    """mean ||e(x_t, c*) - target||^2, the teacher's weights put into the UNet itself."""
    arguments = (batch.noisy, batch.timesteps)
    predicted = scope.model.predict_noise(*arguments, batch.texts[1])
    if wanted == "noise":
        return (predicted - batch.noise).pow(2).mean()
    weights = {"current": dict(scope.params), "previous": scope.start, "base": scope.base}[wanted]
    now = {name: parameter.clone() for name, parameter in scope.params.items()}
    for name, parameter in scope.params.items():
        parameter.copy_(weights[name])
    target = scope.model.predict_noise(*arguments, batch.texts[0])
    for name, parameter in scope.params.items():
        parameter.copy_(now[name])
    return (predicted - target).pow(2).mean()


# --------------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize("teacher", ["current", "previous", "base"])
def test_model_loss_closed_form(scope, teacher):
    method = ConAbl(teacher=teacher, num_anchors=NUM_ANCHORS)
    batch = first_batch(method, scope)
    loss, logs = method.loss(scope, batch)
    torch.testing.assert_close(loss.detach(), by_hand(scope, batch, teacher), rtol=1e-5, atol=1e-8)
    assert logs == {"unlearn_loss": loss.item()}


def test_the_teachers_differ(scope):
    batch = first_batch(ConAbl(num_anchors=NUM_ANCHORS), scope)
    losses = [
        by_hand(scope, batch, teacher).item()
        for teacher in ("current", "previous", "base", "noise")
    ]
    assert len({round(loss, 7) for loss in losses}) == 4


def test_noise_loss_closed_form(scope):
    method = ConAbl("noise", num_anchors=NUM_ANCHORS)
    batch = first_batch(method, scope)
    loss, _ = method.loss(scope, batch)
    torch.testing.assert_close(loss.detach(), by_hand(scope, batch, "noise"), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("loss", ["model", "noise"])
def test_preservation_adds_the_diffusion_loss_of_the_anchor(scope, loss):
    plain = ConAbl(loss, num_anchors=NUM_ANCHORS)
    keeping = ConAbl(loss, num_anchors=NUM_ANCHORS, preservation=0.75)
    batch = first_batch(plain, scope)
    total, logs = keeping.loss(scope, batch)
    with torch.no_grad():
        kept = F.mse_loss(
            scope.model.predict_noise(batch.noisy, batch.timesteps, batch.texts[0]), batch.noise
        )
    assert total.item() == pytest.approx(
        plain.loss(scope, batch)[0].item() + 0.75 * kept.item(), rel=1e-5
    )
    assert logs["preservation_loss"] == pytest.approx(kept.item(), rel=1e-5)
    assert total.item() == pytest.approx(
        logs["unlearn_loss"] + 0.75 * logs["preservation_loss"], rel=1e-5
    )


def test_no_gradient_reaches_the_teacher(scope):
    """With a current teacher: the gradient of mse(e(c*), constant), not of mse(e(c*), e(c))."""
    method = ConAbl(num_anchors=NUM_ANCHORS)
    batch = first_batch(method, scope)
    params = list(scope.params.values())
    found = torch.autograd.grad(method.loss(scope, batch)[0], params)
    arguments = (batch.noisy, batch.timesteps)
    target = scope.model.predict_noise(*arguments, batch.texts[0])
    predicted = scope.model.predict_noise(*arguments, batch.texts[1])
    stopped = torch.autograd.grad(F.mse_loss(predicted, target.detach()), params, retain_graph=True)
    flowing = torch.autograd.grad(F.mse_loss(predicted, target), params)
    for gradient, expected in zip(found, stopped, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-9)
    assert any((a - b).norm() > 0.1 * b.norm() for a, b in zip(stopped, flowing, strict=True))


@pytest.mark.parametrize("teacher", ["previous", "base"])
def test_a_frozen_teacher_leaves_weights_and_gradients_alone(scope, teacher):
    method = ConAbl(teacher=teacher, num_anchors=NUM_ANCHORS)
    batch = first_batch(method, scope)
    before = {name: parameter.detach().clone() for name, parameter in scope.params.items()}
    frozen = {
        name: weight.clone()
        for name, weight in getattr(scope, {"previous": "start", "base": "base"}[teacher]).items()
    }
    method.loss(scope, batch)[0].backward()
    assert all(torch.equal(parameter, before[name]) for name, parameter in scope.params.items())
    assert all(parameter.grad.norm() > 0 for parameter in scope.params.values())
    now = getattr(scope, {"previous": "start", "base": "base"}[teacher])
    assert all(
        torch.equal(now[name], weight) and not weight.requires_grad
        for name, weight in frozen.items()
    )


# ------------------------------------------------------------------------------------------ batches
def stream(scope, number: int, **options) -> list:
    method = ConAbl(num_anchors=NUM_ANCHORS, **options)
    method.begin_request(scope)
    return [method.batch(scope, step) for step in range(number)]


def equal(a, b) -> bool:
    tensors = [
        (one.noisy, one.noise, one.timesteps, *(text.hidden for text in one.texts))
        for one in (a, b)
    ]
    return all(torch.equal(x, y) for x, y in zip(*tensors, strict=True))


def test_batches_depend_on_seed_request_and_step_alone(make_scope):
    first, again = stream(make_scope(), 3), stream(make_scope(), 3)
    assert all(equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a.noise, b.noise) for a, b in itertools.combinations(first, 2))
    for other in (make_scope(seed=1), make_scope(request=2)):
        assert not torch.equal(stream(other, 1)[0].noise, first[0].noise)
    torch.manual_seed(123)
    assert equal(stream(make_scope(), 1)[0], first[0])


def test_a_batch_is_an_anchor_image_under_noise_with_both_prompts_of_its_caption(make_scope):
    scope = make_scope(batch_size=8)
    model, sequence = scope.model, scope.sequence
    latents = scope.anchors([], NUM_ANCHORS)
    pairs = sequence.training_pairs(scope.request.targets[0])
    assert pairs[0] == ("a tree image in ember stripe style", "a tree image")
    (batch,) = stream(scope, 1)
    assert batch.noisy.shape == batch.noise.shape == (8, 4, 16, 16)
    assert batch.timesteps.shape == (8,)
    ab = model.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    clean = (batch.noisy - (1 - ab).sqrt() * batch.noise) / ab.sqrt()
    seen = set()
    for row in range(8):
        image = (clean[row] - latents).flatten(1).norm(dim=1).argmin().item()
        torch.testing.assert_close(
            batch.noisy[row],
            ab[row].sqrt() * latents[image] + (1 - ab[row]).sqrt() * batch.noise[row],
        )
        target, anchor = pairs[image % len(pairs)]
        assert torch.equal(batch.texts[1].hidden[row], model.encode_prompts([target]).hidden[0])
        assert torch.equal(batch.texts[0].hidden[row], model.encode_prompts([anchor]).hidden[0])
        seen.add(image)
    assert len(seen) > 2


def test_flip_mirrors_some_images(make_scope):
    scope = make_scope(batch_size=16)
    latents = scope.anchors([], NUM_ANCHORS)
    (batch,) = stream(scope, 1, flip=True)
    ab = scope.model.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    flipped = 0
    for row in range(16):
        known = (
            torch.cat([latents, latents.flip(-1)]) * ab[row].sqrt()
            + (1 - ab[row]).sqrt() * batch.noise[row]
        )
        distance = (known - batch.noisy[row]).flatten(1).norm(dim=1)
        assert distance.min() < 1e-5
        flipped += distance.argmin().item() >= NUM_ANCHORS
    assert 2 <= flipped <= 14
