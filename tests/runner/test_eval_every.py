"""eval.every: requests that are left out have weights and no numbers, and those that are evaluated
have the numbers that they have without it; every command reads such a run.
"""

import dataclasses
import json
import math
import re
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import SMOKE, run_directory
from small_runs import overrides

from cu_runner.api.settings import refuse_idle
from cu_runner.cli import doctor, evaluate, export, report
from cu_runner.reporting import diagnosis
from cu_runner.runner.measure import Instruments
from cu_runner.runner.probing import Prober
from cu_runner.schema.errors import ConfigError, LaunchError, StoreError
from cu_runner.schema.settings import EvalSettings
from cu_runner.store.proof import require_true
from cu_runner.store.records import what_is_strange
from cu_runner.store.run_record import read_run
from cu_runner.sweeps import make_runs


@pytest.mark.fast
@pytest.mark.parametrize(
    ("every", "due"),
    [
        (1, [0, 1, 2, 3, 4, 5]),
        (2, [0, 2, 4, 5]),
        (4, [0, 4, 5]),
        (9, [0, 5]),
        ("last", [0, 5]),
        ([1], [0, 1, 5]),
        ([4, 1], [0, 1, 4, 5]),
        ([5], [0, 5]),
    ],
)
def test_the_untouched_model_and_the_last_request_are_always_evaluated(every, due):
    settings = EvalSettings(steps=1, guidance=1, batch_size=1, every=every)
    assert [request for request in range(6) if settings.is_due(request, 5)] == due


@pytest.fixture
def left_out(filled_cache, in_process, tmp_path):
    """The smoke run, evaluated after its last request alone."""
    status, out, err = in_process(*SMOKE, "eval.every=last")
    assert (status, err) == (0, "")
    assert "1/2  torch light        UA     -  RA-I     -  RA-C     -  drift" in out
    return run_directory(out, tmp_path)


def files_of(step):
    return {path.name: path.read_bytes() for path in step.iterdir() if path.name != "step.json"}


def test_what_is_evaluated_is_the_same_to_the_last_bit(left_out, finished_run, call_command):
    other = finished_run[1]
    assert left_out.name == other.name  # no part of the signature
    assert files_of(left_out / "steps/02") == files_of(other / "steps/02")
    first = files_of(left_out / "steps/01")
    assert first.keys() == {"delta.safetensors", "training.csv"}
    assert first.items() <= files_of(other / "steps/01").items()
    table = pd.read_csv(left_out / "metrics.csv")
    whole = pd.read_csv(other / "metrics.csv")
    assert list(table.columns) == list(whole.columns)
    assert table.loc[1, ["UA", "RA_I", "RA_C", "UA_current"]].isna().all()
    assert table.loc[1, "drift_l2"] == whole.loc[1, "drift_l2"]
    assert table.loc[[0, 2], "RA_I"].tolist() == whole.loc[[0, 2], "RA_I"].tolist()
    require_true(read_run(left_out))

    status, out, _ = call_command(doctor.main, "cu-doctor", left_out)
    assert status == 0
    assert "all well" in out


def test_a_complete_run_says_what_it_lacks_and_cu_eval_measures_it(
    left_out, finished_run, in_process, call_command, tmp_path
):
    status, out, _ = in_process(*SMOKE, "eval.every=last")
    assert (status, "complete already; nothing to do\n" in out) == (0, True)
    assert "not evaluated" not in out
    status, out, _ = in_process(*SMOKE)
    assert status == 0
    assert "request 1 was not evaluated (an earlier eval.every): `cu-eval outputs/" in out

    status, _, err = call_command(evaluate.main, "cu-eval", left_out, "eval.every=[3]")
    assert status != 0
    assert "there is no request 3; allowed: 1 to 2" in err
    status, out, err = call_command(evaluate.main, "cu-eval", left_out, "eval.every=last")
    assert (status, err) == (0, "")
    last = tmp_path / out.splitlines()[-1].removeprefix("evaluation: ")
    assert [record.evaluated for record in read_run(last).records] == [True, False, True]
    status, out, _ = call_command(evaluate.main, "cu-eval", left_out)
    assert "request 1 was not measured here; with fresh=true all are, anew" in out
    status, out, _ = call_command(doctor.main, "cu-doctor", last)
    assert (status, "all well" in out) == (0, True)
    shutil.rmtree(last)

    status, out, err = call_command(evaluate.main, "cu-eval", left_out)
    assert (status, err) == (0, "")
    directory = tmp_path / out.splitlines()[-1].removeprefix("evaluation: ")
    for index in (0, 1, 2):
        measured = (directory / f"steps/0{index}/predictions.csv").read_bytes()
        assert measured == (finished_run[1] / f"steps/0{index}/predictions.csv").read_bytes()


