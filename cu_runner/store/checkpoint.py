"""The state of a request in the middle of its training: one file, gone with the commit."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cu_runner.runtime import distributed
from cu_runner.runtime.lazy import torch
from cu_runner.schema.json_files import parse_json
from cu_runner.schema.settings import SaveEvery
from cu_runner.store.files import hash_json, write_atomic

logger = logging.getLogger(__name__)


FILE = "checkpoint.pt"
# Seconds of training that are saved when it ends: the evaluation may be cut short.
WORTH = 30.0


class Checkpoint:
    """checkpoint.pt of a run: a line of JSON (its key, a sha256), and a state by torch.save."""

    def __init__(self, directory: Path, every: SaveEvery, device: torch.device) -> None:
        """Take the place and the rhythm of the file; nothing is read or written yet.

        Args:
            directory: of the run.
            every: steps, or minutes as "10min"; None never saves on its own.
            device: where tensors that were on a GPU go; those of the CPU stay there.
        """
        self.path, self._device = directory / FILE, device
        self._steps = every if isinstance(every, int) else None
        self._seconds = 60 * float(every.removesuffix("min")) if isinstance(every, str) else None
        self._saved = time.monotonic()

    def begin(self, key: Mapping[str, object]) -> dict[str, Any] | None:
        """Return the saved state of the request that the key names, or None; what follows is its.

        None is returned where there is no state of this request, or it is damaged.
        """
        self._key, self._saved = hash_json(key), time.monotonic()
        content = distributed.from_main(self._read)
        if content is None:
            return None
        return torch.load(io.BytesIO(content), map_location=self._place, weights_only=True)

    def _read(self) -> bytes | None:
        try:
            header, _, content = self.path.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        try:
            entries = parse_json(header)
            key = entries["key"]
            whole = entries["sha256"] == seal(key, content)
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            logger.warning("%s: is damaged; the request begins anew", self.path)
            return None
        if key != self._key:  # of a request that was finished, or made elsewhere
            return None
        return content

    def _place(self, storage: Any, location: str) -> Any:
        return storage if location == "cpu" else storage.cuda(self._device.index)

    def is_due(self, step: int, last: bool) -> bool:
        """Tell whether to save after this step. last: whether training ends with it."""
        elapsed = time.monotonic() - self._saved
        if self._steps is None and self._seconds is None:
            return False
        if last:
            return elapsed >= WORTH
        if self._steps is not None:
            return step % self._steps == 0
        return self._seconds is not None and elapsed >= self._seconds

    def save(self, state: Mapping[str, object]) -> None:
        """Replace the file."""
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        content = buffer.getvalue()
        header = json.dumps({"key": self._key, "sha256": seal(self._key, content)})
        distributed.from_main(lambda: write_atomic(self.path, header.encode() + b"\n" + content))
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Delete the file: the request is committed."""
        if distributed.is_main():
            self.path.unlink(missing_ok=True)


def seal(key: object, content: bytes) -> str:
    """Return the sha256 of a state and of what it belongs to."""
    return hashlib.sha256(str(key).encode() + content).hexdigest()
