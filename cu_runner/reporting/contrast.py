"""The cu-run command that makes a run again, worked out from its config.yaml; and what tells the configurations of runs apart."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import yaml

from cu_runner.cli.failures import explain_error
from cu_runner.runtime.paths import config_dir
from cu_runner.schema.values import ConfigTree, numbers_by_value, without_paths
from cu_runner.store.run_record import RunRecord, read_run
from cu_runner.store.signature import NOT_SCIENTIFIC

FILES = (
    "model",
    "evaluator",
    "sequence",
    "retention",
)  # groups whose chosen file config.yaml does not name


DERIVED = ("anchors", "eval")  # most of their settings follow those of the model


KEY = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)


BARE = re.compile(
    r"(?!(?:null|true|false|inf|nan)$)[a-z_/][\w/.:-]*", re.ASCII | re.IGNORECASE
)  # text that needs no quotes


class Composed(Protocol):
    """What a command line becomes: a RunConfig."""

    resolved: ConfigTree
    signature: str


Compose = Callable[[list[str]], Composed]


@dataclass(frozen=True)
class Again:
    """The command that makes a run again; doubt: why it does not, or cannot be known to; None if it composes to this very run."""

    command: str
    doubt: str | None


def again(run: RunRecord, compose: Compose) -> Again:
    """The cu-run command of a run, checked by composing it; of an evaluation the cu-eval command, which is not checked.

    Settings that are no part of an experiment (devices, W&B, folders) are left out.
    """
    if run.is_evaluation:
        return measured_again(run)
    command = start_of(run)
    try:
        command = overrides_of(run, compose)
        made = compose(command).signature
    except Exception as error:
        return Again(shlex.join(["cu-run", *command]), explain_error(error, command)[1])
    same = made == run.records[0]["signature"]
    doubt = f"it gives the signature {made[:8]} here: cu_runner, conf/local or a file that the run reads has changed since"
    return Again(shlex.join(["cu-run", *command]), None if same else doubt)


def start_of(run: RunRecord) -> list[str]:
    """What the name of the run directory says."""
    names = list(run.config["reg"])
    reg = "none" if not names else override_value(names if len(names) > 1 else names[0])
    return [f"method={run.method}", f"reg={reg}", f"setting={run.plan}", f"seed={run.seed}"]


def overrides_of(run: RunRecord, compose: Compose) -> list[str]:
    """The choice of files, then the settings that differ; by the experiment of this sequence if that leaves fewer.

    Raises:
        ValueError: a setting cannot be written as an override. Others: errors of compose.
    """
    wanted, usual = science(run.config), defaults()
    files = {
        group: nearest_file(group, run.config[group]) for group in FILES if group in run.config
    }
    required = [
        f"{group}.{key}={override_value(wanted[f'{group}.{key}'])}"
        for group, name in files.items()
        for key, value in leaves(conf_file(group, name)).items()
        if value == "???"
    ]
    starts = [
        [
            f"{group}={name}"
            for group, name in files.items()
            if group == "sequence" or name != usual[group]
        ]
    ]
    starts += [[f"experiment={name}"] for name in experiments_of(files["sequence"])]
    found = []
    for start in starts:
        plain = [*start, *start_of(run), *required]
        changed = differing(wanted, science(compose(plain).resolved))
        first = [text for key, text in changed.items() if key.partition(".")[0] not in DERIVED]
        rest = (
            differing(wanted, science(compose([*plain, *first]).resolved))
            if len(first) < len(changed)
            else {}
        )
        found.append([*plain, *first, *rest.values()])
    return min(found, key=len)


def measured_again(run: RunRecord) -> Again:
    """The cu-eval command of an evaluation: its run, and the settings in which they differ."""
    source = run.directory.resolve().parent.parent
    changes: list[str] = []
    try:
        before = dict(read_run(source).config)
        for group in ("evaluator", "retention"):
            node = run.config.get(group, {"_target_": None})
            if node.get("_target_") != before.get(group, {}).get("_target_"):
                name = nearest_file(group, node) if group in run.config else "none"
                changes.append(f"{group}={name}")
                before[group] = conf_file(group, name)
        changed = differing(science(run.config), science(before))
        changes += [text for text in changed.values() if not text.startswith("~")]
    except Exception as error:
        return Again(shlex.join(["cu-eval", str(source), *changes]), explain_error(error, [])[1])
    return Again(shlex.join(["cu-eval", str(source), *changes]), None)


def conf_file(group: str, name: str) -> ConfigTree:
    """A file of conf/ with those that it begins with, interpolations unresolved; {} if it is empty."""
    file = yaml.safe_load((config_dir() / group / f"{name}.yaml").read_text(encoding="utf-8")) or {}
    for entry in file.get("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            file = conf_file(group, entry) | file
    return file


def defaults() -> dict[str, str]:
    """The files that conf/config.yaml chooses, by group."""
    entries = yaml.safe_load((config_dir() / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    return {
        group: name for entry in entries if isinstance(entry, dict) for group, name in entry.items()
    }


def nearest_file(group: str, node: ConfigTree) -> str:
    """The file of conf/<group> of the node's name, else of its class, that has most settings in common with the resolved node."""
    wanted = leaves(node)

    def likeness(name: str) -> tuple[bool, bool, int]:
        file = conf_file(group, name)
        common = sum(wanted.get(key) == value for key, value in leaves(file).items())
        return name == node.get("name"), file.get("_target_") == node.get("_target_"), common

    return max(sorted(path.stem for path in (config_dir() / group).glob("*.yaml")), key=likeness)


