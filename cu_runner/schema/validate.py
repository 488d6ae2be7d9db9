"""One value held against a type; what is wrong becomes one line."""

from __future__ import annotations

import json
import math
import re
from typing import Any, TypeVar, overload

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from cu_runner.schema.errors import ConfigError

Kind = TypeVar("Kind")

NO_NUMBERS = ("nan", "inf", "-inf")
# what pydantic puts among the names of keys where a value may be of several kinds
KINDS = re.compile(
    r"(constrained-)?(int|float|str|bool)"
    r"|(literal|list|dict|tuple|nullable|lax-or-strict|function-\w+)\[.*\]"
)
QUOTES = "; put it in quotes"


@overload
def validate(kind: type[Kind], value: object, path: str, *, every: bool = False) -> Kind: ...


@overload  # of Annotated and unions, which are no classes, type checkers cannot say more
def validate(kind: object, value: object, path: str, *, every: bool = False) -> Any: ...


def validate(kind: Any, value: object, path: str, *, every: bool = False) -> Any:
    """Validate one value against a type; ConfigError names the key, the value and what is allowed.

    It is strict: true is no 1, and "2" is no 2; but YAML's .nan and .inf are texts where a text is
    asked for, and nothing else. every: says all that is wrong, not the first alone.
    """
    try:
        text = json.dumps(words_for_no_numbers(value), default=str)
        return TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        found: dict[str, list[str]] = {}  # what is wrong of a value: of each kind that it may be
        for entry in error.errors():
            shown, said = what_is_wrong(entry, path)
            found.setdefault(shown, []).append(said)
        lines = [f"{shown}{either(said)}" for shown, said in found.items()]
        raise ConfigError("; ".join(lines if every else lines[:1])) from None


def words_for_no_numbers(value: object) -> object:
    """Return a value with "nan", "inf" and "-inf" in place of the floats that are no number."""
    if isinstance(value, dict):
        return {key: words_for_no_numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [words_for_no_numbers(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def either(said: list[str]) -> str:
    """Return what is wrong of a value that may be of several kinds, once what they share."""
    first, *others = dict.fromkeys(each.removesuffix(QUOTES) for each in said)
    rest = [each.removeprefix(": input should be ") for each in others]
    advice = QUOTES if any(each.endswith(QUOTES) for each in said) else ""
    return " or ".join([first, *rest]) + advice


def what_is_wrong(error: ErrorDetails, path: str) -> tuple[str, str]:
    """Return the key and the value of one of pydantic's errors, and the words for it."""
    names = [part for part in error["loc"] if isinstance(part, str) and not KINDS.fullmatch(part)]
    key = ".".join([path] * bool(path) + names)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown key {key}", "; `cu-run --cfg job` prints every key"
    if error["type"] in ("float_type", "int_type") and error["input"] in NO_NUMBERS:
        return f"{key}={error['input']}", ": not a finite number; give a finite one"
    message = error["msg"].removeprefix("Value error, ").replace("array", "list")
    message = message.replace("an object", "a mapping of keys to values")  # JSON's word for it
    shown = key if isinstance(error["input"], dict) else f"{key}={error['input']!r}"
    # YAML reads on, no, 1e-5 and 010 as something else than names
    advice = QUOTES if error["type"] == "string_type" else ""
    return shown, f": {message[0].lower() + message[1:]}{advice}"
