"""all_gather through which gradients flow; imported where several processes run, for it needs torch."""

import torch
import torch.distributed as dist
from torch import Tensor

from cu_runner.runtime import distributed


class Gather(torch.autograd.Function):
    """all_gather whose backward hands this process the gradient of its own rows, times the number of processes.

    Every process computes the same loss of all rows, so each has the whole gradient of the outputs. Behind this function flow the
    gradients of its own rows alone, and the mean of N times the parts is their sum, while a gradient that does not come through the
    model (a penalty's) is the same everywhere and its own mean.
    """

    @staticmethod
    def forward(context, own: Tensor, rows: int) -> Tensor:
        context.share = distributed.share(rows)
        sizes = [
            rows * (number + 1) // distributed.size() - rows * number // distributed.size()
            for number in range(distributed.size())
        ]
        parts = [own.new_empty((count, *own.shape[1:])) for count in sizes]
        dist.all_gather(parts, own.contiguous()) if len(set(sizes)) == 1 else _gather_uneven(
            parts, own.contiguous()
        )
        return torch.cat(parts)

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[context.share] * distributed.size(), None


def _gather_uneven(parts: list[Tensor], own: Tensor) -> None:
    """all_gather of shares of different lengths."""
    for number, part in enumerate(parts):
        if number == distributed.rank():
            part.copy_(own)
        dist.broadcast(part, src=number)
