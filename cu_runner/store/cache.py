"""outputs/cache: what many runs need and one of them made, each under the code that made it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter
from safetensors import SafetensorError

from cu_runner.runtime import distributed
from cu_runner.runtime.code_identity import CodeIdentity
from cu_runner.schema.errors import one_line
from cu_runner.schema.json_files import parse_json
from cu_runner.store.files import from_safetensors, hash_json, to_json, write_atomic
from cu_runner.store.layout import DELTA, GRID, PREDICTIONS, TRAINING
from cu_runner.store.locks import LOCK, waited_for
from cu_runner.store.records import TrainingRecord

logger = logging.getLogger(__name__)

ARRAYS, RECORD = "arrays.safetensors", "record.json"
ROWS, PROMPT, CURVATURE = "rows.json", "prompt.txt", "curvature.json"
# Kinds that hold images of the untouched model, or what was seen in them.
IMAGES = ("anchors", "base_eval", "retention", "recovery", "prompts")
# Files of an entry, by its kind.
FILES = {
    "anchors": ("latents.safetensors",),
    "base_eval": (PREDICTIONS, GRID),
    "deltas": (DELTA, TRAINING, RECORD),
    "masks": ("mask.safetensors",),
    "retention": (ARRAYS,),
    "recovery": (ROWS,),
    "prompts": (PROMPT,),
    "curvature": (CURVATURE,),  # scripts/studies/taylor.py
}

SAY_AFTER, GIVE_UP_AFTER = 5.0, 60.0  # seconds of waiting for another process that writes an entry


class Cache:
    """outputs/cache/<kind>/<sig8>/. A broken entry is made again, and one of other code.

    A run never depends on it: where it cannot be written, or another process holds an entry, the
    run goes on with what it has made.
    """

    def __init__(self, root: Path, code: CodeIdentity) -> None:
        """Take the code that makes the entries; those of IMAGES depend on a part of it."""
        self.root, self._code = root, code
        self._writable = True

    def fetch(self, kind: str, key: Mapping[str, object]) -> dict[str, bytes] | None:
        """Return the files of an entry by name, or None if there is none or it is damaged."""
        return distributed.from_main(lambda: self._read(kind, self._whole(kind, key)))

    def _read(self, kind: str, key: Mapping[str, object]) -> dict[str, bytes] | None:
        directory = self._directory(kind, key)
        try:
            index = parse_json((directory / "index.json").read_text(encoding="utf-8"))
            if set(index["files"]) != set(FILES[kind]):
                return None
            files = {name: (directory / name).read_bytes() for name in FILES[kind]}
            same = index["key"] == json.loads(json.dumps(key))
            whole = all(
                hashlib.sha256(content).hexdigest() == index["files"][name]
                for name, content in files.items()
            )
            sound = same and whole
            for name, content in files.items() if sound else ():
                check_content(name, content)
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError):
            return None
        return files if sound else None

    def put(self, kind: str, key: Mapping[str, object], files: Mapping[str, bytes]) -> None:
        """Write an entry, its index last. Two runs may write the same one, with one content."""
        distributed.from_main(lambda: self._write(kind, self._whole(kind, key), files))

    def _whole(self, kind: str, key: Mapping[str, object]) -> dict[str, object]:
        """Return the key with the code that the entry depends on."""
        return {**key, "code": self._code.images_sha256 if kind in IMAGES else self._code.sha256}

    def _write(self, kind: str, key: Mapping[str, object], files: Mapping[str, bytes]) -> None:
        directory = self._directory(kind, key)
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        index = to_json({"key": key, "files": hashes})
        try:
            directory.mkdir(parents=True, exist_ok=True)

            def say(holder: str) -> None:
                logger.warning(
                    "%s: %s writes it; waiting for that, %g s at most, then going on without it",
                    directory,
                    holder,
                    GIVE_UP_AFTER - SAY_AFTER,
                )

            with waited_for(directory / LOCK, SAY_AFTER, GIVE_UP_AFTER, say) as held:
                for name, content in {**files, "index.json": index}.items() if held else ():
                    write_atomic(directory / name, content)
            if not held:
                logger.warning("%s: is not let go of; this run goes on without it", directory)
        except OSError as error:
            if self._writable:
                logger.warning(
                    "%s: cannot be written (%s); this run goes on without a cache",
                    self.root,
                    error.strerror or one_line(error),
                )
            self._writable = False

    def _directory(self, kind: str, key: Mapping[str, object]) -> Path:
        return self.root / kind / hash_json(key)[:8]


class MemoryCache(Cache):
    """A cache that lasts as long as the object: nothing is written to the disk."""

    def __init__(self) -> None:
        """Begin with no entry."""
        self._entries: dict[str, dict[str, bytes]] = {}

    def fetch(self, kind: str, key: Mapping[str, object]) -> dict[str, bytes] | None:
        """Return the files of an entry by name, or None if there is none."""
        found = self._entries.get(hash_json({"kind": kind, **key}))
        return dict(found) if found is not None else None

    def put(self, kind: str, key: Mapping[str, object], files: Mapping[str, bytes]) -> None:
        """Keep an entry."""
        self._entries[hash_json({"kind": kind, **key})] = dict(files)


def check_content(name: str, content: bytes) -> None:
    """Raise SafetensorError, ValueError or KeyError if a file is none of its kind, or is empty."""
    if name.endswith(".safetensors") and not from_safetensors(content):
        raise ValueError(f"{name} holds no tensor")
    if name == RECORD:
        TypeAdapter(TrainingRecord).validate_json(content)
