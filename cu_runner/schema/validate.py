"""One value held against a type; what is wrong becomes one line."""

from __future__ import annotations

import json
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from cu_runner.schema.errors import ConfigError

Kind = TypeVar("Kind")


def validate(kind: type[Kind], value: object, path: str) -> Kind:
    """Return a value of this type; ConfigError names the key, the value and what is allowed."""
    try:
        # strict: true is no 1, "2" is no 2
        return TypeAdapter(kind).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(
            [path] * bool(path) + [part for part in first["loc"] if isinstance(part, str)]
        )
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            raise ConfigError(f"unknown key {key}; `cu-run --cfg job` prints every key") from None
        message = first["msg"].removeprefix("Value error, ").replace("array", "list")
        shown = key if isinstance(first["input"], dict) else f"{key}={first['input']!r}"
        raise ConfigError(f"{shown}: {message[0].lower() + message[1:]}") from None
