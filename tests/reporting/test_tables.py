"""cu-table: statistics by hand, cells that open exactly their own run, the three formats, the check
of orderings, bad input.
"""

import dataclasses
import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from commands import USED
from conftest import SMOKE, run_directory
from hydra.core.global_hydra import GlobalHydra

from cu_runner.cli import fill_table, table
from cu_runner.config.compose import compose
from cu_runner.evaluators.metrics import Measured
from cu_runner.reporting import table_cells as tables
from cu_runner.reporting.estimates import image_counts
from cu_runner.reporting.intervals import of_sum, over_images, over_seeds, widest
from cu_runner.reporting.table_spec import read_table
from cu_runner.runtime.paths import shipped_dir
from cu_runner.store.files import hash_json
from cu_runner.store.run_record import read_run
from cu_runner.sweeps import make_runs

TABLE = {
    "title": "after the last request",
    "metrics": ["UA", "RA_I", "RA_C"],
    "rows": {"sequential": ["reg=none"], "L2": ["reg=l2"]},
    "experiments": {
        "smoke": {
            "model": "ShapeCanvas",
            "methods": {"ConAbl": ["method=conabl"]},
            "columns": {"style": list(SMOKE)},
        }
    },
    "targets": {
        "model": "SD 1.5",
        "tolerance": 2,
        "sources": {"plot": "read off a plot"},
        "values": {
            "ConAbl": {
                "style": {"sequential": {"UA": 100, "RA_I": 15, "RA_C": 45.5, "source": "plot"}}
            }
        },
    },
}


@pytest.fixture
def cu_table(call_command):
    """Returns run(*arguments) -> (exit status, stdout, stderr) of cu-table in tmp_path."""
    return lambda *arguments: call_command(table.main, "cu-table", *arguments)


@pytest.fixture
def own_table(tmp_path):
    """Returns write(**changes) -> path of TABLE as a file, changed."""

    def write(**changes) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(TABLE | changes))
        return str(path)

    return write


