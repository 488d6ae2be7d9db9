"""Unified concept editing: keys and values of cross-attention set in closed form (Gandikota et al.,
WACV 2024, arXiv 2308.14761).

A key or value of a prompt is W c, with c one of its text-encoder outputs. The released code moves
the last subject token of a concept onto that of its anchor. Prompts of a concept and its anchor
differ in length here, and what follows the concept's tokens carries it too (the text encoder is
causal, and end and padding are most of a prompt): every position from the concept's first token on
is moved onto the same position of the anchor's prompt, whichever token that is. What stands before
the concept does not know of it and is held where it is. Where both prompts begin alike, an exact
fit makes cross-attention see the anchor's prompt.

One request after the other, each from the weights of the one before, drifts and depends on the
order. The same equation with the sums over all targets so far, from the untouched weights, does
neither (`cumulative`).

Shapes: L tokens, D text width, N edited and M preserved token positions, out attention width.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat

from cu_runner.methods._closed_form import (
    ClosedForm,
    ConceptSums,
    TextPairs,
    at_inputs,
    pair_sums,
)
from cu_runner.request.images import RetainSet
from cu_runner.request.scope import Scope
from cu_runner.runtime.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class UCE(ClosedForm):
    """Set keys and values of the concept's prompts to those of the anchor's.

    Those of preserved prompts stay.
    """

    holds_context = True

    def __init__(
        self,
        preserve: NonNegativeFloat = 1.0,
        ridge: NonNegativeFloat = 0.5,
        cumulative: bool = False,
        retain: RetainSet = RetainSet(),
        params: Literal["kv_xattn", "text_linear"] = "kv_xattn",
    ) -> None:
        """
        Args:
            preserve: weight of the preserved prompts against the edited ones.
            ridge: weight of the distance to the weights as they were; 0 lets them go as far as the
                fit needs.
            cumulative: solve for all targets so far from the untouched weights, so that nothing
                drifts and the order of requests does not matter; else for the request's own, from
                the weights as they are.
            retain: the preserved prompts; no images are made of them. The prompts of earlier
                targets join them, so that they stay as unlearned as they are.
            params: keys and values, nothing else has a closed form.
        """
        super().__init__(retain, cumulative, "all")
        self.preserve, self.ridge, self.params = preserve, ridge, params
        self._sums = ConceptSums(
            functools.partial(pair_sums, tokens=self.tokens, holds_context=self.holds_context)
        )

    def solve(self, scope: Scope, text: TextPairs) -> dict[str, Tensor]:
        """Return the weights of eq. 7."""
        options = {"preserve": self.preserve, "ridge": self.ridge}
        if not self.cumulative:
            return {
                name: edited_weight(
                    weight, text.concept, text.anchor @ weight.T, text.preserved, **options
                )
                for name, weight in scope.start.items()
            }
        gram, cross = self._sums.total(scope).matrices
        moved = input_change(gram, cross, text.preserved, **options)
        return at_inputs(scope.start, moved)


def edited_weight(
    weight: Tensor,
    edited: Tensor,
    values: Tensor,
    preserved: Tensor,
    *,
    preserve: float,
    ridge: float,
) -> Tensor:
    """Return the W [out, D] that takes edited [N, D] to values [N, out] and holds the rest.

    preserved [M, D] goes where W_old = weight [out, D] takes it.

    W = (sum_E v* c^T + p sum_P W_old c c^T + lam W_old) S^-1   (eq. 7)
      = W_old + (sum_E (v* - W_old c) c^T) S^-1
    with S = sum_E c c^T + p sum_P c c^T + lam I.

    The second form is coded, in float64: nothing to edit then changes nothing, and a large lam
    leaves W_old. Where S has no inverse (few positions and lam = 0) the pseudo-inverse gives the
    smallest change. The result has the dtype of weight.
    """
    old, inputs = weight.double(), edited.double()
    missing = (values.double() - inputs @ old.T).T @ inputs  # [out, D]
    inverse = regular_inverse(inputs.T @ inputs, preserved, preserve=preserve, ridge=ridge)
    return (old + missing @ inverse).to(weight.dtype)


def input_change(
    gram: Tensor, cross: Tensor, preserved: Tensor, *, preserve: float, ridge: float
) -> Tensor:
    """Return the M [D, D] of the edit W_old (I + M), the same for every weight.

    gram [D, D] is sum_E c c^T and cross [D, D] is sum_E (a - c) c^T of positions c to edit and a of
    the anchor, preserved is [M, D]. With v* = W_old a, eq. 7 is W_old + W_old cross S^-1.
    """
    return cross @ regular_inverse(gram, preserved, preserve=preserve, ridge=ridge)


def regular_inverse(gram: Tensor, preserved: Tensor, *, preserve: float, ridge: float) -> Tensor:
    """Return S^-1 [D, D], or the pseudo-inverse, of S = gram + p sum_P c c^T + lam I, in float64.

    gram: [D, D], float64. preserved: [M, D].
    """
    kept = preserved.double()
    eye = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    return torch.linalg.pinv(gram + preserve * kept.T @ kept + ridge * eye, hermitian=True)
