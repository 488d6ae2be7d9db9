"""Unlearning requests, and the plan that turns a sequence into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cu_runner.concepts.sequence import Concept, Sequence

AGAIN = 10**6  # no sequence has as many requests

PlanName = Literal["sequential", "independent", "simultaneous"]


@dataclass(frozen=True)
class Request:
    """One unlearning request.

    index counts from 1. plan: how requests follow one another. listed: what all requests of the run
    add, in order, one each. is_only: it is the only request, and adds all of them. after: of a
    target that is trained again, the request after which that is; None at its own turn.
    """

    index: int
    plan: PlanName
    listed: tuple[Concept, ...]
    is_only: bool = False
    after: int | None = None

    @property
    def targets(self) -> tuple[Concept, ...]:
        """Return what is trained on together; the last is the concept that the request adds."""
        together = self.plan == "simultaneous"
        return self.requested if together else (self.listed[self.index - 1],)

    @property
    def requested(self) -> tuple[Concept, ...]:
        """Return what the requests up to this one add."""
        return self.listed if self.is_only else self.listed[: self.index]

    @property
    def erased(self) -> tuple[Concept, ...]:
        """Return everything that the weights have unlearned when it is done."""
        return self.targets if self.plan == "independent" else self.requested

    @property
    def earlier(self) -> tuple[Concept, ...]:
        """Return what the requests before it add.

        That is also so where each starts from the untouched model, as merging needs. Simultaneous
        requests train on it.
        """
        if self.after is not None:
            return tuple(each for each in self.listed[: self.after] if each not in self.targets)
        return () if self.plan == "simultaneous" else self.listed[: self.index - 1]

    @property
    def number(self) -> int:
        """Return what its randomness is drawn by: its index, or that and the request before it."""
        return self.index if self.after is None else self.index + AGAIN * self.after

    @property
    def start(self) -> Literal["base", "previous"]:
        """Return the weights that it begins with."""
        return "previous" if self.plan == "sequential" else "base"

    @property
    def label(self) -> str:
        """Return the concept that it adds, or their number where it adds several."""
        return f"{len(self.listed)} concepts" if self.is_only else self.requested[-1].name


def plan_requests(sequence: Sequence, plan: PlanName, last_only: bool = False) -> list[Request]:
    """Return the requests of a run, one per target of the sequence (Lee et al. 2026, Sec. 3).

    sequential: request n starts from the weights of request n-1 and unlearns one concept.
    independent: it unlearns one concept from the untouched model. simultaneous: it unlearns the
    first n concepts together from the untouched model; with last_only there is one request, for all
    concepts: it needs none of those before it.
    """
    targets = sequence.targets
    if last_only:
        return [Request(1, plan, targets, is_only=len(targets) > 1)]
    return [Request(n, plan, targets) for n in range(1, len(targets) + 1)]
