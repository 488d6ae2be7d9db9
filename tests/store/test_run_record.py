"""Run directories read back: names, metrics from step.json, the accuracy matrix, what is refused;
sweeps that name their runs.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import SMOKE

from cu_runner.schema.errors import StoreError
from cu_runner.schema.settings import EvalSettings
from cu_runner.store.files import hash_json
from cu_runner.store.layout import JOB
from cu_runner.store.records import chain, left_out, name_requests
from cu_runner.store.run_record import find_runs, read_run


def test_what_a_run_directory_says(run_copy):
    run = read_run(run_copy)
    assert (run.method, run.regularizers, run.plan, run.seed, run.sequence) == (
        "conabl",
        "none",
        "sequential",
        0,
        "smoke",
    )
    assert (run.label, run.num_requests, run.complete) == ("conabl", 2, True)
    saved = pd.read_csv(run_copy / "metrics.csv")
    for name in ("UA", "RA_I", "RA_C", "RA_C_retained", "drift_l2", "train_steps"):
        assert run.table[name].tolist()[1:] == pytest.approx(saved[name].tolist()[1:], rel=1e-12), (
            name
        )
    assert run.table["UA"][0] == pytest.approx(saved["UA"][0])
    assert pd.isna(run.table["UA_current"][0])
    assert [run.unlearned(index) for index in (0, 1, 2)] == [
        [],
        ["torch light"],
        ["torch light", "snow drift"],
    ]
    assert run.weights(2) == run_copy / "steps/02/delta.safetensors"


def test_names_of_requests():
    assert name_requests([2, 4, 5, 6, 9]) == "requests 2, 4 to 6, 9"
    assert name_requests([3]) == "request 3"


@pytest.mark.parametrize(
    ("every", "words"), [(1, "requests 1, 3 to 5 were"), (3, "request 3 was"), (6, "")]
)
def test_requests_that_lack_an_evaluation_that_is_asked_for(every, words):
    steps = [SimpleNamespace(index=index, evaluated=index in (0, 2, 6)) for index in range(7)]
    asked = EvalSettings(1, 1.0, batch_size=1, every=every)
    assert left_out(steps, asked, 6) == words


def test_numbers_do_not_come_from_metrics_csv(run_copy):
    before = read_run(run_copy).table
    (run_copy / "metrics.csv").write_text("request,UA\n0,\n1,100\n2,100\n")
    pd.testing.assert_frame_equal(read_run(run_copy).table, before)


def test_accuracy_matrix(run_copy):
    matrix = read_run(run_copy).accuracy_matrix()
    assert list(matrix.columns) == [0, 1, 2]
    assert list(matrix.index[:2]) == ["torch light", "snow drift"]
    assert pd.isna(matrix.loc["snow drift", 1])  # not requested yet
    assert not matrix.drop("snow drift").isna().any().any()
    rows = pd.read_csv(run_copy / "steps/02/predictions.csv")
    own = rows[rows["style"] == "torch light"]
    assert matrix.loc["torch light", 2] == 100 * (
        own["predicted_style"] == "torch light"
    ).sum() / len(own)


def test_find_runs(run_copy, tmp_path):
    assert find_runs([run_copy]) == [run_copy]
    assert find_runs([tmp_path / "outputs", run_copy]) == [run_copy]
    evaluation = Path(shutil.copytree(run_copy, run_copy / "evaluations" / run_copy.name))
    assert find_runs([tmp_path / "outputs"]) == [run_copy]
    assert find_runs([run_copy / "evaluations"]) == [evaluation]
    elsewhere = tmp_path / "evaluations/o"
    shutil.copytree(run_copy, elsewhere / run_copy.name)
    assert find_runs([elsewhere]) == [elsewhere / run_copy.name]
    (tmp_path / "outputs/sweeps/now/0").mkdir(parents=True)
    (tmp_path / "outputs/sweeps/now/0" / JOB).write_text(json.dumps({"run": str(run_copy)}))
    assert find_runs([tmp_path / "outputs/sweeps/now"]) == [run_copy]
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="empty: holds no run"):
        find_runs([tmp_path / "empty"])
    with pytest.raises(StoreError, match="gone: no such directory"):
        find_runs([tmp_path / "gone"])


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.yaml", lambda text: "a: [", "holds no readable config.yaml"),
        ("config.yaml", lambda text: "a: 1", "holds no readable config.yaml"),
        (
            "steps/01/step.json",
            lambda text: text.replace('"UA"', '"UB"'),
            "01/step.json: does not match its own sha256",
        ),
        ("steps/02/step.json", lambda text: text[:100], "02/step.json: cannot be read"),
    ],
)
def test_damage_is_refused(run_copy, file, change, message):
    path = run_copy / file
    path.write_text(change(path.read_text()))
    with pytest.raises(StoreError, match=message):
        read_run(run_copy)


def test_a_step_of_another_run_breaks_the_chain(run_copy):
    (run_copy / "steps/02/step.json").write_bytes((run_copy / "steps/01/step.json").read_bytes())
    with pytest.raises(StoreError, match=r"02/step\.json: does not continue the step before it"):
        read_run(run_copy)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_step_that_is_missing_between_others_is_no_unfinished_run(run_copy, lost):
    (run_copy / f"steps/{lost:02d}/step.json").unlink()
    with pytest.raises(
        StoreError,
        match=rf"steps/{lost:02d}: step {lost} is missing but step {lost + 1} is there",
    ):
        read_run(run_copy)


def test_a_step_with_another_parent_breaks_the_chain(run_copy):
    """A step that is whole in itself, but was made after another step 1."""
    path = run_copy / "steps/02/step.json"
    record = json.loads(path.read_text()) | {"parent_sha256": "0" * 64}
    record["sha256"] = chain(record["parent_sha256"], record["files"])
    record["record_sha256"] = hash_json(
        {key: value for key, value in record.items() if key != "record_sha256"}
    )
    path.write_text(json.dumps(record))
    with pytest.raises(StoreError, match=r"02/step\.json: does not continue the step before it"):
        read_run(run_copy)


def test_a_sweep_leaves_the_run_of_every_job(in_process, run_copy, tmp_path):
    status, _, err = in_process("-m", *SMOKE, "seed=0,0")
    assert (status, err) == (0, "")
    jobs = sorted((tmp_path / "outputs/sweeps").glob(f"*/*/{JOB}"))
    assert [path.parent.name for path in jobs] == ["0", "1"]
    job = json.loads(jobs[0].read_text())
    assert job["run"] == str(run_copy)
    assert job["command"] == ["cu-run", *SMOKE, "seed=0"]
    assert job["signature"].startswith(run_copy.name[-8:])
    assert find_runs([jobs[0].parents[1]]) == [run_copy]
