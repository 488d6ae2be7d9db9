"""JSON of files that others may have written."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is no JSON, or nested more deeply than can be read, for which json raises
            what is no ValueError.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("has too many levels inside of one another") from None
