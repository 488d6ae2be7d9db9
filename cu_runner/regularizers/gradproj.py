"""Gradient projection off the text of auxiliary concepts (Lee et al. 2026, arXiv 2511.07970, Sec. 7).

A cross-attention key or value is W t with t a text-encoder output [D], so a change of W that vanishes on a concept's t leaves what
the model makes of that concept alone. The subspace of auxiliary concepts is removed from every gradient, or from every step.

Shapes: D text width, K auxiliary concepts, out attention width.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from cu_runner.lists import read_file, read_shipped
from cu_runner.methods.base import Scope
from cu_runner.models import DiffusionModel
from cu_runner.params import is_cross_attention_kv
from cu_runner.regularizers.base import Regularizer


def drop_similar(C: Tensor, threshold: float = 0.95) -> Tensor:
    """Keep the columns of C [D, K] whose cosine to every kept column before them is at most the threshold; [D, K']."""
    return C[:, kept_columns(C, threshold)]


def kept_columns(C: Tensor, threshold: float) -> list[int]:
    """Which columns drop_similar keeps."""
    cosine = F.normalize(C.double(), dim=0).T @ F.normalize(C.double(), dim=0)
    kept: list[int] = []
    for column in range(C.shape[1]):
        if all(cosine[column, other] <= threshold for other in kept):
            kept.append(column)
    return kept


def orthogonal_projector(C: Tensor) -> Tensor:
    """P [D, D] that removes the span of the columns of C [D, K]; computed in float64, returned in C's dtype.

    P = I - C (C^T C + r I)^-1 C^T with r = max(1e-4, 1e-6 tr(C^T C) / K)   (Lee et al. 2026, Sec. 7.2); by the pseudo-inverse of
    C where C^T C + r I is ill-conditioned. C with no column gives the identity.
    """
    width, count = C.shape
    eye = torch.eye(width, dtype=torch.float64, device=C.device)
    if count == 0:
        return eye.to(C.dtype)
    columns = C.double()
    gram = columns.T @ columns
    ridge = max(1e-4, 1e-6 * gram.trace().item() / count)
    regular = gram + ridge * torch.eye(count, dtype=torch.float64, device=C.device)
    if torch.linalg.cond(regular) < 1e12:
        return (eye - columns @ torch.linalg.solve(regular, columns.T)).to(C.dtype)
    return (eye - columns @ torch.linalg.pinv(columns)).to(C.dtype)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Auxiliary:
    """Where the names of the subspace come from.

    source: "vocabulary" of the sequence, a "list" that ships with the package, or a "file" of the user's with one name a line.
    name: which list, or the path of the file. number: how many names, the nearest to the target by text similarity first.
    retained: whether the retained concepts themselves may be among them (they are what RA-I measures).
    """

    source: Literal["vocabulary", "list", "file"] = "vocabulary"
    name: str | None = None
    number: PositiveInt = 200
    retained: bool = False


def read_names(auxiliary: Auxiliary, vocabulary: tuple[str, ...]) -> list[str]:
    """The candidate names, in order, without repeats. Raises ValueError when there are none."""
    readers = {"vocabulary": lambda _: list(vocabulary), "list": read_shipped, "file": read_file}
    try:
        return readers[auxiliary.source](auxiliary.name)
    except ValueError as error:
        raise ValueError(f"reg.gradproj.auxiliary.name={error}") from None


def concept_vectors(model: DiffusionModel, names: list[str], context: str) -> Tensor:
    """C [D, K]: the mean text-encoder output over each name's own tokens, the name standing in `context`."""
    prompts = [context.format(concept=name) for name in names]
    hidden = model.encode_prompts(prompts)
    columns = [
        hidden[i, model.token_span(name, prompt)].mean(0) for i, (name, prompt) in enumerate(zip(names, prompts, strict=True))
    ]
    return torch.stack(columns, dim=1)


class GradProj(Regularizer):
    """G P for the gradient G [out, D] of every cross-attention key and value, or the same for the optimiser's step."""

    def __init__(
        self,
        apply: Literal["gradient", "update"] = "gradient",
        auxiliary: Auxiliary = Auxiliary(),  # noqa: B008, frozen
        threshold: Annotated[float, Field(gt=0, le=1)] = 0.95,
        context: str = "{concept}",
    ) -> None:
        """
        Args:
            apply: "gradient" projects before the optimiser, as the released code does; AdamW then rescales element by element and
                leaves the subspace. "update" projects the step itself, which is exact.
            auxiliary: the names of the subspace. Earlier targets join them, the target of the request never does.
            threshold: a name whose vector has a larger cosine to a kept one is dropped as a duplicate.
            context: the prompt in which names are encoded; it must hold {concept}.
        """
        try:
            complete = "{concept}" in context and bool(context.format(concept="x"))
        except (KeyError, IndexError, ValueError):
            complete = False
        if not complete:
            raise ValueError(f"reg.gradproj.context={context!r}: it must hold {{concept}} and no other placeholder")
        self.apply, self.auxiliary, self.threshold, self.context = apply, auxiliary, threshold, context

    def begin_request(self, scope: Scope) -> dict[str, object]:
        """Choose the names, build P, and report the names used."""
        if not any(is_cross_attention_kv(name) for name in scope.params):
            raise ValueError("reg.gradproj projects cross-attention keys and values, and method.params trains none of them")
        targets = [concept.name for concept in scope.request.targets]
        earlier = [concept.name for concept in scope.request.erased if concept.name not in targets]
        held_out = {concept.name for concept in scope.sequence.retain} if not self.auxiliary.retained else set()
        banned = {*targets, *earlier, *held_out}
        candidates = [name for name in read_names(self.auxiliary, scope.sequence.vocabulary) if name not in banned]
        if not candidates:
            raise ValueError("reg.gradproj.auxiliary: no name is left beside the target and the retained concepts; give more names")
        goals = concept_vectors(scope.model, targets, self.context)
        columns = concept_vectors(scope.model, candidates, self.context)
        nearness = (F.normalize(columns, dim=0).T @ F.normalize(goals, dim=0)).amax(1)
        nearest = nearness.argsort(descending=True, stable=True)[: self.auxiliary.number].tolist()
        names = earlier + [candidates[i] for i in nearest]
        matrix = concept_vectors(scope.model, names, self.context)
        kept = kept_columns(matrix, self.threshold)
        self._projector = orthogonal_projector(matrix[:, kept])
        freedom = (self._projector @ goals).norm(dim=0) / goals.norm(dim=0)
        return {"auxiliary": [names[i] for i in kept], "target_outside_subspace": freedom.mean().item()}

    def on_gradients(self, params: dict[str, nn.Parameter]) -> None:
        if self.apply == "gradient":
            for name, parameter in params.items():
                if is_cross_attention_kv(name):
                    parameter.grad = parameter.grad @ self._projector

    @torch.no_grad()
    def on_step(self, params: dict[str, nn.Parameter], before: dict[str, Tensor]) -> None:
        if self.apply == "update":
            for name, parameter in params.items():
                if is_cross_attention_kv(name):
                    parameter.copy_(before[name] + (parameter - before[name]) @ self._projector)

    @property
    def edits_step(self) -> bool:
        return self.apply == "update"
