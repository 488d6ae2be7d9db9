"""The classes of network that denoise: how each is called, and what each of its weights reads.

A class of diffusers is one Architecture here. Nothing else in the package asks which it is.

Shapes: B batch, C latent channels, H W latent size, L tokens, D text width, P pooled text width.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cu_runner.models.text import Text
from cu_runner.runtime.lazy import nn, torch
from cu_runner.schema.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

NOTHING = re.compile(r"(?!)")
OF_A_UNET = re.compile(
    r"(down_blocks|mid_block|up_blocks|conv_(in|out|norm_out)|(time|add|class)_embedding)\."
)
Arguments = tuple[tuple[object, ...], dict[str, object]]  # of a forward pass, by place and by name


@dataclass(frozen=True)
class Roles:
    """What weights do, by patterns of their names.

    keys, values: they make keys and values of a text. attention: all of attention to a text. text:
    they read nothing but the text. linear: they are linear in what the text encoder puts out;
    biases may stand beside them.
    """

    keys: re.Pattern[str] = NOTHING
    values: re.Pattern[str] = NOTHING
    attention: re.Pattern[str] = NOTHING
    text: re.Pattern[str] = NOTHING
    linear: re.Pattern[str] = NOTHING


def roles(keys: str, values: str, attention: str, text: str, linear: str) -> Roles:
    """Compile patterns, each searched in the whole name of a weight."""
    return Roles(*map(re.compile, (keys, values, attention, text, linear)))


@dataclass(frozen=True)
class Given:
    """What a forward pass is given.

    config: of the network. noisy: [B, C, H, W]. timesteps: [B], or one for all, on the scale of the
    scheduler. resolution: of the images, in pixels. guidance: of networks that guide themselves.
    """

    config: Any
    noisy: Tensor
    timesteps: Tensor
    text: Text
    resolution: int
    guidance: float

    @property
    def each(self) -> Tensor:
        """Return the timesteps, one for each row."""
        return self.timesteps.expand(len(self.noisy))


class Architecture(ABC):
    """How a class of network is called.

    folder: of its weights in a diffusers directory, and its name in a pipeline. word: for messages.
    roles: what its weights do. multiple: the side of its latents is one of this number.
    remembers_text: keys and values depend on the text alone, so that they can be kept from one step
    to the next. text_modules: parts of the names of modules that read the text or attend to it.
    """

    folder = word = "transformer"
    roles = Roles()
    multiple = 1
    remembers_text = False
    text_modules: tuple[str, ...] = ()

    def channels(self, config: Mapping[str, Any]) -> int:
        """Return C, the channels of the latents."""
        return int(config["in_channels"])

    def guides_itself(self, config: Mapping[str, Any]) -> bool:
        """Tell whether guidance is an input of the network, in place of a second pass."""
        return False

    @abstractmethod
    def arguments(self, given: Given) -> Arguments:
        """Return the arguments of a forward pass."""

    def latents(self, output: Tensor, noisy: Tensor) -> Tensor:
        """Return what a forward pass predicts as [B, C, H, W], of what the network puts out.

        Of twice as many channels the second half is a learned variance (Nichol & Dhariwal 2021,
        Sec. 3.1), which no sampler here reads.
        """
        channels = noisy.shape[1]
        return output[:, :channels] if output.shape[1] == 2 * channels else output


class TextUNet(Architecture):
    """UNet2DConditionModel: Stable Diffusion 1, 2 and XL."""

    folder, word = "unet", "UNet"
    roles = roles(
        keys=r"\.attn2\.to_k\.weight$",
        values=r"\.attn2\.to_v\.weight$",
        attention=r"\.attn2\.",
        text=r"\.attn2\.to_[kv]\.weight$",
        linear=r"\.attn2\.to_[kv]\.weight$",
    )
    remembers_text = True

    def arguments(self, given: Given) -> Arguments:
        """Return latents, timesteps and hidden states; of SDXL the pooled text and sizes too."""
        more: dict[str, object] = {"encoder_hidden_states": given.text.hidden}
        if given.text.pooled is not None:
            # original size, crop corner, target size: an image that was never resized or cropped
            # (Podell et al. 2023, Sec. 2.2)
            size = [given.resolution, given.resolution, 0, 0, given.resolution, given.resolution]
            more["added_cond_kwargs"] = {
                "text_embeds": given.text.pooled,
                "time_ids": given.noisy.new_tensor([size] * len(given.text)),
            }
        return (given.noisy, given.timesteps), more


class ClassUNet(Architecture):
    """UNet2DModel with class embeddings, on pixels."""

    folder, word = "unet", "UNet"

    def arguments(self, given: Given) -> Arguments:
        """Return latents, timesteps and class labels."""
        return (given.noisy, given.timesteps), {"class_labels": given.text.hidden}


class PixArt(Architecture):
    """PixArtTransformer2DModel: cross-attention to T5's output behind a projection."""

    roles = roles(
        keys=r"\.attn2\.to_k\.weight$",
        values=r"\.attn2\.to_v\.weight$",
        attention=r"\.attn2\.",
        text=r"\.attn2\.to_[kv]\.|^caption_projection\.",
        linear=r"^caption_projection\.linear_1\.weight$",
    )
    multiple = 2
    text_modules = ("attn2", "caption_projection")

    def arguments(self, given: Given) -> Arguments:
        """Return latents, hidden states, their mask and timesteps."""
        return (given.noisy,), {
            "encoder_hidden_states": given.text.hidden,
            "encoder_attention_mask": given.text.mask,
            "timestep": given.each,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }


