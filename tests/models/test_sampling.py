"""Noise fixed per image, batches that change nothing, guidance, v-prediction."""

import dataclasses
import gc
import json
import logging
import weakref

import diffusers
import pytest
import torch
from scipy.stats import binomtest

from cu_runner.evaluators.evaluate import evaluate
from cu_runner.models import sampling
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.loading import load_model
from cu_runner.models.parameters import select_parameters, snapshot
from cu_runner.models.sampling import generate, sample_latents, sample_partly
from cu_runner.request.anchors import AnchorImages, sampler_key
from cu_runner.runtime.code_identity import identify
from cu_runner.runtime.seeding import RandomSource, derive_seed, image_noise
from cu_runner.schema.errors import SamplingError
from cu_runner.schema.settings import EvalSettings, Sampler, Speed
from cu_runner.store.cache import Cache

PROMPTS = [
    "a tree image in torch light style",
    "a star image in fog bank style",
    "a fish image",
    "a cup image in iris style",
] * 2
SEEDS = [188, 188, 188, 188, 288, 288, 288, 288]


# -------------------------------------------------------------------------------------------- noise
def test_an_images_noise_is_its_own_whatever_the_batch():
    together = image_noise(PROMPTS, SEEDS, (4, 16, 16))
    for i, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        assert torch.equal(image_noise([prompt], [seed], (4, 16, 16))[0], together[i])
    assert torch.equal(image_noise(PROMPTS[::-1], SEEDS[::-1], (4, 16, 16)), together.flip(0))
    torch.manual_seed(5)
    assert torch.equal(image_noise(PROMPTS[2:5], SEEDS[2:5], (4, 16, 16)), together[2:5])
    assert len({row.flatten()[0].item() for row in together}) == 8
    assert together.mean().abs() < 0.05
    assert together.std().item() == pytest.approx(1, abs=0.05)


def test_seeds_depend_on_every_part_and_on_where_it_ends():
    seeds = [derive_seed(*parts) for parts in ((1, 2), (12,), (1, 2, ""), ("1", 2), (2, 1))]
    assert seeds[0] == seeds[3]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed("image", "a tree image", 188) == 907026627977694069


def test_random_source_names_its_generators():
    names = (
        (0, 1, "train", 0),
        (1, 1, "train", 0),
        (0, 2, "train", 0),
        (0, 1, "test", 0),
        (0, 1, "train", 1),
    )
    draws = [
        torch.rand(3, generator=RandomSource(seed, request).generator(purpose, step)).tolist()
        for seed, request, purpose, step in names
    ]
    assert len({tuple(draw) for draw in draws}) == 5
    assert torch.rand(3, generator=RandomSource(0, 1).generator("train")).tolist() == draws[0]


# ------------------------------------------------------------------------------------------- images
def images(model, batch_size: int, prompts=PROMPTS, seeds=SEEDS, guidance: float = 2.5):
    return torch.cat(
        list(generate(model, prompts, seeds, Sampler(2, guidance), batch_size=batch_size, label=""))
    )


def test_images_do_not_depend_on_the_batch_size_or_the_order(model):
    whole = images(model, 8)
    assert whole.shape == (8, 3, 64, 64)
    assert whole.min() >= 0
    assert whole.max() <= 1
    for size in (1, 3):
        assert (images(model, size) - whole).abs().max() < 1e-5
    assert (images(model, 8, PROMPTS[::-1], SEEDS[::-1]).flip(0) - whole).abs().max() < 1e-5
    assert (whole[0] - whole[4]).abs().max() > 0.01  # the same prompt under another seed


def test_the_same_call_gives_bitwise_the_same_images(model):
    assert torch.equal(images(model, 3), images(model, 3))


def test_a_prompts_embedding_does_not_depend_on_what_is_encoded_with_it(model):
    model.prompts.encoded.clear()
    together = model.encode_prompts(PROMPTS).hidden
    for i, prompt in enumerate(PROMPTS[:4]):
        model.prompts.encoded.clear()
        assert torch.equal(model.encode_prompts([prompt]).hidden[0], together[i])


def test_batches_come_in_the_order_of_the_prompts(model):
    sizes = [
        len(batch)
        for batch in generate(model, PROMPTS, SEEDS, Sampler(1, 1), batch_size=3, label="")
    ]
    assert sizes == [3, 3, 2]


