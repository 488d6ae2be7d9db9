"""SPEED: a closed form inside the null space of what is preserved (Li et al., ICLR 2026, arXiv
2503.07392).

Targets are moved onto their anchors by a change that vanishes on preserved names. Three devices
shape what is preserved, layer by layer: influence-based prior filtering (IPF) drops names that the
edit would hardly touch, directed prior augmentation (DPA) adds neighbours of the others, and
invariant equality constraints (IEC) hold the empty prompt.

The published product of inverses equals ridge least squares in the coordinates of the null space,
which is what is coded: one k x k system, k the dimension of that space.

Shapes: D text width, N edited and M preserved token positions, J constrained ones, out attention
width, k dimension of the null space.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat

from cu_runner.methods._closed_form import (
    ClosedForm,
    ConceptSums,
    TextPairs,
    Tokens,
    pair_sums,
)
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.request.images import RetainSet
from cu_runner.request.scope import Scope
from cu_runner.runtime.lazy import torch

if TYPE_CHECKING:
    from torch import Generator, Tensor

ROUNDS = 100  # of k-means, at most
CENTRES = 3  # of the positions of the empty prompt, which are held with its begin


class SPEED(ClosedForm):
    """Move targets onto anchors inside the null space of preserved text."""

    def __init__(
        self,
        threshold: PositiveFloat = 0.1,
        ridge: PositiveFloat = 1.0,
        filter_names: bool = True,
        augmentations: NonNegativeInt = 10,
        invariant: bool = True,
        relaxation: NonNegativeFloat = 0.0,
        tokens: Tokens = "last",
        cumulative: bool = True,
        retain: RetainSet = RetainSet("names", prompts=200),
        params: Literal["kv_xattn", "k_xattn", "v_xattn", "text_linear"] = "v_xattn",
    ) -> None:
        """
        Args:
            threshold: eigenvalue of the mean of c c^T over what is preserved under which a
                direction is free to change.
            ridge: weight of the size of the change, against the mean over edited positions.
            filter_names: IPF, drop preserved text that the edit moves less than the mean.
            augmentations: DPA, neighbours drawn for each that is left; 0 draws none.
            invariant: IEC, hold the begin of text and CENTRES centres of the empty prompt's other
                positions.
            relaxation: how far they may move; 0 holds them exactly.
            tokens, cumulative, retain: as ClosedForm says.
            params: values (as all released settings), keys, or both.
        """
        super().__init__(retain, cumulative, tokens)
        self.threshold, self.ridge, self.relaxation = threshold, ridge, relaxation
        self.filter_names, self.augmentations = filter_names, augmentations
        self.invariant, self.params = invariant, params
        self._sums = ConceptSums(functools.partial(pair_sums, tokens=tokens))

    def solve(self, scope: Scope, text: TextPairs) -> dict[str, Tensor]:
        """Return the weights, each in a null space of its own.

        Raises:
            ValueError: no direction is free.
        """
        sums = self._sums.total(scope)
        gram, cross = sums.matrices / sums.number
        preserved = text.preserved.double()
        held = preserved[:0]
        if self.invariant:
            held = empty_prompt(scope.model, CENTRES)
        edited = {}
        for name, old in scope.start.items():
            weight = old.double()
            influence = first_edit(weight, gram, cross)
            kept = influenced(preserved, influence) if self.filter_names else preserved
            if self.augmentations:
                draw = scope.rng.generator(f"speed {name}")
                near = neighbours(kept, weight, self.augmentations, draw)
                kept = torch.cat([kept, influenced(near, influence)])
            basis = null_space(kept, self.threshold)
            if basis.shape[1] and not self.relaxation:
                basis = basis @ null_space(held @ basis)
            if not basis.shape[1]:
                raise ValueError(
                    f"method=speed: no direction of the text is free beside {len(kept)} preserved "
                    "positions; raise method.threshold or lower method.retain.prompts"
                )
            change = null_space_edit(
                weight, gram, cross, basis, held, ridge=self.ridge, relaxation=self.relaxation
            )
            edited[name] = (weight + change).to(old.dtype)
        return edited


def first_edit(weight: Tensor, gram: Tensor, cross: Tensor) -> Tensor:
    """Return the edit without any constraint, by whose effect text is filtered; [out, D].

    W (A - B) (I + B)^-1   (Li et al. 2026, IPF), gram [D, D] = B and cross [D, D] = A - B.
    """
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(eye + gram, weight @ cross, left=False)


def influenced(rows: Tensor, change: Tensor) -> Tensor:
    """Return those of the rows [M, D] that a change [out, D] moves more than their mean.

    All of them where it moves all alike.
    """
    moved = (rows @ change.T).norm(dim=1)
    chosen = moved > moved.mean()
    return rows[chosen] if chosen.any() else rows


def neighbours(rows: Tensor, weight: Tensor, number: int, draw: Generator) -> Tensor:
    """Return `number` random neighbours of each row [M, D], [M * number, D].

    c + v v^T eps with eps ~ N(0, I), v the last right singular vector of the weight [out, D],
    that of the smallest of its min(out, D) singular values; v^T eps is one normal number.
    """
    v = torch.linalg.svd(weight, full_matrices=False).Vh[-1]  # [D]
    steps = torch.randn(len(rows), number, generator=draw, dtype=rows.dtype).to(rows.device)
    return (rows[:, None] + steps[..., None] * v).flatten(0, 1)


def null_space(rows: Tensor, threshold: float | None = None) -> Tensor:
    """Return an orthonormal basis [D, k] of the directions that rows [M, D] hardly take.

    threshold: of the eigenvalues of (1/M) sum c c^T; None takes the numerical null space. Without
    rows it is the whole space.
    """
    if not len(rows):
        return torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    if threshold is None:
        _, values, directions = torch.linalg.svd(rows)
        tolerance = max(rows.shape) * torch.finfo(rows.dtype).eps
        return directions[int((values > tolerance * values[0]).sum()) :].T
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    return vectors[:, values < threshold]


def null_space_edit(
    weight: Tensor,
    gram: Tensor,
    cross: Tensor,
    basis: Tensor,
    held: Tensor,
    *,
    ridge: float,
    relaxation: float,
) -> Tensor:
    """Return the change [out, D] of a weight [out, D], zero outside the span of basis [D, k].

    gram [D, D] is B, the mean of c c^T over edited positions; cross [D, D] is A - B, that of
    (c* - c) c^T; held [J, D] are the constrained positions C2. All are float64.

    It minimises mean ||(W + dW) c - W c*||^2 + rho ||dW||^2, plus ||dW C2||^2 / lam for lam > 0:
    dW = W (A - B) Z (Z^T (B + C2 C2^T / lam) Z + rho I)^-1 Z^T
    For lam = 0 the basis must be orthogonal to C2. It equals the published W (A - B) P Q M with
    M = (B P + rho I)^-1, Q = I - M C2 (C2^T P M C2 + lam I)^-1 C2^T P, P the projector on Z or,
    for lam = 0, on the space that held has not been taken from.
    """
    if relaxation:
        gram = gram + held.T @ held / relaxation
    eye = torch.eye(basis.shape[1], dtype=gram.dtype, device=gram.device)
    inner = basis.T @ gram @ basis + ridge * eye
    return torch.linalg.solve(inner, weight @ cross @ basis, left=False) @ basis.T


def empty_prompt(model: DiffusionModel, centres: int) -> Tensor:
    """Return the begin of the empty prompt and k-means centres of its other positions, float64.

    [1 + centres, D]. The centres start evenly spaced over the positions, so that no random number
    is in them.
    """
    rows = model.encode_empty().positions().double()
    # of a masked text there may be fewer
    rest = rows[1:]
    return torch.cat([rows[:1], k_means(rest, centres) if len(rest) > centres else rest])


def k_means(rows: Tensor, centres: int) -> Tensor:
    """Return the centres [centres, D] of Lloyd's algorithm on rows [M, D], from evenly spaced rows.

    A centre that no row is nearest to stays where it is.
    """
    found = rows[[i * len(rows) // centres for i in range(centres)]].clone()
    for _ in range(ROUNDS):
        nearest = torch.cdist(rows, found).argmin(1)
        means = [rows[nearest == i].mean(0) for i in range(centres)]
        new = torch.stack(
            [mean if (nearest == i).any() else found[i] for i, mean in enumerate(means)]
        )
        if torch.equal(new, found):
            break
        found = new
    return found