def test_reports_and_exports_say_what_was_not_measured(left_out, call_command, tmp_path, outlined):
    status, out, err = call_command(report.main, "cu-report", left_out)
    assert (status, err) == (0, "")
    assert (tmp_path / out.split()[-1]).is_file()
    matrix = read_run(left_out).accuracy_matrix()
    assert matrix[1].isna().all()
    assert matrix[2].notna().all()
    place = tmp_path / "exported"
    told = (left_out, "--step", 1, "--to", "delta", place)
    assert call_command(export.main, "cu-export", *told)[0] == 0
    card = (place / "README.md").read_text(encoding="utf-8")
    assert "**Nothing was measured after this request**" in card
    assert "percent |" not in card


@pytest.mark.parametrize("reg", ["gate", "merge"])
def test_gates_and_merging_do_not_need_the_evaluations_before(
    reg, filled_cache, in_process, tmp_path
):
    """Gates take the images of the request before where there are any; a picture of another batch
    may differ in its last bit.
    """
    chosen, found = overrides("conabl", reg), []
    for every, outputs in ((1, "all"), (2, "some")):
        more = (f"eval.every={every}", f"paths.outputs={outputs}")
        status, out, err = in_process(*chosen, *more)
        assert (status, err) == (0, "")
        found.append(run_directory(out, tmp_path))
    every, some = (files_of(directory / "steps/02") for directory in found)
    assert every.keys() == some.keys()
    assert [name for name in every if every[name] != some[name]] in ([], ["grid.png"])


@pytest.mark.fast
def test_a_step_without_predictions_holds_no_metrics(run_copy):
    record = read_run(run_copy).records[1]
    kept = {name: digest for name, digest in record.files.items() if name == "delta.safetensors"}
    some = dataclasses.replace(record, files=kept | {"grid.png": record.files["grid.png"]})
    assert "lack predictions.csv, metrics.json" in what_is_strange(some)
    none = dataclasses.replace(record, files=kept)
    assert what_is_strange(none) == "its row holds metrics, and its files no predictions"
    row = dataclasses.replace(record.row, metrics=dict.fromkeys(("UA", "RA_I", "RA_C")))
    assert "lacks RA_C_retained" in what_is_strange(dataclasses.replace(none, row=row))
    base = read_run(run_copy).records[0]
    assert "lack predictions.csv" in what_is_strange(dataclasses.replace(base, files={}))


AS_ALLOWED = ": allowed: so many requests, as 5; some of them, as [1,6]; or last"


@pytest.mark.fast
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval.every=0"], "eval.every=0"),
        (["eval.every=first"], "eval.every='first'"),
        *(
            ([f"eval.every={each}"], AS_ALLOWED)
            for each in ("true", "[]", "[0]", "[1,last]", "1.5")
        ),
        (["eval.every=[3,1]"], "eval.every=[3, 1]: there is no request 3; allowed: 1 to 2"),
        (
            ["eval.every=[2]", "recovery=completion"],
            "recovery.completion: eval.every=[2] leaves out request 1",
        ),
        (
            ["eval.every=last", "recovery=completion"],
            "recovery.completion: eval.every=last leaves out request 1, and the probe is due then; "
            "give eval.every=1, or recovery.completion.every=last",
        ),
        (
            ["eval.every=last", "recovery=rebound", "recovery.rebound.every=last"],
            "recovery.rebound: eval.every=last leaves out request 1, and the probe reads what was "
            "seen after every request; give eval.every=1, or leave the probe out",
        ),
    ],
)
def test_bad_input(in_process, tmp_path, words, said):
    status, _, err = in_process(*SMOKE, *words)
    assert (status, err.count("\n")) == (2, 1), err
    assert said in err
    assert not (tmp_path / "outputs").exists()


def test_probes_do_not_go_on_with_what_was_left_out(left_out, in_process, tmp_path):
    """Probes are part of the signature: with them it is another run, which evaluates what they
    read.
    """
    (left_out / "summary.json").unlink()
    for path in (left_out / "steps/02").iterdir():
        path.unlink()
    (left_out / "steps/02").rmdir()
    assert [record.evaluated for record in read_run(left_out).records] == [True, False]
    words = ("recovery=rebound", "recovery.rebound.every=last")
    status, out, err = in_process(*SMOKE, *words)
    assert status == 0, err
    other = run_directory(out, tmp_path)
    assert other != left_out
    assert all(record.evaluated for record in read_run(other).records)


def test_a_probe_names_the_evaluation_that_it_lacks(left_out):
    class Reads:
        def measure(self, index, last, unlearned, predictions, ua):
            return predictions(1)

    store = SimpleNamespace(step_dir=read_run(left_out).step_dir)
    with pytest.raises(StoreError, match="steps/01: was not evaluated, and a probe reads it"):
        Prober(Reads(), store, 2).add(2, [], {}, {"UA": 1.0}, {})


