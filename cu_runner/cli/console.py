"""What the commands share as processes: a device, quiet libraries, the log, and one line for a failure that a user can mend."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from cu_runner.schema.secrets import redact


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; options and overrides may stand in any order."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` lists every option\n")


def whole_number(text: str) -> int:
    """A number from 1 on, as the value of an option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def quiet_libraries() -> None:
    """A normal run prints our lines only."""
    import warnings

    warnings.filterwarnings("ignore")
    for name in (
        "transformers",
        "diffusers",
        "torch",
        "accelerate",
        "huggingface_hub",
        "filelock",
        "wandb",
    ):
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
        file.handle(
            package.makeRecord(
                __name__, logging.ERROR, "", 0, "stopped by %r", (error,), sys.exc_info()
            )
        )
        raise
    finally:
        package.removeHandler(terminal)
        package.removeHandler(file)
        with contextlib.suppress(OSError):
            file.close()
