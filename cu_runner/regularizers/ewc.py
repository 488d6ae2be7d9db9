"""Elastic weight consolidation: hold back the weights that matter to what is kept (Kirkpatrick et
al. 2017, arXiv 1612.00796).

Shapes: theta and F as the weights are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat, PositiveInt

from cu_runner.methods.base import Batch, Method
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.regularizers.base import Regularizer
from cu_runner.request.images import NoisyBatch, RetainSet, diffusion_loss
from cu_runner.request.scope import Scope
from cu_runner.runtime.lazy import nn, torch

if TYPE_CHECKING:
    from torch import Tensor


def ewc_penalty(
    params: Mapping[str, Tensor], anchor: dict[str, Tensor], fisher: dict[str, Tensor]
) -> Tensor:
    """Return 1/2 mean_d F_d (theta_d - anchor_d)^2 over all elements   (eq. 3); a scalar."""
    total = torch.stack(
        [
            (fisher[name] * (parameter - anchor[name]).square()).sum()
            for name, parameter in params.items()
        ]
    ).sum()
    return total / 2 / sum(parameter.numel() for parameter in params.values())


def diagonal_fisher(
    model: DiffusionModel, params: dict[str, nn.Parameter], batches: Iterable[NoisyBatch]
) -> dict[str, Tensor]:
    """Return F_d = mean over batches of (dL/dtheta_d)^2, L the diffusion loss of a batch.

    .grad is left as it is. This is the empirical Fisher; batches of several images make it smaller,
    since their gradients partly cancel before they are squared.
    """
    fisher = {name: torch.zeros_like(parameter) for name, parameter in params.items()}
    for number, batch in enumerate(batches, start=1):
        gradients = torch.autograd.grad(
            diffusion_loss(model, batch), list(params.values()), materialize_grads=True
        )
        for total, gradient in zip(fisher.values(), gradients, strict=True):
            total += (gradient.square() - total) / number  # running mean
    return fisher


class EWC(Regularizer):
    """weight/2 * mean F_d (theta_d - anchor_d)^2 over all trainable weights, F scaled so that its
    mean is 1.

    The raw F of a model depends on its size and loss (1e-6 to 1e-2); scaled, a uniform F gives half
    of reg=l2 with the same weight.
    """

    acts_on = ("loss",)

    def __init__(
        self,
        weight: NonNegativeFloat,
        num_batches: PositiveInt = 200,
        batch_size: PositiveInt = 1,
        anchor: Literal["previous", "base"] = "previous",
        retain: RetainSet = RetainSet(),
    ) -> None:
        """
        Args:
            num_batches, batch_size: squared gradients that F is the mean of, and images of each.
            anchor: "previous" pulls towards the weights at the start of the request, "base" towards
                the untouched model; F is estimated at the start of the request either way.
            retain: what is to be kept.
        """
        self.weight, self.num_batches, self.batch_size = weight, num_batches, batch_size
        self.anchor, self.retain = anchor, retain

    def begin_request(self, scope: Scope, method: Method[Batch]) -> dict[str, object]:
        """Estimate F at the start of the request."""
        self._reference = scope.start if self.anchor == "previous" else scope.base
        images = self.retain.images_of(scope)
        batches = (
            images.draw(scope.rng.generator("ewc", number), self.batch_size)
            for number in range(self.num_batches)
        )
        fisher = diagonal_fisher(scope.model, scope.params, batches)
        mean = torch.stack([values.sum() for values in fisher.values()]).sum() / sum(
            values.numel() for values in fisher.values()
        )
        if mean == 0:
            raise ValueError(
                "reg.ewc: the Fisher information of the kept prompts is zero; choose another "
                "retain set or method.params"
            )
        self._fisher = {name: values / mean for name, values in fisher.items()}
        return {"fisher_mean": mean.item(), "prompts": len(self.retain.read(scope))}

    def penalty(self, params: dict[str, nn.Parameter]) -> Tensor:
        """Return the weighted penalty."""
        return self.weight * ewc_penalty(params, self._reference, self._fisher)
