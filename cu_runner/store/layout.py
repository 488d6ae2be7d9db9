"""The files in a run directory and a sweep's folder: a contract, other tools read them."""

from __future__ import annotations

import re
from pathlib import Path

CONFIG, SUMMARY, TABLE = "config.yaml", "summary.json", "metrics.csv"
DELTA, MERGED, TRAINING = "delta.safetensors", "merged.safetensors", "training.csv"
PREDICTIONS, METRICS, GRID, STEP = "predictions.csv", "metrics.json", "grid.png", "step.json"
RECOVERY, RECOVERY_VALUES = "recovery.csv", "recovery_values.csv"  # what probes saw, and measured
EVALUATIONS = "evaluations"  # folder of a run in which cu-eval puts what it measured, a run each
JOB = "job.json"  # in a job's folder: its run directory, signature, command, commit and error
SWEEP = "sweep.json"  # in the sweep's folder: its command, launcher and commit

NUMBER = re.compile(r"\d{2}|[1-9]\d{2,8}", re.ASCII)  # the name of a step's folder

FILE_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)  # what a record or an index may name


def step_dir(run: Path, index: int) -> Path:
    """Return the folder of a step: 00 is the untouched model, 01 what request 1 made, ..."""
    return run / "steps" / f"{index:02d}"


def finished_steps(run: Path) -> list[int]:
    """Return the numbers of the steps that are committed, in order."""
    names = (path.parent.name for path in (run / "steps").glob(f"*/{STEP}"))
    return sorted(int(name) for name in names if NUMBER.fullmatch(name))
