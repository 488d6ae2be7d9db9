"""What makes two runs the same experiment: a hash of the scientific part of their configuration."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from cu_runner.schema.values import ConfigTree, numbers_by_value, walk_leaves, without_paths

NOT_SCIENTIFIC = (
    "dry_run",
    "fresh",
    "allow_other_code",
    "num_threads",
    "device",
    "train.save_every",
    "train.gradient_checkpointing",
    "eval.batch_size",
    "speed",
    "wandb",
    "tracker",
    "paths",
    "cluster",
    "model.vae_slicing",
    "model.allow_pickle",
    "evaluator.allow_pickle",
    "method.allow_pickle",
    "method.checkpoint",  # whose sha256 stands beside it
)


WITH_FILES = (
    "sequence",
    "method",
    "reg",
    "retention",
    "recovery",
)  # groups whose settings may name text files


def signature(resolved: ConfigTree) -> str:
    """Return the sha256 of the scientific part of a configuration: it names the run's directory.

    Devices, threads, memory, paths of outputs, W&B and the evaluation batch are left out. Numbers
    are compared by value: 5 is 5.0. The order of regularizers counts (it is the order of their
    hooks); the order of other keys does not. Text files that the sequence, the method, a
    regularizer or the retention reads count by their content.
    """
    science = without_paths(resolved, NOT_SCIENTIFIC)
    science["reg"] = [[name, node] for name, node in resolved["reg"].items()]
    if files := file_hashes(resolved):
        science["files"] = files
    text = json.dumps(numbers_by_value(science), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hashes(resolved: ConfigTree) -> dict[str, str]:
    """Return the sha256 of every file that a setting of WITH_FILES names, by its value."""
    science = without_paths(resolved, NOT_SCIENTIFIC)
    return hashes_of(
        value for group in WITH_FILES for _, value in walk_leaves(science.get(group, {}))
    )


def hashes_of(values: Iterable[object]) -> dict[str, str]:
    """Return the sha256 of every file that one of the values names, by its value."""
    found = {}
    for value in values:
        if isinstance(value, str) and ("/" in value or "." in value):
            path = os.path.expanduser(value)  # any text: pathlib may raise
            if os.path.isfile(path):
                found[value] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return found
