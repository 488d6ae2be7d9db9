"""Starts cu-run again and again as a forked child and kills it; test_kill.py runs it in a fork,
with one JSON argument.

Every life of the run is a fork of a process that has imported the libraries: a life costs a second,
not eight.
Works in its working directory: outputs calm (undisturbed), killed0, killed1, ... Prints as JSON
what was on disk at every kill, and
what the run was doing: a number in memory that the child shares says so.
"""

import functools
import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.sharedctypes import RawValue
from pathlib import Path

# What a run does, and for how many seconds at most it is let go on in it before it is killed.
PHASES = {
    "loading": 1.0,
    "base evaluation": 1.0,
    "training": 0.6,
    "merging": 0.02,
    "evaluation": 0.6,
    "commit": 0.03,
    "cache writing": 0.03,
}
phase = RawValue("i", 0)


def watched(name: str, function: Callable) -> Callable:
    """The function, noting that the run is in this phase."""

    @functools.wraps(function)
    def call(*arguments, **options):
        before = phase.value
        if not (before and name == "evaluation"):  # the untouched model's is a phase of its own
            phase.value = list(PHASES).index(name)
        try:
            return function(*arguments, **options)
        finally:
            phase.value = before

    return call


def watch() -> None:
    from cu_runner.runner.measure import Instruments
    from cu_runner.runner.runner import Runner
    from cu_runner.store.cache import Cache
    from cu_runner.store.run_directory import RunStore

    for kind, method, name in (
        (Runner, "_evaluate_base", "base evaluation"),
        (Runner, "_unlearn", "training"),
        (Runner, "_merge", "merging"),
        (Instruments, "measure", "evaluation"),
        (RunStore, "save_step", "commit"),
        (Cache, "put", "cache writing"),
    ):
        setattr(kind, method, watched(name, getattr(kind, method)))


def child(overrides: list[str], outputs: Path) -> int:
    """Fork one life of cu-run; returns its process id."""
    process = os.fork()
    if process:
        return process
    descriptor = os.open(outputs.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from cu_runner.cli.run import main as cu_run

    sys.argv = ["cu-run", *overrides]
    try:
        cu_run()
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(end.code or 0)
    except BaseException:
        os._exit(99)
    os._exit(0)


def files(outputs: Path) -> set[str]:
    """Every file below outputs; os.walk passes over a folder that vanishes under it."""
    return {
        f"{folder}/{name}"
        for folder, _, names in os.walk(outputs)
        for name in names
        if name not in (".lock", "run.log")
    }


def commits(outputs: Path) -> int:
    return sum(name.endswith("/step.json") for name in files(outputs))


def ended(process: int) -> int | None:
    """The exit status of the child, or None while it runs."""
    found, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def live(overrides: list[str], outputs: Path) -> None:
    """One undisturbed life."""
    process = child(overrides, outputs)
    _, status = os.waitpid(process, 0)
    check(os.waitstatus_to_exitcode(status), outputs)


def die(overrides: list[str], outputs: Path, target: str, wait: float) -> dict:
    """One life that is killed `wait` seconds after it has come into the target phase; it may end
    before.
    """
    phase.value, reached = 0, None
    stage, process = commits(outputs), child(overrides, outputs)
    while (status := ended(process)) is None:
        if reached is None and phase.value == list(PHASES).index(target):
            reached = time.monotonic()
        if reached is not None and time.monotonic() - reached >= wait:
            break
        time.sleep(0.0005)
    if status is None:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    else:
        check(status, outputs)
    there = [Path(name) for name in files(outputs) if "/steps/" in name]
    partial = sorted(path.name for path in there if not (path.parent / "step.json").exists())
    hit = list(PHASES)[phase.value]
    return {
        "from": stage,
        "to": commits(outputs),
        "killed": status is None,
        "partial": partial,
        "phase": hit,
    }


def check(status: int, outputs: Path) -> None:
    if status:
        raise SystemExit(f"cu-run ended with {status}: {outputs.with_suffix('.log').read_text()}")


def main() -> None:
    from cu_runner.config.compose import compose

    arguments = json.loads(sys.argv[1])
    watch()
    compose(arguments["overrides"])  # every life composes the same again, from memory
    draw, kills, number = random.Random(arguments["seed"]), [], 0
    merges, targets = "reg=merge" in arguments["overrides"], itertools.cycle(PHASES)
    total, calm = arguments["requests"] + 1, Path("calm").resolve()
    live([*arguments["overrides"], f"paths.outputs={calm}"], calm)
    while len(kills) < arguments["kills"]:
        outputs = Path(f"killed{number}").resolve()
        overrides = [*arguments["overrides"], f"paths.outputs={outputs}"]
        while (stage := commits(outputs)) < total and len(kills) < arguments["kills"]:
            target = next(targets)
            if (stage and target == "base evaluation") or (target == "merging" and not merges):
                continue  # a life in which it does not come
            kill = die(overrides, outputs, target, draw.uniform(0, PHASES[target]))
            if kill["killed"]:
                kills.append(kill)
        live(overrides, outputs)
        number += 1
    print(json.dumps({"kills": kills, "runs": number}))
