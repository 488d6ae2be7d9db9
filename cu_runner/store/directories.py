"""The run directories of one configuration: NAME, and NAME-2, NAME-3, ... made by other code."""

from __future__ import annotations

import re
from pathlib import Path

from cu_runner.runtime.code_identity import CodeIdentity
from cu_runner.schema.errors import StoreError
from cu_runner.store.layout import STEP, finished_steps, step_dir
from cu_runner.store.records import read_record

# The name of a run ends in eight digits of its signature.
NUMBERED = re.compile(r"(.*-[0-9a-f]{8})-\d+")


def first_name(name: str) -> str:
    """Return the name of a run directory without the number that tells it from other code's."""
    found = NUMBERED.fullmatch(name)
    return found[1] if found else name


def choose_directory(first: Path, code: CodeIdentity, fresh: bool) -> Path:
    """Choose the directory of a run among the first one and those that are numbered after it.

    It is the one whose finished steps were all made by this code, whatever came first. Where there
    is none, it is a new one if fresh, or if no directory has a finished step; else the one that was
    made last, by other code.
    """
    start = f"{first.name}-"
    beside = (path.name.removeprefix(start) for path in first.parent.glob(f"{start}*"))
    numbers = sorted({1, *(int(text) for text in beside if text.isdecimal())})
    places = {number: first.with_name(f"{first.name}-{number}") for number in numbers} | {1: first}
    begun = [number for number in numbers if finished_steps(places[number])]
    for number in begun:
        if not made_by_other_code(places[number], code):
            return places[number]
    if begun and not fresh:
        return places[begun[-1]]
    free = next(number for number in range(1, len(begun) + 2) if number not in begun)
    return first if free == 1 else first.with_name(f"{first.name}-{free}")


def made_by_other_code(run: Path, code: CodeIdentity) -> bool:
    """Tell whether other code, or another version, made a finished step.

    A damaged step.json tells nothing; it is complained of where it is read.
    """
    for index in finished_steps(run):
        try:
            record, problem = read_record(step_dir(run, index) / STEP)
        except StoreError:  # of another version
            return True
        if record is not None and problem is None and code.changes(record.code):
            return True
    return False
