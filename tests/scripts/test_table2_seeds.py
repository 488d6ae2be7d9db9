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
    "rows": {"plain": ["reg=none"], "L2": ["reg=l2"]},
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
        "values": {
            "ConAbl": {
                "style": {
                    "plain": {"RA_I": 10, "source": "plot"},
                    "L2": {"RA_I": 50, "source": "plot"},
                }
            }
        },
    },
}


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The script with a table of two rows, and its files in tmp_path: lines of two seeds, made by
    hand.
    """
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module("table2_seeds")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL, sort_keys=False))
    small = read_table(str(tmp_path / "small.yaml"))
    monkeypatch.setattr(module, "read_table", lambda _: small)
    monkeypatch.setattr(module, "LINES", tmp_path / "table2.csv")
    monkeypatch.setattr(module, "PAGE", tmp_path / "table2.md")
    table = small[1]
    cells = make_cells(table, table.experiments["smoke"], [0, 1], [], [])
    known = {"plain": [10.0, 10.0], "L2": [60.0, 70.0]}
    rows = [
        {
            **{"column": "style", "row": cell.row, "seed": plan.spine.seed},
            **{"UA": 100.0, "RA_I": known[cell.row][plan.spine.seed], "RA_C": 50.0},
            **{"UA_images": 400, "RA_I_images": 400, "RA_C_images": 800},
            **{"run": plan.directory.name, "commit": "abcdef0"},
        }
        for cell in cells
        for plan in cell.plans
    ]
    pd.DataFrame(rows).to_csv(module.LINES, index=False)
    return module


def test_the_page_in_docs_is_what_its_lines_give(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module("table2_seeds")
    _, table = read_table(module.NAME)
    lines = pd.read_csv(module.LINES)
    seeds = sorted(set(lines["seed"].tolist()))
    cells = list(make_cells(table, table.experiments["shapecanvas"], seeds, [], []))
    module.require_same(lines, cells, "")
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


def verdicts(column=None, metric=None, comparable=False):
    """How many pairs of docs/table2.md hold, are reversed, are undecided."""
    page = (ROOT / "docs/table2.md").read_text(encoding="utf-8")
    pairs = re.findall(
        r"^\| ConAbl \| (\w+) \| ([\w-]+) \| .* \| (\w+)( \u2020)? \|$", page, re.MULTILINE
    )
    found = [
        verdict
        for domain, measured, verdict, dagger in pairs
        if column in (None, domain) and metric == measured and not (comparable and dagger)
    ]
    return [found.count(verdict) for verdict in ("holds", "reversed", "undecided")]


def test_the_orderings_that_are_counted_are_those_of_the_page():
    results = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    rows = re.findall(r"^   \| (RA-[IC]), (style|object)s \| (.*) \|$", results, re.MULTILINE)
    assert len(rows) == 4
    for metric, column, cells in rows:
        shown = [int(number) for number in re.findall(r"\d+", cells)]
        assert shown[:3] == verdicts(column, metric), (metric, column)
        assert shown[3:] == verdicts(column, metric, comparable=True), (metric, column)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    said = re.search(
        r"Of the (\d+) pairs of rows.*\s+paper (\d+) are ordered as there, (\d+) reversed, "
        r"(\d+) undecided "
        r"\(of the (\d+) with a UA of 95 in both rows (\d+), (\d+) and (\d+)\); "
        r"of (\d+) in RA-I (\d+), (\d+) and (\d+)\.",
        readme,
    )
    across = [verdicts(metric=metric) for metric in ("RA-C", "RA-I")]
    alike = verdicts(metric="RA-C", comparable=True)
    wanted = [sum(across[0]), *across[0], sum(alike), *alike, sum(across[1]), *across[1]]
    assert [int(number) for number in said.groups()] == wanted


def test_a_run_is_taken_in_and_shown_as_cu_table_shows_it(script, run_copy, call_command):
    assert call_command(script.main, "table2_seeds", "--seeds", "0")[:2] == (
        0,
        "taken in: 1 of 2 runs\n",
    )
    lines = pd.read_csv(script.LINES).set_index(["row", "seed"])
    assert lines.index.tolist() == [("plain", 0), ("plain", 1), ("L2", 0), ("L2", 1)]
    taken = lines.loc["plain", 0]
    assert taken["run"] == run_copy.name
    assert taken["commit"] != "abcdef0"
    # 2 targets and 2 retained styles, each with 2 objects and one seed
    assert taken[["UA_images", "RA_I_images", "RA_C_images"]].tolist() == [4, 4, 8]
    last = pd.read_csv(run_copy / "metrics.csv").iloc[-1]
    assert taken[["UA", "RA_I", "RA_C"]].tolist() == last[["UA", "RA_I", "RA_C"]].tolist()
    # with no other seed the page has the very row that cu-table prints
    lines.reset_index().query("seed == 0").to_csv(script.LINES, index=False)
    assert call_command(script.main, "table2_seeds")[0] == 0
    status, out, _ = call_command(cu_table.main, "cu-table", "small.yaml", "--seeds", "0")
    (ours,) = [text for text in script.PAGE.read_text().splitlines() if text.startswith("| plain")]
    assert status == 0
    assert ours in out.splitlines()


def test_means_intervals_and_orderings_are_those_of_the_lines(script, call_command):
    assert call_command(script.main, "table2_seeds")[0] == 0
    page = script.PAGE.read_text()
    # of 60 and 70 the standard error is 5, t_.975 with one degree of freedom 12.706
    assert "65.0 (1.5 to 100.0)" in page
    (pair,) = [
        line for line in page.splitlines() if line.startswith("| ConAbl | style | RA-I | L2")
    ]
    assert "| plain | +40.0 | +55.0 (" in pair
    assert "made by the code of the commits abcdef0." in page
    assert "Fewer seeds" not in page
    lines = pd.read_csv(script.LINES)
    lines.iloc[:3].to_csv(script.LINES, index=False)
    assert call_command(script.main, "table2_seeds")[0] == 0
    assert "Fewer seeds: style, L2: 1." in script.PAGE.read_text()
    lines.iloc[:2].to_csv(script.LINES, index=False)
    status, _, err = call_command(script.main, "table2_seeds")
    assert (status, err.count("\n")) == (2, 1)
    assert "no run of style, L2; take one in" in err


def test_runs_of_other_settings_are_refused(script, run_copy, call_command):
    lines = pd.read_csv(script.LINES)
    name = lines["run"][0]
    for changed, said in (
        (lines.replace(name, "conabl-none-sequential-s0-00000000"), f"which is {name}; take"),
        (lines.replace({"seed": {0: 7}}), "is not the run of the table"),
    ):
        changed.to_csv(script.LINES, index=False)
        status, _, err = call_command(script.main, "table2_seeds")
        assert (status, err.count("\n")) == (2, 1)
        assert said in err
    assert not script.PAGE.exists()
    lines.to_csv(script.LINES, index=False)
    (run_copy / "steps/02/step.json").rename(run_copy / "steps/02/other.json")  # unfinished
    status, out, _ = call_command(script.main, "table2_seeds", "--seeds", "0")
    assert (status, out) == (0, "taken in: 0 of 2 runs\n")
    status, _, err = call_command(script.main, "table2_seeds", "train.lr=1")
    assert status == 2
    assert "give --seeds too" in err
