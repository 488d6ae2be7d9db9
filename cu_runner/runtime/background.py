"""Work beside the caller's: in a thread of its own, and on a GPU in a stream of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Self

from cu_runner.runtime.lazy import torch, without_gradients

if TYPE_CHECKING:
    from torch import Tensor


class Background:
    """Runs work on tensors beside its caller, one piece at a time and in order; off, it runs in the caller's own time.

    What a piece raises is raised by the next run(), or at the end of the `with` block. A piece that has begun is waited for.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1) if enabled else None
        self._stream = torch.cuda.Stream(device) if enabled and device.type == "cuda" else None
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            if error is None:
                self._wait()
            self._pending = None

    def run(self, work: Callable[[Tensor], None], tensor: Tensor) -> None:
        """Do work(tensor) without gradients, after the work given before it. Its results must be on the CPU when it returns."""
        if self._pool is None:
            with torch.no_grad():
                work(tensor)
            return
        self._wait()
        made = torch.cuda.current_stream(tensor.device).record_event() if self._stream else None
        self._pending = self._pool.submit(self._work, work, tensor, made)

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        finally:
            del pending  # it holds its error, whose traceback holds this frame: a cycle that keeps the tensors of every frame

    @without_gradients
    def _work(
        self, work: Callable[[Tensor], None], tensor: Tensor, made: torch.cuda.Event | None
    ) -> None:
        if self._stream is None:
            work(tensor)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(made)
            tensor.record_stream(
                self._stream
            )  # its memory is not used again before this stream is done with it
            work(tensor)
            self._stream.synchronize()
