"""SD3, SD3.5, FLUX.1, PixArt and Sana in miniature, with random weights: the same images as
diffusers' own pipelines make.
"""

import functools
import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch

from cu_runner.models.architectures import pack
from cu_runner.models.checkpoint_files import wanted_files
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.loading import load_model
from cu_runner.models.pipeline import make_pipeline
from cu_runner.models.prompt_encoders import SingleText
from cu_runner.models.sampling import generate
from cu_runner.runner.forecast import delta_bytes
from cu_runner.runtime.seeding import image_noise
from cu_runner.schema.errors import ModelError
from cu_runner.schema.settings import Sampler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
KINDS = (
    *("sd3_medium", "sd35_medium", "flux_dev", "flux_schnell"),
    *("pixart_sigma", "sana", "auraflow"),
)
FLOWS = ("sd3_medium", "sd35_medium", "flux_dev", "flux_schnell", "sana")
PROMPTS, SEEDS = ["a painting of a dog in Van Gogh style", "Two Cats "], [3, 4]
STEPS = 4


@functools.cache
def loaded(directory: Path, **more) -> DiffusionModel:
    return load_model(str(directory), 64, Sampler(STEPS, 5.0), **more)


def our_images(model: DiffusionModel, guidance: float) -> torch.Tensor:
    sampler = Sampler(STEPS, guidance)
    return torch.cat(list(generate(model, PROMPTS, SEEDS, sampler, batch_size=1, label="")))


