"""A finished run's configuration with another way of measuring it."""

from __future__ import annotations

from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cu_runner.config.run_config import CODE
from cu_runner.runtime.paths import config_dir
from cu_runner.schema.errors import ConfigError
from cu_runner.schema.values import ConfigTree
from cu_runner.store.signature import NOT_SCIENTIFIC

# What decides how a run is measured and on what machine, not what it trained.
CHOICES = ("evaluator", "retention")  # groups of which cu-eval may take another file


SHOWN = (
    "seeds",
    "retain",
    "cross_retain",
    "prompt",
    "prompts",
)  # what a sequence says of evaluation images


MEASUREMENT = (*CHOICES, "eval", *(f"sequence.{key}" for key in SHOWN))


MACHINE = (
    "device",
    "num_threads",
    "model.path",
    "model.revision",
    "model.config",
    "model.allow_pickle",
    "model.precision",
)


def revise(resolved: ConfigTree, overrides: list[str]) -> ConfigTree:
    """A run's resolved configuration with another way of measuring it.

    Args:
        overrides: evaluator=NAME, retention=NAME, or keys under MEASUREMENT and MACHINE: eval.steps=50, device=cpu.

    Raises:
        ConfigError: a key that shaped the training, or one that is not there.
    """
    config = OmegaConf.create(filled_in(resolved) | dict.fromkeys(CODE, False))
    OmegaConf.set_struct(config, True)
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group
        if key == "allow_modules":
            continue
        if override.is_sweep_override() or override.is_delete():
            raise ConfigError(
                f"{override.input_line}: give one value, KEY=VALUE; a list is written 'KEY=[1,2]'"
            )
        value = override.value()
        if not any(
            key == allowed or key.startswith(f"{allowed}.")
            for allowed in MEASUREMENT + MACHINE + CODE
        ):
            known = ", ".join(MEASUREMENT + MACHINE + CODE)
            raise ConfigError(
                f"{key}: shaped the training and cannot change here; allowed: {known}"
            )
        if key in CHOICES:
            path = (
                Path(value)
                if str(value).endswith(".yaml")
                else config_dir() / key / f"{value}.yaml"
            )
            if not path.is_file():
                known = ", ".join(sorted(entry.stem for entry in path.parent.glob("*.yaml")))
                raise ConfigError(
                    f"{key}={value}: no such file; allowed: {known or 'the path of a YAML file'}"
                )
            OmegaConf.update(config, key, OmegaConf.load(path), merge=False, force_add=True)
            continue
        try:
            OmegaConf.update(config, key, value, merge=False)
        except OmegaConfBaseException:
            raise ConfigError(f"unknown key {key}; the run's config.yaml holds every key") from None
    return OmegaConf.to_container(config, resolve=True)


def filled_in(resolved: ConfigTree) -> ConfigTree:
    """A run's configuration with the settings that it lacks because they are newer, and that are no part of an experiment."""
    defaults, filled = (
        OmegaConf.to_container(OmegaConf.load(config_dir() / "config.yaml"), resolve=False),
        dict(resolved),
    )
    for path in NOT_SCIENTIFIC:
        group, _, key = path.partition(".")
        if group not in defaults:  # of a chosen file, whose arguments have defaults of their own
            continue
        default = {key: defaults[group][key]} if key else defaults[group]
        if isinstance(default, dict) and not isinstance(filled.get(group, {}), dict):
            raise ConfigError(f"{group}={filled[group]}: is no mapping; config.yaml was changed")
        filled[group] = (
            default | filled.get(group, {})
            if isinstance(default, dict)
            else filled.get(group, default)
        )
    return filled
