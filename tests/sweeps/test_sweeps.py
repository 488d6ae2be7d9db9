"""cu-sweep status: what became of every job of a sweep, and the notes that a sweep leaves before
its jobs begin.
"""

import json
import os
import shlex
import subprocess
import time
from pathlib import Path

import pytest
import submitit
from commands import environment, run_forked
from conftest import SMOKE
from filelock import FileLock
from omegaconf import OmegaConf
from submitit.core.utils import UncompletedJobError

from cu_runner import __version__
from cu_runner.cli.failures import explain_error
from cu_runner.cli.sweep import main
from cu_runner.runtime.code_identity import CodeIdentity
from cu_runner.store.files import to_json
from cu_runner.store.layout import JOB, SWEEP
from cu_runner.store.records import Row, StepRecord, TrainingRecord, chain
from cu_runner.store.run_record import find_runs
from cu_runner.sweeps import side_by_side
from cu_runner.sweeps.status import read_sweep
from hydra_plugins import cu_runner_jobs

SLURM = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"


@pytest.fixture
def status(call_command):
    """Returns status(*arguments) -> (exit status, stdout, stderr) of `cu-sweep status`."""
    return lambda *arguments: call_command(main, "cu-sweep", "status", *arguments)


@pytest.fixture
def make_sweep(tmp_path):
    """Returns make(number, launcher) -> folder of a sweep whose jobs were submitted and have not
    begun.
    """

    def make(number: int, launcher: str = "basic.BasicLauncher") -> Path:
        folder = tmp_path / "sweep"
        for index in range(number):
            (folder / str(index)).mkdir(parents=True)
            note = {
                "command": ["cu-run", f"seed={index}"],
                "git_commit": None,
                "run": str(tmp_path / f"runs/{index}"),
            }
            (folder / str(index) / JOB).write_text(json.dumps(note | {"signature": "0" * 64}))
        (folder / SWEEP).write_text(
            json.dumps(
                {"command": ["cu-run", "-m", "seed=0,1"], "launcher": launcher, "git_commit": None}
            )
        )
        return folder

    return make


def finish(run: Path, summarised: str | None = None) -> None:
    """Writes a run of one step. summarised: the sha256 of another step, for which summary.json
    stands.
    """
    files = dict.fromkeys(("predictions.csv", "metrics.json", "grid.png"), "d" * 64)
    record = StepRecord(
        index=0,
        signature="0" * 64,
        parent_sha256="a" * 64,
        sha256=chain("a" * 64, files),
        files=files,
        targets=[],
        model_sha256="a" * 64,
        evaluator_sha256="b" * 64,
        training=TrainingRecord(),
        seconds={"train": 0.0, "eval": 0.0},
        versions={"cu_runner": __version__},
        device="cpu",
        git_commit=None,
        code=CodeIdentity("c" * 64, "c" * 64, {}, {}, None),
        row=Row(0, "", dict.fromkeys(("UA", "RA_I", "RA_C", "RA_C_retained"), 99.0)),
    )
    (run / "steps/00").mkdir(parents=True)
    (run / "steps/00/step.json").write_bytes(to_json(record.entries()))
    (run / "summary.json").write_text(json.dumps({"sha256": summarised or record.sha256}))


def test_a_real_sweep_with_a_job_that_cannot_run(in_process, run_copy, status, tmp_path):
    assert in_process("-m", *SMOKE, "seed=0,-1")[0] == 2
    (folder,) = (tmp_path / "outputs/sweeps").iterdir()
    code, out, err = status(folder)
    assert (code, err) == (1, "")
    lines = out.splitlines()
    assert lines[0] == f"   0  done     {shlex.join(SMOKE)} seed=0"
    assert lines[1] == (
        f"   1  failed   {shlex.join(SMOKE)} seed=-1  (seed=-1: input should be greater "
        "than or equal to 0)"
    )
    assert lines[2] == "2 jobs: 1 done, 1 failed"
    assert lines[5] == f"  cu-run {shlex.join(SMOKE)} seed=-1"
    assert lines[7] == f"  cu-run -m {shlex.join(SMOKE)} seed=0,-1"
    assert find_runs([folder]) == [run_copy]  # the job without a run is left out of a report

    (run_copy / "summary.json").unlink()
    assert status(folder)[1].startswith("   0  failed   ")
    command = shlex.split(lines[5])[1:]
    assert (
        in_process(*command)[2] == "cu-run: seed=-1: input should be greater than or equal to 0\n"
    )


