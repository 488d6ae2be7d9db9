"""Every command where nobody reads what it prints, and in a terminal of one column."""

import os

import pytest
from commands import ENTRIES, environment, run_forked


def nobody_reads() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    os.close(writing)


@pytest.mark.parametrize("name", ENTRIES)
def test_help_that_nobody_reads(name, tmp_path):
    done = run_forked(name, "--help", cwd=tmp_path, before=nobody_reads)
    assert done.returncode == 0
    assert done.stderr == ""


def disk_is_full() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
@pytest.mark.parametrize("name", ENTRIES)
def test_output_that_a_full_disk_does_not_take(name, tmp_path):
    done = run_forked(name, "--help", cwd=tmp_path, before=disk_is_full)
    said = f"{name}: the output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)


@pytest.mark.parametrize("columns", [1, 30])
@pytest.mark.parametrize("name", ENTRIES)
def test_a_narrow_terminal(name, columns, tmp_path):
    done = run_forked(name, "--help", cwd=tmp_path, env=environment(COLUMNS=str(columns)))
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout) > 300
    wrong = run_forked(name, "--nope", cwd=tmp_path, env=environment(COLUMNS=str(columns)))
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr
