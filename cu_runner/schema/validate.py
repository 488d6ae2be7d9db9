"""One value held against a type; what is wrong becomes one line."""

from __future__ import annotations

import json
from typing import Any, TypeVar, overload

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from cu_runner.schema.errors import ConfigError

Kind = TypeVar("Kind")


@overload
def validate(kind: type[Kind], value: object, path: str, *, every: bool = False) -> Kind: ...


@overload  # of Annotated and unions, which are no classes, type checkers cannot say more
def validate(kind: object, value: object, path: str, *, every: bool = False) -> Any: ...


def validate(kind: Any, value: object, path: str, *, every: bool = False) -> Any:
    """Validate one value against a type; ConfigError names the key, the value and what is allowed.

    It is strict: true is no 1, and "2" is no 2. every: says all that is wrong, not the first alone.
    """
    try:
        return TypeAdapter(kind).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        errors = error.errors()
        found = [what_is_wrong(entry, path) for entry in (errors if every else errors[:1])]
        raise ConfigError("; ".join(dict.fromkeys(found))) from None


def what_is_wrong(error: ErrorDetails, path: str) -> str:
    """Return the words for one of pydantic's errors."""
    names = [part for part in error["loc"] if isinstance(part, str)]
    key = ".".join([path] * bool(path) + names)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown key {key}; `cu-run --cfg job` prints every key"
    message = error["msg"].removeprefix("Value error, ").replace("array", "list")
    shown = key if isinstance(error["input"], dict) else f"{key}={error['input']!r}"
    # YAML reads on, no, 1e-5 and 010 as something else than names
    advice = "; put it in quotes" if error["type"] == "string_type" else ""
    return f"{shown}: {message[0].lower() + message[1:]}{advice}"
