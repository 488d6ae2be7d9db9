"""Merging: each request is unlearned alone from the untouched model, and the changes of the weights
are merged.

Lee et al. 2026, arXiv 2511.07970, Sec. 5. TIES: Yadav et al., NeurIPS 2023, arXiv 2306.01708. Task
arithmetic: Ilharco et al., ICLR 2023, arXiv 2212.04089.

Shapes: N requests, P elements of one weight tensor.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from cu_runner.methods.base import Batch, Method
from cu_runner.models.parameters import largest
from cu_runner.regularizers.base import Regularizer
from cu_runner.request.scope import Scope
from cu_runner.runtime.lazy import torch

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
        rule: Literal["ties", "uniform", "task_arithmetic"] = "ties",
        lam: Annotated[Scale | list[Scale], worded("a number above 0")] = 1.0,
        topk: Annotated[Fraction | list[Fraction], worded("a number from 0 to 1")] = 0.4,
        how: Literal["mean", "sum", "max"] = "mean",
    ) -> None:
        """
        Args:
            rule: "ties", see there; "uniform" is lam times the mean of the changes,
                "task_arithmetic" lam times their sum.
            lam: scale of the changes; a number, or one for each request from the second on.
            topk: for ties; a number, or one for each request from the second on.
            how: for ties.
        """
        self.rule, self.lam, self.topk, self.how = rule, lam, topk, how

    def begin_request(self, scope: Scope, method: Method[Batch]) -> dict[str, object]:
        """Refuse a schedule that will not last, before anything is trained."""
        self._check_schedules(len(scope.sequence.targets))
        return {}

    def post_request(
        self, names: list[str], deltas: Callable[[str], Tensor]
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

    def _check_schedules(self, requests: int) -> None:
        """Raise ValueError for a schedule of less than one entry per request from the second on."""
        for key, value in (("lam", self.lam), ("topk", self.topk)):
            if isinstance(value, list) and len(value) < requests - 1:
                raise ValueError(
                    f"reg.merge.{key} has {len(value)} entries; {requests} requests need "
                    f"{requests - 1}, one for each from the "
                    "second on. Give a number to use it for all"
                )
