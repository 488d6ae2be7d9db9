"""What a `_target_` may name, and its arguments held against the signature of what it names.

A configuration file may come from somebody else. It runs no code but cu_runner's and that of
modules which the user allows by name on the command line; that is decided before any import.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar, cast, get_type_hints

from cu_runner.concepts.sequence import Sequence
from cu_runner.evaluators.base import Evaluator
from cu_runner.methods.base import Method
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.recovery.base import Probe
from cu_runner.regularizers.base import Regularizer
from cu_runner.retention.base import Retention
from cu_runner.runtime.user_code import place_of
from cu_runner.schema.errors import ConfigError, first_line
from cu_runner.schema.validate import validate
from cu_runner.schema.values import ConfigTree
from cu_runner.trackers.base import Tracker

KINDS: dict[str, type] = {
    "model": DiffusionModel,
    "evaluator": Evaluator,
    "sequence": Sequence,
    "method": Method,
    "reg": Regularizer,
    "retention": Retention,
    "recovery": Probe,
    "tracker": Tracker,
}
COMBINED = ("reg", "recovery", "tracker")  # groups of which a run has several entries, by name
TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)
# A part of the name of a run directory, and so of a W&B run.
FILE_NAME = re.compile(r"\w[\w.-]{0,63}", re.ASCII)

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Node(Generic[Kind]):
    """A checked `_target_` with its arguments, ready to be built.

    function: the class or function that target names. made: the class of what it makes.
    """

    target: str
    function: Callable[..., Kind]
    made: type[Kind]
    arguments: dict[str, object]

    def build(self, **more: object) -> Kind:
        """Call the function with its arguments and more of them (device)."""
        return self.function(**self.arguments, **more)


def permitted(name: str, allowed: tuple[str, ...]) -> bool:
    """Tell whether a dotted name lies in cu_runner or in one of the allowed modules."""
    modules = ("cu_runner", *allowed)
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def locate_target(path: str, target: str, allowed: tuple[str, ...]) -> Callable[..., object]:
    """Import the class or function that a `_target_` names.

    Args:
        path: the dotted key of the node.
        allowed: modules that the user trusts, beside cu_runner.

    Raises:
        ConfigError: it does not lie in a permitted module (then nothing was imported), is defined
            in another one, or is not there.
    """
    said = f"{path}._target_={target}"
    trust = "if you trust that code, allow it: allow_modules"
    if not TARGET.fullmatch(target):
        example = "cu_runner.methods.esd.ESD"
        raise ConfigError(f"{path}._target_={target!r}: not a dotted name such as {example}")
    module, _, name = target.rpartition(".")
    if not permitted(target, allowed):
        raise ConfigError(f"{said}: lies outside cu_runner; {trust}=[{module}]")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever importing the user's module raises
        place = f"; see {where}" if (where := place_of(error)) else ""
        raise ConfigError(f"{said}: cannot be imported ({first_line(error)}){place}") from error
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        raise ConfigError(f"{said}: neither a class nor a function")
    home = found.__module__
    if not permitted(f"{home}.{found.__qualname__}", allowed):
        raise ConfigError(f"{said}: is defined in {home}, outside cu_runner; {trust}=[{home}]")
    return found


def make_entry(
    group: str, name: str, chosen: ConfigTree, kind: type[Kind], allowed: tuple[str, ...]
) -> Node[Kind]:
    """Check an entry of a group of COMBINED as make_node() does.

    Args:
        chosen: all entries of the group.

    Raises:
        ConfigError: as make_node(), or settings of an entry that is not selected.
    """
    node = chosen[name]
    if not isinstance(node, dict) or "_target_" not in node:
        selected = [
            other
            for other, entry in chosen.items()
            if isinstance(entry, dict) and "_target_" in entry
        ]
        what = {"reg": "regularizer", "recovery": "probe"}.get(group, group)
        raise ConfigError(
            f"{group}.{name} has settings but the {what} is not selected "
            f"(selected: {', '.join(selected) or 'none'}); "
            f"add it, as in '{group}=[{','.join([*selected, name])}]', or drop its settings"
        )
    return make_node(f"{group}.{name}", node, kind, allowed)


def check_file_name(key: str, name: str) -> None:
    """Refuse with ConfigError a name that cannot stand in the name of a run directory."""
    if not FILE_NAME.fullmatch(name):
        raise ConfigError(
            f"{key}={name!r}: is part of the run directory's name; "
            "use up to 64 letters, digits, _ - . (ASCII)"
        )


def make_node(path: str, node: object, kind: type[Kind], allowed: tuple[str, ...]) -> Node[Kind]:
    """Check a group's `_target_`, and its arguments: names, types, bounds, nothing missing.

    Args:
        path: the dotted key of the node.
        node: the entry of the configuration.
        kind: the class whose subclass it must make.
        allowed: modules beside cu_runner that `_target_` may name.

    Raises:
        ConfigError: one line with what is wrong.
    """
    group = path.partition(".")[0]
    if not isinstance(node, dict) or "_target_" not in node:
        raise ConfigError(f"{path} has no _target_; choose a file of conf/{group}")
    arguments = {key: value for key, value in node.items() if key != "_target_"}
    target = str(node["_target_"])
    function = locate_target(path, target, allowed)
    is_class = inspect.isclass(function)
    hints = get_type_hints(function.__init__ if is_class else function, include_extras=True)
    made = function if is_class else hints.get("return")
    if not (inspect.isclass(made) and issubclass(made, kind)):
        wanted = f"{kind.__module__}.{kind.__name__}"
        raise ConfigError(f"{path}._target_={target}: makes no {wanted}; name a subclass of it")
    # the device is the top-level setting
    parameters = {
        key: spec for key, spec in inspect.signature(function).parameters.items() if key != "device"
    }
    if unknown := sorted(str(key) for key in set(arguments) - set(parameters)):
        known = ", ".join(sorted(parameters)) or "none"
        raise ConfigError(f"unknown key {path}.{unknown[0]}; allowed: {known}")
    needed = {key for key, spec in parameters.items() if spec.default is spec.empty}
    if missing := sorted(needed - set(arguments)):
        raise ConfigError(f"{path}.{missing[0]} is not set; add it to the file of conf/{group}")
    if bare := sorted(key for key in arguments if key not in hints):
        raise ConfigError(
            f"{path}.{bare[0]}: the argument has no type in {target}; annotate it, "
            "the annotation is its check"
        )
    checked = {
        key: validate(hints[key], value, f"{path}.{key}") for key, value in arguments.items()
    }
    return Node(target, cast(Callable[..., Kind], function), made, checked)


def check_keys(value: object, path: str = "") -> None:
    """Refuse with ConfigError what YAML has and JSON has not, and Hydra's words (`_args_`).

    Args:
        value: a configuration, or a part of one.
        path: the dotted key at which it stands.
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
    inside = bool(name) and "." not in name
    is_node = group in KINDS and (inside if group in COMBINED else not name)
    for key, entry in value.items():
        if not isinstance(key, str):
            place = path or "configuration"
            raise ConfigError(f"{place}: the key {key!r} is no text; put it in quotes")
        if re.fullmatch(r"_[a-z]+_", key) and not (key == "_target_" and is_node):
            raise ConfigError(
                f"{path}.{key}: is read nowhere; only {', '.join(KINDS)} files name a _target_, "
                "at their top"
            )
        check_keys(entry, f"{path}.{key}" if path else key)
