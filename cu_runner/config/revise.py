"""A finished run's configuration with another way of measuring it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cu_runner.config.compose import plain
from cu_runner.runtime.paths import config_dir
from cu_runner.schema.errors import ConfigError
from cu_runner.schema.values import ConfigTree
from cu_runner.schema.yaml_files import check_tree
from cu_runner.store.signature import NOT_SCIENTIFIC

CHOICES = ("evaluator", "retention", "recovery")  # groups of which cu-eval may take another file
# What decides how a run is measured and on what machine, not what it trained.
CHANGEABLE = (
    *CHOICES,
    "eval",
    *(f"sequence.{key}" for key in ("seeds", "retain", "cross_retain", "prompt", "prompts")),
    *("device", "num_threads", "model.path", "model.revision", "model.config"),
    *("model.shared", "model.allow_pickle", "model.precision", "fresh", "allow_other_code"),
)
CODE = ("fresh", "allow_other_code")  # not as the run itself had them


def revise(resolved: ConfigTree, overrides: list[str], tree: Path | None = None) -> ConfigTree:
    """Return a run's resolved configuration with another way of measuring it: after every request.

    Args:
        overrides: evaluator=NAME, retention=NAME, recovery=[NAME,NAME], or keys under CHANGEABLE:
            eval.steps=50.
        tree: of --config-dir, where files of the groups are looked for too.

    Raises:
        ConfigError: a key that shaped the training, or one that is not there.
    """
    if tree is not None:
        check_tree(tree)
    filled = filled_in(resolved)
    filled["eval"] = filled["eval"] | {"every": 1}  # also what the run left out
    config = OmegaConf.create(filled | dict.fromkeys(CODE, False))
    OmegaConf.set_struct(config, True)
    given = OverridesParser.create().parse_overrides(overrides)
    groups = [each.key_or_group for each in given if each.key_or_group in CHOICES]
    if twice := [group for group in groups if groups.count(group) > 1]:
        raise ConfigError(f"{twice[0]}=...: is there twice; give it once")
    # a file is chosen before its settings are changed, wherever it stands
    for override in sorted(given, key=lambda each: each.key_or_group not in CHOICES):
        key = override.key_or_group
        if key == "allow_modules":
            continue
        if override.is_sweep_override() or override.is_delete():
            raise ConfigError(
                f"{override.input_line}: give one value, KEY=VALUE; a list is written 'KEY=[1,2]'"
            )
        if not any(f"{key}.".startswith(f"{allowed}.") for allowed in CHANGEABLE):
            known = ", ".join(CHANGEABLE)
            raise ConfigError(
                f"{key}: shaped the training and cannot change here; allowed: {known}"
            )
        value: Any = override.value()
        if key in CHOICES:
            names = value if isinstance(value, list) and key == "recovery" else [value]
            chosen = OmegaConf.merge(*(read_choice(key, str(name), tree) for name in names))
            OmegaConf.update(config, key, chosen, merge=False, force_add=True)
            continue
        try:
            OmegaConf.update(config, key, value, merge=False)
        except OmegaConfBaseException:
            raise ConfigError(f"unknown key {key}; the run's config.yaml holds every key") from None
    return plain(config)


def read_choice(group: str, name: str, tree: Path | None) -> DictConfig:
    """Return a file of a configuration group, with those that its defaults list names below it.

    Raises:
        ConfigError: there is no such file.
    """
    own = OmegaConf.load(chosen_file(group, name, tree))
    assert isinstance(own, DictConfig)
    below = [entry for entry in own.pop("defaults", []) if entry != "_self_"]
    merged = OmegaConf.merge(*(read_choice(group, str(entry), tree) for entry in below), own)
    assert isinstance(merged, DictConfig)
    return merged


def chosen_file(group: str, name: str, tree: Path | None) -> Path:
    """Return a file of a configuration group, by name or by path. Raises ConfigError."""
    folders = [config_dir() / group, *([tree / group] if tree else [])]
    if name.endswith(".yaml"):
        folders = [Path(name).parent]
    found = {path.stem: path for folder in reversed(folders) for path in folder.glob("*.yaml")}
    if (stem := Path(name).stem if name.endswith(".yaml") else name) not in found:
        allowed = ", ".join(sorted(found)) or "the path of a YAML file"
        raise ConfigError(f"{group}={name}: no such file; allowed: {allowed}")
    return found[stem]


def filled_in(resolved: ConfigTree) -> ConfigTree:
    """Return a run's configuration with the settings that it lacks and that are no experiment's.

    Settings of that kind may be newer than the run.
    """
    defaults = plain(OmegaConf.load(config_dir() / "config.yaml"), resolve=False)
    filled = dict(resolved)
    for path in NOT_SCIENTIFIC:
        group, _, key = path.partition(".")
        if group not in defaults:  # of a chosen file, whose arguments have defaults of their own
            continue
        default = {key: defaults[group][key]} if key else defaults[group]
        if not isinstance(default, dict):
            filled.setdefault(group, default)
            continue
        if not isinstance(filled.get(group, {}), dict):
            raise ConfigError(f"{group}={filled[group]}: is no mapping; config.yaml was changed")
        filled[group] = default | filled.get(group, {})
    return filled
