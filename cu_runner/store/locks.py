"""Locks of directories that several processes write to, and who holds them.

A lock is the flock of a file that stays, in which its holder leaves a note for whoever waits; on a
file system without flock it is a file that is there while the lock is held.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from filelock import FileLock, SoftFileLock, Timeout

from cu_runner.schema.secrets import redact

LOCK = ".lock"
LONGEST = 200  # characters of a command in a note


def acquire(lock: FileLock, seconds: float) -> bool:
    """Take a lock within so many seconds; tell whether that went well. Raises OSError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # filelock's own word on a file system without flock
        try:
            lock.acquire(timeout=seconds, poll_interval=0.05)
        except Timeout:
            return False
    leave_note(lock, f"{os.getpid()}\n{socket.gethostname()}\n{own_command()}\n")
    return True


def release(lock: FileLock) -> None:
    """Let go of a lock, if it is held, and leave its file empty."""
    if lock.is_locked:
        leave_note(lock, "")
        lock.release()


def leave_note(lock: FileLock, note: str) -> None:
    """Write into the file of a lock that is held; a SoftFileLock's names its holder already."""
    if not isinstance(lock, SoftFileLock):
        # a full disk is complained of where it matters, and a file that is gone is not made again
        with contextlib.suppress(OSError), open(lock.lock_file, "r+", encoding="utf-8") as file:
            file.truncate()
            file.write(note)


@contextlib.contextmanager
def waited_for(
    path: Path, say_after: float, limit: float, say: Callable[[str], None]
) -> Iterator[bool]:
    """Hold a lock, and yield whether it could be had within a limit.

    Args:
        path: of the lock's file.
        say_after, limit: seconds.
        say: is told who holds it, if it is not free after so many seconds.
    """
    lock, began = FileLock(path), time.monotonic()
    held = acquire(lock, say_after)
    if not held:
        say(holder_of(path))
        held = acquire(lock, max(0.0, limit - (time.monotonic() - began)))
    try:
        yield held
    finally:
        if held:
            release(lock)


def lock_directory(descriptor: int, seconds: float) -> bool:
    """Lock an open directory itself, which holds although the lock's file in it is removed.

    Tell whether that went well within so many seconds; it does where directories have no flock.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        except OSError:
            return True


def own_command() -> str:
    """Return this process's command and where it runs, in a line without secrets."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    line = " ".join(redact(command).split())
    return f"{line if len(line) <= LONGEST else line[:LONGEST] + '...'}, in {Path.cwd()}"


def holder_of(path: Path) -> str:
    """Say which process holds a lock, as far as its file tells."""
    pid, host, command = read_note(path)
    if pid is None:
        return "a process that left no note"
    return f"process {pid} on {host}" + (f" ({command})" if command else "")


def read_note(path: Path) -> tuple[int | None, str, str]:
    """Return pid, host and command as a lock's file says them; None and nothing without them."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return int(lines[0]), lines[1], lines[2] if len(lines) > 2 and " " in lines[2] else ""
    except (OSError, ValueError, IndexError):
        return None, "", ""


def is_held(path: Path) -> bool:
    """Tell whether a process holds a lock, or the directory in which its file is.

    A shared lock, let go at once, is refused then. Without flock, the file tells.
    """
    for place in (path, path.parent):
        try:
            descriptor = os.open(place, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no flock here
            pid, host, _ = read_note(path)
            here = host.startswith(socket.gethostname())  # filelock may append a namespace
            return pid is not None and (not here or psutil.pid_exists(pid))
        finally:
            os.close(descriptor)
    return False
