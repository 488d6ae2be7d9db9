"""A folder of people's own pictures, and the captions that lie beside them.

Captions come as in the imagefolder of Hugging Face's datasets: metadata.csv or metadata.jsonl with
file_name and text. captions.txt has one line per picture, in the order of their names.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from cu_runner.concepts.entries import cleaned, read_file, read_text
from cu_runner.concepts.prompt_csv import read_prompts
from cu_runner.schema.secrets import refuse_secrets

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
# Pictures in formats that are not read, some of them not by Pillow either.
OTHERS = frozenset(
    f".{ending}"
    for ending in (
        *("arw", "avif", "bmp", "cr2", "dng", "gif", "heic", "heif", "jfif", "jp2", "jxl", "nef"),
        *("pgm", "ppm", "svg", "tga", "tif", "tiff"),
    )
)
CAPTIONS = ("captions.txt", "metadata.csv", "metadata.jsonl")


@dataclass(frozen=True)
class PictureFolder:
    """Pictures in the order of their names.

    key: the setting that names the folder, as a user writes it with its value. captions: one per
    picture; () where the folder has none.
    """

    key: str
    paths: tuple[Path, ...]
    captions: tuple[str, ...] = ()


def find_pictures(folder: str, key: str = "retention.reference") -> list[Path]:
    """Find the image files in a folder and below, by name.

    Args:
        key: the setting that names the folder, for the error's text.

    Raises:
        ValueError: there are none, or some in a format that is not read.
    """
    files = sorted(path for path in Path(folder).expanduser().rglob("*") if path.is_file())
    found = [path for path in files if path.suffix.lower() in PICTURES]
    if not found:
        raise ValueError(f"{key}={folder}: no such folder, or no {', '.join(PICTURES)} file in it")
    if left := [path for path in files if path.suffix.lower() in OTHERS]:
        raise ValueError(
            f"{key}={folder}: {left[0]} and {len(left) - 1} more are pictures in a format that is "
            f"not read; convert them to one of {', '.join(PICTURES)}, or remove them"
        )
    return found


def read_folder(key: str, folder: str) -> PictureFolder:
    """Find the pictures of a folder and read their captions; no picture is opened.

    Raises:
        ValueError: there are no pictures; captions that cannot be read, or are not one for each.
    """
    paths = find_pictures(folder, key)
    captions = read_captions(f"{key}={folder}", Path(folder).expanduser(), paths)
    return PictureFolder(f"{key}={folder}", tuple(paths), tuple(captions))


def read_captions(said: str, root: Path, paths: list[Path]) -> list[str]:
    """Read the caption of every picture below a folder; [] where it has no file of captions.

    said: the setting with its value, which begins every error. Raises ValueError.
    """
    found = [name for name in CAPTIONS if (root / name).is_file()]
    if not found:
        return []
    if len(found) > 1:
        raise ValueError(f"{said}: has captions in {' and '.join(found)}; keep one of them")
    file = root / found[0]
    if file.suffix == ".txt":
        try:
            lines = read_file(str(file), repeats=True)
        except ValueError as error:
            raise ValueError(f"{said}: {error}") from None
        if len(lines) != len(paths):
            raise ValueError(
                f"{said}: captions.txt has {len(lines)} lines for {len(paths)} pictures; give one "
                "line per picture, in the order of their names"
            )
        return lines
    rows = read_json_lines(said, file) if file.suffix == ".jsonl" else read_table(said, file)
    places = {path.relative_to(root).as_posix(): path for path in paths}
    if strange := [name for name in rows if name not in places]:
        raise ValueError(f"{said}: {file.name} names {strange[0]}, which is no picture there")
    if missing := [name for name in places if name not in rows]:
        raise ValueError(
            f"{said}: {file.name} has no caption of {missing[0]}; every picture needs one"
        )
    return [rows[name] for name in places]


def read_table(said: str, file: Path) -> dict[str, str]:
    """Read metadata.csv: the text of every picture by its name. Raises ValueError."""
    rows = read_prompts(said, str(file), ("file_name", "text"))
    return by_name(said, file, [(row["file_name"], row["text"]) for row in rows])


def read_json_lines(said: str, file: Path) -> dict[str, str]:
    """Read metadata.jsonl: the text of every picture by its name. Raises ValueError."""
    try:
        lines = read_text(file).splitlines()
    except ValueError as error:
        raise ValueError(f"{said}: {file.name}: {error}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], cleaned(" ".join(str(entry["text"]).split()))
        except (ValueError, KeyError, TypeError, RecursionError):
            entry, text = None, ""
        if entry is None or not isinstance(name, str) or not (text and text.isprintable()):
            raise ValueError(
                f"{said}: {file.name} line {number} is no JSON object with file_name and text; "
                'write {"file_name": "1.png", "text": "..."}'
            )
        rows.append((name, text))
    refuse_secrets((f"{said}, {name}", text) for name, text in rows)
    return by_name(said, file, rows)


def by_name(said: str, file: Path, rows: list[tuple[str, str]]) -> dict[str, str]:
    """Return the text of every picture by its name. Raises ValueError for one with two."""
    texts: dict[str, str] = {}
    for name, text in rows:
        if texts.setdefault(name, text) != text:
            raise ValueError(f"{said}: {file.name} has two captions of {name}; keep one")
    return texts


def content_sha256(folder: str) -> str | None:
    """Return the sha256 over the pictures of a folder, their names, and its captions.

    None where there is no such folder.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        return None
    entries = [
        [path.relative_to(root).as_posix(), file_sha256(path, found.st_size, found.st_mtime_ns)]
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in PICTURES or path.name in CAPTIONS
        if path.is_file() and (found := path.stat())
    ]
    return hashlib.sha256(json.dumps(entries).encode(errors="surrogatepass")).hexdigest()


@functools.cache
def file_sha256(path: Path, size: int, changed: int) -> str:
    """Return the sha256 of a file, read once for as long as its size and time stay."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
