"""Prompts from a user's CSV file, one row per image."""

from __future__ import annotations

import csv
import io
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from unicodedata import category

from cu_runner.concepts.entries import LISTS, cleaned, read_text
from cu_runner.schema.secrets import refuse_secrets

LARGEST_FILE = 64 * 10**6  # bytes
MOST_ROWS = 200_000
SEEDS = ("seed", "evaluation_seed")  # names of the seeds' column; the second is the field's own

logger = logging.getLogger(__name__)


def read_prompts(
    key: str,
    path: str,
    needed: tuple[str, ...],
    *,
    more: tuple[str, ...] = (),
    distinct: tuple[str, ...] = (),
) -> list[dict[str, str]]:
    """Read the rows of a CSV file with a header, each field as it looks.

    A column `seed`, or `evaluation_seed` in its place, holds whole numbers from 0 on.

    Args:
        key: the configuration key that names the file, for the error's text.
        needed: columns that must be there, and filled in every row.
        more: columns that are read where they are there; run.log names all others.
        distinct: columns that together are what an image is made of: no two rows have the same.

    Raises:
        ValueError: the file is missing, no UTF-8 text, without rows or a needed column, or a row is
            wrong; names the line.
    """
    try:
        return read_rows(Path(path).expanduser(), needed, more, distinct)
    except ValueError as error:
        raise ValueError(f"{key}={path}: {error}") from None


def read_list(key: str, name: str | None, needed: tuple[str, ...]) -> list[dict[str, str]]:
    """Read the rows of a list that ships with the package, or of a CSV file; none of None.

    Args:
        key: the configuration key that names it.
        needed: columns; the shipped lists to choose from are those that have them.

    Raises:
        ValueError: as read_prompts; or there is no such list.
    """
    if name is None:
        return []
    if name.endswith(".csv") or "/" in name:
        return read_prompts(key, name, needed)
    shipped = {
        path.stem: path
        for path in sorted(LISTS.glob("*.csv"))
        if path.open(encoding="utf-8").readline().strip() == ",".join(needed)
    }
    if name not in shipped:
        raise ValueError(
            f"{key}: there is no list {name}; shipped lists: {', '.join(shipped)}; or give a CSV "
            f"file with the columns {', '.join(needed)}"
        )
    return read_prompts(key, str(shipped[name]), needed)


def read_rows(
    file: Path, needed: tuple[str, ...], more: tuple[str, ...], distinct: tuple[str, ...]
) -> list[dict[str, str]]:
    """Read as read_prompts does. Raises ValueError, which does not name the file."""
    if not file.is_file():
        raise ValueError(f"no such file; give a CSV file with the columns {', '.join(needed)}")
    if file.stat().st_size > LARGEST_FILE:
        raise ValueError(f"has over {LARGEST_FILE // 10**6} MB; give fewer images")
    lines = read_lines(read_text(file))
    header = read_header(next(lines, (0, []))[1], needed)
    unread = sorted({*header} - {*needed, *more, "seed", ""})
    rows: list[dict[str, str]] = []
    places: list[tuple[str, str]] = []
    first: dict[tuple[str, ...], int] = {}  # what makes an image: the line that has it
    for number, fields in lines:
        if len(rows) == MOST_ROWS:
            raise ValueError(f"has over {MOST_ROWS} rows; give fewer images")
        row = read_row(f"line {number}", header, fields, needed)
        image = tuple(row.get(name, "") for name in distinct)
        if image and (earlier := first.setdefault(image, number)) != number:
            raise ValueError(
                f"line {number}: {row['prompt']!r} is there twice with all that makes an image, "
                f"first in line {earlier}; it would be one image"
            )
        rows.append(row)
        places += [(f"line {number}", value) for value in row.values()]
    if not rows:
        raise ValueError("holds no row below its header")
    refuse_secrets(places)
    if unread:
        logger.info("%s: not read of it: %s", file, ", ".join(unread))
    return rows


def read_lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, fields) of every row that is not blank; of quoted line breaks it is the first.

    Raises:
        ValueError: it is no CSV.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    number = 1
    try:
        for fields in reader:
            if fields:
                yield number, fields
            number = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {number} cannot be read as CSV ({error})") from None


def read_header(fields: list[str], needed: Iterable[str]) -> list[str]:
    """Return the names of the columns; evaluation_seed is `seed`. Raises ValueError."""
    header = [cleaned(name) for name in fields]
    if found := [name for name in SEEDS if name in header]:
        header = ["seed" if name in SEEDS else name for name in header]
    elif others := [name for name in header if "seed" in name.casefold()]:
        raise ValueError(f"the column {others[0]} is not read; call it seed, or remove it")
    if len(found) > 1:
        raise ValueError(f"has the columns {' and '.join(found)}; remove the one that is not meant")
    if twice := [name for name, count in Counter(header).items() if name and count > 1]:
        raise ValueError(f"has two columns {twice[0]}; remove or rename one")
    if missing := [name for name in needed if name not in header]:
        raise ValueError(f"has no column {missing[0]}; needed: {', '.join(needed)}")
    return header


def read_row(
    place: str, header: list[str], fields: list[str], needed: Iterable[str]
) -> dict[str, str]:
    """Return the fields of a row by column. place: begins a line. Raises ValueError."""
    values = [cleaned(re.sub(r"[\r\n\t]+", " ", field)) for field in fields]
    while len(values) > len(header) and not values[-1]:  # commas at the end
        values.pop()
    if len(values) != len(header):
        raise ValueError(
            f"{place} has another number of fields than the header; quote fields with commas"
        )
    row = dict(zip(header, values, strict=True))
    if "" in header and any(value for name, value in zip(header, values, strict=True) if not name):
        raise ValueError(f"{place} has a field in a column without a name; name it or remove it")
    row.pop("", None)
    if empty := [name for name in needed if not row[name]]:
        raise ValueError(f"{place} has no {empty[0]}")
    if strange := [mark for value in values for mark in value if category(mark) == "Cc"]:
        raise ValueError(f"{place} holds the control character {strange[0]!r}; take it out")
    if "seed" in row:
        if not (row["seed"].isdecimal() and len(row["seed"]) < 20):
            raise ValueError(f"{place}: seed {row['seed']!r} is no whole number from 0 on")
        row["seed"] = str(int(row["seed"]))
    return row
