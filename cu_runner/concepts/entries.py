"""Lists of names and prompts: those that ship with the package, and a user's text files, one entry
a line.
"""

from __future__ import annotations

from pathlib import Path
from unicodedata import category

from cu_runner.schema.secrets import refuse_secrets

UNSEEN = "\ufeff\u200b\r"  # byte-order mark, space of no width, carriage return

LARGEST_FILE = 16 * 10**6  # bytes
LISTS = Path(__file__).parent / "lists"


def read_entries(key: str, source: str | list[str], *, repeats: bool = False) -> list[str]:
    """Return the entries as given, or read a shipped list or a text file.

    Args:
        key: the configuration key that names the source, for the error's text.
        source: entries, the name of a list, or a path (it holds a slash or ends in .txt).
        repeats: keep entries of a file that are there twice; their places mean something.

    Raises:
        ValueError: no such list or file, or it cannot be read.
    """
    if isinstance(source, list):
        return [cleaned(entry) for entry in source]
    try:
        return (
            read_file(source, repeats=repeats)
            if "/" in source or source.endswith(".txt")
            else read_shipped(source)
        )
    except ValueError as error:
        raise ValueError(f"{key}={error}") from None


def shipped_lists() -> list[str]:
    """Return the names that read_shipped knows."""
    return sorted(path.stem for path in LISTS.glob("*.txt"))


def read_shipped(name: str | None) -> list[str]:
    """Read the entries of a shipped list. Raise ValueError with the lists there are."""
    if name not in shipped_lists():
        raise ValueError(f"{name}: no such list; allowed: {', '.join(shipped_lists())}")
    return parse_names((LISTS / f"{name}.txt").read_text(encoding="utf-8"))


def read_file(path: str | None, *, repeats: bool = False) -> list[str]:
    """Read the entries of a user's file.

    Raises:
        ValueError: it is missing, holds none, or holds a secret of the environment.
    """
    file = Path(path or "").expanduser()
    if not file.is_file():
        raise ValueError(f"{path}: no such file; give a text file with one name a line")
    if file.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path}: has over {LARGEST_FILE // 10**6} MB; give fewer entries")
    try:
        names = parse_names(file.read_text(encoding="utf-8-sig"), repeats=repeats)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not a text file in UTF-8; give one name a line") from None
    if not names:
        raise ValueError(f"{path}: holds no names; give at least one, one a line")
    refuse_secrets((f"{path}, name {number}", name) for number, name in enumerate(names, start=1))
    return names


def parse_names(text: str, *, repeats: bool = False) -> list[str]:
    """Return cleaned lines in order, without blanks and comments, and without repeats."""
    lines = [cleaned(line) for line in text.splitlines()]
    names = [line for line in lines if line and not line.startswith("#")]
    return names if repeats else list(dict.fromkeys(names))


def cleaned(text: str) -> str:
    """Return text as it looks: spaces of every kind are plain ones, unseen marks are gone."""
    return "".join(
        " " if category(mark) == "Zs" else mark for mark in text if mark not in UNSEEN
    ).strip()
