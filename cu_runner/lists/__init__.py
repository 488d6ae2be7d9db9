"""Lists of names that ship with the package, one name a line; lines that start with # are comments."""

from importlib import resources
from pathlib import Path

from cu_runner.credentials import refuse_secrets


def shipped_lists() -> list[str]:
    """The names that read_shipped knows."""
    return sorted(entry.name.removesuffix(".txt") for entry in resources.files(__name__).iterdir() if entry.name.endswith(".txt"))


def read_shipped(name: str | None) -> list[str]:
    """The entries of a shipped list. Raises ValueError with the lists there are."""
    if name not in shipped_lists():
        raise ValueError(f"{name}: no such list; allowed: {', '.join(shipped_lists())}")
    return parse_names((resources.files(__name__) / f"{name}.txt").read_text(encoding="utf-8"))


def read_file(path: str | None) -> list[str]:
    """The entries of a user's file. Raises ValueError if it is missing, holds none, or holds a secret of the environment."""
    file = Path(path or "").expanduser()
    if not file.is_file():
        raise ValueError(f"{path}: no such file; give a text file with one name a line")
    try:
        names = parse_names(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not a text file in UTF-8; give one name a line") from None
    if not names:
        raise ValueError(f"{path}: holds no names; give at least one, one a line")
    refuse_secrets((f"{path}, name {number}", name) for number, name in enumerate(names, start=1))
    return names


def parse_names(text: str) -> list[str]:
    """Stripped lines in order, without blanks, comments and repeats."""
    lines = [line.strip() for line in text.splitlines()]
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
