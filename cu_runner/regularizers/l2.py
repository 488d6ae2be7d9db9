"""L2 penalty on the change of the weights (Lee et al. 2026, arXiv 2511.07970, Sec. 5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat

from cu_runner.methods.base import Batch, Method
from cu_runner.regularizers.base import Regularizer
from cu_runner.request.scope import Scope
from cu_runner.runtime.lazy import nn, torch

if TYPE_CHECKING:
    from torch import Tensor


def mean_power(params: Mapping[str, Tensor], anchor: dict[str, Tensor], power: int) -> Tensor:
    """Return mean |theta - anchor|^power over all elements of all tensors together; a scalar."""
    total = torch.stack(
        [(parameter - anchor[name]).abs().pow(power).sum() for name, parameter in params.items()]
    ).sum()
    return total / sum(parameter.numel() for parameter in params.values())


class L2(Regularizer):
    """weight * mean d^2 over all trainable elements, d = theta - theta_anchor."""

    acts_on = ("loss",)
    power = 2

    def __init__(
        self, weight: NonNegativeFloat, anchor: Literal["previous", "base"] = "previous"
    ) -> None:
        """
        Args:
            weight: of the penalty.
            anchor: "previous" pulls towards the weights at the start of the request, "base" towards
                the untouched model.
        """
        self.weight, self.anchor = weight, anchor

    def begin_request(self, scope: Scope, method: Method[Batch]) -> dict[str, object]:
        """Take the weights that the penalty pulls towards."""
        self._reference = scope.start if self.anchor == "previous" else scope.base
        return {}

    def penalty(self, params: dict[str, nn.Parameter]) -> Tensor:
        """Return the weighted penalty."""
        return self.weight * mean_power(params, self._reference, self.power)
