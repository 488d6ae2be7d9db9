"""What a run survives: damage of any of its files, a disk that fills up at any write, odd places, a
clock that runs backwards.

The exhaustive ones are of `make test-faults`; they print the counts that the README quotes.
"""

import errno
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import SMOKE, run_directory

from cu_runner.runner.runner import Runner
from cu_runner.store.checkpoint import FILE

DERIVED = ("metrics.csv", "summary.json")  # differ in seconds; made anew from the steps
SAME = (
    "delta.safetensors",
    "training.csv",
    "predictions.csv",
    "metrics.json",
    "grid.png",
    "config.yaml",
)


def assert_same(directory: Path, expected: Path) -> None:
    """Bitwise the same results."""
    files = [path for path in sorted(expected.rglob("*")) if path.name in SAME]
    assert len(files) == 1 + 3 + 2 * 5
    for file in files:
        found = directory / file.relative_to(expected)
        if file.name == "config.yaml":  # names its own folder of outputs
            assert found.is_file()
        else:
            assert found.read_bytes() == file.read_bytes(), file
    assert not list(directory.rglob(".*.tmp"))


def damage(path: Path, how: str, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: draw.randrange(len(content))])
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)


# ------------------------------------------------------------------------------------------- damage
@pytest.mark.faults
@pytest.mark.timeout(3000)
def test_damage_of_any_file_of_a_run_is_found(in_process, finished_run, tmp_path, capsys):
    cwd, original, _ = finished_run
    names = sorted(
        str(path.relative_to(original)) for path in original.rglob("*") if path.is_file()
    )
    names = [name for name in names if name not in (".lock", "run.log")]
    assert len(names) == 3 + 4 + 2 * 6
    draw, counts = random.Random(1), Counter()
    for name in names:
        for how in ("deleted", "truncated", "bit flipped"):
            shutil.rmtree(tmp_path / "outputs", ignore_errors=True)
            shutil.copytree(cwd / "outputs", tmp_path / "outputs")
            directory = tmp_path / original.relative_to(cwd)
            damage(directory / name, how, draw)
            status, _, err = in_process(*SMOKE)
            if status == 0:
                assert_same(directory, original)
                for derived in DERIVED if name in DERIVED else ():
                    assert (directory / derived).read_bytes() == (original / derived).read_bytes()
                outcome = "made again"
            else:
                assert (status, err.count("\n")) == (1, 1), err
                assert name.rpartition("/")[0] in err  # the step, or the file itself
                assert directory.name in err
                outcome = "refused"
            counts[Path(name).name, how, outcome] += 1
            if Path(name).name in (
                "delta.safetensors",
                "predictions.csv",
                "training.csv",
                "metrics.json",
                "grid.png",
            ):
                assert outcome == "refused", (name, how)
            if name in DERIVED:
                assert outcome == "made again", (name, how)
    show(capsys, counts)


@pytest.mark.faults
@pytest.mark.timeout(3000)
def test_damage_of_any_file_of_the_cache_is_found(in_process, finished_run, tmp_path, capsys):
    cwd, original, _ = finished_run
    names = sorted(
        str(path.relative_to(cwd))
        for path in (cwd / "outputs/cache").rglob("*")
        if path.name not in (".lock",)
    )
    names = [name for name in names if (cwd / name).is_file()]
    assert len(names) == 2 + 3
    draw, counts = random.Random(2), Counter()
    for name in names:
        for how in ("deleted", "truncated", "bit flipped"):
            shutil.rmtree(tmp_path / "outputs", ignore_errors=True)
            shutil.copytree(cwd / "outputs/cache", tmp_path / "outputs/cache")
            damage(tmp_path / name, how, draw)
            status, out, err = in_process(*SMOKE)
            assert (status, err) == (0, "")
            assert_same(run_directory(out, tmp_path), original)
            counts[f"cache: {Path(name).name}", how, "made again"] += 1
    show(capsys, counts)