# ----------------------------------------------------------------------------------------- guidance
@pytest.fixture
def rows(model):
    """The number of rows of every forward pass of the UNet."""
    seen: list[int] = []
    handle = model.denoiser.register_forward_hook(
        lambda module, arguments, output: seen.append(len(arguments[0]))
    )
    yield seen
    handle.remove()


def test_the_key_of_a_cache_holds_the_scheduler_as_it_is_made(model):
    key = sampler_key(model, Sampler(2, 2.0, "DDIMScheduler"))
    assert key[:3] == [2, 2.0, "DDIMScheduler"]
    assert key[3]["clip_sample"] is False  # which the model's own configuration does not say
    assert key != sampler_key(model, Sampler(2, 2.0))
    assert json.loads(json.dumps(key)) == key


def test_guidance_doubles_the_rows_and_guidance_one_does_not(model, rows):
    sample_latents(model, PROMPTS[:3], SEEDS[:3], Sampler(2, 2.5))
    assert rows == [6, 6]
    rows.clear()
    sample_latents(model, PROMPTS[:3], SEEDS[:3], Sampler(2, 1))
    assert rows == [3, 3]


def test_guidance_closed_form(model):
    """One step is linear in the model's output, so latents are linear in the guidance scale."""
    one, two, three = (
        sample_latents(model, PROMPTS[:2], SEEDS[:2], Sampler(1, g)) for g in (1, 2, 3)
    )
    torch.testing.assert_close(two - one, three - two, atol=1e-3, rtol=1e-3)
    assert (two - one).abs().max() > 1e-3


@pytest.mark.parametrize("scheduler", [None, "DDIMScheduler", "EulerDiscreteScheduler"])
def test_a_partly_denoised_sample_goes_on_to_the_whole(model, scheduler):
    """Without a step it is noise; the prediction at its timestep is nearly that of clean latents
    noised to it.
    """
    sampler = Sampler(4, 1, scheduler)
    noise, first = sample_partly(model, PROMPTS[:2], SEEDS[:2], sampler, 0)
    assert torch.allclose(
        noise, image_noise(PROMPTS[:2], SEEDS[:2], model.latent_shape), atol=0.02
    )  # Euler scales by sigma
    partly, timestep = sample_partly(model, PROMPTS[:2], SEEDS[:2], sampler, 3)
    assert timestep < first
    text, at = model.encode_prompts(PROMPTS[:2]), timestep.long().expand(2)
    with torch.no_grad():
        eps = model.predict(partly, at, text)
    alpha_bar = model.process.alphas_cumprod[at].view(-1, 1, 1, 1)
    clean = (partly - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    whole = sample_latents(model, PROMPTS[:2], SEEDS[:2], sampler)
    assert (clean - whole).pow(2).mean() < 0.1 * whole.pow(2).mean()


def test_an_unknown_scheduler_is_refused(model):
    with pytest.raises(
        ValueError,
        match=(
            r"^scheduler=Foo: diffusers has no such scheduler; give a class such as "
            r"DDIMScheduler$"
        ),
    ):
        sample_latents(model, PROMPTS[:1], SEEDS[:1], Sampler(2, 1, "Foo"))


def test_sampling_leaves_the_models_scheduler_as_it_was(model):
    before = dict(vars(model.scheduler))
    sample_latents(model, PROMPTS[:1], SEEDS[:1], Sampler(2, 1))
    assert vars(model.scheduler).keys() == before.keys()
    assert model.scheduler.num_inference_steps == before["num_inference_steps"]
    assert torch.equal(
        torch.as_tensor(model.scheduler.timesteps), torch.as_tensor(before["timesteps"])
    )


# --------------------------------------------------------------------------------- other schedulers
def with_scheduler(model, scheduler) -> DiffusionModel:
    parts = dataclasses.replace(model.components, scheduler=scheduler)
    return DiffusionModel(
        parts, resolution=64, sampler=Sampler(2, 1.0), precision="fp32", device=model.device
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("FlowMatchEulerDiscreteScheduler", "samples no diffusion, which the model is; give one"),
        ("KarrasVeScheduler", "has no noise schedule .*; give one such as DDIMScheduler or Flow"),
    ],
)
def test_a_scheduler_without_the_noise_of_a_diffusion_model_is_one_line(model, name, said):
    with pytest.raises(ValueError, match=rf"^scheduler={name}: {said}"):
        sample_latents(model, PROMPTS[:1], SEEDS[:1], Sampler(2, 1, name))


