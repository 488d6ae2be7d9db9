"""The command and its run directory: the contract, resume, damage, locks, a full disk, ctrl-C, NaN,
the terminal.
"""

import errno
import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml
from commands import run_forked
from conftest import SMOKE, run_directory
from PIL import Image

from cu_runner.cli.failures import explain_error
from cu_runner.evaluators.grid import GRID_LEFT, GRID_TOP, read_grid
from cu_runner.evaluators.metrics import read_predictions
from cu_runner.runner.measure import unrecognised
from cu_runner.runtime.paths import config_dir

COLUMNS = [
    "request",
    "concept",
    "UA",
    "RA_I",
    "RA_C",
    "RA_C_retained",
    "UA_current",
    "UA_previous",
    "drift_l2",
    "drift_l1",
    "drift_fraction",
    "step_l2",
    "train_steps",
    "train_seconds",
    "eval_seconds",
    "peak_memory_mb",
]
STEP = {"predictions.csv", "metrics.json", "grid.png", "step.json"}


# ------------------------------------------------------------------------------------- the contract
@pytest.mark.fast
def test_a_run_writes_the_files_of_the_contract(finished_run):
    cwd, directory, done = finished_run
    assert directory.parent == cwd / "outputs/runs/smoke"
    found = {
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()
    }
    expected = {f"steps/00/{name}" for name in STEP} | {
        f"steps/0{i}/{name}"
        for i in (1, 2)
        for name in (*STEP, "delta.safetensors", "training.csv")
    }
    assert found - {".lock"} == expected | {"config.yaml", "run.log", "metrics.csv", "summary.json"}
    assert {path.name for path in (cwd / "outputs").iterdir()} == {"runs", "cache"}
    assert {path.name for path in cwd.iterdir()} == {"outputs"}
    assert done.stdout.splitlines()[-1] == f"run: {directory.relative_to(cwd)}"


def test_a_run_is_quiet_when_it_is_not_in_a_terminal(finished_run):
    done = finished_run[2]
    assert done.stderr == ""
    assert "\r" not in done.stdout
    assert "%|" not in done.stdout


def test_one_line_per_request_and_a_table(finished_run):
    lines = finished_run[2].stdout.splitlines()
    progress = [line for line in lines if line.startswith(("0/2", "1/2", "2/2"))]
    assert [line.split()[1] for line in progress] == ["untouched", "torch", "snow"]
    for line in progress:
        assert all(word in line for word in ("UA", "RA-I", "RA-C", "drift"))
    table = next(i for i, line in enumerate(lines) if line.split()[:2] == ["request", "concept"])
    assert [line.split()[0] for line in lines[table + 1 : table + 4]] == ["0", "1", "2"]


def test_metrics_csv(finished_run):
    table = pd.read_csv(finished_run[1] / "metrics.csv")
    assert list(table.columns) == COLUMNS
    assert table["request"].tolist() == [0, 1, 2]
    assert table["concept"].fillna("").tolist() == ["", "torch light", "snow drift"]
    assert table["train_steps"].tolist() == [0, 3, 3]
    assert table["drift_l2"][0] == table["step_l2"][0] == 0.0
    assert 0 < table["drift_l2"][1] == pytest.approx(table["step_l2"][1])
    base = pd.read_csv(finished_run[1] / "steps/00/predictions.csv")
    targets = base[base["style"].isin(["torch light", "snow drift"])]
    base_rate = 100 * (targets["style"] != targets["predicted_style"]).mean()
    assert table["UA"][0] == base_rate  # of the targets, before anything is unlearned
    assert table["UA_current"].isna().tolist() == [True, False, False]
    assert table["UA_previous"].isna().tolist() == [True, True, False]
    assert (table["peak_memory_mb"] < 2000).all()


def test_a_base_that_is_hardly_recognised_is_said(in_process):
    """After one step of sampling there is nothing to see."""
    status, out, err = in_process(*SMOKE, "eval.steps=1", "eval.guidance=1")
    assert status == 0
    assert (
        "untouched model is hardly recognised (targets 0%, retained concepts 0%, the " in out + err
    )
    row = SimpleNamespace(metrics={"UA": 49.0, "RA_I": 50.0, "RA_C": None})
    assert unrecognised(row) == []
    row.metrics |= {"UA": 51.0, "RA_C": 7.0}
    assert unrecognised(row) == ["targets 49%", "the other domain 7%"]


