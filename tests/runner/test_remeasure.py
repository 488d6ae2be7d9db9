"""cu-eval: stored weights measured again give the run's own numbers, another seed gives others, and
training cannot be changed.
"""

import shutil

import pandas as pd
import pytest
from conftest import SMOKE, run_directory

from cu_runner.cli import evaluate
from cu_runner.config.compose import compose
from cu_runner.runner import measure
from cu_runner.runner.remeasure import load, measure_change
from cu_runner.store.cache import Cache
from cu_runner.store.run_record import read_run


@pytest.fixture
def cu_eval(call_command):
    """Returns run(*arguments) -> (exit status, stdout, stderr) of cu-eval in tmp_path."""
    return lambda *arguments: call_command(evaluate.main, "cu-eval", *arguments)


def test_the_same_measurement_gives_the_same_numbers(cu_eval, run_copy, tmp_path):
    status, out, err = cu_eval(str(run_copy))
    assert (status, err) == (0, "")
    directory = tmp_path / out.splitlines()[-1].removeprefix("evaluation: ")
    assert directory == run_copy / "evaluations" / run_copy.name
    for index in (0, 1, 2):
        for name in ("predictions.csv", "metrics.json", "grid.png"):
            assert (directory / f"steps/0{index}" / name).read_bytes() == (
                run_copy / f"steps/0{index}" / name
            ).read_bytes()
    again, run = read_run(directory), read_run(run_copy)
    pd.testing.assert_frame_equal(
        again.table.drop(columns="eval_seconds"), run.table.drop(columns="eval_seconds")
    )
    assert again.label == run.label
    assert again.weights(2) == run_copy / "steps/02/delta.safetensors"
    for row in run.table.itertuples():
        assert f"RA-I {row.RA_I:5.1f} ({row.RA_I:.1f})" in out


def test_another_seed_is_another_evaluation_and_resumes(cu_eval, run_copy, tmp_path):
    status, out, err = cu_eval(str(run_copy), "sequence.seeds=[1,2]")
    assert (status, err) == (0, "")
    directory = tmp_path / out.splitlines()[-1].removeprefix("evaluation: ")
    assert directory.parent == run_copy / "evaluations"
    assert directory.name != run_copy.name
    own = pd.read_csv(run_copy / "steps/02/predictions.csv")
    rows = pd.read_csv(directory / "steps/02/predictions.csv")
    assert sorted(rows["seed"].unique()) == [1, 2]
    assert len(rows) == 2 * len(own)
    last = read_run(directory).table.iloc[-1]
    targets = rows[rows["style"].isin(["torch light", "snow drift"])]
    assert last["UA"] == pytest.approx(
        100 * (targets["style"] != targets["predicted_style"]).mean(), abs=1e-3
    )

    first = {path: path.read_bytes() for path in (directory / "steps").rglob("*.csv")}
    shutil.rmtree(directory / "steps/02")
    stamp = (directory / "steps/01/step.json").stat().st_mtime_ns
    assert cu_eval(str(run_copy), "sequence.seeds=[1,2]")[0] == 0
    assert (directory / "steps/01/step.json").stat().st_mtime_ns == stamp
    assert {path: path.read_bytes() for path in first} == first


def test_retention_can_be_measured_afterwards(cu_eval, run_copy, tmp_path):
    status, out, err = cu_eval(str(run_copy), "retention=shapecanvas", "retention.num_prompts=4")
    assert (status, err) == (0, "")
    directory = tmp_path / out.splitlines()[-1].removeprefix("evaluation: ")
    assert directory.name != run_copy.name
    again, run = read_run(directory).table, read_run(run_copy).table
    assert list(again["UA"][1:]) == list(run["UA"][1:])
    assert again[["fid", "kid"]].iloc[0].isna().all()
    assert (again["fid"][1:] > 0).all()
    assert again["clip_score"].between(-100, 100).all()


def test_what_was_not_measured_again_has_no_numbers(cu_eval, cu_run, run_copy, tmp_path):
    """A run with retention, evaluated without it."""
    made = cu_run(*SMOKE, "retention=shapecanvas", "retention.num_prompts=4")
    directory = run_directory(made.stdout, tmp_path)
    assert "fid" in read_run(directory).table
    status, out, err = cu_eval(directory, "retention=none")
    assert (status, err) == (0, "")
    table = read_run(tmp_path / out.splitlines()[-1].removeprefix("evaluation: ")).table
    assert list(table.columns) == list(read_run(run_copy).table.columns)


