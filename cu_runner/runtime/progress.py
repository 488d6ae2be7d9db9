"""How far long work is: a bar in a terminal, and lines of the log where there is none."""

from __future__ import annotations

import logging
import math
import time
from types import TracebackType

from tqdm import tqdm

logger = logging.getLogger(__name__)

# Seconds between lines: at every tenth of the work, but one a minute at most and one in five at
# least.
LEAST, MOST = 60.0, 300.0


class Progress:
    """Work of so many steps or images. Use as a context manager, and call advance() after each."""

    def __init__(self, what: str, total: int, unit: str, done: int = 0) -> None:
        """Begin, with some of the work done already. what: names it; unit: "step", "image"."""
        self._what, self._total, self._unit = what, total, unit
        self._done, self._before = done, done
        self._began = self._said = time.monotonic()
        self._bar = tqdm(
            desc=f"  {what}",
            initial=done,
            total=total,
            leave=False,
            disable=None,
            ncols=100,
            unit=unit,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def advance(self, count: int = 1, loss: float | None = None) -> None:
        """Note that so many more are done, and show the loss of the last one, if it has any."""
        tenths = 10 * self._done // self._total
        self._done += count
        shown = "" if loss is None else f"loss {loss:.4g}"
        if not self._bar.disable:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(count)
        elif self._done < self._total:
            self._tell(10 * self._done // self._total > tenths, shown)

    def _tell(self, at_a_tenth: bool, shown: str) -> None:
        now = time.monotonic()
        since = now - self._said
        if since < LEAST or (since < MOST and not at_a_tenth):
            return
        self._said = now
        rate = (now - self._began) / (self._done - self._before)
        left = f"about {math.ceil(rate * (self._total - self._done) / 60)} min left"
        parts = ", ".join(part for part in (shown, left) if part)
        logger.info(
            "   %s: %d of %d %ss, %s", self._what, self._done, self._total, self._unit, parts
        )