def test_predictions_csv(finished_run):
    for index, concepts in enumerate(
        (4, 3, 4)
    ):  # the base is measured on all four styles, request 1 before snow drift
        table = pd.read_csv(finished_run[1] / f"steps/0{index}/predictions.csv")
        assert list(table.columns)[:5] == ["step", "prompt", "style", "object", "seed"]
        assert {"predicted_style", "predicted_object", "score_style", "score_object"} == set(
            table.columns[5:]
        )
        assert len(table) == concepts * 2
        assert set(table["step"]) == {index}
        assert table["score_style"].between(0, 1).all()
        assert table["prompt"][0] == "a tree image in torch light style"


def test_step_json(finished_run):
    directory = finished_run[1]
    record = json.loads((directory / "steps/02/step.json").read_text())
    assert record["index"] == 2
    assert record["targets"] == ["snow drift"]
    assert (
        record["parent_sha256"]
        == json.loads((directory / "steps/01/step.json").read_text())["sha256"]
    )
    assert record["signature"][:8] == directory.name[-8:]
    assert {"sha256", "seconds", "versions", "device", "git_commit"} <= set(record)
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["sha256"] == record["sha256"]
    assert summary["requests"] == 2


def test_config_yaml_is_the_resolved_configuration(finished_run):
    config = yaml.safe_load((finished_run[1] / "config.yaml").read_text())
    assert config["train"]["steps"] == 3
    assert config["eval"]["steps"] == 2  # follows model.sampler.steps
    assert config["sequence"]["targets"] == ["torch light", "snow drift"]
    assert "${" not in (finished_run[1] / "config.yaml").read_text()


def test_the_grid_has_a_row_per_concept_and_the_untouched_models_below_it(finished_run):
    grids = [Image.open(finished_run[1] / f"steps/0{index}/grid.png") for index in range(3)]
    heights, cell = [grid.height - GRID_TOP for grid in grids], 64 + 2
    assert len({grid.width for grid in grids}) == 1
    assert heights == [4 * cell, 2 * 3 * cell, 2 * 4 * cell]
    for index, rows in ((1, (0, 2, 3)), (2, (0, 1, 2, 3))):  # in the grid of the untouched model
        for line, row in enumerate(rows):
            whole, parts = (GRID_LEFT, grids[0].width), []
            for grid, place in ((grids[0], row), (grids[index], 2 * line + 1)):
                top = GRID_TOP + place * cell
                parts.append(grid.convert("RGB").crop((whole[0], top, whole[1], top + 64)))
            assert parts[0].tobytes() == parts[1].tobytes()
    # what is read back is the request's own
    predictions = read_predictions(finished_run[1] / "steps/01/predictions.csv")
    names = [list(dict.fromkeys(predictions[domain])) for domain in ("style", "object")]
    png = (finished_run[1] / "steps/01/grid.png").read_bytes()
    for y, concept in enumerate(names[0]):
        top = GRID_TOP + 2 * y * cell
        own = grids[1].convert("RGB").crop((GRID_LEFT, top, GRID_LEFT + 64, top + 64))
        assert read_grid(png, *names)[concept, names[1][0]].tobytes() == own.tobytes()


# ------------------------------------------------------------------------------------------- resume
def contents(directory) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != "run.log"
    }


def test_running_again_does_nothing_and_prints_the_same(in_process, run_copy, finished_run):
    before = contents(run_copy)
    status, out, err = in_process(*SMOKE)
    assert (status, err) == (0, "")
    assert contents(run_copy) == before
    assert "complete already; nothing to do" in out
    first = finished_run[2].stdout.splitlines()
    assert out.splitlines()[-5:] == first[-5:]


def test_a_run_without_its_last_step_makes_it_again_bitwise(in_process, run_copy, finished_run):
    shutil.rmtree(run_copy / "steps/02")
    (run_copy / "summary.json").unlink()
    status, out, err = in_process(*SMOKE)
    assert (status, err) == (0, "")
    assert "1/2" not in out
    for name in ("delta.safetensors", "predictions.csv", "grid.png"):
        assert (run_copy / "steps/02" / name).read_bytes() == (
            finished_run[1] / "steps/02" / name
        ).read_bytes()


