"""Nodes: what a `_target_` may name, and its arguments held against the signature of what it names.

A configuration file may come from somebody else. It runs no code but cu_runner's and that of modules which the user allows by
name on the command line; that is decided before anything is imported.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_type_hints

from cu_runner.concepts.sequence import Sequence
from cu_runner.evaluators.base import Evaluator
from cu_runner.methods.base import Method
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.regularizers.base import Regularizer
from cu_runner.retention.base import Retention
from cu_runner.schema.errors import ConfigError, first_line
from cu_runner.schema.validate import validate
from cu_runner.schema.values import ConfigValue

KINDS = {
    "model": DiffusionModel,
    "evaluator": Evaluator,
    "sequence": Sequence,
    "method": Method,
    "reg": Regularizer,
    "retention": Retention,
}


TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)


FILE_NAME = re.compile(
    r"\w[\w.-]{0,63}", re.ASCII
)  # a part of the name of a run directory, and so of a W&B run


@dataclass(frozen=True)
class Node:
    """A checked `_target_` with its arguments, ready to be called by cli.py."""

    target: str
    function: Callable[..., object]  # the class or function that target names
    arguments: dict[str, ConfigValue]

    def build(self, **more: object) -> object:
        return self.function(**self.arguments, **more)


def permitted(name: str, allowed: tuple[str, ...]) -> bool:
    """Whether a dotted name lies in cu_runner or in one of the allowed modules."""
    return any(
        name == module or name.startswith(f"{module}.") for module in ("cu_runner", *allowed)
    )


def locate_target(path: str, target: str, allowed: tuple[str, ...]) -> Callable[..., object]:
    """The class or function that a `_target_` names.

    Args:
        path: the dotted key of the node.
        allowed: modules that the user trusts, beside cu_runner.

    Raises:
        ConfigError: it does not lie in a permitted module (then nothing was imported), is defined in another one, or is not there.
    """
    said = f"{path}._target_={target}"
    if not TARGET.fullmatch(target):
        raise ConfigError(
            f"{path}._target_={target!r}: not a dotted name such as cu_runner.methods.esd.ESD"
        )
    module, _, name = target.rpartition(".")
    if not permitted(target, allowed):
        raise ConfigError(
            f"{said}: lies outside cu_runner; if you trust that code, allow it: allow_modules=[{module}]"
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (
        Exception
    ) as error:  # whatever importing the user's module raises; reported with its cause
        raise ConfigError(f"{said}: cannot be imported ({first_line(error)})") from error
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        raise ConfigError(f"{said}: neither a class nor a function")
    if not permitted(f"{found.__module__}.{found.__qualname__}", allowed):
        raise ConfigError(
            f"{said}: is defined in {found.__module__}, outside cu_runner; "
            f"if you trust that code, allow it: allow_modules=[{found.__module__}]"
        )
    return found


def make_regularizer(
    name: str, node: ConfigValue, chosen: dict[str, ConfigValue], allowed: tuple[str, ...]
) -> Node:
    """make_node for an entry of `reg`; `chosen` are all entries. Raises ConfigError."""
    if not isinstance(node, dict) or "_target_" not in node:
        selected = [
            other
            for other, entry in chosen.items()
            if isinstance(entry, dict) and "_target_" in entry
        ]
        raise ConfigError(
            f"reg.{name} has settings but the regularizer is not selected (selected: {', '.join(selected) or 'none'}); "
            f"add it, as in 'reg=[{','.join([*selected, name])}]', or drop its settings"
        )
    return make_node(f"reg.{name}", node, allowed)


def check_file_name(key: str, name: str) -> None:
    """Raises ConfigError unless a name can stand in the name of a run directory."""
    if not FILE_NAME.fullmatch(name):
        raise ConfigError(
            f"{key}={name!r}: is part of the run directory's name; use up to 64 letters, digits, _ - . (ASCII)"
        )


def make_node(path: str, node: ConfigValue, allowed: tuple[str, ...]) -> Node:
    """Check a group's `_target_`, and its arguments against its signature: names, types, bounds, nothing missing."""
    group = path.partition(".")[0]
    if not isinstance(node, dict) or "_target_" not in node:
        raise ConfigError(f"{path} has no _target_; choose a file of conf/{group}")
    arguments = {key: value for key, value in node.items() if key != "_target_"}
    target = str(node["_target_"])
    function = locate_target(path, target, allowed)
    hints = get_type_hints(
        function.__init__ if inspect.isclass(function) else function, include_extras=True
    )
    made, kind = function if inspect.isclass(function) else hints.get("return"), KINDS[group]
    if not (inspect.isclass(made) and issubclass(made, kind)):
        raise ConfigError(
            f"{path}._target_={target}: makes no {kind.__module__}.{kind.__name__}; name a subclass of it"
        )
    parameters = {
        key: spec for key, spec in inspect.signature(function).parameters.items() if key != "device"
    }  # the top-level setting
    unknown = sorted(str(key) for key in set(arguments) - set(parameters))
    if unknown:
        raise ConfigError(
            f"unknown key {path}.{unknown[0]}; allowed: {', '.join(sorted(parameters))}"
        )
    missing = sorted(
        key
        for key, spec in parameters.items()
        if spec.default is spec.empty and key not in arguments
    )
    if missing:
        raise ConfigError(f"{path}.{missing[0]} is not set; add it to the file of conf/{group}")
    bare = sorted(key for key in arguments if key not in hints)
    if bare:
        raise ConfigError(
            f"{path}.{bare[0]}: the argument has no type in {target}; annotate it, the annotation is its check"
        )
    checked = {
        key: validate(hints[key], value, f"{path}.{key}") for key, value in arguments.items()
    }
    return Node(target, function, checked)


def check_keys(value: ConfigValue, path: str = "") -> None:
    """Raises ConfigError for keys and values that YAML has and JSON has not, and for Hydra's words (`_args_`) where none is read.

    path: the dotted key at which value stands.
    """
    if not isinstance(value, dict | list | str | int | float | None):
        raise ConfigError(
            f"{path}={value!r}: is no text, number, list or mapping; put it in quotes"
        )
    if isinstance(value, list):
        for index, entry in enumerate(value):
            check_keys(entry, f"{path}.{index}")
    if not isinstance(value, dict):
        return
    group, _, name = path.partition(".")
    is_node = group in KINDS and (bool(name) and "." not in name if group == "reg" else not name)
    for key, entry in value.items():
        if not isinstance(key, str):
            raise ConfigError(
                f"{path or 'configuration'}: the key {key!r} is no text; put it in quotes"
            )
        if re.fullmatch(r"_[a-z]+_", key) and not (key == "_target_" and is_node):
            raise ConfigError(
                f"{path}.{key}: is read nowhere; only {', '.join(KINDS)} files name a _target_, at their top"
            )
        check_keys(entry, f"{path}.{key}" if path else key)
