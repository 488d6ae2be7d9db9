"""A failure that a user can mend, as one line: what was wrong, what is allowed, how to fix it."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
import json
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from cu_runner.runtime.paths import GROUPS, PACKAGE, config_dir
from cu_runner.runtime.signals import Stopped
from cu_runner.runtime.user_code import allowed_in, ends_in_own_code, place_of, raised_in
from cu_runner.schema.errors import (
    HubError,
    LaunchError,
    MirrorError,
    ReturnedError,
    SamplingError,
    StoreError,
    TrainingError,
    first_line,
    one_line,
)
from cu_runner.schema.secrets import redact
from cu_runner.schema.values import ConfigTree
from cu_runner.schema.words import did_you_mean, nearest, printable
from cu_runner.trackers.base import Ending

DEBUG = "CU_RUNNER_DEBUG"  # of the environment: 1 shows the traceback of every failure
LAUNCHERS = ("submitit", "hydra_plugins")  # what submits the jobs of a sweep, and waits for them
READERS = ("hydra", "omegaconf", "antlr4", "yaml")  # what reads a user's configuration
OURS = (
    StoreError,
    TrainingError,
    ReturnedError,
    SamplingError,
    LaunchError,
    MirrorError,
    HubError,
)
CONFIG_DIR = ("--config-dir", "-cd")
FREE = "free it of other processes, or take a larger one"
# how Hydra complains of an override that its grammar does not know
SYNTAX = re.compile(r"Lexer|mismatched input|no viable alternative|extraneous input|token recog")
KEY = re.compile(r"[+~]{0,2}[\w./@]+", re.ASCII)  # of an override
NOISE = re.compile(
    r" Config search path:| See https://| full_key:"
    r"| Set the environment variable HYDRA_FULL_ERROR"
)


def explain_error(error: BaseException, overrides: list[str]) -> tuple[int, str]:
    """Return the exit status (2 configuration, 1 run) and the message of what a user can mend.

    What a user cannot mend is raised again.

    Args:
        overrides: the command line, to name what a mistyped choice or key may be.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    out_of_memory = type(error).__name__ == "OutOfMemoryError"
    told = out_of_memory or (isinstance(error, OURS) and not ends_in_own_code(error))
    if not told and raised_in(error, allowed_in(overrides)):
        return explain_own(error)
    if isinstance(error, yaml.YAMLError):
        return 2, f"a configuration file is no valid YAML: {one_line(error)}"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return 2, explain_hydra(one_line(error), overrides)
    if isinstance(error, BrokenPipeError):
        return 1, "whatever read the output has ended (a pipe); what was done is kept"
    if isinstance(error, OSError) and error.errno is not None:
        place = f"{error.filename}: " if error.filename else ""
        output = any(entry.partition("=")[0] == "--output" for entry in overrides)
        mend = f"mend that or choose another {'--output' if output else 'paths.outputs'}"
        return 1, f"{place}{error.strerror}; {mend}, then run the same command to resume"
    if isinstance(error, ExceptionGroup):
        found = dict.fromkeys(explain_error(each, overrides) for each in error.exceptions)
        return max(status for status, _ in found), "; ".join(message for _, message in found)
    if isinstance(error, ValueError):
        return 2, one_line(error)
    if raised_by(error) in LAUNCHERS:
        return 1, (
            f"the launcher says: {first_line(error)}; jobs that it began go on; "
            "`cu-sweep status outputs/sweeps/DATE` tells what became of each"
        )
    if isinstance(error, RuntimeError) and out_of_memory:
        return 1, f"out of GPU memory; {vars(error).get('advice', FREE)}"
    if isinstance(error, OURS):
        return 1, one_line(error)
    if raised_by(error) in READERS:  # an assertion, a KeyError, ... on unexpected input
        said = f"{type(error).__name__}: {one_line(error)}"
        return 2, f"the configuration cannot be composed ({said}); `cu-run --help` shows the form"
    package = raised_by(error)
    if isinstance(error, ImportError | RuntimeError) and package != PACKAGE.name:
        name = type(error).__name__.lstrip("_")
        return 1, f"{package}: {name}: {one_line(error)}; {where_more_is(error)}"
    raise error


