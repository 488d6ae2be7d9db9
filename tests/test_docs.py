"""README and docs: their links lead somewhere, their commands are read by the commands that they
name, their Python runs.
"""

import functools
import json
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import cu_runner
from cu_runner.config.compose import compose_apart
from cu_runner.runtime.paths import config_dir

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = {"commands.md", "settings.md"}  # by scripts/docs_pages.py
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
SHOWN = [page for page in PAGES if not page.name.endswith(".finding.md")]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", head.lower()).strip() for head in heads)
    return {re.sub(r"[ ]+", "-", head) for head in plain}


@pytest.mark.parametrize("page", SHOWN, ids=name_of)
def test_every_link_leads_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        found = page.parent / file if file else page
        assert found.name in GENERATED or found.exists(), f"{name_of(page)}: {target}"
        if anchor:
            assert anchor in anchors_of(found), f"{name_of(page)}: {target}"


def commands_in(page: Path) -> list[str]:
    """The lines of a page's blocks of code that begin with a command of ours, continued lines
    joined, comments off.
    """
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    names = "|".join(PROJECT["scripts"])
    found = re.findall(
        rf"^(?: {{4,}}|)((?:PYTHONPATH=\. )?(?:{names}) .*)$", text, flags=re.MULTILINE
    )
    lines = [re.split(r" {2,}#| # ", line)[0].strip() for line in found]
    return [line for line in lines if "..." not in line.split() and "--help:" not in line]


RUNS = sorted(
    {
        line.removeprefix("PYTHONPATH=. ")
        for page in SHOWN
        for line in commands_in(page)
        if "cu-run " in line
        and not any(mark in line for mark in ("my_", "$PARTS", "=...", "DIR", "mine/", "name=kept"))
    }
)


def test_there_are_commands_to_read():
    assert len(RUNS) > 15


@pytest.mark.parametrize("line", RUNS)
def test_every_run_composes(line):
    """Of a sweep its first job does."""
    words = shlex.split(line)[1:]
    if "--cfg" in words:
        words = words[: words.index("--cfg")]
    sweeps = "-m" in words
    words = [word for word in words if word not in ("-m", "--resolve")]
    words = [word for word in words if not word.startswith(("hydra/", "hydra."))]
    if sweeps:
        words = [
            word if word.partition("=")[2].startswith("[") else word.split(",")[0] for word in words
        ]
    compose_apart(words)


README_RUNS = [
    line
    for line in commands_in(ROOT / "README.md")
    if line.startswith("cu-run ") and not any(mark in line for mark in (" -m ", "...", "/models/"))
]


@pytest.mark.parametrize("line", README_RUNS)
def test_every_run_of_the_readme_can_be_planned(in_process, line):
    """As it stands there, with dry_run: its parts are built, and the plan is printed."""
    words = [word for word in shlex.split(line)[1:] if word != "dry_run=true"]
    status, out, err = in_process(*words, "dry_run=true")
    assert (status, err) == (0, "")
    assert out.startswith("plan: ")


OTHERS = sorted(
    {
        (shlex.split(line)[0], word.partition("=")[0])
        for page in SHOWN
        for line in commands_in(page)
        for word in shlex.split(line)
        if word.startswith("--") and not line.startswith(("cu-run", "PYTHONPATH"))
    }
)


@pytest.mark.parametrize(("command", "option"), OTHERS, ids=" ".join)
def test_every_option_is_one_of_its_command(command, option):
    assert option in help_of(command)


@functools.cache
def help_of(command: str) -> str:
    module, _, function = PROJECT["scripts"][command].partition(":")
    call = f"import sys; from {module} import {function}; sys.argv[0] = {command!r}; {function}()"
    return subprocess.run(
        [sys.executable, "-c", call, "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout


def test_every_target_of_make_and_every_script_is_there():
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):", rules, flags=re.MULTILINE))
    for page in SHOWN:
        text = page.read_text(encoding="utf-8")
        named = set(re.findall(r"(?:^ {4}|`)make ([a-z][a-z0-9-]*)", text, flags=re.MULTILINE))
        assert named <= targets, page
        for script in re.findall(r"python (scripts/(?!studies/NAME)[\w/]+\.py)", text):
            assert (ROOT / script).exists(), f"{page}: {script}"


def test_every_table_that_is_named_ships():
    for page in SHOWN:
        for name in re.findall(
            r"^ {4}cu-table (\w+)\b(?!/)", page.read_text("utf-8"), re.MULTILINE
        ):
            if name not in ("NAME", "path"):
                assert (ROOT / "scripts/tables" / f"{name}.yaml").exists(), f"{page}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_page_has_a_place_to_be_filled_in(page):
    assert not re.search(r"@@|TODO|FIXME|XXX", page.read_text(encoding="utf-8"))


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200


def test_the_readme_names_what_there_is():
    """Every method, regularizer and probe stands in its tables, and every page of docs is reached
    from the index.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for group in ("method", "reg", "recovery"):
        for path in (config_dir() / group).glob("*.yaml"):
            combined = path.stem in ("none", "selft_gradproj", "gradproj_l1", "gradproj_merge")
            assert combined or f"`{path.stem}`" in text or f"`{path.stem}," in text, path
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    docs = ROOT / "docs"
    for page in docs.rglob("*.md"):
        if not page.name.endswith(".finding.md"):  # excluded there; stands in its page
            assert f": {page.relative_to(docs).as_posix()}\n" in nav, page


def test_the_five_lines_of_the_readme(pipelines, tmp_path, monkeypatch):
    """As they stand there, on Stable Diffusion in miniature."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"(    import cu_runner\n.*?)\n\n", text, flags=re.DOTALL)
    few = {"train.steps": 1, "train.batch_size": 1, "method.num_anchors": 1}
    small = SimpleNamespace(
        load_model=lambda name, device: cu_runner.load_model(
            pipelines["sd15"], device="cpu", settings={"sampler.steps": 2}
        ),
        unlearn=functools.partial(cu_runner.unlearn, settings=few, progress=False),
    )
    monkeypatch.setitem(sys.modules, "cu_runner", small)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(textwrap.dedent(code), names)
    assert len(names["images"]) == 1
    assert (tmp_path / "model_without_van_gogh/model_index.json").exists()


def test_the_page_on_own_methods_shows_what_the_notebook_runs():
    page = (ROOT / "docs/own_method.md").read_text(encoding="utf-8")
    cells = json.loads((ROOT / "examples/own_method.ipynb").read_text(encoding="utf-8"))["cells"]
    run = "\n\n".join("".join(cell["source"]) for cell in cells)
    shown = re.findall(r"^ {4}class \w+\(\w+\):\n((?: {8}.*\n|\n)+)", page, re.MULTILINE)
    assert len(shown) == 2
    for body in shown:
        assert re.sub("^ {4}", "", body.rstrip(), flags=re.MULTILINE) in run


def test_the_site_builds(tmp_path):
    """Strictly: a page that is in no menu, a link or an anchor that leads nowhere end it."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "-d",
            str(tmp_path),
        ],  # --quiet counts no warning
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8").replace("!!", ""))
    assert config["strict"]
    for name in ("commands", "settings", "api"):
        assert (tmp_path / f"{name}.html").stat().st_size > 10_000
    page = (tmp_path / "settings.html").read_text(encoding="utf-8")
    assert "reg.gradproj.energy" in page
    assert "https://fonts" not in page
    assert "cu_runner.unlearn" in (tmp_path / "python.html").read_text(encoding="utf-8")
