"""The parts of a pipeline with a transformer: SD3, FLUX.1, PixArt, Sana, AuraFlow."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cu_runner.models.architectures import architecture_of
from cu_runner.models.components import Components
from cu_runner.models.image_space import Autoencoder, DeepAutoencoder, ImageSpace
from cu_runner.models.process import is_flow
from cu_runner.models.prompt_encoders import (
    FluxText,
    GemmaText,
    JointText,
    MaskedText,
    PlainT5Text,
    PromptEncoder,
    SingleText,
    instruction,
)
from cu_runner.models.text import TextSource
from cu_runner.runtime.lazy import diffusers, nn, torch

# Pipelines of diffusers, by the class of their denoiser.
TEXTS: dict[str, type[PromptEncoder]] = {
    "SD3Transformer2DModel": JointText,
    "FluxTransformer2DModel": FluxText,
    "PixArtTransformer2DModel": MaskedText,
    "SanaTransformer2DModel": GemmaText,
    "AuraFlowTransformer2DModel": PlainT5Text,
}
PIPELINES = {
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "FluxTransformer2DModel": "FluxPipeline",
    "PixArtTransformer2DModel": "PixArtSigmaPipeline",
    "SanaTransformer2DModel": "SanaPipeline",
    "AuraFlowTransformer2DModel": "AuraFlowPipeline",
}
# The largest shift of sampling, where the scheduler names none; of the pipelines.
MAX_SHIFT = {"SD3Transformer2DModel": 1.16, "FluxTransformer2DModel": 1.15}


@dataclass(frozen=True)
class TransformerComponents(Components):
    """As Components, of a latent model with a transformer.

    text_encoders, tokenizers: those that there are, in the order of their names in a directory.
    """

    @property
    def kind(self) -> str:
        """Return the class of the denoiser, by name."""
        return type(self.denoiser).__name__

    @property
    def is_sdxl(self) -> bool:
        """Return False: two text encoders are not SDXL's."""
        return False

    def with_denoiser(self, denoiser: nn.Module) -> TransformerComponents:
        """Return the same parts with another denoiser."""
        return replace(self, denoiser=denoiser)

    def text_source(self, device: torch.device) -> TextSource:
        """Return the text encoders with their tokenizers."""
        single = self.kind == "SD3Transformer2DModel" and len(self.text_encoders) == 1
        return (SingleText if single else TEXTS[self.kind])(self, device)

    def image_space(self, *, slicing: bool) -> ImageSpace:
        """Return the autoencoder, which decodes in fp32 where its file says so."""
        deep = isinstance(self.vae, diffusers.AutoencoderDC)
        made = DeepAutoencoder if deep else Autoencoder
        fp32 = bool(self.vae.config.get("force_upcast", False))
        multiple = architecture_of(self.denoiser).multiple
        return made(self.vae, slicing=slicing, fp32=fp32, multiple=multiple)

    def scheduler_changes(self, config: Mapping[str, Any]) -> dict[str, object]:
        """Return no changes: these pipelines believe their checkpoint."""
        return {}

    def timestep_arguments(
        self, scheduler: diffusers.SchedulerMixin, steps: int, latent_side: int
    ) -> dict[str, object]:
        """Return what the pipelines give: a shift by the number of patches where it is asked for.

        FLUX's start at a noise level of 1 and end at 1 / steps, before they are shifted.
        """
        config = scheduler.config
        more: dict[str, object] = {}
        taken = inspect.signature(scheduler.set_timesteps).parameters
        if is_flow(scheduler) and config.get("use_dynamic_shifting") and "mu" in taken:
            more["mu"] = shift_of(config, (latent_side // 2) ** 2, MAX_SHIFT.get(self.kind, 1.15))
        if self.kind == "FluxTransformer2DModel" and "sigmas" in taken:
            import numpy as np

            more["sigmas"] = np.linspace(1.0, 1 / steps, steps)
        return more

    def configuration(self) -> dict[str, object]:
        """Return the configurations of all parts, and Sana's instruction: it is diffusers'."""
        said = {"instruction": instruction()} if TEXTS[self.kind] is GemmaText else {}
        return super().configuration() | said

    def pipeline(self, scheduler: diffusers.SchedulerMixin) -> diffusers.DiffusionPipeline:
        """Return the pipeline of its denoiser; what this model lacks is None in it."""
        made = getattr(diffusers, PIPELINES[self.kind])
        parts: dict[str, object] = {
            "transformer": self.denoiser,
            "vae": self.vae,
            "scheduler": scheduler,
        }
        for number, suffix in enumerate(("", "_2", "_3")):
            here = number < len(self.text_encoders)
            parts[f"text_encoder{suffix}"] = self.text_encoders[number] if here else None
            parts[f"tokenizer{suffix}"] = self.tokenizers[number] if here else None
        taken = inspect.signature(made.__init__).parameters
        pipeline: diffusers.DiffusionPipeline = made(
            **{name: part for name, part in parts.items() if name in taken}
        )
        return pipeline


def shift_of(config: Mapping[str, Any], patches: int, largest: float) -> float:
    """Return mu, linear in the number of patches   (Esser et al. 2024, Sec. 5.3.2)."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, most = config.get("base_shift", 0.5), config.get("max_shift", largest)
    slope = (most - base) / (high - low)
    return float(patches * slope + (base - slope * low))
