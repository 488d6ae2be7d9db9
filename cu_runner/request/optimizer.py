"""The optimiser of one request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cu_runner.runtime.lazy import torch
from cu_runner.schema.settings import TrainSettings

if TYPE_CHECKING:
    from torch import Tensor


def make_optimizer(
    params: Sequence[Tensor], settings: TrainSettings, scales: Sequence[float] | None = None
) -> torch.optim.Optimizer:
    """Return a fresh optimiser. scales: of the step size, one for each of the parameters."""
    groups = (
        [{"params": list(params)}]
        if scales is None
        else [
            {"params": [parameter], "lr": settings.lr * scale}
            for parameter, scale in zip(params, scales, strict=True)
        ]
    )
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, weight_decay=settings.weight_decay)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[settings.optimizer]
    return kind(
        groups,
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=params[0].is_cuda,  # on a CPU the plain one, whose bits published figures have
    )
