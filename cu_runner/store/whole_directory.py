"""A directory that is whole or not there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cu_runner.schema.errors import StoreError


def refuse_taken(directory: Path, overwrite: bool, ours: Callable[[Path], bool]) -> None:
    """Raise StoreError where a directory cannot be written.

    Args:
        overwrite: it may hold something, if that is ours.
        ours: tells whether what a directory holds may be replaced.
    """
    if not os.path.lexists(directory):
        return
    if not directory.is_dir():
        raise StoreError(f"{directory}: is there and no directory; choose another")
    if not any(directory.iterdir()):
        return
    if not overwrite:
        raise StoreError(f"{directory}: is not empty; choose another directory or add --overwrite")
    if not ours(directory):
        raise StoreError(
            f"{directory}: holds something else than an export of cu-export, which --overwrite "
            "does not touch; choose another directory"
        )


@contextmanager
def whole_directory(
    directory: Path, overwrite: bool, ours: Callable[[Path], bool]
) -> Iterator[Path]:
    """Give an empty folder to be filled, which takes the directory's place at the end.

    It lies beside it and has another name until all of it is on the disk; of a block that fails
    nothing is left, and what was in the directory stays.

    Raises:
        StoreError: as refuse_taken().
    """
    directory = directory.resolve()  # a link stays one
    refuse_taken(directory, overwrite, ours)
    directory.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        filled = folder / "new"
        filled.mkdir()  # with the permissions that a new folder has; those of `folder` are closed
        yield filled
        sync(filled)
        refuse_taken(directory, overwrite, ours)
        if directory.exists():
            directory.rename(folder / "old")
        try:
            filled.rename(directory)
        except OSError:
            if (folder / "old").exists():
                (folder / "old").rename(directory)
            raise
    finally:
        with suppress(OSError):
            shutil.rmtree(folder)


def sync(folder: Path) -> None:
    """Wait until every file of a folder is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