def drawn_by(
    pipe: diffusers.DiffusionPipeline, model: DiffusionModel, guidance: float
) -> torch.Tensor:
    """Images by a pipeline of diffusers, one by one, of the noise that the model's begin with."""
    pipe.set_progress_bar_config(disable=True)
    noise = image_noise(PROMPTS, SEEDS, model.latent_shape)
    flux = isinstance(pipe, diffusers.FluxPipeline)
    binned = isinstance(pipe, diffusers.PixArtSigmaPipeline | diffusers.SanaPipeline)
    guided = flux and not pipe.transformer.config.guidance_embeds and guidance != 1
    more = {"true_cfg_scale": guidance, "negative_prompt": ""} if guided else {}
    more |= {"use_resolution_binning": False, "clean_caption": False} if binned else {}
    size = {"height": 64, "width": 64, "output_type": "pt"} | more
    rows = [
        pipe(prompt, latents=own, num_inference_steps=STEPS, guidance_scale=guidance, **size).images
        for prompt, own in zip(PROMPTS, (pack(noise) if flux else noise).split(1), strict=True)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("kind", KINDS)
def test_images_are_those_of_diffusers(transformers_on_disk, kind, guidance):
    directory = transformers_on_disk[kind]
    model = loaded(directory)
    theirs = drawn_by(diffusers.DiffusionPipeline.from_pretrained(directory), model, guidance)
    ours = our_images(model, guidance)
    if kind == "flux_schnell" and guidance != 1:  # two calls there, one of twice the rows here
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    else:
        assert torch.equal(ours, theirs)
    assert not torch.equal(ours[0], ours[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_pipeline_shares_the_networks_and_draws_alike(transformers_on_disk, kind):
    model = loaded(transformers_on_disk[kind])
    pipe = make_pipeline(model)
    assert pipe.transformer is model.denoiser
    assert torch.equal(our_images(model, 1.0), drawn_by(pipe, model, 1.0))


# ----------------------------------------------------------------------- one text encoder of CLIP
OTHERS = {f"{part}_{n}": None for part in ("text_encoder", "tokenizer") for n in (2, 3)}


@pytest.fixture(scope="module")
def single(random_pipeline, transformers_on_disk, tmp_path_factory) -> Path:
    """Blocks of SD3 that read the one CLIPTextModel of FLUX."""
    directory = tmp_path_factory.mktemp("single")
    for part in ("vae", "scheduler"):
        shutil.copytree(transformers_on_disk["sd3_medium"] / part, directory / part)
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(transformers_on_disk["flux_dev"] / part, directory / part)
    width = json.loads((directory / "text_encoder/config.json").read_text())["hidden_size"]
    config = dict(random_pipeline.transformer_of("sd3_medium", True).config)
    torch.manual_seed(1)
    transformer = diffusers.SD3Transformer2DModel.from_config(
        config | {"joint_attention_dim": width, "pooled_projection_dim": width}
    )
    transformer.save_pretrained(directory / "transformer")
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        **{name: [None, None] for name in OTHERS},
    }
    (directory / "model_index.json").write_text(json.dumps(index))
    return directory


def drawn_of_text(
    pipe: diffusers.StableDiffusion3Pipeline, model: DiffusionModel, guidance: float
) -> torch.Tensor:
    """As drawn_by(), of a pipeline that is given the text: its encoder alone computes it."""
    pipe.set_progress_bar_config(disable=True)

    def encoded(prompts: list[str]) -> dict[str, torch.Tensor]:
        size = pipe.tokenizer.model_max_length
        ids = pipe.tokenizer(
            prompts, padding="max_length", max_length=size, truncation=True, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            output = pipe.text_encoder(ids)
        return {"prompt_embeds": output[0], "pooled_prompt_embeds": output.pooler_output}

    empty = {f"negative_{name}": text for name, text in encoded([""]).items()}
    noise = image_noise(PROMPTS, SEEDS, model.latent_shape)
    size = {"height": 64, "width": 64, "output_type": "pt"}
    rows = [
        pipe(
            **encoded([prompt]),
            **empty,
            latents=own,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            **size,
        ).images
        for prompt, own in zip(PROMPTS, noise.split(1), strict=True)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_images_of_a_single_text_encoder_are_those_of_diffusers(single, guidance):
    model = loaded(single)
    assert isinstance(model.prompts, SingleText)
    theirs = drawn_of_text(
        diffusers.StableDiffusion3Pipeline.from_pretrained(single, **OTHERS), model, guidance
    )
    ours = our_images(model, guidance)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours[0], ours[1])


def test_the_plain_pipeline_of_a_single_text_encoder_draws_alike_and_comes_back(single, tmp_path):
    model = loaded(single)
    pipe = make_pipeline(model)
    assert isinstance(pipe, diffusers.StableDiffusion3Pipeline)
    assert pipe.text_encoder_2 is pipe.text_encoder_3 is None
    assert torch.equal(our_images(model, 1.0), drawn_of_text(pipe, model, 1.0))
    pipe.save_pretrained(tmp_path)
    assert load_model(str(tmp_path), 64, Sampler(STEPS, 5.0)).fingerprint() == model.fingerprint()


def test_a_single_text_encoder_masks_padding_where_its_configuration_says(single, tmp_path):
    masked = Path(shutil.copytree(single, tmp_path / "masked"))
    file = masked / "text_encoder/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_attention_mask": True}))
    model = loaded(masked)
    ids = model.tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        output = model.text_encoders[0](ids.input_ids, attention_mask=ids.attention_mask)
    text, plain = model.encode_prompts(PROMPTS), loaded(single).encode_prompts(PROMPTS)
    assert torch.equal(text.hidden, output.last_hidden_state)
    assert torch.equal(text.pooled, output.pooler_output)
    assert not torch.equal(text.hidden, plain.hidden)  # at the padding
    assert model.prompts.parts[0].length == model.num_tokens == 77


# ------------------------------------------------------------------------------------ shared parts
def without(directory: Path, place: Path, *parts: str) -> Path:
    """A copy that lacks parts."""
    shutil.copytree(directory, place, ignore=lambda folder, names: set(parts) & set(names))
    return place


T5_OF = {"sd3_medium": "_3", "flux_dev": "_2", "pixart_sigma": ""}


@pytest.mark.parametrize("kind", T5_OF)
def test_one_t5_is_shared_by_models_that_give_it_other_places(transformers_on_disk, tmp_path, kind):
    """All tiny ones of random_pipeline have other weights: the T5 is that of the shared one."""
    part = T5_OF[kind]
    lent = transformers_on_disk["flux_schnell"]
    whole = Path(shutil.copytree(transformers_on_disk[kind], tmp_path / "whole"))
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(whole / f"{name}{part}")
        shutil.copytree(lent / f"{name}_2", whole / f"{name}{part}")
    lacking = without(whole, tmp_path / "lacking", f"text_encoder{part}", f"tokenizer{part}")
    model = loaded(lacking, shared=str(lent))
    assert model.fingerprint() == loaded(whole).fingerprint()
    assert model.fingerprint() != loaded(transformers_on_disk[kind]).fingerprint()
    assert torch.equal(our_images(model, 1.0), our_images(loaded(whole), 1.0))


