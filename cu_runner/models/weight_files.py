"""Tensors from weight files.

safetensors hold nothing else; a pickle is read only where the user names it, and never runs code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cu_runner.models.quantised import plain_parts
from cu_runner.runtime.lazy import torch
from cu_runner.schema.errors import WeightFileError

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER = re.compile(r"lora_|\.lora\.|\.base_layer\.|hada_w|lokr_")
WRAPPERS = ("module.", "_orig_mod.")
# What layers count or compute by themselves; some versions of the libraries have saved it.
COMPUTED = ("num_batches_tracked", "position_ids", "relative_position_index", "inv_freq")
NESTS = ("model_state_dict", "state_dict")  # where checkpoints of training scripts keep the weights


def load_tensors(path: str | Path, allow_pickle: Sequence[str] = ()) -> dict[str, Tensor]:
    """Load the weights in a file by name, on the CPU and in the file's precision.

    Args:
        path: a `.safetensors` file, or a pickle (`.pth`, `.pt`, `.bin`, `.ckpt`) that allow_pickle
            names. Weights nested under `model_state_dict` or `state_dict` are found, and those
            that were saved under DataParallel or torch.compile.
        allow_pickle: the pickle files that may be read. They are read with torch's
            weights_only=True, whatever they hold.

    Raises:
        WeightFileError: the file is missing, damaged, a pickle that is not named, or holds anything
            but tensors.
    """
    file = Path(path).expanduser()
    check_pickle(file, allow_pickle)
    try:
        if file.suffix == ".safetensors":
            import safetensors.torch

            return unwrapped(safetensors.torch.load_file(file))
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged and refused files raise many types; the line says which
        reason = " ".join(str(error).split()).partition(" In PyTorch 2.6")[0][:300]
        raise WeightFileError(
            f"{path}: cannot be read as weights ({reason or type(error).__name__})"
        ) from error
    while isinstance(content, dict) and (
        nest := next((name for name in NESTS if name in content), None)
    ):
        content = content[nest]
    if not isinstance(content, dict) or not content:
        raise WeightFileError(
            f"{path}: holds no weights by name but a {type(content).__name__}; save a state_dict"
        )
    if others := [
        str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)
    ]:
        raise WeightFileError(
            f"{path}: {others[0]} is no tensor; save a state_dict, alone or under "
            f"{' or '.join(NESTS)}"
        )
    return unwrapped(content)


def unwrapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under the names of the network that DataParallel or compile() had wrapped."""
    for wrapper in WRAPPERS:
        if weights and all(name.startswith(wrapper) for name in weights):
            return unwrapped(
                {name.removeprefix(wrapper): tensor for name, tensor in weights.items()}
            )
    return weights


def check_pickle(file: str | Path, allow_pickle: Sequence[str]) -> None:
    """Raise WeightFileError unless the file is there, and is safetensors or in allow_pickle."""
    file = Path(file).expanduser()
    if not file.is_file():
        raise WeightFileError(f"{file}: no such file; give a weight file, best of all .safetensors")
    allowed = {Path(name).expanduser().resolve() for name in allow_pickle}
    if file.suffix != ".safetensors" and file.resolve() not in allowed:
        raise WeightFileError(
            f"{file}: is no .safetensors file, and other formats can carry code; convert it, or "
            f"allow this one with allow_pickle=[{file}]"
        )


def check_finite(place: str | Path, weights: Mapping[str, Tensor]) -> None:
    """Raise WeightFileError for a weight with infinities or NaNs. place: begins the line."""
    for name, tensor in weights.items():
        if not all(part.isfinite().all() for part in plain_parts(tensor)):
            raise WeightFileError(
                f"{place}: {name} is not finite (it holds infinity or NaN); the file is damaged, "
                "or its training diverged: give another one"
            )


def refuse_adapters(place: str | Path, names: Sequence[str]) -> None:
    """Raise WeightFileError if weights of an adapter are among the names."""
    if adapters := [name for name in names if ADAPTER.search(name)]:
        raise WeightFileError(
            f"{place}: holds weights of an adapter (LoRA), e.g. {adapters[0]}, which would not be "
            "read; merge them into the model (diffusers: fuse_lora and unload_lora_weights, peft: "
            "merge_and_unload) and save it again"
        )


def refuse_strangers(place: str | Path, names: Sequence[str]) -> None:
    """Raise WeightFileError for names of weights that no layer has taken, if there are any."""
    refuse_adapters(place, names)
    if strangers := [name for name in names if not name.endswith(COMPUTED)]:
        raise WeightFileError(
            f"{place}: holds {strangers[0]}, which no layer takes, and {len(strangers) - 1} more; "
            "the weights belong to another configuration, or something was saved with them: "
            "remove it"
        )
