"""Text-encoder outputs of names and prompts as columns, and their principal directions."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Literal

from cu_runner.concepts.sequence import KNOWN
from cu_runner.concepts.templates import check_template, fill
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.parameters import is_cross_attention_kv
from cu_runner.models.text import find_tokens
from cu_runner.request.scope import Scope
from cu_runner.runtime.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor

MARKED = re.compile(r"([^{}]*)\{([^{}]+)\}([^{}]*)")

logger = logging.getLogger(__name__)


def principal_columns(C: Tensor, energy: float | None = None, *, rank: int | None = None) -> Tensor:
    """Return the top principal directions of C [D, K], not centred; [D, rank], orthonormal.

    Args:
        energy: take the fewest that hold this fraction of ||C||_F^2.
        rank: or take this many. Either way, and without both, at most the numerical rank.
    """
    values, directions = torch.linalg.eigh(C.double() @ C.double().T)  # ascending
    values, directions = values.flip(0).clamp(min=0), directions.flip(1)
    if rank is None and energy is not None:
        # the tolerance keeps ties clear of rounding
        short = values.cumsum(0) < (energy - 1e-12) * values.sum()
        rank = int(short.sum().item()) + 1 if energy > 0 else 0
    numerical = values > max(C.shape) * torch.finfo(torch.float64).eps * values[0]
    most = int(numerical.sum().item())
    return directions[:, : most if rank is None else min(rank, most)].to(C.dtype)


def in_context(name: str, context: str) -> tuple[str, str, str]:
    """Return a prompt, the part of it that stands for the name, and what comes before that part.

    A name that is a whole prompt with one part in braces ("An image of a {cat}") brings its own
    context; any other stands in `context`. Raises ValueError for braces that mark no one part.
    """
    if marked := MARKED.fullmatch(name):
        before, part, after = marked.groups()
        return f"{before}{part}{after}", part, before
    if "{" in name or "}" in name:
        raise ValueError(f"{name!r}: a prompt among names has one part in braces: the name itself")
    return fill(context, concept=name), name, context.partition("{concept}")[0]


def concept_vectors(
    model: DiffusionModel, names: list[str], context: str, tokens: Literal["own", "last"] = "own"
) -> Tensor:
    """Return a text-encoder output of each name, [D, K]; the names stand in `context`.

    tokens: "own" is the mean over the name's own tokens, "last" the last token of the prompt before
    its end. A list may hold auxiliary names that are longer than the model reads: they are read as
    far as they go.
    """
    placed = [in_context(name, context) for name in names]
    prompts = [prompt for prompt, *_ in placed]
    hidden = model.encode_prompts(prompts).hidden
    if tokens == "last":
        check_begin(model, placed)
        lengths = [len(model.tokenizer(prompt).input_ids) for prompt in prompts]
        # a prompt that is cut ends with the end of text too
        last = [min(length, hidden.shape[1]) - 2 for length in lengths]
        return hidden[range(len(last)), last].T
    spans = [model.token_span(part, prompt, before, partly=True) for prompt, part, before in placed]
    return torch.stack([hidden[row, span].mean(0) for row, span in enumerate(spans)], dim=1)


def text_vectors(model: DiffusionModel, prompts: list[str]) -> Tensor:
    """Return every token's output of all prompts as columns, [D, positions].

    Those of the end and the padding are averaged into one.
    """
    hidden = model.encode_prompts(prompts).hidden
    columns = []
    for row, prompt in zip(hidden, prompts, strict=True):
        end = min(len(model.tokenizer(prompt).input_ids), len(row)) - 1
        columns += [*row[:end], row[end:].mean(0)]
    return torch.stack(columns, dim=1)


def prompt_vectors(model: DiffusionModel, names: list[str], context: str) -> Tensor:
    """Return text_vectors of the names, each standing in `context`."""
    placed = [in_context(name, context) for name in names]
    check_begin(model, placed)
    return text_vectors(model, [prompt for prompt, *_ in placed])


def check_begin(model: DiffusionModel, placed: list[tuple[str, str, str]]) -> None:
    """Raise ValueError for a name of which the model reads no token in its prompt.

    Whole captions that stand for names may be cut at their end.
    """
    for prompt, part, before in placed:
        span = find_tokens(model.tokenizer, part, prompt, before)
        if span is not None and span.start >= model.num_tokens - 1:
            model.token_span(part, prompt, before)


def nearest_names(
    model: DiffusionModel,
    names: list[str],
    targets: list[str],
    context: str,
    number: int,
    tokens: Literal["own", "last"] = "own",
) -> list[str]:
    """Return at most `number` of the names, those nearest to a target first.

    Nearness is the cosine of concept_vectors, of the targets' own tokens.
    """
    if not names:
        return []
    units = [
        F.normalize(concept_vectors(model, names, context, tokens), dim=0),
        F.normalize(concept_vectors(model, targets, context), dim=0),
    ]
    nearness = (units[0].T @ units[1]).amax(1)
    return [names[i] for i in nearness.argsort(descending=True, stable=True)[:number].tolist()]


def check_projected(scope: Scope, key: str) -> None:
    """Raise ValueError when no trained weight can be projected; warn, once a run, of the rest."""
    free = [name for name in scope.params if not is_cross_attention_kv(name)]
    if len(free) == len(scope.params):
        raise ValueError(
            f"{key} projects cross-attention keys and values, and method.params trains none of them"
        )
    if free and scope.request.index == 1:
        logger.warning(
            "%s projects keys and values only: %d other trained weights move freely", key, len(free)
        )


def check_contexts(contexts: tuple[str, ...], key: str) -> None:
    """Raise ValueError unless there is one context, and each is a template of prompts."""
    for context in contexts:
        check_template(context, key, ("concept",), KNOWN)
    if not contexts:
        raise ValueError(f"{key} is empty; give at least one prompt with {{concept}}")
