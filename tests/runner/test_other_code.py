"""Edited code: nothing old is served; a run of other code is refused, unless it is allowed."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from commands import environment, run_forked
from conftest import SMOKE, run_directory

from cu_runner.cli import evaluate
from cu_runner.runner.runner import Runner
from cu_runner.runtime import code_identity
from cu_runner.runtime.paths import PACKAGE, config_dir
from cu_runner.store.files import hash_json
from cu_runner.store.run_record import read_run

INDEPENDENT = (*SMOKE, "setting=independent")

METHOD = '''
import torch
from cu_runner.methods.base import Method


class Halve(Method):
    """Pulls every weight to zero."""

    def batch(self, scope, step):
        return None

    def loss(self, scope, batch):
        from my_strength import strength

        total = sum(weight.pow(2).sum() for weight in scope.params.values())
        return strength() * total, {"size": total.item()}
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package whose files count as the code of this process, to be edited."""
    ignored = shutil.ignore_patterns("weights", "__pycache__")
    copy = Path(shutil.copytree(PACKAGE, tmp_path / "copy/cu_runner", ignore=ignored))
    monkeypatch.setattr(code_identity, "PACKAGE", copy)
    code_identity.identify.cache_clear()
    yield copy
    code_identity.identify.cache_clear()


def edit(path: Path, text: str = "# edited\n") -> None:
    """Append to a file, as if it had been edited before this process began."""
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
    code_identity.identify.cache_clear()


def entries(outputs: Path, kind: str) -> int:
    """How many entries of a kind the cache holds."""
    return len(list((outputs / "cache" / kind).iterdir()))


def record_of(directory: Path, step: int) -> dict:
    return json.loads((directory / f"steps/{step:02d}/step.json").read_text(encoding="utf-8"))


def test_edited_code_is_trained_again_beside_the_old_run(in_process, package, tmp_path):
    status, out, err = in_process(*INDEPENDENT)
    assert (status, err) == (0, "")
    first, outputs = run_directory(out, tmp_path), tmp_path / "outputs"
    before = {path: path.read_bytes() for path in first.glob("steps/*/*")}
    assert (entries(outputs, "deltas"), entries(outputs, "base_eval")) == (2, 1)
    edited = ("methods/base.py", "methods/_forgetting.py")  # a base class, a module of helpers
    for number, name in enumerate(edited, start=2):
        edit(package / name)
        status, out, err = in_process(*INDEPENDENT)
        last = first.name if number == 2 else f"{first.name}-{number - 1}"
        assert (status, err) == (
            1,
            f"cu-run: outputs/runs/smoke/{last}: was made by other code (changed: {name}); "
            "fresh=true makes a new run beside it, allow_other_code=true goes on with this one; "
            f"outputs/runs/smoke/{last}/run.log holds the traceback\n",
        )
        assert in_process(*INDEPENDENT, "dry_run=true")[0] == 1
        status, out, err = in_process(*INDEPENDENT, "fresh=true")
        assert (status, err) == (0, "")
        made = run_directory(out, tmp_path)
        assert made.name == f"{first.name}-{number}"
        assert ["cached" in record_of(made, step)["training"] for step in (1, 2)] == [False, False]
        assert "allowed_other_code" not in record_of(made, 2)
        assert entries(outputs, "deltas") == 2 * number
        assert entries(outputs, "base_eval") == 1  # images of the untouched model do not need it
        assert read_run(made).method == "conabl"
    assert {path: path.read_bytes() for path in before} == before

    assert run_directory(in_process(*INDEPENDENT)[1], tmp_path) == made
    status, out, _ = in_process(*INDEPENDENT, "fresh=true")  # as a job that is queued again would
    assert (status, run_directory(out, tmp_path)) == (0, made)
    assert "complete already" in out
    for name in edited:
        shutil.copy(PACKAGE / name, package / name)
    code_identity.identify.cache_clear()
    status, out, _ = in_process(*INDEPENDENT)
    assert (status, run_directory(out, tmp_path)) == (0, first)
    assert "complete already" in out
    runs = [read_run(path) for path in (first, made)]
    assert runs[0].same_code_as(runs[0])
    assert not runs[0].same_code_as(runs[1])


