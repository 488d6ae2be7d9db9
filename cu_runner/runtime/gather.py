"""all_gather through which gradients flow; imported where several processes run: it needs torch."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx


class GatherContext(FunctionCtx):
    """What the way back needs: this process's rows, and the number of processes."""

    rows: slice
    size: int


class Gather(torch.autograd.Function):
    """all_gather whose backward hands this process the gradient of its own rows, times `size`.

    Every process computes the same loss of all rows, so each has the whole gradient of the
    outputs. Behind this function flow the gradients of its own rows alone, and the mean of N times
    the parts is their sum, while a gradient that does not come through the model (a penalty's) is
    the same everywhere and its own mean.
    """

    @staticmethod
    def forward(context: GatherContext, own: Tensor, ends: list[int], rank: int) -> Tensor:
        """Return the rows of all processes, in order.

        Args:
            own: the rows [ends[rank + 1] - ends[rank], ...] of this process.
            ends: where the share of each process begins, and where the last one ends.
            rank: the number of this process.
        """
        context.rows, context.size = slice(ends[rank], ends[rank + 1]), len(ends) - 1
        own = own.contiguous()
        parts = [own.new_empty((end - start, *own.shape[1:])) for start, end in pairwise(ends)]
        if len({len(part) for part in parts}) == 1:
            dist.all_gather(parts, own)
        else:  # all_gather wants shares of one length
            parts[rank].copy_(own)
            for number, part in enumerate(parts):
                dist.broadcast(part, src=number)
        return torch.cat(parts)

    @staticmethod
    def backward(context: GatherContext, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of this process's rows, times the number of processes."""
        return gradient[context.rows] * context.size, None, None
