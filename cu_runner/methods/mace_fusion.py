"""The closed forms of MACE, without its LoRAs (Lu et al., CVPR 2024).

MACE has three stages. 1, closed-form refinement (CFR): words that stand beside the concept's are
moved onto those beside the generic word, so that what they know of the concept is gone. 2: a LoRA
per concept, trained on masked attention maps, changes the concept's own words. 3, closed-form
fusion: one weight that acts on each concept's prompts as stage 1 with that concept's LoRA does.

Without the LoRAs of stage 2, and this is no longer MACE: the change dW_i of concept i is itself in
closed form, the ridge least squares that moves the concept's own tokens onto the same positions of
the anchor's prompt and holds the other tokens of its prompts. Nothing is trained and no mask
drawn.

Every stage multiplies the same D x D matrix into every weight, so that is what is solved for.

Shapes: L tokens, D text width, N edited and M preserved token positions, out attention width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat, PositiveFloat

from cu_runner.concepts.sequence import Concept
from cu_runner.methods._closed_form import (
    ClosedForm,
    ConceptSums,
    Sums,
    TextPairs,
    at_inputs,
    edit_sums,
    read_rows,
)
from cu_runner.request.images import RetainSet
from cu_runner.request.scope import Scope
from cu_runner.runtime.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

CAPTIONS = 30_000  # of COCO, over whose tokens the published weight of the prior sums


class MACEFusion(ClosedForm):
    """Refine the words beside concepts, then fuse one closed-form change per concept."""

    def __init__(
        self,
        preserve: NonNegativeFloat = 1e-4,
        ridge: PositiveFloat = 0.5,
        cumulative: bool = True,
        retain: RetainSet = RetainSet("both", prompts=200),
        params: Literal["kv_xattn", "text_linear"] = "kv_xattn",
    ) -> None:
        """
        Args:
            preserve: weight of the preserved text in stages 1 and 3, as of a sum over 30,000
                captions: the mean over preserved positions is taken so many times the tokens of a
                prompt.
            ridge: weight of the distance to the weights as they were, in every stage.
            cumulative: as ClosedForm says.
            retain: the preserved prompts, of which every position counts.
            params: keys and values, as published.
        """
        super().__init__(retain, cumulative, "all")
        self.preserve, self.ridge, self.params = preserve, ridge, params
        self._sums = ConceptSums(self._sums_of)

    def _sums_of(self, scope: Scope, concept: Concept) -> Sums:
        """Return the sums of one concept that fused_change() takes, [5, D, D]."""
        model = scope.model
        beside, own = [], []
        texts = []
        for prompts in scope.sequence.training_pairs(concept):
            both = model.encode_prompts(list(prompts))
            for part in model.prompts.parts:
                hidden = torch.stack(read_rows(part.of(both)))
                ids = [part.read(prompt) for prompt in prompts]
                places = shared_places(*ids, length=hidden.shape[1])
                beside.append([row[found] for row, found in zip(hidden, places, strict=True)])
                span = part.span(concept.prompt_name, prompts[0])
                own.append(hidden[:, span])
                texts.append(hidden[0].double())
        refined = edit_sums(*(torch.cat(rows) for rows in zip(*beside, strict=True)))
        moved = edit_sums(*(torch.cat(rows) for rows in zip(*own, strict=True)))
        text = torch.cat(texts)
        changes = concept_changes(moved.matrices, text.T @ text, ridge=self.ridge)
        return Sums(torch.cat([refined.matrices, changes]), len(text))

    def solve(self, scope: Scope, text: TextPairs) -> dict[str, Tensor]:
        """Return the fused weights."""
        kept = text.preserved.double()
        prior = kept.T @ kept * (self.preserve * CAPTIONS * scope.model.num_tokens / len(kept))
        moved = fused_change(self._sums.total(scope).matrices, prior, ridge=self.ridge)
        return at_inputs(scope.start, moved)


def shared_places(own: list[int], anchor: list[int], *, length: int) -> tuple[list[int], list[int]]:
    """Return the positions that two prompts, given as token ids, have in common, in pairs.

    They are those of the words that both begin with, of the words that both end with, and of the
    padding as far as both have it; length is that of a padded prompt. The released code pairs
    them so.
    """
    shortest = min(len(own), len(anchor))
    same = [a == b for a, b in zip(own, anchor, strict=False)]
    begin = same.index(False) if False in same else shortest
    end = 0
    while end < shortest - begin and own[-1 - end] == anchor[-1 - end]:
        end += 1
    behind = max(length - max(len(own), len(anchor)), 0)  # padding of the longer prompt
    return tuple(  # type: ignore[return-value]
        [*range(begin), *range(len(ids) - end, len(ids) + behind)] for ids in (own, anchor)
    )


def concept_changes(own: Tensor, text: Tensor, *, ridge: float) -> Tensor:
    """Return what fusion needs of one concept, [3, D, D]: S, A G^-1 S and B G^-1 S.

    own: [2, D, D], B = sum c c^T and E = sum (a - c) c^T over the concept's own tokens c and the
    anchor's a; A = B + E = sum a c^T. text: S = sum c c^T [D, D] over all tokens of its prompts.

    With refined weights W' and untouched ones W, the change of the concept minimises
    sum_own ||(W' + dW) c - W a||^2 + sum_others ||dW c||^2 + lam ||dW||^2:
    dW = (W A - W' B) G^-1,  G = S + lam I
    """
    gram, cross = own
    eye = torch.eye(len(text), dtype=text.dtype, device=text.device)
    solved = torch.linalg.solve(text + ridge * eye, text)  # G^-1 S
    return torch.stack([text, (gram + cross) @ solved, gram @ solved])


def fused_change(sums: Tensor, prior: Tensor, *, ridge: float) -> Tensor:
    """Return the M [D, D] of the fused weights W (I + M), the same for every weight W.

    sums: [5, D, D], over concepts i: F = sum e e^T and E = sum (g - e) e^T over words e beside
    concepts and g beside the anchors; S = sum S_i; P = sum A_i G_i^-1 S_i; Q = sum B_i G_i^-1 S_i
    (concept_changes). prior: s sum c c^T [D, D] over what is preserved. All are float64.

    Stage 1 (CFR): W' = (lam W + sum W g e^T + s sum W c c^T) (lam I + F + s sum c c^T)^-1
                      = W (I + T),  T = E (F + prior + lam I)^-1
    Stage 3: min_W* sum_i sum_c ||W* c - (W' + dW_i) c||^2 + s sum ||W* c - W c||^2
                      + lam ||W* - W||^2
        W* = W + (sum_i (W' + dW_i - W) S_i) (S + prior + lam I)^-1
           = W (I + (T S + P - (I + T) Q) (S + prior + lam I)^-1)
    """
    beside, cross, text, wanted, own = sums
    eye = torch.eye(len(prior), dtype=prior.dtype, device=prior.device)
    refined = torch.linalg.solve(beside + prior + ridge * eye, cross, left=False)  # T
    missing = refined @ text + wanted - own - refined @ own
    return torch.linalg.solve(text + prior + ridge * eye, missing, left=False)
