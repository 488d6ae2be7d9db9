"""Stable Diffusion 1, 2 and SDXL in miniature, with random weights: the same images as diffusers'
own pipelines make.
"""

import contextlib
import dataclasses
import functools
import json
from pathlib import Path

import diffusers
import open_clip
import pandas as pd
import pytest
import torch
import transformers
from conftest import read_conf
from small_runs import overrides, run

from cu_runner.evaluators.classifier import Classifier
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.encoder_hooks import projecting_rows
from cu_runner.models.loading import load_model
from cu_runner.models.parameters import select_parameters
from cu_runner.models.process import is_flow
from cu_runner.models.sampling import generate
from cu_runner.models.schedulers import build_scheduler, find_scheduler
from cu_runner.models.text import Text
from cu_runner.runtime.seeding import derive_seed, image_noise
from cu_runner.schema.settings import Sampler

# schedulers of diffusers call numpy as it was, up to 30,000 times for an image
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
KINDS = ("sd15", "sd21_base", "sdxl")
SCHEDULERS = [  # those that are accepted
    "CogVideoXDDIMScheduler",
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
]
PROMPTS, SEEDS = ["a painting of a dog in Van Gogh style", "two cats"], [3, 4]


def load(path: Path | str, **more) -> DiffusionModel:
    return load_model(str(path), 64, Sampler(3, 5.0), **more)


def our_images(
    model: DiffusionModel, guidance: float = 5.0, scheduler: str | None = None
) -> torch.Tensor:
    return next(
        generate(model, PROMPTS, SEEDS, Sampler(3, guidance, scheduler), batch_size=2, label="")
    )


@functools.cache
def loaded(directory: Path) -> DiffusionModel:
    return load(directory)


def with_scheduler(model: DiffusionModel, config: dict | None = None, **changes) -> DiffusionModel:
    """The model with another configuration of its scheduler, or a changed one."""
    own = model.components.scheduler
    made = build_scheduler(type(own), config or own.config, changes)
    parts = dataclasses.replace(model.components, scheduler=made)
    return DiffusionModel(
        parts, resolution=64, sampler=model.sampler, precision="fp32", device=model.device
    )


@functools.cache
def networks(directory: Path) -> dict[str, object]:
    """The parts of diffusers' pipeline that no test changes.

    Without gradients, as ours are: on some processors torch multiplies by a weight that may have
    one in another order, also where none is asked for.
    """
    found = diffusers.DiffusionPipeline.from_pretrained(directory).components
    parts = {name: part for name, part in found.items() if part is not None and name != "scheduler"}
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(requires_grad=False)
    return parts


def their_images(
    directory: Path,
    scheduler: str | None = None,
    guidance: float = 5.0,
    config: dict | None = None,
    **changes: object,
) -> torch.Tensor:
    """Those of diffusers' own pipeline; config, changes: of the scheduler."""
    index = json.loads((directory / "model_index.json").read_text())
    kind = getattr(diffusers, scheduler or index["scheduler"][1])
    config = config or kind.load_config(directory, subfolder="scheduler")
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        directory, scheduler=kind.from_config(config, **changes), **networks(directory)
    )
    pipe.set_progress_bar_config(disable=True)
    noise = image_noise(PROMPTS, SEEDS, (4, 8, 8))
    pooling = getattr(pipe, "text_encoder_2", None)
    # the rounding of a pooled text depends on how many are projected together
    with projecting_rows(pooling) if pooling else contextlib.nullcontext():
        return pipe(
            PROMPTS,
            latents=noise,
            generator=[
                torch.Generator().manual_seed(derive_seed("sampler", *image))
                for image in zip(PROMPTS, SEEDS, strict=True)
            ],
            num_inference_steps=3,
            guidance_scale=guidance,
            height=64,
            width=64,
            output_type="pt",
        ).images


def batch_of(model: DiffusionModel) -> tuple[torch.Tensor, torch.Tensor, Text]:
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    return noise, torch.tensor([10, 900]), model.encode_prompts(PROMPTS)


