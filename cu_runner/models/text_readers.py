"""The layers of a denoiser that the text enters by, and what is done to them for a while.

Those of a UNet make keys and values of cross-attention.

Shapes: B batch, L tokens, out attention width.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from cu_runner.models.architectures import architecture_of
from cu_runner.runtime.lazy import nn, torch

if TYPE_CHECKING:
    from torch import Tensor


class Remembered:
    """A function of one tensor that is not computed again for the tensor that it saw last."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function
        self._seen: Tensor | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor is not self._seen:
            self._seen, self._result = tensor, self._function(tensor)
        return self._result


def detach_first_token(layer: nn.Module, inputs: object, output: Tensor) -> Tensor:
    """Return keys or values [B, L, out] without gradient at token 0; a forward hook."""
    return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1)


class TextReaders:
    """Those of one denoiser. detaches_begin: whether it runs inside begin_token_detached()."""

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser = denoiser
        self._linear = architecture_of(denoiser).roles.linear
        self.detaches_begin = False

    def layers(self) -> list[nn.Module]:
        """Return the layers, in the order of the network."""
        modules = self._denoiser.named_modules()
        return [layer for name, layer in modules if self._linear.search(f"{name}.weight")]

    def digests(self, text: Tensor) -> list[str]:
        """Return, for each row of a text [B, L, D], the sha256 of what all layers make of it."""
        found = [hashlib.sha256() for _ in text]
        for layer in self.layers():
            for digest, row in zip(found, layer(text).float().cpu(), strict=True):
                digest.update(row.contiguous().numpy().tobytes())
        return [digest.hexdigest() for digest in found]

    @contextlib.contextmanager
    def remembering(self) -> Iterator[None]:
        """Compute nothing again for the text that was read last."""
        layers = self.layers()
        for layer in layers:
            layer.forward = Remembered(layer.forward)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    @contextlib.contextmanager
    def begin_token_detached(self, detached: bool) -> Iterator[None]:
        """Let no gradient through at token 0; nested, the outermost decides."""
        if not detached or self.detaches_begin:
            yield
            return
        hooks = [layer.register_forward_hook(detach_first_token) for layer in self.layers()]
        self.detaches_begin = True
        try:
            yield
        finally:
            self.detaches_begin = False
            for hook in hooks:
                hook.remove()
