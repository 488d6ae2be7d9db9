"""What `cu-run --help` prints, from the comments of the configuration files themselves."""

from __future__ import annotations

import re
from pathlib import Path

from cu_runner import __version__
from cu_runner.runtime.paths import GROUPS, config_dir

EXAMPLES = """\
  cu-run method=conabl reg=gradproj              run, or resume, or do nothing if it is complete
  cu-run -m reg=none,l2,gradproj seed=0,1,2      sweep
  cu-run method=conabl reg=l2 --cfg job          print the composed configuration (also --resolve)
  cu-run --config-dir DIR method=mine            add your tree ('allow_modules=[MODULE]': its code)
  cu-sweep status outputs/sweeps/DATE            which jobs are done, running, failed and why"""
HEAD = "unlearn concepts from a text-to-image model, one request after another, and measure each."
OPTIONS = ("model", "evaluator", "method", "reg", "retention", "recovery", "setting", "tracker")
TUNED = " (tuned: conf/tuned, conf/training)"


def help_text() -> str:
    """Return a line for every group with its files, for every setting, and for every option."""
    conf = config_dir()
    lines = [f"cu-run {__version__}: {HEAD}", "", EXAMPLES, "", "Groups (GROUP=NAME):"]
    for group, meaning in GROUPS.items():
        lines.append(f"  {group}: {meaning}")
        for path in sorted((conf / group).glob("*.yaml")):
            lines.append(f"    {path.stem:<20} {header(path)}")
    lines += ["", "Settings (KEY=VALUE), with their defaults:"]
    text = (conf / "config.yaml").read_text(encoding="utf-8")
    lines += options("dry_run:" + text.partition("\ndry_run:")[2].partition("\nhydra:")[0])
    for group in OPTIONS:
        for path in sorted((conf / group).glob("*.yaml")):
            found = options(path.read_text(encoding="utf-8"), f"{group}.")
            if found:
                lines += ["", f"Options of {group}={path.stem}:", *found]
    return "\n".join(lines)


def options(text: str, prefix: str = "") -> list[str]:
    """Return the `key: value  # meaning` lines of a configuration file, with dotted keys."""
    lines: list[str] = []
    sections: list[str] = []
    for line in text.splitlines():
        body, _, meaning = line.partition("  # ")
        key, colon, value = body.strip().partition(":")
        if not colon or key.startswith("#") or key == "_target_":
            continue
        depth = (len(body) - len(body.lstrip())) // 2
        sections = [*sections[:depth], key]
        if value := value.strip():
            meaning += TUNED if value.startswith("${tuned:") else ""
            default = re.sub(r"^\$\{[\w.]+:[^,]*,(.*)\}$", r"\1", value)  # of ${tuned:key,default}
            lines.append(f"  {prefix + '.'.join(sections) + '=' + default:<52} {meaning}".rstrip())
    return lines


def header(path: Path) -> str:
    """Return the first comment line of a configuration file; `# @package` speaks to Hydra."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = (line for line in lines if line.startswith("# ") and line[2] != "@")
    return next(comments, "").removeprefix("# ")
