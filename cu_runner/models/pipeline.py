"""A model as a plain pipeline of diffusers, which needs nothing of this package.

The pipeline shares the networks of the model: what is done to one is done to the other.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.gates import GatedLinear
from cu_runner.models.quantised import is_quantised
from cu_runner.models.sampling import make_scheduler
from cu_runner.runtime.lazy import diffusers
from cu_runner.schema.errors import ModelError


def make_pipeline(model: DiffusionModel) -> diffusers.DiffusionPipeline:
    """Return the pipeline of the model's kind: a StableDiffusionPipeline, -XLPipeline, -3Pipeline,
    FluxPipeline, PixArtSigmaPipeline, SanaPipeline or AuraFlowPipeline; of a pixel model with
    classes a DDPMPipeline, which is for saving: it asks for no class.

    With the blocks of Stable Diffusion 3 and a single text encoder it is a pipeline that lacks the
    others: it cannot encode prompts, and takes the model's encode_prompts() as prompt_embeds and
    pooled_prompt_embeds, and that of the empty prompt as those of negative_prompt. diffusers reads
    it back with text_encoder_2=None and so on, whatever stands in its model_index.json.

    It has no safety checker, the scheduler of the model's own sampler, and the weights as they are
    in the model. Called with the noise of an image (`latents`), and the sampler's steps and
    guidance, it makes the image that the model makes: on a CPU in fp32 to the last bit.

    Raises:
        ModelError: the model has gates, which no pipeline of diffusers has, or weights in eight
            bits.
    """
    if has_gates(model):
        raise ModelError(
            "the model has gates before its keys and values (reg=gate), which diffusers does not "
            "know; put the gates into a pipeline by cu_runner.models.gates.load_gates"
        )
    if any(map(is_quantised, model.denoiser.parameters())):
        raise ModelError(
            "the model holds weights in eight bits, which are not what it was made of; use "
            "model.quantised=null"
        )
    return model.components.pipeline(plain_scheduler(model))


def plain_scheduler(model: DiffusionModel) -> diffusers.SchedulerMixin:
    """Return the scheduler of the model's sampler, without settings that its class does not take.

    make_scheduler() sets them for any class.
    """
    made = make_scheduler(model, model.sampler)
    own = model.scheduler.config
    taken = inspect.signature(type(made)).parameters
    config = {name: value for name, value in made.config.items() if name in taken or name in own}
    scheduler: diffusers.SchedulerMixin = type(made).from_config(config)
    return scheduler


def has_gates(model: DiffusionModel) -> bool:
    """Tell whether gates stand before keys and values (cu_runner.models.gates)."""
    return any(isinstance(layer, GatedLinear) for layer in model.denoiser.modules())


def save_configurations(pipeline: diffusers.DiffusionPipeline, directory: Path) -> None:
    """Write a pipeline as save_pretrained does, but without weights: what a single file lacks."""
    pipeline.save_config(directory)
    for name, part in pipeline.components.items():
        place = directory / name
        if name in ("unet", "vae"):
            part.save_config(place)
        elif name.startswith("text_encoder"):
            part.config.save_pretrained(place)
        elif part is not None:
            part.save_pretrained(place)
