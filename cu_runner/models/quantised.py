"""Frozen weights in eight bits, by the quantisers of diffusers and transformers (torchao).

A quantised weight is an int8 tensor with a scale for every row; it is computed with as it is.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cu_runner.runtime.lazy import diffusers, nn, transformers
from cu_runner.schema.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor


def int8_config(kind: type[nn.Module], kept: Sequence[str]) -> Any:
    """Return the quantization_config of from_pretrained.

    Args:
        kind: a model class of diffusers or transformers.
        kept: parts of the names of modules that are not quantised: those that may be trained.

    Raises:
        ModelError: torchao is not installed.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ModelError(
            "model.quantised=int8: needs the package torchao; pip install 'cu-runner[quantised]'"
        )
    # it advises bfloat16 for everything; what is trained stays fp32, and autocast chooses the rest
    logging.getLogger("diffusers.quantizers.torchao.torchao_quantizer").setLevel(logging.ERROR)
    weights_alone = importlib.import_module("torchao.quantization").Int8WeightOnlyConfig()
    library = diffusers if issubclass(kind, diffusers.ModelMixin) else transformers
    return library.TorchAoConfig(weights_alone, modules_to_not_convert=list(kept) or None)


def is_quantised(tensor: Tensor) -> bool:
    """Tell whether a weight is held in eight bits."""
    return hasattr(tensor, "__tensor_flatten__")


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a plain tensor itself, and of a quantised one its integers and scales."""
    if not is_quantised(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    yield from (getattr(tensor, name) for name in names)
