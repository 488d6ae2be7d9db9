"""Lists of names and prompts: those that ship with the package, and a user's text files, one entry
a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar
from unicodedata import category, normalize

from cu_runner.schema.secrets import refuse_secrets

Entry = TypeVar("Entry")

# byte-order mark, space and joiner of no width, soft hyphen, carriage return
UNSEEN = "\ufeff\u200b\u2060\u00ad\r"
APOSTROPHES = str.maketrans("\u2018\u2019\u02bc", "'''")

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
        ValueError: it is missing, no UTF-8 text, holds none, control characters, or a secret of the
            environment.
    """
    file = Path(path or "").expanduser()
    if not file.is_file():
        raise ValueError(f"{path}: no such file; give a text file with one name a line")
    if file.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path}: has over {LARGEST_FILE // 10**6} MB; give fewer entries")
    try:
        text = read_text(file)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if strange := [mark for mark in line if category(mark) == "Cc"]:
            raise ValueError(
                f"{path}: line {number} holds the control character {strange[0]!r}; take it out"
            )
    names = parse_names(text, repeats=repeats)
    if not names:
        raise ValueError(f"{path}: holds no names; give at least one, one a line")
    refuse_secrets((f"{path}, name {number}", name) for number, name in enumerate(names, start=1))
    return names


def read_text(file: Path) -> str:
    """Return the text of a user's file in UTF-8, with a byte-order mark or without.

    Raises:
        ValueError: it is in another encoding; names the line, not the file.
    """
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len((content[: error.start] + b"x").splitlines())
        raise ValueError(
            f"line {line} is no text in UTF-8; save the file in that encoding"
        ) from None
    if "\0" in text:
        line = len((text[: text.index("\0")] + "x").splitlines())
        raise ValueError(f"line {line} holds the character NUL; save the file as text in UTF-8")
    return text


def parse_names(text: str, *, repeats: bool = False) -> list[str]:
    """Return cleaned lines in order, without blanks and comments, and without repeats."""
    lines = [cleaned(line) for line in text.splitlines()]
    names = [line for line in lines if line and not line.startswith("#")]
    return names if repeats else list(dict.fromkeys(names))


def cleaned(text: str) -> str:
    """Return text as it looks: accents are composed, spaces of every kind are plain ones, unseen
    marks are gone.
    """
    return "".join(
        " " if category(mark) == "Zs" else mark
        for mark in normalize("NFC", text)
        if mark not in UNSEEN
    ).strip()


def comparable(name: str) -> str:
    """Return a name for comparison: two with one result are spellings of the same.

    Case, how accents and apostrophes are written, hyphens and underscores for spaces, and what is
    not seen make no difference.
    """
    plain = normalize("NFKC", normalize("NFKC", name).casefold()).translate(APOSTROPHES)
    marks = []
    for mark in plain:
        kind = category(mark)
        if kind in ("Pd", "Pc"):
            marks.append(" ")
        elif kind != "Cf" and not "\ufe00" <= mark <= "\ufe0f":  # which choose a glyph
            marks.append(mark)
    return " ".join("".join(marks).split())


def spread(entries: Sequence[Entry], number: int) -> list[Entry]:
    """Return at most `number` of the entries, in order and evenly spaced."""
    count = min(number, len(entries))
    return [entries[i * len(entries) // count] for i in range(count)]
