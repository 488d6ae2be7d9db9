"""What closed forms share: the text that they solve for, sums of it, and the one step.

A key or value of cross-attention is W c, with c one of the text-encoder outputs of a prompt. A
closed form sets W from such outputs of the targets, their anchors and what is preserved.

Cumulative ones solve every request again for all targets so far, from the untouched weights. The
targets are taken in the order of their names and nothing else of the request is looked at, so the
weights are those of the set of targets, on a CPU bit by bit: the order of requests has no part in
them.

Shapes: L tokens, D text width, N edited and M preserved token positions, out attention width.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cu_runner.concepts.requests import Request
from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.methods.base import Method
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.text import Text
from cu_runner.request.images import RetainSet
from cu_runner.request.name_sources import earlier_concepts, mention, spellings
from cu_runner.request.scope import Scope
from cu_runner.request.text_subspace import concept_vectors
from cu_runner.runtime.lazy import torch, without_gradients

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

Tokens = Literal["last", "all"]

REMEMBERED = 2**30  # bytes of sums that one ConceptSums holds at most


@dataclass(frozen=True)
class TextPairs:
    """Text-encoder outputs, one row a token position."""

    concept: Tensor  # [N, D], what is edited
    anchor: Tensor  # [N, D], what its keys and values shall become those of
    preserved: Tensor  # [M, D]


@dataclass(frozen=True)
class PromptPair:
    """A prompt of a concept and the one of its anchor.

    first: the concept's first position. Those before it do not know of the concept: the text
    encoder is causal.
    """

    own: Tensor  # [L, D]
    anchor: Tensor  # [L, D]
    first: int


class ClosedForm(Method[TextPairs]):
    """One step that sets the weights to what solve() returns."""

    closed_form = True
    linear = "all"
    reads_words = "solves for keys and values, which are linear in the text of a prompt"
    holds_context = False  # whether what stands before the concept is edited to itself

    def __init__(self, retain: RetainSet, cumulative: bool, tokens: Tokens) -> None:
        """
        Args:
            retain: what is preserved; no images are made of it.
            cumulative: solve for all targets so far from the untouched weights; else for those of
                the request alone, from the weights that it starts with.
            tokens: "last" edits the last token of the bare concept (the sequence's bare_prompt)
                and preserves the last of each bare name; "all" edits every position from the
                concept's first token on, in the sequence's training prompts, and preserves every
                position of kept prompts.
        """
        self.retain, self.cumulative, self.tokens = retain, cumulative, tokens

    @abstractmethod
    def solve(self, scope: Scope, text: TextPairs) -> dict[str, Tensor]:
        """Return the new weights by name.

        Args:
            scope: its targets are what to solve for, its start the weights to solve from.
            text: that of the request's own targets, and all that is preserved.
        """

    def solved(self, scope: Scope) -> Scope:
        """Return the request that is solved in place of the one at hand."""
        return together(scope) if self.cumulative else scope

    def batch(self, scope: Scope, step: int) -> TextPairs:
        """Return the one batch: the text of the request's targets and what is preserved."""
        pairs = [
            pair
            for concept in scope.request.targets
            for pair in prompt_pairs(scope, concept, self.tokens)
        ]
        concept, anchor = edited_rows(pairs, self.holds_context)
        return TextPairs(
            concept, anchor, preserved_rows(self.solved(scope), self.retain, self.tokens)
        )

    @without_gradients
    def backward(self, scope: Scope, batch: TextPairs) -> dict[str, float]:
        """Solve for the weights, which update() sets.

        The logs are mean squares over positions and outputs of the request's own targets, averaged
        over the weights. loss: what is left between the concept's keys and values and the
        anchor's. before: the same without the edit. preservation_loss: how far the preserved ones
        move.
        """
        solved, rows = self.solved(scope), []
        self._edited = self.solve(solved, batch)
        for name, weight in self._edited.items():
            old = solved.start[name]
            values = batch.anchor @ old.T  # [N, out]
            gaps = (
                batch.concept @ weight.T - values,
                batch.concept @ old.T - values,
                batch.preserved @ (weight - old).T,
            )
            rows.append([gap.square().mean().item() for gap in gaps])
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


# --------------------------------------------------------------------------------------------- text
def together(scope: Scope) -> Scope:
    """Return one request, from the untouched model, for all that shall be unlearned by now.

    Its targets are in the order of their names.
    """
    return at_once(scope, sorted(scope.request.erased, key=lambda concept: concept.name))


def at_once(scope: Scope, targets: Iterable[Concept]) -> Scope:
    """Return one request for all of these, from the untouched model.

    Its random numbers are those of request 0, whichever it stands for.
    """
    return dataclasses.replace(
        scope,
        request=Request(1, "simultaneous", tuple(targets), is_only=True),
        start=scope.base,
        rng=dataclasses.replace(scope.rng, request=0),
    )


def bare(sequence: Sequence) -> Sequence:
    """Return the sequence with bare names of concepts and anchors in place of its prompts."""
    return dataclasses.replace(
        sequence,
        target_prompt=(sequence.bare_prompt,),
        anchor_prompt="{anchor}",
        captions=("",),
        anchor_captions={},
        parts={domain: bare(own) for domain, own in sequence.parts.items()},
    )


def last_tokens(model: DiffusionModel, prompts: list[str]) -> Tensor:
    """Return the last token of each prompt before its end, [prompts, D]; of "" the begin."""
    return concept_vectors(model, prompts, "{concept}", "last").T


def prompt_pairs(scope: Scope, concept: Concept, tokens: Tokens) -> list[PromptPair]:
    """Return the prompts of a concept beside those of its anchor; L = 1 with tokens="last"."""
    model = scope.model
    if tokens == "last":
        ((own, anchor),) = bare(scope.sequence).training_pairs(concept)
        return [PromptPair(last_tokens(model, [own]), last_tokens(model, [anchor]), 0)]
    pairs = []
    for prompts in scope.sequence.training_pairs(concept):
        both = model.encode_prompts(list(prompts))
        for part in model.prompts.parts:
            # where every position knows the concept, all of them are edited
            span = part.span(concept.prompt_name, prompts[0])
            first = span.start if part.causal else 0
            pairs.append(PromptPair(*read_rows(part.of(both)), first))
    return pairs


def read_rows(text: Text) -> tuple[Tensor, Tensor]:
    """Return the positions that are read of the first of two prompts, and as many of the second.

    Where padding is masked and the second is shorter, its last position stands for the rest.
    """
    own, anchor = text.hidden
    if text.mask is None:
        return own, anchor
    lengths = text.mask.sum(1).tolist()
    places = torch.arange(lengths[0], device=anchor.device).clamp(max=lengths[1] - 1)
    return own[: lengths[0]], anchor[places]


def edited_rows(pairs: list[PromptPair], holds_context: bool) -> tuple[Tensor, Tensor]:
    """Return what is edited and what its keys and values shall become those of, [N, D] each.

    That is every position from the concept's first on, onto the same position of the anchor's
    prompt. holds_context: those before it too, onto themselves.
    """
    if holds_context:
        return (
            torch.cat([pair.own for pair in pairs]),
            torch.cat(
                [torch.cat([pair.own[: pair.first], pair.anchor[pair.first :]]) for pair in pairs]
            ),
        )
    return (
        torch.cat([pair.own[pair.first :] for pair in pairs]),
        torch.cat([pair.anchor[pair.first :] for pair in pairs]),
    )


def read_prompts(scope: Scope, retain: RetainSet) -> list[str]:
    """Return the prompts of a retain set.

    Those of a list or a file that name something unlearned or, unless its names let them in, a
    retained concept of either domain are left out.

    Raises:
        ValueError: none is left.
    """
    prompts = retain.read(scope)
    if retain.source in ("list", "file"):
        sequence = scope.sequence
        banned = [*scope.request.targets, *scope.request.erased]
        if not retain.names.retained:
            banned += [*sequence.retain, *sequence.cross_retain]
        shut = spellings(banned)
        prompts = [prompt for prompt in prompts if not mention(prompt, shut)]
        if not prompts:
            raise ValueError(
                f"retain: every prompt of {retain.name} names a target or a retained concept; "
                "choose another source"
            )
    return prompts


def preserved_rows(scope: Scope, retain: RetainSet, tokens: Tokens) -> Tensor:
    """Return what is preserved, [M, D]; the prompts of earlier targets join the retain set.

    They stay as unlearned as they are. A cumulative request has no earlier targets.
    """
    if tokens == "last":
        scope = dataclasses.replace(scope, sequence=bare(scope.sequence))
    prompts = read_prompts(scope, retain) + [
        prompt
        for concept in earlier_concepts(scope)
        for prompt in scope.sequence.facing(concept).prompts_naming(concept.prompt_name)
    ]
    if tokens == "last":
        return last_tokens(scope.model, prompts)
    return scope.model.encode_prompts(prompts).positions()


# --------------------------------------------------------------------------------------------- sums
@dataclass(frozen=True)
class Sums:
    """Sums over token positions. matrices: [k, D, D], float64. number: of positions."""

    matrices: Tensor
    number: int

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.matrices + other.matrices, self.number + other.number)


