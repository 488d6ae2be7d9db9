"""What the code promises of its own structure: who imports whom, who prints, short files, ASCII."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "cu_runner").rglob("*.py"))
CODE = [
    *PACKAGE,
    *sorted((ROOT / "tests").rglob("*.py")),
    *sorted((ROOT / "scripts").rglob("*.py")),
    *sorted((ROOT / "conf").rglob("*.yaml")),
]
AT_THE_DOOR = {"cli.py", "config.py", "trust.py", "submission.py", "tables.py", "complaints.py"}

# cu-eval, dry_run, cu-doctor: they need a whole checked run, and no DictConfig
TAKE_A_RUN = {"reevaluate.py", "forecast.py", "checkup.py", "doctor.py", "report.py"}


def imported(path: Path) -> set[str]:
    """The top-level modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def named(paths: list[Path]) -> list:
    return [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in paths]


def test_configuration_dies_at_the_door():
    users = {path.name for path in PACKAGE if imported(path) & {"hydra", "omegaconf"}}
    assert users <= AT_THE_DOOR


def test_nothing_below_imports_the_command():
    for path in PACKAGE:
        if path.name not in ("cli.py", "complaints.py"):
            text = path.read_text(encoding="utf-8")
            assert "cu_runner.cli.run" not in text, path.name
            assert (
                path.name in AT_THE_DOOR | TAKE_A_RUN or "cu_runner.config.run_config" not in text
            ), path.name


def test_axes_do_not_know_each_other():
    for path in PACKAGE:
        modules = ast.dump(ast.parse(path.read_text(encoding="utf-8")))
        if path.parent.name == "methods":
            assert "cu_runner.regularizers" not in modules
            assert "cu_runner.evaluators" not in modules
        if path.parent.name == "cu_runner":
            for axis in ("methods", "regularizers", "evaluators"):
                names = {
                    node.module
                    for node in ast.walk(ast.parse(path.read_text()))
                    if isinstance(node, ast.ImportFrom)
                }
                assert {
                    name for name in names if name and name.startswith(f"cu_runner.{axis}.")
                } <= {f"cu_runner.{axis}.base"}, path.name


@pytest.mark.parametrize("path", named(PACKAGE))
def test_files_are_short_and_say_what_they_are(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", named(CODE))
def test_code_is_ascii(path):
    assert path.read_bytes().isascii()


def test_only_commands_print():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "scripts"
    ]
    commands = {
        f"{entry.partition(':')[0].removeprefix('cu_runner.')}.py" for entry in scripts.values()
    }
    assert {"cli.py", "tables.py"} <= commands
    for path in PACKAGE:
        if path.name not in commands | {"process.py"}:
            calls = [
                node
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Call)
            ]
            assert not [
                call
                for call in calls
                if isinstance(call.func, ast.Name) and call.func.id == "print"
            ], path.name


def test_help_does_not_load_torch():
    """`cu-run --help` answers at once: nothing that it imports pulls in torch or hydra."""
    code = (
        "import sys; sys.argv = ['', '--help']; from cu_runner.cli.run import main; main(); "
        "print([*sys.modules], file=sys.stderr)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stderr
    assert "'cu_runner.cli.run'" in loaded
    for module in ("torch", "hydra", "omegaconf", "pandas", "diffusers"):
        assert f"'{module}'" not in loaded
