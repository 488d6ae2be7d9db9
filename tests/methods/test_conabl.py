"""Concept ablation: its loss worked out from predict, its teachers, its batches; the released
loss and its detached begin token.
"""

import dataclasses
import itertools
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn

from cu_runner.concepts.requests import plan_requests
from cu_runner.methods.conabl import ConAbl, squared_error
from cu_runner.models import text_readers
from cu_runner.models.loading import load_model
from cu_runner.models.parameters import select_parameters
from cu_runner.models.text_readers import TextReaders
from cu_runner.schema.settings import Sampler

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
    predicted = scope.model.predict(*arguments, batch.texts[1])
    if wanted == "noise":
        return (predicted - batch.wanted).pow(2).mean()
    weights = {"current": dict(scope.params), "previous": scope.start, "base": scope.base}[wanted]
    now = {name: parameter.clone() for name, parameter in scope.params.items()}
    for name, parameter in scope.params.items():
        parameter.copy_(weights[name])
    target = scope.model.predict(*arguments, batch.texts[0])
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
            scope.model.predict(batch.noisy, batch.timesteps, batch.texts[0]), batch.wanted
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
    target = scope.model.predict(*arguments, batch.texts[0])
    predicted = scope.model.predict(*arguments, batch.texts[1])
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


# ---------------------------------------------------------------------------------------- released
def released_error(predicted, wanted, border: str) -> torch.Tensor:
    """sum((a - b)^2 m) / sum(m) of every image, m [1, H, W]; averaged over images."""
    mask = torch.ones(1, *predicted.shape[2:])
    if border == "masked":
        mask[:, [0, -1]] = 0
        mask[:, :, [0, -1]] = 0
    images = zip(predicted, wanted, strict=True)
    return sum(((a - b) ** 2 * mask).sum() / mask.sum() for a, b in images) / len(predicted)


@pytest.mark.parametrize("border", ["kept", "masked"])
@pytest.mark.parametrize("loss_sum", ["mean", "channels"])
def test_squared_error_is_the_released_one_with_its_mask(loss_sum, border):
    draw = torch.Generator().manual_seed(0)
    predicted, wanted = torch.randn(2, 3, 4, 7, 5, generator=draw)
    predicted.requires_grad_(True)
    expected = released_error(predicted, wanted, border) / (1 if loss_sum == "channels" else 4)
    found = squared_error(predicted, wanted, loss_sum, border)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    if (loss_sum, border) == ("mean", "kept"):
        torch.testing.assert_close(found, (predicted - wanted).square().mean(), rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(loss, predicted)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)
    assert gradients[0][:, :, 1:-1, 1:-1].all()
    assert bool(gradients[0][:, :, [0, -1]].any()) == (border == "kept")


@pytest.mark.parametrize("loss", ["model", "noise"])
def test_the_preservation_term_stays_a_plain_mean(scope, loss):
    method = ConAbl(
        loss, num_anchors=NUM_ANCHORS, preservation=0.75, loss_sum="channels", border="masked"
    )
    batch = first_batch(method, scope)
    total, logs = method.loss(scope, batch)
    with torch.no_grad():
        anchor, predicted = (
            scope.model.predict(batch.noisy, batch.timesteps, text) for text in batch.texts
        )
    forgotten = released_error(predicted, anchor if loss == "model" else batch.wanted, "masked")
    kept = (anchor - batch.wanted).square().mean()
    assert logs["unlearn_loss"] == pytest.approx(forgotten.item(), rel=1e-5)
    assert logs["preservation_loss"] == pytest.approx(kept.item(), rel=1e-5)
    assert total.item() == pytest.approx((forgotten + 0.75 * kept).item(), rel=1e-5)


# -------------------------------------------------------------------------------------- begin token
def split(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, L, heads * d] as [B, heads, L, d]."""
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention_by_hand(layer, image, text, detached: bool) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v, with m k + (1 - m) sg k and the same of v, m = 0 at token 0."""
    m = torch.ones(text.shape[1], 1)
    m[0] = 0.0 if detached else 1.0
    key, value = (text @ weight.weight.T for weight in (layer.to_k, layer.to_v))
    key, value = (m * part + (1 - m) * part.detach() for part in (key, value))
    query = split(image @ layer.to_q.weight.T, 2)
    key, value = split(key, 2), split(value, 2)
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    mixed = (weights @ value).transpose(1, 2).flatten(2)
    return mixed @ layer.to_out[0].weight.T + layer.to_out[0].bias


