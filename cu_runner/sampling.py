"""Batched text-to-image generation with noise fixed per image.

Shapes: B batch, C latent channels, H W latent size, L tokens, D text width, S image side.
"""

import copy
import inspect
from collections.abc import Iterator

import torch
from torch import Tensor

from cu_runner.models import DiffusionModel
from cu_runner.seeding import derive_seed, image_noise


def generate(
    model: DiffusionModel, prompts: list[str], seeds: list[int], *, steps: int, guidance: float, batch_size: int
) -> Iterator[Tensor]:
    """Yield images batch by batch, in the order of the prompts.

    Args:
        prompts, seeds: one of each per image; together they fix its noise.
        steps: denoising steps of the model's own scheduler.
        guidance: classifier-free guidance scale (Ho & Salimans 2022); 1 turns it off.
        batch_size: images per forward pass (twice as many rows with guidance).

    Yields:
        [B, 3, S, S] float in 0..1, on the model's device.
    """
    for start in range(0, len(prompts), batch_size):
        latents = sample_latents(
            model, prompts[start : start + batch_size], seeds[start : start + batch_size], steps=steps, guidance=guidance
        )
        yield model.decode_latents(latents)


@torch.no_grad()
def sample_latents(model: DiffusionModel, prompts: list[str], seeds: list[int], *, steps: int, guidance: float) -> Tensor:
    """Denoise one batch; scaled latents [B, C, H, W]."""
    scheduler = copy.deepcopy(model.scheduler)  # a scheduler carries the state of one trajectory
    scheduler.set_timesteps(steps, device=model.device)
    latents = image_noise(prompts, seeds, model.latent_shape).to(model.device) * scheduler.init_noise_sigma
    text = model.encode_prompts(prompts)
    if guidance != 1:
        text = torch.cat([model.encode_prompts([""]).expand_as(text), text])
    extra = {}
    if "generator" in inspect.signature(scheduler.step).parameters:  # stochastic samplers draw per image too
        extra["generator"] = [
            torch.Generator().manual_seed(derive_seed("sampler", prompt, seed)) for prompt, seed in zip(prompts, seeds, strict=True)
        ]
    for timestep in scheduler.timesteps:
        rows = torch.cat([latents, latents]) if guidance != 1 else latents
        with model.autocast():
            output = model.unet(scheduler.scale_model_input(rows, timestep), timestep, text).sample.float()
        if guidance != 1:
            unconditional, conditional = output.chunk(2)
            output = unconditional + guidance * (conditional - unconditional)
        latents = scheduler.step(output, timestep, latents, **extra).prev_sample
    return latents
