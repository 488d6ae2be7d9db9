"""Null-space projection: the step leaves the text of kept prompts alone.

After Adam-NSCL, Wang et al., CVPR 2021, arXiv 2103.07113, and GPM, Saha et al., ICLR 2021, arXiv
2103.09762.

A cross-attention key or value is W t with t a text-encoder output [D] of any position: begin,
context, concept, end, padding. The top principal directions of such outputs over kept prompts are
removed from the optimiser's step, so that W t hardly moves for them however many steps are taken.

Ours: the step is confined, besides, to the directions outside the subspace that the target's own
text takes most. Adam's step, rescaled element by element, would otherwise fill all that is left of
the space, and with it names that no kept prompt holds.

Shapes: D text width, N text vectors, out attention width.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from cu_runner.concepts.entries import read_file, spread
from cu_runner.concepts.templates import fill, fill_caption
from cu_runner.methods.base import Batch, Method
from cu_runner.regularizers.base import Regularizer
from cu_runner.request.name_sources import NameSource, earlier_targets, kept_names
from cu_runner.request.scope import Scope
from cu_runner.request.text_subspace import (
    check_contexts,
    check_projected,
    nearest_names,
    principal_columns,
    text_vectors,
)
from cu_runner.request.token_limit import check_read
from cu_runner.runtime.lazy import nn, torch, without_gradients

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


def null_space_projector(X: Tensor, rank: int | None = None, energy: float | None = None) -> Tensor:
    """Return P = I - V V^T [D, D], V the top principal directions of X^T X, not centred (Adam-NSCL;
    GPM).

    Computed in float64, returned in X's dtype.

    Args:
        X: text vectors [N, D], one a row.
        rank: how many directions, at most the numerical rank of X; from D on nothing is left, P =
            0.
        energy: or the fewest that hold this fraction of ||X||_F^2; 1 is the numerical row space of
            X, 0 removes nothing.

    Raises:
        ValueError: not exactly one of rank and energy, or one out of its range.
    """
    if (rank is None) == (energy is None):
        raise ValueError(
            f"rank={rank} and energy={energy}: give exactly one of the two, the other as null"
        )
    if rank is not None and rank < 0:
        raise ValueError(f"rank={rank}: a number of directions is 0 or more")
    if energy is not None and not 0 <= energy <= 1:
        raise ValueError(f"energy={energy}: a fraction from 0 to 1")
    V = principal_columns(X.double().T, energy, rank=rank)
    if V.shape[1] == X.shape[1] or (rank or 0) >= X.shape[1]:
        return X.new_zeros(X.shape[1], X.shape[1])
    return (torch.eye(X.shape[1], dtype=torch.float64, device=X.device) - V @ V.T).to(X.dtype)


def own_directions(P: Tensor, groups: list[Tensor], rank: int) -> Tensor:
    """Return the top principal directions of each group [N, D] within the range of P.

    They are U [D, rank * groups at most], orthonormal, float64. What the groups before have taken
    is left out, and so are directions with less than 1e-6 of a group's squared norm.
    """
    U = P.new_zeros(len(P), 0, dtype=torch.float64)
    for rows in groups:
        left = rows.double() @ P.double()
        left = left - left @ U @ U.T
        columns = principal_columns(left.T, rank=rank)
        held = (left @ columns).square().sum(0) / rows.double().square().sum()
        U = torch.cat([U, columns[:, held > 1e-6]], dim=1)
    return U


class NullSpace(Regularizer):
    """Project the optimiser's step S [out, D] of every cross-attention key and value to S P."""

    reads_words = "lets keys and values change on the texts of other prompts least"
    linear = "any"
    acts_on = ("step",)

    def __init__(
        self,
        rank: NonNegativeInt | None = None,
        energy: Annotated[float, Field(gt=0, le=1)] | None = 0.97,
        target_rank: PositiveInt | None = 1,
        scaled: bool = True,
        sources: tuple[Literal["names", "anchors", "empty"], ...] = ("names", "anchors", "empty"),
        file: str | None = None,
        names: NameSource = NameSource(),
        contexts: tuple[str, ...] | None = None,
        prompts: PositiveInt = 2000,
        earlier: NonNegativeInt = 1,
    ) -> None:
        """
        Args:
            rank, energy: the subspace that is left alone: so many directions, or as many as hold
                this fraction of the kept text.
            target_rank: confine the step to so many directions per target, those that its text
                takes most outside the subspace; None uses all that is left.
            scaled: divide the step by the fraction of the target's text that it can move, so that
                one step size unlearns every target alike. The step of a closed form has its right
                size already, and is not scaled.
            sources: of kept prompts: other names of the domain, the targets' anchor prompts, the
                empty prompt (of guidance). Each source counts as much as another, however many
                prompts it holds.
            file: a user's file of kept prompts, one a line, as a further source.
            names: the names among the sources, those nearest to the target first. The target is
                never one of them.
            contexts: the prompts in which names and targets are encoded, with {concept} and
                {caption}; None is the sequence's target_prompt. {caption} runs through the
                sequence's captions.
            prompts: at most so many of each source.
            earlier: directions outside the subspace that each earlier target's text takes most, and
                which are left alone too, so that it stays as unlearned as it is; 0 lets earlier
                targets move.
        """
        if (rank is None) == (energy is None):
            raise ValueError(
                f"reg.nullspace: rank={rank} and energy={energy}; give exactly one of the two, the "
                "other as null"
            )
        if not sources and file is None:
            raise ValueError(
                "reg.nullspace.sources is empty and there is no file; keep something: names, "
                "anchors, empty"
            )
        if contexts is not None:
            check_contexts(contexts, "reg.nullspace.contexts")
        self.rank, self.energy, self.target_rank = rank, energy, target_rank
        self.scaled, self.earlier = scaled, earlier
        self.sources, self.file, self.names = sources, file, names
        self.contexts, self.prompts = contexts, prompts

    def begin_request(self, scope: Scope, method: Method[Batch]) -> dict[str, object]:
        """Build P from the kept prompts and from the text of the targets and the earlier ones.

        Return the names used and the sizes.
        """
        check_projected(scope, "reg.nullspace")
        self._linear = {name for name in scope.params if scope.model.reads_linearly(name)}
        names, kept = self.kept_prompts(scope)
        if not kept:
            raise ValueError(
                "reg.nullspace: no name is left beside the target and the retained concepts; add a "
                "source of prompts"
            )
        vectors = [text_vectors(scope.model, prompts).T.double() for prompts in kept.values()]
        X = torch.cat([rows / len(rows) ** 0.5 for rows in vectors])
        P = null_space_projector(X, self.rank, self.energy)
        record = {
            "auxiliary": names,
            "earlier": earlier_targets(scope) if self.earlier else [],
            "prompts": {source: len(prompts) for source, prompts in kept.items()},
            "rank": len(P) - round(P.trace().item()),
            "energy": 1 - ((X @ P).square().sum() / X.square().sum()).item(),
        }
        check_read(
            scope.model,
            (
                (concept.prompt_name, prompt)
                for concept in scope.request.targets
                for prompt in self.fill(scope, [concept.prompt_name])
            ),
        )
        targets, earlier = (
            [text_vectors(scope.model, self.fill(scope, [name])).T.double() for name in group]
            for group in (
                [concept.prompt_name for concept in scope.request.targets],
                earlier_targets(scope),
            )
        )
        if self.earlier:
            U = own_directions(P, earlier, self.earlier)
            P = P - U @ U.T
        record["target_outside_subspace"] = fraction(targets, P)
        if self.target_rank:
            U = own_directions(P, targets, self.target_rank)
            P = U @ U.T
        moved = record["target_moved"] = fraction(targets, P)
        if moved < 1e-3:
            logger.warning(
                "reg.nullspace leaves nothing of %s to unlearn: lower its energy, rank or earlier",
                scope.request.label,
            )
        elif self.scaled and not method.closed_form:
            P = P / moved
        self._projector = P.float()
        return record

    def kept_prompts(self, scope: Scope) -> tuple[list[str], dict[str, list[str]]]:
        """Return the names used, and the prompts of each source that has any."""
        sequence = scope.sequence
        targets = [concept.prompt_name for concept in scope.request.targets]
        names: list[str] = []
        if "names" in self.sources:
            candidates = kept_names(scope, self.names)
            names = nearest_names(scope.model, candidates, targets, "{concept}", self.names.number)
        anchors = [
            anchor
            for concept in scope.request.erased
            for _, anchor in sequence.training_pairs(concept)
        ]
        found = {
            "names": self.fill(scope, names)[: self.prompts],
            "anchors": spread(list(dict.fromkeys(anchors)), self.prompts)
            if "anchors" in self.sources
            else [],
            "empty": [""] if "empty" in self.sources else [],
            "file": self.read(),
        }
        return names, {source: prompts for source, prompts in found.items() if prompts}

    def fill(self, scope: Scope, names: list[str]) -> list[str]:
        """Return every context with every name and caption.

        Name i meets caption i first, so that the first prompts hold every name.
        """
        captions, contexts = (
            scope.sequence.captions,
            self.contexts or scope.sequence.target_prompt,
        )
        filled = [
            fill(fill_caption(context, captions[(i + shift) % len(captions)]), concept=name)
            for shift in range(len(captions))
            for context in contexts
            for i, name in enumerate(names)
        ]
        return list(dict.fromkeys(filled))

    def read(self) -> list[str]:
        """Read the prompts of the user's file. Raise ValueError if it cannot be read."""
        if self.file is None:
            return []
        try:
            return spread(read_file(self.file), self.prompts)
        except ValueError as error:
            raise ValueError(f"reg.nullspace.file={error}") from None

    @without_gradients
    def on_step(self, params: dict[str, nn.Parameter], before: dict[str, Tensor]) -> None:
        """Project the step."""
        for name, parameter in params.items():
            if name in self._linear:
                parameter.copy_(before[name] + (parameter - before[name]) @ self._projector)


def fraction(groups: list[Tensor], P: Tensor) -> float:
    """Return ||T P|| / ||T|| of all rows T [N, D] of the groups together."""
    T = torch.cat(groups)
    return ((T @ P).norm() / T.norm()).item()