def test_an_attention_layer_with_a_detached_begin_token_by_hand(model, monkeypatch):
    torch.manual_seed(0)
    layer = Attention(query_dim=6, cross_attention_dim=5, heads=2, dim_head=4)
    unet = nn.ModuleDict({"block": nn.ModuleDict({"attn2": layer})})
    monkeypatch.setattr(text_readers, "architecture_of", lambda network: model.architecture)
    monkeypatch.setattr(model, "_readers", TextReaders(unet))
    draw = torch.Generator().manual_seed(1)
    image = torch.randn(2, 9, 6, generator=draw, requires_grad=True)
    text, wanted = (torch.randn(2, *shape, generator=draw) for shape in ((7, 5), (9, 6)))
    weights = [layer.to_k.weight, layer.to_v.weight, layer.to_q.weight, image]

    def gradients(output):
        return torch.autograd.grad(F.mse_loss(output, wanted), weights)

    plain = layer(image, text)
    with model.begin_token_detached():
        detached = layer(image, text)
    with model.begin_token_detached(False):
        assert torch.equal(layer(image, text), plain)
        unchanged = gradients(layer(image, text))
    assert torch.equal(detached, plain)
    found = {False: gradients(plain), True: gradients(detached)}
    for is_detached, gradient in found.items():
        expected = gradients(attention_by_hand(layer, image, text, is_detached))
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(*pair) for pair in zip(unchanged, found[False], strict=True))
    for gradient, other in list(zip(found[True], found[False], strict=True))[:2]:
        assert (gradient - other).norm() > 0.05 * other.norm()


def test_nothing_of_a_detached_block_is_left_also_after_an_error(model):
    readers = [
        layer
        for name, layer in model.denoiser.named_modules()
        if name.endswith(("attn2.to_k", "attn2.to_v"))
    ]

    def hooked() -> list[nn.Module]:
        return [layer for layer in model.denoiser.modules() if layer._forward_hooks]

    def fail() -> None:
        with model.begin_token_detached():
            with model.begin_token_detached():  # inside another one: it stays detached
                assert hooked() == readers
            assert hooked() == readers
            assert all(len(layer._forward_hooks) == 1 for layer in readers)
            raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            fail()
        assert hooked() == []


@contextmanager
def constant_first_row(model):
    """Keys and values whose weight is a constant where it reads the text's row 0."""

    def reader(layer):
        return lambda text: torch.cat(
            [text[:, :1] @ layer.weight.detach().T, text[:, 1:] @ layer.weight.T], dim=1
        )

    layers = [
        layer
        for name, layer in model.denoiser.named_modules()
        if name.endswith(("attn2.to_k", "attn2.to_v"))
    ]
    for layer in layers:
        layer.forward = reader(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def gradient_of(method, scope, batch) -> torch.Tensor:
    loss, _ = method.loss(scope, batch)
    return flat(torch.autograd.grad(loss, list(scope.params.values())))


def flat(gradients) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def detached_by_hand(scope, batch, preservation: float) -> torch.Tensor:
    """The gradient of mse(e(c*), sg e(c)) + w mse(e(c), noise) without that through token 0."""
    arguments = (batch.noisy, batch.timesteps)
    with torch.no_grad():
        target = scope.model.predict(*arguments, batch.texts[0])
    with constant_first_row(scope.model):
        anchor, predicted = (scope.model.predict(*arguments, text) for text in batch.texts)
        loss = (predicted - target).square().mean()
        loss = loss + preservation * (anchor - batch.wanted).square().mean()
        return flat(torch.autograd.grad(loss, list(scope.params.values())))


@pytest.mark.parametrize("preservation", [0.0, 0.5])
def test_the_detached_gradient_is_without_what_goes_through_the_first_row(scope, preservation):
    options = {"num_anchors": NUM_ANCHORS, "preservation": preservation}
    detached, trained = (
        ConAbl(**options, begin_token=begin_token) for begin_token in ("detached", "trained")
    )
    batch = first_batch(detached, scope)
    found, whole = (gradient_of(method, scope, batch) for method in (detached, trained))
    expected = detached_by_hand(scope, batch, preservation)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert (found - whole).norm() > 0.1 * whole.norm()
    assert detached.loss(scope, batch)[0].item() == trained.loss(scope, batch)[0].item()


def test_the_detached_gradient_survives_gradient_checkpointing(make_scope):
    plain = make_scope()
    for parameter in plain.params.values():
        parameter.requires_grad_(True)
    saving = load_model("package:shapecanvas/weights/pipeline", 64, Sampler(2, 2.5))
    saving.checkpoint_gradients()
    params = select_parameters(saving.denoiser, "kv_xattn")
    for parameter in params.values():
        parameter.requires_grad_(True)
    calls = []
    reader = next(layer for name, layer in saving.denoiser.named_modules() if "attn2.to_k" in name)
    reader.register_forward_pre_hook(lambda *_: calls.append(1))
    scope = dataclasses.replace(plain, model=saving, params=params)
    found = {}
    for begin_token in ("detached", "trained"):
        method = ConAbl("noise", num_anchors=NUM_ANCHORS, begin_token=begin_token)
        batch = first_batch(method, plain)
        calls.clear()
        found[begin_token] = gradient_of(method, scope, batch)
        assert len(calls) == 2  # computed again on the way back
        expected = gradient_of(method, plain, batch)
        torch.testing.assert_close(
            found[begin_token], expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()
        )
    assert (found["detached"] - found["trained"]).norm() > 0.1 * found["trained"].norm()
    assert not any(hooks for layer in saving.denoiser.modules() if (hooks := layer._forward_hooks))


def test_a_detached_pass_does_not_go_through_a_compiled_unet(scope, monkeypatch):
    class Compiled(Exception):
        """Stands for a UNet whose compilation does not know the hooks."""

    def forward(*_, **__):
        raise Compiled

    model = scope.model
    method = ConAbl(teacher="base", num_anchors=NUM_ANCHORS, begin_token="detached")
    batch = first_batch(method, scope)
    expected = gradient_of(method, scope, batch)
    monkeypatch.setattr(model, "_forward", forward)
    assert torch.equal(gradient_of(method, scope, batch), expected)
    with pytest.raises(Compiled):
        gradient_of(ConAbl(teacher="base", num_anchors=1), scope, batch)
    with pytest.raises(Compiled):  # nor do other passes avoid it afterwards
        model.predict(batch.noisy, batch.timesteps, batch.texts[0])


# ------------------------------------------------------------------------------------------ batches
def stream(scope, number: int, **options) -> list:
    method = ConAbl(num_anchors=NUM_ANCHORS, **options)
    method.begin_request(scope)
    return [method.batch(scope, step) for step in range(number)]


def equal(a, b) -> bool:
    tensors = [
        (one.noisy, one.wanted, one.timesteps, *(text.hidden for text in one.texts))
        for one in (a, b)
    ]
    return all(torch.equal(x, y) for x, y in zip(*tensors, strict=True))


def test_batches_depend_on_seed_request_and_step_alone(make_scope):
    first, again = stream(make_scope(), 3), stream(make_scope(), 3)
    assert all(equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a.wanted, b.wanted) for a, b in itertools.combinations(first, 2))
    for other in (make_scope(seed=1), make_scope(request=2)):
        assert not torch.equal(stream(other, 1)[0].wanted, first[0].wanted)
    torch.manual_seed(123)
    assert equal(stream(make_scope(), 1)[0], first[0])