def ending_of(error: BaseException) -> Ending:
    """Return how a run ended that an error ended, as its trackers are told."""
    if isinstance(error, Stopped):
        return Ending("interrupted", error.status, str(error))
    if isinstance(error, KeyboardInterrupt):
        return Ending("interrupted", 130, "interrupted")
    try:
        status, message = explain_error(error, sys.argv[1:])
    except BaseException:  # no one can mend it: it is ours
        return Ending("crashed", 1, redact(f"{type(error).__name__}: {one_line(error)}"))
    return Ending("failed", status, redact(message))


def explain_own(error: BaseException) -> tuple[int, str]:
    """Return status and message of what a user's own code raised: where, and what holds more."""
    where = f"{place_of(error)}: {type(error).__name__}"
    said = f"{where}: {one_line(error)}; raised in your own code, {where_more_is(error)}"
    return 1 if "log" in vars(error) else 2, said


def where_more_is(error: BaseException) -> str:
    """Return what holds the traceback of an error: the log of a run that had begun."""
    log = vars(error).get("log")
    return f"{log} holds the traceback" if log else f"{DEBUG}=1 shows the traceback"


def raised_by(error: BaseException) -> str:
    """Return the package in whose code an exception was raised."""
    trace = error.__traceback__
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]


def explain_hydra(text: str, overrides: list[str]) -> str:
    """Return Hydra's message in our words where its cause is frequent, else without its noise."""
    if found := re.search(r"Could not (?:find|load) '((?:hydra/)?\w+)/([^']+)'", text):
        group, name = found.groups()
        allowed = ", ".join(sorted(files_of(group, overrides))) or "none ships yet"
        return f"{group}={name}: no such file in conf/{group}; allowed: {allowed}"
    if found := re.search(r"Could not override '([\w.]+)'", text):
        key = found[1]
        if key in GROUPS:  # a group without a single file
            given = next(entry for entry in overrides if entry.startswith(key))
            return f"{given}: conf/{key} holds no file yet"
        parent = key.rpartition(".")[0]
        if takes(key, overrides) or takes(parent, overrides):
            return f"{key}: its file does not set it; add it with a plus: +{key}=..."
        if beside := sibling_keys(key, overrides):
            head, dot, last = key.rpartition(".")
            meant = nearest(last, beside)
            hint = f"; did you mean {head}{dot}{meant}?" if meant else ""
            return f"unknown key {key}{hint}; allowed: {', '.join(beside)}"
        meant = did_you_mean(key, top_keys()) if "." not in key else ""
        return f"unknown key {key}{meant}; `cu-run --cfg job` prints every key"
    if SYNTAX.search(text) and (unread := unreadable(overrides)):
        return unread
    merged = re.search(r"Error merging override \+([\w.]+)=", text)
    appended = re.search(r"Could not append to config. An item is already at '([\w.]+)'", text)
    if found := merged or appended:
        return f"+{found[1]}: is set already, and a plus adds what is not; write {found[1]}=..."
    if found := re.search(r"Error merging override (.*)", text):
        return f"{found[1]}: is a list, a mapping or a value where its file has another of these"
    if found := re.search(r"'([\w/]+)': ConfigTypeError raised .*Cannot merge \w+ with", text):
        what = "has a list where the file that it changes has a mapping, or the other way round"
        return f"{found[1]}.yaml: {what}"
    if found := re.search(r"Key '(\w+)' is not in struct", text):
        return f"{found[1]}: choose one file, as in {found[1]}=NAME; only reg takes a list"
    # one of our own resolvers may have raised it
    said, text = text, text.partition(" raised while resolving interpolation: ")[2] or text
    ours = "ConfigError raised while" in said  # and says itself how to mend it
    text = NOISE.split(text)[0]
    if ours:
        return text
    return f"{text}; overrides are KEY=VALUE, `cu-run --help` lists every group and option"


