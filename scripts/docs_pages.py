"""Pages of the documentation site that are made from the code: a hook of mkdocs (mkdocs.yml).

commands.md holds what every command prints for --help, settings.md every file of conf/ with its
settings, defaults and the comments that explain them.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from cu_runner.cli.help import header, options
from cu_runner.runtime.paths import GROUPS, config_dir

ROOT = Path(__file__).parents[1]


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages to those of docs/."""
    for name, text in (("commands.md", commands()), ("settings.md", settings())):
        files.append(File.generated(config, name, content=text))
    return files


def commands() -> str:
    """Return the page of commands: the help of each, as it prints it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    parts = [
        "# Commands",
        "Each takes `--help` and `--version`. Exit status: 0, 1 where it failed, 2 for bad input.",
    ]
    for name, place in project["scripts"].items():
        module, _, function = place.partition(":")
        call = f"import sys; from {module} import {function}; sys.argv[0] = {name!r}; {function}()"
        shown = subprocess.run(
            [sys.executable, "-c", call, "--help"],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        ).stdout
        if name == "cu-run":  # what follows are the settings, which have a page
            shown = shown.partition("\nSettings (KEY=VALUE)")[0]
        parts += [f"## {name}", fenced(shown.strip())]
    return "\n\n".join(parts) + "\n"


def settings() -> str:
    """Return the page of settings: of every run, then of every file of conf/."""
    text = (config_dir() / "config.yaml").read_text(encoding="utf-8")
    own = "dry_run:" + text.partition("\ndry_run:")[2].partition("\nhydra:")[0]
    parts = [
        "# Every setting",
        "`KEY=VALUE` on the command line. What is *tuned per sequence* is taken from conf/tuned or "
        "conf/training where these have it.",
        "## Of every run",
        table(options(own)),
    ]
    for group, meaning in GROUPS.items():
        parts += [f"## {group}", f"{meaning[:1].upper()}{meaning[1:]}."]
        for path in sorted((config_dir() / group).glob("*.yaml")):
            parts += [f"### {group}={path.stem}", header(path)]
            found = options(path.read_text(encoding="utf-8"), f"{group}.")
            parts += [table(found)] if found else []
    return "\n\n".join(parts) + "\n"


def table(lines: list[str]) -> str:
    """Return lines of `cu-run --help` (KEY=DEFAULT, spaces, meaning) as a table."""
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for line in lines:
        setting, _, meaning = line.strip().partition("  ")
        key, _, default = setting.partition("=")
        cells = (f"`{key}`", f"`{default}`" if default else "", meaning.strip())
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def fenced(text: str) -> str:
    """Return text as a block that is shown as it is."""
    return f"```text\n{text}\n```"
