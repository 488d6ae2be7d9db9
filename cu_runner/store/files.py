"""Files that are whole or not there, and the forms in which values are written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors

from cu_runner.runtime.lazy import pd
from cu_runner.schema.errors import StoreError

if TYPE_CHECKING:
    from torch import Tensor

HEADER = b"# sha256 of the lines below: "


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a crash of the machine."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def with_header(content: bytes) -> bytes:
    """A text file behind a comment that holds its sha256."""
    return HEADER + hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def has_intact_header(content: bytes) -> bool:
    """Whether the comment holds the sha256 of the rest; true of a file without one, as older versions wrote it."""
    header, _, rest = content.partition(b"\n")
    if not header.startswith(HEADER[:2]):
        return True
    return header == HEADER + hashlib.sha256(rest).hexdigest().encode()


def to_csv(table: pd.DataFrame) -> bytes:
    return table.to_csv(index=False).encode()


def to_json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_delta(path: Path, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Load a delta and check that it fits the weights by name and shape. Raises StoreError."""
    import safetensors.torch

    try:
        delta = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise StoreError(f"{path}: cannot be read ({error})") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in delta.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in params.items()}
    if shapes != wanted:
        name = next(iter(sorted(set(shapes.items()) ^ set(wanted.items()))))[0]
        raise StoreError(
            f"{path}: holds other weights than this run trains (e.g. {name}); it belongs to another model or method.params"
        )
    return delta


def to_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    import safetensors.torch

    return safetensors.torch.save(
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    )


def from_safetensors(content: bytes) -> dict[str, Tensor]:
    """Read back what to_safetensors() made, on the CPU."""
    import safetensors.torch

    return safetensors.torch.load(content)


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a delta, without reading the others."""
    with safetensors.safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def hash_json(value: object) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
