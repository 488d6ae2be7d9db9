"""What the code promises of its own structure, beside what import-linter holds (pyproject.toml)."""

import ast
import importlib
from pathlib import Path

import pytest

import cu_runner

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "cu_runner").rglob("*.py"))
ROOMS = sorted(path.parent for path in (ROOT / "cu_runner").glob("*/__init__.py"))
CODE = [
    *PACKAGE,
    *sorted((ROOT / "tests").rglob("*.py")),
    *sorted((ROOT / "scripts").rglob("*.py")),
    *sorted((ROOT / "hydra_plugins").rglob("*.py")),
    *sorted((ROOT / "conf").rglob("*.yaml")),
]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def named(paths: list[Path]) -> list:
    return [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in paths]


@pytest.mark.parametrize("path", named(PACKAGE))
def test_files_are_short_and_say_what_they_are(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350
    assert ast.get_docstring(tree(path))


@pytest.mark.parametrize("path", named(CODE))
def test_code_is_ascii(path):
    assert path.read_bytes().isascii()


def test_only_commands_print():
    for path in PACKAGE:
        if path.parent.name != "cli":
            names = {node.id for node in ast.walk(tree(path)) if isinstance(node, ast.Name)}
            assert "print" not in names, path.name


def test_there_are_few_packages_and_no_modules_beside_them():
    modules = [path.name for path in (ROOT / "cu_runner").glob("*.py")]
    assert modules == ["__init__.py"]
    assert len(ROOMS) <= 19
    folders = {path.parent for path in PACKAGE} - {ROOT / "cu_runner"}
    assert folders == set(ROOMS)


@pytest.mark.parametrize("path", named(ROOMS))
def test_a_package_has_three_modules_and_says_in_a_line_what_it_is_for(path):
    assert len([*path.glob("*.py")]) >= 4
    said = ast.get_docstring(tree(path / "__init__.py"))
    assert said
    assert "\n" not in said


def test_the_public_names_are_there():
    assert set(cu_runner.__all__) <= {*dir(cu_runner), *cu_runner._HOMES}
    for name in cu_runner.__all__:
        assert getattr(cu_runner, name) is not None
    for name, module in cu_runner._HOMES.items():
        assert hasattr(importlib.import_module(f"cu_runner.{module}"), name)


def test_the_pictured_packages_are_those_that_there_are():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in ROOMS:
        assert f"\n      {path.name}/ " in text