def test_other_code_that_is_allowed_goes_on_and_is_recorded(
    in_process, package, call_command, tmp_path
):
    _, out, _ = in_process(*SMOKE)
    run = run_directory(out, tmp_path)
    assert set(record_of(run, 0)["code"]) >= {"sha256", "files", "libraries", "dirty"}
    edit(package / "runner/training.py")
    for name in ("steps/02/step.json", "summary.json"):
        (run / name).unlink()
    status, _, err = in_process(*SMOKE)
    assert (status, err.count("\n")) == (1, 1)
    assert "(changed: runner/training.py)" in err
    status, out, err = in_process(*SMOKE, "allow_other_code=true")
    assert (status, err, run_directory(out, tmp_path)) == (0, "", run)
    allowed = [record_of(run, step).get("allowed_other_code") for step in range(3)]
    assert allowed == [None, None, True]
    found = read_run(run)
    assert len({code.sha256 for code in found.codes}) == 2
    assert not found.same_code_as(found)
    assert in_process(*SMOKE)[0] == 1
    assert "complete already" in in_process(*SMOKE, "allow_other_code=true")[1]
    status, _, err = in_process(*SMOKE, "allow_other_code=true", "fresh=true")
    assert (status, err.startswith("cu-run: fresh and allow_other_code: ")) == (2, True)

    status, out, err = call_command(evaluate.main, "cu-eval", run)
    assert (status, err) == (0, "")
    edit(package / "evaluators/labels.py")
    status, _, err = call_command(evaluate.main, "cu-eval", run)
    assert (status, err.count("\n")) == (1, 1)
    assert "(changed: evaluators/labels.py); fresh=true makes a new run beside it" in err
    status, out, err = call_command(evaluate.main, "cu-eval", run, "fresh=true")
    assert (status, err) == (0, "")
    assert out.splitlines()[-1].endswith(f"evaluations/{run.name}-2")


def interrupted(patch, step: int) -> None:
    """Runs are asked to stop after that training step, counted over all requests."""
    calls = iter(range(1, step))
    patch.setattr(
        Runner,
        "_note_first_step",
        lambda runner: next(calls, None) is None and os.kill(os.getpid(), signal.SIGUSR1),
    )


def test_the_state_of_an_unfinished_request_is_of_one_code(
    in_process, package, finished_run, tmp_path, monkeypatch
):
    shutil.copytree(finished_run[0] / "outputs/cache", tmp_path / "outputs/cache")
    method, allowed = package / "methods/conabl.py", "allow_other_code=true"
    before, edited = method.read_bytes(), method.read_bytes() + b"# edited\n"

    def run(text: bytes, *more: str, stop: int | None = None) -> tuple[int, str, str]:
        method.write_bytes(text)
        code_identity.identify.cache_clear()
        with monkeypatch.context() as patch:
            if stop is not None:
                interrupted(patch, stop)
            return in_process(*SMOKE, *more)

    stopped = 128 + signal.SIGUSR1
    assert run(before, stop=4)[0] == stopped  # after step 1 of request 2
    status, _, err = run(edited)
    assert (status, err.count("was made by other code (changed: methods/conabl.py)")) == (1, 1)
    assert run(edited, allowed, stop=1)[0] == stopped  # after step 2, by the edited code
    place = tmp_path / finished_run[1].relative_to(finished_run[0])
    kept = (place / "checkpoint.pt").read_bytes()

    status, _, err = run(before)  # all finished steps are its own
    assert (status, err.count("\n")) == (1, 1)
    assert err == (
        f"cu-run: {place.relative_to(tmp_path)}/checkpoint.pt: the state of request 2 after step 2 "
        "was made by other code (changed: methods/conabl.py); fresh=true begins the request anew, "
        "allow_other_code=true goes on with it; "
        f"{place.relative_to(tmp_path)}/run.log holds the traceback\n"
    )
    assert (place / "checkpoint.pt").read_bytes() == kept
    status, out, _ = run(before, allowed)
    assert (status, "request 2 goes on after step 2" in out) == (0, True)
    assert record_of(place, 2)["allowed_other_code"] is True

    shutil.rmtree(place / "steps/02")
    (place / "summary.json").unlink()
    (place / "checkpoint.pt").write_bytes(kept)
    status, out, _ = run(before, "fresh=true")
    assert (status, "request 2 begins anew: its state was made by other code" in out) == (0, True)
    assert "allowed_other_code" not in record_of(place, 2)
    name = "steps/02/delta.safetensors"
    assert (place / name).read_bytes() == (finished_run[1] / name).read_bytes()