def test_a_batch_is_an_anchor_image_under_noise_with_both_prompts_of_its_caption(make_scope):
    scope = make_scope(batch_size=8)
    model, sequence = scope.model, scope.sequence
    latents = scope.anchors([], NUM_ANCHORS)
    pairs = sequence.training_pairs(scope.request.targets[0])
    assert pairs[0] == ("a ball in the style of torch light", "a ball")
    (batch,) = stream(scope, 1)
    assert batch.noisy.shape == batch.wanted.shape == (8, 6, 16, 16)
    assert batch.timesteps.shape == (8,)
    ab = model.process.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    clean = (batch.noisy - (1 - ab).sqrt() * batch.wanted) / ab.sqrt()
    seen = set()
    for row in range(8):
        image = (clean[row] - latents).flatten(1).norm(dim=1).argmin().item()
        torch.testing.assert_close(
            batch.noisy[row],
            ab[row].sqrt() * latents[image] + (1 - ab[row]).sqrt() * batch.wanted[row],
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
    ab = scope.model.process.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    flipped = 0
    for row in range(16):
        known = (
            torch.cat([latents, latents.flip(-1)]) * ab[row].sqrt()
            + (1 - ab[row]).sqrt() * batch.wanted[row]
        )
        distance = (known - batch.noisy[row]).flatten(1).norm(dim=1)
        assert distance.min() < 1e-5
        flipped += distance.argmin().item() >= NUM_ANCHORS
    assert 2 <= flipped <= 14


def test_other_words_are_unlearned_as_the_name_is(make_scope, tmp_path):
    file = tmp_path / "words.csv"
    file.write_text("concept,words\ntorch light,barred fiery\n", encoding="utf-8")
    scope = make_scope()
    method = ConAbl(num_anchors=4, also_called=str(file))
    method.begin_request(scope)
    (concept,) = scope.request.targets
    ways = method._ways(scope.sequence, concept)
    assert ways[0] == (
        "a ball in the style of torch light",
        "a ball in the style of barred fiery",
    )
    seen = {
        tuple(row.flatten().tolist()[-8:])
        for step in range(20)
        for row in method.batch(scope, step).texts[1].hidden
    }
    encoded = scope.model.encode_prompts([way for pair in ways for way in pair]).hidden
    assert seen <= {tuple(row.flatten().tolist()[-8:]) for row in encoded}
    assert len(seen) > len(ways)  # both ways are drawn
    shipped = ConAbl(also_called="other_words_shapecanvas_styles")
    assert shipped._ways(scope.sequence, concept) == ways
    assert ConAbl()._ways(scope.sequence, concept)[0] == ways[0][:1]


def test_other_words_that_cannot_be_read_or_are_not_as_many(make_scope, sequence, tmp_path):
    with pytest.raises(ValueError, match=r"method\.also_called: there is no list nix"):
        ConAbl(also_called="nix")
    file = tmp_path / "words.csv"
    file.write_text("concept,words\ntorch light,barred fiery\n", encoding="utf-8")
    together = plan_requests(sequence, "simultaneous")[1]
    scope = dataclasses.replace(make_scope(), request=together)
    with pytest.raises(ValueError, match="as many other words"):
        ConAbl(num_anchors=4, also_called=str(file)).begin_request(scope)
