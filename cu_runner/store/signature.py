"""What makes two runs the same experiment: a hash of the scientific part of their configuration."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cu_runner.concepts.picture_folder import content_sha256
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
    "eval.every",  # which requests have numbers, and none of the numbers
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

UNSET = ("lora_rank", "lora_alpha")  # of train: null is as if they were not there

PICTURES_OF = ("images", "anchor_images")  # settings of the sequence that name folders, by target

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
    regularizer or the retention reads count by their content, and so do folders of pictures that
    are trained on.
    """
    science = without_paths(resolved, NOT_SCIENTIFIC)
    if isinstance(science.get("train"), dict):
        science["train"] = without_unset(science["train"])
    science["reg"] = [[name, node] for name, node in resolved["reg"].items()]
    if files := file_hashes(resolved):
        science["files"] = files
    text = json.dumps(numbers_by_value(science), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def without_unset(train: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of training without those that are null since they are new.

    Runs and trainings from before them keep their names.
    """
    return {key: value for key, value in train.items() if key not in UNSET or value is not None}


def file_hashes(resolved: ConfigTree) -> dict[str, str]:
    """Return the sha256 of every file that a setting of WITH_FILES names, by its value.

    Of a folder of pictures it is over all of them, and over their captions.
    """
    science = without_paths(resolved, NOT_SCIENTIFIC)
    found = hashes_of(
        value for group in WITH_FILES for _, value in walk_leaves(science.get(group, {}))
    )
    for folder in picture_folders(resolved):
        if (digest := content_sha256(folder)) is not None:
            found[folder] = digest
    return found


def picture_folders(resolved: ConfigTree) -> Iterator[str]:
    """Yield the folders of pictures that a configuration trains on, and the captions it takes."""
    sequence = resolved["sequence"] if isinstance(resolved.get("sequence"), dict) else {}
    for key in PICTURES_OF:
        yield from (each for each in (sequence.get(key) or {}).values() if isinstance(each, str))
    leaves = dict(walk_leaves({group: resolved.get(group) or {} for group in WITH_FILES}))
    for path, value in leaves.items():
        named = leaves.get(f"{path.removesuffix('.source')}.name")
        if path.endswith(".source") and value == "images" and isinstance(named, str):
            yield named
    prompts = leaves.get("retention.prompts")
    if isinstance(prompts, str) and "/" in prompts:
        yield prompts


def hashes_of(values: Iterable[object]) -> dict[str, str]:
    """Return the sha256 of every file that one of the values names, by its value."""
    found = {}
    for value in values:
        if isinstance(value, str) and ("/" in value or "." in value):
            path = os.path.expanduser(value)  # any text: pathlib may raise
            if os.path.isfile(path):
                found[value] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return found
