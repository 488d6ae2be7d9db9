"""Unlearning requests, and the plan that turns a sequence into them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from cu_runner.concepts.sequence import Concept, Sequence

PlanName = Literal["sequential", "independent", "simultaneous"]


@dataclass(frozen=True)
class Request:
    """One unlearning request.

    index counts from 1. targets are trained on together; the last of them is the concept that the
    request adds. erased is everything that the weights have unlearned when it is done. start: the
    weights that it begins with. earlier: what the requests before it add, also where each starts
    from the untouched model, as merging needs.
    """

    index: int
    targets: tuple[Concept, ...]
    erased: tuple[Concept, ...]
    start: Literal["base", "previous"]
    earlier: tuple[Concept, ...] = ()

    @property
    def label(self) -> str:
        """Return the concept that it adds, or their number where it adds several."""
        return (
            self.targets[-1].name
            if self.index >= len(self.targets)
            else f"{len(self.targets)} concepts"
        )


def plan_requests(sequence: Sequence, plan: PlanName, last_only: bool = False) -> list[Request]:
    """Return the requests of a run, one per target of the sequence (Lee et al. 2026, Sec. 3).

    sequential: request n starts from the weights of request n-1 and unlearns one concept.
    independent: it unlearns one concept from the untouched model. simultaneous: it unlearns the
    first n concepts together from the untouched model; with last_only there is one request, for all
    concepts: it needs none of those before it.
    """
    targets = sequence.targets
    plans = {
        "sequential": lambda n: Request(
            n, (targets[n - 1],), targets[:n], "previous", targets[: n - 1]
        ),
        "independent": lambda n: Request(
            n, (targets[n - 1],), (targets[n - 1],), "base", targets[: n - 1]
        ),
        "simultaneous": lambda n: Request(n, targets[:n], targets[:n], "base"),
    }
    requests = [plans[plan](n) for n in range(1, len(targets) + 1)]
    return [replace(requests[-1], index=1)] if last_only else requests
