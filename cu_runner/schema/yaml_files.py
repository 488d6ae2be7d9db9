"""YAML files of people: refused where they are larger than any honest one, before they are built.

A text of a few lines can stand for more than memory holds: aliases repeat what they name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import yaml

from cu_runner.schema.errors import ConfigError

LARGEST_FILE = 2_000_000  # bytes
MOST_VALUES = 200_000  # with every alias written out
DEEPEST = 40  # mappings and lists inside of one another
MOST_FILES = 5_000  # of a tree

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_tree(folder: Path) -> None:
    """Check every YAML file of a configuration tree. Raises ConfigError."""
    for number, path in enumerate(yaml_files(folder)):
        if number == MOST_FILES:
            raise ConfigError(
                f"{folder}: holds more than {MOST_FILES} files of YAML; give a folder of "
                "configuration files alone"
            )
        check_yaml(path)


def yaml_files(folder: Path) -> Iterator[Path]:
    """Yield the YAML files below a folder."""
    for place, _, names in os.walk(folder):
        yield from (Path(place, name) for name in names if name.endswith((".yaml", ".yml")))


def check_yaml(path: Path) -> None:
    """Raise ConfigError for a file that is too large, too deep, or repeats itself too often.

    What is no YAML, or cannot be read, is left to whoever reads the file.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise ConfigError(
                f"{path}: has {size / 1e6:.0f} MB; a configuration file has {LARGEST_FILE / 1e6:g} "
                "at most"
            )
        with path.open("rb") as file:
            depth = deepest(file.read())
            if depth > DEEPEST:
                raise ConfigError(
                    f"{path}: has {depth} levels inside of one another; at most {DEEPEST}"
                )
            file.seek(0)
            node = yaml.compose(file, LOADER)
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return
    if node is not None and (values := count_values(node, {})) > MOST_VALUES:
        raise ConfigError(
            f"{path}: stands for {values:.3g} values with its aliases written out; at most "
            f"{MOST_VALUES}"
        )


def deepest(text: bytes) -> int:
    """Return how many mappings and lists are inside of one another, without building them."""
    depth = most = 0
    for event in yaml.parse(text, LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            most = max(most, depth)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
    return most


def check_depth(key: str, text: str) -> None:
    """Raise ConfigError for a value of the command line that is too deep to be read."""
    depth = most = 0
    for mark in text:
        depth += (mark in "[{") - (mark in "]}")
        most = max(most, depth)
    if most > DEEPEST:
        raise ConfigError(f"{key}: has {most} levels inside of one another; at most {DEEPEST}")


def count_values(node: yaml.Node, known: dict[int, int]) -> int:
    """Return the number of values that a node stands for; a node inside of itself is endless."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1  # while it is counted
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = (part if isinstance(part, tuple) else (part,) for part in parts)
        known[id(node)] = 1 + sum(count_values(part, known) for pair in pairs for part in pair)
    return known[id(node)]
