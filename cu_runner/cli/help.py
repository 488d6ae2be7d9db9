"""What `cu-run --help` prints, from the comments of the configuration files themselves. Imports nothing heavy: it must be quick."""

from __future__ import annotations

import re
from pathlib import Path

from cu_runner import __version__
from cu_runner.runtime.paths import GROUPS, config_dir

EXAMPLES = """\
  cu-run method=conabl reg=gradproj              run, or resume, or do nothing if it is complete
  cu-run -m reg=none,l2,gradproj seed=0,1,2      sweep
  cu-run method=conabl reg=l2 --cfg job          print the composed configuration (--resolve: with every value)
  cu-run --config-dir DIR method=mine            add your own configuration tree ('allow_modules=[MODULE]': and its code)
  cu-sweep status outputs/sweeps/DATE            which jobs of a sweep are done, running, failed and why"""


def help_text() -> str:
    """Every group with its files, every setting with its default, and the options of each method and regularizer, a line each."""
    conf = config_dir()
    lines = [
        f"cu-run {__version__}: unlearn concepts from a text-to-image model, one request after another, and measure each."
    ]
    lines += ["", EXAMPLES, "", "Groups (GROUP=NAME):"]
    for group, meaning in GROUPS.items():
        lines.append(f"  {group}: {meaning}")
        for path in sorted((conf / group).glob("*.yaml")):
            lines.append(f"    {path.stem:<20} {header(path)}")
        if group == "experiment" and not any((conf / group).glob("*.yaml")):
            lines.append("    none ships yet; a file of your own in DIR/experiment works")
    lines += ["", "Settings (KEY=VALUE), with their defaults:"]
    text = (conf / "config.yaml").read_text(encoding="utf-8")
    lines += options("dry_run:" + text.partition("\ndry_run:")[2].partition("\nhydra:")[0])
    for group in ("model", "evaluator", "method", "reg", "retention", "setting"):
        for path in sorted((conf / group).glob("*.yaml")):
            found = options(path.read_text(encoding="utf-8"), f"{group}.")
            if found:
                lines += ["", f"Options of {group}={path.stem}:", *found]
    return "\n".join(lines)


def options(text: str, prefix: str = "") -> list[str]:
    """The `key: value  # meaning` lines of a configuration file, with dotted keys."""
    lines, sections = [], []
    for line in text.splitlines():
        body, _, meaning = line.partition("  # ")
        key, colon, value = body.strip().partition(":")
        if not colon or key.startswith("#") or key == "_target_":
            continue
        depth = (len(body) - len(body.lstrip())) // 2
        sections = [*sections[:depth], key]
        if value.strip():
            default = re.sub(
                r"^\$\{[\w.]+:[^,]*,(.*)\}$", r"\1", value.strip()
            )  # ${tuned:key,default}: the default
            meaning += (
                " (tuned per sequence: conf/tuned)" if value.strip().startswith("${tuned:") else ""
            )
            lines.append(f"  {prefix + '.'.join(sections) + '=' + default:<52} {meaning}".rstrip())
    return lines


def header(path: Path) -> str:
    """The first comment line of a configuration file; `# @package` speaks to Hydra."""
    comments = [
        line
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("# ") and line[2] != "@"
    ]
    return comments[0].removeprefix("# ") if comments else ""
