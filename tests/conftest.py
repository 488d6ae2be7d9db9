"""The loaded embedded model, scopes of real requests, finished runs, and the commands in forks and
in this process.
"""

import gc
import importlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import hydra
import pytest
import torch
import yaml
from commands import Forked, environment, run_forked, run_script
from filelock import FileLock
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra_memory import remember
from omegaconf import OmegaConf, open_dict
from time_tests import listed, register

from cu_runner.cli.run import main
from cu_runner.concepts.requests import plan_requests
from cu_runner.concepts.sequence_file import make_sequence
from cu_runner.config.command import key_of
from cu_runner.evaluators.classifier import Classifier
from cu_runner.models.checkpoint_files import locate
from cu_runner.models.loading import load_model
from cu_runner.models.parameters import select_parameters, snapshot
from cu_runner.request.scope import Scope
from cu_runner.runtime import progress
from cu_runner.runtime.paths import config_dir
from cu_runner.runtime.seeding import RandomSource
from cu_runner.schema.settings import Sampler, TrainSettings
from cu_runner.sweeps import make_runs

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)
remember()
gc.disable()  # until the tests are collected: what they import stays

SMOKE = (
    "sequence=smoke",
    "train.steps=3",
    "train.batch_size=2",
    "method.num_anchors=4",
    "model.sampler.steps=2",
    "wandb.mode=disabled",
    "num_threads=1",
)


PARTS = {  # folders of units
    "concepts",
    "evaluators",
    "methods",
    "models",
    "regularizers",
    "request",
    "store",
}
RUN_SOMETHING = {
    "call_command",
    "cu_run",
    "finished_run",
    "in_process",
    "jobs_in_forks",
    "pipelines",
    "run_copy",
    "start",
    "wheel",
}


def pytest_configure(config: pytest.Config) -> None:
    register(config)


def pytest_collection_finish() -> None:
    """Keep the libraries out of every later collection of garbage, of half a second each."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that time_tests.py found to take long; and as fast those of parts that start
    no command. A small run by cu-run has that mark of its own.
    """
    long = listed()
    for item in items:
        if item.nodeid in long:
            item.add_marker("long")
        slow = any(item.get_closest_marker(name) for name in ("slow", "slurm", "faults"))
        if slow or item.path.parent.name not in PARTS:
            continue
        if not RUN_SOMETHING & set(item.fixturenames):
            item.add_marker("fast")


def read_conf(name: str) -> dict:
    """The arguments of a file of conf/, without _target_."""
    content = yaml.safe_load((config_dir() / name).read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if key != "_target_"}


# ------------------------------------------------------------------------------------------ objects
@pytest.fixture(scope="session")
def loaded_model():
    return load_model("package:shapecanvas/weights/pipeline", 64, Sampler(2, 2.5))


@pytest.fixture
def model(loaded_model):
    """The embedded model; what a test does to its UNet is undone."""
    before = snapshot(dict(loaded_model.denoiser.named_parameters()))
    yield loaded_model
    with torch.no_grad():
        for name, parameter in loaded_model.denoiser.named_parameters():
            parameter.copy_(before[name])
            parameter.grad = None
            parameter.requires_grad_(False)


@pytest.fixture(scope="session")
def evaluator():
    return Classifier(**read_conf("evaluator/shapecanvas.yaml"))


@pytest.fixture(scope="session")
def sequence():
    return make_sequence(**read_conf("sequence/smoke.yaml"))


@pytest.fixture(scope="session")
def settings():
    """Returns make(**changes) -> TrainSettings."""
    defaults = {
        "steps": 3,
        "optimizer": "adamw",
        "batch_size": 2,
        "lr": 1e-3,
        "betas": (0.9, 0.999),
    }
    defaults |= {"weight_decay": 0.01, "grad_clip": 0.0}
    return lambda **changes: TrainSettings(**defaults | changes)


