"""One value held against a type; what is wrong becomes one line."""

from __future__ import annotations

import json
from typing import Any, TypeVar, overload

from pydantic import TypeAdapter, ValidationError

from cu_runner.schema.errors import ConfigError

Kind = TypeVar("Kind")


@overload
def validate(kind: type[Kind], value: object, path: str) -> Kind: ...


@overload  # of Annotated and unions, which are no classes, type checkers cannot say more
def validate(kind: object, value: object, path: str) -> Any: ...


def validate(kind: Any, value: object, path: str) -> Any:
    """Validate one value against a type; ConfigError names the key, the value and what is allowed.

    It is strict: true is no 1, and "2" is no 2.
    """
    try:
        return TypeAdapter(kind).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        names = [part for part in first["loc"] if isinstance(part, str)]
        key = ".".join([path] * bool(path) + names)
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            raise ConfigError(f"unknown key {key}; `cu-run --cfg job` prints every key") from None
        message = first["msg"].removeprefix("Value error, ").replace("array", "list")
        shown = key if isinstance(first["input"], dict) else f"{key}={first['input']!r}"
        raise ConfigError(f"{shown}: {message[0].lower() + message[1:]}") from None
