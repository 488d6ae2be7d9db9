"""What every resolved configuration is asked, whatever its parts: names, keys, values."""

from __future__ import annotations

from unicodedata import normalize

from cu_runner.config.targets import COMBINED, check_file_name, check_keys
from cu_runner.schema.errors import ConfigError
from cu_runner.schema.secrets import refuse_secrets
from cu_runner.schema.values import ConfigTree, walk_leaves

MISSING = "???"
LARGEST_NUMBER = 10**18  # no setting and no seed is beyond it


def with_composed(value: object) -> object:
    """Return lists and mappings of names with every accent composed, as the Sequence has them.

    So they are in config.yaml and the signature too. What may be a path stays as it is: a text
    alone, or one with a slash or .txt at its end.
    """
    if isinstance(value, list):
        return [compose_name(entry) for entry in value]
    if isinstance(value, dict):
        return {normalize("NFC", key): compose_name(entry) for key, entry in value.items()}
    return value


def compose_name(entry: object) -> object:
    """Return a name with every accent composed; a path, a list or a number as it is."""
    if not isinstance(entry, str) or "/" in entry or entry.endswith(".txt"):
        return with_composed(entry) if isinstance(entry, list | dict) else entry
    return normalize("NFC", entry)


def check_values(resolved: ConfigTree, method_name: str) -> None:
    """Refuse with ConfigError names, keys and values that no run can have, whatever its parts."""
    entries = [(group, name) for group in COMBINED for name in resolved.get(group) or {}]
    for group, name in [("method", method_name), *entries]:
        check_file_name(group, str(name))
    check_keys(resolved)
    leaves = list(walk_leaves(resolved))
    refuse_secrets(leaves)
    if missing := [path for path, value in leaves if value == MISSING]:
        asked = " ".join(f"{key}=..." for key in missing)
        raise ConfigError(f"not set, and without a default: {', '.join(missing)}; add {asked}")
    for path, value in leaves:
        if isinstance(value, int) and abs(value) >= LARGEST_NUMBER:
            raise ConfigError(f"{path}: a whole number of {len(str(value))} digits; at most 18")