def experiments_of(sequence: str) -> list[str]:
    """The files of conf/experiment that choose this sequence."""
    names = sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml"))
    return [
        name
        for name in names
        if {"override /sequence": sequence} in conf_file("experiment", name).get("defaults", [])
    ]


def science(config: ConfigTree) -> ConfigTree:
    """The settings that make the experiment, by dotted key."""
    return leaves(without_paths(config, NOT_SCIENTIFIC))


def leaves(value: ConfigTree, path: str = "") -> ConfigTree:
    """Settings by dotted key. A list is one, and so is a mapping whose keys are no words: concepts, for example."""
    found: ConfigTree = {}
    for key, entry in value.items():
        place = f"{path}.{key}" if path else str(key)
        if isinstance(entry, dict) and entry and all(KEY.fullmatch(str(name)) for name in entry):
            found |= leaves(entry, place)
        elif entry != {}:
            found[place] = numbers_by_value(entry) if not isinstance(entry, int | float) else entry
    return found


def differing(wanted: ConfigTree, have: ConfigTree) -> dict[str, str]:
    """The overrides that make one configuration of another, by key.

    Raises:
        ValueError: a key or a value cannot be written as an override.
    """
    changes = {}
    for key, value in wanted.items():
        if key not in have or have[key] != value:
            if not KEY.fullmatch(key) or key.partition(".")[0] in ("hydra", "allow_modules"):
                raise ValueError(f"{key}: cannot be set by an override")
            changes[key] = f"{'' if key in have else '+'}{key}={override_value(value)}"
    return changes | {key: f"~{key}" for key in have if key not in wanted}


def override_value(value: ConfigTree) -> str:
    """As Hydra reads it: numbers, true, null, [a,b], {a:1}, text in quotes where it needs them. Raises ValueError."""
    if isinstance(value, list):
        return f"[{','.join(map(override_value, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{override_value(entry)}' for key, entry in value.items())}}}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return f"{value:.16g}" if float(f"{value:.16g}") == value else repr(value)
    if "${" in str(value):
        raise ValueError(f"{value!r}: would be read as an interpolation")
    if BARE.fullmatch(str(value)):
        return str(value)
    quoted = str(value).replace('"', '\\"')
    return f'"{quoted}"'


def contrast(runs: list[RunRecord]) -> dict[str, list[ConfigTree]]:
    """The settings of an experiment in which runs are not all alike: by key, the value of each run; None where it has none."""
    settings = [science(run.config) for run in runs]
    keys = dict.fromkeys(key for each in settings for key in each)
    rows = {key: [each.get(key) for each in settings] for key in keys}
    return {
        key: values for key, values in rows.items() if any(value != values[0] for value in values)
    }
