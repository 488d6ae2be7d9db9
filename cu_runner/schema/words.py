"""What is allowed, in words: near names for a mistyped one, patterns that explain themselves."""

from __future__ import annotations

import difflib
import re
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
