"""Text-encoder outputs of names and prompts as columns, and their principal directions."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.parameters import is_cross_attention_kv
from cu_runner.request.name_sources import check_template
from cu_runner.request.scope import Scope
from cu_runner.runtime.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor

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


def concept_vectors(model: DiffusionModel, names: list[str], context: str) -> Tensor:
    """Return the mean text-encoder output over each name's own tokens, [D, K].

    The names stand in `context`.
    """
    prompts = [context.format(concept=name) for name in names]
    hidden = model.encode_prompts(prompts).hidden
    spans = [model.token_span(name, prompt) for name, prompt in zip(names, prompts, strict=True)]
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
    return text_vectors(model, [context.format(concept=name) for name in names])


def nearest_names(
    model: DiffusionModel, names: list[str], targets: list[str], context: str, number: int
) -> list[str]:
    """Return at most `number` of the names, those nearest to a target first.

    Nearness is the cosine of their own tokens' means in `context`.
    """
    if not names:
        return []
    units = [
        F.normalize(concept_vectors(model, group, context), dim=0) for group in (names, targets)
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
        check_template(context, key)
    if not contexts:
        raise ValueError(f"{key} is empty; give at least one prompt with {{concept}}")
