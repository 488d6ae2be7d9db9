"""Keys, tokens and passwords of the environment, whose values must be written nowhere.

They are recognised by the variable's name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from urllib.parse import quote, quote_plus, unquote, unquote_plus

SECRET_NAME = re.compile(
    r"((KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|COOKIE|JWT)S?|AUTH|AUTHORIZATION"
    r"|DATABASE_URL|DSN|PGPASS|(?<=_)PWD|(?<![A-Z])(PASS|PAT))(?![A-Z])",
    re.IGNORECASE,
)
SHORTEST = 8  # characters; shorter values would be found in ordinary words


def names_secret(variable: str) -> bool:
    """Tell whether an environment variable's name is that of a secret.

    Such are WANDB_API_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY.
    """
    return SECRET_NAME.search(variable) is not None


def secrets() -> dict[str, str]:
    """Return the secrets of the environment, value by name."""
    return {
        name: value
        for name, value in os.environ.items()
        if len(value) >= SHORTEST and names_secret(name)
    }


def spellings(secret: str) -> list[str]:
    """Return a secret as it may stand in a text: itself, escaped, or encoded as in an address."""
    forms = (json.dumps(secret), json.dumps(secret, ensure_ascii=False), repr(secret))
    escaped = [form[1:-1] for form in forms]
    encoded = [quote(secret), quote(secret, safe=""), quote_plus(secret)]
    return list(dict.fromkeys([secret, *escaped, *encoded]))


def refuse_secrets(entries: Iterable[tuple[str, object]]) -> None:
    """Raise ValueError if one of the (name, value) entries holds a secret of the environment.

    The message does not repeat the value.
    """
    held = secrets()
    for place, entry in entries:
        for name, value in held.items():
            text = f"{place}\n{entry}"
            decoded = (unquote(text), unquote_plus(text))
            if any(value in form for form in decoded) or any(
                form in text for form in spellings(value)
            ):
                raise ValueError(
                    f"{place}: holds the value of the environment variable {name}, a secret by its "
                    "name; leave it out"
                )


def redact(text: str) -> str:
    """Return a text for a terminal or a log, without secrets of the environment."""
    for name, value in secrets().items():
        for form in spellings(value):
            text = text.replace(form, f"<{name}>")
    return text