def test_v_prediction_identity(model):
    """The UNet's output read as v gives an eps and an x_0 whose velocity is v and whose noised
    image is x_t.
    """
    scheduler = diffusers.DDIMScheduler.from_config(
        model.scheduler.config, prediction_type="v_prediction"
    )
    other = with_scheduler(model, scheduler)
    draw = torch.Generator().manual_seed(0)
    noisy, timesteps = torch.randn(4, 6, 16, 16, generator=draw), torch.tensor([1, 250, 700, 998])
    text = model.encode_prompts(PROMPTS[:4])
    with torch.no_grad():
        v, eps = (
            model.output(noisy, timesteps, text),
            other.predict(noisy, timesteps, text),
        )
    ab = other.process.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    x_0 = ab.sqrt() * noisy - (1 - ab).sqrt() * v
    torch.testing.assert_close(scheduler.get_velocity(x_0, eps, timesteps), v, atol=1e-5, rtol=0)
    torch.testing.assert_close(scheduler.add_noise(x_0, eps, timesteps), noisy, atol=1e-5, rtol=0)
    torch.testing.assert_close(other.add_noise(x_0, eps, timesteps), noisy, atol=1e-5, rtol=0)


def test_epsilon_is_what_the_unet_says(model):
    other = with_scheduler(
        model,
        diffusers.DDIMScheduler.from_config(model.scheduler.config, prediction_type="epsilon"),
    )
    noisy, timesteps = torch.ones(2, 6, 16, 16), torch.tensor([1, 998])
    text = model.encode_prompts(PROMPTS[:2])
    with torch.no_grad():
        assert torch.equal(
            other.predict(noisy, timesteps, text), model.output(noisy, timesteps, text)
        )


def test_a_stochastic_sampler_draws_per_image_too(model):
    other = with_scheduler(model, diffusers.DDPMScheduler.from_config(model.scheduler.config))
    whole = sample_latents(other, PROMPTS[:4], SEEDS[:4], Sampler(3, 1))
    one = sample_latents(other, PROMPTS[2:3], SEEDS[2:3], Sampler(3, 1))
    torch.testing.assert_close(one[0], whole[2], atol=1e-4, rtol=1e-4)


def test_weights_given_for_a_prediction_do_not_stay(model):
    name = next(
        name for name, _ in model.denoiser.named_parameters() if name.endswith("attn2.to_k.weight")
    )
    weight = dict(model.denoiser.named_parameters())[name]
    before = weight.clone()
    arguments = (torch.ones(1, 6, 16, 16), torch.tensor([500]), model.encode_prompts(PROMPTS[:1]))
    with torch.no_grad():
        plain = model.predict(*arguments)
        changed = model.predict(*arguments, {name: before + 1})
        assert torch.equal(weight, before)
        assert torch.equal(model.predict(*arguments), plain)
        weight.add_(1)
        assert torch.equal(model.predict(*arguments), changed)
    assert (changed - plain).abs().max() > 1e-5


# --------------------------------------------------------------------------------------- GPU memory
@pytest.fixture
def any_batch(model):
    """The embedded model, which forgets at the end that memory ran out."""
    yield model
    model.batch_limit = None


def scarce_memory(monkeypatch, model, most: int) -> tuple[list[int], list]:
    """Sampling runs out of memory with more than `most` images; the sizes that were tried, and what
    then became of the tensors.
    """
    real, sizes, held = sampling.sample_latents, [], []

    def scarce(model, prompts, seeds, sampler, *_):
        sizes.append(len(prompts))
        assert [kept() for kept in held] == [None] * len(held)
        if len(prompts) > most:
            taken = torch.empty(1)
            held.append(weakref.ref(taken))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, prompts, seeds, sampler)

    monkeypatch.setattr(sampling, "sample_latents", scarce)
    return sizes, held


