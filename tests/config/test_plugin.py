"""A user's own method and regularizer: one Python file and one YAML each, no fork."""

import json
import os

from conftest import SMOKE, run_directory

METHOD = '''
import torch
from cu_runner.methods.base import Method


class Halve(Method):
    """Pulls every weight to zero."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def batch(self, scope, step):
        return None

    def loss(self, scope, batch):
        total = sum(weight.pow(2).sum() for weight in scope.params.values())
        return self.strength * total, {"size": total.item()}
'''

REGULARIZER = '''
import torch
from cu_runner.regularizers.base import Regularizer


class Undo(Regularizer):
    """Takes every step back."""

    acts_on = ("step",)

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction

    def begin_request(self, scope, method):
        return {"undone": self.fraction}

    @torch.no_grad()
    def on_step(self, params, before):
        for name, parameter in params.items():
            parameter.copy_(before[name] + (1 - self.fraction) * (parameter - before[name]))
'''


def test_a_method_and_a_regularizer_from_a_users_directory(cu_run, tmp_path):
    for folder in ("modules", "tree/method", "tree/reg"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "modules/halving.py").write_text(METHOD)
    (tmp_path / "modules/undoing.py").write_text(REGULARIZER)
    (tmp_path / "tree/method/halve.yaml").write_text(
        "# Weights shrink.\n_target_: halving.Halve\nstrength: 2.0\n"
    )
    (tmp_path / "tree/reg/undo.yaml").write_text(
        "# Nothing moves.\nundo:\n  _target_: undoing.Undo\n  fraction: 1.0\n"
    )
    overrides = [override for override in SMOKE if not override.startswith("method.")]
    mine = (
        "--config-dir",
        str(tmp_path / "tree"),
        *overrides,
        "method=halve",
        "reg=[l2,undo]",
        "allow_modules=[halving,undoing]",
    )
    env = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "modules"), os.environ.get("PYTHONPATH", "")])
    }

    done = cu_run(*mine, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    directory = run_directory(done.stdout, tmp_path)
    assert directory.name.startswith("halve-l2+undo-sequential-s0-")
    record = json.loads((directory / "steps/01/step.json").read_text())
    assert record["training"]["regularizers"] == {"l2": {}, "undo": {"undone": 1.0}}
    assert record["row"]["drift_l2"] == 0.0

    done = cu_run(*mine[:-1], env=env)
    assert done.returncode == 2
    assert done.stderr.startswith("cu-run: reg.undo._target_=undoing.Undo: lies outside cu_runner")

    done = cu_run(*mine, "method.strenght=3", env=env)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("cu-run: ")
    assert "method.strenght" in done.stderr

    done = cu_run(*mine, "method.strength=much", env=env)
    assert done.returncode == 2
    assert done.stderr == "cu-run: method.strength='much': input should be a valid number\n"
