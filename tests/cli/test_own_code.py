"""Every command on a run of one's own code: all take the same --config-dir and allow_modules."""

import html
import shlex
import sys

import pytest
import yaml
from conftest import SMOKE, run_directory

from cu_runner.cli import doctor, evaluate, report, sweep, table
from cu_runner.runtime.paths import config_dir

METHOD = """
from cu_runner.methods.base import Method


class Own(Method):
    def __init__(self, strength: float) -> None:
        self.strength = strength

    def batch(self, scope, step):
        return None

    def loss(self, scope, batch):
        return self.strength * sum(w.pow(2).sum() for w in scope.params.values()), {}
"""
ALLOWED = "allow_modules=[own_method_of_all]"
CHOICES = [word for word in SMOKE if not word.startswith("method.")]
COMMANDS = {
    "cu-doctor": doctor.main,
    "cu-eval": evaluate.main,
    "cu-report": report.main,
    "cu-sweep": sweep.main,
    "cu-table": table.main,
}


@pytest.fixture
def own_tree(tmp_path, monkeypatch):
    """A tree with a method of one's own, an evaluator of one's own, and a table of them."""
    monkeypatch.syspath_prepend(tmp_path / "modules")
    for folder in ("modules", "tree/method", "tree/evaluator"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "modules/own_method_of_all.py").write_text(METHOD)
    own = "# Mine.\n_target_: own_method_of_all.Own\nstrength: 1.0\n"
    (tmp_path / "tree/method/own.yaml").write_text(own)
    judge = (config_dir() / "evaluator/shapecanvas.yaml").read_text()
    (tmp_path / "tree/evaluator/judge.yaml").write_text(judge)
    experiment = {
        "model": "ShapeCanvas",
        "methods": {"Own": ["method=own"]},
        "columns": {"style": [word for word in CHOICES if word != "wandb.mode=disabled"]},
    }
    content = {"title": "t", "metrics": ["UA"], "rows": {"plain": ["reg=none"]}}
    content["experiments"] = {"one": experiment}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(content))
    yield tmp_path / "tree"
    sys.modules.pop("own_method_of_all", None)


def test_every_command_takes_a_run_of_ones_own_code(
    own_tree, in_process, call_command, filled_cache, tmp_path
):
    tree = ["--config-dir", str(own_tree)]

    def call(name: str, *words: object) -> str:
        status, out, err = call_command(COMMANDS[name], name, *tree, *words, ALLOWED)
        assert (status, err) == (0, "")
        return out

    status, out, err = in_process(*tree, *CHOICES, "method=own", ALLOWED)
    assert (status, err) == (0, "")
    run = run_directory(out, tmp_path)
    assert "26 checks, all well" in call("cu-doctor", run)
    call("cu-report", run)
    page = html.unescape((tmp_path / f"outputs/reports/{run.name}/index.html").read_text())
    command = next(line for line in page.splitlines() if "cu-run --config-dir" in line)
    assert f"cu-run --config-dir={own_tree} " in command
    assert f"method=own {shlex.quote(ALLOWED)}" in command
    said = call("cu-eval", run, "evaluator=judge")
    assert said.splitlines()[-1].startswith("evaluation: ")
    said = call("cu-table", tmp_path / "table.yaml", "wandb.mode=disabled")
    assert "missing" not in said.lower()
    said = call("cu-table", tmp_path / "table.yaml", "wandb.mode=disabled", "seed=1")
    assert f"cu-run --config-dir={own_tree} sequence=smoke" in said


def test_what_pack_promises_can_be_done(own_tree, in_process, call_command, filled_cache, tmp_path):
    words = ["--config-dir", str(own_tree), *CHOICES, "method=own", ALLOWED]
    run = run_directory(in_process(*words)[1], tmp_path)
    _, out, _ = call_command(report.main, "cu-report", run, "--pack", "own run.zip")
    promised = shlex.split(out.split("`")[1])
    assert promised == ["cu-doctor", "own run.zip", ALLOWED]
    status, out, _ = call_command(doctor.main, *promised)
    assert (status, out.splitlines()[-1]) == (0, "  26 checks, all well")
    status, _, err = call_command(doctor.main, *promised[:2])
    assert status == 2
    assert f"allow it: {ALLOWED}" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_tree_that_is_not_there(command, call_command):
    words = (["status"] if command == "cu-sweep" else []) + ["--config-dir=gone", "x"]
    status, _, err = call_command(COMMANDS[command], command, *words)
    assert (status, err.count("\n")) == (2, 1)
    assert "--config-dir: gone: no such directory" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=owm"], "method=owm: no such file in conf/method; allowed: conabl, dp, erasediff"),
        (["method=owm"], ", likelihood, mace_fusion, oce, own, random_label"),
        (["method=own", ALLOWED, "method.strengh=2"], "did you mean method.strength?"),
        (["method=own", ALLOWED, "method.strength=x"], "method.strength='x'"),
        (["method=own"], f"allow it: {ALLOWED}"),
    ],
)
def test_a_plan_of_ones_own_code_is_answered_in_words(own_tree, call_command, words, said):
    place = f"--config-dir={own_tree}"
    status, _, err = call_command(doctor.main, "cu-doctor", place, "sequence=smoke", *words)
    assert (status, err.count("\n")) == (2, 1)
    assert said in err


def test_a_file_of_the_tree_may_not_set_hydra_in_a_plan(own_tree, call_command):
    (own_tree / "experiment").mkdir()
    evil = "# @package _global_\nhydra:\n  callbacks:\n    evil: {_target_: os.system}\n"
    (own_tree / "experiment/evil.yaml").write_text(evil)
    words = [f"--config-dir={own_tree}", "sequence=smoke", "experiment=evil"]
    status, _, err = call_command(doctor.main, "cu-doctor", *words)
    assert status == 2
    assert "sets hydra.*, which can run code" in err
