"""One value held against a type; what is wrong becomes one line."""

from __future__ import annotations

import json
import math
from typing import Any, TypeVar, overload

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from cu_runner.schema.errors import ConfigError

Kind = TypeVar("Kind")

NO_NUMBERS = ("nan", "inf", "-inf")


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
        errors = error.errors()
        found = [what_is_wrong(entry, path) for entry in (errors if every else errors[:1])]
        raise ConfigError("; ".join(dict.fromkeys(found))) from None


def words_for_no_numbers(value: object) -> object:
    """Return a value with "nan", "inf" and "-inf" in place of the floats that are no number."""
    if isinstance(value, dict):
        return {key: words_for_no_numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [words_for_no_numbers(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def what_is_wrong(error: ErrorDetails, path: str) -> str:
    """Return the words for one of pydantic's errors."""
    names = [part for part in error["loc"] if isinstance(part, str)]
    key = ".".join([path] * bool(path) + names)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown key {key}; `cu-run --cfg job` prints every key"
    if error["type"] in ("float_type", "int_type") and error["input"] in NO_NUMBERS:
        return f"{key}={error['input']}: not a finite number; give a finite one"
    message = error["msg"].removeprefix("Value error, ").replace("array", "list")
    shown = key if isinstance(error["input"], dict) else f"{key}={error['input']!r}"
    # YAML reads on, no, 1e-5 and 010 as something else than names
    advice = "; put it in quotes" if error["type"] == "string_type" else ""
    return f"{shown}: {message[0].lower() + message[1:]}{advice}"
