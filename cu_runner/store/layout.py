"""The names of the files in a run directory and in a sweep's folder: a contract, other tools read them."""

from __future__ import annotations

EVALUATIONS = "evaluations"  # folder of a run directory in which cu-eval puts what it measured, a run directory each


DELTA, MERGED, TRAINING = "delta.safetensors", "merged.safetensors", "training.csv"


PREDICTIONS, METRICS, GRID, STEP = "predictions.csv", "metrics.json", "grid.png", "step.json"


JOB = "job.json"  # in a job's folder: the run directory that it writes, its signature, command and commit, its error


SWEEP = "sweep.json"  # in the sweep's folder: its command, launcher and commit