def test_an_evaluation_is_not_evaluated(cu_eval, run_copy):
    assert cu_eval(run_copy)[0] == 0
    evaluation = run_copy / "evaluations" / run_copy.name
    status, out, err = cu_eval(evaluation, "eval.steps=3")
    assert (status, out) == (2, "")
    assert (
        err
        == f"cu-eval: {evaluation}: is an evaluation, without weights; give its run, {run_copy}\n"
    )
    assert not (evaluation / "evaluations").exists()


def test_an_evaluation_moves_with_its_run(cu_eval, run_copy, tmp_path, monkeypatch):
    monkeypatch.chdir(run_copy)  # cu_eval goes to tmp_path before, not at the call
    status, out, err = cu_eval(".")
    assert (status, err) == (0, "")
    evaluation = run_copy / "evaluations" / run_copy.name
    assert out.splitlines()[-1] == f"evaluation: {evaluation}"
    moved = run_copy.rename(tmp_path / run_copy.name)
    again = read_run(moved / "evaluations" / run_copy.name)
    assert again.weights(2) == moved / "steps/02/delta.safetensors"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.lr=1",
            (
                "train.lr: shaped the training and cannot change here; allowed: evaluator, "
                "retention, recovery, eval, "
            ),
        ),
        ("method=esd", "method: shaped the training"),
        ("eval.stps=3", "unknown key eval.stps; the run's config.yaml holds every key"),
        ("eval.steps=0", "eval.steps"),
        (
            "evaluator=nix",
            (
                "evaluator=nix: no such file; allowed: celebrity, classifier, copy_detection, "
                "imagenet, open_clip, shapecanvas, "
            ),
        ),
        ("evaluator=unlearncanvas", "not set, and without a default: evaluator.paths.style"),
        ("sequence.retain=[nobody]", "the evaluator has no style 'nobody'"),
        ("eval.steps", "eval.steps"),
        (
            "eval.steps=1,2",
            "eval.steps=1,2: give one value, KEY=VALUE; a list is written 'KEY=[1,2]'",
        ),
        ("evaluator=shapecanvas,open_clip", "evaluator=shapecanvas,open_clip: give one value"),
        ("~eval.steps", "~eval.steps: give one value"),
        ("device=cuda", "device=cuda"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(cu_eval, run_copy, override, message):
    status, _, err = cu_eval(str(run_copy), override)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (run_copy / "evaluations").exists()


def test_damage_is_refused(cu_eval, run_copy):
    path = run_copy / "steps/02/delta.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    status, out, err = cu_eval(str(run_copy))
    assert status == 1
    assert "steps/02/delta.safetensors: is missing or damaged" in err
    assert len(out.splitlines()) == 2  # the steps before it were measured and are kept
    status, _, err = cu_eval(str(run_copy / "steps"))
    assert (status, err.count("\n")) == (1, 1)
    assert "holds no readable config.yaml" in err


def test_a_change_is_measured_as_the_request_that_made_it(run_copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, plan = read_run(run_copy), compose([*SMOKE])
    loaded, cache = load(run, plan), Cache(tmp_path / "outputs/cache", plan.code)
    weights = loaded[1]
    change = weights.read(run.weights(2))
    found = measure_change(run, 2, change, loaded, cache)
    assert found == run.records[2].row.metrics
    none = measure_change(run, 2, {name: 0 * part for name, part in change.items()}, loaded, cache)
    assert (none["RA_I"], none["RA_C_retained"]) == (
        run.records[0].row.metrics["RA_I"],
        run.records[0].row.metrics["RA_C_retained"],
    )

    monkeypatch.setattr(measure, "evaluate", None)  # the cache has what was seen of either change
    assert measure_change(run, 2, change, loaded, cache) == found
    assert (
        measure_change(run, 2, {name: 0 * part for name, part in change.items()}, loaded, cache)
        == none
    )
    with pytest.raises(TypeError):
        measure_change(run, 2, {name: part / 2 for name, part in change.items()}, loaded, cache)
