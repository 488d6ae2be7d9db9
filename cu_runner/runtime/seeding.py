"""Random numbers that depend on what they are for, never on what was drawn before.

No generator state has to be saved.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cu_runner.runtime.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def derive_seed(*parts: str | int) -> int:
    """Derive a 63-bit seed from sha256 over the parts."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class RandomSource:
    """CPU generators named by (seed, request, purpose, step).

    The same names give the same numbers on every device.
    """

    seed: int
    request: int

    def generator(self, purpose: str, step: int = 0) -> torch.Generator:
        """Return a fresh generator for a purpose and a step."""
        return torch.Generator().manual_seed(derive_seed(self.seed, self.request, purpose, step))


def image_noise(prompts: list[str], seeds: list[int], shape: tuple[int, int, int]) -> Tensor:
    """Draw the initial noise [B, C, H, W] of B images.

    Each is from its own (prompt, seed), whatever the batch, device or request.
    """
    rows = [
        torch.randn(
            shape, generator=torch.Generator().manual_seed(derive_seed("image", prompt, seed))
        )
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    return torch.stack(rows)
