"""The command that makes a run again: recorded in its config.yaml, below the sha256."""

from __future__ import annotations

import shlex

from omegaconf import DictConfig

from cu_runner.schema.errors import ConfigError
from cu_runner.store.signature import NOT_SCIENTIFIC

PERMISSION = ".allow_pickle"  # changes no result, but the command is refused without it

LONGEST_KEY = 250  # bytes


def words_of(node: DictConfig) -> list[str]:
    """Return the options and overrides of a job, from the hydra node of its configuration."""
    sources, given = node.runtime.config_sources, node.overrides
    trees = [f"--config-dir={each.path}" for each in sources if each.provider == "command-line"]
    searched = [override for override in given.hydra if key_of(override) == "hydra.searchpath"]
    return [*trees, *searched, *given.task]


def key_of(override: str) -> str:
    """Return the key that an override sets."""
    return override.partition("=")[0].lstrip("+~")


def last_of_each(words: list[str]) -> list[str]:
    """Return a command line without the overrides whose key a later one sets, for cu-run."""
    later = {key_of(word): place for place, word in enumerate(words)}
    return [word for place, word in enumerate(words) if place == later[key_of(word)]]


def refuse_long_keys(overrides: list[str]) -> None:
    """Refuse with ConfigError a key for which Hydra would look for a file of too long a name."""
    for key in map(key_of, overrides):
        if len(key.encode(errors="replace")) > LONGEST_KEY:
            raise ConfigError(
                f"unknown key {key[:40]}... ({len(key)} characters); "
                "`cu-run --cfg job` prints every key"
            )


def changes_results(override: str) -> bool:
    """Return whether an override sets a part of the experiment: not a device, a folder, W&B, ..."""
    return not f"{key_of(override)}.".startswith(tuple(f"{name}." for name in NOT_SCIENTIFIC))


def recorded_command(program: str, words: list[str]) -> str:
    """Return a command as one line for a shell, without settings of no experiment."""
    kept = [word for word in words if changes_results(word) or key_of(word).endswith(PERMISSION)]
    return " ".join([program, *map(quote, kept)])


def quote(word: str) -> str:
    r"""Return a word quoted for a shell; what is not printed becomes \uXXXX in $'...'."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + "".join(map(escape, escaped)) + "'"


def escape(character: str) -> str:
    r"""Return a character, or its code if it is not printed.

    That is \xXX of a byte that is no UTF-8, \uXXXX or \UXXXXXXXX of another character.
    """
    number = ord(character)
    if character.isprintable():
        return character
    if 0xDC80 <= number <= 0xDCFF:  # how Python holds such a byte
        return f"\\x{number - 0xDC00:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
