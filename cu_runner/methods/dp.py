"""DP, double projections: targets go to their projections on safe text, in its null space (CVPR
2026).

A target's text c is moved onto its proxy, the projection of c onto the span of safe concepts, by a
change of the weights that vanishes on those concepts. No anchor is needed. Published for one
target at a time; several are solved together by least squares.

Shapes: D text width, N edited and M preserved token positions, out attention width, s and k
dimensions of the safe span and of what is outside it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat

from cu_runner.methods._closed_form import (
    ClosedForm,
    ConceptSums,
    TextPairs,
    Tokens,
    at_inputs,
    pair_sums,
)
from cu_runner.request.images import RetainSet
from cu_runner.request.scope import Scope
from cu_runner.request.text_subspace import principal_columns
from cu_runner.runtime.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class DP(ClosedForm):
    """Move targets onto their projections on the text of safe names, which stays."""

    def __init__(
        self,
        energy: Annotated[float, Field(gt=0, le=1)] = 1.0,
        ridge: NonNegativeFloat = 0.0,
        tokens: Tokens = "last",
        cumulative: bool = True,
        retain: RetainSet = RetainSet("names", prompts=200),
        params: Literal["kv_xattn", "k_xattn", "v_xattn", "text_linear"] = "kv_xattn",
    ) -> None:
        """
        Args:
            energy: fraction of the safe text's squared norm that its span holds; 1 holds all of it.
            ridge: weight of the size of the change; 0 moves targets all the way, as published. With
                as many edited positions as there are directions outside the safe span, all that is
                not safe is then projected onto it, unlearned or not.
            tokens, cumulative: as ClosedForm says.
            retain: the safe text, as ClosedForm says.
            params: keys and values, or one of them.
        """
        super().__init__(retain, cumulative, tokens)
        self.energy, self.ridge, self.params = energy, ridge, params
        self._sums = ConceptSums(functools.partial(pair_sums, tokens=tokens))

    def batch(self, scope: Scope, step: int) -> TextPairs:
        """Return the one batch, with proxies in the anchors' place."""
        text = super().batch(scope, step)
        safe = self._safe(text)
        proxies = (text.concept.double() @ safe @ safe.T).to(text.concept.dtype)
        return dataclasses.replace(text, anchor=proxies)

    def solve(self, scope: Scope, text: TextPairs) -> dict[str, Tensor]:
        """Return the weights, all by the same change of their input.

        Raises:
            ValueError: nothing of the targets is outside the safe span.
        """
        gram, safe = self._sums.total(scope).matrices[0], self._safe(text)
        free = torch.linalg.qr(safe, mode="complete").Q[:, safe.shape[1] :]
        outside = (free.T @ gram @ free).trace() / gram.trace()
        if not outside > 1e-9:
            raise ValueError(
                f"method=dp: the {len(text.preserved)} safe positions span all of the targets' "
                "text, and nothing of it can be changed; lower method.energy or "
                "method.retain.prompts"
            )
        return at_inputs(scope.start, double_projection(gram, safe, free, ridge=self.ridge))

    def _safe(self, text: TextPairs) -> Tensor:
        """Return an orthonormal basis [D, s] of the safe span."""
        columns = text.preserved.double().T
        return principal_columns(columns, self.energy if self.energy < 1 else None)


def double_projection(gram: Tensor, safe: Tensor, free: Tensor, *, ridge: float) -> Tensor:
    """Return the M [D, D] of the edit W (I + M), the same for every weight W.

    gram: B [D, D] = sum c c^T over edited positions c. safe: an orthonormal basis S [D, s] of the
    safe span, onto which c is projected: c* = S S^T c. free: an orthonormal basis U [D, k] of the
    directions that may change. All are float64.

    For one c, with x = U^T c: W M = W (c* - c) x^T U^T / ||x||^2. For several it is the least
    squares solution of W M c = W (c* - c), with ridge r:
    M = (S S^T - I) B U (U^T B U + r I)^+ U^T
    """
    inner = free.T @ gram @ free
    inner = inner + ridge * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
    missing = safe @ (safe.T @ gram) - gram  # sum (c* - c) c^T
    return missing @ free @ torch.linalg.pinv(inner, hermitian=True) @ free.T
