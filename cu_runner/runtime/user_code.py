"""Where in a user's own code an error came from."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path

from cu_runner.runtime.paths import PACKAGE

INSTALLED = ("stdlib", "platstdlib", "purelib", "platlib")  # folders of what is nobody's own
ALLOWED = re.compile(r"\+*allow_modules=\[?([^\]]*)\]?")


def allowed_in(overrides: Iterable[str]) -> list[str]:
    """Return the modules that a command line allows."""
    found = [match[1] for text in overrides if (match := ALLOWED.fullmatch(text))]
    return [name.strip(" '\"") for names in found for name in names.split(",") if name.strip()]


def raised_in(error: BaseException, modules: list[str]) -> bool:
    """Tell whether an error passed through one of these modules."""
    names = [
        str(frame.f_globals.get("__name__", ""))
        for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    return any(f"{name}.".startswith(f"{module}.") for name in names for module in modules)


def ends_in_own_code(error: BaseException) -> bool:
    """Tell whether a line of the user's own raised an error, not one of ours that it called."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and is_own(frames[-1].filename)


def place_of(error: BaseException) -> str | None:
    """Return FILE:LINE of what is the user's own and raised an error, or cannot be compiled."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if is_own(frame.filename)]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else None


def is_own(file: str) -> bool:
    """Tell whether a file is neither of this package nor of an installed one."""
    path = Path(file)
    installed = [Path(sysconfig.get_path(name)) for name in INSTALLED]
    return path.is_file() and not any(path.is_relative_to(home) for home in (PACKAGE, *installed))