def test_a_transformer_and_its_scheduler_are_enough(single, tmp_path):
    bare = without(single, tmp_path / "bare", "vae", "text_encoder", "tokenizer")
    assert sorted(path.name for path in bare.iterdir()) == [
        "model_index.json",
        "scheduler",
        "transformer",
    ]
    model = loaded(bare, shared=str(single))
    assert model.fingerprint() == loaded(single).fingerprint()
    index = bare / "model_index.json"  # the parts need not be named either
    named = json.loads(index.read_text())
    for part in ("vae", "text_encoder", "tokenizer"):
        named[part] = [None, None]
    index.write_text(json.dumps(named))
    again = load_model(str(bare), 64, Sampler(STEPS, 5.0), shared=str(single))
    assert again.fingerprint() == model.fingerprint()
    kv = delta_bytes(str(single), None, "text_linear")
    assert delta_bytes(str(bare), None, "text_linear", str(single)) == kv > 0
    with pytest.raises(ModelError, match=r"^model\.shared: .*nowhere: no such file"):
        delta_bytes(str(bare), None, "text_linear", str(tmp_path / "nowhere"))
    assert delta_bytes(str(bare), None, "text_linear", "some/repository") == kv


def test_what_shared_parts_cannot_do_is_said(single, transformers_on_disk, pipelines, tmp_path):
    bare = without(single, tmp_path / "bare", "vae", "text_encoder", "tokenizer")
    t5_less = without(
        transformers_on_disk["pixart_sigma"], tmp_path / "less", "text_encoder", "tokenizer"
    )
    untold = without(single, tmp_path / "untold", "scheduler")
    no_tokenizer = without(single, tmp_path / "no_tokenizer", "tokenizer")
    no_vae = without(single, tmp_path / "no_vae", "vae")
    (tmp_path / "file.safetensors").write_bytes(b"")
    unet = str(pipelines["sd15"])
    for path, shared, said in (
        (single, single, r"^model\.shared=.*has text encoders and an autoencoder of its own; use"),
        (unet, single, r"^model\.shared=.*sd15 has no transformer, and a model with a UNet brings"),
        (bare, tmp_path / "nowhere", r"^model\.shared: .*nowhere: no such file or directory"),
        (bare, tmp_path / "file.safetensors", r"file\.safetensors: no readable model_index\.json"),
        (bare, no_vae, r"bare: the component vae is missing, and model\.shared=.*no_vae has none"),
        (bare, no_tokenizer, r"no_tokenizer: the component tokenizer is missing$"),
        (bare, None, r"bare: the component vae is missing$"),
        (untold, single, r"untold: the component scheduler is missing$"),
        (
            t5_less,
            single,
            r"less: the text encoders of PixArt.* are T5EncoderModel; found CLIPTextM"
            r"odel, with those of model\.shared$",
        ),
        (bare, pipelines["sd21_base"], r"bare: .* latent channels"),
    ):
        more = {} if shared is None else {"shared": str(shared)}
        with pytest.raises(ModelError, match=said) as error:
            load_model(str(path), 64, Sampler(STEPS, 5.0), **more)
        assert "\n" not in str(error.value)


def test_a_text_of_another_width_is_refused(single, transformers_on_disk, tmp_path):
    narrow = Path(shutil.copytree(single, tmp_path / "narrow"))
    shutil.rmtree(narrow / "transformer")
    config = dict(diffusers.SD3Transformer2DModel.load_config(single / "transformer"))
    wide = config["joint_attention_dim"] * 2
    for key, what in (("joint_attention_dim", "text"), ("pooled_projection_dim", "pooled text")):
        diffusers.SD3Transformer2DModel.from_config(config | {key: wide}).save_pretrained(
            narrow / "transformer"
        )
        with pytest.raises(ModelError, match=rf"transformer reads {what} of width {wide}, and"):
            load_model(str(narrow), 64, Sampler(STEPS, 5.0))


def test_the_shared_parts_of_a_hub_repository_come_without_its_denoiser():
    wanted = wanted_files("", denoiser=False)
    assert not any(part in pattern for pattern in wanted for part in ("unet", "transformer"))
    assert "vae/*model.safetensors" in wanted
    assert set(wanted) < set(wanted_files(""))
