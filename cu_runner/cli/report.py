"""cu-report: runs as one HTML page that needs no network: what was forgotten and kept after each request, samples, drift, cost.

Exit status: 0 done, 1 a run is damaged, the page cannot be written or W&B failed, 2 paths or options are wrong, 130 interrupted.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import NoReturn

from cu_runner.cli.console import Parser, whole_number
from cu_runner.store.run_record import RunRecord


def main() -> None:
    """Entry point of `cu-report`."""
    parser = Parser(prog="cu-report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="run directories, or folders that hold some: a sweep, outputs/runs",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where the page goes; default: outputs/reports/NAME",
    )
    parser.add_argument(
        "--details",
        type=whole_number,
        default=12,
        metavar="N",
        help="accuracy matrix, samples and configuration of the first N runs (%(default)s)",
    )
    parser.add_argument(
        "--wandb",
        choices=("online", "offline"),
        help="also send the runs to W&B, into the project of their own configuration",
    )
    parser.add_argument(
        "--pack",
        type=Path,
        metavar="FILE",
        help="instead of a page, write one finished run into a zip archive",
    )
    arguments = parser.parse_args()
    try:
        if arguments.pack:
            pack_one(arguments.paths, arguments.pack)
            return
        produce(arguments.paths, arguments.output, arguments.details, arguments.wandb)
    except KeyboardInterrupt:
        fail(130, "interrupted; run the same command again")


def fail(status: int, message: str) -> NoReturn:
    sys.stderr.write(f"cu-report: {message}\n")
    sys.exit(status)


def produce(paths: list[Path], output: Path | None, details: int, wandb: str | None) -> None:
    """Read the runs, write the page and its plots, and say where they are; send the runs to W&B if asked to."""
    from cu_runner.config.compose import compose
    from cu_runner.reporting.page import write_page
    from cu_runner.reporting.page_data import (
        read_all,  # imported here: torch takes seconds, --help must not
    )
    from cu_runner.schema.errors import StoreError
    from cu_runner.store.files import write_atomic
    from cu_runner.store.run_record import find_runs

    try:
        directories = list(dict.fromkeys(path.resolve() for path in find_runs(paths)))
    except StoreError as error:
        fail(2, str(error))
    folder = output or Path("outputs/reports") / report_name(paths, directories)
    try:
        runs, unstarted = read_all(directories)
        remarks = []
        if len(runs) > details:
            remarks.append(
                f"Accuracy matrix, samples and configuration are given for the first {details} of {len(runs)} runs (--details)."
            )
        if unstarted:
            remarks.append(f"Left out, since no step is finished: {', '.join(unstarted)}.")
        (folder / "plots").mkdir(parents=True, exist_ok=True)
        write_atomic(
            folder / "index.html",
            write_page(runs, folder / "plots", details, remarks, compose).encode(),
        )
    except StoreError as error:
        fail(1, str(error))
    except OSError as error:
        fail(
            1,
            f"{error.filename or folder}: {error.strerror or error}; mend that or choose another --output",
        )
    unsent = send_all([shown.run for shown in runs], wandb) if wandb else None
    sys.stdout.write(
        "".join(f"{remark}\n" for remark in remarks) + f"report: {folder / 'index.html'}\n"
    )
    if unsent:
        fail(1, unsent)


def pack_one(paths: list[Path], target: Path) -> None:
    """Write the only run among the paths into one file, and say how it is looked at elsewhere."""
    from cu_runner.schema.errors import StoreError
    from cu_runner.store.archive import pack
    from cu_runner.store.run_record import find_runs, read_run

    try:
        directories = find_runs(paths)
        if len(directories) != 1:
            fail(2, f"--pack takes one run, not {len(directories)}; give its directory")
        pack(read_run(directories[0]), target)
    except StoreError as error:
        fail(1, str(error))
    except OSError as error:
        fail(
            1,
            f"{error.filename or target}: {error.strerror or error}; mend that or choose another FILE",
        )
    sys.stdout.write(
        f"packed: {target}; `cu-doctor {target}` verifies it, `unzip {target} -d outputs/runs` makes it a run again\n"
    )


def send_all(runs: list[RunRecord], mode: str) -> str | None:
    """Mirror the runs to W&B, which writes its own files under the outputs folder of their configuration.

    Returns:
        Which run was not sent, nor those after it, and why; None if all were.
    """
    from cu_runner.runner.tracking import send
    from cu_runner.schema.errors import MirrorError
    from cu_runner.schema.settings import WandbSettings

    for run in runs:
        named = run.config["wandb"]
        try:
            send(
                run,
                WandbSettings(mode, named["project"], named["entity"]),
                Path(run.config["paths"]["outputs"]),
            )
        except MirrorError as error:
            return f"{run.directory.name}: not sent to W&B ({mode}): {error}; run the same command again to send what is missing"
        sys.stdout.write(f"sent to W&B ({mode}): {run.directory.name}\n")
    return None


def report_name(paths: list[Path], directories: list[Path]) -> str:
    """Of the run, of the folder, or "N-runs-<hash of their names>"."""
    if len(paths) == 1:
        return paths[0].resolve().name
    if len(directories) == 1:
        return directories[0].name
    names = "\n".join(sorted(directory.name for directory in directories))
    return f"{len(directories)}-runs-{hashlib.sha256(names.encode()).hexdigest()[:8]}"
