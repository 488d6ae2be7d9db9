"""What makes two runs the same experiment: the hash of the scientific part of their configuration."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

Plain = dict[str, object] | list[object] | str | int | float | bool | None

NOT_SCIENTIFIC = (
    "dry_run", "num_threads", "device", "train.save_every", "train.gradient_checkpointing", "eval.batch_size", "eval.overlap",
    "speed", "wandb", "paths", "cluster", "model.vae_slicing", "model.allow_pickle", "evaluator.allow_pickle",
)  # fmt: skip
WITH_FILES = ("sequence", "method", "reg", "retention")  # groups whose settings may name text files


def signature(resolved: dict[str, Plain]) -> str:
    """sha256 of the scientific part of a configuration, so that the same experiment is the same directory.

    Devices, threads, memory, paths of outputs, W&B and the evaluation batch are left out. Numbers are compared by value: 5 is 5.0.
    The order of regularizers counts (it is the order of their hooks); the order of other keys does not. Text files that the
    sequence, the method, a regularizer or the retention reads count by their content.
    """
    science = drop(resolved, NOT_SCIENTIFIC)
    science["reg"] = [[name, node] for name, node in resolved["reg"].items()]
    if files := file_hashes(resolved):
        science["files"] = files
    text = json.dumps(numbers_by_value(science), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hashes(resolved: dict[str, Plain]) -> dict[str, str]:
    """sha256 of every file that a setting of the sequence, the method, a regularizer or the retention names."""
    leaves = [value for group in WITH_FILES for _, value in walk(resolved.get(group, {})) if isinstance(value, str)]
    paths = {value: os.path.expanduser(value) for value in leaves if "/" in value or "." in value}  # any text: pathlib may raise
    return {value: hashlib.sha256(Path(path).read_bytes()).hexdigest() for value, path in paths.items() if os.path.isfile(path)}


def drop(value: dict[str, Plain], paths: tuple[str, ...]) -> dict[str, Plain]:
    """A copy without the dotted paths."""
    kept = {key: dict(entry) if isinstance(entry, dict) else entry for key, entry in value.items() if key not in paths}
    for path in paths:
        group, _, key = path.partition(".")
        if key and isinstance(kept.get(group), dict):
            kept[group].pop(key, None)
    return kept


def numbers_by_value(value: Plain) -> Plain:
    if isinstance(value, dict):
        return {key: numbers_by_value(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [numbers_by_value(entry) for entry in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def walk(value: Plain, path: str = "") -> Iterator[tuple[str, Plain]]:
    """All leaves of a nested configuration with their dotted paths."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from walk(entry, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from walk(entry, f"{path}.{index}")
    else:
        yield path, value
