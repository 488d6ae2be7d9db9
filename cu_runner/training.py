"""The inner loop of one request: loss and penalties, gradients, optimiser, in an order that is the same for every method."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from cu_runner.concepts import Request
from cu_runner.methods.base import Method, Scope
from cu_runner.params import snapshot
from cu_runner.regularizers.base import Regularizer
from cu_runner.settings import SettingChoice, TrainSettings


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line."""


@dataclass(frozen=True)
class TrainingReport:
    """logs: what was logged of each step. method: its own record. regularizers: theirs, by name."""

    logs: list[dict[str, float]]
    method: dict[str, object]
    regularizers: dict[str, dict[str, object]]


def check_composition(method: Method, regularizers: dict[str, Regularizer]) -> None:
    """A method without a loss leaves nothing to regularizers of the loss or the gradient. Raises ValueError."""
    for name, regularizer in regularizers.items():
        idle = [stage for stage in regularizer.acts_on if stage in ("loss", "gradient")]
        if method.closed_form and idle:
            raise ValueError(
                f"reg={name} acts on the {idle[0]}, and the method sets the weights in closed form without one; "
                "choose a regularizer of the step (apply=update where it has that option) or another method"
            )


class EarlyStop:
    """Ends a request when UA has reached setting.stop_at, measured every setting.interval steps.

    UA comes from the images and the classifier that judge the run afterwards: such a run is tuned on them.
    """

    def __init__(self, setting: SettingChoice, measure: Callable[[], float]) -> None:
        """measure: UA of the weights as they are, in percent."""
        self._setting, self._measure = setting, measure
        self.seen: list[dict[str, float]] = []

    def __call__(self, step: int) -> bool:
        """True if the request should end after this step."""
        setting = self._setting
        if setting.stop_at is None or step % setting.interval:
            return False
        self.seen.append({"step": step, "UA": self._measure()})
        last = self.seen[-setting.patience :]
        return len(last) == setting.patience and all(entry["UA"] >= setting.stop_at for entry in last)


def erase(
    scope: Scope,
    method: Method,
    regularizers: dict[str, Regularizer],
    settings: TrainSettings,
    on_step: Callable[[int], bool] = lambda step: False,
) -> TrainingReport:
    """Unlearn one request, in place in scope.params.

    Each step: loss -> backward, penalties -> backward, on_gradients (method, then regularizers), clip, update (method),
    on_step (regularizers).

    Args:
        scope: the weights to train and the request.
        regularizers: by name, in hook order.
        on_step: called with the number of each finished step; True ends the request there.

    Raises:
        TrainingError: the loss is not finite; the weights in scope are then of no use.
    """
    params = list(scope.params.values())
    for parameter in params:
        parameter.requires_grad_(True)
    method.begin_request(scope)
    records = {name: regularizer.begin_request(scope, method) for name, regularizer in regularizers.items()}
    edits_step = any("step" in regularizer.acts_on for regularizer in regularizers.values())
    optimizer, batches, rows = make_optimizer(params, settings), method.batches(scope), []
    steps = 1 if method.closed_form else settings.steps
    for step in tqdm(range(steps), desc=f"  unlearn {scope.request.label}", leave=False, disable=None, ncols=100, unit="step"):
        logs = method.backward(scope, next(batches))
        for name, regularizer in regularizers.items():
            penalty = regularizer.penalty(scope.params)
            if penalty is not None:
                penalty.backward()
                logs[f"{name}_penalty"] = penalty.item()
                logs["loss"] += logs[f"{name}_penalty"]
        if not math.isfinite(logs["loss"]):
            raise TrainingError(diverged(f"a loss of {logs['loss']}", scope.request, step + 1, steps))
        method.on_gradients(scope.params)
        for regularizer in regularizers.values():
            regularizer.on_gradients(scope.params)
        if settings.grad_clip:
            nn.utils.clip_grad_norm_(params, settings.grad_clip)
        before = snapshot(scope.params) if edits_step else {}
        method.update(scope, optimizer)
        for regularizer in regularizers.values():
            regularizer.on_step(scope.params, before)
        optimizer.zero_grad()
        rows.append({"step": step + 1, **logs})
        if on_step(step + 1):
            break
    for parameter in params:
        parameter.requires_grad_(False)
    if not all(parameter.isfinite().all() for parameter in params):
        raise TrainingError(diverged("weights that are not finite", scope.request, steps, steps))
    return TrainingReport(rows, method.end_request(scope), records)


def make_optimizer(params: list[nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    """A fresh optimiser for one request."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD(params, lr=settings.lr, weight_decay=settings.weight_decay)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[settings.optimizer]
    return kind(params, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)


def diverged(what: str, request: Request, step: int, steps: int) -> str:
    """The line for a training that went astray."""
    return (
        f"training led to {what} at request {request.index} ({request.label}), step {step} of {steps}; "
        "lower train.lr or a regularizer's weight. Finished requests are kept"
    )