def test_jobs_in_processes_of_their_own_that_fail_are_no_success(run_copy, tmp_path):
    """Through submitit: the statuses of its jobs are not those of the process that submits."""
    done = run_forked(
        "cu-run", "-m", "hydra/launcher=local_processes", *SMOKE, "seed=0,-1", cwd=tmp_path
    )
    (folder,) = (tmp_path / "outputs/sweeps").iterdir()
    said = (
        "1 of 2 jobs did not end well, the first: seed=-1: input should be greater than or "
        "equal to 0"
    )
    place = folder.relative_to(tmp_path)
    assert done.stderr == f"cu-run: {said}; see `cu-sweep status {place}`\n"
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    head = f"sweep: {place}; `cu-sweep status {place}` tells what became of each job"
    assert lines[0] == head
    assert lines[1].startswith(f"2 jobs, {os.cpu_count()} at a time (hydra.launcher.at_once)")
    whole = shlex.join(SMOKE)
    assert sorted(line[5:] for line in lines[2:]) == [
        f"done    {whole} seed=0",
        f"failed  {whole} seed=-1  (seed=-1: input should be greater than or equal to 0)",
    ]
    assert [line[:3] for line in lines[2:]] == ["1/2", "2/2"]


@pytest.mark.parametrize(
    ("device", "threads", "at_once", "gpus", "places"),
    [
        ("auto", 1, None, 0, [""] * 8),
        ("auto", 3, None, 0, [""] * 2),
        ("auto", 16, None, 0, [""]),
        ("auto", None, None, 0, [""]),
        ("auto", None, 3, 0, [""] * 3),
        ("auto", None, None, 2, ["0", "1"]),
        ("cuda", 1, 5, 2, ["0", "1", "0", "1", "0"]),
        ("cuda", 1, 1, 2, ["0"]),
        ("cuda:1", 1, None, 2, ["0,1"]),
        ("cpu", 4, None, 2, [""] * 2),
    ],
)
def test_as_many_jobs_begin_as_fit(device, threads, at_once, gpus, places, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(side_by_side, "has_gpu", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert side_by_side.places_for(device, threads, at_once) == places


def test_jobs_see_the_gpus_that_their_sweep_sees(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1f, GPU-2e")
    monkeypatch.setattr(side_by_side, "has_gpu", lambda: True)
    assert side_by_side.places_for("auto", None, None) == ["GPU-1f", "GPU-2e"]


def test_a_number_of_jobs_at_once_that_is_none(in_process, tmp_path):
    local = ("-m", "hydra/launcher=local_processes", "hydra.launcher.at_once=0")
    status, _, err = in_process(*local, *SMOKE)
    assert (status, err) == (
        2,
        "cu-run: hydra.launcher.at_once=0: input should be greater than 0\n",
    )
    assert not (tmp_path / "outputs").exists()


def test_jobs_wait_for_a_place(tmp_path, monkeypatch, capsys):
    """And each sees the GPU of its place; the executor is submitit's in all but the processes."""
    running, most, seen = [], [], []

    class Job:
        looks = 0

        def done(self) -> bool:
            self.looks += 1
            if self.looks == 3:
                running.remove(self)
            return self.looks >= 3

        def stdout(self) -> str:
            return "submitit INFO: begun\nplan\n"

        def results(self) -> list[str]:
            return ["returned"]

    class Executor(submitit.LocalExecutor):
        def submit(self, *_: object) -> Job:
            running.append(Job())
            most.append(len(running))
            seen.append(self.parameters["visible_gpus"])
            return running[-1]

    monkeypatch.setattr(submitit, "LocalExecutor", Executor)
    monkeypatch.setattr(cu_runner_jobs, "POLL", 0)
    monkeypatch.setattr(side_by_side, "places_for", lambda *_: ["3", "5"])
    params = {"submitit_folder": str(tmp_path / "%j"), "timeout_min": 5}
    launcher = cu_runner_jobs.LocalProcesses(None, **params)
    settings = {"device": "auto", "num_threads": None, "hydra": {"sweep": {"dir": str(tmp_path)}}}
    launcher.config = OmegaConf.create(settings)
    assert launcher.launch([["seed=0"], ["seed=1"], ["seed=2"]], 0) == ["returned"] * 3
    assert (max(most), seen) == (2, [("3",), ("5",), ("3",)])
    assert capsys.readouterr().out.splitlines() == [
        "3 jobs, 2 at a time (hydra.launcher.at_once)",
        *["plan"] * 3,
    ]


def test_listed_jobs(in_process, run_copy, tmp_path):
    (tmp_path / "jobs.json").write_text(json.dumps([["seed=0"], ["seed=-1"]]))
    listed = ["hydra/sweeper=listed", "hydra.sweeper.file=jobs.json"]
    status, out, err = in_process("-m", *listed, *SMOKE)
    assert (status, err) == (2, "cu-run: seed=-1: input should be greater than or equal to 0\n")
    assert run_copy.name in out  # the finished run of the first job
    (folder,) = (tmp_path / "outputs/sweeps").iterdir()
    jobs = read_sweep(folder)
    assert [(job.state, job.command[-1]) for job in jobs] == [
        ("done", SMOKE[-1]),
        ("failed", SMOKE[-1]),
    ]
    assert [job.command[1] for job in jobs] == ["seed=0", "seed=-1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "hydra.sweeper.file=jobs.json: cannot be read as JSON"),
        ("[[", "hydra.sweeper.file=jobs.json: cannot be read as JSON"),
        ('{"a": 1}', "jobs.json"),
        ("[]", "jobs.json: lists no job"),
        ('[["seed=0,1"]]', "jobs.json: seed=0,1 is several jobs; list each of them"),
        (
            '[["allow_modules=[evil]"]]',
            "jobs.json: allow_modules=[evil] can run code; only the command line may set it",
        ),
    ],
)
def test_a_wrong_list_of_jobs_is_one_line(in_process, tmp_path, content, message):
    if content is not None:
        (tmp_path / "jobs.json").write_text(content)
    status, _, err = in_process(
        "-m", "hydra/sweeper=listed", "hydra.sweeper.file=jobs.json", *SMOKE
    )
    assert status == 2
    assert err.startswith(f"cu-run: {message}")
    assert err.count("\n") == 1
    assert not (tmp_path / "outputs").exists()


def test_a_machine_without_slurm(tmp_path):
    place = environment(PATH="/nowhere")
    done = run_forked(
        "cu-run", "-m", "hydra/launcher=slurm", *SMOKE, "seed=0", cwd=tmp_path, env=place
    )
    assert done.returncode == 1
    assert done.stderr.startswith("cu-run: the launcher says: Could not detect")
    assert done.stderr.count("\n") == 1


def test_a_job_that_was_killed_is_one_line_for_the_submitter():
    error = launcher_error(
        UncompletedJobError("Job (task=0) failed during processing with trace:\n-----\nTraceback")
    )
    status, line = explain_error(error, [])
    assert status == 1
    assert line.startswith("the launcher says: Job (task=0) failed during processing")
    assert "\n" not in line


def launcher_error(error: Exception) -> Exception:
    """An error as if submitit had raised it."""
    try:
        exec(
            compile("raise error", "submitit", "exec"),
            {"__name__": "submitit.core.core", "error": error},
        )
    except Exception as raised:
        return raised


def test_a_queue_that_does_not_answer(make_sweep, status, tmp_path, monkeypatch):
    folder = make_sweep(1, SLURM)
    monkeypatch.setattr("cu_runner.sweeps.status.shutil.which", lambda _: "squeue")

    def hang(*arguments, timeout, **_):
        raise subprocess.TimeoutExpired(arguments, timeout)

    monkeypatch.setattr("cu_runner.sweeps.status.subprocess.run", hang)
    assert status(folder)[::2] == (
        2,
        (
            "cu-sweep: squeue: gave no answer within a minute; try again when SLURM's "
            "controller is well\n"
        ),
    )


def test_a_failure_of_a_run_is_noted_in_one_line(in_process, run_copy, status, tmp_path):
    (run_copy / "steps/01/step.json").write_text("{")
    assert in_process("-m", *SMOKE, "seed=0")[0] == 1
    (folder,) = (tmp_path / "outputs/sweeps").iterdir()
    (job,) = read_sweep(folder)
    assert job.state == "failed"
    assert "steps/01/step.json: cannot be read" in job.why
    assert status(folder)[0] == 1


def test_notes_hold_what_a_job_needs_and_a_dry_run_leaves_none(in_process, run_copy, tmp_path):
    (tmp_path / "tree/experiment").mkdir(parents=True)
    (tmp_path / "tree/experiment/mine.yaml").write_text("# @package _global_\ndevice: cpu\n")
    tree = f"--config-dir={tmp_path}/tree"
    assert in_process("-m", tree, *SMOKE, "experiment=mine")[0] == 0
    (path,) = (tmp_path / "outputs/sweeps").glob(f"*/0/{JOB}")
    note = json.loads(path.read_text())
    assert note["command"] == ["cu-run", tree, *SMOKE, "experiment=mine"]
    assert note["run"] == str(run_copy)
    assert note["signature"][:8] == run_copy.name[-8:]
    assert json.loads((path.parents[1] / SWEEP).read_text())["command"] == [
        "cu-run",
        "-m",
        tree,
        *SMOKE,
        "experiment=mine",
    ]
    assert in_process("-m", *SMOKE, "dry_run=true", "seed=0,1")[0] == 0
    assert len(list((tmp_path / "outputs/sweeps").glob(f"*/*/{JOB}"))) == 1


def test_running_is_a_held_lock(make_sweep, status, tmp_path):
    folder = make_sweep(3)
    finish(tmp_path / "runs/0")
    finish(tmp_path / "runs/1", summarised="b")  # a step after the summary
    (tmp_path / "runs/2").mkdir()
    with FileLock(tmp_path / "runs/1/.lock"):
        assert [job.state for job in read_sweep(folder)] == ["done", "running", "pending"]
        assert status(folder)[0] == 0
    (tmp_path / "runs/1/run.log").write_text("2026 INFO begun\n2026 INFO  1/2  torch light\n\n")
    jobs = read_sweep(folder)
    assert [job.state for job in jobs] == ["done", "failed", "pending"]
    assert (
        jobs[1].why == "ended without a message; last line of run.log: 2026 INFO  1/2  torch light"
    )
    os.utime(tmp_path / "runs/1/run.log", (0, 0))  # of an earlier attempt, outside this sweep
    assert read_sweep(folder)[1].state == "pending"


def test_jobs_in_slurms_queue(make_sweep, tmp_path, monkeypatch):
    folder = make_sweep(4, SLURM)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/squeue").write_text("#!/bin/sh\necho 77_0 PENDING\necho 77_1 RUNNING\n")
    (tmp_path / "bin/squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    for index in range(4):
        (folder / f".submitit/77_{index}").mkdir(parents=True)
    log = folder / ".submitit/77_2/77_2_0_log.err"
    log.write_text(
        "slurmstepd: error: *** JOB 79 ON node CANCELLED AT 2026 DUE TO TIME LIMIT ***\n"
    )
    jobs = read_sweep(folder)
    assert [job.state for job in jobs] == ["queued", "running", "failed", "pending"]
    assert jobs[2].why.endswith(
        "last line of 77_2_0_log.err: slurmstepd: error: *** JOB 79 ON node CANCELLED AT "
        "2026 DUE TO TIME LIMIT ***"
    )
    (tmp_path / "bin/squeue").write_text(
        "#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact controller' >&2\nexit 1\n"
    )
    with pytest.raises(ValueError, match="squeue: slurm_load_jobs error"):
        read_sweep(folder)


def test_hundreds_of_jobs_take_less_than_a_second(make_sweep, status, tmp_path):
    folder = make_sweep(400)
    for index in range(200):
        finish(tmp_path / f"runs/{index}")
    started = time.process_time()
    code, out, _ = status(folder, "--json")
    assert time.process_time() - started < 1
    jobs = json.loads(out)
    assert code == 0
    assert [job["number"] for job in jobs] == list(range(400))
    assert [job["state"] for job in jobs] == ["done"] * 200 + ["pending"] * 200
    assert jobs[399]["command"] == ["cu-run", "seed=399"]


def test_a_folder_that_is_no_sweep(status, make_sweep, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        code, out, err = status(folder)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"{folder}/sweep.json: cannot be read" in err
    folder = make_sweep(1)
    (folder / "0" / JOB).write_text("[")
    assert status(folder)[2] == (
        f"cu-sweep: {folder}/0/job.json: cannot be read; give the folder of a sweep, "
        "outputs/sweeps/DATE\n"
    )
