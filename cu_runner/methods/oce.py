"""OCE, orthogonal concept erasure: weights are turned, never stretched (ICML 2026, arXiv
2605.28902).

A weight W [out, D] becomes R W with R orthogonal, the solution of an orthogonal Procrustes problem
that turns the values of targets out of their own subspace, towards that of guides, and holds
those of preserved names and of captions. Norms and angles between the columns of W stay.

Where the released code falls short of the paper this does not follow it: repeated guides, which it
orthogonalises by a QR decomposition of a matrix without full rank, get directions of rounding
there; here a subspace has the rank of its columns.

Shapes: D text width, N edited and M preserved token positions, out attention width, r dimension of
a subspace.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat

from cu_runner.methods._closed_form import (
    ClosedForm,
    TextPairs,
    Tokens,
    edited_rows,
    last_tokens,
    prompt_pairs,
    read_prompts,
)
from cu_runner.request.images import RetainSet
from cu_runner.request.scope import Scope
from cu_runner.request.text_subspace import principal_columns
from cu_runner.runtime.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor


class OCE(ClosedForm):
    """Turn the values of targets out of their subspace by an orthogonal map."""

    def __init__(
        self,
        erase: NonNegativeFloat = 500.0,
        keep_captions: NonNegativeFloat = 10.0,
        keep_names: NonNegativeFloat = 1.0,
        keep_weight: NonNegativeFloat = 10.0,
        guides: tuple[str, ...] | None = None,
        energy: Annotated[float, Field(gt=0, le=1)] = 1.0,
        tokens: Tokens = "last",
        cumulative: bool = True,
        retain: RetainSet = RetainSet("names", prompts=200),
        captions: RetainSet = RetainSet("list", "general_captions"),
        params: Literal["kv_xattn", "k_xattn", "v_xattn", "text_linear"] = "v_xattn",
    ) -> None:
        """
        Args:
            erase: weight of the targets.
            keep_captions: weight of the mean of c c^T over the tokens of captions.
            keep_names: weight of each preserved position.
            keep_weight: weight of W W^T.
            guides: names whose subspace targets may turn into; None takes the targets' anchors,
                with the tokens that are edited.
            energy: fraction of the squared norm of the targets' unit values, and of the guides',
                that their subspaces hold; 1 holds all of them, as published. Less makes room where
                the targets' values span more than the weight has outputs.
            tokens, cumulative, retain: as ClosedForm says.
            captions: prompts that stand for all others.
            params: values (as released), keys, or both (as the paper says).
        """
        if guides == ():
            raise ValueError(
                "method.guides is empty; give at least one name, or null for the targets' anchors"
            )
        super().__init__(retain, cumulative, tokens)
        self.erase, self.keep_captions = erase, keep_captions
        self.keep_names, self.keep_weight = keep_names, keep_weight
        self.guides, self.energy = guides, energy
        self.captions, self.params = captions, params

    def solve(self, scope: Scope, text: TextPairs) -> dict[str, Tensor]:
        """Return the turned weights.

        Raises:
            ValueError: the targets' values span all outputs of a weight.
        """
        pairs = [
            pair
            for concept in scope.request.targets
            for pair in prompt_pairs(scope, concept, self.tokens)
        ]
        targets, anchors = (rows.double() for rows in edited_rows(pairs, self.holds_context))
        guides = (
            anchors if self.guides is None else last_tokens(scope.model, [*self.guides]).double()
        )
        preserved, mean = text.preserved.double(), self._mean_of_captions(scope)
        edited = {}
        for name, old in scope.start.items():
            weight = old.double()
            own = value_subspace(weight, targets, self.energy)
            if own.shape[1] == len(weight):
                raise ValueError(
                    f"method=oce: the targets' values span all {len(weight)} outputs of {name}, "
                    "and nothing is left to hold; lower method.energy"
                )
            objective = procrustes_objective(
                weight,
                own,
                value_subspace(weight, guides, self.energy),
                preserved,
                mean,
                erase=self.erase,
                keep_captions=self.keep_captions,
                keep_names=self.keep_names,
                keep_weight=self.keep_weight,
            )
            edited[name] = (rotation(objective) @ weight).to(old.dtype)
        return edited

    def _mean_of_captions(self, scope: Scope) -> Tensor:
        """Return the mean of c c^T over the tokens of the captions, padding left out; [D, D]."""
        model, prompts = scope.model, read_prompts(scope, self.captions)
        text = model.encode_prompts(prompts)
        rows = torch.cat(
            [
                row[: len(part.row(prompt))]
                for part in model.prompts.parts
                for row, prompt in zip(part.of(text).hidden.double(), prompts, strict=True)
            ]
        )
        return rows.T @ rows / len(rows)


def value_subspace(weight: Tensor, rows: Tensor, energy: float) -> Tensor:
    """Return an orthonormal basis [out, r] of the unit values W c / ||W c|| of rows c [N, D].

    energy: the fraction of their squared norm that it holds; at 1 it spans them all.
    """
    values = F.normalize(weight @ rows.T, dim=0)
    return principal_columns(values, energy if energy < 1 else None)


def procrustes_objective(
    weight: Tensor,
    targets: Tensor,
    guides: Tensor,
    preserved: Tensor,
    captions: Tensor,
    *,
    erase: float,
    keep_captions: float,
    keep_names: float,
    keep_weight: float,
) -> Tensor:
    """Return the M [out, out] whose nearest orthogonal matrix turns the weight [out, D].

    targets, guides: bases G and G* [out, r]. preserved: c0 [M, D]. captions: C_g [D, D], a mean of
    c c^T.

    M = - e G G^T (I - G* G*^T) + k2 sum_j (W c0_j) (W c0_j)^T + k1 W C_g W^T + lam W W^T
    """
    outside = torch.eye(len(weight), dtype=weight.dtype, device=weight.device) - guides @ guides.T
    values = weight @ preserved.T  # [out, M]
    return (
        -erase * targets @ targets.T @ outside
        + keep_names * values @ values.T
        + keep_captions * weight @ captions @ weight.T
        + keep_weight * weight @ weight.T
    )


def rotation(objective: Tensor) -> Tensor:
    """Return R = U V^T of the SVD M = U S V^T [out, out].

    If det R < 0 its last column is turned round; that of R and not of U, as released.
    """
    U, _, Vh = torch.linalg.svd(objective)
    R = U @ Vh
    if torch.linalg.det(R) < 0:
        R[:, -1] *= -1
    return R