# --------------------------------------------------------------------------- against diffusers' own
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_images_as_the_pipeline(pipelines, kind):
    found = []
    for prediction_type in ("epsilon", "v_prediction"):
        model = with_scheduler(loaded(pipelines[kind]), prediction_type=prediction_type)
        for guidance, scheduler in ((5.0, None), (1.0, None), (5.0, "DDIMScheduler")):
            theirs = their_images(
                pipelines[kind], scheduler, guidance, prediction_type=prediction_type
            )
            ours = our_images(model, guidance, scheduler)
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        assert ours.std() > 0.01
        found.append(ours)
    assert (found[0] - found[1]).abs().max() > 1e-3
    asked = load(pipelines[kind], prediction_type="v_prediction")
    assert torch.equal(our_images(asked, scheduler="DDIMScheduler"), found[1])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_every_scheduler_gives_the_images_of_the_pipeline(pipelines, kind, scheduler):
    """Also those that draw noise of their own, and TCDScheduler, whose eta the pipeline sets."""
    theirs = their_images(pipelines[kind], scheduler)
    ours = our_images(loaded(pipelines[kind]), scheduler=scheduler)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_no_other_scheduler_is_accepted(random_pipeline):
    accepted = []
    for name in (name for name in dir(diffusers) if "Scheduler" in name):
        with contextlib.suppress(ValueError):
            made = build_scheduler(find_scheduler(name), random_pipeline.NOISE, {})
            if not is_flow(made):  # those are refused for a UNet, by another check
                accepted.append(name)
    assert accepted == SCHEDULERS


@pytest.mark.parametrize(
    ("kind", "scheduler", "clips"),
    [("sdxl", "DDIMScheduler", True), ("sd15", "DDIMScheduler", False)],
)
def test_a_checkpoint_that_says_that_latents_are_clipped(pipelines, kind, scheduler, clips):
    """The pipeline of SDXL believes it, that of Stable Diffusion 1 does not."""
    model = loaded(pipelines[kind])
    plain = our_images(model, scheduler=scheduler)
    ours = our_images(with_scheduler(model, clip_sample=True), scheduler=scheduler)
    theirs = their_images(pipelines[kind], scheduler, clip_sample=True)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert ((ours - plain).abs().max() > 1e-2) == clips


def test_a_text_encoder_that_reads_an_attention_mask(pipelines, pipeline_of):
    directory, plain = pipeline_of("sd15"), loaded(pipelines["sd15"])
    path = directory / "text_encoder/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_attention_mask": True}))
    model = load(directory)
    torch.testing.assert_close(our_images(model), their_images(directory), atol=1e-5, rtol=0)
    assert (our_images(model) - our_images(plain)).abs().max() > 1e-3
    assert model.fingerprint() != plain.fingerprint()


