"""L1 penalty on the change of the weights (Lee et al. 2026, arXiv 2511.07970, Sec. 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cu_runner.regularizers.l2 import L2, mean_power

if TYPE_CHECKING:
    from torch import Tensor


def penalty(params: dict[str, Tensor], anchor: dict[str, Tensor]) -> Tensor:
    """mean |d| over all elements, d = theta - anchor, unweighted; a scalar."""
    return mean_power(params, anchor, 1)


class L1(L2):
    """weight * mean |d| over all trainable elements, d = theta - theta_anchor; arguments as for L2."""

    mean = staticmethod(penalty)
