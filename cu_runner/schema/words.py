"""What is allowed, in words: near names for a mistyped one, patterns that explain themselves."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema


@dataclass(frozen=True)
class Matches:
    """In Annotated[str, ...]: texts that match a regular expression as a whole.

    words: what they are, for the message of one that does not.
    """

    pattern: str
    words: str

    def __get_pydantic_core_schema__(self, kind: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return pydantic's schema of such a text."""
        return core_schema.no_info_after_validator_function(self.check, handler(kind))

    def check(self, text: str) -> str:
        """Return the text. Raises ValueError if it does not match."""
        if re.fullmatch(self.pattern, text) is None:
            raise ValueError(f"allowed: {self.words}")
        return text


def printable(text: str) -> str:
    r"""Return text for a terminal: what would steer it, or cannot be written, is shown as \x1b."""
    return "".join(map(shown, text))


def shown(mark: str) -> str:
    r"""Return a character as it is, or its code if it would steer a terminal or cannot be written.

    Those are control characters but for tabs and line breaks, marks of the direction of writing,
    and bytes of a path that are no UTF-8.
    """
    steers = unicodedata.category(mark) in ("Cc", "Cs") and mark not in "\t\n"
    if steers or mark in DIRECTIONS:
        return mark.encode("unicode_escape", "surrogatepass").decode()
    return mark


DIRECTIONS = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"

# What people call a key whose name is another.
SYNONYMS = {"regulariser": "reg", "concepts": "sequence", "classifier": "evaluator"}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that a mistyped one is probably meant to be; None if there is none."""
    names, lower = list(known), name.lower()
    if (meant := SYNONYMS.get(lower)) in names:
        return meant
    if close := difflib.get_close_matches(lower, names, 1, 0.7):
        return close[0]
    longer = [each for each in names if len(each) > 2 and lower.startswith(each.lower())]
    longer += [each for each in names if len(lower) > 2 and each.lower().startswith(lower)]
    return longer[0] if longer else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean NAME?" of the nearest known name; nothing if there is none."""
    meant = nearest(name, known)
    return f"; did you mean {meant}?" if meant else ""
