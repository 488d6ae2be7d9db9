"""Locks: who is waited for, and for how long; a run directory that goes away under its run."""

import errno
import fcntl
import os
import shutil

import pytest
import torch
from conftest import SMOKE, run_directory
from filelock import FileLock
from test_store import FILES, KEY, LATENTS, finished, make_store, result

from cu_runner.runner.runner import Runner
from cu_runner.runtime.code_identity import identify
from cu_runner.schema.errors import StoreError
from cu_runner.store import cache as caches
from cu_runner.store.cache import Cache
from cu_runner.store.files import to_safetensors
from cu_runner.store.locks import LOCK, acquire, holder_of, is_held

ENTRY = {LATENTS: to_safetensors({"latents": torch.ones(3)})}


UNTIL = "waiting for that, 0.05 s at most, then going on without it"


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(caches, "SAY_AFTER", 0.05)
    monkeypatch.setattr(caches, "GIVE_UP_AFTER", 0.1)


@pytest.fixture
def without_flock(monkeypatch):
    def missing(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)


# --------------------------------------------------------------------------------- an entry's lock
def test_who_holds_an_entry_is_said_and_not_waited_for_long(tmp_path, caplog, impatient):
    cache = Cache(tmp_path, identify())
    cache.put("anchors", KEY, ENTRY)
    (entry,) = (tmp_path / "anchors").iterdir()
    (entry / LATENTS).write_bytes(b"half")
    holder = FileLock(entry / LOCK)
    assert acquire(holder, 1)
    cache.put("anchors", KEY, ENTRY)
    waiting, going_on = caplog.messages
    assert waiting.startswith(f"{entry}: process {os.getpid()} on ")
    assert "pytest" in waiting
    assert waiting.endswith(f", in {os.getcwd()}) writes it; {UNTIL}")
    assert going_on == f"{entry}: is not let go of; this run goes on without it"
    assert (entry / LATENTS).read_bytes() == b"half"  # nobody writes beside the holder
    holder.release()
    cache.put("anchors", KEY, ENTRY)
    assert cache.fetch("anchors", KEY) == ENTRY
    assert len(caplog.messages) == 2


def test_a_lock_without_a_note(tmp_path, caplog, impatient):
    cache = Cache(tmp_path, identify())
    cache.put("anchors", KEY, ENTRY)
    (entry,) = (tmp_path / "anchors").iterdir()
    (entry / LOCK).write_text("")
    with FileLock(entry / LOCK):
        cache.put("anchors", KEY, ENTRY)
    assert caplog.messages[0] == f"{entry}: a process that left no note writes it; {UNTIL}"