def test_a_deleted_metrics_csv_is_made_again(in_process, run_copy):
    before = (run_copy / "metrics.csv").read_text()
    (run_copy / "metrics.csv").unlink()
    status, _, err = in_process(*SMOKE)
    assert (status, err) == (0, "")
    assert (run_copy / "metrics.csv").read_text() == before


def test_a_damaged_summary_is_made_again(in_process, run_copy):
    before = (run_copy / "summary.json").read_text()
    (run_copy / "summary.json").write_text(before[:20])
    status, _, err = in_process(*SMOKE)
    assert (status, err) == (0, "")
    assert json.loads((run_copy / "summary.json").read_text()) == json.loads(before)


def test_another_batch_size_or_device_setting_is_the_same_run(in_process, run_copy):
    status, out, _ = in_process(*SMOKE, "eval.batch_size=3", "device=cpu")
    assert status == 0
    assert run_directory(out, run_copy.parents[3]) == run_copy
    assert "complete already" in out


# ------------------------------------------------------------------------------------------- damage
def test_a_flipped_bit_in_a_delta_is_refused(in_process, run_copy):
    path = run_copy / "steps/01/delta.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    before = contents(run_copy)
    status, _, err = in_process(*SMOKE)
    assert status == 1
    assert err.count("\n") == 1
    assert err.startswith("cu-run: ")
    assert "steps/01/delta.safetensors: is damaged" in err
    assert "delete" in err
    assert contents(run_copy) == before


def test_a_changed_config_yaml_is_refused(in_process, run_copy):
    path = run_copy / "config.yaml"
    path.write_text(path.read_text().replace("steps: 3", "steps: 4"))
    status, _, err = in_process(*SMOKE)
    assert status == 1
    assert err.count("\n") == 1
    assert "config.yaml: was changed after the run began" in err


def test_a_step_of_another_run_is_refused(in_process, run_copy):
    status, out, _ = in_process(*SMOKE, "seed=1")
    assert status == 0
    other = run_directory(out, run_copy.parents[3])
    shutil.rmtree(run_copy / "steps/02")
    shutil.copytree(other / "steps/02", run_copy / "steps/02")
    status, _, err = in_process(*SMOKE)
    assert status == 1
    assert "steps/02/step.json: does not continue the step before it" in err


# -------------------------------------------------------------------------------- locks and signals
def wait_for(path, process, pattern: str) -> None:
    """Until a file of the run directory appears."""
    deadline = time.monotonic() + 120
    while not list(path.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_second_process_is_refused_and_ctrl_c_keeps_what_is_finished(start, in_process, tmp_path):
    long = (*SMOKE[:1], "train.steps=2000", *SMOKE[2:])
    process = start(*long)
    wait_for(tmp_path, process, "outputs/runs/smoke/*/steps/00/step.json")
    status, _, err = in_process(*long)
    assert status == 1
    assert err.count("\n") == 1
    assert "another process is writing this run" in err
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (
        err == "cu-run: interrupted; what was done is kept. Run the same command again to go on\n"
    )
    assert "0/2" in out
    (directory,) = (tmp_path / "outputs/runs/smoke").iterdir()
    assert {path.name for path in (directory / "steps").iterdir()} == {"00"}


def test_ctrl_c_and_resume_is_bitwise_an_undisturbed_run(start, in_process, tmp_path, finished_run):
    process = start(*SMOKE)
    wait_for(tmp_path, process, "outputs/runs/smoke/*/steps/01")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.count("\n") == 1
    status, out, err = in_process(*SMOKE)
    assert (status, err) == (0, "")
    directory = run_directory(out, tmp_path)
    for name in (
        "steps/01/delta.safetensors",
        "steps/02/delta.safetensors",
        "steps/02/predictions.csv",
    ):
        assert (directory / name).read_bytes() == (finished_run[1] / name).read_bytes()


# ---------------------------------------------------------------------------------------- full disk
@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB where root may mount one, else a limit of 20 kB a file: (directory,
    what sets it, release).
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        yield (
            disk,
            functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, 20_000)),
            lambda: None,
        )
        return
    yield (
        disk,
        None,
        lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True),
    )
    subprocess.run(["umount", "-l", str(disk)], check=False)


