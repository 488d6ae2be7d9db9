"""The original layout of Stable Diffusion 1 and SDXL: a diffusers directory's weights in one file,
under their names there.
"""

import re
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

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
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def original_unet_name(name: str, layers: int, attending: set[int]) -> str:
    """The name of a UNet weight; layers: resnets of a down block. attending: up blocks with
    attention.
    """
    for new, old in ENDS.items():
        if name.startswith(f"{new}."):
            return name.replace(new, old, 1)
    side, block, kind, number, rest = re.fullmatch(
        r"(down|mid|up)_block[s]?\.?(\d+)?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)",
        name,
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
    if kind == "upsamplers":
        return f"output_blocks.{width * block + layers}.{1 + (block in attending)}.{rest}"
    return f"output_blocks.{width * block + number}.{int(kind == 'attentions')}.{rest}"


def original_vae_name(name: str, levels: int) -> str:
    """The name of an autoencoder weight."""
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = (
        name.replace("mid_block.attentions.0", "mid.attn_1")
        .replace("group_norm", "norm")
        .replace("to_out.0", "proj_out")
    )
    name = (
        re.sub(r"\.to_([qkv])\.", r".\1.", name)
        .replace("conv_norm_out", "norm_out")
        .replace("conv_shortcut", "nin_shortcut")
    )
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(
        r"up_blocks\.(\d)\.resnets", lambda found: f"up.{levels - 1 - int(found[1])}.block", name
    )
    return re.sub(
        r"up_blocks\.(\d)\.upsamplers\.0",
        lambda found: f"up.{levels - 1 - int(found[1])}.upsample",
        name,
    )


def original_open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """SDXL's second text encoder under the names of open_clip, which has queries, keys and values
    in one matrix.
    """
    found = {"positional_embedding": weights["text_model.embeddings.position_embedding.weight"]}
    found["text_projection"] = weights["text_projection.weight"].T.contiguous()
    found["token_embedding.weight"] = weights["text_model.embeddings.token_embedding.weight"]
    for name, tensor in weights.items():
        if name.startswith("text_model.final_layer_norm."):
            found[f"ln_final.{name.rsplit('.', 1)[1]}"] = tensor
        if layer := re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.*)", name):
            rest = (
                layer[2]
                .replace("layer_norm", "ln_")
                .replace("mlp.fc1", "mlp.c_fc")
                .replace("mlp.fc2", "mlp.c_proj")
            )
            if part := re.fullmatch(r"self_attn\.q_proj\.(weight|bias)", rest):
                tensor = torch.cat(
                    [weights[name.replace("q_proj", f"{kind}_proj")] for kind in "qkv"]
                )
                rest = f"attn.in_proj_{part[1]}"
            if "k_proj" not in rest and "v_proj" not in rest:
                found[f"transformer.resblocks.{layer[1]}.{rest.replace('self_attn', 'attn')}"] = (
                    tensor
                )
    return found


def original_weights(directory: Path) -> dict[str, Tensor]:
    """All weights of a Stable Diffusion 1 or SDXL directory under their original names."""
    parts = {
        "unet": "diffusion_pytorch_model",
        "vae": "diffusion_pytorch_model",
        "text_encoder": "model",
        "text_encoder_2": "model",
    }
    files = {part: directory / part / f"{stem}.safetensors" for part, stem in parts.items()}
    unet, vae, *texts = (
        safetensors.torch.load_file(file) for file in files.values() if file.exists()
    )
    attending = {
        int(found[1]) for name in unet if (found := re.match(r"up_blocks\.(\d)\.attentions", name))
    }
    weights = {
        f"model.diffusion_model.{original_unet_name(name, 1, attending)}": tensor
        for name, tensor in unet.items()
    }
    for name, tensor in vae.items():
        old = original_vae_name(name, 4)
        # attention of the autoencoder was made of 1x1 convolutions
        weights[f"first_stage_model.{old}"] = (
            tensor[..., None, None] if "attn_1" in old and tensor.ndim == 2 else tensor
        )
    first = "conditioner.embedders.0" if len(texts) == 2 else "cond_stage_model"
    weights |= {
        f"{first}.transformer.text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in texts[0].items()
    }
    for second in texts[1:]:
        weights |= {
            f"conditioner.embedders.1.model.{name}": tensor
            for name, tensor in original_open_clip(second).items()
        }
    return weights