@pytest.fixture
def make_scope(model, sequence, settings):
    """Returns make(request=1, group="kv_xattn", seed=0, batch_size=2, steps=3) -> Scope on the
    embedded model.
    """

    def make(
        request: int = 1,
        group: str = "kv_xattn",
        seed: int = 0,
        batch_size: int = 2,
        steps: int = 3,
    ) -> Scope:
        params = select_parameters(model.denoiser, group)
        latents = torch.randn(64, *model.latent_shape, generator=torch.Generator().manual_seed(1))
        return Scope(
            model=model,
            sequence=sequence,
            request=plan_requests(sequence, "sequential")[request - 1],
            params=params,
            start=snapshot(params),
            base=snapshot(params),
            rng=RandomSource(seed, request),
            train=settings(batch_size=batch_size, steps=steps),
            anchors=lambda prompts, number, mirrored=False: (
                latents[:number].flip(-1) if mirrored else latents[:number]
            ),
        )

    return make


@pytest.fixture
def pipeline_copy(tmp_path):
    """A copy of the shipped diffusers directory, to be damaged."""
    return Path(
        shutil.copytree(locate("package:shapecanvas/weights/pipeline"), tmp_path / "pipeline")
    )


@pytest.fixture(scope="session")
def random_pipeline():
    """scripts/make_random_pipeline.py as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
        return importlib.import_module("make_random_pipeline")


@pytest.fixture(scope="session")
def pipelines(random_pipeline, shared):
    """A small diffusers directory of every kind of Stable Diffusion, with random weights."""

    def make(root: Path) -> list[str]:
        for kind in random_pipeline.KINDS:
            random_pipeline.make_pipeline(kind, root / kind, tiny=True)
        return list(random_pipeline.KINDS)

    kinds, root = shared("pipelines", make)
    return {kind: root / kind for kind in kinds}


@pytest.fixture(scope="session")
def transformers_on_disk(random_pipeline, shared):
    """A small diffusers directory of every kind with a transformer, with random weights."""

    def make(root: Path) -> list[str]:
        for kind in random_pipeline.TRANSFORMERS:
            random_pipeline.make_transformer_pipeline(kind, root / kind, tiny=True)
        return list(random_pipeline.TRANSFORMERS)

    kinds, root = shared("transformers", make)
    return {kind: root / kind for kind in kinds}


@pytest.fixture
def pipeline_of(pipelines, tmp_path):
    """Returns copy(kind) -> a copy of its directory, to be damaged."""
    return lambda kind: Path(shutil.copytree(pipelines[kind], tmp_path / kind))


def ended_after(step: int):
    """An on_step that ends the training after some steps."""

    def on_step(training) -> None:
        training.ended = training.done == step

    return on_step


# ----------------------------------------------------------------------------------------- commands
def compose(*overrides: str):
    """The configuration that cu-run would compose, without its hydra node; the `choice` resolver
    works on it.
    """
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = hydra.compose("config", list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    assert OmegaConf.is_dict(config)
    return config


@pytest.fixture(autouse=True)
def no_progress(monkeypatch):
    """No line says how far a command is, however busy the machine is; and what is logged goes to
    pytest, once, also where a command before has kept it from there.
    """
    monkeypatch.setattr(progress, "FIRST", 3600.0)
    monkeypatch.setattr(logging.getLogger("cu_runner"), "propagate", True)


def changed_smoke(words: tuple[str, ...]) -> list[str]:
    """The words without those of SMOKE whose key another word sets: cu-run refuses both."""
    own = {key_of(word) for word in words if word not in SMOKE}
    return [word for word in words if word not in SMOKE or key_of(word) not in own]


@pytest.fixture
def cu_run(tmp_path):
    """Returns run(*overrides, cwd, env) -> CompletedProcess of the command as a user types it, in a
    fork.
    """

    def run(
        *overrides: str, cwd: Path = tmp_path, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess:
        words = changed_smoke(overrides)
        return run_forked("cu-run", *words, cwd=cwd, env=environment(**env or {}))

    return run


@pytest.fixture
def start(tmp_path):
    """Returns start(*overrides) -> Forked; what still runs at the end is killed."""
    started = []

    def begin(*overrides: str, cwd: Path = tmp_path) -> Forked:
        started.append(Forked("cu-run", *changed_smoke(overrides), cwd=cwd))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def in_process(tmp_path, monkeypatch, capsys):
    """Returns run(*overrides) -> (exit status, stdout, stderr) of cu_runner.cli.run.main in this
    process, in tmp_path.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    handler, package = signal.getsignal(signal.SIGTERM), logging.getLogger("cu_runner")

    def run(*overrides: str) -> tuple[int, str, str]:
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None  # as in a new process, whatever ran before in this one
        monkeypatch.setattr(sys, "argv", ["cu-run", *changed_smoke(overrides)])
        capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as end:
            status = end.code or 0
        finally:
            package.propagate = True
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    yield run
    signal.signal(signal.SIGTERM, handler)
    GlobalHydra.instance().clear()


