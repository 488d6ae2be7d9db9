"""SD3, SD3.5, FLUX.1, PixArt and Sana in miniature, with random weights: the same images as
diffusers' own pipelines make.
"""

import functools
from pathlib import Path

import diffusers
import pytest
import torch

from cu_runner.models.architectures import pack
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.loading import load_model
from cu_runner.models.pipeline import make_pipeline
from cu_runner.models.sampling import generate
from cu_runner.runtime.seeding import image_noise
from cu_runner.schema.settings import Sampler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
KINDS = ("sd3_medium", "sd35_medium", "flux_dev", "flux_schnell", "pixart_sigma", "sana")
FLOWS = ("sd3_medium", "sd35_medium", "flux_dev", "flux_schnell", "sana")
PROMPTS, SEEDS = ["a painting of a dog in Van Gogh style", "Two Cats "], [3, 4]
STEPS = 4


@functools.cache
def loaded(directory: Path, **more) -> DiffusionModel:
    return load_model(str(directory), 64, Sampler(STEPS, 5.0), **more)


def our_images(model: DiffusionModel, guidance: float) -> torch.Tensor:
    return next(generate(model, PROMPTS, SEEDS, Sampler(STEPS, guidance), batch_size=2, label=""))


def drawn_by(
    pipe: diffusers.DiffusionPipeline, model: DiffusionModel, guidance: float
) -> torch.Tensor:
    """Images by a pipeline of diffusers, of the noise that the model's images begin with."""
    pipe.set_progress_bar_config(disable=True)
    noise = image_noise(PROMPTS, SEEDS, model.latent_shape)
    flux = isinstance(pipe, diffusers.FluxPipeline)
    binned = isinstance(pipe, diffusers.PixArtSigmaPipeline | diffusers.SanaPipeline)
    guided = flux and not pipe.transformer.config.guidance_embeds and guidance != 1
    more = {"true_cfg_scale": guidance, "negative_prompt": [""] * 2} if guided else {}
    more |= {"use_resolution_binning": False, "clean_caption": False} if binned else {}
    return pipe(
        PROMPTS,
        latents=pack(noise) if flux else noise,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        height=64,
        width=64,
        output_type="pt",
        **more,
    ).images


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("kind", KINDS)
def test_images_are_those_of_diffusers(transformers_on_disk, kind, guidance):
    directory = transformers_on_disk[kind]
    model = loaded(directory)
    theirs = drawn_by(diffusers.DiffusionPipeline.from_pretrained(directory), model, guidance)
    with torch.no_grad():
        # encoded as often as there are images, as pipelines do: the rounding is that of the batch
        model.prompts.encoded[""] = model.prompts._encode([""] * 2)[:1].to("cpu")
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
