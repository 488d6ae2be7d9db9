"""Gradient projection off the text of auxiliary concepts (Lee et al. 2026, arXiv 2511.07970, Sec.
7).

A cross-attention key or value is W t with t a text-encoder output [D], so a change of W that
vanishes on a concept's t leaves what the model makes of that concept alone. The subspace of
auxiliary concepts is removed from every gradient, or from every step.

Shapes: D text width, K auxiliary concepts, out attention width.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from cu_runner.concepts.templates import fill_caption
from cu_runner.methods.base import Batch, Method
from cu_runner.models.parameters import gradients
from cu_runner.regularizers.base import Regularizer
from cu_runner.request.name_sources import NameSource, kept_names, normalized, spellings
from cu_runner.request.scope import Scope
from cu_runner.request.text_subspace import (
    check_contexts,
    check_projected,
    concept_vectors,
    nearest_names,
    principal_columns,
    prompt_vectors,
)
from cu_runner.runtime.lazy import F, nn, torch, without_gradients

if TYPE_CHECKING:
    from torch import Tensor


def kept_columns(C: Tensor, threshold: float) -> list[int]:
    """Return the columns of C [D, K] whose cosine to every kept column before is small enough.

    threshold: the largest cosine that is.
    """
    unit = F.normalize(C.double(), dim=0)
    cosine = unit.T @ unit
    kept: list[int] = []
    for column in range(C.shape[1]):
        if not kept or cosine[column, kept].max() <= threshold:
            kept.append(column)
    return kept


def orthogonal_projector(C: Tensor) -> Tensor:
    """Return P [D, D] that removes the span of the columns of C [D, K].

    P = I - C (C^T C + r I)^-1 C^T with r = max(1e-4, 1e-6 tr(C^T C) / K)   (Lee et al. 2026, Sec.
    7.2); by the pseudo-inverse of C where C^T C + r I is ill-conditioned. Computed in float64,
    returned in C's dtype. C with no column gives the identity.
    """
    width, count = C.shape
    eye = torch.eye(width, dtype=torch.float64, device=C.device)
    if count == 0:
        return eye.to(C.dtype)
    columns = C.double()
    wide = count > width
    gram = columns @ columns.T if wide else columns.T @ columns  # the smaller of the two
    ridge = max(1e-4, 1e-6 * gram.trace().item() / count)
    regular = gram + ridge * torch.eye(len(gram), dtype=torch.float64, device=C.device)
    if wide:  # the same: C (C^T C + r I)^-1 C^T = (C C^T + r I)^-1 C C^T
        return (eye - torch.linalg.solve(regular, gram)).to(C.dtype)
    if torch.linalg.cond(regular) < 1e12:
        return (eye - columns @ torch.linalg.solve(regular, columns.T)).to(C.dtype)
    return (eye - columns @ torch.linalg.pinv(columns)).to(C.dtype)


logger = logging.getLogger(__name__)


class GradProj(Regularizer):
    """Project the gradient G [out, D] of every cross-attention key and value to G P.

    With apply=update the optimiser's step is projected instead.
    """

    reads_words = "projects on what the texts of other prompts do not span"
    linear = "any"

    def __init__(
        self,
        apply: Literal["gradient", "update"] = "gradient",
        auxiliary: NameSource = NameSource(),
        threshold: Annotated[float, Field(gt=0, le=1)] = 0.95,
        tokens: Literal["own", "last", "all"] = "own",
        contexts: tuple[str, ...] | None = ("{concept}",),
        energy: Annotated[float, Field(gt=0, le=1)] = 1.0,
        earlier: bool = True,
    ) -> None:
        """
        Args:
            apply: "gradient" projects before the optimiser, as the released code does; AdamW then
                rescales element by element and leaves the subspace. "update" projects the step
                itself, which is exact.
            auxiliary: the names of the subspace, the nearest to the target by text similarity
                first; whole captions may stand for names with tokens="last". The target of the
                request is never one of them.
            threshold: with tokens="own" or "last", a name whose vector has a larger cosine to a
                kept one is dropped as a duplicate.
            tokens: "own" holds the mean over a name's own tokens, as published. "last" holds the
                last token of each prompt, as released for styles. "all" holds every
                position of its prompts: also the begin, context and end tokens, which all prompts
                share and which carry a change to every other concept.
            contexts: the prompts in which names are encoded; each must hold {concept}, and
                {caption} runs through the sequence's. None is the sequence's target_prompt.
            energy: the subspace is spanned by the principal directions with this fraction of the
                squared norm; 1 takes the columns themselves, as published.
            earlier: whether the targets of earlier requests join the names, also where each request
                starts from the untouched model and they are merged.
        """
        if contexts is not None:
            check_contexts(contexts, "reg.gradproj.contexts")
        self.apply, self.auxiliary, self.threshold = apply, auxiliary, threshold
        self.tokens, self.contexts, self.energy = tokens, contexts, energy
        self.earlier = earlier
        self.acts_on = ("gradient",) if apply == "gradient" else ("step",)

    def begin_request(self, scope: Scope, method: Method[Batch]) -> dict[str, object]:
        """Choose the names, build P, and report the names used."""
        check_projected(scope, "reg.gradproj")
        self._linear = {name for name in scope.params if scope.model.reads_linearly(name)}
        targets = [concept.prompt_name for concept in scope.request.targets]
        joining = scope.request.earlier if self.earlier else ()
        earlier = [concept.prompt_name for concept in joining]
        shut = spellings(joining)
        candidates = [
            name for name in kept_names(scope, self.auxiliary) if normalized(name) not in shut
        ]
        if not candidates and not earlier:
            raise ValueError(
                "reg.gradproj.auxiliary: no name is left beside the target and the retained "
                "concepts; give more names"
            )
        contexts = [
            fill_caption(context, caption)
            for context in self.contexts or scope.sequence.target_prompt
            for caption in (scope.sequence.captions if "{caption}" in context else [""])
        ]
        goals = concept_vectors(scope.model, targets, contexts[0])
        # a small vocabulary can be used up: then the earlier targets alone span the subspace
        tokens: Literal["own", "last"] = "last" if self.tokens == "last" else "own"
        names = earlier + nearest_names(
            scope.model, candidates, targets, contexts[0], self.auxiliary.number, tokens
        )
        if self.tokens != "all":
            columns = torch.cat(
                [concept_vectors(scope.model, names, context, tokens) for context in contexts],
                dim=1,
            )
            kept = kept_columns(columns, self.threshold)
            columns = columns[:, kept]
            names = list(dict.fromkeys(names[column % len(names)] for column in kept))
        else:
            columns = torch.cat(
                [prompt_vectors(scope.model, names, context) for context in contexts], dim=1
            )
        if self.energy < 1:
            columns = principal_columns(columns, self.energy)
        self._projector = orthogonal_projector(columns)
        freedom = ((self._projector @ goals).norm(dim=0) / goals.norm(dim=0)).mean().item()
        if freedom < 1e-2:
            logger.warning(
                "reg.gradproj leaves nothing of %s to unlearn: give fewer names or less energy",
                scope.request.label,
            )
        return {"auxiliary": names, "rank": columns.shape[1], "target_outside_subspace": freedom}

    def on_gradients(self, params: dict[str, nn.Parameter]) -> None:
        """Project the gradients with apply=gradient."""
        if self.apply == "gradient":
            for name, gradient in gradients(params).items():
                if name in self._linear:
                    params[name].grad = gradient @ self._projector

    @without_gradients
    def on_step(self, params: dict[str, nn.Parameter], before: dict[str, Tensor]) -> None:
        """Project the step with apply=update."""
        if self.apply == "update":
            for name, parameter in params.items():
                if name in self._linear:
                    parameter.copy_(before[name] + (parameter - before[name]) @ self._projector)
