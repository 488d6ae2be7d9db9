"""cu-table: statistics by hand, cells that open exactly their own run, the three formats, the check of orderings, bad input."""

import pandas as pd
import pytest
import yaml
from conftest import SMOKE
from hydra.core.global_hydra import GlobalHydra

from cu_runner import tables
from cu_runner.config import compose
from cu_runner.help import shipped_dir

TABLE = {
    "title": "after the last request",
    "metrics": ["UA", "RA_I", "RA_C"],
    "rows": {"sequential": ["reg=none"], "L2": ["reg=l2"]},
    "experiments": {"smoke": {"model": "ShapeCanvas", "methods": {"ConAbl": ["method=conabl"]}, "columns": {"style": list(SMOKE)}}},
    "targets": {
        "model": "SD 1.5",
        "tolerance": 2,
        "sources": {"plot": "read off a plot"},
        "values": {"ConAbl": {"style": {"sequential": {"UA": 100, "RA_I": 15, "RA_C": 45.5, "source": "plot"}}}},
    },
}


@pytest.fixture
def cu_table(call_command):
    """Returns run(*arguments) -> (exit status, stdout, stderr) of cu-table in tmp_path."""
    return lambda *arguments: call_command(tables.main, "cu-table", *arguments)


@pytest.fixture
def own_table(tmp_path):
    """Returns write(**changes) -> path of TABLE as a file, changed."""

    def write(**changes) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(TABLE | changes))
        return str(path)

    return write


# -------------------------------------------------------------------------------------------------------- statistics
def test_mean_and_interval_by_hand():
    assert tables.mean_and_interval([42.0]) == (42.0, None)
    mean, half = tables.mean_and_interval([1.0, 2.0, 3.0])  # s = 1, t(.975, 2) = 4.302653
    assert mean == 2.0
    assert half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)


def test_image_interval_is_wilsons():
    # 8 of 10: (0.4902, 0.9433), so half of 0.4531
    assert tables.image_interval(80.0, 10) == pytest.approx(100 * (0.943318 - 0.490162) / 2, abs=1e-3)
    assert tables.image_interval(0.0, 96) == pytest.approx(100 * 1.959964**2 / (96 + 1.959964**2) / 2, rel=1e-6)


def measured(*rows: tuple) -> pd.DataFrame:
    columns = ["row", "ours", "half", "images_half", "paper", "comparable"]
    return pd.DataFrame(rows, columns=columns).assign(method="m", column="style", metric="RA_I")


def test_orderings():
    found = tables.orderings(
        measured(
            ("a", 50.0, None, 3.0, 40.0, True),
            ("b", 30.0, None, 4.0, 20.0, True),  # a > b in both: 20 > 5
            ("c", 55.0, None, 4.0, 19.0, False),  # b = c within the tolerance; a > c reversed: -5 within 5 is undecided
            ("d", 90.0, 1.0, 9.0, 10.0, True),  # the interval of seeds wins; a > d reversed
            ("e", 10.0, None, 3.0, None, True),  # not published
        ),
        tolerance=2.0,
    )
    verdicts = {(entry.higher, entry.lower): (entry.verdict, entry.comparable) for entry in found.itertuples()}
    assert verdicts == {
        ("a", "b"): ("holds", True),
        ("a", "c"): ("undecided", False),
        ("a", "d"): ("reversed", True),
        ("b", "d"): ("reversed", True),
        ("c", "d"): ("reversed", False),
    }
    first = found.iloc[0]
    assert (first["paper"], first["ours"], first["half"]) == (20.0, 20.0, 5.0)


