"""What is done inside a text encoder for the length of a pass, by hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from cu_runner.runtime.lazy import F, nn, torch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def replacing(spans: list[slice], vectors: Tensor) -> Callable[..., Tensor]:
    """Return a hook that puts vectors [tokens, width] into the places of each prompt."""

    def hook(module: object, inputs: object, output: Tensor) -> Tensor:
        rows = []
        for row, span in zip(output, spans, strict=True):
            rows.append(torch.cat([row[: span.start], vectors.to(row), row[span.stop :]]))
        return torch.stack(rows)

    return hook


def embedding_layer(encoder: PreTrainedModel) -> nn.Embedding:
    """Return the layer by which a text encoder looks its tokens up; T5 has one beside its own."""
    stack = getattr(encoder, "encoder", None)
    found = getattr(stack, "embed_tokens", None)
    layer: nn.Embedding = encoder.get_input_embeddings() if found is None else found
    return layer


@contextlib.contextmanager
def projecting_rows(encoder: PreTrainedModel) -> Iterator[None]:
    """Let an encoder project its pooled texts one by one.

    Of a few together the last bit depends on how many there are, and a run that is resumed does not
    encode the same prompts together.
    """

    def hook(layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return torch.cat([F.linear(row, layer.weight, layer.bias) for row in inputs[0].split(1)])

    handle = encoder.text_projection.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
