"""The plain values that a configuration is made of, and how they are walked, cut and compared."""

from __future__ import annotations

from collections.abc import Iterator

ConfigValue = dict[str, object] | list[object] | str | int | float | bool | None


def without_paths(value: dict[str, ConfigValue], paths: tuple[str, ...]) -> dict[str, ConfigValue]:
    """A copy without the dotted paths."""
    kept = {
        key: dict(entry) if isinstance(entry, dict) else entry
        for key, entry in value.items()
        if key not in paths
    }
    for path in paths:
        group, _, key = path.partition(".")
        if key and isinstance(kept.get(group), dict):
            kept[group].pop(key, None)
    return kept


def numbers_by_value(value: ConfigValue) -> ConfigValue:
    if isinstance(value, dict):
        return {key: numbers_by_value(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [numbers_by_value(entry) for entry in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def walk_leaves(value: ConfigValue, path: str = "") -> Iterator[tuple[str, ConfigValue]]:
    """All leaves of a nested configuration with their dotted paths."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from walk_leaves(entry, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from walk_leaves(entry, f"{path}.{index}")
    else:
        yield path, value
