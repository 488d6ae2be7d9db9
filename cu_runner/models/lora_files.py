"""A LoRA file of any tool as a change of a denoiser's weights: s B A, s = alpha / rank.

The names of diffusers, of peft and of kohya's scripts are put into one form by diffusers itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cu_runner.models.architectures import architecture_of
from cu_runner.runtime.lazy import diffusers, nn, torch
from cu_runner.schema.errors import WeightFileError, first_line

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

LORA = re.compile(r"\.?lora_|\.lora\.|lora_(A|B|up|down)")
OTHERS = re.compile(r"dora_scale|magnitude_vector|lokr_|hada_|\.oft_|\.glora_")
HEADER = "lora_adapter_metadata"  # of a safetensors file: the settings of its training, as JSON
UNET = "StableDiffusionXLLoraLoaderMixin"  # of Stable Diffusion 1 and 2 too
LOADERS = {  # what of diffusers reads a LoRA's names, by the class of the denoiser
    "UNet2DConditionModel": UNET,
    "UNet2DModel": UNET,
    "SD3Transformer2DModel": "SD3LoraLoaderMixin",
    "FluxTransformer2DModel": "FluxLoraLoaderMixin",
    "SanaTransformer2DModel": "SanaLoraLoaderMixin",
    "AuraFlowTransformer2DModel": "AuraFlowLoraLoaderMixin",
}
ENDS = {".lora_A.weight": "down", ".lora_B.weight": "up"}


def is_lora(names: list[str]) -> bool:
    """Tell whether weights of these names are those of a LoRA, or of something like it."""
    return any(LORA.search(name) or OTHERS.search(name) for name in names)


def lora_change(
    file: Path, weights: dict[str, Tensor], settings: Mapping[str, str], denoiser: nn.Module
) -> dict[str, Tensor]:
    """Return what a LoRA adds to the weights of a denoiser, by name, in fp32.

    Args:
        file: for messages. weights: in it. settings: its header.
        denoiser: that it is made for.

    Raises:
        WeightFileError: it changes other networks too, is of another form, or does not fit.
    """
    if others := [name for name in weights if OTHERS.search(name)]:
        raise WeightFileError(
            f"{file}: {others[0]} is of another form than LoRA (DoRA, LoKr, LoHa, ...); fuse it "
            "into the model by the tool that made it, and give that"
        )
    convert = diffusers.utils.state_dict_utils.convert_unet_state_dict_to_peft
    word, prefix = architecture_of(denoiser).word, f"{architecture_of(denoiser).folder}."
    require_loader(denoiser, str(file))
    try:
        found, alphas = named_by_diffusers(weights, denoiser)
    except Exception as error:  # of names that diffusers does not know: many types
        raise WeightFileError(
            f"{file}: its names are those of no LoRA that diffusers reads ({first_line(error)})"
        ) from error
    if beside := [name for name in found if not name.startswith(prefix)]:
        raise WeightFileError(
            f"{file}: changes more than the {word} (e.g. {beside[0]}); fuse it into the model by "
            "the tool that made it, and give that as model.path"
        )
    own = {name.removeprefix(prefix): weight for name, weight in convert(found).items()}
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, weight in own.items():
        end = next((end for end in ENDS if name.endswith(end)), None)
        if end is None:
            raise WeightFileError(f"{file}: {name} is no part of a LoRA")
        pairs.setdefault(name.removesuffix(end), {})[ENDS[end]] = weight.float()
    header = json.loads(settings.get(HEADER, "{}"))
    known = {name.removeprefix(prefix): value for name, value in header.items()}
    # of attention layers the name of an alpha is that of A
    given = {
        name.removeprefix(prefix).removesuffix(".alpha"): value for name, value in alphas.items()
    }
    scales = {name.removesuffix(".lora_A.weight"): each for name, each in convert(given).items()}
    params = dict(denoiser.named_parameters())
    change = {}
    for module, pair in pairs.items():
        name = f"{module}.weight"
        if len(pair) < 2 or name not in params:
            raise WeightFileError(f"{file}: {module} does not fit the base model's {word}")
        rank = len(pair["down"])
        alpha = float(scales.get(module, alpha_of(known, module, rank, file)))
        product = pair["up"].flatten(1).double() @ pair["down"].flatten(1).double()
        if product.numel() != params[name].numel() or len(product) != len(params[name]):
            raise WeightFileError(f"{file}: {module} has another shape than in the base model")
        change[name] = (alpha / rank * product).float().reshape(params[name].shape)
    return change


def require_loader(denoiser: nn.Module, what: str) -> None:
    """Raise WeightFileError for a denoiser of which diffusers reads no LoRA.

    Args:
        what: needs that, for the error's text.
    """
    kind = type(denoiser).__name__
    if kind not in LOADERS:
        raise WeightFileError(
            f"{what}: diffusers reads no LoRA of {kind}; a diffusers directory holds such a change"
        )


def named_by_diffusers(
    weights: Mapping[str, Tensor], denoiser: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a LoRA's weights by diffusers' names, and its alphas where they are no weights."""
    kind = type(denoiser).__name__
    read, own = getattr(diffusers.loaders, LOADERS[kind]).lora_state_dict, dict(weights)
    if LOADERS[kind] == UNET:
        found, alphas = read(own, unet_config=denoiser.config)
    elif kind == "FluxTransformer2DModel":
        found, alphas = read(own, return_alphas=True)
    else:
        found, alphas = read(own), {}
    return found, alphas or {}


def alpha_of(known: Mapping[str, Any], module: str, rank: int, file: Path) -> float:
    """Return the alpha of a layer by the header of a file; without one it is the rank.

    Raises:
        WeightFileError: the header asks for another scale than alpha / rank.
    """
    for setting in ("use_rslora", "use_dora"):
        if known.get(setting):
            raise WeightFileError(f"{file}: was trained with {setting}, which is not known here")
    patterns = known.get("alpha_pattern") or {}
    return float(patterns.get(module, known.get("lora_alpha", rank)))


def settings_in(file: Path) -> dict[str, str]:
    """Return the header of a safetensors file; empty of another one."""
    import safetensors

    if file.suffix != ".safetensors":
        return {}
    with safetensors.safe_open(file, framework="pt") as opened:
        return dict(opened.metadata() or {})


def same_up_to_rounding(one: Tensor, other: Tensor) -> bool:
    """Tell whether a tensor is another one, or that rounded to fp16 or bf16."""
    if one.numel() != other.numel():
        return False
    mine, theirs = one.cpu().float().flatten(), other.cpu().float().flatten()
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    return any(torch.equal(mine.to(kind), theirs.to(kind)) for kind in kinds)