class Sana(PixArt):
    """SanaTransformer2DModel: cross-attention to Gemma's output behind a projection and a norm."""

    multiple = 1

    def arguments(self, given: Given) -> Arguments:
        """Return latents, hidden states, their mask and timesteps on the network's own scale."""
        return (given.noisy,), {
            "encoder_hidden_states": given.text.hidden,
            "encoder_attention_mask": given.text.mask,
            "timestep": given.each * given.config.timestep_scale,
        }


JOINT = roles(
    keys=r"\.attn\.add_k_proj\.weight$",
    values=r"\.attn\.add_v_proj\.weight$",
    attention=r"\.attn\.(add_[qkv]_proj|to_add_out|norm_added_[qk])\.",
    text=(
        r"\.attn\.(add_[qkv]_proj|to_add_out|norm_added_[qk])\.|\.ff_context\."
        r"|^context_embedder\.|^time_text_embed\.text_embedder\."
    ),
    linear=r"^context_embedder\.weight$",
)


JOINT_MODULES = (
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("ff_context", "context_embedder", "text_embedder"),
)


class StableDiffusion3(Architecture):
    """SD3Transformer2DModel: text and image attend to one another, with a stream of weights each.

    Keys and values of the text are made from its modulated stream: they are linear in the text
    encoders' output in no block.
    """

    roles = JOINT
    multiple = 2
    text_modules = JOINT_MODULES

    def arguments(self, given: Given) -> Arguments:
        """Return latents, hidden states, pooled text and timesteps."""
        return (), {
            "hidden_states": given.noisy,
            "encoder_hidden_states": given.text.hidden,
            "pooled_projections": given.text.pooled,
            "timestep": given.each,
        }


class Flux(Architecture):
    """FluxTransformer2DModel: joint attention, latents packed two by two, guidance distilled.

    In single_transformer_blocks text and image share their weights: these are of no text group.
    """

    roles = JOINT
    multiple = 2
    text_modules = JOINT_MODULES

    def channels(self, config: Mapping[str, Any]) -> int:
        """Return C: four of the network's channels are one patch of 2 x 2."""
        return int(config["in_channels"]) // 4

    def guides_itself(self, config: Mapping[str, Any]) -> bool:
        """Tell whether guidance was distilled into the network (FLUX.1-dev)."""
        return bool(config["guidance_embeds"])

    def arguments(self, given: Given) -> Arguments:
        """Return packed latents, both texts, timesteps in 0..1, positions, and guidance."""
        height, width = given.noisy.shape[2] // 2, given.noisy.shape[3] // 2
        places = torch.zeros(height, width, 3, device=given.noisy.device, dtype=given.noisy.dtype)
        places[..., 1] += torch.arange(height, device=given.noisy.device)[:, None]
        places[..., 2] += torch.arange(width, device=given.noisy.device)[None, :]
        guided = self.guides_itself(given.config)
        return (), {
            "hidden_states": pack(given.noisy),
            "timestep": given.each.to(given.noisy.dtype) / 1000,
            "guidance": given.noisy.new_full((len(given.noisy),), given.guidance)
            if guided
            else None,
            "pooled_projections": given.text.pooled,
            "encoder_hidden_states": given.text.hidden,
            "txt_ids": given.noisy.new_zeros(given.text.hidden.shape[1], 3),
            "img_ids": places.reshape(height * width, 3),
        }

    def latents(self, output: Tensor, noisy: Tensor) -> Tensor:
        """Return packed predictions [B, H W / 4, 4 C] as [B, C, H, W]."""
        return unpack(output, noisy.shape[2], noisy.shape[3])


class AuraFlow(Architecture):
    """AuraFlowTransformer2DModel: joint attention to T5's output, then blocks that share weights.

    Padding has hidden states of zero, which the denoiser attends to.
    """

    roles = JOINT
    multiple = 2
    text_modules = JOINT_MODULES

    def arguments(self, given: Given) -> Arguments:
        """Return latents, hidden states and timesteps in 0..1."""
        return (given.noisy,), {
            "encoder_hidden_states": given.text.hidden,
            "timestep": (given.timesteps / 1000).expand(len(given.noisy)).to(given.noisy.dtype),
        }


def pack(latents: Tensor) -> Tensor:
    """Return latents [B, C, H, W] as patches of 2 x 2, [B, H W / 4, 4 C]."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * 4)


def unpack(patches: Tensor, height: int, width: int) -> Tensor:
    """Return patches [B, H W / 4, 4 C] as latents [B, C, H, W]."""
    batch, _, channels = patches.shape
    parts = patches.view(batch, height // 2, width // 2, channels // 4, 2, 2)
    return parts.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, height, width)


ARCHITECTURES: dict[str, Architecture] = {
    "UNet2DConditionModel": TextUNet(),
    "UNet2DModel": ClassUNet(),
    "PixArtTransformer2DModel": PixArt(),
    "SanaTransformer2DModel": Sana(),
    "SD3Transformer2DModel": StableDiffusion3(),
    "FluxTransformer2DModel": Flux(),
    "AuraFlowTransformer2DModel": AuraFlow(),
}


def folder_of(names: Iterable[str]) -> str:
    """Return the folder of the denoiser that has weights of these names."""
    return TextUNet.folder if any(map(OF_A_UNET.match, names)) else Architecture.folder


def architecture_of(denoiser: nn.Module) -> Architecture:
    """Return how a network of diffusers is called. Raises ModelError for an unknown class."""
    name = type(denoiser).__name__
    if name not in ARCHITECTURES:
        raise ModelError(f"{name} is no known denoiser; known are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]