def unreadable(words: list[str]) -> str | None:
    """Return what to do about the first override that Hydra cannot read; None if it reads all."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    for word in words:
        key, given, value = word.partition("=")
        if not given or KEY.fullmatch(key) is None:
            continue
        try:
            parser.parse_override(word)
        except HydraException:
            is_list = value.startswith("[") and value.endswith("]")
            names = value[1:-1].split(",") if is_list else [value]
            quoted = ",".join(json.dumps(name.strip(), ensure_ascii=False) for name in names)
            meant = shlex.quote(f"{key}=[{quoted}]" if is_list else f"{key}={quoted}")
            said = f"{word}: cannot be read; put it in quotes, for Hydra and for the shell: {meant}"
            return " ".join(said.split())  # a value may hold line breaks
    return None


def top_keys() -> list[str]:
    """Return the keys that a command line may begin with: groups and those of config.yaml."""
    return [*GROUPS, *(str(key) for key in read(config_dir() / "config.yaml") if key != "defaults")]


def sibling_keys(key: str, overrides: list[str]) -> list[str]:
    """Return the keys beside a mistyped one, of config.yaml or its group's file; [] if unknown."""
    parents = key.split(".")[:-1]
    if not parents:
        return []
    node: Any = read(config_dir() / "config.yaml")
    chosen = choices(overrides)
    if parents[0] == "reg":
        if len(parents) == 1:
            return []
        if parents[1] not in str(chosen["reg"]):
            reg, name = chosen["reg"], parents[1]
            return [f"none of reg.{name}.*, since reg={reg}; choose reg={name} first"]
        node = {"reg": read(files_of("reg", overrides).get(parents[1]))}
    elif parents[0] in chosen:
        node = {parents[0]: read(files_of(parents[0], overrides).get(chosen[parents[0]]))}
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    return sorted(map(str, set(node) - {"_target_"})) if isinstance(node, dict) else []


def choices(overrides: list[str]) -> dict[str, str]:
    """Return the chosen file of each group, by default or by the command line."""
    entries = read(config_dir() / "config.yaml")["defaults"]
    chosen = {
        group: name for entry in entries if isinstance(entry, dict) for group, name in entry.items()
    }
    return chosen | dict(override.split("=", 1) for override in overrides if "=" in override)


def takes(key: str, overrides: list[str]) -> bool:
    """Tell whether what a chosen file of conf/ makes has an argument that the file leaves out."""
    group, _, name = key.rpartition(".")
    ours = {path.stem: path for path in (config_dir() / group).glob("*.yaml")}
    content = read(ours.get(choices(overrides).get(group, "")))
    if "_target_" not in content:
        return False
    module, _, made = str(content["_target_"]).rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), made)).parameters
    return name in parameters and name != "device"


def files_of(group: str, words: list[str]) -> dict[str, Path]:
    """Return the files of a group by name: those of conf/ and of the tree of --config-dir."""
    given = [after for word, after in itertools.pairwise(words) if word in CONFIG_DIR]
    given += [word.partition("=")[2] for word in words if word.startswith("--config-dir=")]
    folders = [Path(tree) / group for tree in given] + [config_dir() / group]
    return {path.stem: path for folder in folders for path in folder.glob("*.yaml")}


def read(path: Path | None) -> ConfigTree:
    """Return a configuration file as plain values; empty if there is none."""
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path else {}


@contextlib.contextmanager
def one_line_failures(
    program: str, statuses: list[int] | None = None, note: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Turn a failure that a user can mend into one line on stderr and an exit status.

    2 is bad input, 1 a failed run, 130 interrupted, 128 + its number a signal that asked a run to
    stop. Anything else is ours and is raised.

    Args:
        program: the command's name, at the start of the line.
        statuses: takes the status instead, so that the process goes on (a sweep).
        note: is told the line, too.
    """
    again = "Run the same command again to"
    try:
        yield
    except Stopped as stopped:
        tell(f"{program}: {stopped}; what was done is kept. {again} go on")
        stopped.requeue()
        sys.exit(stopped.status)
    except KeyboardInterrupt:
        tell(f"{program}: interrupted; finished requests are kept. {again} resume")
        sys.exit(130)
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and not raised_in(error, allowed_in(sys.argv[1:])):
            raise
        if os.environ.get(DEBUG) == "1":
            tell("".join(traceback.format_exception(error)).rstrip())
        status, message = explain_error(error, sys.argv[1:])
        log = None if isinstance(error, BrokenPipeError) else vars(error).get("log")
        if log is not None and str(log) not in message:
            message += f"; {where_more_is(error)}"
        if getattr(error, "told", False):  # by the first of several processes
            sys.exit(status)
        tell(f"{program}: {message}")
        if note is not None:
            note(redact(message))
        if statuses is None:
            sys.exit(status)
        statuses.append(status)


def tell(line: str) -> None:
    """Print a line on stderr, without secrets of the environment."""
    print(printable(redact(line)), file=sys.stderr, flush=True)
