"""A change of weights as a LoRA: for each matrix the two thin ones of its largest directions.

By the singular values s_1 >= s_2 >= ... of a change D = U S V^T, the closest change of rank r is
B A with B = U_r S_r^1/2 and A = S_r^1/2 V_r^T, and what it leaves out has the squared norm
sum_{i > r} s_i^2 (Eckart & Young 1936). A convolution's kernel [out, in, k, k] counts as the matrix
[out, in k k]. Biases and normalisations have no such form.

Shapes: A [rank, in] or [rank, in, k, k], B [out, rank] or [out, rank, 1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cu_runner.runtime.lazy import torch
from cu_runner.runtime.progress import Progress
from cu_runner.schema.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

KEEP = 0.999  # of the squared norm of a change
# What hundreds of steps in fp32 add to a change by rounding, as a part of the weight's norm: a
# rounding is 2^-24 of an entry, and they add up like a random walk.
ROUNDING = 2.0**-18


@dataclass(frozen=True)
class LowRank:
    """A change of weights in two thin matrices each, of one rank for all.

    factors: A and B by the name of the weight. kept: part of the squared norm of the whole change
    that they hold. exact: whether what they leave out is no more than rounding.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    rank: int
    kept: float
    exact: bool

    def state_dict(self, part: str = "unet") -> dict[str, Tensor]:
        """Return the weights as diffusers' load_lora_weights reads them.

        Args:
            part: of the pipeline, that they change: unet or transformer.
        """
        found = {}
        for name, (down, up) in self.factors.items():
            module = f"{part}.{name.removesuffix('.weight')}"
            found[f"{module}.lora_A.weight"] = down
            found[f"{module}.lora_B.weight"] = up
        return found


def low_rank(
    change: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    *,
    rank: int | None = None,
    keep: float | None = None,
) -> LowRank:
    """Return a change in the form of a LoRA.

    With neither a rank nor a part to keep, it is exact where that takes no more numbers than the
    change itself, and else keeps KEEP. Matrices of a smaller rank are filled with zeros: one rank
    for all is what every program reads alike.

    Args:
        change: by name of the weight; what is zero is left out.
        weights: of the untouched model, which tell what is rounding.
        rank: of all matrices.
        keep: part of the squared norm that is kept at least, in the smallest rank that does.

    Raises:
        ModelError: the change is zero, or biases and normalisations hold too much of it.
    """
    moved = {name: each.cpu().double() for name, each in change.items() if each.any()}
    if not moved:
        raise ModelError("the weights are those of the base model; a LoRA would change nothing")
    matrices = {name: each.flatten(1) for name, each in moved.items() if each.ndim in (2, 4)}
    total = math.fsum(each.square().sum().item() for each in moved.values())
    parts = {}
    with Progress("lora", len(matrices), "matrix") as bar:
        for name, matrix in matrices.items():
            parts[name] = torch.linalg.svd(matrix, full_matrices=False)
            bar.advance()
    rest = total - math.fsum(each.square().sum().item() for each in matrices.values())
    squares = {name: values.square() for name, (_, values, _) in parts.items()}
    limits = {name: (ROUNDING * weights[name].double().norm().item()) ** 2 for name in parts}
    needed = max((rank_of(squares[name], limits[name]) for name in parts), default=0)
    small = needed * sum(sum(each.shape) for each in matrices.values()) <= sum(
        each.numel() for each in matrices.values()
    )
    if rank is None and keep is None and small and not rest:
        rank = needed
    if rank is None:
        rank = rank_that_keeps(squares, total, keep or KEEP)
    kept = math.fsum(each[:rank].sum().item() for each in squares.values()) / total
    factors = {
        name: thin(left, values, right, rank, moved[name].shape)
        for name, (left, values, right) in parts.items()
    }
    return LowRank(factors, rank, min(kept, 1.0), exact=rank >= needed and not rest)


def rank_of(squares: Tensor, limit: float) -> int:
    """Return the rank of a matrix, by its squared singular values, up to so much squared norm."""
    tails = squares.flip(0).cumsum(0).flip(0)  # of the values from each on
    return int((tails > limit).sum())


def rank_that_keeps(squares: Mapping[str, Tensor], total: float, keep: float) -> int:
    """Return the smallest rank at which the largest values of all hold a part of the total.

    Raises:
        ModelError: not even all of them do.
    """
    longest = max((len(each) for each in squares.values()), default=0)
    held = torch.zeros(longest, dtype=torch.float64)
    for each in squares.values():
        held[: len(each)] += each
    parts = held.cumsum(0) / total
    # all ranks together are 1 up to the last digit where there is nothing but matrices
    enough = (parts >= keep * (1 - 1e-12)).nonzero()
    if not len(enough):
        most = parts[-1].item() if longest else 0.0
        reached = math.floor(1e4 * most) / 1e4
        raise ModelError(
            f"lora: matrices hold {100 * most:.4g}% of the change, biases and normalisations the "
            f"rest, which a LoRA does not have; give --keep {reached} or take --to diffusers"
        )
    return int(enough[0]) + 1


def thin(
    left: Tensor, values: Tensor, right: Tensor, rank: int, shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return A and B of the closest matrix of a rank, filled with zeros where it has a smaller one.

    Args:
        left, values, right: U [out, n], s [n] and V^T [n, in]. shape: of the weight.
    """
    roots = values[:rank].sqrt()
    down = torch.zeros(rank, right.shape[1])
    up = torch.zeros(left.shape[0], rank)
    down[: len(roots)] = (roots[:, None] * right[:rank]).float()
    up[:, : len(roots)] = (left[:, :rank] * roots).float()
    if len(shape) == 4:
        return down.reshape(rank, *shape[1:]), up[..., None, None]
    return down, up
