"""Why a run has no end: what its log says, or the note of its sweep."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cu_runner.store.locks import LOCK, is_held

LOG = "run.log"
TAIL = 65_536  # bytes of a log in which its last line is looked for: a traceback may stand behind
MOST = 400  # characters of a reason
LINE = re.compile(r"[\d-]{10} [\d:,]{12} \w+ [\w.]+: (.*)")  # a line of the log with its time
FAILED = re.compile(r"stopped by (\w+)\((.*)\)")
ASKED = "stopped: "  # a person or the cluster ended it


@dataclass(frozen=True)
class Outcome:
    """What became of a run that is not finished. why: one line, or "" where none is needed."""

    state: Literal["runs now", "stopped", "failed", "ended"]
    why: str = ""

    def __str__(self) -> str:
        return f"{self.state}: {self.why}" if self.why else self.state


def outcome_of(directory: Path, noted: str | None) -> Outcome:
    """Return what became of a run that is not finished.

    Args:
        noted: the line with which a job of a sweep failed.
    """
    if is_held(directory / LOCK):
        return Outcome("runs now")
    last = last_entry(directory / LOG)
    if last.startswith(ASKED):
        return Outcome("stopped")
    if found := FAILED.fullmatch(last):
        name, said = found.groups()
        return Outcome("failed", shorten(words_of(said) or name))
    if noted:
        return Outcome("failed", shorten(noted))
    return Outcome("ended", f"its log breaks off after {shorten(last)!r}" if last else "no log")


def last_entry(log: Path) -> str:
    """Return the text of the last line that has a time; "" where there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(log.stat().st_size - TAIL, 0))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((found[1] for line in reversed(lines) if (found := LINE.fullmatch(line))), "")


def words_of(said: str) -> str:
    """Return the texts among the arguments of an exception, as its repr writes them."""
    try:
        arguments = ast.literal_eval(f"({said},)")
    except (ValueError, SyntaxError):  # an object, whose repr is no Python
        return said
    return " ".join(" ".join(str(each) for each in arguments if isinstance(each, str)).split())


def shorten(text: str) -> str:
    """Return a text of at most MOST characters, all of which are printed."""
    text = "".join(each if each.isprintable() else "?" for each in text)
    return text if len(text) <= MOST else f"{text[: MOST - 3]}..."
