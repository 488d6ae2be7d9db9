"""Sweeps on a real SLURM of one node: submitted, pre-empted, out of time, submitted again. `make
test-slurm`; minutes.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from commands import SCRIPTS, environment, run_script
from conftest import SMOKE, run_directory

pytestmark = pytest.mark.slurm

CLUSTER = Path(__file__).parents[2] / "scripts/slurm_local.sh"
SMALL = ["cluster.gpus=null", "cluster.mem_gb=3", "cluster.cpus=1"]
LONG = [override for override in SMOKE if not override.startswith("train.steps")] + [
    "train.steps=1200",
    "train.save_every=50",
]
FILES = ("delta.safetensors", "training.csv", "predictions.csv", "metrics.json")


@pytest.fixture(scope="module")
def slurm():
    """The environment in which sbatch finds the cluster."""
    folder = Path(tempfile.mkdtemp(prefix="slurm_test_"))
    folder.chmod(0o755)  # munged runs as a user of its own
    place = environment(SLURM_LOCAL=str(folder))
    started = subprocess.run(
        [str(CLUSTER), "start"], env=place, capture_output=True, text=True, check=False
    )
    if started.returncode:
        pytest.exit(started.stderr.strip() or "slurm_local: did not start", returncode=2)
    yield place | {"SLURM_CONF": started.stdout.strip().partition("=")[2]}
    subprocess.run([str(CLUSTER), "stop"], env=place, check=True, capture_output=True)
    shutil.rmtree(folder)


@pytest.fixture
def submit(slurm, tmp_path):
    """Returns submit(*overrides) -> Popen of a sweep; it ends when its jobs have."""
    processes = []

    def begin(*overrides: str) -> subprocess.Popen:
        arguments = [str(SCRIPTS / "cu-run"), "-m", "hydra/launcher=slurm", *SMALL, *overrides]
        log = (tmp_path / f"sweep{len(processes)}.log").open("w")
        processes.append(
            subprocess.Popen(arguments, cwd=tmp_path, env=slurm, text=True, stdout=log, stderr=log)
        )
        return processes[-1]

    yield begin
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()
    subprocess.run(["scancel", "--user=root"], env=slurm, check=False)


def told(tmp_path: Path) -> str:
    """What the sweeps and their jobs said."""
    files = [*tmp_path.glob("sweep*.log"), *tmp_path.glob("outputs/sweeps/*/.submitit/*/*_log.*")]
    return "\n".join(f"--- {file}\n{file.read_text(errors='replace')}" for file in files)


def await_(tmp_path: Path, process: subprocess.Popen, what, seconds: int = 300):
    """What `what` returns, as soon as that is true, while the sweep runs."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, told(tmp_path)
        assert process.poll() is None, told(tmp_path)
        time.sleep(0.2)
    return found


def ended(process: subprocess.Popen, tmp_path: Path, seconds: int = 500) -> None:
    assert process.wait(timeout=seconds) == 0, told(tmp_path)