def edit_sums(concept: Tensor, anchor: Tensor) -> Sums:
    """Return B = sum c c^T and E = sum (a - c) c^T over rows c of concept, a of anchor, [N, D]."""
    inputs = concept.double()
    gap = anchor.double() - inputs
    return Sums(torch.stack([inputs.T @ inputs, gap.T @ inputs]), len(inputs))


def pair_sums(
    scope: Scope, concept: Concept, *, tokens: Tokens, holds_context: bool = False
) -> Sums:
    """Return edit_sums of a concept's prompts and those of its anchor, [2, D, D]."""
    return edit_sums(*edited_rows(prompt_pairs(scope, concept, tokens), holds_context))


class ConceptSums:
    """Sums over the text of each concept, which requests add up again and again.

    A concept's sums depend on the text encoder, which is not trained, and on its prompts alone.
    They are remembered across requests while there is room, and are bitwise the same made anew.
    """

    def __init__(self, make: Callable[[Scope, Concept], Sums]) -> None:
        """Take what makes the sums of one concept, of the scope's model and sequence alone."""
        self._make = make
        self._model: DiffusionModel | None = None
        self._known: dict[tuple[object, ...], Sums] = {}

    def total(self, scope: Scope) -> Sums:
        """Return the sums of all targets of the request, added in their order."""
        return functools.reduce(
            Sums.__add__, (self.of(scope, concept) for concept in scope.request.targets)
        )

    def of(self, scope: Scope, concept: Concept) -> Sums:
        """Return the sums of one concept."""
        if scope.model is not self._model:
            self._model, self._known = scope.model, {}
        sequence = scope.sequence
        key = (concept, sequence.bare_prompt, *sequence.training_pairs(concept))
        if (known := self._known.get(key)) is not None:
            return known
        sums = self._make(scope, concept)
        if (len(self._known) + 1) * sums.matrices.nbytes <= REMEMBERED:
            self._known[key] = sums
        return sums


def at_inputs(weights: dict[str, Tensor], change: Tensor) -> dict[str, Tensor]:
    """Return W (I + M) of every weight W [out, D], with M = change [D, D] in float64."""
    return {
        name: (weight.double() + weight.double() @ change).to(weight.dtype)
        for name, weight in weights.items()
    }
