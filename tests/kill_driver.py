"""Starts cu-run again and again as a forked child and kills it; run by test_kill.py with one JSON argument.

One process imports the libraries, every life of the run is a fork of it: a life costs a second, not eight.
Works in its working directory: outputs calm (undisturbed), killed0, killed1, ... Prints as JSON what was on disk at every kill.
"""

import json
import math
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path


def child(overrides: list[str], outputs: Path) -> int:
    """Fork one life of cu-run; returns its process id."""
    process = os.fork()
    if process:
        return process
    descriptor = os.open(outputs.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["cu-run", *overrides]
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(end.code or 0)
    except BaseException:
        os._exit(99)
    os._exit(0)


def files(outputs: Path) -> set[str]:
    """Every file below outputs; os.walk passes over a folder that vanishes under it."""
    return {f"{folder}/{name}" for folder, _, names in os.walk(outputs) for name in names if name not in (".lock", "run.log")}


def commits(outputs: Path) -> int:
    return sum(name.endswith("/step.json") for name in files(outputs))


def ended(process: int) -> int | None:
    """The exit status of the child, or None while it runs."""
    found, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def live(overrides: list[str], outputs: Path) -> list[float]:
    """One undisturbed life; the seconds at which each step was committed."""
    began, process, moments = time.monotonic(), child(overrides, outputs), []
    while (status := ended(process)) is None:
        if commits(outputs) > len(moments):
            moments.append(time.monotonic() - began)
        time.sleep(0.002)
    check(status, outputs)
    return moments


def die(overrides: list[str], outputs: Path, enough: Callable[[float], bool]) -> dict:
    """One life that is killed as soon as enough(its seconds)."""
    began, stage, process = time.monotonic(), commits(outputs), child(overrides, outputs)
    while (status := ended(process)) is None and not enough(time.monotonic() - began):
        time.sleep(0.001)
    if status is None:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    else:
        check(status, outputs)
    there = [Path(name) for name in files(outputs) if "/steps/" in name]
    partial = sorted(path.name for path in there if not (path.parent / "step.json").exists())
    return {"from": stage, "to": commits(outputs), "killed": status is None, "partial": partial}


def check(status: int, outputs: Path) -> None:
    if status:
        raise SystemExit(f"cu-run ended with {status}: {outputs.with_suffix('.log').read_text()}")


def plan(draw: random.Random, outputs: Path, moments: list[float], early: int) -> Callable[[float], bool]:
    """When to kill a life: after some seconds, after some changes among the files; at the latest when a step is committed."""
    stage, last = commits(outputs), files(outputs)
    length = moments[0] + (moments[stage] - moments[stage - 1] if stage else 0)
    moment = draw.uniform(0.02, length) if early % 2 == 0 and early < 7 else math.inf
    changes = draw.randint(1, 12) if early % 2 == 1 and early < 7 else math.inf
    return lambda seconds: seconds > moment or len(files(outputs) ^ last) >= changes or commits(outputs) > stage


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    import diffusers
    import torch
    import transformers

    from cu_runner.cli import main

    # imported lazily by the libraries: named here so that every life finds them in memory
    lazy = [diffusers.UNet2DConditionModel, diffusers.AutoencoderKL, diffusers.DPMSolverMultistepScheduler]
    lazy += [transformers.CLIPTextModel, transformers.CLIPTokenizer, transformers.ResNetForImageClassification]

    torch.set_num_threads(1)
    draw, kills, early = random.Random(arguments["seed"]), [], Counter()
    total, calm, number = arguments["requests"] + 1, Path("calm").resolve(), 0
    moments = live([*arguments["overrides"], f"paths.outputs={calm}"], calm)
    while len(kills) < arguments["kills"]:
        outputs = Path(f"killed{number}").resolve()
        overrides = [*arguments["overrides"], f"paths.outputs={outputs}"]
        while commits(outputs) < total and len(kills) < arguments["kills"]:
            stage = commits(outputs)
            kill = die(overrides, outputs, plan(draw, outputs, moments, early[stage]))
            early[stage] += 1
            kills.append(kill)
        live(overrides, outputs)
        number, early = number + 1, Counter()
    print(json.dumps({"kills": kills, "runs": number}))
