"""From a command line to a checked run, by Hydra."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import cast

import hydra
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.errors import HydraException
from hydra.version import VersionBase, setbase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cu_runner.config.check_values import MISSING
from cu_runner.config.permissions import (
    allowed_modules,
    check_command,
    refuse_unasked_pickles,
    search_path,
)
from cu_runner.config.resolvers import (
    check_entries,
    choice,
    combination,
    entry_of,
    regularizer_entry,
    regularizers,
    training_cell,
    tuned_cell,
    tuned_elsewhere,
)
from cu_runner.config.run_config import RunConfig, check_run
from cu_runner.schema.errors import ConfigError, first_line
from cu_runner.schema.values import ConfigTree


def compose(words: list[str]) -> RunConfig:
    """Return the checked configuration that `cu-run` makes of a command line.

    Args:
        words: overrides, and before them --config-dir=DIR.

    Raises:
        ConfigError: it cannot be run. An error of Hydra's own: it cannot be composed.
    """
    options = check_command(words)
    GlobalHydra.instance().clear()
    setbase("1.3")
    Hydra.create_main_hydra2("cu_runner", search_path(options.config_dir))
    try:
        config = hydra.compose("config", options.overrides, return_hydra_config=True)
    finally:
        GlobalHydra.instance().clear()
    HydraConfig.instance().set_config(config)
    return parse(without_hydra(config))


def compose_apart(words: list[str]) -> RunConfig:
    """Return compose() of a command line, and leave Hydra's state as a program has it that uses
    Hydra itself.

    Raises:
        ConfigError: it cannot be composed, or not be run.
    """
    kept = Singleton._instances
    own = (GlobalHydra, HydraConfig, VersionBase)
    Singleton._instances = {kind: made for kind, made in kept.items() if kind not in own}
    try:
        return compose(words)
    except (HydraException, OmegaConfBaseException) as error:
        if found := re.search(r"Could not override '([\w.]+)'", str(error)):
            raise ConfigError(
                f"unknown setting {found[1]}; `cu-run --cfg job` prints every key"
            ) from None
        raise ConfigError(first_line(error)) from None
    finally:
        Singleton._instances = kept


def compose_all(commands: list[list[str]]) -> list[RunConfig]:
    """Return compose() of each command line.

    Raises:
        ExceptionGroup: of all that it raises, if several cannot be composed. One error as it is.
    """
    plans: list[RunConfig] = []
    errors: list[Exception] = []
    for overrides in commands:
        try:
            plans.append(compose(overrides))
        except (ConfigError, HydraException, OmegaConfBaseException) as error:
            errors.append(error)
    if len(errors) > 1:
        raise ExceptionGroup("several command lines cannot be composed", errors)
    if errors:
        raise errors[0]
    return plans


def without_hydra(config: DictConfig) -> DictConfig:
    """Return a composed configuration without Hydra's own node."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def plain(config: object, *, resolve: bool = True) -> ConfigTree:
    """Return a mapping of a configuration as plain values."""
    values = OmegaConf.to_container(config, resolve=resolve)
    assert isinstance(values, dict)
    return cast(ConfigTree, values)


def parse(config: DictConfig) -> RunConfig:
    """Check a composed configuration. Raises ConfigError."""
    overrides = list(HydraConfig.get().overrides.task)
    for group in {"reg", "tracker", "train", "tuned", "training"} & set(config):
        if not isinstance(config[group], DictConfig):
            raise ConfigError(
                f"{group}={config[group]}: is no mapping; the command line or a configuration file "
                "sets it as a whole"
            )
    check_entries(config)
    chosen = [override.partition("=")[0].lstrip("+") for override in overrides]
    cells = {"tuned": tuned_cell(config), "training": training_cell(config)}
    for folder, key in ((folder, key) for folder, cell in cells.items() for key in cell):
        if OmegaConf.select(config, key, default=MISSING) == MISSING:
            raise ConfigError(
                f"conf/{folder}: {key} is not a setting of this run; "
                f"correct the name in the {folder} file"
            )
        if key not in chosen and not reads_tuned(config, key):
            raise ConfigError(
                f"conf/{folder}: {key} does not read its {folder} value; "
                f"write it as ${{tuned:{key},DEFAULT}} in its file"
            )
    resolved = plain(config)
    for group in ("tuned", "training"):
        resolved.pop(group, None)
    allowed = allowed_modules(overrides)
    if list(allowed) != resolved.pop("allow_modules"):  # a file must not vouch for itself
        raise ConfigError(
            "allow_modules: set by a configuration file; only the command line may allow modules"
        )
    refuse_unasked_pickles(resolved, overrides)
    tuned = not config.reg or "tuned" not in config or is_known(config)
    plan = check_run(resolved, choice("method"), tuned, allowed)
    return dataclasses.replace(plan, notes=(*plan.notes, *notes_on(config)))


def notes_on(config: DictConfig) -> Iterator[str]:
    """Yield what a person should know of the settings: those of another model, those of nobody."""
    sequence, model, method = (choice(group) for group in ("sequence", "model", "method"))
    place, whose = "conf/tuned", f"sequence={sequence}"
    if elsewhere := tuned_elsewhere(config):
        place, whose = "conf/training", f"model={model}"
        own = "training" in config
        rest = f"those of conf/training/{model}.yaml are" if own else "give train.lr=... yourself"
        yield (
            f"conf/tuned/{sequence}.yaml was made on model={', '.join(elsewhere)}, and this run "
            f"has model={model}: its settings are not taken; {rest}"
        )
    chosen = "+".join(regularizers(config))
    if chosen and not is_known(config):
        yield (
            f"{place} has no settings of method={method} with reg={chosen} for {whose}: those of "
            "conf/reg are taken, which may do little or too much"
        )


def is_known(config: DictConfig) -> bool:
    """Tell whether conf/tuned or conf/training has settings of the method with the regularizers."""
    if entry_of(config, regularizer_entry(config), "tuned", choice("method")) is not None:
        return True
    return entry_of(config, combination(config), "training") is not None


def reads_tuned(config: DictConfig, key: str) -> bool:
    """Tell whether the setting is written as `${tuned:KEY,default}` in its file."""
    parent, _, last = key.rpartition(".")
    raw = plain(OmegaConf.select(config, parent), resolve=False)
    return str(raw[last]).startswith(f"${{tuned:{key},")