@pytest.mark.faults
@pytest.mark.timeout(3000)
def test_damage_of_a_checkpoint_is_found(in_process, finished_run, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        steps = iter([None] * 4)  # request 2, step 2
        patch.setattr(
            Runner,
            "_note_first_step",
            lambda runner: next(steps, 0) == 0 and os.kill(os.getpid(), signal.SIGUSR1),
        )
        assert in_process(*SMOKE)[0] == 128 + signal.SIGUSR1
    (directory,) = (tmp_path / "outputs/runs/smoke").iterdir()
    kept = (directory / FILE).read_bytes()
    draw, counts = random.Random(3), Counter()
    for how in ["deleted", *["truncated", "bit flipped"] * 15]:
        shutil.rmtree(directory / "steps/02", ignore_errors=True)
        for name in DERIVED:
            (directory / name).unlink(missing_ok=True)
        (directory / FILE).write_bytes(kept)
        damage(directory / FILE, how, draw)
        status, out, err = in_process(*SMOKE)
        assert (status, err) == (0, "")
        assert ("goes on after" in out) is False
        assert (f"{FILE}: is damaged; the request begins anew" in out) is (how != "deleted")
        assert_same(directory, finished_run[1])
        counts[FILE, how, "made again"] += 1
    show(capsys, counts)


def show(capsys, counts: Counter) -> None:
    with capsys.disabled():
        print()
        for (name, how, outcome), number in sorted(counts.items()):
            print(f"{name:<28} {how:<12} {outcome:<12} {number}")


# -------------------------------------------------------------------------------------- a full disk
@pytest.mark.faults
@pytest.mark.timeout(3000)
def test_a_disk_that_is_full_at_any_write_loses_nothing(
    in_process, finished_run, tmp_path, monkeypatch, capsys
):
    original, real, failures = finished_run[1], os.fsync, 0
    while True:
        shutil.rmtree(tmp_path / "outputs", ignore_errors=True)
        left = iter(range(failures))

        def full(descriptor: int, left=left) -> None:
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr("cu_runner.store.run_directory.os.fsync", full)
            status, _, err = in_process(*SMOKE)
        if status == 0:
            break
        failures += 1
        assert status == 1
        assert err == (
            "cu-run: No space left on device; mend that or choose another paths.outputs, "
            "then run the same command to resume\n"
        )
        assert not list((tmp_path / "outputs").rglob(".*.tmp"))
        status, out, err = in_process(*SMOKE)
        assert (status, err) == (0, "")
        assert_same(run_directory(out, tmp_path), original)
    assert failures >= 20
    with capsys.disabled():
        print(f"\n{failures} writes, each with a full disk once: each resumed to the same bits")


# --------------------------------------------------------------------------------------- odd places
@pytest.mark.parametrize(
    "name",
    ["with spaces", "mit-Umlaut-\N{LATIN SMALL LETTER U WITH DIAERESIS}", "\N{SNOWMAN}'$(x)"],
)
def test_any_folder_will_do(in_process, finished_run, tmp_path, name):
    status, out, err = in_process(*SMOKE, f'paths.outputs="{tmp_path / name}"')
    assert (status, err) == (0, "")
    assert_same(run_directory(out, tmp_path), finished_run[1])


def test_a_folder_behind_a_symbolic_link(in_process, finished_run, tmp_path):
    (tmp_path / "far away").mkdir()
    (tmp_path / "outputs").symlink_to(tmp_path / "far away")
    status, out, err = in_process(*SMOKE)
    assert (status, err) == (0, "")
    assert_same(run_directory(out, tmp_path), finished_run[1])


def test_a_folder_that_cannot_be_written_gets_one_line(in_process, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(locked)], capture_output=True, check=False
    )
    if mounted.returncode:
        locked.chmod(0o500)
    try:
        status, _, err = in_process(*SMOKE, f"paths.outputs={locked}")
    finally:
        if mounted.returncode:
            locked.chmod(0o700)
        else:
            subprocess.run(["umount", str(locked)], check=True)
    if status == 0:
        pytest.skip("this user may write everywhere, and may not mount")
    assert status == 1
    assert err.count("\n") == 1
    assert "mend that or choose another paths.outputs" in err


def test_two_runs_fill_one_cache_at_the_same_time(start, finished_run, tmp_path):
    processes = [start(*SMOKE), start(*SMOKE, "reg=l2")]
    for process in processes:
        _, err = process.communicate(timeout=200)
        assert (process.returncode, err) == (0, "")
    (plain,) = (tmp_path / "outputs/runs/smoke").glob("conabl-none-*")
    assert_same(plain, finished_run[1])


def test_a_clock_that_runs_backwards(in_process, finished_run, tmp_path, monkeypatch):
    real = time.time
    monkeypatch.setattr(time, "time", lambda: 2e9 - real())
    status, out, err = in_process(*SMOKE)
    assert (status, err) == (0, "")
    assert_same(run_directory(out, tmp_path), finished_run[1])
