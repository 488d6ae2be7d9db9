"""The original layout of Stable Diffusion 1: a diffusers directory's weights in one file, under the names that they had there."""

import re
from pathlib import Path

import safetensors.torch
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def original_unet_name(name: str, layers: int, levels: int) -> str:
    """The name of a UNet weight; layers: resnets of a down block. levels: blocks."""
    for new, old in ENDS.items():
        if name.startswith(f"{new}."):
            return name.replace(new, old, 1)
    side, block, kind, number, rest = re.fullmatch(
        r"(down|mid|up)_block[s]?\.?(\d+)?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name
    ).groups()
    number = int(number)
    if kind == "resnets":
        part, tail = rest.split(".", 1)
        rest = f"{RESNET[part]}.{tail}"
    if side == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * number}.{rest}"
    block, width = int(block), layers + 1
    if side == "down":
        if kind == "downsamplers":
            return f"input_blocks.{width * (block + 1)}.0.{rest.replace('conv', 'op')}"
        return f"input_blocks.{width * block + number + 1}.{int(kind == 'attentions')}.{rest}"
    if kind == "upsamplers":  # the first up block has no attention
        return f"output_blocks.{width * block + layers}.{1 if block == 0 else 2}.{rest}"
    return f"output_blocks.{width * block + number}.{int(kind == 'attentions')}.{rest}"


def original_vae_name(name: str, levels: int) -> str:
    """The name of an autoencoder weight."""
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm").replace("to_out.0", "proj_out")
    name = re.sub(r"\.to_([qkv])\.", r".\1.", name).replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda found: f"up.{levels - 1 - int(found[1])}.block", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{levels - 1 - int(found[1])}.upsample", name)


def original_weights(directory: Path) -> dict[str, Tensor]:
    """All weights of a Stable Diffusion 1 directory under their original names."""
    parts = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    unet, vae, text = (safetensors.torch.load_file(directory / part / f"{file}.safetensors") for part, file in parts.items())
    weights = {f"model.diffusion_model.{original_unet_name(name, 2, 4)}": tensor for name, tensor in unet.items()}
    for name, tensor in vae.items():
        old = original_vae_name(name, 4)
        # attention of the autoencoder was made of 1x1 convolutions
        weights[f"first_stage_model.{old}"] = tensor[..., None, None] if "attn_1" in old and tensor.ndim == 2 else tensor
    return weights | {f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}": t for name, t in text.items()}
