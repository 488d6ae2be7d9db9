"""A request trained as a LoRA: every matrix moves by a product of two thin ones (Hu et al. 2021).

Shapes: out, in of a matrix (of a convolution, in times its window), r the rank.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cu_runner.request.scope import Scope
from cu_runner.runtime.lazy import nn, torch, without_gradients

if TYPE_CHECKING:
    from torch import Tensor


class Adapters:
    """W = W_start + (alpha / r) B A of the matrices that a request trains; the rest stays.

    The optimiser moves A [r, in] and B [out, r]. The gradient of W, penalties among it, becomes
    theirs by the chain rule: dL/dB = (alpha / r) G A^T, dL/dA = (alpha / r) B^T G. So losses and
    penalties are of the weights themselves, as everywhere, and so is the drift.
    """

    def __init__(self, scope: Scope, rank: int, alpha: float) -> None:
        """Begin with B = 0, and A drawn as peft draws it: uniform in +-1/sqrt(in).

        Raises:
            ValueError: none of the weights is a matrix.
        """
        self._scale = alpha / rank
        self._weights = {
            name: parameter for name, parameter in scope.params.items() if parameter.ndim > 1
        }
        if not self._weights:
            raise ValueError(
                "train.lora_rank: none of the weights of method.params is a matrix; use null"
            )
        self._start = {name: scope.start[name].flatten(1) for name in self._weights}
        self.pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        generator = scope.rng.generator("lora", 0)
        for name, start in self._start.items():
            rows, columns = start.shape
            drawn = torch.rand(rank, columns, generator=generator).to(start)
            self.pairs[name] = (
                nn.Parameter((2 * drawn - 1) / math.sqrt(columns)),
                nn.Parameter(start.new_zeros(rows, rank)),
            )

    @property
    def trained(self) -> list[nn.Parameter]:
        """Return all A and B."""
        return [matrix for pair in self.pairs.values() for matrix in pair]

    @without_gradients
    def take_gradients(self) -> None:
        """Make of the gradients of the weights those of A and B."""
        for name, (down, up) in self.pairs.items():
            gradient = self._weights[name].grad
            if gradient is None:
                down.grad = up.grad = None
                continue
            flat = gradient.flatten(1)
            up.grad = self._scale * flat @ down.T
            down.grad = self._scale * up.T @ flat

    @without_gradients
    def put(self) -> None:
        """Set the weights to what A and B make of them."""
        for name, (down, up) in self.pairs.items():
            moved = self._start[name] + self._scale * up @ down
            self._weights[name].copy_(moved.view_as(self._weights[name]))

    def state(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return A and B by the name of their weight."""
        return {name: (down.detach(), up.detach()) for name, (down, up) in self.pairs.items()}

    @without_gradients
    def restore(self, state: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Take what state() gave."""
        for name, own in self.pairs.items():
            for matrix, value in zip(own, state[name], strict=True):
                matrix.copy_(value)
