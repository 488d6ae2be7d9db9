"""RECE: embeddings that bring an unlearned concept back are derived and erased too (Gong et al.,
ECCV 2024, arXiv 2407.12383).

It works on top of any closed form. A linear map G takes a concept's text to text that, in the
edited weights, has nearly the keys and values that the concept had in the untouched ones. What
it yields is erased as one more target of unified concept editing, and so again.

How far the mapped text is from the concept is a probe of robustness for nothing: it needs no image.

Shapes: D text width, N edited and M preserved token positions, out attention width.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from cu_runner.methods._closed_form import (
    ClosedForm,
    ConceptSums,
    Tokens,
    pair_sums,
)
from cu_runner.methods.base import Batch, Method
from cu_runner.regularizers.base import Regularizer
from cu_runner.request.scope import Scope
from cu_runner.runtime.lazy import nn, torch, without_gradients

if TYPE_CHECKING:
    from torch import Tensor


class RECE(Regularizer):
    """Erase what the closed form's weights leave of the targets, some times over."""

    reads_words = "solves for the text that still brings a concept back"
    acts_on = ("step",)
    changing = ("unreached",)

    def __init__(
        self,
        epochs: PositiveInt = 1,
        attack_ridge: PositiveFloat = 0.1,
        ridge: PositiveFloat = 0.1,
        preserve: NonNegativeFloat = 0.1,
        tokens: Tokens = "all",
    ) -> None:
        """
        Args:
            epochs: how often embeddings are derived and erased.
            attack_ridge: weight of the size of derived embeddings; more derives weaker ones.
            ridge: weight of the distance to the weights before, of each epoch.
            preserve: weight of the empty prompt's positions, which stay.
            tokens: as of the closed forms; published for all positions of a prompt.
        """
        self.epochs, self.attack_ridge, self.ridge = epochs, attack_ridge, ridge
        self.preserve = preserve
        self._sums = ConceptSums(functools.partial(pair_sums, tokens=tokens))

    def check(self, method: Method[Batch]) -> None:
        """Refuse a method that trains: it takes thousands of steps, and erasing after each would
        be another method.
        """
        if not isinstance(method, ClosedForm):
            raise ValueError(
                "reg=rece erases what a closed form leaves, and this method trains step by step; "
                "choose method=uce, speed, oce, dp or mace_fusion"
            )

    def begin_request(self, scope: Scope, method: Method[Batch]) -> dict[str, object]:
        """Take the text of what the method solves for.

        Return a record that on_step() fills: "unreached", of each target, is
        ||W1 G c - W0 c|| / ||W0 c|| over its text and all weights, as the closed form leaves it and
        after each epoch. 0: a linear attacker has the concept back.

        """
        self._base = scope.base
        self._total = self._sums.total(scope).matrices
        self._grams = {
            concept.name: self._sums.of(scope, concept).matrices[0]
            for concept in scope.request.targets
        }
        empty = scope.model.encode_empty().positions().double()
        self._preserved = empty.T @ empty
        self.unreached: dict[str, list[float]] = {name: [] for name in self._grams}
        return {"unreached": self.unreached}

    def restore(self, state: dict[str, object]) -> None:
        """Fill the record that begin_request() gave with what the step before had found."""
        self.unreached.update(state["unreached"])  # type: ignore[call-overload]

    @without_gradients
    def on_step(self, params: dict[str, nn.Parameter], before: dict[str, Tensor]) -> None:
        """Derive, erase, and probe."""
        old = {name: self._base[name].double() for name in params}
        new = {name: parameter.double() for name, parameter in params.items()}
        attack, (gram, cross) = self._probe(old, new), self._total
        for _ in range(self.epochs):
            change = {
                name: erased_again(
                    old[name],
                    weight,
                    attack,
                    gram,
                    cross,
                    self._preserved,
                    ridge=self.ridge,
                    preserve=self.preserve,
                )
                for name, weight in new.items()
            }
            new = {name: weight + change[name] for name, weight in new.items()}
            attack = self._probe(old, new)
        for name, parameter in params.items():
            parameter.copy_(new[name])

    def _probe(self, old: dict[str, Tensor], new: dict[str, Tensor]) -> Tensor:
        """Return the attack on the new weights; note how far from each target it ends."""
        attack = derived_map([*old.values()], [*new.values()], self.attack_ridge)
        gaps = [new[name] @ attack - weight for name, weight in old.items()]
        left, whole = (gram_of(weights) for weights in (gaps, [*old.values()]))
        for name, gram in self._grams.items():
            # sum_c ||W c||^2 = tr(W^T W sum_c c c^T)
            share = (left * gram).sum() / (whole * gram).sum()
            self.unreached[name].append(share.sqrt().item())
        return attack


def gram_of(weights: list[Tensor]) -> Tensor:
    """Return sum W^T W [D, D] over weights [out, D]."""
    whole = torch.cat(weights)
    return whole.T @ whole


def derived_map(old: list[Tensor], new: list[Tensor], ridge: float) -> Tensor:
    """Return the G [D, D] that takes a concept's text c to what brings it back: c' = G c.

    old, new: the weights [out, D] before and after the edit, float64.

    G = (r I + sum_l W1_l^T W1_l)^-1 (sum_l W1_l^T W0_l)   (Gong et al. 2024, eq. 8) minimises
    sum_l ||W1_l c' - W0_l c||^2 + r ||c'||^2.
    """
    gram = gram_of(new)
    cross = torch.cat(new).T @ torch.cat(old)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge * eye, cross)


def erased_again(
    old: Tensor,
    new: Tensor,
    attack: Tensor,
    gram: Tensor,
    cross: Tensor,
    preserved: Tensor,
    *,
    ridge: float,
    preserve: float,
) -> Tensor:
    """Return the change [out, D] of an edited weight W1 that takes derived text to the anchors'.

    old: W0 [out, D]. new: W1 [out, D]. attack: G [D, D]. gram: sum c c^T, cross: sum (a - c) c^T,
    preserved: sum c c^T over what stays; [D, D] each. All are float64.

    W2 = (l0 W1 + sum W0 a c'^T + p sum W1 c c^T) (l0 I + sum c' c'^T + p sum c c^T)^-1, c' = G c
       = W1 + (sum (W0 a - W1 c') c'^T) (...)^-1
    """
    derived = attack @ gram @ attack.T  # sum c' c'^T
    wanted = (gram + cross) @ attack.T  # sum a c'^T
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    whole = derived + preserve * preserved + ridge * eye
    return torch.linalg.solve(whole, old @ wanted - new @ derived, left=False)
