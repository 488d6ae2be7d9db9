"""What lies among the steps and is none, and steps beyond 99."""

import shutil

import pytest
from conftest import SMOKE
from test_store import finished, make_store, refused, result

from cu_runner.cli import doctor
from cu_runner.store.layout import finished_steps
from cu_runner.store.run_record import read_run

FILES = ("delta.safetensors", "predictions.csv", "metrics.json", "grid.png")


def test_steps_are_in_the_order_of_their_numbers(tmp_path):
    with make_store(tmp_path / "run") as store:
        parent = None
        for index in range(102):
            parent = store.save_step(result(index, dict.fromkeys(FILES, b"x")), parent)
    assert [step.index for step in finished(tmp_path / "run")] == list(range(102))


@pytest.mark.parametrize("name", ["01.bak", "0\N{SUPERSCRIPT TWO}", "001", "1", "-1", "01 (copy)"])
def test_other_names_are_no_steps_and_stay(in_process, call_command, run_copy, name):
    shutil.copytree(run_copy / "steps/01", run_copy / "steps" / name)
    before = sorted(path.name for path in (run_copy / "steps" / name).iterdir())
    assert finished_steps(run_copy) == [0, 1, 2]
    status, out, _ = in_process(*SMOKE)
    assert status == 0
    assert out.count(f"steps/{name}: is no step and is left alone") == 1
    assert sorted(path.name for path in (run_copy / "steps" / name).iterdir()) == before
    status, out, err = call_command(doctor.main, "cu-doctor", run_copy)
    assert (status, err) == (0, "")
    assert f"not checked steps/{name}: is no step" in out


@pytest.mark.parametrize("unfinished", [True, False])
def test_a_link_in_the_place_of_a_step_is_refused_at_once(
    in_process, run_copy, tmp_path, unfinished
):
    """Nothing of what lies behind it is deleted."""
    elsewhere = tmp_path / "elsewhere"
    (run_copy / "steps/02").rename(elsewhere)
    if unfinished:
        (elsewhere / "step.json").unlink()
    (elsewhere / "thesis.txt").write_text("years of work")
    names = sorted(path.name for path in elsewhere.iterdir())
    (run_copy / "steps/02").symlink_to(elsewhere)
    status, _, err = in_process(*SMOKE)
    assert (status, err.count("\n")) == (1, 1), err
    assert "steps/02: is a symbolic link; " in err
    assert sorted(path.name for path in elsewhere.iterdir()) == names
    assert len(read_run(run_copy).records) == (2 if unfinished else 3)


def test_files_of_people_in_an_unfinished_step_are_not_deleted(tmp_path):
    run = tmp_path / "run"
    with make_store(run) as store:
        first = store.save_step(result(0, dict.fromkeys(FILES, b"x")), None)
    left = run / "steps/01"
    left.mkdir()
    (left / "grid.png").write_bytes(b"half")
    (left / ".delta.safetensors.tmp").write_bytes(b"half")
    (left / "notes").mkdir()
    refused(run, r"steps/01: is of a step that was not finished and holds 'notes', which is no")
    assert (left / "notes").is_dir()
    (left / "notes").rmdir()
    with make_store(run) as store:
        assert store.save_step(result(1, dict.fromkeys(FILES, b"y")), first).index == 1
    assert [step.index for step in finished(run)] == [0, 1]
    shutil.rmtree(run / "steps/01")
    (run / "steps/01").write_text("a file")
    refused(run, "steps/01: is no folder, as a step is; move it away")
