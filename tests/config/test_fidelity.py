"""docs/fidelity.md: every row of its tables is what the published presets compose to."""

import re
from functools import cache
from pathlib import Path

import pytest
import yaml
from conftest import compose

from cu_runner.config.compose import parse

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
EXPERIMENTS = {
    "S": ("unlearncanvas_style", "evaluator.paths.style=/x", "evaluator.paths.object=/x"),
    "O": ("unlearncanvas_object", "evaluator.paths.style=/x", "evaluator.paths.object=/x"),
    "C": ("celebrity_sd14", "evaluator.paths.celebrity=/x", "evaluator.paths.scene=/x"),
    "X": ("celebrity_sdxl", "evaluator.paths.celebrity=/x", "evaluator.paths.scene=/x"),
}


def tables() -> list[list[dict[str, str]]]:
    """The tables of the page, each row by the names of its columns."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", PAGE, flags=re.MULTILINE):
        rows = [
            [cell.strip() for cell in line.strip().strip("|").split("|")]
            for line in block.splitlines()
        ]
        assert all(len(row) == len(rows[0]) for row in rows), block
        found.append([dict(zip(rows[0], row, strict=True)) for row in rows[2:]])
    return found


def cells(text: str) -> list[tuple[str, str, str, str]]:
    """(experiment, method, regularizers, setting) of what a column `cell` names."""
    found = []
    for part in text.split(";"):
        experiments, chosen, *setting = part.split()
        method, _, reg = chosen.partition("+")
        where = setting[0].removeprefix("@") if setting else "sequential"
        found += [(letter, method, reg or "none", where) for letter in experiments.split(",")]
    return found


@cache
def resolved(experiment: str, method: str, reg: str, setting: str) -> dict:
    name, *paths = EXPERIMENTS[experiment]
    choices = (f"method={method}", f"reg={reg}", f"setting={setting}")
    plan = parse(compose(f"experiment={name}", "model.path=/x", *paths, *choices))
    assert plan.tuned
    return plan.resolved


def read_value(text: str) -> object:
    """A value as the page writes it; YAML reads 8e-6 as text."""
    value = yaml.safe_load(text)
    if isinstance(value, str) and re.fullmatch(r"[\d.]+e-?\d+", value):
        return float(value)
    return text if text == "{concept}" else value


VALUES, RELEASED, DEVIATIONS = tables()
ROWS = [
    (*cell, row["setting"], row["value"])
    for row in (*VALUES, *RELEASED)
    for cell in cells(row["cell"])
]


def test_the_page_has_every_cell_and_every_line():
    assert len(ROWS) > 230
    lines = {int(row["#"]) for row in RELEASED}
    assert lines == set(range(1, 15)) - {7}  # 7 and 15 are deviations
    assert len(DEVIATIONS) >= 12
    assert all(row["why"] and row["ours"] and row["released"] for row in DEVIATIONS)
    composed = {row[:4] for row in ROWS}
    assert {(letter, method) for letter, method, *_ in composed} == {
        ("S", "conabl"),
        ("O", "conabl"),
        ("C", "conabl"),
        ("S", "sculpmem"),
        ("O", "sculpmem"),
        ("X", "esd"),
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(row[:5]))
def test_a_row_is_what_the_preset_composes_to(row):
    *cell, key, text = row
    value = resolved(*cell)
    for part in key.split("."):
        value = value[part]
    assert value == read_value(text)


def test_the_tests_that_hold_the_lines_are_there():
    for row in RELEASED:
        assert (ROOT / row["held by"]).is_file(), row
