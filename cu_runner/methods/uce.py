"""Unified concept editing: keys and values of cross-attention set in closed form (Gandikota et al.,
WACV 2024, arXiv 2308.14761).

A key or value of a prompt is W c, with c one of its text-encoder outputs. The released code moves
the last subject token of a concept onto that of its anchor. Prompts of a concept and its anchor
differ in length here, and what follows the concept's tokens carries it too (the text encoder is
causal, and end and padding are most of a prompt): every position from the concept's first token on
is moved onto the same position of the anchor's prompt, whichever token that is. What stands before
the concept does not know of it and is held where it is. Where both prompts begin alike, an exact
fit makes cross-attention see the anchor's prompt.

Shapes: L tokens, D text width, N edited and M preserved token positions, out attention width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat

from cu_runner.methods.base import Method
from cu_runner.request.images import RetainSet
from cu_runner.request.name_sources import earlier_targets
from cu_runner.request.scope import Scope
from cu_runner.runtime.lazy import torch, without_gradients

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer


@dataclass(frozen=True)
class TextPairs:
    """Text-encoder outputs, one row a token position."""

    concept: Tensor  # [N, D], what is edited
    anchor: Tensor  # [N, D], what its keys and values shall become those of
    preserved: Tensor  # [M, D]


class UCE(Method[TextPairs]):
    """Set keys and values of the concept's prompts to those of the anchor's.

    Those of preserved prompts stay.
    """

    closed_form = True

    def __init__(
        self,
        preserve: NonNegativeFloat = 1.0,
        ridge: NonNegativeFloat = 0.5,
        retain: RetainSet = RetainSet(),
        params: Literal["kv_xattn"] = "kv_xattn",
    ) -> None:
        """
        Args:
            preserve: weight of the preserved prompts against the edited ones.
            ridge: weight of the distance to the weights as they were; 0 lets them go as far as the
                fit needs.
            retain: the preserved prompts; no images are made of them. The prompts of earlier
                targets join them, so that they stay as unlearned as they are.
            params: keys and values, nothing else has a closed form.
        """
        self.preserve, self.ridge, self.retain, self.params = preserve, ridge, retain, params

    def batch(self, scope: Scope, step: int) -> TextPairs:
        """Return the one batch: all positions of all prompts."""
        model, sequence = scope.model, scope.sequence
        concept, anchor = [], []
        for target in scope.request.targets:
            for prompts in sequence.training_pairs(target):
                first = model.token_span(target.prompt_name, prompts[0]).start
                own, wanted = model.encode_prompts(list(prompts)).hidden  # [L, D] each
                concept.append(own)
                anchor.append(torch.cat([own[:first], wanted[first:]]))
        kept = self.retain.read(scope) + [
            prompt for name in earlier_targets(scope) for prompt in sequence.prompts_naming(name)
        ]
        return TextPairs(
            torch.cat(concept), torch.cat(anchor), model.encode_prompts(kept).hidden.flatten(0, 1)
        )

    @without_gradients
    def backward(self, scope: Scope, batch: TextPairs) -> dict[str, float]:
        """Solve for the weights, which update() sets.

        The logs are mean squares over positions and outputs, averaged over the weights. loss: what
        is left between the concept's keys and values and the anchor's. before: the same without the
        edit. preservation_loss: how far the preserved ones move.
        """
        self._edited, rows = {}, []
        for name, parameter in scope.params.items():
            values = batch.anchor @ parameter.T  # [N, out]
            weight = edited_weight(
                parameter,
                batch.concept,
                values,
                batch.preserved,
                preserve=self.preserve,
                ridge=self.ridge,
            )
            gaps = (
                batch.concept @ weight.T - values,
                batch.concept @ parameter.T - values,
                batch.preserved @ (weight - parameter).T,
            )
            rows.append([gap.square().mean().item() for gap in gaps])
            self._edited[name] = weight
        names = ("loss", "before", "preservation_loss")
        return {
            name: sum(column) / len(column)
            for name, column in zip(names, zip(*rows, strict=True), strict=True)
        }

    @without_gradients
    def update(self, scope: Scope, optimizer: Optimizer) -> None:
        """Set the weights."""
        for name, parameter in scope.params.items():
            parameter.copy_(self._edited[name])


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
    old, inputs, kept = weight.double(), edited.double(), preserved.double()
    missing = (values.double() - inputs @ old.T).T @ inputs  # [out, D]
    eye = torch.eye(inputs.shape[1], dtype=torch.float64, device=weight.device)
    gram = inputs.T @ inputs + preserve * kept.T @ kept + ridge * eye
    return (old + missing @ torch.linalg.pinv(gram, hermitian=True)).to(weight.dtype)
