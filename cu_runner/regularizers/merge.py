"""Merging: each request is unlearned alone from the untouched model, and the changes of the weights
are merged.

Lee et al. 2026, arXiv 2511.07970, Sec. 5. TIES: Yadav et al., NeurIPS 2023, arXiv 2306.01708. Task
arithmetic: Ilharco et al., ICLR 2023, arXiv 2212.04089. Regression: RegMean, Jin et al., ICLR 2023,
arXiv 2212.09849, as stage 3 of MACE fuses (Lu et al., CVPR 2024).

Shapes: N requests, P elements of one weight tensor, D text width, out attention width.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from cu_runner.methods._closed_form import ConceptSums, at_once, pair_sums, preserved_rows
from cu_runner.methods.base import Batch, Method
from cu_runner.models.parameters import TEXT_WEIGHTS, largest
from cu_runner.regularizers.base import Regularizer
from cu_runner.request.images import RetainSet
from cu_runner.request.scope import Scope
from cu_runner.runtime.lazy import torch, without_gradients

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


def ties(
    deltas: Tensor, topk: float, lam: float = 1.0, how: Literal["mean", "sum", "max"] = "mean"
) -> Tensor:
    """Merge the changes [N, P] of one weight tensor into one [P]: scale, trim, elect a sign, join
    what has it.

    Trimming keeps exactly floor(topk * P) elements of each row, the largest in magnitude and of
    equal ones the first (the released code keeps one more, and every equal one): topk 0 merges to
    zeros, topk 1 trims nothing. The elected sign of an element is that of its sum over the rows;
    where the sum is 0 it is the sign that most elements elected, and without such a majority the
    element stays 0 (the released code then takes the negative ones). Zeros, trimmed or not, have no
    sign: a row of zeros changes nothing. One row (N = 1) comes back scaled and trimmed.

    Args:
        topk: fraction kept of each row, 0..1.
        lam: scale of the changes, applied before trimming as in the released code.
        how: "mean", "sum" or largest magnitude ("max") of the elements that have the elected sign.
    """
    # Yadav et al. 2023, Algorithm 1, with lambda where the released code of Lee et al. has it;
    # row by row, for the sake of memory
    count = math.floor(topk * deltas.shape[1])
    kept = torch.stack([largest(row.abs(), count) for row in deltas])
    total = sum(lam * row * mask for row, mask in zip(deltas, kept, strict=True))
    elected = total.sign()
    majority = elected.sum(dtype=torch.float64).sign().to(elected.dtype)
    elected = torch.where(elected == 0, majority, elected)
    joined, number = torch.zeros_like(total), torch.zeros_like(total)
    for row, mask in zip(deltas, kept, strict=True):
        change = lam * row * mask
        change *= change.sign() == elected
        joined = torch.maximum(joined, change.abs()) if how == "max" else joined + change
        number += change != 0
    if how == "max":
        return joined * elected
    return joined if how == "sum" else joined / number.clamp(min=1)


def regression(changes: Tensor, covariances: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """Merge the changes [N, out, D] of one weight so that each request's text sees its own.

    covariances: S_i [N, D, D], of the text of requests. kept: s S_0 [D, D], of what stays. It is
    computed in float64 and returned in the dtype of the changes.

    min_W sum_i ||(W - W_i) S_i^1/2||^2 + s ||(W - W_0) S_0^1/2||^2 + l ||W - W_0||^2 is
    W = (sum_i W_i S_i + s W_0 S_0 + l W_0) (sum_i S_i + s S_0 + l I)^-1
      = W_0 + (sum_i tau_i S_i) (sum_i S_i + s S_0 + l I)^-1
    """
    eye = torch.eye(len(kept), dtype=torch.float64, device=kept.device)
    moved = torch.einsum("noc,ncd->od", changes.double(), covariances.double())
    whole = covariances.double().sum(0) + kept.double() + ridge * eye
    return torch.linalg.solve(whole, moved, left=False).to(changes.dtype)


def worded(meaning: str) -> WrapValidator:
    """Say what is allowed, in place of one error for each member of a union."""

    def validate(value: object, check: ValidatorFunctionWrapHandler) -> float | list[float]:
        try:
            return check(value)
        except ValidationError:
            raise ValueError(
                f"give {meaning}, or a list of them, one for each request from the second on"
            ) from None

    return WrapValidator(validate)


Scale = Annotated[float, Field(gt=0)]


Fraction = Annotated[float, Field(ge=0, le=1)]


class Merge(Regularizer):
    """theta_n = theta_base + merge(tau_1 .. tau_n), theta_1 as it is.

    tau_i is the change of the weights by request i alone.
    """

    acts_on = ("weights",)
    independent_starts = True

    def __init__(
        self,
        rule: Literal["ties", "uniform", "task_arithmetic", "regression"] = "ties",
        lam: Annotated[Scale | list[Scale], worded("a number above 0")] = 1.0,
        topk: Annotated[Fraction | list[Fraction], worded("a number from 0 to 1")] = 0.4,
        how: Literal["mean", "sum", "max"] = "mean",
        keep: NonNegativeFloat = 1.0,
        ridge: PositiveFloat = 0.01,
        retain: RetainSet = RetainSet(),
    ) -> None:
        """
        Args:
            rule: "ties", see there; "uniform" is lam times the mean of the changes,
                "task_arithmetic" lam times their sum; "regression", see there, has no scale, and is
                for cross-attention keys and values alone: no other weight reads text.
            lam: scale of the changes; a number, or one for each request from the second on.
            topk: for ties; a number, or one for each request from the second on.
            how: for ties.
            keep: for regression, the weight s of the text that stays, a mean over its positions as
                that of each request is.
            ridge: for regression, the weight l of the distance to the untouched weights.
            retain: for regression, the prompts whose text stays; no images are made of them.
        """
        self.rule, self.lam, self.topk, self.how = rule, lam, topk, how
        self.reads_words = "merges by the text that a weight reads" * (rule == "regression")
        self.linear = "all" if rule == "regression" else None
        self.keep, self.ridge, self.retain = keep, ridge, retain
        self._sums = ConceptSums(functools.partial(pair_sums, tokens="all"))

    def check(self, method: Method[Batch]) -> None:
        """Refuse regression where it would merge weights that read no text."""
        if self.rule == "regression" and method.params not in TEXT_WEIGHTS:
            raise ValueError(
                "reg.merge.rule=regression merges by the text that a weight reads, and "
                f"method.params={method.params} trains weights that read none; choose "
                "method.params=text_linear or another rule"
            )

    def begin_request(self, scope: Scope, method: Method[Batch]) -> dict[str, object]:
        """Refuse a schedule that will not last, before anything is trained."""
        self._check_schedules(len(scope.sequence.targets))
        return {}

    def post_request(
        self, names: list[str], deltas: Callable[[str], Tensor], scope: Scope
    ) -> dict[str, Tensor] | None:
        """Merge tensor by tensor, so that the changes of one tensor at a time are in memory."""
        number = len(deltas(names[0]))
        if number == 1:
            logger.info(
                "merge: every request starts from the untouched model; from the second on their "
                "changes are merged"
            )
            return None
        # begin_request is not called for a request whose training was cached
        self._check_schedules(number)
        if self.rule == "regression":
            text = self._covariances(scope)
            return {name: regression(deltas(name), *text, self.ridge) for name in names}
        lam, topk = (
            value[number - 2] if isinstance(value, list) else value
            for value in (self.lam, self.topk)
        )
        merged = {}
        for name in names:
            stack = deltas(name)  # [N, ...]
            if self.rule == "ties":
                merged[name] = ties(stack.flatten(1), topk, lam, self.how).view(stack.shape[1:])
            else:
                merged[name] = lam * (stack.mean(0) if self.rule == "uniform" else stack.sum(0))
            del stack  # before the next one is read
        return merged

    @without_gradients
    def _covariances(self, scope: Scope) -> tuple[Tensor, Tensor]:
        """Return S_i [N, D, D] of the requests so far, and s S_0 [D, D], on the CPU.

        That of a request is the mean of c c^T over its target's training prompts, from the target's
        first token on; that of what stays is over all positions.
        """
        whole = at_once(scope, scope.request.requested)
        sums = [self._sums.of(whole, concept) for concept in whole.request.targets]
        own = torch.stack([each.matrices[0] / each.number for each in sums])
        rows = preserved_rows(whole, self.retain, "all").double()
        return own.cpu(), (rows.T @ rows * (self.keep / len(rows))).cpu()

    def _check_schedules(self, requests: int) -> None:
        """Raise ValueError for a schedule of less than one entry per request from the second on."""
        for key, value in (("lam", self.lam), ("topk", self.topk)):
            if isinstance(value, list) and len(value) < requests - 1:
                raise ValueError(
                    f"reg.merge.{key} has {len(value)} entries; {requests} requests need "
                    f"{requests - 1}, one for each from the "
                    "second on. Give a number to use it for all"
                )