@pytest.fixture
def call_command(tmp_path, monkeypatch, capsys):
    """Returns call(main, name, *arguments) -> (exit status, stdout, stderr) of a command's main in
    this process, in tmp_path.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")

    def call(entry: Callable[[], None], name: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            entry()
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()

    yield call
    GlobalHydra.instance().clear()


@pytest.fixture
def jobs_in_forks(monkeypatch):
    """What cu_runner.sweeps.make_runs starts as cu-run is a fork."""

    def run(command: list[str], *, env: dict[str, str] | None = None, **_: object):
        assert command[0] == make_runs.CU_RUN
        return run_forked("cu-run", *command[1:], cwd=Path.cwd(), env=environment(**env or {}))

    monkeypatch.setattr(make_runs, "subprocess", SimpleNamespace(run=run))


def run_directory(stdout: str, cwd: Path) -> Path:
    """The directory that the last line of cu-run names."""
    last = stdout.strip().splitlines()[-1]
    assert last.startswith("run: ")
    return cwd / last.removeprefix("run: ")


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id):
    """Returns shared(name, make) -> what make(folder) returns, of JSON, and the folder; made once
    for all workers.
    """
    root = tmp_path_factory.getbasetemp()

    def get(name: str, make: Callable[[Path], object]) -> tuple[object, Path]:
        folder = (root if worker_id == "master" else root.parent) / f"shared_{name}"
        result = folder / "result.json"
        with FileLock(f"{folder}.lock"):
            if not result.is_file():
                shutil.rmtree(folder, ignore_errors=True)  # of an attempt that failed
                folder.mkdir()
                made = make(folder)
                result.write_text(json.dumps(made), encoding="utf-8")
        return json.loads(result.read_text(encoding="utf-8")), folder

    return get


@pytest.fixture(scope="session")
def finished_run(shared):
    """A finished smoke run, made by the installed script: its outputs' parent, its directory, and
    the finished process.
    """

    def make(folder: Path) -> tuple[list[str], int, str, str]:
        (folder / "place").mkdir()
        done = run_script("cu-run", *SMOKE, cwd=folder / "place")
        assert done.returncode == 0, done.stderr
        return done.args, done.returncode, done.stdout, done.stderr

    made, folder = shared("finished_run", make)
    process = subprocess.CompletedProcess(*made)
    return folder / "place", run_directory(process.stdout, folder / "place"), process


@pytest.fixture
def run_copy(finished_run, tmp_path):
    """A copy of the finished smoke run under tmp_path, which is also where in_process runs; its run
    directory.
    """
    cwd, directory, _ = finished_run
    shutil.copytree(cwd / "outputs", tmp_path / "outputs")
    return tmp_path / directory.relative_to(cwd)


@pytest.fixture
def outlined(monkeypatch):
    """Plots are made, and in place of drawing them an empty picture is written: for the tests of
    what stands beside them.
    """

    def write(figure, file, **_: object) -> None:
        if isinstance(file, str):
            Path(file).touch()
        else:
            file.write('<svg viewBox="0 0 1 1"></svg>')

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", write)


@pytest.fixture
def numbers_by_hand(monkeypatch):
    """Runs of runs_by_hand have metrics of their own, which need not follow from predictions."""
    monkeypatch.setattr("cu_runner.reporting.page_groups.require_true", lambda run: None)


@pytest.fixture
def filled_cache(finished_run, tmp_path):
    """The cache of the finished smoke run under tmp_path: the images of the untouched model, which
    every run on the smoke sequence begins with, and the anchors.
    """
    shutil.copytree(finished_run[0] / "outputs/cache", tmp_path / "outputs/cache")
