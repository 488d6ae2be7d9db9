"""How far work is that takes long: a bar in a terminal, lines of the log elsewhere."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from tqdm import TqdmWarning, tqdm

logger = logging.getLogger(__name__)

FIRST = 10.0  # seconds until the first line; each further one waits twice as long
LONGEST = 300.0  # seconds between two lines at most
SHAPE = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} {unit}s [{elapsed}<{remaining}{postfix}]"


_unseen = contextvars.ContextVar("unseen", default=False)


@contextlib.contextmanager
def unseen(hidden: bool = True) -> Iterator[None]:
    """Show no bar and say no line inside, if hidden."""
    token = _unseen.set(hidden or _unseen.get())
    try:
        yield
    finally:
        _unseen.reset(token)


def in_notebook() -> bool:
    """Tell whether a Jupyter kernel runs this."""
    return "ipykernel.zmqshell" in sys.modules


def make_bar(**settings: Any) -> Any:
    """Make a bar of tqdm: of a notebook, of a terminal, or one that is not shown."""
    if not in_notebook():
        return tqdm(disable=_unseen.get() or None, ncols=100, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmWarning)  # without ipywidgets the bar is text
        from tqdm.auto import tqdm as notebook_bar

        return notebook_bar(disable=_unseen.get(), ncols=100, **settings)


def note(text: str) -> None:
    """Tell whoever calls the library something that was chosen for them, on stderr."""
    if not _unseen.get():
        tqdm.write(text, file=sys.stderr)


class Progress:
    """How many of a number of things are done. A bar where stderr is a terminal, else lines."""

    def __init__(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """
        Args:
            unit: of what is counted, in the singular.
            done: how many were done before.
        """
        self._total, self._label, self._unit = total, label, unit
        self._begun, self._done = done, float(done)
        self._started = self._said = time.monotonic()
        self._wait = FIRST
        self._bar = make_bar(
            desc=f"  {label}",
            initial=done,
            total=total,
            leave=False,
            unit=unit,
            bar_format=SHAPE,
        )

    def advance(self, count: int = 1, loss: float | None = None) -> None:
        """Say that so many more are done, and the loss of the last one, if it has any."""
        self.reach(self._done + count, "" if loss is None else f"loss {loss:.4g}")

    def reach(self, done: float, note: str = "") -> None:
        """Say that so many are done in all, fractions too. note: what else is known."""
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._done)
        self._done = done
        now = time.monotonic()
        if (
            self._bar.disable
            and not _unseen.get()
            and now - self._said >= self._wait
            and done < self._total
        ):
            self._say(now, note)

    def between(self, start: int, stop: int) -> Callable[[float], None]:
        """Return what is told the share that is done of the things from `start` to `stop`."""
        return lambda share: self.reach(start + share * (stop - start))

    def _say(self, now: float, note: str) -> None:
        self._said, self._wait = now, min(2 * self._wait, LONGEST)
        made = self._done - self._begun
        left = ""
        if made > 0:
            seconds = (now - self._started) / made * (self._total - self._done)
            left = f", {duration(seconds)} left"
        counted = f"{self._done:.0f} of {self._total} {self._unit}s"
        logger.info("   %s: %s%s%s", self._label, counted, left, f", {note}" if note else "")

    def __enter__(self) -> Progress:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the bar away."""
        self._bar.close()


def counted(label: str, total: int, unit: str) -> Iterator[int]:
    """Yield 0, 1, ... under a bar."""
    with Progress(label, total, unit) as bar:
        for number in range(total):
            yield number
            bar.advance()


def duration(seconds: float) -> str:
    """Return a time in words: about 40 s, about 12 min, about 3.5 h."""
    if seconds < 100:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 6000 else f"about {seconds / 3600:.1f} h"


@contextlib.contextmanager
def slow(what: str) -> Iterator[None]:
    """Log what is done, once, if it takes more than ten seconds and has no number to count."""
    timer = threading.Timer(FIRST, logger.info, ("   %s ...", what))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def on_stderr() -> Iterator[None]:
    """Show the lines of this module on stderr, for a command that has no log."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
