"""What the functions of this package take by name, as the words of a command line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from cu_runner.config.compose import compose_apart
from cu_runner.config.run_config import RunConfig
from cu_runner.runtime.paths import config_dir
from cu_runner.schema.errors import ConfigError
from cu_runner.schema.words import did_you_mean

# A sequence for which conf/tuned has no settings: those of conf/training and conf/reg are taken.
UNTUNED = "sequence=smoke"


def word(key: str, value: object) -> str:
    """Return a setting as a word of the command line: KEY=VALUE in Hydra's grammar."""
    return f"{key}={written(value)}"


def written(value: object) -> str:
    """Return a plain value as Hydra's grammar writes it. Raises ConfigError for any other."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        # backslashes are doubled before a quote alone
        escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", value).replace("'", "\\'")
        return f"'{escaped}'"
    if isinstance(value, Mapping):
        # a key has no quotes there
        keys = {key: re.sub(r"([\\()\[\]{}:=, \t])", r"\\\1", str(key)) for key in value}
        return "{" + ",".join(f"{keys[key]}:{written(value[key])}" for key in value) + "}"
    if isinstance(value, Iterable):
        return "[" + ",".join(written(entry) for entry in value) + "]"
    raise ConfigError(f"settings: {value!r} is no text, number, list or mapping; give plain values")


def check_name(group: str, name: str) -> str:
    """Return a name of a file of conf/GROUP. Raises ConfigError with those that there are."""
    names = sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))
    if name not in names:
        meant = did_you_mean(name, names)
        raise ConfigError(f"{group}={name!r}: no such name{meant}; allowed: {', '.join(names)}")
    return name


def listed(value: str | Iterable[str]) -> list[str]:
    """Return names as a list; a text alone is one name."""
    names = [value] if isinstance(value, str) else list(value)
    return [name.strip() for name in names]


def refuse_idle(
    settings: Mapping[str, object] | None, taken: Iterable[str], idle: Mapping[str, str]
) -> None:
    """Raise ConfigError for a setting that would change nothing here.

    Args:
        settings: of a call.
        taken: the first parts of keys that do.
        idle: what to do about others, by the first part of their keys.
    """
    known = list(taken)
    for key, value in (settings or {}).items():
        inside = value if key == "eval" and isinstance(value, Mapping) else {}
        if key == "eval.every" or "every" in inside:
            raise ConfigError("settings: eval.every changes nothing here; leave it out")
        first = re.split(r"[./@]", key.lstrip("+~"))[0]
        if first not in known:
            advice = idle.get(first, "it belongs to a run of cu-run")
            raise ConfigError(
                f"settings: {key} changes nothing here ({advice}); allowed: {', '.join(known)}"
            )


def composed(words: Iterable[str], settings: Mapping[str, object] | None) -> RunConfig:
    """Return the checked configuration of some words and of a person's own settings.

    Raises:
        ConfigError: one line with what is wrong.
    """
    own = settings or {}
    return compose_apart([*words, *(word(key, value) for key, value in own.items())])
