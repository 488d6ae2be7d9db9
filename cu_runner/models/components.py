"""The parts of a pipeline, as they are read from a checkpoint, and what they are to a model.

One class per kind of pipeline: what makes a text of a prompt, what an image is to the UNet, and
how schedulers are made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from cu_runner.models.architectures import architecture_of
from cu_runner.models.class_names import ClassNames
from cu_runner.models.hashing import describe, describe_tokenizer
from cu_runner.models.image_space import Autoencoder, ImageSpace, Pixels
from cu_runner.models.prompt_encoders import ClipText
from cu_runner.models.schedulers import DEFAULTED
from cu_runner.models.text import TextSource
from cu_runner.runtime.lazy import diffusers, nn, torch, transformers
from cu_runner.schema.errors import ModelError


class Checkpoint(Protocol):
    """What a model is made of, whatever its kind."""

    @property
    def denoiser(self) -> diffusers.ModelMixin:
        """Return the network that denoises: a UNet or a transformer."""

    @property
    def scheduler(self) -> diffusers.SchedulerMixin:
        """Return the scheduler of the checkpoint."""

    def with_denoiser(self, denoiser: nn.Module) -> Checkpoint:
        """Return the same parts with another denoiser."""

    def text_source(self, device: torch.device) -> TextSource:
        """Make what turns prompts into what the UNet reads."""

    def image_space(self, *, slicing: bool) -> ImageSpace:
        """Make what turns images into what the UNet denoises; slicing: one by one."""

    def scheduler_changes(self, config: Mapping[str, Any]) -> dict[str, object]:
        """Return what is changed of a scheduler's configuration before images are sampled."""

    def timestep_arguments(
        self, scheduler: diffusers.SchedulerMixin, steps: int, latent_side: int
    ) -> dict[str, object]:
        """Return what set_timesteps() of a scheduler needs beside the number of steps."""

    def pipeline(self, scheduler: diffusers.SchedulerMixin) -> diffusers.DiffusionPipeline:
        """Return the pipeline of diffusers that shares the parts, with this scheduler."""

    def configuration(self) -> dict[str, object]:
        """Return what of the components is no weight and changes images."""


@dataclass(frozen=True)
class Components:
    """The parts of a latent model that reads prompts: Stable Diffusion 1 and 2, SDXL.

    text_encoders, tokenizers: one of each, or SDXL's two. zero_empty_prompt: the text of the empty
    prompt is zeros (force_zeros_for_empty_prompt of SDXL's model_index.json). tokens: how many of a
    prompt T5 or Gemma reads; None is as many as diffusers' pipeline lets them.
    """

    denoiser: diffusers.ModelMixin
    vae: diffusers.AutoencoderKL
    text_encoders: tuple[transformers.PreTrainedModel, ...]
    tokenizers: tuple[transformers.PreTrainedTokenizerBase, ...]
    scheduler: diffusers.SchedulerMixin
    zero_empty_prompt: bool = False
    tokens: int | None = None

    @property
    def is_sdxl(self) -> bool:
        """Tell whether there are SDXL's two text encoders."""
        return len(self.text_encoders) == 2

    def with_denoiser(self, denoiser: nn.Module) -> Components:
        """Return the same parts with another denoiser."""
        return replace(self, denoiser=denoiser)

    def text_source(self, device: torch.device) -> TextSource:
        """Return the text encoders with their tokenizers."""
        return ClipText(self, device)

    def image_space(self, *, slicing: bool) -> ImageSpace:
        """Return the autoencoder.

        That of SDXL overflows in fp16; others leave force_upcast at its default, and their pipeline
        does not read it.
        """
        fp32 = bool(self.vae.config.force_upcast) and self.is_sdxl
        return Autoencoder(self.vae, slicing=slicing, fp32=fp32)

    def scheduler_changes(self, config: Mapping[str, Any]) -> dict[str, object]:
        """Return the changes that diffusers' pipelines make.

        Stable Diffusion 1 and 2 offset their timesteps by one and do not clip latents to -1..1,
        whatever a checkpoint says. SDXL believes its checkpoint. One that leaves clip_sample out is
        not clipped either, where the pipeline would with some schedulers: SDXL was trained without.
        """
        left_out = "clip_sample" not in config or "clip_sample" in config.get(DEFAULTED, [])
        changes: dict[str, object] = {}
        if left_out or not self.is_sdxl:
            changes["clip_sample"] = False
        return changes if self.is_sdxl else changes | {"steps_offset": 1}

    def timestep_arguments(
        self, scheduler: diffusers.SchedulerMixin, steps: int, latent_side: int
    ) -> dict[str, object]:
        """Return nothing."""
        return {}

    def pipeline(self, scheduler: diffusers.SchedulerMixin) -> diffusers.DiffusionPipeline:
        """Return a StableDiffusionPipeline, or of two text encoders that of SDXL."""
        shared = {
            "vae": self.vae,
            "text_encoder": self.text_encoders[0],
            "tokenizer": self.tokenizers[0],
            "unet": self.denoiser,
            "scheduler": scheduler,
            "feature_extractor": None,
            "image_encoder": None,
        }
        if self.is_sdxl:
            return diffusers.StableDiffusionXLPipeline(
                **shared,
                text_encoder_2=self.text_encoders[1],
                tokenizer_2=self.tokenizers[1],
                force_zeros_for_empty_prompt=self.zero_empty_prompt,
                add_watermarker=False,
            )
        return diffusers.StableDiffusionPipeline(
            **shared, safety_checker=None, requires_safety_checker=False
        )

    def configuration(self) -> dict[str, object]:
        """Return the configurations of all parts."""
        return {
            architecture_of(self.denoiser).folder: describe(self.denoiser, self.denoiser.config),
            "vae": describe(self.vae, self.vae.config),
            "text_encoders": [
                describe(encoder, encoder.config.to_dict()) for encoder in self.text_encoders
            ],
            "tokenizers": [describe_tokenizer(tokenizer) for tokenizer in self.tokenizers],
            "scheduler": describe(self.scheduler, self.scheduler.config),
            "zero_empty_prompt": self.zero_empty_prompt,
            **({} if self.tokens is None else {"tokens": self.tokens}),
            # since pooled texts are projected one by one, their last bits are others
            **({"projects": "one by one"} if self.is_sdxl else {}),
        }


