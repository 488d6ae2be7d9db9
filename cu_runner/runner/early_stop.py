"""Ends a request when enough is forgotten."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cu_runner.methods.base import Method
from cu_runner.models.parameters import placed
from cu_runner.request.scope import Scope
from cu_runner.runtime.lazy import without_gradients
from cu_runner.schema.errors import TrainingError
from cu_runner.schema.settings import PlanSettings

PROBES = 3  # batches on which a loss is measured


class LossLeft:
    """The method's loss, as a fraction of what it is with the untouched weights.

    It is measured on PROBES batches that the request does not train on. No evaluation image and no
    classifier has a part in it.
    """

    def __init__(self, scope: Scope, method: Method[Any]) -> None:
        """Take a request; the method has begun it when the loss is measured."""
        self._scope, self._method = scope, method
        self._untouched: float | None = None

    def __call__(self) -> float:
        """Return what is left with the weights as they are.

        Raises:
            TrainingError: the loss of the untouched weights is not above 0.
        """
        if self._untouched is None:
            with placed(self._scope.params, self._scope.base):
                self._untouched = self._loss()
        if not self._untouched > 0:
            raise TrainingError(
                "setting.stop_loss: the method's loss on the untouched weights is "
                f"{self._untouched:g}, and no fraction of it can be reached; leave stop_loss out, "
                "or choose a method whose loss falls to 0, as conabl's and esd's do"
            )
        return self._loss() / self._untouched

    @without_gradients
    def _loss(self) -> float:
        """Return the mean loss over the probes."""
        scope, method = self._scope, self._method
        steps = range(scope.steps, scope.steps + PROBES)
        losses = [method.loss(scope, method.batch(scope, step))[0].item() for step in steps]
        return sum(losses) / PROBES


class EarlyStop:
    """Ends a request when enough is forgotten, measured every setting.interval steps.

    With setting.stop_at that is a UA. It also ends one whose UA did not become better for
    setting.patience_steps steps. UA comes from the images and the classifier that judge the run
    afterwards: such a run is tuned on them. With setting.stop_loss it is the loss that is left,
    which comes from training alone.
    """

    def __init__(
        self,
        setting: PlanSettings,
        measure: Callable[[], float],
        seen: Sequence[dict[str, float]] = (),
        loss_left: Callable[[], float] = lambda: 1.0,
    ) -> None:
        """Take what measures UA, in percent, and what was seen before an interruption.

        loss_left: what measures the loss that is left, as a fraction.
        """
        self._setting, self._measure, self.seen = setting, measure, list(seen)
        self._loss_left = loss_left

    def __call__(self, step: int) -> bool:
        """Tell whether the request should end after this step."""
        setting = self._setting
        if step % setting.interval:
            return False
        if setting.stop_loss is not None:
            left = self._loss_left()
            self.seen.append({"step": step, "loss_left": left})
            return left <= setting.stop_loss
        if setting.stop_at is None:
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