# ------------------------------------------------------------------------------------------------------------- files
def test_every_shipped_table_reads_and_all_its_cells_compose(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = sorted(path.stem for path in shipped_dir("tables").glob("*.yaml"))
    assert "table2" in names
    paths = ["model.path=x", "evaluator.paths.style=x", "evaluator.paths.object=x"]
    for name in names:
        _, table = tables.read_table(name)
        for label, experiment in table.experiments.items():
            cells = list(tables.make_cells(table, experiment, [], paths if "canvas" in label and "shape" not in label else []))
            assert len(cells) == len(experiment.methods) * len(experiment.columns) * len(table.rows)
            directories = [plan.directory for cell in cells for plan in cell.plans]
            assert len(set(directories)) == len(directories)
    GlobalHydra.instance().clear()


def test_the_targets_of_table2_are_the_published_ones():
    _, table = tables.read_table("table2")
    for column, rows in table.targets.values["ConAbl"].items():
        assert list(rows) == list(table.rows), column
        for published in rows.values():
            assert published["source"] in table.targets.sources
            assert (set(published) == {"source"}) == (published["source"] == "none")
    style = table.targets.values["ConAbl"]["style"]
    assert [style["merge (TIES)"][metric] for metric in table.metrics] == [98.2, 38.8, 73]
    assert style["gradient projection"] == {"source": "none"}


# ----------------------------------------------------------------------------------------------------------- command
def test_a_finished_run_fills_its_cell_and_a_missing_one_gives_its_command(cu_table, own_table, run_copy, tmp_path):
    status, out, err = cu_table(own_table())
    assert (status, err) == (0, "")
    last = pd.read_csv(run_copy / "metrics.csv").iloc[-1]
    cells = [f"{last[name]:.1f}" for name in ("UA", "RA_I", "RA_C")]
    dagger = "" if last["UA"] >= 95 else " \N{DAGGER}"
    line = next(line for line in out.splitlines() if line.startswith("| sequential |"))
    assert line == f"| sequential | {cells[0]}{dagger} | 100 | {cells[1]}{dagger} | 15 | {cells[2]}{dagger} | 45.5 |"
    assert "| regularizer | UA, ShapeCanvas | UA, paper | RA-I, ShapeCanvas | RA-I, paper |" in out
    assert "| L2 | - | - | - | - | - | - |" in out
    assert f"    cu-run {' '.join(SMOKE)} method=conabl reg=l2" in out
    assert "One seed" in out
    assert out.splitlines()[-1] == "table: outputs/tables/mine-smoke.md"
    assert (tmp_path / "outputs/tables/mine-smoke.md").read_text() == out.rpartition("\ntable: ")[0]
    table = pd.read_csv(tmp_path / "outputs/tables/mine-smoke.csv").set_index(["row", "metric"])
    assert table.loc[("sequential", "RA_C"), "ours"] == pytest.approx(last["RA_C"], abs=1e-3)
    assert table.loc[("sequential", "RA_C"), "paper"] == 45.5
    assert table.loc[("sequential", "RA_C"), "source"] == "plot"
    assert pd.isna(table.loc[("L2", "UA"), "ours"])
    latex = (tmp_path / "outputs/tables/mine-smoke.tex").read_text()
    assert "\\toprule" in latex
    assert latex.count("\\begin{tabular}{lrrrrrr}") == 1
    assert "style (ShapeCanvas)" in latex
    assert "style (paper, SD 1.5)" in latex


def test_a_number_comes_from_its_own_signature_only(cu_table, own_table, run_copy):
    status, out, _ = cu_table(own_table(), "train.steps=4")  # the finished run has 3
    assert status == 0
    assert "| sequential | - | 100 |" in out


def test_several_seeds_are_all_needed_for_a_cell(cu_table, own_table, run_copy):
    status, out, _ = cu_table(own_table(), "--seeds", "0,1")
    assert status == 0
    assert "| sequential | - | 100 |" in out
    assert "reg=none seed=1" in out
    assert "reg=none seed=0" not in out  # it is complete


def test_run_makes_what_is_missing(cu_table, own_table, run_copy):
    path = own_table()
    status, out, err = cu_table(path, "--run", "--jobs", "1")
    assert (status, err) == (0, "")
    assert "  1/1  " in out
    assert "Not run yet" not in out
    assert cu_table(path)[1].partition("# mine")[2] == out.partition("# mine")[2]
    assert compose([*SMOKE, "method=conabl", "reg=l2"]).directory.is_dir()


def test_through_a_launcher_of_hydra(cu_table, own_table, run_copy, tmp_path):
    status, out, err = cu_table(own_table(), "--run", "--launcher", "local_processes")
    assert (status, err) == (0, "")
    assert "ended on local_processes" in out
    assert "Not run yet" not in out
    (job,) = (tmp_path / "outputs/sweeps").glob("*/*/job.json")
    assert "reg=l2" in job.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nix"], "nix: no such table; allowed: table2"),
        (["table2", "--experiment", "nix"], "--experiment nix: not in table table2; allowed: shapecanvas, "),
        (["table2", "methd=esd"], "unknown key methd"),
        (["table2", "--experiment", "unlearncanvas"], "not set, and without a default: model.path"),
        (["gone.yaml"], "gone.yaml: no such table"),
    ],
)
def test_bad_input_is_one_line(cu_table, arguments, message):
    status, _, err = cu_table(*arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_table_file_is_checked(cu_table, own_table, tmp_path):
    assert "experiments" in cu_table(own_table(experiments={"smoke": {"model": "x"}}))[2]
    assert "unknown key mine.yaml.metrcs" in cu_table(own_table(metrcs=[]))[2]
    wrong = own_table(rows={"a": {"object": ["reg=none"]}})
    assert "row 'a' gives overrides for object; give them for style" in cu_table(wrong)[2]
    (tmp_path / "mine.yaml").write_text("a: [")
    assert "cannot be read" in cu_table(str(tmp_path / "mine.yaml"))[2]


@pytest.mark.parametrize(
    "override",
    [
        "allow_modules=[evil]",
        "++allow_modules=[evil]",
        "model.allow_pickle=[evil]",
        "+method@hydra.callbacks.mine=esd",
        "hydra/launcher=evil",
        "+hydra.callbacks.a._target_=evil.Call",
        "~hydra.job",
    ],
)
def test_a_table_file_cannot_allow_code(cu_table, own_table, override):
    for changes in ({"rows": {"a": [override]}}, {"rows": {"a": {"style": [override]}}}, with_method([override])):
        status, _, err = cu_table(own_table(**changes), "--run")
        assert status == 2
        assert err.endswith(f"mine.yaml: {override} can run code; only the command line may set it\n")
        assert err.count("\n") == 1


def with_method(overrides: list[str]) -> dict:
    return {"experiments": {"smoke": {"model": "x", "methods": {"m": overrides}, "columns": {"style": list(SMOKE)}}}}


def test_a_damaged_run_is_refused(cu_table, own_table, run_copy):
    record = run_copy / "steps/01/step.json"
    record.write_text(record.read_text().replace('"UA"', '"UB"'))
    status, _, err = cu_table(own_table())
    assert status == 1
    assert f"{record.relative_to(run_copy.parents[3])}: does not match its own sha256" in err