@pytest.mark.parametrize("scheduler", [None, "DDIMScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_scheduler_leaves_to_defaults(pipelines, kind, scheduler):
    """Old checkpoints do not name clip_sample and steps_offset: the images are those of checkpoints
    that do. With SDXL, diffusers' pipeline clips where the scheduler does by default.
    """
    model, path = loaded(pipelines[kind]), pipelines[kind] / "scheduler/scheduler_config.json"
    config = json.loads(path.read_text())
    del config["clip_sample"]
    if kind != "sdxl":  # whose pipeline believes the configuration
        del config["steps_offset"]
    found = our_images(with_scheduler(model, config), scheduler=scheduler)
    assert torch.equal(found, our_images(model, scheduler=scheduler))
    theirs = their_images(pipelines[kind], scheduler, config=config)
    clips = kind == "sdxl" and scheduler is not None
    assert ((found - theirs).abs().max() > 1e-2) == clips
    if not clips:
        torch.testing.assert_close(found, theirs, atol=1e-4, rtol=0)


def test_sdxl_without_zeros_for_the_empty_prompt(pipelines, pipeline_of):
    """Other SDXL checkpoints encode it; both cases differ, and each is the pipeline's."""
    directory = pipeline_of("sdxl")
    zeroed = loaded(pipelines["sdxl"])
    index = directory / "model_index.json"
    index.write_text(
        json.dumps(json.loads(index.read_text()) | {"force_zeros_for_empty_prompt": False})
    )
    model = load(directory)
    text = model.encode_prompts([""])
    assert text.hidden.abs().max() > 0
    assert not zeroed.encode_prompts([""]).hidden.any()
    assert not zeroed.encode_prompts([""]).pooled.any()
    torch.testing.assert_close(our_images(model), their_images(directory), atol=1e-4, rtol=0)
    assert model.fingerprint() != zeroed.fingerprint()


def test_the_empty_prompt_of_sdxl_as_its_encoders_make_it(pipelines):
    """Guidance reads zeros; what closed forms hold is the begin that every prompt has."""
    model = load(pipelines["sdxl"])
    assert not model.encode_prompts([""]).hidden.any()
    empty, other = model.encode_empty().hidden[0], model.encode_prompts(["a red ball"]).hidden[0]
    assert empty[0].norm() > 1
    torch.testing.assert_close(empty[0], other[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(empty[1], other[1], atol=1e-2)


def test_text_of_sdxl(pipelines):
    """Last but one layer of both encoders side by side; the projection of the second."""
    model = load(pipelines["sdxl"])
    text = model.encode_prompts(PROMPTS)
    assert (text.hidden.shape, text.pooled.shape) == ((2, 77, 80), (2, 48))
    one, two = model.text_encoders
    ids = [
        model.components.tokenizers[i](
            PROMPTS[0], padding="max_length", return_tensors="pt"
        ).input_ids
        for i in (0, 1)
    ]
    assert ids[0][0, -1] == len(model.components.tokenizers[0]) - 1
    assert ids[1][0, -1] == 0  # the second pads with "!"
    with torch.no_grad():
        first, second = (
            encoder(tokens, output_hidden_states=True)
            for encoder, tokens in zip((one, two), ids, strict=True)
        )
    torch.testing.assert_close(
        text.hidden[0, :, :32], first.hidden_states[2][0], atol=1e-5, rtol=0
    )  # of three layers
    torch.testing.assert_close(
        text.hidden[0, :, 32:], second.hidden_states[2][0], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(text.pooled[0], second.text_embeds[0], atol=1e-5, rtol=0)
    both = Text.cat([text[1:], text[:1]])
    assert torch.equal(both.hidden, text.hidden.flip(0))
    assert torch.equal(both.pooled, text.pooled.flip(0))


def test_encoded_prompts_are_kept_off_the_gpu(pipelines, monkeypatch):
    """A benchmark's thousands of them would fill it; the device "meta" stands for a GPU."""
    model = load(pipelines["sdxl"])
    model.encode_prompts(PROMPTS)
    monkeypatch.setattr(model.prompts, "_device", torch.device("meta"))
    text = model.encode_prompts(PROMPTS)
    assert (text.hidden.device.type, text.pooled.device.type) == ("meta", "meta")
    assert {kept.hidden.device.type for kept in model.prompts.encoded.values()} == {"cpu"}
    monkeypatch.setattr(model.prompts, "_encode", lambda prompts: pytest.fail("encoded again"))
    monkeypatch.setattr(Text, "to", lambda text, device: moved.append(str(device)) or text)
    moved: list[str] = []
    model.encode_prompts(PROMPTS)
    assert moved == ["meta"]
    monkeypatch.setattr(model.prompts, "_encode", lambda prompts: text)
    model.encode_prompts(["one", "two"])
    assert moved[1:] == ["cpu", "meta"]  # what is new goes there


def test_the_second_pooled_text_and_the_size_reach_the_unet(pipelines):
    model = load(pipelines["sdxl"])
    noisy, timesteps, text = batch_of(model)
    with torch.no_grad():
        plain = model.predict(noisy, timesteps, text)
        other = model.predict(
            noisy, timesteps, dataclasses.replace(text, pooled=text.pooled.flip(0))
        )
        larger = load_model(str(pipelines["sdxl"]), 128, Sampler(3, 5.0)).predict(
            noisy, timesteps, text
        )
    assert (plain - other).abs().max() > 1e-4
    assert (plain - larger).abs().max() > 1e-4


def test_text_of_stable_diffusion_2_is_the_normed_last_layer(pipelines):
    model = load(pipelines["sd21_base"])
    tokens = model.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        output = model.text_encoders[0](tokens)
    torch.testing.assert_close(
        model.encode_prompts(PROMPTS).hidden, output.last_hidden_state, atol=1e-5, rtol=0
    )
    assert model.encode_prompts(PROMPTS).pooled is None


# -------------------------------------------------------------------------------- the written files
def test_the_tokenizer_is_open_clips(random_pipeline, tmp_path):
    random_pipeline.write_tokenizer(tmp_path, "<|endoftext|>")
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs = open_clip.get_tokenizer("ViT-L-14")
    prompts = [
        *PROMPTS,
        "",
        "a PHOTO of Neil deGrasse Tyson, 4k!",
        "don't - it's 1920s   (Cubism)",
        "caf\u00e9 \u00fcber \u4f60\u597d",
    ]
    assert len(ours) == 49408
    for prompt in prompts:
        expected = theirs([prompt])[0]
        length = int(expected.argmax()) + 1
        assert ours(prompt).input_ids == expected[:length].tolist()


@pytest.mark.parametrize(
    ("kind", "millions", "heads", "width"),
    [
        ("sd15", 859.5, [8] * 4, 768),
        ("sd21_base", 865.9, [5, 10, 20, 20], 1024),
        ("sdxl", 2567.5, [5, 10, 20], 2048),
    ],
)
def test_the_full_size_is_that_of_the_published_unet(random_pipeline, kind, millions, heads, width):
    """Counted without memory; the published parameter counts, in millions."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**random_pipeline.unet_config(kind, tiny=False))
    assert sum(parameter.numel() for parameter in unet.parameters()) / 1e6 == pytest.approx(
        millions, abs=0.1
    )
    found = [
        block.attentions[0].transformer_blocks[0].attn2
        for block in unet.down_blocks
        if hasattr(block, "attentions")
    ]
    assert {layer.to_k.in_features for layer in found} == {width}
    assert (
        [layer.heads for layer in found] == heads[-len(found) :]
        if kind == "sdxl"
        else heads[: len(found)]
    )


def test_classifiers_fit_the_evaluator(random_pipeline, tmp_path):
    random_pipeline.make_classifiers(tmp_path, tiny=True)
    settings = read_conf("evaluator/unlearncanvas.yaml") | {
        "paths": {name: str(tmp_path / name) for name in ("style", "object")}
    }
    judge = Classifier(**settings)
    assert {domain: len(names) for domain, names in judge.labels().items()} == {
        "style": 51,
        "object": 20,
    }


# --------------------------------------------------------------------------------------- whole runs
@pytest.mark.parametrize(
    ("kind", "method", "reg"),
    [
        ("sd15", "conabl", "gradproj"),
        ("sd21_base", "conabl", "nullspace"),
        ("sdxl", "esd", "gradproj"),
        ("sdxl", "forward_kl", "none"),
    ],
)
def test_requests_through_cu_run(in_process, tmp_path, pipelines, kind, method, reg):
    """In the precision and with the settings that save memory."""
    chosen = (
        f"model={kind}",
        f"model.path={pipelines[kind]}",
        "model.resolution=64",
        "model.precision=bf16",
    )
    _, delta = run(
        in_process,
        tmp_path,
        [*overrides(method, reg), *chosen, "train.gradient_checkpointing=true", "train.steps=2"],
    )
    params = select_parameters(load(pipelines[kind]).denoiser, "kv_xattn")
    assert {name: tensor.shape for name, tensor in delta.items() if name in params} == {
        name: p.shape for name, p in params.items()
    }
    assert {tensor.dtype for tensor in delta.values()} == {torch.float32}
    assert max(tensor.abs().max() for tensor in delta.values()) > 0


def test_uce_moves_the_keys_of_sdxl_to_the_anchors(in_process, tmp_path, pipelines):
    """Its closed form is in the concatenated text."""
    chosen = (
        "model=sdxl",
        f"model.path={pipelines['sdxl']}",
        "model.resolution=64",
        "model.precision=fp32",
    )
    directory, _ = run(in_process, tmp_path, [*overrides("uce", "none"), *chosen])
    log = pd.read_csv(directory / "steps/01/training.csv").iloc[0]
    assert log["loss"] < 0.5 * log["before"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["speed", "oce", "dp", "mace_fusion"])
def test_closed_forms_move_the_values_of_sdxl(in_process, tmp_path, pipelines, method):
    """Also where the empty prompt, their anchor, is all zeros."""
    chosen = (
        "model=sdxl",
        f"model.path={pipelines['sdxl']}",
        "model.resolution=64",
        "model.precision=fp32",
    )
    directory, delta = run(in_process, tmp_path, [*overrides(method, "rece"), *chosen])
    assert max(tensor.abs().max() for tensor in delta.values()) > 1e-4
    record = json.loads((directory / "steps/02/step.json").read_text())["training"]
    unreached = record["regularizers"]["rece"]["unreached"]
    assert [len(values) for values in unreached.values()] == [2, 2]
    assert all(0 < value < 2 for values in unreached.values() for value in values)
