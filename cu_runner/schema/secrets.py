"""Keys, tokens and passwords of the environment, whose values must be written nowhere.

They are recognised by the variable's name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

SECRET_NAME = re.compile(
    r"((KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL)S?|AUTH|AUTHORIZATION|DATABASE_URL"
    r"|DSN|(?<=_)PWD|(?<![A-Z])(PASS|PAT))(?![A-Z])",
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


def refuse_secrets(entries: Iterable[tuple[str, object]]) -> None:
    """Raise ValueError if one of the (name, value) entries holds a secret of the environment.

    The message does not repeat the value.
    """
    held = secrets()
    for place, entry in entries:
        for name, value in held.items():
            if value in place or value in str(entry):
                raise ValueError(
                    f"{place}: holds the value of the environment variable {name}, a secret by its "
                    "name; leave it out"
                )


def redact(text: str) -> str:
    """Return a text for a terminal or a log, without secrets of the environment."""
    for name, value in secrets().items():
        text = text.replace(value, f"<{name}>")
    return text
