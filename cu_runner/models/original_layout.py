"""The original layout of Stable Diffusion and SDXL: all weights in one file, under older names.

The names are those that diffusers' from_single_file reads (its loaders/single_file_utils.py goes
the other way); they follow from the configurations, so that a network of another shape has some
too. Whether a file reads back as what was written is for whoever writes one to find out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cu_runner.models.components import Components
from cu_runner.runtime.lazy import diffusers, torch, transformers

if TYPE_CHECKING:
    from torch import Tensor

UNET = "model.diffusion_model."
VAE = "first_stage_model."
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
# of the autoencoder, in this order
VAE_WORDS = (
    ("mid_block.attentions.0", "mid.attn_1"),
    ("group_norm", "norm"),
    ("to_out.0", "proj_out"),
    ("to_q.", "q."),
    ("to_k.", "k."),
    ("to_v.", "v."),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
)
CLIP_WORDS = (
    ("self_attn", "attn"),
    ("layer_norm", "ln_"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)
PLACE = re.compile(
    r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)"
)
LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.*)")


def unet_names(unet: diffusers.UNet2DConditionModel) -> dict[str, str]:
    """Return the original name of every weight of a UNet, by its name in diffusers.

    Raises:
        ValueError: a weight has none, or the layout knows no such network.
    """
    layers = unet.config.layers_per_block
    if not isinstance(layers, int):
        raise ValueError(f"layers_per_block={layers}: its blocks are not all as deep")
    names = list(unet.state_dict())
    attending = {
        int(found[1])
        for name in names
        if (found := re.match(r"up_blocks\.(\d+)\.attentions", name))
    }
    return {name: UNET + original_unet_name(name, layers, attending) for name in names}


def original_unet_name(name: str, layers: int, attending: set[int]) -> str:
    """Return the original name of a UNet weight, without the prefix.

    Args:
        layers: residual layers of a down block.
        attending: the up blocks that have attention.
    """
    for new, old in ENDS.items():
        if name.startswith(f"{new}."):
            return old + name.removeprefix(new)
    found = PLACE.fullmatch(name)
    if found is None:
        raise ValueError(f"{name}: the layout has no such weight")
    side, block, kind, place, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if kind == "resnets":
        part, _, tail = rest.partition(".")
        rest = f"{RESNET[part]}.{tail}"
    attends = int(kind == "attentions")
    if side == "mid":
        return f"middle_block.{1 if attends else 2 * place}.{rest}"
    first = (layers + 1) * block
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op{rest.removeprefix('conv')}"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.{1 + (block in attending)}.{rest}"
    if side == "down":
        return f"input_blocks.{first + place + 1}.{attends}.{rest}"
    return f"output_blocks.{first + place}.{attends}.{rest}"


def original_vae_name(name: str, levels: int) -> str:
    """Return the original name of an autoencoder's weight, without the prefix.

    Args:
        levels: how many up blocks there are; the original counts them from the other end.
    """
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda at: f"mid.block_{int(at[1]) + 1}", name)
    for new, old in VAE_WORDS:
        name = name.replace(new, old)
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    for new, old in (("resnets", "block"), ("upsamplers.0", "upsample")):
        name = re.sub(
            rf"up_blocks\.(\d+)\.{re.escape(new)}",
            lambda at, old=old: f"up.{levels - 1 - int(at[1])}.{old}",  # type: ignore[misc]
            name,
        )
    return VAE + name


def vae_weights(vae: diffusers.AutoencoderKL) -> dict[str, Tensor]:
    """Return an autoencoder's weights; its attention was made of 1x1 convolutions [C, C, 1, 1]."""
    levels = len(vae.config.up_block_types)
    found = {}
    for name, weight in vae.state_dict().items():
        old = original_vae_name(name, levels)
        found[old] = weight[..., None, None] if "attn_1" in old and weight.ndim == 2 else weight
    return found


def text_weights(encoder: transformers.PreTrainedModel, place: str) -> dict[str, Tensor]:
    """Return a text encoder's weights: CLIP's under its own names, open_clip's under those of it.

    Args:
        place: where the file keeps it: "cond_stage_model" or "conditioner.embedders.N".
    """
    own = {name.removeprefix("text_model."): each for name, each in encoder.state_dict().items()}
    if encoder.config.hidden_act == "quick_gelu":  # OpenAI's CLIP; open_clip's have gelu
        return {f"{place}.transformer.text_model.{name}": each for name, each in own.items()}
    found = {
        "positional_embedding": own["embeddings.position_embedding.weight"],
        "token_embedding.weight": own["embeddings.token_embedding.weight"],
        "ln_final.weight": own["final_layer_norm.weight"],
        "ln_final.bias": own["final_layer_norm.bias"],
    }
    if "text_projection.weight" in own:
        found["text_projection"] = own["text_projection.weight"].T
    for name in own:
        if layer := LAYER.fullmatch(name):
            rest, weight = layer[2], own[name]
            if "k_proj" in rest or "v_proj" in rest:
                continue
            if "q_proj" in rest:  # queries, keys and values are one matrix
                parts = [own[name.replace("q_proj", f"{kind}_proj")] for kind in "qkv"]
                weight, rest = torch.cat(parts), rest.replace("q_proj.", "in_proj_")
            for new, old in CLIP_WORDS:
                rest = rest.replace(new, old)
            found[f"transformer.resblocks.{layer[1]}.{rest}"] = weight
    return {f"{place}.model.{name}": weight for name, weight in found.items()}


def original_weights(parts: Components) -> dict[str, Tensor]:
    """Return all weights of a model under their original names.

    Raises:
        ValueError: the layout knows no such UNet.
    """
    names, weights = unet_names(parts.denoiser), parts.denoiser.state_dict()
    found = {names[name]: weight for name, weight in weights.items()}
    found |= vae_weights(parts.vae)
    several = len(parts.text_encoders) > 1
    for number, encoder in enumerate(parts.text_encoders):
        place = f"conditioner.embedders.{number}" if several else "cond_stage_model"
        found |= text_weights(encoder, place)
    return found | markers(parts.scheduler.config)


def markers(noise: Mapping[str, object]) -> dict[str, Tensor]:
    """Return the empty weights by which a file tells other programs how its model was trained."""
    said = {
        "v_pred": noise.get("prediction_type") == "v_prediction",
        "ztsnr": noise.get("rescale_betas_zero_snr") is True,
    }
    return {name: torch.zeros(0) for name, holds in said.items() if holds}
