"""What a sweep leaves in its folder before its first job starts: a note of itself and of every job.

Hydra calls NoteJobs (conf/config.yaml, hydra.callbacks) in the process that submits, so that a job
which never starts is known too, and again at the end: what became of jobs in processes of their own
is in their notes.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from pydantic import PositiveInt

from cu_runner.config.command import words_of
from cu_runner.config.compose import parse, without_hydra
from cu_runner.config.permissions import check_trees, refuse_permissions
from cu_runner.runtime.provenance import git_commit
from cu_runner.schema.errors import ConfigError, one_line
from cu_runner.schema.json_files import parse_json
from cu_runner.schema.secrets import redact, refuse_secrets
from cu_runner.schema.settings import Cluster, Paths
from cu_runner.schema.validate import validate
from cu_runner.schema.values import walk_leaves
from cu_runner.store.layout import JOB, SWEEP
from cu_runner.sweeps.job_note import JobNote, SweepNote, write_note

# of these it is known before the first job what they launch
SWEEPERS = ("BasicSweeper", "ListedJobs")


def note_jobs(config: DictConfig, loader: ConfigLoader) -> None:
    """Compose every job of a sweep and write its notes; one that cannot run with its error.

    Raises:
        ConfigError: the sweep may not be submitted.
    """
    # Hydra writes multirun.yaml from it
    refuse_secrets(walk_leaves(OmegaConf.to_container(config, resolve=False)))
    # both stand in the scripts of jobs
    validate(Cluster, OmegaConf.to_container(config.cluster, resolve=True), "cluster")
    validate(Paths, OmegaConf.to_container(config.paths, resolve=True), "paths")
    at_once = config.hydra.launcher.get("at_once")  # of local_processes
    validate(PositiveInt | None, at_once, "hydra.launcher.at_once")
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
    folder.mkdir(parents=True, exist_ok=True)
    command, launcher = ["cu-run", *sys.argv[1:]], str(config.hydra.launcher["_target_"])
    write_note(folder / SWEEP, SweepNote(command, git_commit(), launcher))
    for path, note in notes.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_note(path, note)


def jobs_of(config: DictConfig, loader: ConfigLoader) -> list[list[str]]:
    """Return the overrides of every job that the sweeper is going to launch.

    Raises:
        ConfigError: they cannot be known beforehand, or their file is wrong.
    """
    sweeper, task = config.hydra.sweeper, list(config.hydra.overrides.task)
    name = str(sweeper.get("_target_")).rpartition(".")[2]
    if name not in SWEEPERS:
        raise ConfigError(
            "hydra/sweeper: only Hydra's basic sweeper and listed know their jobs beforehand; "
            "leave it out"
        )
    if name == "ListedJobs":
        if OmegaConf.is_missing(sweeper, "file"):
            raise ConfigError(
                "hydra/sweeper=listed: needs the file of its jobs; add hydra.sweeper.file=JOBS.json"
            )
        return [[*job, *task] for job in read_jobs(sweeper.file)]
    arguments = [f"{key}={value}" for key, value in (sweeper.params or {}).items()] + task
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(arguments)
    jobs: list[list[str]]
    (jobs,) = BasicSweeper.split_arguments(parsed, None)
    return jobs


def read_jobs(file: str) -> list[list[str]]:
    """Return the jobs of a file: a JSON list of lists of overrides, which may not allow any code.

    Raises:
        ConfigError: it cannot be read, or an entry is no single job.
    """
    try:
        content = parse_json(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = one_line(error)
        raise ConfigError(f"hydra.sweeper.file={file}: cannot be read as JSON ({why})") from None
    jobs = validate(list[list[str]], content, file)
    if not jobs:
        raise ConfigError(f"{file}: lists no job")
    for job in jobs:
        refuse_permissions(job, file)
        for override in OverridesParser.create().parse_overrides(job):
            if override.is_sweep_override():
                what = f"{override.input_line} is several jobs; list each of them"
                raise ConfigError(f"{file}: {what}")
    return jobs


def note_of(job: DictConfig) -> JobNote | None:
    """Return the note of a composed job, with the error if it cannot run; None for a dry run."""
    note = JobNote(["cu-run", *words_of(job.hydra)], git_commit())
    try:
        plan = parse(without_hydra(job))
    except ValueError as error:
        return replace(note, error=redact(one_line(error)))
    if plan.spine.dry_run:
        return None
    return replace(note, run=str(plan.directory.absolute()), signature=plan.signature)
