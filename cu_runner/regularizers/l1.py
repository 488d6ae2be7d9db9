"""L1 penalty on the change of the weights (Lee et al. 2026, arXiv 2511.07970, Sec. 5)."""

from __future__ import annotations

from cu_runner.regularizers.l2 import L2


class L1(L2):
    """weight * mean |d| over all trainable elements, d = theta - theta_anchor, else as L2."""

    power = 1
