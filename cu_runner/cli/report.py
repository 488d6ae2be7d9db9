"""cu-report: runs as one HTML page that needs no network: what was forgotten and kept after each
request, samples, drift, cost. Runs that differ in their seed alone are one row: their mean.

Exit status: 0 done, 1 a run is damaged, the page cannot be written or W&B failed, 2 paths or
options are wrong, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import hashlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from cu_runner.cli.console import (
    Parser,
    add_config_dir,
    say,
    whole_number,
    without_permissions,
    without_reader,
)
from cu_runner.cli.failures import one_line_failures
from cu_runner.schema.values import ConfigTree, walk_leaves
from cu_runner.store.run_record import RunRecord

OURS = "cu_runner"  # package of every class that is nobody's own


@without_reader
def main() -> None:
    """Call `cu-report` with its command line."""
    parser = Parser(prog="cu-report", description=__doc__)
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="run directories, or folders that hold some: a sweep, outputs/runs; allow_modules=... "
        "is taken as by the other commands, and nothing needs it",
    )
    add_config_dir(parser)
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
        help="accuracy matrix, samples and configuration of the first N runs, and of the first N "
        "seeds of each (%(default)s)",
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
    arguments = parser.parse_intermixed_args()
    paths = [Path(text) for text in without_permissions(arguments.paths)]
    if not paths:
        parser.error("give a run, or a folder that holds some")
    with one_line_failures("cu-report"):
        directories = directories_of(paths)
        if arguments.pack:
            pack_one(directories, arguments.pack)
        else:
            folder = arguments.output
            folder = folder or Path("outputs/reports") / report_name(paths, directories)
            produce(paths, directories, folder, arguments.details, arguments.wandb)


def produce(
    paths: list[Path],
    directories: list[Path],
    folder: Path,
    details: int,
    wandb: Literal["online", "offline"] | None,
) -> None:
    """Write the page and its plots, and print where they are; send the runs to W&B if asked to.

    Args:
        paths: of the command line. directories: the runs in them.
    """
    from cu_runner.reporting.page import write_page
    from cu_runner.reporting.page_groups import read_all
    from cu_runner.store.files import write_atomic

    noted, refused = failed_jobs(paths)
    groups, remarks = read_all(directories, noted)
    remarks += refused
    for count, what in ((len(groups), "runs"), (max(len(each.runs) for each in groups), "seeds")):
        if count > details:
            given = f"for the first {details} of {count} {what} (--details)"
            remarks.append(f"Accuracy matrix, samples and configuration are given {given}.")
    with writing_to(folder, "--output"):
        (folder / "plots").mkdir(parents=True, exist_ok=True)
        page = write_page(groups, folder / "plots", details, remarks)
        write_atomic(folder / "index.html", page.encode())
    try:
        if wandb:
            send_all([run for group in groups for run in group.runs], wandb)
    finally:
        lines = [*remarks, f"report: {folder / 'index.html'}"]
        say("\n".join(lines))


def pack_one(directories: list[Path], target: Path) -> None:
    """Write the only one of these runs into a file, and print how it is used elsewhere."""
    from cu_runner.store.archive import pack
    from cu_runner.store.run_record import read_run

    if len(directories) != 1:
        raise ValueError(f"--pack takes one run, not {len(directories)}; give its directory")
    with writing_to(target, "FILE"):
        run = read_run(directories[0])
        pack(run, target)
    words, where = ["cu-doctor", str(target)], ""
    if modules := own_modules(run.config):
        words.append(f"allow_modules=[{','.join(modules)}]")
        where = " where these modules can be imported"
    again = f"`{shlex.join(['unzip', str(target), '-d', 'outputs/runs'])}` makes it a run again"
    say(f"packed: {target}; `{shlex.join(words)}` verifies it{where}, {again}")


def own_modules(config: ConfigTree) -> list[str]:
    """Return the modules of the user's own code that a run's configuration names."""
    targets = {str(name) for path, name in walk_leaves(config) if path.endswith("._target_")}
    return sorted({name.rpartition(".")[0] for name in targets if name.partition(".")[0] != OURS})


def failed_jobs(paths: list[Path]) -> tuple[dict[Path, str], list[str]]:
    """Return how jobs of sweeps failed: by run directory, and lines about those that have none."""
    from cu_runner.store.layout import JOB
    from cu_runner.sweeps.job_note import read_job_note

    noted: dict[Path, str] = {}
    refused = []
    for job in (job for path in paths for job in sorted(path.glob(f"**/{JOB}"))):
        note = read_job_note(job)
        if note.error is not None and note.run is not None:
            noted[Path(note.run).resolve()] = note.error
        elif note.error is not None:
            refused.append(f"Could not be run: {shlex.join(note.command)} ({note.error})")
    return noted, refused


def directories_of(paths: list[Path]) -> list[Path]:
    """Return the run directories among the paths, each once; ValueError if a path has none."""
    from cu_runner.schema.errors import StoreError
    from cu_runner.store.run_record import find_runs

    try:
        return list(dict.fromkeys(path.resolve() for path in find_runs(paths)))
    except StoreError as error:
        raise ValueError(str(error)) from None


@contextlib.contextmanager
def writing_to(place: Path, option: str) -> Iterator[None]:
    """Turn an OSError into a StoreError that names the option by which to write elsewhere."""
    from cu_runner.schema.errors import StoreError

    try:
        yield
    except OSError as error:
        what = f"{error.filename or place}: {error.strerror or error}"
        raise StoreError(f"{what}; mend that or choose another {option}") from None


def send_all(runs: list[RunRecord], mode: Literal["online", "offline"]) -> None:
    """Mirror the runs to W&B, which writes its own files under their outputs folder.

    Raises:
        MirrorError: a run was not sent, nor were those after it.
    """
    from cu_runner.schema.errors import MirrorError
    from cu_runner.trackers.mirror import send
    from cu_runner.trackers.wandb import Wandb

    for run in runs:
        named, outputs = run.config["wandb"], Path(run.config["paths"]["outputs"])
        try:
            send(run, Wandb(mode, named["project"], named["entity"]), outputs)
        except MirrorError as error:
            why = f"{run.directory.name}: not sent to W&B ({mode}): {error}"
            raise MirrorError(
                f"{why}; run the same command again to send what is missing"
            ) from None
        say(f"sent to W&B ({mode}): {run.directory.name}")


def report_name(paths: list[Path], directories: list[Path]) -> str:
    """Return the name of the run, of the folder, or "N-runs-<hash of their names>"."""
    if len(paths) == 1:
        return paths[0].resolve().name
    if len(directories) == 1:
        return directories[0].name
    names = "\n".join(sorted(directory.name for directory in directories))
    digest = hashlib.sha256(names.encode()).hexdigest()
    return f"{len(directories)}-runs-{digest[:8]}"
