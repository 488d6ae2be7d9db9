"""Ends a request when enough is forgotten."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cu_runner.schema.settings import PlanSettings


class EarlyStop:
    """Ends a request when UA has reached setting.stop_at, measured every setting.interval steps.

    It also ends one whose UA did not become better for setting.patience_steps steps. UA comes from
    the images and the classifier that judge the run afterwards: such a run is tuned on them.
    """

    def __init__(
        self,
        setting: PlanSettings,
        measure: Callable[[], float],
        seen: Sequence[dict[str, float]] = (),
    ) -> None:
        """Take what measures UA, in percent, and what was seen before an interruption."""
        self._setting, self._measure, self.seen = setting, measure, list(seen)

    def __call__(self, step: int) -> bool:
        """Tell whether the request should end after this step."""
        setting = self._setting
        if setting.stop_at is None or step % setting.interval:
            return False
        self.seen.append({"step": step, "UA": self._measure()})
        last = self.seen[-setting.patience :]
        reached = len(last) == setting.patience and all(
            entry["UA"] >= setting.stop_at for entry in last
        )
        return reached or self._stalls(step)

    def _stalls(self, step: int) -> bool:
        """Tell whether the best UA, of 0 at the start, is patience_steps old."""
        best, since = 0.0, 0.0
        for entry in self.seen:
            if entry["UA"] > best:
                best, since = entry["UA"], entry["step"]
        patience = self._setting.patience_steps
        return patience is not None and step - since >= patience
