"""Trains earlier targets again that came back. No evaluation image has a part in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from cu_runner.concepts.requests import Request
from cu_runner.config.run_config import RunConfig
from cu_runner.methods.base import Method
from cu_runner.regularizers.base import Regularizer
from cu_runner.request.scope import Scope
from cu_runner.runner.early_stop import EarlyStop, LossLeft
from cu_runner.runner.training import Training, erase
from cu_runner.runtime.signals import StopSignals

Entry = dict[str, str | float]


def train_again(
    request: Request,
    plan: RunConfig,
    method: Method[Any],
    regularizers: dict[str, Regularizer],
    scope_of: Callable[[Request], Scope],
    stop: StopSignals,
) -> list[Entry]:
    """Train the earlier targets again whose loss has come back, one after another, in place.

    That is with setting.recheck. A run that is stopped here goes on with what was saved of the
    request itself, and does this anew.

    Args:
        request: that was just trained.
        plan, method, regularizers: of the run.
        scope_of: makes the scope of a request from the weights as they are.

    Returns:
        Per earlier target its name and the loss that was left, as a fraction; where it was trained
        again, its steps and what was left then.
    """
    setting = plan.setting
    if setting.recheck is None or setting.stop_loss is None:
        return []
    found: list[Entry] = []
    for number, target in enumerate(request.earlier, start=1):
        scope = scope_of(dataclasses.replace(request, index=number, after=request.index))
        method.begin_request(scope)
        loss_left = LossLeft(scope, method)
        entry: Entry = {"target": target.name, "loss_left": loss_left()}
        if float(entry["loss_left"]) > setting.recheck * setting.stop_loss:
            early_stop = EarlyStop(setting, lambda: 0.0, (), loss_left)

            def on_step(training: Training, early_stop: EarlyStop = early_stop) -> None:
                training.ended = early_stop(training.done)
                stop.share()
                stop.check()

            report = erase(scope, method, regularizers, plan.spine.train, on_step)
            entry |= {"steps": len(report.logs), "loss_left_then": loss_left()}
        found.append(entry)
    return found
