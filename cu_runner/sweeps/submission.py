"""What a sweep leaves in its folder before its first job starts: sweep.json, and for every job its command and its run.

Hydra calls NoteJobs (conf/config.yaml, hydra.callbacks) in the process that submits, so that a job which never starts is known too,
and again at the end: what became of jobs in processes of their own is in their notes.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from cu_runner.config.command import words_of
from cu_runner.config.compose import parse
from cu_runner.config.permissions import check_trees, refuse_permissions
from cu_runner.runtime.provenance import git_commit
from cu_runner.schema.errors import ConfigError
from cu_runner.schema.secrets import refuse_secrets
from cu_runner.schema.settings import Cluster, Paths
from cu_runner.schema.validate import validate
from cu_runner.schema.values import walk_leaves
from cu_runner.store.files import to_json, write_atomic
from cu_runner.store.layout import JOB, SWEEP


def note_job(**entries: str) -> None:
    """In a sweep, note in job.json which of the launcher's jobs has begun, its run, and the error with which it ended."""
    from hydra.core.hydra_config import HydraConfig

    from cu_runner.store.files import to_json, write_atomic
    from cu_runner.store.layout import JOB

    node = HydraConfig.get()
    path = Path(node.runtime.output_dir) / JOB
    if path.is_file():  # submission.py wrote it for every job of a sweep but dry runs
        note = json.loads(path.read_text(encoding="utf-8")) | {"job_id": str(node.job.id)}
        note.pop("error", None)
        with contextlib.suppress(OSError):  # a full disk is complained of by the run itself
            write_atomic(path, to_json(note | entries))


SWEEPERS = (
    "BasicSweeper",
    "ListedJobs",
)  # what Hydra is told to sweep with is known before the first job


def note_jobs(config: DictConfig, loader: ConfigLoader) -> None:
    """Compose every job of a sweep and write its notes; a job that cannot run is noted with its error. Raises ConfigError."""
    refuse_secrets(
        walk_leaves(OmegaConf.to_container(config, resolve=False))
    )  # Hydra writes multirun.yaml from it
    validate(
        Cluster, OmegaConf.to_container(config.cluster, resolve=True), "cluster"
    )  # both stand in the scripts of jobs
    validate(Paths, OmegaConf.to_container(config.paths, resolve=True), "paths")
    jobs = jobs_of(config, loader)
    folder, before = Path(config.hydra.sweep.dir), HydraConfig.instance().cfg
    notes = {}
    for number, overrides in enumerate(jobs):
        check_trees(loader, [*config.hydra.overrides.hydra, *overrides], RunMode.RUN)
        job = loader.load_sweep_config(config, overrides)
        with open_dict(job.hydra.job):
            job.hydra.job.num = number
        HydraConfig.instance().set_config(job)
        if note := note_of(job):
            notes[folder / job.hydra.sweep.subdir / JOB] = note
    HydraConfig.instance().cfg = before
    if not notes:
        return
    whole = {
        "command": ["cu-run", *sys.argv[1:]],
        "launcher": config.hydra.launcher["_target_"],
        "git_commit": git_commit(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / SWEEP, to_json(whole))
    for path, note in notes.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, to_json(note))


def jobs_of(config: DictConfig, loader: ConfigLoader) -> list[list[str]]:
    """The overrides of every job that the sweeper is going to launch. Raises ConfigError."""
    sweeper, task = config.hydra.sweeper, list(config.hydra.overrides.task)
    name = str(sweeper.get("_target_")).rpartition(".")[2]
    if name not in SWEEPERS:
        raise ConfigError(
            "hydra/sweeper: only Hydra's basic sweeper and listed know their jobs beforehand; leave it out"
        )
    if name == "ListedJobs":
        if OmegaConf.is_missing(sweeper, "file"):
            raise ConfigError(
                "hydra/sweeper=listed: needs the file of its jobs; add hydra.sweeper.file=JOBS.json"
            )
        return [[*job, *task] for job in read_jobs(sweeper.file)]
    arguments = [f"{key}={value}" for key, value in (sweeper.params or {}).items()] + task
    (jobs,) = BasicSweeper.split_arguments(
        OverridesParser.create(config_loader=loader).parse_overrides(arguments), None
    )
    return jobs


def read_jobs(file: str) -> list[list[str]]:
    """The jobs of a file: a JSON list of lists of overrides, which may not allow any code. Raises ConfigError."""
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"hydra.sweeper.file={file}: cannot be read as JSON ({' '.join(str(error).split())})"
        ) from None
    jobs = validate(list[list[str]], content, file)
    if not jobs:
        raise ConfigError(f"{file}: lists no job")
    for job in jobs:
        refuse_permissions(job, file)
        if swept := [
            each
            for each in OverridesParser.create().parse_overrides(job)
            if each.is_sweep_override()
        ]:
            raise ConfigError(f"{file}: {swept[0].input_line} is several jobs; list each of them")
    return jobs


def note_of(job: DictConfig) -> dict[str, object] | None:
    """job.json of a composed job: run, signature, commit, command, or the error in their place; None for a dry run."""
    note = {"command": ["cu-run", *words_of(job.hydra)], "git_commit": git_commit()}
    try:
        plan = parse(OmegaConf.masked_copy(job, [key for key in job if key != "hydra"]))
    except ValueError as error:
        return note | {"error": " ".join(str(error).split())}
    if plan.spine.dry_run:
        return None
    return note | {"run": str(plan.directory.absolute()), "signature": plan.signature}
