"""Gates before what reads the text: a change that counts only where a text is heard.

What a UNet's keys and values, and one layer of a transformer, make of the text is y = W x, x the
text at one position of a prompt. With gates it is

    y = W x + V (s * 1[s > 1/2]),   s = D x

The rows of D [N, D] are directions, one for each gate, the same in every layer; the columns of V
[out, N] are what a layer adds where its gate is open. Where all gates are shut, y is W x to the
last bit. A gate whose direction is zero is shut for every text.

To use a step in plain diffusers: load_gates(pipeline.unet, "steps/12/delta.safetensors"), or of
pipeline.transformer.

Shapes: B batch, L tokens, D text width, N gates, out attention width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cu_runner.models.text_readers import TextReaders
from cu_runner.models.weight_files import load_tensors
from cu_runner.schema.errors import ModelError

OPEN = 0.5  # a gate is open where it hears more than this
DIRECTIONS, VALUES = "gate_directions", "gate_values"


class GatedLinear(nn.Linear):
    """Keys or values with gates. gate_directions: [N, D], shared. gate_values: [out, N]."""

    gate_directions: nn.Parameter
    gate_values: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """Return keys or values [B, L, out] of a text [B, L, D]."""
        heard = F.linear(input, self.gate_directions.to(input))
        opened = heard * (heard > OPEN)
        return super().forward(input) + F.linear(opened, self.gate_values.to(input))


def add_gates(denoiser: nn.Module, number: int) -> dict[str, nn.Parameter]:
    """Give a UNet or transformer so many gates, all of them shut; return their weights by name.

    One that has as many keeps them.

    Raises:
        ModelError: it has another number, or keys and values that no gate can be put before.
    """
    layers = [layer for layer in TextReaders(denoiser).layers() if isinstance(layer, nn.Linear)]
    if not layers:
        raise ModelError("gates: the denoiser has no plain linear layers by which a text enters")
    if len(layers) < len(TextReaders(denoiser).layers()):
        raise ModelError("gates: layers by which the text enters are not plain linear ones")
    first = layers[0]
    if isinstance(first, GatedLinear):
        if (there := len(first.gate_directions)) != number:
            raise ModelError(f"gates: the denoiser has {there} of them, not {number}")
        return gate_weights(denoiser)
    shared = shut(first.weight, number, first.in_features)
    for layer in layers:
        layer.__class__ = GatedLinear
        layer.register_parameter(DIRECTIONS, shared)
        layer.register_parameter(VALUES, shut(first.weight, layer.out_features, number))
    return gate_weights(denoiser)


def shut(like: Tensor, *shape: int) -> nn.Parameter:
    """Return zeros in fp32, on the device of a weight."""
    zeros = torch.zeros(*shape, device=like.device, dtype=torch.float32)
    return nn.Parameter(zeros, requires_grad=False)


def gate_weights(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """Return the directions, which all layers share, and the values of every layer, by name."""
    ends = (f".{DIRECTIONS}", f".{VALUES}")
    return {name: weight for name, weight in denoiser.named_parameters() if name.endswith(ends)}


def load_gates(denoiser: nn.Module, path: str) -> None:
    """Give a UNet or transformer of diffusers the gates of a step's delta.safetensors.

    Raises:
        ModelError: the file holds no gates, or those of another model.
        WeightFileError: it cannot be read.
    """
    found = load_tensors(path)
    directions = [tensor for name, tensor in found.items() if name.endswith(DIRECTIONS)]
    if len(directions) != 1:
        raise ModelError(f"{path}: holds no gates; give delta.safetensors of a run with reg=gate")
    weights = add_gates(denoiser, len(directions[0]))
    if found.keys() != weights.keys() or any(
        found[name].shape != weight.shape for name, weight in weights.items()
    ):
        raise ModelError(f"{path}: holds gates of another model")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(found[name])