def job_of(directory: Path) -> str:
    """The SLURM job of the only sweep."""
    (folder,) = (
        path
        for path in directory.glob("outputs/sweeps/*/.submitit/*")
        if re.fullmatch(r"\d+(_\d+)?", path.name)
    )
    return folder.name


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The directory of an undisturbed run of LONG, without SLURM."""
    place = tmp_path_factory.mktemp("calm")
    done = run_script("cu-run", *LONG, cwd=place)
    assert done.returncode == 0, done.stderr
    return run_directory(done.stdout, place)


def assert_same(directory: Path, calm: Path) -> None:
    """Bitwise the same results, and nothing left over."""
    assert directory.name == calm.name
    for step in ("01", "02"):
        for name in FILES:
            assert (directory / "steps" / step / name).read_bytes() == (
                calm / "steps" / step / name
            ).read_bytes(), (step, name)
    assert not (directory / "checkpoint.pt").exists()


def test_a_sweep_fills_its_directories_and_a_second_one_only_what_is_missing(submit, tmp_path):
    sweep = ["reg=none,l2", "seed=0,1", *SMOKE]
    ended(submit(*sweep), tmp_path)
    runs = sorted((tmp_path / "outputs/runs/smoke").iterdir())
    assert len(runs) == 4
    jobs = [json.loads(file.read_text()) for file in tmp_path.glob("outputs/sweeps/*/*/job.json")]
    assert sorted(Path(job["run"]).name for job in jobs) == [run.name for run in runs]
    assert all(
        job["signature"][:8] == Path(job["run"]).name[-8:] and job["command"][0] == "cu-run"
        for job in jobs
    )
    kept = {run: (run / "steps/02/step.json").stat().st_mtime_ns for run in runs}
    (runs[0] / "steps/02/step.json").unlink()
    (runs[0] / "summary.json").unlink()
    ended(submit(*sweep), tmp_path)
    assert [
        run for run in runs if (run / "steps/02/step.json").stat().st_mtime_ns != kept[run]
    ] == [runs[0]]


def test_the_cells_of_a_table_are_one_array(slurm, tmp_path):
    table = {
        "title": "smoke",
        "metrics": ["UA"],
        "rows": {name: [f"reg={name}"] for name in ("none", "l1", "l2")},
        "experiments": {
            "smoke": {
                "model": "ShapeCanvas",
                "methods": {"ConAbl": []},
                "columns": {"style": list(SMOKE)},
            }
        },
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(table))
    done = run_script(
        "cu-table",
        "mine.yaml",
        "--run",
        "--launcher",
        "slurm",
        *SMALL,
        cwd=tmp_path,
        env=slurm,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr + told(tmp_path)
    assert done.stdout.count("  done") == 3
    assert "Not run yet" not in done.stdout
    arrays = {
        path.name.split("_")[0] for path in tmp_path.glob("outputs/sweeps/mine_*/.submitit/*_[0-9]")
    }
    assert len(arrays) == 1


def test_a_pre_empted_job_goes_on_and_ends_bitwise_the_same(submit, slurm, tmp_path, calm):
    process = submit("reg=none", *LONG)
    (directory,) = await_(tmp_path, process, lambda: list(tmp_path.glob("outputs/runs/smoke/*")))
    await_(tmp_path, process, (directory / "checkpoint.pt").exists)
    subprocess.run(["scontrol", "requeue", job_of(tmp_path)], env=slurm, check=True)
    ended(process, tmp_path)
    assert "goes on after step" in (directory / "run.log").read_text()
    assert "stopped by SIGTERM" in told(tmp_path)
    assert_same(directory, calm)


@pytest.mark.timeout(2000)
def test_a_job_out_of_time_requeues_itself_and_ends_bitwise_the_same(submit, tmp_path, calm):
    # SLURM looks at limits every half minute: the warning comes after 45 to 75 s, and a job that is
    # loading then gets no further
    process = submit("reg=none", *LONG, "cluster.timeout_min=2", "cluster.warn_seconds=75")
    ended(process, tmp_path, 1500)
    (directory,) = tmp_path.glob("outputs/runs/smoke/*")
    assert "stopped by SIGUSR2" in told(tmp_path)
    assert "goes on after step" in (directory / "run.log").read_text()
    assert_same(directory, calm)


def test_a_cancelled_job_stays_cancelled(submit, slurm, tmp_path):
    process = submit("reg=none", *LONG)
    (directory,) = await_(tmp_path, process, lambda: list(tmp_path.glob("outputs/runs/smoke/*")))
    await_(tmp_path, process, (directory / "checkpoint.pt").exists)
    subprocess.run(["scancel", job_of(tmp_path)], env=slurm, check=True)
    await_(
        tmp_path,
        process,
        lambda: (
            not subprocess.run(
                ["squeue", "-h"], env=slurm, capture_output=True, text=True, check=True
            ).stdout
        ),
    )
    assert "stopped by SIGTERM" in told(tmp_path)
    assert (directory / "checkpoint.pt").exists()
    process.kill()
    os.waitpid(process.pid, 0) if process.poll() is None else None
