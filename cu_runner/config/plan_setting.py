"""How a sequence becomes requests: the setting of a run, held against its regularizers."""

from __future__ import annotations

import dataclasses

from cu_runner.config.targets import Node
from cu_runner.regularizers.base import Regularizer
from cu_runner.schema.errors import ConfigError
from cu_runner.schema.settings import PlanSettings
from cu_runner.schema.validate import validate
from cu_runner.schema.values import ConfigTree, without_paths


def check_setting(resolved: ConfigTree, regularizers: dict[str, Node[Regularizer]]) -> PlanSettings:
    """Return how the sequence becomes requests; with merging, sequential ones become independent.

    Raises:
        ConfigError: it does not go with the regularizers, or with itself.
    """
    setting = validate(PlanSettings, resolved["setting"], "setting")
    if setting.last_only and setting.plan != "simultaneous":
        raise ConfigError(
            f"setting.last_only: requests are {setting.plan}, and each needs its own; "
            "use setting=simultaneous"
        )
    if setting.patience_steps is not None and setting.stop_at is None:
        raise ConfigError(
            "setting.patience_steps: UA is measured where setting.stop_at ends a request; give both"
        )
    if setting.stop_loss is not None and setting.stop_at is not None:
        raise ConfigError(
            "setting.stop_loss: setting.stop_at ends requests too, by UA; give one of the two"
        )
    if setting.recheck is not None and setting.stop_loss is None:
        raise ConfigError(
            "setting.recheck: the loss that is left is held against setting.stop_loss; give both"
        )
    # a run without these has the signature of one that does not know them
    unused = [] if setting.last_only else ["last_only"]
    unused += [] if setting.recheck is not None else ["recheck"]
    unused += [] if setting.stop_loss is not None else ["stop_loss"]
    if setting.plan != "simultaneous" and setting.stop_at is None:
        unused += ["stop_at"] if setting.ends_early else ["stop_at", "interval"]
    resolved["setting"] = without_paths(resolved["setting"], tuple(unused))
    merging = [name for name, node in regularizers.items() if node.made.independent_starts]
    if merging and setting.plan == "simultaneous":
        raise ConfigError(
            f"reg={merging[0]} merges requests that each start from the base model; "
            "use setting=independent"
        )
    if merging and setting.plan == "sequential":
        resolved["setting"] = {**resolved["setting"], "plan": "independent"}
        setting = dataclasses.replace(setting, plan="independent")
    return setting