@pytest.mark.skipif(os.name != "posix", reason="mounts and limits are those of POSIX systems")
def test_a_full_disk_gives_one_line_and_the_run_resumes(
    in_process, small_disk, finished_run, tmp_path
):
    disk, limit, release = small_disk
    done = run_forked("cu-run", *SMOKE, f"paths.outputs={disk}", cwd=tmp_path, before=limit)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("cu-run: ")
    assert "No space left on device" in done.stderr or "File too large" in done.stderr
    assert "run the same command to resume" in done.stderr
    assert not list(disk.rglob(".*.tmp"))
    release()
    status, out, err = in_process(*SMOKE, f"paths.outputs={disk}")
    assert (status, err) == (0, "")
    last = run_directory(out, disk) / "steps/02/delta.safetensors"
    assert last.read_bytes() == (finished_run[1] / "steps/02/delta.safetensors").read_bytes()


# ---------------------------------------------------------------------------------------------- NaN
def test_a_loss_that_turns_nan_stops_and_keeps_the_finished_steps(in_process, tmp_path):
    status, out, err = in_process(*SMOKE, "train.lr=1e30")
    assert status == 1
    assert err.count("\n") == 1
    assert err.startswith("cu-run: training led to a loss of ")
    assert "at request 1 (torch light), step 2 of 3; lower train.lr" in err
    assert "0/2" in out
    (directory,) = (tmp_path / "outputs/runs/smoke").iterdir()
    assert [path.name for path in (directory / "steps").glob("*/step.json")] == ["step.json"]
    assert (directory / "steps/00/step.json").exists()
    assert not (directory / "summary.json").exists()


def test_gpu_memory_that_runs_out_in_training_is_one_line_with_advice(
    in_process, tmp_path, monkeypatch
):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr("cu_runner.methods.conabl.ConAbl.backward", exhausted)
        status, out, err = in_process(*SMOKE)
    assert (status, err.count("\n")) == (1, 1)
    assert err.startswith(
        "cu-run: out of GPU memory; train.gradient_checkpointing=true and eval.batch_size=24 for "
    )
    assert "0/2" in out
    status, out, _ = in_process(*SMOKE, "train.gradient_checkpointing=true", "eval.batch_size=3")
    assert status == 0
    assert "0/2" not in out  # that step was kept


def test_weights_that_the_last_step_ruins_are_not_kept(in_process, tmp_path):
    status, _, err = in_process(*SMOKE, "train.steps=1", "train.lr=1e30")
    assert status == 1
    assert err.count("\n") == 1
    assert "the images after request 1 are not finite" in err
    assert not list(tmp_path.glob("outputs/runs/smoke/*/steps/01/step.json"))


# ----------------------------------------------------------------------------------------- terminal
def test_help_lists_every_file_and_every_setting(cu_run):
    done = cu_run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    for group in ("model", "evaluator", "sequence", "method", "reg", "setting", "experiment"):
        for path in (config_dir() / group).glob("*.yaml"):
            section = lines[
                next(i for i, line in enumerate(lines) if line.startswith(f"  {group}: ")) + 1 :
            ]
            line = next(line for line in section if line.split()[:1] == [path.stem])
            assert line.startswith("    ")
            assert len(line.split()) > 3, line
    spine = yaml.safe_load((config_dir() / "config.yaml").read_text())
    names = [
        name
        for name, value in spine.items()
        if name not in ("defaults", "hydra") and not isinstance(value, dict)
    ]
    names += [
        f"{group}.{key}"
        for group, value in spine.items()
        if isinstance(value, dict) and group != "hydra"
        for key in value
    ]
    assert len(names) >= 15
    for name in names:
        assert sum(line.startswith(f"  {name}=") for line in lines) == 1, name


def test_version(cu_run):
    done = cu_run("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "cu-run 0.2.0\n"


def test_a_sweep_goes_on_after_a_job_that_fails(in_process, tmp_path):
    status, out, err = in_process("-m", *SMOKE, "train.lr=1e30,1e-3")
    assert status == 1
    assert err.count("\n") == 1
    assert err.startswith("cu-run: training led to a loss of ")
    assert (run_directory(out, tmp_path) / "summary.json").exists()


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [(["table2", "--output=/etc/x"], "--output"), (["seed=1"], "paths.outputs")],
)
def test_a_place_that_cannot_be_written_names_its_setting(arguments, setting):
    error = PermissionError(errno.EACCES, "Permission denied", "/etc/x")
    said = (
        f"/etc/x: Permission denied; mend that or choose another {setting}, then run the same "
        "command to resume"
    )
    assert explain_error(error, arguments) == (1, said)
