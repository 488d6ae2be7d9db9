"""What lies among the steps of a run and is none: named, never read, never deleted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cu_runner.schema.errors import StoreError
from cu_runner.store.layout import (
    DELTA,
    GRID,
    MERGED,
    METRICS,
    NUMBER,
    PREDICTIONS,
    STEP,
    TRAINING,
)

FILES = (DELTA, MERGED, TRAINING, PREDICTIONS, METRICS, GRID, STEP)
OURS = {*FILES, *(f".{name}.tmp" for name in FILES)}


def strangers(run: Path) -> list[Path]:
    """Return what lies in the folder of steps under a name that no step has: 01.bak, ..."""
    return [path for path in entries(run) if not NUMBER.fullmatch(path.name)]


def entries(run: Path) -> list[Path]:
    """Return what lies in the folder of steps, by name; nothing where there is none."""
    folder = run / "steps"
    return sorted(folder.iterdir()) if folder.is_dir() else []


def refuse_what_is_in_the_way(run: Path) -> None:
    """Raise StoreError for what no step may be read from, or written in the place of.

    That is a link, a file, or a folder without a record that holds other files than a step's.
    """
    for path in entries(run):
        if NUMBER.fullmatch(path.name) and (why := next(obstacles(path), None)):
            raise StoreError(f"{path}: {why}")


def obstacles(path: Path) -> Iterator[str]:
    """Yield what is wrong with what lies in the place of a step."""
    if path.is_symlink():
        yield "is a symbolic link; a step is a folder: remove the link, or move the folder here"
    elif not path.is_dir():
        yield "is no folder, as a step is; move it away"
    elif not (path / STEP).exists():
        others = sorted(inside.name for inside in path.iterdir() if not is_ours(inside))
        if others:
            yield (
                f"is of a step that was not finished and holds {others[0]!r}, which is no file of "
                "a step; move that away"
            )


def is_ours(path: Path) -> bool:
    """Tell whether this is a file that a step writes."""
    return path.name in OURS and path.is_file() and not path.is_symlink()


def clear(folder: Path) -> None:
    """Delete what an unfinished step left, and nothing else. Raises StoreError."""
    if folder.is_symlink() or folder.exists():
        for why in obstacles(folder):
            raise StoreError(f"{folder}: {why}")
        for path in folder.iterdir():
            if is_ours(path):
                path.unlink()
        folder.rmdir()
