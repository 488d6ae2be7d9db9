"""The parts of a text-to-image pipeline, as they are read from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from cu_runner.runtime.lazy import diffusers, transformers


@dataclass(frozen=True)
class Components:
    """The parts of a pipeline.

    text_encoders, tokenizers: one of each, or SDXL's two. zero_empty_prompt: the text of the empty
    prompt is zeros (force_zeros_for_empty_prompt of SDXL's model_index.json).
    """

    unet: diffusers.UNet2DConditionModel
    vae: diffusers.AutoencoderKL
    text_encoders: tuple[transformers.PreTrainedModel, ...]
    tokenizers: tuple[transformers.PreTrainedTokenizerBase, ...]
    scheduler: diffusers.SchedulerMixin
    zero_empty_prompt: bool = False