@pytest.mark.parametrize("way", ["a file", "nothing may be written"])
def test_a_cache_that_cannot_be_written_is_said_once(tmp_path, caplog, monkeypatch, way):
    cache = Cache(tmp_path / "cache", identify())
    if way == "a file":
        (tmp_path / "cache").write_text("")
    else:

        def refuse(path, content) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(caches, "write_atomic", refuse)
    for number in range(3):
        cache.put("anchors", KEY | {"number": number}, ENTRY)
        assert cache.fetch("anchors", KEY | {"number": number}) is None
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path}/cache: cannot be written (")
    assert line.endswith("; this run goes on without a cache")


def test_a_run_without_a_cache_is_the_same_run(in_process, finished_run, tmp_path):
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/cache").write_text("no folder")
    status, out, err = in_process(*SMOKE)
    assert (status, err) == (0, "")
    assert out.count("this run goes on without a cache") == 1
    made = run_directory(out, tmp_path)
    for name in ("steps/02/delta.safetensors", "steps/02/predictions.csv", "steps/02/grid.png"):
        assert (made / name).read_bytes() == (finished_run[1] / name).read_bytes()


@pytest.mark.parametrize("name", ["step.json", "more.txt", "../../x"])
def test_an_entry_holds_its_own_files_and_no_other(tmp_path, name):
    cache = Cache(tmp_path / "cache", identify())
    cache.put("anchors", KEY, ENTRY)
    (entry,) = (tmp_path / "cache/anchors").iterdir()
    before = sorted(tmp_path.rglob("*"))
    index = (entry / "index.json").read_text()
    (entry / "index.json").write_text(index.replace('"files": {', f'"files": {{"{name}": "0",'))
    assert cache.fetch("anchors", KEY) is None
    assert sorted(tmp_path.rglob("*")) == before


# ------------------------------------------------------------------------------------ without flock
def test_without_flock_a_run_is_locked_and_seen_to_run(tmp_path, without_flock, recwarn):
    run = tmp_path / "run"
    with make_store(run):
        assert is_held(run / LOCK)
        with pytest.raises(StoreError, match="another process is writing this run"):
            make_store(run).__enter__()
    assert not is_held(run / LOCK)
    assert not recwarn.list
    (run / LOCK).write_text(f"{2**22 + 1}\n{os.uname().nodename}\n")  # of a process that was killed
    assert not is_held(run / LOCK)
    (run / LOCK).write_text("1\nanother-machine\n")
    assert is_held(run / LOCK)


# ------------------------------------------------------------------------------ the run's directory
def test_a_second_writer_is_told_who_the_first_is_also_where_the_lock_was_removed(tmp_path):
    with make_store(tmp_path / "run"):
        with pytest.raises(StoreError, match=rf"run: process {os.getpid()} on .*; wait for it to"):
            make_store(tmp_path / "run").__enter__()
        (tmp_path / "run" / LOCK).unlink()
        assert is_held(tmp_path / "run" / LOCK)
        with pytest.raises(StoreError, match="a process that left no note; wait for it to end"):
            make_store(tmp_path / "run").__enter__()
        assert not (tmp_path / "run" / LOCK).exists()
    assert not is_held(tmp_path / "run" / LOCK)
    assert finished(tmp_path / "run") == []
    assert holder_of(tmp_path / "nothing") == "a process that left no note"


def moved(run) -> None:
    run.rename(run.with_name("elsewhere"))


def removed(run) -> None:
    shutil.rmtree(run)


def replaced(run) -> None:
    shutil.copytree(run, run.with_name("copy"))
    moved(run)
    run.with_name("copy").rename(run)


def parent_moved(run) -> None:
    run.parent.rename(run.parent.with_name("elsewhere"))


@pytest.mark.parametrize("what", [moved, removed, replaced, parent_moved])
def test_nothing_is_written_where_the_directory_was(tmp_path, what):
    run = tmp_path / "outputs/run"
    with make_store(run) as store:
        first = store.save_step(result(0, FILES), None)
        what(run)
        before = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}
        for write in (
            lambda: store.save_step(result(1, FILES), first),
            lambda: store.write_metrics([first]),
            lambda: store.write_summary([first]),
        ):
            with pytest.raises(StoreError, match=r"outputs/run: was moved or removed") as caught:
                write()
            place = what is not removed
            assert ("(now " in str(caught.value)) is place
            assert "\n" not in str(caught.value)
        assert {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))} == before


def test_a_run_whose_directory_is_moved_stops_and_goes_on_when_it_is_back(
    in_process, filled_cache, finished_run, tmp_path, monkeypatch
):
    away = tmp_path / "away"

    def move(runner) -> None:
        if not away.exists() and runner.store.directory.joinpath("steps/01/step.json").exists():
            runner.store.directory.rename(away)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "_note_first_step", move)
        status, _, err = in_process(*SMOKE)
    assert (status, err.count("\n")) == (1, 1), err
    assert "was moved or removed while the run was working (now " in err
    place = tmp_path / finished_run[1].relative_to(finished_run[0])
    assert not place.exists()
    assert "was moved or removed" in (away / "run.log").read_text()
    assert not list(away.rglob("02"))
    away.rename(place)
    status, _, err = in_process(*SMOKE)
    assert (status, err) == (0, "")
    name = "steps/02/delta.safetensors"
    assert (place / name).read_bytes() == (finished_run[1] / name).read_bytes()
