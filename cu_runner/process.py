"""What the commands share as processes: a device, quiet libraries, the log, and one line for a failure that a user can mend."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cu_runner.complaints import judge
from cu_runner.credentials import redact
from cu_runner.interruption import Stopped

if TYPE_CHECKING:  # pydantic takes a while, and --help must be quick
    from cu_runner.settings import Spine


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; options and overrides may stand in any order."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` lists every option\n")


def whole_number(text: str) -> int:
    """A number from 1 on, as the value of an option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def choose_device(spine: "Spine") -> str:
    """The device of a run, after setting torch's threads. Raises ValueError if it is not there."""
    import torch

    if spine.num_threads:
        torch.set_num_threads(spine.num_threads)
    device = spine.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device}: no CUDA device is visible; use device=cpu or device=auto")
    if device == "cuda":  # of several processes, each has a GPU of its own
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if device.startswith("cuda:") and int(device[5:]) >= torch.cuda.device_count():
        raise ValueError(f"device={device}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return device


@contextlib.contextmanager
def one_line_failures(program: str, statuses: list[int] | None = None, note: Callable[[str], None] | None = None) -> Iterator[None]:
    """Turn a failure that a user can mend into one line on stderr and an exit status: 2 bad input, 1 failed, 130 interrupted,
    128 + its number for a signal that asked a run to stop.

    Anything else is ours and is raised. statuses: takes the status instead, so that the process goes on (a sweep). note: is told
    the line, too.
    """
    try:
        yield
    except Stopped as stopped:
        print(f"{program}: {stopped}; what was done is kept. Run the same command again to go on", file=sys.stderr, flush=True)
        stopped.requeue()
        sys.exit(stopped.status)
    except KeyboardInterrupt:
        print(f"{program}: interrupted; finished requests are kept. Run the same command again to resume", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        status, message = judge(error, sys.argv[1:])
        if getattr(error, "told", False):  # by the first of several processes
            sys.exit(status)
        print(redact(f"{program}: {message}"), file=sys.stderr, flush=True)
        if note is not None:
            note(redact(message))
        if statuses is None:
            sys.exit(status)
        statuses.append(status)


def quiet_libraries() -> None:
    """A normal run prints our lines only."""
    import warnings

    warnings.filterwarnings("ignore")
    for name in ("transformers", "diffusers", "torch", "accelerate", "huggingface_hub", "filelock", "wandb"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import diffusers
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()


class Line(logging.Formatter):
    """A line of the log without secrets of the environment, which an error of a library may quote."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Send the package's log to the terminal, plain, and to run.log with the time."""
    package = logging.getLogger("cu_runner")
    terminal, file = logging.StreamHandler(sys.stdout), logging.FileHandler(path, encoding="utf-8")
    terminal.setFormatter(Line("%(message)s"))
    file.setFormatter(Line("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    package.setLevel(logging.INFO)
    package.propagate = False
    package.addHandler(terminal)
    package.addHandler(file)
    try:
        yield
    except BaseException as error:
        file.handle(package.makeRecord(__name__, logging.ERROR, "", 0, "stopped by %r", (error,), sys.exc_info()))
        raise
    finally:
        package.removeHandler(terminal)
        package.removeHandler(file)
        with contextlib.suppress(OSError):
            file.close()
