"""scripts/table2_seeds.py: runs become lines, lines become what cu-table says of the runs, and a
line of other settings is refused. docs/table2.md is what docs/table2.csv gives.
"""

import importlib
import re
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import SMOKE

from cu_runner.cli import table as cu_table
from cu_runner.reporting.table_cells import make_cells
from cu_runner.reporting.table_spec import read_table

ROOT = Path(__file__).parents[2]
SMALL = {
    "title": "small",
    "metrics": ["UA", "RA_I", "RA_C"],
    "rows": {"plain": ["reg=none"]},
    "experiments": {
        "smoke": {
            "model": "ShapeCanvas",
            "methods": {"ConAbl": ["method=conabl"]},
            "columns": {"style": list(SMOKE)},
        }
    },
    "targets": {
        "model": "SD",
        "tolerance": 2,
        "sources": {"plot": "read from a plot"},
        "values": {"ConAbl": {"style": {"plain": {"UA": 90, "source": "plot"}}}},
    },
}


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The script with a table of one cell, a copy of the finished smoke run, and its files in
    tmp_path.
    """
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module("table2_seeds")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL, sort_keys=False))
    small = read_table(str(tmp_path / "small.yaml"))
    monkeypatch.setattr(module, "read_table", lambda _: small)
    monkeypatch.setattr(module, "LINES", tmp_path / "table2.csv")
    monkeypatch.setattr(module, "PAGE", tmp_path / "table2.md")
    head = pd.read_csv(ROOT / "docs/table2.csv").iloc[:0]
    head.to_csv(module.LINES, index=False)
    return module


def test_the_page_in_docs_is_what_its_lines_give(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module("table2_seeds")
    _, table = read_table(module.NAME)
    lines = pd.read_csv(module.LINES)
    seeds = sorted(set(lines["seed"].tolist()))
    cells = list(make_cells(table, table.experiments["shapecanvas"], seeds, [], []))
    module.require_same(lines, cells)
    assert module.page(lines, table, cells) == module.PAGE.read_text()


SHOWN = {
    "nothing (sequential)": "sequential",
    "L1": "L1",
    "L2": "L2",
    "SelFT": "SelFT",
    "merging (TIES)": "merge (TIES)",
    "gradient projection": "gradient projection",
    "nothing, all at once (simultaneous)": "simultaneous",
}


@pytest.mark.parametrize("file", ["README.md", "docs/results.md"])
def test_the_means_that_are_shown_are_those_of_the_lines(file):
    lines = pd.read_csv(ROOT / "docs/table2.csv")
    means = lines.groupby(["row", "column"])[["UA", "RA_I", "RA_C"]].mean().round(1)
    text = (ROOT / file).read_text(encoding="utf-8")
    for label, row in SHOWN.items():
        (cells,) = re.findall(
            rf"^\| {re.escape(label)} \| (\S+ / .*) \| (.*) \|$", text, re.MULTILINE
        )
        for column, cell in zip(("style", "object"), cells, strict=True):
            shown = [float(number) for number in cell.split()[:5:2]]
            assert shown == means.loc[(row, column)].tolist(), (label, column)


def test_a_run_is_taken_in_and_the_page_is_that_of_cu_table(script, run_copy, call_command):
    assert call_command(script.main, "table2_seeds", "--seeds", "0")[0] == 0
    line = pd.read_csv(script.LINES).iloc[0]
    assert (line["row"], line["seed"], line["run"]) == ("plain", 0, run_copy.name)
    # 2 targets and 2 retained styles, each with 2 objects and one seed
    assert line[["UA_images", "RA_I_images", "RA_C_images"]].tolist() == [4, 4, 8]
    status, out, err = call_command(cu_table.main, "cu-table", "small.yaml", "--seeds", "0")
    assert (status, err) == (0, "")
    ours = [text for text in script.PAGE.read_text().splitlines() if text.startswith("| plain")]
    assert ours
    assert set(ours) <= set(out.splitlines())
    assert "Do the paper's orderings hold?" in script.PAGE.read_text()


def test_a_line_of_other_settings_is_refused_by_name(script, run_copy, call_command):
    assert call_command(script.main, "table2_seeds", "--seeds", "0")[0] == 0
    lines, page = pd.read_csv(script.LINES), script.PAGE.read_text()
    lines.assign(run="conabl-none-sequential-s0-00000000").to_csv(script.LINES, index=False)
    status, _, err = call_command(script.main, "table2_seeds")
    assert (status, err.count("\n")) == (2, 1)
    assert f"was conabl-none-sequential-s0-00000000 and is {run_copy.name} today" in err
    assert script.PAGE.read_text() == page
