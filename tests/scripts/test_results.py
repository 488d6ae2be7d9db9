"""scripts/results.py: which requests of its runs are evaluated, its rows and their order."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from cu_runner.schema.errors import LaunchError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module("results")
    monkeypatch.setattr(module, "DOCS", tmp_path)
    return module


@pytest.fixture
def asked(results, monkeypatch):
    """What cu_runs was given, in place of runs, whose UA is the number of their regularizer."""
    calls = []

    def no_runs(jobs, *, evaluated):
        calls.append((jobs, evaluated))
        for job in jobs:
            table = pd.DataFrame({"request": range(3), "train_seconds": 1.0, "concept": "a"})
            for name in ("UA", "RA_I", "RA_C", "RA_C_retained", "drift_l2"):
                table[name] = [0.0, float("nan") if "eval.every=[1]" in job else 5.0, 7.0]
            yield SimpleNamespace(table=table)

    monkeypatch.setattr(results, "cu_runs", no_runs)
    return calls


def test_the_curves_of_the_picture_are_whole_and_the_rest_has_first_and_last(
    results, asked, monkeypatch, tmp_path
):
    monkeypatch.setattr("sys.argv", ["results.py", "--alone", "esd"])
    results.main()
    (drawn, whole), (others, some) = asked
    assert (whole, some) == (None, (1, -1))
    assert not any("eval.every" in word for job in drawn for word in job)
    assert all("eval.every=[1]" in job for job in others)
    assert {job[1] for job in drawn} == {f"reg={reg}" for reg in results.CURVES}
    cells = results.matrix(["esd"], ("none",))
    assert len(drawn) + len(others) == len(cells)
    table = pd.read_csv(tmp_path / "matrix.csv").fillna({"remark": ""})
    assert [*table[["method", "reg", "remark"]].itertuples(index=False, name=None)] == [*cells]
    curves = pd.read_csv(tmp_path / "results.csv")
    assert curves["UA"].notna().all()
    assert (tmp_path / "results.png").is_file()


@pytest.mark.parametrize("row", ["conabl+l1", "esd+none"])
def test_one_row_leaves_the_others_their_figures(results, asked, monkeypatch, tmp_path, row):
    monkeypatch.setattr("sys.argv", ["results.py", "--rows", "conabl+none", "esd+none"])
    results.main()
    known = pd.read_csv(tmp_path / "matrix.csv").assign(UA=1.0)
    known.to_csv(tmp_path / "matrix.csv", index=False)
    monkeypatch.setattr("sys.argv", ["results.py", "--rows", row])
    results.main()
    found = pd.read_csv(tmp_path / "matrix.csv")
    assert found.set_index(found["method"] + "+" + found["reg"])["UA"].to_dict() == {
        "conabl+none": 1.0,
        "esd+none": 1.0,
        row: 7.0,
    }


def test_the_name_of_a_row_that_is_none(results, asked, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["results.py", "--rows", "esd+l1"])
    with pytest.raises(SystemExit):
        results.main()
    assert "esd+l1: no such row; allowed: conabl+none, " in capsys.readouterr().err
    assert not asked


def test_a_run_that_lacks_an_evaluation_ends_it(results, monkeypatch):
    def lacking(jobs, *, evaluated):
        raise LaunchError("not evaluated (eval.every): request 1")

    monkeypatch.setattr(results, "cu_runs", lacking)
    monkeypatch.setattr("sys.argv", ["results.py", "--rows", "esd+none"])
    with pytest.raises(LaunchError, match="request 1"):
        results.main()