def test_a_run_of_a_version_that_recorded_no_code_is_refused(in_process, run_copy):
    for step in range(3):
        path = run_copy / f"steps/{step:02d}/step.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in record.items() if key not in ("code", "record_sha256")}
        kept["versions"] |= {"cu_runner": "0.1.0"}
        path.write_text(json.dumps(kept | {"record_sha256": hash_json(kept)}), encoding="utf-8")
    status, _, err = in_process(*SMOKE)
    assert (status, err.count("\n")) == (1, 1)
    assert (
        f"{run_copy.name}: was made by cu_runner 0.1.0, whose runs this one (0.2.0) does not read"
        in err
    )
    status, out, _ = in_process(*SMOKE, "fresh=true")
    assert (status, run_directory(out, run_copy.parents[3]).name) == (0, f"{run_copy.name}-2")


def test_a_users_helper_that_is_edited(in_process, package, tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    (folder / "tree/method").mkdir(parents=True)
    (folder / "my_halving.py").write_text(METHOD, encoding="utf-8")
    (folder / "my_strength.py").write_text("def strength():\n    return 2.0\n", encoding="utf-8")
    (folder / "tree/method/halve.yaml").write_text(
        "# Weights shrink.\n_target_: my_halving.Halve\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    kept = [override for override in INDEPENDENT if not override.startswith("method.")]
    mine = (
        "--config-dir",
        str(folder / "tree"),
        *kept,
        "method=halve",
        "allow_modules=[my_halving]",
    )
    status, out, err = in_process(*mine)
    assert (status, err) == (0, "")
    run = run_directory(out, tmp_path)
    assert {"my_halving", "my_strength"} <= set(record_of(run, 1)["code"]["files"])
    edit(folder / "my_strength.py")
    status, _, err = in_process(*mine)
    assert (status, "(changed: my_strength)" in err) == (1, True)
    status, out, err = in_process(*mine, "fresh=true")
    assert (status, err) == (0, "")
    made = run_directory(out, tmp_path)
    assert made.name == f"{run.name}-2"
    assert "cached" not in record_of(made, 1)["training"]
    assert entries(tmp_path / "outputs", "deltas") == 4


def forget_package() -> None:
    """The fork imports the package anew."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "cu_runner"]:
        del sys.modules[name]


def test_a_loss_with_its_sign_flipped_gives_other_weights(tmp_path):
    """In processes of their own, that import the edited code."""
    copy = tmp_path / "copy"
    shutil.copytree(PACKAGE, copy / "cu_runner", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(config_dir(), copy / "conf", dirs_exist_ok=True)
    place, method = tmp_path / "place", copy / "cu_runner/methods/conabl.py"
    place.mkdir()

    def run(*overrides: str) -> Path:
        """A run by the copy."""
        path = os.pathsep.join([str(copy), os.environ.get("PYTHONPATH", "")])
        done = run_forked(
            "cu-run",
            *(*INDEPENDENT, *overrides),
            cwd=place,
            env=environment(PYTHONPATH=path),
            before=forget_package,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return run_directory(done.stdout, place)

    first, text = run(), method.read_text(encoding="utf-8")
    assert text.count("return loss, logs") == 1
    method.write_text(text.replace("return loss, logs", "return -loss, logs"), encoding="utf-8")
    second = run("fresh=true")
    assert second.name == f"{first.name}-2"
    weights = [(made / "steps/01/delta.safetensors").read_bytes() for made in (first, second)]
    assert weights[0] != weights[1]
    assert run() == second