@dataclass(frozen=True)
class ClassComponents:
    """The parts of a pixel model with classes: a UNet2DModel and a scheduler, as in DDPMPipeline.

    classes: names in the order of the UNet's class embeddings. null: whether these have one class
    more, the null class.
    """

    denoiser: diffusers.UNet2DModel
    scheduler: diffusers.SchedulerMixin
    classes: tuple[str, ...]
    null: bool

    def with_denoiser(self, denoiser: nn.Module) -> ClassComponents:
        """Return the same parts with another UNet."""
        return replace(self, denoiser=denoiser)

    def text_source(self, device: torch.device) -> TextSource:
        """Return the names of the classes."""
        return ClassNames(self.classes, self.null, device)

    def image_space(self, *, slicing: bool) -> ImageSpace:
        """Return the pixels; there is nothing to be sliced."""
        return Pixels(self.denoiser)

    def scheduler_changes(self, config: Mapping[str, Any]) -> dict[str, object]:
        """Return no changes: pixels are clipped, and timesteps spaced, as the checkpoint says."""
        return {}

    def timestep_arguments(
        self, scheduler: diffusers.SchedulerMixin, steps: int, latent_side: int
    ) -> dict[str, object]:
        """Return nothing."""
        return {}

    def pipeline(self, scheduler: diffusers.SchedulerMixin) -> diffusers.DiffusionPipeline:
        """Return a DDPMPipeline, which asks for no class: it is for saving."""
        return diffusers.DDPMPipeline(self.denoiser, scheduler)

    def configuration(self) -> dict[str, object]:
        """Return the configurations of both parts, and the classes."""
        return {
            "unet": describe(self.denoiser, self.denoiser.config),
            "scheduler": describe(self.scheduler, self.scheduler.config),
            "classes": list(self.classes),
            "null": self.null,
        }


def latent_parts(parts: Checkpoint, what: str) -> Components:
    """Return the parts of a latent model that reads prompts.

    Args:
        what: needs one, for the error's text.

    Raises:
        ModelError: it is a pixel model with classes.
    """
    if not isinstance(parts, Components):
        raise ModelError(
            f"{what}: the model is a pixel model with classes, without an autoencoder and a text "
            "encoder"
        )
    return parts
