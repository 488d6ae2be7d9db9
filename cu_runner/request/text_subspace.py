"""Text-encoder outputs of names and prompts as columns, and their principal directions."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Literal

from cu_runner.concepts.sequence import KNOWN
from cu_runner.concepts.templates import check_template, fill
from cu_runner.models.diffusion import DiffusionModel
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

    Of a model whose text has several parts it is [D, parts x K], all names of the first part first.

    tokens: "own" is the mean over the name's own tokens, "last" the last token of the prompt before
    its end. A list may hold auxiliary names that are longer than the model reads: they are read as
    far as they go.
    """
    placed = [in_context(name, context) for name in names]
    prompts = [prompt for prompt, *_ in placed]
    text = model.encode_prompts(prompts)
    if tokens == "last":
        check_begin(model, placed)
    columns = []
    for part in model.prompts.parts:
        hidden = part.of(text).hidden
        if tokens == "last":
            # a prompt that is cut ends with the end of text too
            last = [max(part.end(prompt) - 1, 0) for prompt in prompts]
            columns.append(hidden[range(len(last)), last].T)
        else:
            spans = [
                part.span(name, prompt, before, partly=True) for prompt, name, before in placed
            ]
            means = [hidden[row, span].mean(0) for row, span in enumerate(spans)]
            columns.append(torch.stack(means, dim=1))
    return torch.cat(columns, dim=1)


def text_vectors(model: DiffusionModel, prompts: list[str]) -> Tensor:
    """Return every token's output of all prompts as columns, [D, positions].

    Those of the end and the padding are averaged into one.
    """
    text = model.encode_prompts(prompts)
    columns = []
    for part in model.prompts.parts:
        own = part.of(text)
        for place, prompt in enumerate(prompts):
            row = own[place : place + 1].positions()  # without what is masked
            end = part.end(prompt)
            columns += [*row[:end], *([row[end:].mean(0)] if len(row) > end else [])]
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
    for prompt, name, before in placed:
        for part in model.prompts.parts:
            span = part.find(name, prompt, before)
            if span is not None and span.start >= part.length - part.ends:
                part.span(name, prompt, before)


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
    parts = len(model.prompts.parts)
    own = F.normalize(concept_vectors(model, names, context, tokens), dim=0).chunk(parts, dim=1)
    wanted = F.normalize(concept_vectors(model, targets, context), dim=0).chunk(parts, dim=1)
    # a mean over the parts of the text
    cosines = sum(one.T @ other for one, other in zip(own, wanted, strict=True)) / parts
    nearness = torch.as_tensor(cosines).amax(1)
    return [names[i] for i in nearness.argsort(descending=True, stable=True)[:number].tolist()]


def check_projected(scope: Scope, key: str) -> None:
    """Raise ValueError when no trained weight can be projected; warn, once a run, of the rest."""
    free = [name for name in scope.params if not scope.model.reads_linearly(name)]
    if len(free) == len(scope.params):
        raise ValueError(
            f"{key} projects weights that are linear in the text encoder's output, and "
            "method.params trains none of them; choose method.params=text_linear"
        )
    if free and scope.request.index == 1:
        logger.warning(
            "%s projects weights that read the text linearly: %d other trained weights move freely",
            key,
            len(free),
        )


def check_contexts(contexts: tuple[str, ...], key: str) -> None:
    """Raise ValueError unless there is one context, and each is a template of prompts."""
    for context in contexts:
        check_template(context, key, ("concept",), KNOWN)
    if not contexts:
        raise ValueError(f"{key} is empty; give at least one prompt with {{concept}}")