def change_code(run: Path, steps: Iterable[int], name: str) -> None:
    """Change what steps record of a file of their code, as if they had been made by that."""
    for path in sorted(run.glob("steps/*/step.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["index"] in steps:
            record["code"]["files"][name] = "0" * 64
            record["code"]["sha256"] = hash_json(record["code"]["files"])
        del record["record_sha256"]
        text = json.dumps(record | {"record_sha256": hash_json(record)})
        path.write_text(text, encoding="utf-8")


# --------------------------------------------------------------------------------------- statistics
def test_mean_and_interval_over_seeds_by_hand():
    assert over_seeds([42.0]) == (42.0, None)
    mean, half = over_seeds([1.0, 2.0, 3.0])  # s = 1, t(.975, 2) = 4.302653
    assert mean == 2.0
    assert half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)


def test_the_interval_over_images_is_wilsons():
    assert over_images(80.0, 10) == pytest.approx((49.0162, 94.3318), abs=1e-3)
    assert over_images(0.0, 96) == pytest.approx(
        (0.0, 100 * 1.959964**2 / (96 + 1.959964**2)), rel=1e-6
    )
    assert all(pd.isna(end) for end in over_images(float("nan"), 8))


def test_the_interval_of_a_difference_is_newcombes():
    """The example of his paper: 56 of 70 and 48 of 80."""
    assert of_sum(
        [(1, 80.0, over_images(80.0, 70)), (-1, 60.0, over_images(60.0, 80))]
    ) == pytest.approx((5.24, 33.39), abs=0.01)
    assert of_sum([(1, 100.0, over_images(100.0, 48))]) == pytest.approx(
        (over_images(100.0, 48)[0], 100)
    )


def measured(*rows: tuple) -> pd.DataFrame:
    """Rows of: row, ours, half over seeds, half over images, paper, comparable."""
    table = pd.DataFrame(rows, columns=["row", "ours", "half", "images", "paper", "comparable"])
    table = table.assign(method="m", column="style", metric="RA_I")
    half = table[["half", "images"]].max(axis="columns")
    return table.assign(low=table["ours"] - half, high=table["ours"] + half)


def test_orderings():
    found = tables.orderings(
        measured(
            ("a", 50.0, None, 3.0, 40.0, True),
            ("b", 30.0, None, 4.0, 20.0, True),  # a > b in both: 20 > 5
            (
                "c",
                55.0,
                None,
                4.0,
                19.0,
                False,
            ),  # b = c within the tolerance; a > c reversed: -5 within 5 is undecided
            (
                "d",
                90.0,
                0.0,
                9.0,
                10.0,
                True,
            ),  # seeds that agree by chance: the interval of the images wins; a > d reversed
            ("e", 10.0, None, 3.0, None, True),  # not published
        ),
        tolerance=2.0,
    )
    verdicts = {
        (entry.higher, entry.lower): (entry.verdict, entry.comparable)
        for entry in found.itertuples()
    }
    assert verdicts == {
        ("a", "b"): ("holds", True),
        ("a", "c"): ("undecided", False),
        ("a", "d"): ("reversed", True),
        ("b", "d"): ("reversed", True),
        ("c", "d"): ("reversed", False),
    }
    first = found.iloc[0]
    assert (first["paper"], first["ours"], first["low"], first["high"]) == (20.0, 20.0, 15.0, 25.0)
    assert found.set_index(["higher", "lower"]).loc[("a", "d"), "high"] == pytest.approx(
        -40 + 90**0.5
    )


def test_the_wider_interval_decides():
    found = tables.orderings(
        measured(("a", 60.0, 8.0, 3.0, 40.0, True), ("b", 50.0, 8.0, 4.0, 20.0, True)),
        tolerance=2.0,
    )
    assert (found.loc[0, "verdict"], found.loc[0, "low"]) == (
        "undecided",
        pytest.approx(10 - 128**0.5),
    )


def test_an_interval_stays_within_0_and_100_and_is_no_narrower_than_that_of_the_images():
    images = over_images(37.5, 192)
    assert widest(37.5, 158.8, images) == (0.0, 100.0)
    assert widest(37.5, 0.0, images) == images
    assert widest(0.0, 0.0, over_images(0.0, 4)) == (0.0, pytest.approx(48.99, abs=0.01))
    assert widest(37.5, None, images) == images
    assert all(math.isnan(end) for end in widest(float("nan"), 1.0, (0.0, 1.0)))


def test_near_0_percent_an_interval_reaches_up_only():
    """0 of 240 images and 5 of 240, by Newcombe: the half widths alone would say undecided."""
    rows = measured(("a", 0.0, None, 0.0, 40.0, True), ("b", 500 / 240, None, 0.0, 20.0, True))
    ends = [over_images(0.0, 240), over_images(500 / 240, 240)]
    rows = rows.assign(low=[low for low, _ in ends], high=[high for _, high in ends])
    assert tables.orderings(rows, tolerance=2.0).loc[0, "verdict"] == "reversed"


def test_what_is_not_measured_takes_no_part():
    rows = measured(
        ("a", float("nan"), None, float("nan"), 40.0, True), ("b", 30.0, None, 4.0, 20.0, True)
    )
    assert tables.orderings(rows, tolerance=2.0).empty


def test_forgetting_itself_is_comparable_below_95():
    low = measured(("a", 90.0, None, 1.0, 99.0, False), ("b", 20.0, None, 1.0, 90.0, False))
    assert not tables.orderings(low, tolerance=2.0).loc[0, "comparable"]
    assert tables.orderings(low.assign(metric="UA"), tolerance=2.0).loc[0, "comparable"]


# -------------------------------------------------------------------------------------------- files
def test_every_shipped_table_reads_and_all_its_cells_compose(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = sorted(path.stem for path in shipped_dir("tables").glob("*.yaml"))
    assert "table2" in names
    paths = ["model.path=x", "evaluator.paths.style=x", "evaluator.paths.object=x"]
    for name in names:
        _, whole = read_table(name)
        for number, (label, experiment) in enumerate(whole.experiments.items()):
            # every row on the first model; the others differ from it in what stands in columns
            rows = whole.rows if number == 0 else dict(list(whole.rows.items())[:2])
            table = dataclasses.replace(whole, rows=rows)
            cells = list(
                tables.make_cells(
                    table,
                    experiment,
                    [],
                    paths if "canvas" in label and "shape" not in label else [],
                    [],
                )
            )
            assert len(cells) == len(experiment.methods) * len(experiment.columns) * len(table.rows)
            directories = [plan.directory for cell in cells for plan in cell.plans]
            assert len(set(directories)) == len(directories)
    GlobalHydra.instance().clear()


def test_the_targets_of_table2_are_the_published_ones():
    _, table = read_table("table2")
    for column, rows in table.targets.values["ConAbl"].items():
        assert list(rows) == list(table.rows), column
        for published in rows.values():
            assert published["source"] in table.targets.sources
            assert (set(published) == {"source"}) == (published["source"] == "none")
    curves = pd.read_csv(shipped_dir("tables") / "paper_curves.csv", comment="#")
    last = curves[curves["request"] == 12].set_index(["column", "row", "metric"])["percent"]
    carried = {
        (column, row, metric): published[metric]
        for column, rows in table.targets.values["ConAbl"].items()
        for row, published in rows.items()
        for metric in set(published) - {"source"}
    }
    assert carried == dict(last)
    assert len(carried) == 39


# ------------------------------------------------------------------------------------------ command
def test_a_finished_run_fills_its_cell_and_a_missing_one_gives_its_command(
    cu_table, own_table, run_copy, tmp_path
):
    status, out, err = cu_table(own_table())
    assert (status, err) == (0, "")
    last = pd.read_csv(run_copy / "metrics.csv").iloc[-1]
    cells = [f"{last[name]:.1f}" for name in ("UA", "RA_I", "RA_C")]
    dagger = "" if last["UA"] >= 95 else " \N{DAGGER}"
    line = next(line for line in out.splitlines() if line.startswith("| sequential |"))
    assert line == (
        f"| sequential | {cells[0]}{dagger} | 100 | {cells[1]}{dagger} | 15 | "
        f"{cells[2]}{dagger} | 45.5 |"
    )
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


def test_a_number_comes_from_its_own_signature_only(cu_table, own_table, run_copy, tmp_path):
    status, out, _ = cu_table(own_table(), "train.lr=0.125", "eval.batch_size=7")
    assert status == 0
    assert "| sequential | - | 100 |" in out
    assert "- Every run with train.lr=0.125.\n" in out
    assert (
        "{\\footnotesize Every run with train.lr=0.125.\\par}"
        in (tmp_path / "outputs/tables/mine-smoke.tex").read_text()
    )
    assert "Every run with train.lr=0.125 eval" not in out  # which changes no result
    assert "Every run with" not in cu_table(own_table())[1]


def test_a_run_that_was_moved_to_the_place_of_another_is_refused(cu_table, own_table, run_copy):
    place = compose([*SMOKE, "method=conabl", "reg=l2"]).directory
    run_copy.rename(place)
    status, _, err = cu_table(own_table())
    assert status == 1
    assert err == (
        f"cu-table: {place}: holds a run of another configuration; move it back to where "
        "it was made\n"
    )


def test_a_damaged_file_of_a_run_is_refused(cu_table, own_table, run_copy):
    path = run_copy / "steps/02/predictions.csv"
    path.write_text(path.read_text().replace("image", "imaje"))
    status, _, err = cu_table(own_table())
    assert status == 1
    assert err.endswith(
        "steps/02/predictions.csv: is missing or damaged (its sha256 is not the one in "
        "step.json); restore it\n"
    )
    assert err.count("\n") == 1


def test_labels_of_the_user_break_no_format(cu_table, own_table, run_copy, tmp_path):
    methods = {
        "experiments": {
            "smoke": TABLE["experiments"]["smoke"] | {"methods": {"m_1 & #2": ["method=conabl"]}}
        }
    }
    assert cu_table(own_table(rows={"a|b~_^\\": ["reg=none"]}, targets=None, **methods))[0] == 0
    assert "| a\\|b~_^\\ |" in (tmp_path / "outputs/tables/mine-smoke.md").read_text()
    latex = (tmp_path / "outputs/tables/mine-smoke.tex").read_text()
    assert "a|b\\textasciitilde \\_\\textasciicircum \\textbackslash  & " in latex
    assert "\\multicolumn{3}{c}{m\\_1 \\& \\#2}" in latex


def test_several_seeds_are_all_needed_for_a_cell(cu_table, own_table, run_copy):
    status, out, _ = cu_table(own_table(), "--seeds", "0,1")
    assert status == 0
    assert "| sequential | - | 100 |" in out
    assert "reg=none seed=1" in out
    assert "reg=none seed=0" not in out  # it is complete


@pytest.fixture
def one_cell(monkeypatch):
    """Returns fill(*last), which makes one cell of runs with these metrics at the end."""

    def fill(*last: dict[str, float]) -> None:
        monkeypatch.setattr(fill_table, "make_cells", lambda *_: [cell_of(last)])
        counts = {"UA": 96, "RA_I": 96, "RA_C": 96, "recovered_noise": 4}
        monkeypatch.setattr(tables, "image_counts", lambda *_: counts)

    return fill


def cell_of(last: Iterable[dict[str, float]]) -> tables.Cell:
    """Return the cell of runs of seeds 0, 1, ..., each with these metrics at the end."""
    runs = [
        SimpleNamespace(
            directory=Path(str(i)),
            records=[{}],
            table=pd.DataFrame([row]),
            same_code_as=lambda _: True,
        )
        for i, row in enumerate(last)
    ]
    plans = [SimpleNamespace(directory=run.directory, tuned=False) for run in runs]
    commands = [[f"seed={seed}"] for seed in range(len(runs))]
    return tables.Cell("ConAbl", "style", "sequential", commands, plans, runs)


def test_seeds_become_mean_and_interval_in_every_format(cu_table, own_table, tmp_path, one_cell):
    one_cell(*({"UA": 96.0, "RA_I": value, "RA_C": float("nan")} for value in (1.0, 2.0, 3.0)))
    status, out, err = cu_table(own_table(), "--seeds", "0,1,2")
    assert (status, err) == (0, "")
    marked = (
        "96.0 (92.9 to 97.6) \N{DOUBLE DAGGER} | 100 | 2.0 (0.0 to 4.5) "
        "\N{DOUBLE DAGGER} | 15 | - | 45.5 |"
    )
    assert f"| sequential | {marked}" in out
    assert "3 seeds: mean and 95% interval" in out
    assert "were not searched" in out
    table = pd.read_csv(tmp_path / "outputs/tables/mine-smoke.csv").set_index("metric")
    assert table.loc["RA_I", ["ours", "half", "seeds"]].tolist() == [2.0, 2.484, 3]
    latex = (tmp_path / "outputs/tables/mine-smoke.tex").read_text()
    assert table.loc["UA", ["low", "high"]].tolist() == [92.859, 97.601]  # Wilson's, of 288 images
    assert "2.0 (0.0 to 4.5)$^\\ddagger$ & " in latex
    assert (
        "{\\footnotesize 3 seeds: mean and 95\\% interval, over them (Student's t) or over" in latex
    )


def test_a_probe_stands_beside_its_controls(cu_table, own_table, tmp_path, one_cell):
    controls = {"recovered_noise_retained": 80.0, "recovered_noise_untouched": 100.0}
    one_cell({"UA": 96.0, "RA_C": 97.0, "RA_C_retained": 98.0, "recovered_noise": 12.5} | controls)
    wanted = ["UA", "RA_C", "recovered_noise"]
    status, out, err = cu_table(own_table(metrics=wanted, targets=None))
    assert (status, err) == (0, "")
    mark = " \N{DOUBLE DAGGER}"
    assert f"| sequential | 96.0{mark} | 97.0{mark} | 12.5{mark} [100.0, 80.0] |" in out
    assert "- [untouched, retained]: what the same probe finds of the unlearned concepts" in out
    table = pd.read_csv(tmp_path / "outputs/tables/mine-smoke.csv").set_index("metric")
    assert table.loc["recovered_noise", ["retained", "untouched"]].tolist() == [80.0, 100.0]
    assert table.loc["RA_C", ["retained", "untouched"]].isna().all()
    latex = (tmp_path / "outputs/tables/mine-smoke.tex").read_text()
    assert "12.5$^\\ddagger$ [100.0, 80.0]" in latex
    # of retained concepts alone there is one control
    one_cell({"UA": 96.0, "RA_C": 97.0, "recovered_noise": 50.0, "recovered_noise_untouched": 60.0})
    out = cu_table(own_table(metrics=wanted, targets=None))[1]
    assert f"| 50.0{mark} [60.0, -] |" in out
    assert "- [untouched, retained]" in out
    one_cell({"UA": 96.0, "RA_C": 97.0})  # no probe
    assert "[untouched, retained]" not in cu_table(own_table(metrics=wanted, targets=None))[1]


def test_other_code_is_marked_in_every_format(cu_table, own_table, run_copy, tmp_path, in_process):
    """In a cell whose run differs from the first of the table, and in one made by several."""
    overrides = [*SMOKE, "reg=l2"]
    status, out, _ = in_process(*overrides)
    other = run_directory(out, tmp_path)
    assert status == 0
    assert "\N{SECTION SIGN}" not in cu_table(own_table())[1]
    csv = tmp_path / "outputs/tables/mine-smoke.csv"
    assert not pd.read_csv(csv)["other_code"].any()
    change_code(run_copy, range(3), "models/sampling.py")
    status, out, err = cu_table(own_table())
    assert (status, err) == (0, "")
    lines = {line.split(" | ")[0]: line for line in out.splitlines() if line.startswith("| ")}
    assert lines["| sequential"].count(" \N{SECTION SIGN} |") == 3
    assert "\N{SECTION SIGN}" not in lines["| L2"]
    assert "- \N{SECTION SIGN} Made by other code than the first run of this table" in out
    marked = pd.read_csv(csv).groupby("row")["other_code"].all()
    assert marked.to_dict() == {"L2": False, "sequential": True}
    latex = (tmp_path / "outputs/tables/mine-smoke.tex").read_text()
    assert latex.count("$^\\S$") == 4  # three numbers and the note
    assert "\N{SECTION SIGN}" not in latex

    change_code(other, [2], "methods/conabl.py")  # the other is the first of one code then
    cu_table(own_table())
    marked = pd.read_csv(csv).groupby("row")["other_code"].all()
    assert marked.to_dict() == {"L2": True, "sequential": False}


def test_the_longest_runs_are_made_first(cu_table, own_table, monkeypatch):
    made = []
    monkeypatch.setattr(
        fill_table,
        "cu_runs",
        lambda jobs, _, evaluated: (
            made.extend(jobs) or ["cu-run: training led to nothing"] * len(jobs)
        ),
    )
    rows = {"sequential": ["train.steps=4"], "L2": ["train.steps=9"]}
    assert cu_table(own_table(rows=rows), "--run")[0] == 0
    assert [job[-1] for job in made] == ["train.steps=9", "train.steps=4"]


def test_a_sweep_that_was_not_submitted_is_one_line(cu_table, own_table, monkeypatch, tmp_path):
    monkeypatch.setattr(fill_table, "submit", lambda *_: "the launcher says: no")
    assert cu_table(own_table(), "--run", "--launcher", "slurm") == (
        1,
        "",
        "cu-table: the launcher says: no\n",
    )
    assert not (tmp_path / "outputs/tables").exists()


def test_ua_rests_on_images_with_a_face():
    rows = pd.DataFrame({"style": ["a", "a", "b", "c"], "face": [1, 0, 1, 1]})
    run = SimpleNamespace(
        records=[SimpleNamespace(files={}, evaluated=True)] * 2,
        predictions=lambda _: rows,
        require=lambda *_: None,
        unlearned=lambda _: ["a"],
        measured=[Measured("style", "object", ["a", "c"], ["b"])],
        targets=["a", "c"],
    )
    assert image_counts(run, 1) == {"UA": 1, "RA_I": 1, "RA_C": 4, "RA_C_retained": 1}
    assert image_counts(run, 0)["UA"] == 2  # before a request, of all targets


def test_run_makes_what_is_missing(cu_table, own_table, run_copy, jobs_in_forks):
    path = own_table()
    status, out, err = cu_table(path, "--run", "--jobs", "1", "eval.every=last")
    assert (status, err) == (0, "")
    assert "  1/1  " in out
    assert "Not run yet" not in out
    assert cu_table(path)[1].partition("# mine")[2] == out.partition("# mine")[2]
    made = compose([*SMOKE, "method=conabl", "reg=l2"]).directory
    evaluated = [record.evaluated for record in read_run(made).records]
    assert evaluated == [True, *[False] * (len(evaluated) - 2), True]


@pytest.mark.parametrize(
    "launcher", ["basic", pytest.param("local_processes", marks=pytest.mark.slow)]
)
def test_through_a_launcher_of_hydra(
    cu_table, own_table, run_copy, tmp_path, jobs_in_forks, monkeypatch, launcher
):
    """Which makes the jobs one after another, or starts a process of its own for each."""
    run = make_runs.subprocess.run
    named = {"hydra/launcher=local_processes": f"hydra/launcher={launcher}"}
    monkeypatch.setattr(
        make_runs.subprocess,
        "run",
        lambda command, **more: run([named.get(word, word) for word in command], **more),
    )
    rows = {
        "sequential": ["reg=none"],
        "L2": ["reg=l2"],
        "too far": ["reg=none", "train.lr=1e30"],
    }
    status, out, err = cu_table(own_table(rows=rows), "--run", "--launcher", "local_processes")
    assert (status, err) == (0, "")
    lines = {
        line.split("reg=")[1].split()[0]: line for line in out.splitlines() if line[3:5] == "/2"
    }
    assert lines["l2"].endswith("done")
    assert "failed  training led to" in lines["none"]
    assert "Not run yet: 1" in out
    (folder,) = (tmp_path / "outputs/sweeps").glob("mine_*")
    assert len([*folder.glob("*/job.json")]) == 2


@pytest.mark.slow
def test_a_hundred_cells(own_table, run_copy, tmp_path):
    """Within a minute, and in less than 1 GB."""
    path = own_table(
        rows={f"row {number}": ["reg=none", f"seed={number}"] for number in range(100)},
        targets=None,
    )
    code = (
        f"import sys, time\n{USED}\nstarted = time.monotonic()\nfrom cu_runner.cli "
        "import table\ntable.main()\n"
    )
    code += "print(time.monotonic() - started, used(), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    seconds, peak = map(float, done.stderr.split())
    assert "Not run yet: 99" in done.stdout
    assert seconds < 60
    assert peak < 1000, peak


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nix"], "nix: no such table; allowed: closed_forms, flow, recommended, recovery, table2"),
        (
            ["table2", "--experiment", "nix"],
            "--experiment nix: not in table table2; allowed: shapecanvas, ",
        ),
        (["table2", "methd=esd"], "unknown key methd"),
        (["table2", "--experiment", "unlearncanvas"], "not set, and without a default: model.path"),
        (["gone.yaml"], "gone.yaml: no such table"),
        (["table2", "--launcher", "nix"], "invalid choice: 'nix' (choose from "),
        (
            ["table2", "--seeds", "0,0"],
            "'0,0' names a seed twice, which is one run; give each once",
        ),
        (
            ["table2", "reg=l2"],
            (
                "reg=l2: rows, columns and model are the table's own; leave it out, or write a "
                "table of yours"
            ),
        ),
        (
            ["table2", "--run", "dry_run=true"],
            "dry_run: a table has none; without --run it runs nothing and lists what is missing",
        ),
        (["table2", "model=sd15"], "model=sd15: rows, columns and model are the table's own"),
        (["table2", "+setting.last_only=true"], "rows, columns and model are the table's own"),
        (
            ["table2", "--seeds", "0", "seed=1"],
            "--seeds and seed=: both set the seed; give one of them",
        ),
    ],
)
def test_bad_input_is_one_line(cu_table, arguments, message):
    status, _, err = cu_table(*arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


def test_all_that_is_wrong_with_a_file_is_said_at_once(cu_table, own_table):
    wrong = own_table(
        metrics=["UA", "FID", "KID"],
        rows={"a": {"object": ["reg=none"]}, "b\nc": ["hydra.job.name=x", "reg=[", ""]},
        title="\x1b[31mred",
        experiments={"bad name": {"model": "x", "methods": {}, "columns": {}}},
    )
    status, out, err = cu_table(wrong)
    assert (status, out, err.count("\n")) == (2, "", 1)
    for said in (
        "metrics: 'FID' is not a share",
        "metrics: 'KID' is not a share",
        "experiments: bad name: methods or columns are empty",
        "experiments: 'bad name' becomes part of a file's name",
        "row 'a' gives overrides for object",
        r"title: '\x1b[31mred' would not be one line of print",
        "mine.yaml: hydra.job.name=x can run code",
        "mine.yaml: 'reg=[' is no override",
        "mine.yaml: '' is no override",
    ):
        assert said in err
    rows = {"a": ["reg=l22"], "b": ["train.stepss=1"], "c": ["train.stepss=2"], "d": ["reg=l2"]}
    status, out, err = cu_table(own_table(rows=rows, targets=None))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "reg=l22: no such file in conf/reg" in err
    assert err.count("unknown key train.stepss") == 1
    wrong = own_table(metrics=7, rows=[], title=None)
    status, out, err = cu_table(wrong)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert all(f"mine.yaml.{key}" in err for key in ("metrics", "rows", "title"))


def test_the_documented_table_is_one(cu_table, tmp_path):
    text = (Path(__file__).parents[2] / "docs/tables.md").read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(
        textwrap.dedent(text[text.index("    title: mine") :].partition("\n\nA row")[0])
    )
    status, out, err = cu_table("mine.yaml")
    assert (status, err) == (0, "")
    assert "Not run yet: 2" in out
    assert "cu-run sequence=smoke method=conabl reg=l2 reg.l2.weight=3000" in out


def test_a_table_file_is_checked(cu_table, own_table, tmp_path):
    assert "experiments" in cu_table(own_table(experiments={"smoke": {"model": "x"}}))[2]
    assert "unknown key mine.yaml.metrcs" in cu_table(own_table(metrcs=[]))[2]
    wrong = own_table(rows={"a": {"object": ["reg=none"]}})
    assert "row 'a' gives overrides for object; give them for style" in cu_table(wrong)[2]
    assert (
        "metrics: 'drift_l2' is not a share of images; allowed: UA, RA_I, RA_C, RA_C_retained"
        in cu_table(own_table(metrics=["drift_l2"]))[2]
    )
    assert (
        "mine.yaml: experiments: empty; a table needs one at least"
        in cu_table(own_table(experiments={}))[2]
    )
    smoke = TABLE["experiments"]["smoke"]
    assert (
        "smoke: methods or columns are empty"
        in cu_table(own_table(experiments={"smoke": smoke | {"methods": {}}}))[2]
    )
    assert (
        "'a/b' becomes part of a file's name" in cu_table(own_table(experiments={"a/b": smoke}))[2]
    )
    (tmp_path / "mine.yaml").write_text("a: [")
    assert "cannot be read" in cu_table(str(tmp_path / "mine.yaml"))[2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"ConAbl": {"style": {"sequentail": {"UA": 1}}}},
            "'sequentail' is no part of this table; allowed: L2, sequential",
        ),
        ({"ConAbl": {"stile": {}}}, "'stile' is no part of this table; allowed: style"),
        ({"ESD": {}}, "'ESD' is no part of this table; allowed: ConAbl"),
        (
            {"ConAbl": {"style": {"L2": {"RAI": 1.0}}}},
            "'RAI' is no metric of this table; allowed: source, UA, RA_I, RA_C",
        ),
        (
            {"ConAbl": {"style": {"L2": {"UA": "100"}}}},
            "L2: UA is '100'; give a number of 0 to 100 (percent)",
        ),
        (
            {"ConAbl": {"style": {"L2": {"UA": 300}}}},
            "L2: UA is 300.0; give a number of 0 to 100 (percent)",
        ),
        (
            {"ConAbl": {"style": {"L2": {"UA": 1.0, "source": "nix"}}}},
            "source 'nix' is not described; allowed: plot, none",
        ),
    ],
)
def test_published_numbers_that_would_be_lost_are_refused(cu_table, own_table, values, message):
    status, _, err = cu_table(own_table(targets=TABLE["targets"] | {"values": values}))
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


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
    for changes in (
        {"rows": {"a": [override]}},
        {"rows": {"a": {"style": [override]}}},
        with_method([override]),
    ):
        status, _, err = cu_table(own_table(**changes), "--run")
        assert status == 2
        assert err.endswith(
            f"mine.yaml: {override} can run code; only the command line may set it\n"
        )
        assert err.count("\n") == 1


def with_method(overrides: list[str]) -> dict:
    return {
        "experiments": {
            "smoke": {"model": "x", "methods": {"m": overrides}, "columns": {"style": list(SMOKE)}}
        }
    }


def test_a_damaged_run_is_refused(cu_table, own_table, run_copy):
    record = run_copy / "steps/01/step.json"
    record.write_text(record.read_text().replace('"UA"', '"UB"'))
    status, _, err = cu_table(own_table())
    assert status == 1
    assert f"{record.relative_to(run_copy.parents[3])}: does not match its own sha256" in err
