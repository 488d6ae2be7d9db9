"""Commands answer at once: what a command loads before it has anything to compute."""

import json
import os
import subprocess
import sys

import pytest
from conftest import SMOKE

import cu_runner

SLOW = {
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
}
MODULES = {
    "cu-run": "run",
    "cu-table": "table",
    "cu-report": "report",
    "cu-eval": "evaluate",
    "cu-export": "export",
    "cu-doctor": "doctor",
    "cu-sweep": "sweep",
}
# Calls of a command one after another: exit status and output of each, and what is loaded by then.
PROGRAM = """
import contextlib, importlib, io, json, sys
name, module, calls = sys.argv[1:]
said = []
for arguments in json.loads(calls):
    sys.argv, status, output = [name, *arguments], 0, io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            importlib.import_module(f"cu_runner.cli.{module}").main()
        except SystemExit as end:
            status = end.code or 0
    loaded = sorted({name.partition(".")[0] for name in sys.modules})
    said.append([status, output.getvalue(), loaded])
print(json.dumps(said))
"""


def call(command: str, *calls: list[str], cwd, env: dict[str, str] | None = None):
    """Exit status, output and loaded libraries of calls of a command in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, command, MODULES[command], json.dumps(calls)],
        cwd=cwd,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    return [(status, output, set(loaded)) for status, output, loaded in said]


@pytest.mark.parametrize("command", MODULES)
def test_help_version_and_bad_arguments_load_nothing_slow(command, tmp_path):
    helped, version, wrong = call(command, ["--help"], ["--version"], ["--nonsense"], cwd=tmp_path)
    assert [helped[0], version[0], wrong[0]] == [0, 0, 2]
    assert len(helped[1].splitlines()) > 5
    assert version[1] == f"{command} {cu_runner.__version__}\n"
    assert wrong[1].startswith(f"{command}: ")
    assert wrong[1].count("\n") == 1
    for *_, loaded in (helped, version):
        assert loaded & {*SLOW, "pandas", "hydra", "omegaconf"} == set()
    assert wrong[2] & {*SLOW, "pandas"} == set()


@pytest.mark.parametrize(
    ("command", "arguments", "status", "said"),
    [
        ("cu-table", [], 2, "the following arguments are required: table;"),
        ("cu-eval", ["gone"], 1, "gone: holds no readable config.yaml"),
        ("cu-export", ["gone", "out", "--to", "lora"], 1, "gone: holds no readable config.yaml"),
        ("cu-doctor", ["gone"], 1, "gone: holds no readable config.yaml"),
        ("cu-report", ["gone"], 2, "gone: no such directory"),
        ("cu-sweep", ["status", "gone"], 2, "gone/sweep.json: cannot be read"),
    ],
)
def test_a_wrong_path_is_told_before_anything_slow_is_loaded(
    command, arguments, status, said, tmp_path
):
    ((found, output, loaded),) = call(command, arguments, cwd=tmp_path)
    assert found == status
    assert said in output
    assert output.count("\n") == 1
    assert loaded & {*SLOW, "pandas"} == set()


def test_a_typo_and_the_composed_configuration_load_nothing_slow(tmp_path):
    calls = {
        ("train.stepss=3",): (2, "unknown key train.stepss"),
        ("method=conabll",): (2, "allowed: conabl"),
        ("method.loss=both",): (2, "method.loss='both'"),
        ("--cfg", "job", "--resolve"): (0, "cu_runner.methods.conabl.ConAbl"),
    }
    answers = call("cu-run", *map(list, calls), cwd=tmp_path)
    for (status, said), (found, output, loaded) in zip(calls.values(), answers, strict=True):
        assert found == status
        assert said in output
        assert loaded & SLOW == set()


def test_completion_loads_nothing_slow(tmp_path):
    line = "cu-run method=con"
    ((status, output, loaded),) = call(
        "cu-run",
        ["-sc", "query=bash"],
        cwd=tmp_path,
        env={"COMP_LINE": line, "COMP_POINT": str(len(line))},
    )
    assert status == 0
    assert "method=conabl" in output
    assert loaded & SLOW == set()


def test_a_dry_run_loads_nothing_slow(tmp_path):
    smoke = [override for override in SMOKE if not override.startswith("method.")]
    choices = (
        "method=conabl",
        "method=esd reg=gradproj",
        "method=uce",
        "reg=merge",
        "retention=shapecanvas",
        "evaluator=shapecanvas_clip method=rgd",
    )
    calls = [[*smoke, *choice.split(), "dry_run=true", "device=cpu"] for choice in choices]
    for status, output, loaded in call("cu-run", *calls, cwd=tmp_path):
        assert status == 0, output
        assert "to do: 3 of 3 evaluations" in output
        assert loaded & SLOW == set()
    assert not (tmp_path / "outputs").exists()


def test_a_finished_run_is_found_without_anything_slow(run_copy, tmp_path):
    ((status, output, loaded),) = call("cu-run", [*SMOKE], cwd=tmp_path)
    assert status == 0, output
    assert output.splitlines()[-1] == f"run: {run_copy.relative_to(tmp_path)}"
    assert loaded & SLOW == set()
