"""cu-sweep: what became of the jobs of a sweep: done, running, queued, pending, or failed and why;
and how to run the rest.

    cu-sweep status outputs/sweeps/2026-01-31_12-00-00

Nothing is written and no lock is taken from a run. Exit status: 0, 1 a job failed, 2 the folder is
no sweep's, 130 interrupted.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from cu_runner.cli.console import (
    Parser,
    add_config_dir,
    say,
    without_permissions,
    without_reader,
)
from cu_runner.cli.failures import one_line_failures
from cu_runner.sweeps.job_note import read_sweep_note
from cu_runner.sweeps.status import STATES, Job, read_sweep


@without_reader
def main() -> None:
    """Call `cu-sweep` with its command line."""
    parser = Parser(prog="cu-sweep", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="status")
    status = commands.add_parser(
        "status", help="a line for each job, and the commands that run what is missing"
    )
    status.add_argument(
        "folders",
        nargs="+",
        metavar="DIR",
        help="folder of a sweep: outputs/sweeps/DATE; allow_modules=... is taken as by the other "
        "commands, and nothing needs it",
    )
    add_config_dir(status)
    status.add_argument("--json", action="store_true", help="the same as JSON: a list of jobs")
    arguments = parser.parse_args()
    folders = [Path(text) for text in without_permissions(arguments.folders)]
    if not folders:
        parser.error("give the folder of a sweep: outputs/sweeps/DATE")
    with one_line_failures("cu-sweep"):
        jobs = [job for folder in folders for job in read_sweep(folder)]
        if arguments.json:
            print(json.dumps([asdict(job) for job in jobs], indent=2))
        else:
            say(as_text(jobs, folders))
        sys.exit(1 if any(job.state == "failed" for job in jobs) else 0)


def as_text(jobs: list[Job], folders: list[Path]) -> str:
    """Return a line for each job, their number by state, and commands that run what is missing."""
    lines = []
    for job in jobs:
        why = f"  ({job.why})" if job.why else ""
        lines.append(f"{job.number:>4}  {job.state:<8} {shlex.join(job.command[1:])}{why}")
    counts = Counter(job.state for job in jobs)
    said = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    lines.append(f"{len(jobs)} jobs: {said or 'none'}")
    if missing := [job for job in jobs if job.state in ("failed", "pending")]:
        lines += ["", "To run what is missing, one by one:"]
        lines += [f"  {shlex.join(job.command)}" for job in missing]
        lines += ["or all (runs that are done do nothing):"]
        lines += [f"  {shlex.join(read_sweep_note(folder).command)}" for folder in folders]
    return "\n".join(lines)
