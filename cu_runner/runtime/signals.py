"""What a run does when it is asked to stop.

That is by ctrl-C, by `kill`, or by a cluster that takes the machine away or whose time limit is
near. A signal never cuts a training step or a commit in two: there it is noted, and the run stops
at the next safe place, having saved what it trained. Elsewhere (sampling, loading) it stops at
once, and so it does anywhere at a second ctrl-C.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from cu_runner.runtime import distributed

logger = logging.getLogger(__name__)

Handler = Callable[[int, FrameType | None], object] | int | None

# A cluster's warning that the job must make room; submitit's handler requeues the job.
REQUEUE = (signal.SIGUSR1, signal.SIGUSR2)
SIGNALS = (signal.SIGINT, signal.SIGTERM, *REQUEUE)


class Stopped(BaseException):
    """The run was asked to stop, and nothing of it is half-written."""

    def __init__(self, signum: int, previous: dict[int, Handler]) -> None:
        name = signal.Signals(signum).name
        super().__init__("interrupted" if signum == signal.SIGINT else f"stopped by {name}")
        self.signum, self._previous = signum, previous

    @property
    def status(self) -> int:
        """Return the exit status of a process that a signal ended."""
        return 128 + self.signum

    def requeue(self) -> None:
        """Let the launcher whose job this is put it into the queue again, which ends the process.

        Without a launcher this does nothing. SIGTERM is not answered so: a job that is cancelled
        must stay so, and one that is pre-empted is requeued by the cluster.
        """
        if self.signum not in REQUEUE:
            return
        for signum in REQUEUE:
            handler = self._previous[signum]
            if callable(handler) and handler is not signal.default_int_handler:
                handler(signum, None)


class StopSignals:
    """What receives SIGNALS while it is entered, in the main thread; raises Stopped.

    A shell's background job, which ignores ctrl-C, goes on to do so.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._deferred = 0
        self._previous: dict[int, Handler] = {}

    def __enter__(self) -> StopSignals:
        ignores = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signals = SIGNALS[1:] if ignores else SIGNALS
        self._previous = {signum: signal.signal(signum, self._receive) for signum in signals}
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self._received is not None:  # stopping is under way: only ctrl-C hastens it
            if signum == signal.SIGINT:
                raise KeyboardInterrupt
        else:
            self._received = signum
            if self._deferred:
                logger.info(
                    "%s: what was done is being saved, then the run stops; "
                    "ctrl-C stops it without that",
                    signal.Signals(signum).name,
                )
            else:
                self.check()

    @property
    def received(self) -> bool:
        """Tell whether a signal has come."""
        return self._received is not None

    def share(self) -> None:
        """Take notice, in each of several processes, when one of them was asked to stop."""
        if distributed.any_of(self.received) and self._received is None:
            self._received = signal.SIGTERM

    def check(self) -> None:
        """Stop here if that was asked for."""
        if self._received is not None:
            raise Stopped(self._received, self._previous)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Do whole what is done here.

        A signal takes effect at the end, or where check() is called.
        """
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
        if not self._deferred:
            self.check()
