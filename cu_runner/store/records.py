"""step.json: a finished step's record, its own sha256 and its link to the step before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cu_runner.schema.errors import StoreError
from cu_runner.store.files import hash_json
from cu_runner.store.layout import STEP


@dataclass(frozen=True)
class Step:
    """A finished step: its number, directory, the sha256 that the next step must name, its metrics row, the code that made it."""

    index: int
    directory: Path
    sha256: str
    row: dict[str, object]
    code: dict[str, object]


def read_record(directory: Path) -> dict[str, object]:
    """step.json of a step directory, checked against its own sha256. Raises StoreError; the files that it names are not read."""
    path = directory / STEP
    record = parse_record(path)
    if record is None:
        raise StoreError(f"{path}: cannot be read")
    if not is_intact(record):
        raise StoreError(f"{path}: does not match its own sha256")
    return record


def parse_record(path: Path) -> dict[str, object] | None:
    """A step.json as it stands; None if it is missing, no JSON or lacks an entry."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        dict(record["files"]), dict(record["row"])
        record["sha256"], record["parent_sha256"], record["signature"], record["index"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record


def is_intact(record: dict[str, object]) -> bool:
    """Whether a record is the one that was written: its own sha256 holds, and so does that of the step over its files."""
    entries = {key: value for key, value in record.items() if key != "record_sha256"}
    return record["sha256"] == chain(record["parent_sha256"], record["files"]) and record.get(
        "record_sha256"
    ) == hash_json(entries)


def continues(record: Mapping[str, object], parent: str | None) -> bool:
    """Whether a record names its parent: the sha256 of the step before, and step 0 that of the base model."""
    if parent is None:  # older versions began with nothing
        return record["parent_sha256"] in (None, record.get("model_sha256"))
    return record["parent_sha256"] == parent


def chain(parent: str | None, files: Mapping[str, str]) -> str:
    """sha256 of a step: over its parent's and those of its files, so that it stands for all from the base model on."""
    return hash_json([parent, sorted(files.items())])
