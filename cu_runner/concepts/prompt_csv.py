"""Prompts from a user's CSV file, one row per image."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

from cu_runner.schema.secrets import refuse_secrets

LARGEST_FILE = 64 * 10**6  # bytes
MOST_ROWS = 200_000


def read_prompts(key: str, path: str, needed: tuple[str, ...]) -> list[dict[str, str]]:
    """Read the rows of a CSV file with a header, stripped; a column `seed` holds whole numbers from
    0 on.

    Args:
        key: the configuration key that names the file, for the error's text.
        needed: columns that must be there, and filled in every row.

    Raises:
        ValueError: the file is missing, no UTF-8 text, without rows or a needed column, or a row is
            wrong; names the line.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(
            f"{key}={path}: no such file; give a CSV file with the columns {', '.join(needed)}"
        )
    if file.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{key}={path}: has over {LARGEST_FILE // 10**6} MB; give fewer images")
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text, strict=True)
            lines = [(reader.line_num, row) for row in itertools.islice(reader, MOST_ROWS + 1)]
            columns = reader.fieldnames or []
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{key}={path}: cannot be read as CSV in UTF-8 ({error})") from None
    if missing := [name for name in needed if name not in columns]:
        raise ValueError(f"{key}={path}: has no column {missing[0]}; needed: {', '.join(needed)}")
    if len(lines) > MOST_ROWS:
        raise ValueError(f"{key}={path}: has over {MOST_ROWS} rows; give fewer images")
    if not lines:
        raise ValueError(f"{key}={path}: holds no row below its header")
    rows = []
    for number, row in lines:
        if None in row or None in row.values():
            raise ValueError(
                f"{key}={path}: line {number} has another number of fields than the header; quote "
                "fields with commas"
            )
        row = {name: value.strip() for name, value in row.items()}
        if empty := [name for name in needed if not row[name]]:
            raise ValueError(f"{key}={path}: line {number} has no {empty[0]}")
        if not row.get("seed", "0").isdecimal():
            raise ValueError(
                f"{key}={path}: line {number}: seed {row['seed']!r} is no whole number from 0 on"
            )
        refuse_secrets((f"{key}={path}: line {number}", value) for value in row.values())
        rows.append(row)
    return rows