def test_dry_run_counts_what_is_made(in_process):
    for every, evaluations in ((1, 3), ("last", 2), ("[1]", 3), ("[2]", 2)):
        status, out, _ = in_process(*SMOKE, f"eval.every={every}", "dry_run=true")
        assert status == 0
        assert f"to do: {evaluations} of 3 evaluations" in out
    assert " 0 images  from the previous weights" in out
    # with gates all images are drawn where the request before has none
    shown = {}
    for every in (1, "last"):
        _, out, _ = in_process(*SMOKE, "reg=gate", f"eval.every={every}", "dry_run=true")
        line = next(line for line in out.splitlines() if line.startswith("   2  "))
        shown[every] = int(re.search(r"(\d+) images", line)[1])
    assert shown[1] < shown["last"]


@pytest.mark.fast
def test_no_diagnosis_rests_on_requests_that_were_left_out(monkeypatch):
    """The concepts of the evaluated requests alone were forgotten at first: nothing came back."""
    own = {"UA_current": [math.nan, 100.0, 100.0, 100.0], "UA_previous": [math.nan, *[50.0] * 3]}
    columns = {"request": [0, 2, 4, 6], "UA": [0.0, 60.0, 60.0, 60.0], **own}
    columns |= {"RA_I": [99.0] * 4, "RA_C": [99.0] * 4}
    table = pd.DataFrame(columns).assign(**{f"{name}_images": 200 for name in diagnosis.COUNTED})
    assert [each.name for each in diagnosis.diagnose(table)] == ["weak forgetting"]
    table["request"] = [0, 1, 2, 3]
    assert [each.name for each in diagnosis.diagnose(table)] == ["rebound"]
    table["request"] = [0, 2, 4, 6]
    monkeypatch.setattr(diagnosis, "with_images", lambda run: table)
    assert "a (requests 2, 4, 6)" in diagnosis.by_signature({"a": None})[0]
    monkeypatch.setattr(diagnosis, "with_images", lambda run: table.iloc[:2])
    for evaluated in (True, False):
        last = SimpleNamespace(records=[SimpleNamespace(evaluated=evaluated)])
        assert bool(diagnosis.news(last)) == evaluated


def test_probes_of_an_evaluation_take_the_images_that_the_run_has(
    left_out, call_command, monkeypatch
):
    """Whatever its eval.every; of what it left out they are drawn."""
    drawn = []
    sample = Instruments.sample

    def noted(self, concepts, index, before=None):
        drawn.append(index)
        return sample(self, concepts, index, before)

    monkeypatch.setattr(Instruments, "sample", noted)
    told = (left_out, "recovery=residual", "recovery.residual.every=last")
    assert call_command(evaluate.main, "cu-eval", *told)[0] == 0
    assert drawn == [1]


@pytest.mark.fast
def test_what_needs_every_request_refuses_such_a_run(left_out, monkeypatch):
    said = f"run: {left_out}\n"
    done = SimpleNamespace(returncode=0, stdout=said, stderr="")
    monkeypatch.setattr(make_runs, "subprocess", SimpleNamespace(run=lambda *_, **__: done))
    with pytest.raises(LaunchError, match=r"not evaluated .*: request 1; .* paths\.outputs"):
        make_runs.cu_run([])
    for lacking in ((1,), (-2, -1)):
        with pytest.raises(LaunchError, match=r"not evaluated .*: request 1; needed here"):
            make_runs.cu_run([], evaluated=lacking)
    assert make_runs.unevaluated(make_runs.cu_run([], evaluated=(-5, 0, 2, 9)), None) == [1]
    with pytest.raises(LaunchError, match=r"eval\.every: .* needs every request"):
        list(make_runs.cu_runs([["eval.every=2"]]))
    (found,) = make_runs.cu_runs([["eval.every=2"]], evaluated=make_runs.LAST)
    assert [record.evaluated for record in found.records] == [True, False, True]


@pytest.mark.fast
def test_python_refuses_what_would_change_nothing():
    for settings in ({"eval.every": 2}, {"eval": {"every": 2}}):
        with pytest.raises(ConfigError, match=r"eval\.every changes nothing here"):
            refuse_idle(settings, ["eval"], {})


def test_trackers_are_told_of_requests_without_a_picture(filled_cache, in_process, tmp_path):
    status, out, err = in_process(*SMOKE, "eval.every=last", "tracker=[csv,tensorboard]")
    assert (status, err) == (0, "")
    tables = [*(tmp_path / "outputs").glob("csv/**/*.csv")]
    assert tables
    assert json.loads((run_directory(out, tmp_path) / "summary.json").read_text())["requests"] == 2
