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
from cu_runner.settings import TrainSettings


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line."""


@dataclass(frozen=True)
class TrainingReport:
    """losses: one dict of logs per step. records: what the regularizers reported of themselves, by name."""

    losses: list[dict[str, float]]
    records: dict[str, dict[str, object]]


def erase(
    scope: Scope,
    method: Method,
    regularizers: dict[str, Regularizer],
    settings: TrainSettings,
    on_step: Callable[[int], None] = lambda step: None,
) -> TrainingReport:
    """Unlearn one request, in place in scope.params.

    Each step: loss + penalties -> backward -> on_gradients (method, then regularizers) -> clip -> AdamW -> on_step (regularizers).

    Args:
        scope: the weights to train and the request.
        regularizers: by name, in hook order.
        on_step: called with the number of each finished step.

    Raises:
        TrainingError: the loss is not finite; the weights in scope are then of no use.
    """
    params = list(scope.params.values())
    for parameter in params:
        parameter.requires_grad_(True)
    method.begin_request(scope)
    records = {name: regularizer.begin_request(scope) for name, regularizer in regularizers.items()}
    optimizer = torch.optim.AdamW(params, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
    batches, losses = method.batches(scope), []
    progress = tqdm(
        range(settings.steps), desc=f"  unlearn {scope.request.label}", leave=False, disable=None, ncols=100, unit="step"
    )
    for step in progress:
        loss, logs = method.loss(scope, next(batches))
        for name, regularizer in regularizers.items():
            penalty = regularizer.penalty(scope.params)
            if penalty is not None:
                loss = loss + penalty
                logs[f"{name}_penalty"] = penalty.item()
        logs["loss"] = loss.item()
        if not math.isfinite(logs["loss"]):
            raise TrainingError(diverged(f"a loss of {logs['loss']}", scope.request, step + 1, settings.steps))
        loss.backward()
        method.on_gradients(scope.params)
        for regularizer in regularizers.values():
            regularizer.on_gradients(scope.params)
        if settings.grad_clip:
            nn.utils.clip_grad_norm_(params, settings.grad_clip)
        before = snapshot(scope.params) if any(regularizer.edits_step for regularizer in regularizers.values()) else {}
        optimizer.step()
        for regularizer in regularizers.values():
            regularizer.on_step(scope.params, before)
        optimizer.zero_grad()
        losses.append(logs)
        on_step(step + 1)
    for parameter in params:
        parameter.requires_grad_(False)
    if not all(parameter.isfinite().all() for parameter in params):
        raise TrainingError(diverged("weights that are not finite", scope.request, settings.steps, settings.steps))
    return TrainingReport(losses, records)


def diverged(what: str, request: Request, step: int, steps: int) -> str:
    """The line for a training that went astray."""
    return (
        f"training led to {what} at request {request.index} ({request.label}), step {step} of {steps}; "
        "lower train.lr or a regularizer's weight. Finished requests are kept"
    )
