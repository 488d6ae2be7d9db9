"""Files that are whole or not there, and the forms in which values are written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors

from cu_runner.runtime.lazy import pd
from cu_runner.schema.errors import StoreError, one_line

if TYPE_CHECKING:
    from torch import Tensor

# What reading a safetensors file raises, whatever is in it.
DAMAGED = (OSError, ValueError, KeyError, safetensors.SafetensorError)
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
    """Return the sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def with_header(content: bytes) -> bytes:
    """Return a text file behind a comment that holds its sha256."""
    return HEADER + hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def has_intact_header(content: bytes) -> bool:
    """Tell whether a file begins with a comment that holds the sha256 of the rest."""
    header, _, rest = content.partition(b"\n")
    return header == HEADER + hashlib.sha256(rest).hexdigest().encode()


def command_in(text: str) -> str | None:
    """Return the command that a config.yaml records below its sha256; None if it has none."""
    line = next(iter(text.split("\n")[1:2]), "")
    return line.removeprefix("# ") if line.startswith("# cu-") else None


def to_csv(table: pd.DataFrame) -> bytes:
    """Return a table as a CSV file without its index."""
    return table.to_csv(index=False).encode()


def to_json(value: object) -> bytes:
    """Return a value as a JSON file for people to read."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_delta(path: Path, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Load a delta and check that it fits the weights by name and shape. Raises StoreError."""
    import safetensors.torch

    try:
        delta = safetensors.torch.load_file(path)
    except DAMAGED as error:
        raise StoreError(unreadable(path, error)) from None
    shapes = {name: tuple(tensor.shape) for name, tensor in delta.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in params.items()}
    if shapes != wanted:
        name = min(set(shapes.items()) ^ set(wanted.items()))[0]
        raise StoreError(
            f"{path}: holds other weights than this run trains (e.g. {name}); "
            "it belongs to another model or method.params"
        )
    return delta


def to_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Return tensors as a safetensors file."""
    import safetensors.torch

    return safetensors.torch.save(
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    )


def from_safetensors(content: bytes) -> dict[str, Tensor]:
    """Read back what to_safetensors() made, on the CPU."""
    import safetensors.torch

    return safetensors.torch.load(content)


def read_tensor(path: Path, name: str) -> Tensor:
    """Read one tensor of a delta, and none of the others. Raises StoreError."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except DAMAGED as error:
        raise StoreError(unreadable(path, error)) from None


def squared_norms(path: Path) -> dict[str, float]:
    """Return the squared L2 norm of each tensor of a file of weights; it needs no torch.

    Raises:
        StoreError: it cannot be read, or is of a type that no run writes (bf16).
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            tensors = ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
            return {
                name: float(np.square(tensor, dtype=np.float64).sum()) for name, tensor in tensors
            }
    except (*DAMAGED, TypeError) as error:
        raise StoreError(unreadable(path, error)) from None


def unreadable(path: Path, error: Exception) -> str:
    """Return the words for a file of weights that cannot be read."""
    return f"{path}: cannot be read ({one_line(error)}); restore it"


def hash_json(value: object) -> str:
    """Return the sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
