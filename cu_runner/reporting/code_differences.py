"""Which runs that are shown together were made by different code."""

from __future__ import annotations

from collections.abc import Iterable

from cu_runner.store.run_record import RunRecord


def made_by_other_code(runs: Iterable[RunRecord]) -> list[bool]:
    """Tell of each run whether its code differs from that of the runs before it, or of its steps.

    A run of which this is true is no measure for those after it. Code that one run has and another
    has not, such as one's own method, is no difference.
    """
    alike: list[RunRecord] = []
    found = []
    for run in runs:
        differs = not all(run.same_code_as(other) for other in (run, *alike))
        found.append(differs)
        alike += [] if differs else [run]
    return found
