"""The run directories of one configuration: NAME, and beside it NAME-2, NAME-3, ... for the same made by other code."""

from __future__ import annotations

import re
from pathlib import Path

from cu_runner.runtime.code_identity import CodeIdentity
from cu_runner.store.layout import STEP
from cu_runner.store.records import is_intact, parse_record

NUMBERED = re.compile(
    r"(.*-[0-9a-f]{8})-\d+"
)  # the name of a run ends in eight digits of its signature


def first_name(name: str) -> str:
    """Return the name of a run directory without the number that tells it from those of other code."""
    found = NUMBERED.fullmatch(name)
    return found[1] if found else name


def choose_directory(first: Path, code: CodeIdentity, fresh: bool) -> Path:
    """Choose the directory of a run among the first one and those that are numbered after it.

    It is the one whose finished steps were all made by this code, whatever came first. Where there is none, it is a new one if
    fresh, or if no directory has a finished step; else the one that was made last, by other code.
    """
    beside = (
        path.name.removeprefix(f"{first.name}-") for path in first.parent.glob(f"{first.name}-*")
    )
    numbers = sorted({1, *(int(text) for text in beside if text.isdecimal())})
    places = {
        number: first if number == 1 else first.with_name(f"{first.name}-{number}")
        for number in numbers
    }
    begun = [number for number in numbers if any(places[number].glob(f"steps/*/{STEP}"))]
    for number in begun:
        if not made_by_other_code(places[number], code):
            return places[number]
    if begun and not fresh:
        return places[begun[-1]]
    free = next(number for number in range(1, len(begun) + 2) if number not in begun)
    return first if free == 1 else first.with_name(f"{first.name}-{free}")


def made_by_other_code(directory: Path, code: CodeIdentity) -> bool:
    """Tell whether other code made a finished step; a damaged step.json tells nothing, and is complained of where it is read."""
    records = [parse_record(path) for path in directory.glob(f"steps/*/{STEP}")]
    intact = [record for record in records if record is not None and is_intact(record)]
    return any("code" not in record or code.changes(record["code"]) for record in intact)
