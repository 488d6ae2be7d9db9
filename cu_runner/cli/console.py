"""What the commands share: options, quiet libraries, the log."""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from cu_runner import __version__
from cu_runner.cli.failures import tell
from cu_runner.runtime.lazy import diffusers, transformers
from cu_runner.runtime.signals import Stopped
from cu_runner.schema.errors import one_line
from cu_runner.schema.secrets import redact
from cu_runner.schema.words import printable

NOISY = ("transformers", "diffusers", "torch", "accelerate", "huggingface_hub", "filelock", "wandb")


NARROWEST = 40  # columns; argparse fails in a terminal of a few


class NarrowFormatter(argparse.HelpFormatter):
    """Help for a terminal of any width."""

    def __init__(self, prog: str, **options: Any) -> None:
        """Take the command's name; the width is the terminal's, but no less than NARROWEST."""
        columns = shutil.get_terminal_size().columns - 2
        super().__init__(prog, **{"width": max(columns, NARROWEST), **options})


def without_reader(main: Callable[[], None]) -> Callable[[], None]:
    """Let a command end in peace where nobody reads its output: `cu-run --help | head -1`.

    Output that is lost on a full disk is a failure.
    """

    @functools.wraps(main)
    def called() -> None:
        if sys.stdout is None:  # closed by whoever started the command
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        try:
            main()
        except BrokenPipeError:  # elsewhere than in what one_line_failures() holds: in --help
            pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise unwritten(error) from None
        finally:
            try:
                sys.stdout.flush()
            except OSError as error:  # the interpreter would try again at its end, and say so
                lost = unwritten(error)
                if not isinstance(error, BrokenPipeError):
                    raise lost from None

    return called


def unwritten(error: OSError) -> SystemExit:
    """Give up the output, say so unless nobody reads it, and return the end of the command."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if not isinstance(error, BrokenPipeError):
        tell(f"{Path(sys.argv[0]).name}: the output cannot be written: {error.strerror}")
    return SystemExit(1)


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line, and knows --version."""

    def __init__(
        self, prog: str | None = None, description: str | None = None, **options: Any
    ) -> None:
        """Take the command's name, and its module's docstring, whose first paragraph is shown."""
        first = " ".join((description or "").partition("\n\n")[0].split())
        options.setdefault("formatter_class", NarrowFormatter)
        super().__init__(prog=prog, description=first or None, **options)
        self.add_argument("--version", action="version", version=f"{self.prog} {__version__}")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help or a version; argparse itself would hide that a full disk takes none."""
        if file is sys.stdout:
            file.write(message)
        else:
            super()._print_message(message, file)

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` lists every option\n")


def folder(text: str) -> Path:
    """Read the path of a folder that is there, as the value of an option."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no such directory")
    return Path(text)


def add_config_dir(parser: argparse.ArgumentParser) -> None:
    """Let a command take --config-dir, as cu-run does."""
    parser.add_argument(
        "--config-dir",
        type=folder,
        metavar="DIR",
        help="a configuration tree of your own beside conf/, as for cu-run",
    )


def own_tree(arguments: argparse.Namespace) -> list[str]:
    """Return --config-dir as the word that cu-run takes; none where it was not given."""
    return [f"--config-dir={arguments.config_dir}"] if arguments.config_dir else []


def without_permissions(words: list[str]) -> list[str]:
    """Return what a command is told but for allow_modules=..., which every command takes."""
    return [word for word in words if not is_permission(word)]


def is_permission(word: str) -> bool:
    """Tell whether a word allows modules of the user's: allow_modules=[my_methods]."""
    return word.lstrip("+").startswith("allow_modules=")


def whole_number(text: str) -> int:
    """Read a number from 1 on, as the value of an option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def quiet_libraries() -> None:
    """Silence the libraries that load models: a normal run prints our lines only."""
    warnings.filterwarnings("ignore")
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


class RedactingFormatter(logging.Formatter):
    """Lines of the log without secrets of the environment, which a library's error may quote."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        return printable(redact(super().format(record)))


def say(text: str) -> None:
    """Print text of a command's result, at once; what would steer the terminal is shown."""
    print(printable(text), flush=True)


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Send the package's log to the terminal, plain, and to run.log with the time."""
    package = logging.getLogger("cu_runner")
    terminal, file = logging.StreamHandler(sys.stdout), logging.FileHandler(path, encoding="utf-8")
    terminal.setFormatter(RedactingFormatter("%(message)s"))
    file.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    package.setLevel(logging.INFO)
    package.propagate = False
    package.addHandler(terminal)
    package.addHandler(file)
    try:
        yield
    except BaseException as error:
        asked = isinstance(error, Stopped | KeyboardInterrupt)  # no traceback for that
        said = (
            ("stopped: %s", (one_line(error),), None)
            if asked
            else ("stopped by %r", (error,), sys.exc_info())
        )
        file.handle(package.makeRecord(__name__, logging.ERROR, "", 0, *said))
        vars(error)["log"] = path  # for the line that tells of it
        raise
    finally:
        package.removeHandler(terminal)
        package.removeHandler(file)
        with contextlib.suppress(OSError):
            file.close()