def test_evaluation_goes_on_with_half_the_batch_when_memory_runs_out(
    any_batch, evaluator, sequence, monkeypatch, caplog
):
    model, settings = any_batch, EvalSettings(2, 2.5, batch_size=8)
    whole = evaluate(model, evaluator, sequence, list(sequence.targets), 1, settings).predictions
    sizes, _ = scarce_memory(monkeypatch, model, 3)
    logging.getLogger("cu_runner").propagate = True
    found = evaluate(model, evaluator, sequence, list(sequence.targets), 1, settings).predictions
    assert sizes[:3] == [min(8, len(whole)), 4, 2]
    assert max(sizes[2:]) == 2
    assert [message for message in caplog.messages if "batches of 2" in message]
    assert found["prompt"].tolist() == whole["prompt"].tolist()
    assert (found["predicted_style"] == whole["predicted_style"]).mean() > 0.9
    sizes.clear()
    evaluate(model, evaluator, sequence, list(sequence.targets), 2, settings)
    assert max(sizes) == 2  # memory does not run out again
    monkeypatch.setattr(
        sampling,
        "sample_latents",
        lambda *arguments: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA")),
    )
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(model, evaluator, sequence, list(sequence.targets), 1, settings)


@pytest.mark.parametrize(
    ("step", "precision", "advice"),
    [
        (0, "fp32", "the checkpoint overflows, or its sampler does"),
        (0, "bf16", "the model overflows in model.precision=bf16; try fp32"),
        (1, "bf16", "the weights diverged; lower train.lr"),
    ],
)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_images_that_are_not_finite(
    model, evaluator, sequence, monkeypatch, step, precision, advice, value
):
    """Infinity in the decoder too, which a clamp would make a black or a white pixel."""
    monkeypatch.setattr(model, "precision", precision)
    handle = model.vae.decoder.register_forward_hook(
        lambda module, arguments, output: output.index_fill(3, torch.tensor([5]), value)
    )
    arguments = (model, evaluator, sequence, list(sequence.targets), step)
    with pytest.raises(SamplingError, match="not finite") as caught:
        evaluate(*arguments, EvalSettings(1, 1.0, batch_size=8))
    handle.remove()
    assert str(caught.value).split(": ", 1)[1].startswith(advice)


def test_anchor_images_that_are_not_finite_are_not_kept(model, tmp_path):
    params = select_parameters(model.denoiser, "kv_xattn")
    cache = Cache(tmp_path / "cache", identify())
    anchors = AnchorImages(model, "", params, snapshot(params), Sampler(1, 1.0), cache, 2)
    handle = model.vae.decoder.register_forward_hook(lambda *_: _[2] / 0)
    with pytest.raises(SamplingError, match=r"^the anchor images are not finite: the checkpoint"):
        anchors.latents(PROMPTS[:2], 2)
    handle.remove()
    assert anchors.latents(PROMPTS[:2], 2).isfinite().all()


def test_images_go_on_with_half_the_batch_too_and_it_is_remembered(any_batch, monkeypatch):
    whole = images(any_batch, 2)
    sizes, held = scarce_memory(monkeypatch, any_batch, 2)
    assert torch.equal(images(any_batch, 8), whole)
    assert sizes == [8, 4, 2, 2, 2, 2]
    assert len(held) == 2
    sizes.clear()
    assert torch.equal(images(any_batch, 8), whole)
    assert sizes == [2, 2, 2, 2]
    monkeypatch.setattr(
        sampling,
        "sample_latents",
        lambda *arguments: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA")),
    )
    with pytest.raises(torch.OutOfMemoryError):
        images(any_batch, 8)


def test_what_is_made_of_images_may_run_out_of_memory_too(any_batch):
    seen = []

    def transform(batch):
        seen.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch.mean((1, 2, 3))

    made = generate(
        any_batch,
        PROMPTS[:5],
        SEEDS[:5],
        Sampler(2, 2.5),
        batch_size=4,
        label="",
        transform=transform,
    )
    torch.testing.assert_close(torch.cat(list(made)), images(any_batch, 2)[:5].mean((1, 2, 3)))
    assert seen == [4, 2, 2, 1]


def test_anchor_images_go_on_with_half_the_batch(any_batch, monkeypatch, tmp_path):
    params = select_parameters(any_batch.denoiser, "kv_xattn")
    arguments = (any_batch, "", params, snapshot(params), Sampler(2, 2.5))
    whole = AnchorImages(*arguments, Cache(tmp_path / "one", identify()), 2).latents(PROMPTS[:4], 6)
    sizes, _ = scarce_memory(monkeypatch, any_batch, 2)
    found = AnchorImages(*arguments, Cache(tmp_path / "two", identify()), 4).latents(PROMPTS[:4], 6)
    assert sizes == [4, 2, 2, 2]
    assert torch.equal(found, whole)


