"""A method of the user's own that fails: where it did, and what holds the traceback."""

import sys
from types import SimpleNamespace

import pytest
from conftest import SMOKE

from cu_runner.runner.preflight import check_rehearsal
from cu_runner.runtime import code_identity

METHOD = """
from cu_runner.methods.base import Method


class Own(Method):
    def batch(self, scope, step):
        return None

    def loss(self, scope, batch):
        total = sum(weight.pow(2).sum() for weight in scope.params.values())
        {line}
"""
LINE = METHOD[: METHOD.index("{line}")].count("\n") + 1


@pytest.fixture
def run_own(in_process, filled_cache, tmp_path, monkeypatch):
    """Returns run(text, *more) -> (exit status, stdout, stderr) of a run of the class Own in that
    file.
    """
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tree/method").mkdir(parents=True)
    (tmp_path / "tree/method/own.yaml").write_text("# Mine.\n_target_: own_method.Own\n")

    def run(text: str, *more: str):
        sys.modules.pop("own_method", None)
        code_identity.identify.cache_clear()
        (tmp_path / "own_method.py").write_text(text)
        words = [word for word in SMOKE if not word.startswith("method.")]
        own = ["method=own", "allow_modules=[own_method]"]
        return in_process("--config-dir", str(tmp_path / "tree"), *words, *own, *more)

    yield run
    code_identity.identify.cache_clear()
    sys.modules.pop("own_method", None)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("raise ValueError('weights are odd')", "ValueError: weights are odd"),
        ("raise RuntimeError('a bug')", "RuntimeError: a bug"),
        ("open('/nowhere/file')", "FileNotFoundError: "),
        ("return total.reshape(7, 7), {}", "RuntimeError: "),
        ("raise KeyError('name')", "KeyError: 'name'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("assert False, 'never'", "AssertionError: never"),
        ("raise BrokenPipeError(32, 'gone')", "BrokenPipeError: "),
        ("import yaml; yaml.safe_load('a: b: c')", "ScannerError: mapping values"),
        ("from omegaconf import OmegaConf; OmegaConf.create({}, flags={'struct': True}).a", "Conf"),
        ("from cu_runner.schema.errors import StoreError; raise StoreError('mine')", "StoreError"),
        ("raise type('Odd', (Exception,), {})('one\\ntwo')", "Odd: one two"),
    ],
)
def test_what_its_code_raises_is_told_with_file_and_line(run_own, tmp_path, line, said):
    status, out, err = run_own(METHOD.format(line=line))
    assert (status, err.count("\n")) == (1, 1), err
    assert err.startswith(f"cu-run: {tmp_path}/own_method.py:{LINE}: {said}")
    assert "paths.outputs" not in err
    (log,) = (tmp_path / "outputs/runs/smoke").glob("*/run.log")
    assert f"{log.relative_to(tmp_path)} holds the traceback" in err
    assert "Traceback" in log.read_text()
    assert "Traceback" not in out


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("return total", "a Tensor"),
        ("pass", "a NoneType"),
        ("return total, 1", "a tuple"),
        ("return total.expand(4), {{}}", "a loss of 4 numbers"),
        ("return total.detach(), {{}}", "a loss without gradient"),
    ],
)
def test_what_is_no_loss_and_logs_is_refused_by_name(run_own, line, what):
    status, _, err = run_own(METHOD.format(line=line.format()))
    assert (status, err.count("\n")) == (1, 1), err
    assert err.startswith(f"cu-run: Own.loss returns {what}; return (loss, logs): a tensor of one ")


def test_cu_doctor_tells_where_ones_code_fails():
    """As a finding among the others, whatever its type; this file is a user's own as well."""
    try:
        {}["name"]
    except KeyError as caught:
        error, line = caught, caught.__traceback__.tb_lineno
    rehearsal = SimpleNamespace(
        stages=["images", "method"], per_image=1.0, accuracy={"style": 99.0}, images=4
    )
    found = list(check_rehearsal(None, SimpleNamespace(regularizers={}), rehearsal, error))
    said = {finding.what: (finding.ok, finding.detail) for finding in found}
    assert said["method"] == (False, f"{__file__}:{line}: KeyError: 'name'")
    assert said["training"][0] is None


def test_what_our_code_says_below_it_keeps_its_own_line(run_own):
    status, _, err = run_own(METHOD.format(line="return total * float('nan'), {}"))
    assert (status, err.count("\n")) == (1, 1), err
    assert err.startswith("cu-run: training led to a loss of nan at request 1")
    assert err.endswith("run.log holds the traceback\n")


def test_an_edited_method_does_not_go_on_where_it_failed(run_own, tmp_path):
    """Request 2 fails; the same command with the mended file is refused, also its request 1."""
    fails = "assert scope.request.index < 2, 'not yet'; return total, {}"
    status, _, err = run_own(METHOD.format(line=fails))
    assert (status, "AssertionError: not yet" in err) == (1, True)
    mended = METHOD.format(line="return 2 * total, {}")
    status, _, err = run_own(mended)
    assert (status, err.count("\n")) == (1, 1), err
    assert "was made by other code (changed: own_method)" in err
    (run,) = (tmp_path / "outputs/runs/smoke").iterdir()
    assert [path.name for path in sorted(run.glob("steps/*/step.json"))] == ["step.json"] * 2
    status, _, err = run_own(mended, "allow_other_code=true")
    assert (status, err) == (0, "")
    assert len(list(run.glob("steps/*/step.json"))) == 3


def test_the_variable_shows_the_traceback(run_own, monkeypatch):
    monkeypatch.setenv("CU_RUNNER_DEBUG", "1")
    status, _, err = run_own(METHOD.format(line="raise ValueError('odd')"))
    assert status == 1
    assert err.startswith("Traceback (most recent call last):")
    assert err.splitlines()[-1].startswith("cu-run: ")


@pytest.mark.parametrize("text", ["def broken(:\n", "import math\n\nraise OSError(2, 'gone')\n"])
def test_a_module_that_cannot_be_imported_is_named_with_its_line(run_own, tmp_path, text):
    status, _, err = run_own(text)
    assert (status, err.count("\n")) == (2, 1), err
    assert "own_method.Own" in err
    assert f"see {tmp_path}/own_method.py:{text.count(chr(10))}" in err


def test_a_tensor_among_the_logs_becomes_a_number(run_own, tmp_path):
    status, _, err = run_own(METHOD.format(line="return total, {'size': total}"))
    assert (status, err) == (0, "")
    (file,) = (tmp_path / "outputs/runs/smoke").glob("*/steps/01/training.csv")
    head, first = file.read_text().splitlines()[:2]
    row = dict(zip(head.split(","), first.split(","), strict=True))
    assert float(row["size"]) == float(row["loss"])


@pytest.mark.parametrize("value", ["'text'", "total.repeat(2)"])
def test_what_is_no_number_among_the_logs_is_refused_by_name(run_own, value):
    status, _, err = run_own(METHOD.format(line=f"return total, {{'size': {value}}}"))
    assert (status, err.count("\n")) == (1, 1), err
    assert err.startswith("cu-run: Own: logs 'size', which is a ")
