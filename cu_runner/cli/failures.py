"""Every failure that a user can mend as one line: what was wrong, what is allowed, how to fix it."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from cu_runner.runtime.paths import GROUPS, config_dir
from cu_runner.runtime.signals import Stopped
from cu_runner.schema.errors import first_line, one_line
from cu_runner.schema.secrets import redact

LAUNCHERS = ("submitit", "hydra_plugins")  # what submits the jobs of a sweep, and waits for them


READERS = ("hydra", "omegaconf", "antlr4", "yaml")  # what reads a user's configuration


def explain_error(error: Exception, overrides: list[str]) -> tuple[int, str]:
    """Exit status (2 configuration, 1 run) and message; raises the error again if it is not one that a user can mend.

    overrides: the command line, to name what a mistyped choice or key may be.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, yaml.YAMLError):
        return 2, f"a configuration file is no valid YAML: {one_line(error)}"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return 2, explain_hydra(one_line(error), overrides)
    if isinstance(error, BrokenPipeError):
        return 1, "whatever read the output has ended (a pipe); what was done is kept"
    if isinstance(error, OSError) and error.errno is not None:
        place = f"{error.filename}: " if error.filename else ""
        setting = (
            "--output"
            if any(entry.partition("=")[0] == "--output" for entry in overrides)
            else "paths.outputs"
        )
        return (
            1,
            f"{place}{error.strerror}; mend that or choose another {setting}, then run the same command to resume",
        )
    if isinstance(error, ValueError):
        return 2, one_line(error)
    if raised_by(error) in LAUNCHERS:
        said = f"the launcher says: {first_line(error)}"
        return (
            1,
            f"{said}; jobs that it began go on; `cu-sweep status outputs/sweeps/DATE` tells what became of each",
        )
    if isinstance(error, RuntimeError):
        if type(error).__name__ == "OutOfMemoryError":
            less = "train.gradient_checkpointing=true and a lower eval.batch_size need less of it and resume this run"
            return 1, f"out of GPU memory; {less}; a lower train.batch_size begins another"
        from cu_runner.schema.errors import (
            LaunchError,
            MirrorError,
            SamplingError,
            StoreError,
            TrainingError,
        )

        if isinstance(
            error, StoreError | TrainingError | SamplingError | LaunchError | MirrorError
        ):
            return 1, one_line(error)
    if (
        raised_by(error) in READERS
    ):  # an assertion, a KeyError, ... on input that they did not expect
        return (
            2,
            f"the configuration cannot be composed ({type(error).__name__}: {one_line(error)}); `cu-run --help` shows the form",
        )
    raise error


def raised_by(error: BaseException) -> str:
    """The package in whose code an exception was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return (
        str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        if trace is not None
        else ""
    )


def explain_hydra(text: str, overrides: list[str]) -> str:
    """Hydra's message in our words where it has a frequent cause, else its own without the noise."""
    if found := re.search(r"Could not (?:find|load) '((?:hydra/)?\w+)/([^']+)'", text):
        group, name = found.groups()
        names = sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))
        return f"{group}={name}: no such file in conf/{group}; allowed: {', '.join(names) or 'none ships yet'}"
    if found := re.search(r"Could not override '([\w.]+)'", text):
        key = found[1]
        if key in GROUPS:  # a group without a single file
            return f"{next(entry for entry in overrides if entry.startswith(key))}: conf/{key} holds no file yet"
        allowed = sibling_keys(key, overrides)
        return (
            f"unknown key {key}; allowed: {', '.join(allowed)}"
            if allowed
            else f"unknown key {key}; `cu-run --cfg job` prints every key"
        )
    if found := re.search(r"Key '(\w+)' is not in struct", text):
        return f"{found[1]}: choose one file, as in {found[1]}=NAME; only reg takes a list"
    if cause := text.partition(" raised while resolving interpolation: ")[
        2
    ]:  # of one of our own resolvers
        text = cause
    for noise in (
        " Config search path:",
        " See https://",
        " full_key:",
        " Set the environment variable HYDRA_FULL_ERROR",
    ):
        text = text.partition(noise)[0]
    return f"{text}; overrides are KEY=VALUE, `cu-run --help` lists every group and option"


def sibling_keys(key: str, overrides: list[str]) -> list[str]:
    """The keys that stand beside a mistyped one, in config.yaml or in the chosen file of its group; empty if unknown."""
    parents = key.split(".")[:-1]
    if not parents:
        return []
    node = read(config_dir() / "config.yaml")
    chosen = {
        group: name
        for default in node["defaults"]
        if isinstance(default, dict)
        for group, name in default.items()
    }
    chosen |= dict(override.split("=", 1) for override in overrides if "=" in override)
    if parents[0] == "reg":
        if len(parents) == 1:
            return []
        node = {"reg": read(config_dir() / "reg" / f"{parents[1]}.yaml")}
    elif parents[0] in chosen:
        node = {parents[0]: read(config_dir() / parents[0] / f"{chosen[parents[0]]}.yaml")}
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    if parents[0] == "reg" and parents[1] not in str(chosen["reg"]):
        return [
            f"none of reg.{parents[1]}.*, since reg={chosen['reg']}; choose reg={parents[1]} first"
        ]
    return (
        sorted(str(name) for name in node if name != "_target_") if isinstance(node, dict) else []
    )


def read(path: Path) -> dict[str, object]:
    """A configuration file as plain values; empty if it is not one of ours."""
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


@contextlib.contextmanager
def one_line_failures(
    program: str, statuses: list[int] | None = None, note: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Turn a failure that a user can mend into one line on stderr and an exit status: 2 bad input, 1 failed, 130 interrupted,
    128 + its number for a signal that asked a run to stop.

    Anything else is ours and is raised. statuses: takes the status instead, so that the process goes on (a sweep). note: is told
    the line, too.
    """
    try:
        yield
    except Stopped as stopped:
        print(
            f"{program}: {stopped}; what was done is kept. Run the same command again to go on",
            file=sys.stderr,
            flush=True,
        )
        stopped.requeue()
        sys.exit(stopped.status)
    except KeyboardInterrupt:
        print(
            f"{program}: interrupted; finished requests are kept. Run the same command again to resume",
            file=sys.stderr,
        )
        sys.exit(130)
    except Exception as error:
        status, message = explain_error(error, sys.argv[1:])
        if getattr(error, "told", False):  # by the first of several processes
            sys.exit(status)
        print(redact(f"{program}: {message}"), file=sys.stderr, flush=True)
        if note is not None:
            note(redact(message))
        if statuses is None:
            sys.exit(status)
        statuses.append(status)