def test_what_failed_is_freed_before_the_next_attempt(any_batch, evaluator, sequence, monkeypatch):
    """Without the collector of cycles, which runs at its own time."""
    decode, sample = any_batch.decode_latents, sampling.sample_latents
    held, after = [], []

    def scarce(latents):
        if len(latents) > 1:
            images = decode(latents)
            held.extend([weakref.ref(latents), weakref.ref(images)])
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(latents)

    def watched(model, prompts, *rest):
        if len(prompts) == 1:
            after.append([kept() for kept in held])
        return sample(model, prompts, *rest)

    monkeypatch.setattr(any_batch, "decode_latents", scarce)
    monkeypatch.setattr(sampling, "sample_latents", watched)
    settings = EvalSettings(2, 1.0, batch_size=2)
    gc.disable()
    try:
        evaluate(any_batch, evaluator, sequence, list(sequence.targets), 1, settings)
    finally:
        gc.enable()
    assert held
    assert after[0] == [None] * len(held)


def test_memory_that_runs_out_while_images_are_classified_halves_the_batch_too(
    any_batch, evaluator, sequence, monkeypatch
):
    model = any_batch
    concepts = [*sequence.targets, *sequence.retain]
    settings = EvalSettings(2, 2.5, batch_size=3)
    whole = evaluate(model, evaluator, sequence, concepts, 1, settings).predictions
    sizes, decode = [], model.decode_latents

    def scarce(latents):
        sizes.append(len(latents))
        if len(sizes) > 1 and len(latents) > 1:  # the first batch is done and is not made again
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(latents)

    monkeypatch.setattr(model, "decode_latents", scarce)
    found = evaluate(model, evaluator, sequence, concepts, 1, settings).predictions
    assert sizes[:3] == [3, 3, 1]
    assert sum(sizes) == 3 + len(whole)
    assert found["prompt"].tolist() == whole["prompt"].tolist()
    monkeypatch.setattr(
        model, "decode_latents", lambda _: (_ for _ in ()).throw(ValueError("another failure"))
    )
    with pytest.raises(ValueError, match="another failure"):
        evaluate(model, evaluator, sequence, concepts, 1, settings)


# -------------------------------------------------------------------------------------------- speed
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_remembered_keys_and_values_give_the_same_bits(model, guidance):
    sampler = Sampler(3, guidance)
    plain = sample_latents(model, PROMPTS, SEEDS, sampler)
    calls = []
    layer = next(
        layer for name, layer in model.denoiser.named_modules() if name.endswith("attn2.to_k")
    )
    handle = layer.register_forward_pre_hook(lambda *_: calls.append(1))
    model.speed_up(Speed(kv_cache=True))
    try:
        with model.constant_text():
            text = model.encode_prompts(PROMPTS[:2])
            other = model.encode_prompts(PROMPTS[2:4])
            first, second = layer(text.hidden), layer(other.hidden)
            assert layer(other.hidden) is second
            assert not torch.equal(first, second)
        assert torch.equal(sample_latents(model, PROMPTS, SEEDS, sampler), plain)
        assert "forward" not in vars(layer)  # training finds the layer as it was
        assert torch.equal(layer(text.hidden), first)
    finally:
        model.speed_up(Speed(kv_cache=False))
        handle.remove()


def test_the_fast_path_keeps_the_accuracy_within_its_interval(evaluator, sequence):
    """bf16 with remembered keys and values against plain fp32, on the untouched model."""
    settings, accuracy = EvalSettings(6, 2.5, batch_size=24), {}
    for precision in ("fp32", "bf16"):
        made = load_model("package:shapecanvas/weights/pipeline", 64, Sampler(6, 2.5), precision)
        made.speed_up(Speed(kv_cache=precision == "bf16"))
        found = evaluate(
            made, evaluator, sequence, [*sequence.targets, *sequence.retain], 0, settings
        ).predictions
        right = [(found[kind] == found[f"predicted_{kind}"]).sum() for kind in ("style", "object")]
        accuracy[precision] = (sum(right), 2 * len(found))
    interval = binomtest(*map(int, accuracy["fp32"])).proportion_ci(method="wilson")
    hits, number = accuracy["bf16"]
    assert hits / number > 0.5
    assert interval.low <= hits / number <= interval.high
