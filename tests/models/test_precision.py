"""What saves memory changes nothing else: frozen weights in bf16, recomputed activations, images
decoded one by one.
"""

import dataclasses

import pytest
import torch
from conftest import SMOKE, run_directory

from cu_runner.config.compose import compose
from cu_runner.methods.conabl import ConAbl
from cu_runner.models.loading import load_model
from cu_runner.models.parameters import select_parameters, snapshot
from cu_runner.models.sampling import generate
from cu_runner.runner.training import erase
from cu_runner.schema.settings import Sampler, Speed

PROMPTS = ["a painting of a dog", "two cats"]


def load(path, **more):
    return load_model(str(path), 64, Sampler(2, 2.0), **more)


def trained(model, group, settings, scope) -> dict[str, torch.Tensor]:
    """The weights after two steps of ConAbl."""
    params = select_parameters(model.denoiser, group)
    latents = torch.randn(4, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    scope = dataclasses.replace(
        scope,
        model=model,
        params=params,
        start=snapshot(params),
        base=snapshot(params),
        anchors=lambda prompts, number: latents,
    )
    method = ConAbl(num_anchors=4, params=group, teacher="previous")
    erase(scope, method, {}, settings(steps=2))
    return snapshot(params)


@pytest.mark.parametrize("group", ["kv_xattn", "full"])
def test_frozen_weights_in_bf16_give_bitwise_the_same(pipelines, settings, make_scope, group):
    plain, lowered = (load(pipelines["sdxl"], precision="bf16") for _ in range(2))
    before = lowered.fingerprint()
    assert before == plain.fingerprint() == load(pipelines["sdxl"]).fingerprint()
    params = select_parameters(lowered.denoiser, group)
    lowered.lower_frozen(params)
    assert {parameter.dtype for parameter in params.values()} == {torch.float32}
    frozen = [
        parameter for name, parameter in lowered.denoiser.named_parameters() if name not in params
    ]
    if group == "kv_xattn":
        low = sum(parameter.numel() for parameter in frozen if parameter.dtype == torch.bfloat16)
        assert low > 0.95 * sum(parameter.numel() for parameter in frozen)
    images = [
        next(generate(model, PROMPTS, [1, 2], Sampler(2, 2.0), batch_size=2, label=""))
        for model in (plain, lowered)
    ]
    assert torch.equal(*images)
    scope = make_scope()
    one, two = (trained(model, group, settings, scope) for model in (plain, lowered))
    assert all(one[name].equal(two[name]) for name in one)
    assert any(
        not one[name].equal(parameter)
        for name, parameter in load(pipelines["sdxl"]).denoiser.named_parameters()
        if name in one
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_other_precisions_keep_every_weight(pipelines, precision):
    model = load(pipelines["sd15"], precision=precision)
    model.lower_frozen({})
    assert {parameter.dtype for parameter in model.denoiser.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputed_activations_give_bitwise_the_same(pipelines, settings, make_scope, precision):
    plain, saving = (load(pipelines["sdxl"], precision=precision) for _ in range(2))
    saving.checkpoint_gradients()
    calls = []
    block = saving.denoiser.down_blocks[1].attentions[0].transformer_blocks[0]
    handle = block.norm1.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    scope = make_scope()
    one, two = (trained(model, "kv_xattn", settings, scope) for model in (plain, saving))
    handle.remove()
    assert all(one[name].equal(two[name]) for name in one)
    assert calls == [True, False, True] * 2  # forward, the teacher, and again on the way back


def test_recomputed_activations_use_the_weights_that_were_given(model):
    """A gradient with respect to weights in place of the UNet's own is theirs, not the UNet's."""
    params = select_parameters(model.denoiser, "kv_xattn")
    noisy, timesteps, text = (
        torch.ones(2, *model.latent_shape),
        torch.tensor([100, 800]),
        model.encode_prompts(PROMPTS),
    )
    found = []
    for saving in (False, True):
        if saving:
            model.checkpoint_gradients()
        other = {
            name: (parameter.detach() * 1.5).requires_grad_() for name, parameter in params.items()
        }
        loss = model.predict(noisy, timesteps, text, other).square().mean()
        found.append(torch.autograd.grad(loss, list(other.values())))
    model.denoiser.disable_gradient_checkpointing()
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert sum(gradient.abs().sum() for gradient in found[0]) > 0


def test_images_decoded_one_by_one(pipelines):
    sizes = []
    images = []
    for slicing in (False, True):
        model = load(pipelines["sd15"], vae_slicing=slicing)
        model.vae.decoder.register_forward_hook(
            lambda module, arguments, output: sizes.append(len(arguments[0]))
        )
        images.append(
            next(generate(model, PROMPTS, [1, 2], Sampler(2, 2.0), batch_size=2, label=""))
        )
    assert sizes == [2, 1, 1]
    torch.testing.assert_close(*images, atol=1e-5, rtol=0)


def test_the_autoencoder_of_sdxl_decodes_in_fp32_under_fp16(pipelines):
    """It overflows in fp16; that of Stable Diffusion 1 does not."""
    for kind, expected in (("sdxl", torch.float32), ("sd15", torch.float16)):
        model, seen = load(pipelines[kind], precision="fp16"), []
        model.vae.decoder.conv_out.register_forward_hook(
            lambda module, arguments, output, seen=seen: seen.append(output.dtype)
        )
        model.decode_latents(torch.zeros(1, *model.latent_shape))
        assert seen == [expected]


def test_memory_settings_are_no_other_experiment(in_process, tmp_path):
    plain = compose([*SMOKE, "model=sd15"])
    for change in (
        "train.gradient_checkpointing=true",
        "model.vae_slicing=false",
        "model.allow_pickle=[a.ckpt]",
    ):
        other = compose([*SMOKE, "model=sd15", change])
        assert (other.signature, other.training_key) == (plain.signature, plain.training_key)
    assert (
        compose([*SMOKE, "model=sd15", "model.prediction_type=v_prediction"]).training_key
        != plain.training_key
    )
    status, out, err = in_process(*SMOKE, "train.gradient_checkpointing=true")
    assert (status, err) == (0, "")
    assert run_directory(out, tmp_path).name.endswith(compose([*SMOKE]).signature[:8])


def test_a_precision_that_the_gpu_lacks(monkeypatch, pipelines):
    """The GPU of the run is asked, not the one that happens to be current."""
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: {1: (7, 5)}[device.index]
    )
    with pytest.raises(
        ValueError, match=r"^model.precision=bf16: this GPU does not have it; use fp16 or fp32$"
    ):
        load(pipelines["sd15"], precision="bf16", device="cuda:1")


# -------------------------------------------------------------------------------------------- speed
def output_of(model) -> torch.Tensor:
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.predict(noise, torch.tensor([10, 900]), model.encode_prompts(PROMPTS))


def test_a_compiled_unet_says_the_same_follows_its_weights_and_is_left_again(monkeypatch):
    model, real, graphs, calls = load("package:shapecanvas/weights/pipeline"), torch.compile, [], []

    def backend(graph, inputs):
        graphs.append(1)
        return lambda *arguments: calls.append(1) or graph(*arguments)

    monkeypatch.setattr(
        torch, "compile", lambda module, **more: real(module, backend=backend, **more)
    )
    weight = model.denoiser.conv_in.weight
    outputs = []
    for compiled in (True, False):
        model.speed_up(Speed(compile=compiled))
        calls.clear()
        for change in (1.0, -1.0):
            outputs.append(output_of(model))
            with torch.no_grad():
                weight.add_(change)  # the next request
        assert bool(calls) == compiled
    torch._dynamo.reset()
    first, second, plain, changed = outputs
    torch.testing.assert_close(first, plain)
    torch.testing.assert_close(second, changed)
    assert (second - first).abs().max() > 1e-4
    assert len(graphs) == 1


def test_the_layout_of_a_gpus_convolutions_says_the_same_and_is_left_again(pipelines, monkeypatch):
    model = load(pipelines["sd15"])
    weights = [part.conv_in.weight for part in (model.denoiser, model.vae.encoder)]
    plain, cpu = output_of(model), model.device
    for speed, last in ((Speed(), True), (Speed(channels_last=False), False)):
        monkeypatch.setattr(model, "device", torch.device("cuda"))
        model.speed_up(speed)
        monkeypatch.setattr(model, "device", cpu)
        assert {weight.is_contiguous(memory_format=torch.channels_last) for weight in weights} == {
            last
        }
        torch.testing.assert_close(output_of(model), plain, atol=1e-5, rtol=1e-4)
    assert torch.equal(output_of(model), plain)
