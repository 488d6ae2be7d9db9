"""Commands answer at once: what a command loads before it has anything to compute."""

import json
import os
import subprocess
import sys

import pytest
from conftest import SMOKE

import cu_runner

SLOW = (
    "torch",
    "diffusers",
    "transformers",
    "open_clip",
    "timm",
    "scipy",
    "matplotlib",
    "wandb",
    "accelerate",
    "torchmetrics",
    "torchvision",
)
MODULES = {
    "cu-run": "run",
    "cu-table": "table",
    "cu-report": "report",
    "cu-eval": "evaluate",
    "cu-doctor": "doctor",
    "cu-sweep": "sweep",
}
PROGRAM = """
import importlib, json, sys
name, module, *arguments = sys.argv[1:]
sys.argv = [name, *arguments]
status = 0
try:
    importlib.import_module(f"cu_runner.cli.{module}").main()
except SystemExit as end:
    status = end.code or 0
print(json.dumps([status, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def call(command: str, *arguments: str, cwd, env: dict[str, str] | None = None):
    """Exit status, output and the libraries that were loaded, of a command in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, command, MODULES[command], *arguments],
        cwd=cwd,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    *output, last = done.stdout.splitlines()
    status, loaded = json.loads(last)
    return status, "\n".join(output) + done.stderr, set(loaded)


@pytest.mark.parametrize("command", MODULES)
@pytest.mark.parametrize("argument", ["--help", "--version", "--nonsense"])
def test_help_version_and_bad_arguments_load_nothing_slow(command, argument, tmp_path):
    status, output, loaded = call(command, argument, cwd=tmp_path)
    assert status == (2 if argument == "--nonsense" else 0)
    assert not loaded & {*SLOW, "pandas"}
    if argument == "--version":
        assert output == f"{command} {cu_runner.__version__}"
    assert output.startswith(command) or argument == "--help"
    assert len(output.splitlines()) == 1 or argument == "--help"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["train.stepss=3"], 2, "unknown key train.stepss"),
        (["method=conabll"], 2, "allowed: conabl"),
        (["method.loss=both"], 2, "method.loss='both'"),
        (["--cfg", "job", "--resolve"], 0, "cu_runner.methods.conabl.ConAbl"),
    ],
)
def test_a_typo_and_the_composed_configuration_load_nothing_slow(arguments, status, said, tmp_path):
    found, output, loaded = call("cu-run", *arguments, cwd=tmp_path)
    assert found == status
    assert said in output
    assert not loaded & set(SLOW)


def test_completion_loads_nothing_slow(tmp_path):
    line = "cu-run method=con"
    status, output, loaded = call(
        "cu-run",
        "-sc",
        "query=bash",
        cwd=tmp_path,
        env={"COMP_LINE": line, "COMP_POINT": str(len(line))},
    )
    assert status == 0
    assert "method=conabl" in output
    assert not loaded & set(SLOW)


@pytest.mark.parametrize(
    "choice",
    [
        "method=conabl",
        "method=esd reg=gradproj",
        "method=uce",
        "reg=merge",
        "retention=clip_score",
        "evaluator=shapecanvas_clip method=rgd",
    ],
)
def test_a_dry_run_loads_nothing_slow(choice, tmp_path, monkeypatch):
    smoke = [override for override in SMOKE if not override.startswith("method.")]
    status, output, loaded = call(
        "cu-run", *smoke, *choice.split(), "dry_run=true", "device=cpu", cwd=tmp_path
    )
    assert status == 0, output
    assert "to do: 3 of 3 evaluations" in output
    assert not loaded & set(SLOW)
    assert not (tmp_path / "outputs").exists()
