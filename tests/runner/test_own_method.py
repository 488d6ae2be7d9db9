"""A method of the user's own that fails: where it did, and what holds the traceback."""

import sys

import pytest
from conftest import SMOKE

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
    """Returns run(text) -> (exit status, stdout, stderr) of a run of the class Own in that file."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tree/method").mkdir(parents=True)
    (tmp_path / "tree/method/own.yaml").write_text("# Mine.\n_target_: own_method.Own\n")

    def run(text: str):
        sys.modules.pop("own_method", None)
        (tmp_path / "own_method.py").write_text(text)
        words = [word for word in SMOKE if not word.startswith("method.")]
        own = ["method=own", "allow_modules=[own_method]"]
        return in_process("--config-dir", str(tmp_path / "tree"), *words, *own)

    yield run
    sys.modules.pop("own_method", None)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("raise ValueError('weights are odd')", "ValueError: weights are odd"),
        ("raise RuntimeError('a bug')", "RuntimeError: a bug"),
        ("open('/nowhere/file')", "FileNotFoundError: "),
        ("return total.reshape(7, 7), {}", "RuntimeError: "),
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
