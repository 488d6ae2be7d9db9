"""The plain values that a configuration is made of, and how they are walked, cut and compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

ConfigTree = dict[str, Any]  # a configuration as YAML holds it: dicts, lists, texts and numbers

Value = TypeVar("Value")


def without_paths(tree: ConfigTree, paths: tuple[str, ...]) -> ConfigTree:
    """Return a copy without the dotted paths, of at most two parts each."""
    kept = {
        key: dict(entry) if isinstance(entry, dict) else entry
        for key, entry in tree.items()
        if key not in paths
    }
    for path in paths:
        group, _, key = path.partition(".")
        if key and isinstance(kept.get(group), dict):
            kept[group].pop(key, None)
    return kept


def numbers_by_value(value: Value) -> Value:
    """Return the same with whole numbers as floats, so that 5 equals 5.0 also in JSON."""

    def convert(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {key: convert(inner) for key, inner in entry.items()}
        if isinstance(entry, list):
            return [convert(inner) for inner in entry]
        return float(entry) if isinstance(entry, int) and not isinstance(entry, bool) else entry

    return convert(value)


def walk_leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield all leaves of a nested configuration, each behind its dotted path."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from walk_leaves(entry, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from walk_leaves(entry, f"{path}.{index}")
    else:
        yield path, value
