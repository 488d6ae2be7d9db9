"""The inner loop of one request: loss, penalties, gradients, optimiser, in one order for all."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from numbers import Real
from typing import Any

from cu_runner.methods.base import Method
from cu_runner.models.parameters import assign, snapshot
from cu_runner.regularizers.base import Regularizer
from cu_runner.request.adapters import Adapters
from cu_runner.request.optimizer import make_optimizer
from cu_runner.request.scope import Scope
from cu_runner.runtime import distributed
from cu_runner.runtime.lazy import nn, torch
from cu_runner.runtime.progress import Progress
from cu_runner.runtime.returned import as_record, as_scalar, kind_of, refused
from cu_runner.schema.errors import TrainingError
from cu_runner.schema.settings import TrainSettings


@dataclass(frozen=True)
class TrainingReport:
    """logs: what was logged of each step. method: its own record. regularizers: theirs, by name."""

    logs: list[dict[str, float]]
    method: dict[str, object]
    regularizers: dict[str, dict[str, object]]


def check_composition(
    method: Method[Any],
    regularizers: dict[str, Regularizer],
    train: TrainSettings | None = None,
) -> None:
    """Raise ValueError for regularizers that do not go with the method, or with one another.

    One of the loss or gradient needs a method that has them. One that takes a step of its own would
    undo what is done to gradients, and what was done to the optimiser's step before it. A LoRA
    takes losses, and what is done to finished weights.
    """
    if train is not None and train.lora_rank is not None:
        check_lora(method, regularizers)
    for name, regularizer in regularizers.items():
        regularizer.check(method)
        if regularizer.makes_step:
            check_own_step(name, method, regularizers)
        idle = [stage for stage in regularizer.acts_on if stage in ("loss", "gradient")]
        if method.closed_form and idle:
            raise ValueError(
                f"reg={name} acts on the {idle[0]}, and the method sets the weights in closed form "
                "without one; choose a regularizer of the step (apply=update where it has that "
                "option) or another method"
            )


def check_lora(method: Method[Any], regularizers: dict[str, Regularizer]) -> None:
    """Raise ValueError for what chooses single weights or directions: a product B A leaves them."""
    if method.closed_form:
        raise ValueError(
            "train.lora_rank: the method sets the weights in closed form, and trains nothing; use "
            "train.lora_rank=null"
        )
    if method.masks_step:
        raise ValueError(
            "train.lora_rank: the method trains a part of the weights of each matrix, which a LoRA "
            "cannot; use train.lora_rank=null or another method"
        )
    for name, regularizer in regularizers.items():
        stages = [stage for stage in regularizer.acts_on if stage in ("gradient", "step")]
        if stages or regularizer.has_weights:
            raise ValueError(
                f"reg={name} acts on the {stages[0] if stages else 'model'} weight by weight, and "
                "the change of a LoRA would leave what it chose; use train.lora_rank=null or a "
                "regularizer of the loss or of finished weights, such as reg=l2 or reg=merge"
            )


def check_own_step(name: str, method: Method[Any], regularizers: dict[str, Regularizer]) -> None:
    """Raise ValueError for what a regularizer with a step of its own would undo."""
    if method.masks_step:
        raise ValueError(
            f"reg={name} takes a step of its own, and the method's mask of the optimiser's step "
            "would be lost; choose another method"
        )
    if regularizers[name].has_weights and len(regularizers) > 1:
        others = "+".join(other for other in regularizers if other != name)
        raise ValueError(
            f"reg={name} has weights of its own, and reg={others} acts on those of the method; "
            "choose one of the two"
        )
    earlier = True
    for other, regularizer in regularizers.items():
        earlier &= other != name
        if "gradient" in regularizer.acts_on:
            raise ValueError(
                f"reg={name} takes a step of its own from the gradients, and reg={other} changes "
                f"these; use reg.{other}.apply=update after it: reg=[{name},{other}]"
            )
        if earlier and "step" in regularizer.acts_on:
            raise ValueError(
                f"reg={name} takes a step of its own, and reg={other} before it would not see it; "
                f"put {name} first: reg=[{name},{other}]"
            )


class Training:
    """One request being unlearned, in place in scope.params, step by step.

    A step: loss -> backward, penalties -> backward, on_gradients (method, then regularizers), clip,
    update (method), on_step (regularizers).
    """

    def __init__(
        self,
        scope: Scope,
        method: Method[Any],
        regularizers: dict[str, Regularizer],
        settings: TrainSettings,
        stage: Callable[[str], None] = lambda name: None,
    ) -> None:
        """Begin the request: the method and the regularizers prepare.

        Args:
            scope: the weights to train, as they are at the start of the request, and the request.
            regularizers: by name, in hook order.
            stage: is told what begins: "method", "reg.NAME", "training".
        """
        self._scope, self._method = scope, method
        self._regularizers, self._settings = regularizers, settings
        self._params = list(scope.params.values())
        self._rows: list[dict[str, float]] = []
        self.steps = 1 if method.closed_form else settings.steps  # how many there will be at most
        self.ended = False  # whether it is to end before them
        for parameter in self._params:
            parameter.requires_grad_(True)
        stage("method")
        method.begin_request(scope)
        # a cumulative closed form solves for all targets so far, from the untouched weights
        solved = method.solved(scope)
        self._from = None if solved is scope else solved.start
        self._records = {}
        for name, regularizer in regularizers.items():
            stage(f"reg.{name}")
            found = regularizer.begin_request(solved, method)
            self._records[name] = as_record(regularizer, "begin_request", found)
        stage("training")
        self._edits_step = any(
            "step" in regularizer.acts_on for regularizer in regularizers.values()
        )
        self._adapters: Adapters | None = None
        trained: Sequence[nn.Parameter] = self._params
        if settings.lora_rank is not None:
            alpha = settings.lora_alpha or settings.lora_rank
            self._adapters = Adapters(scope, settings.lora_rank, alpha)
            trained = self._adapters.trained
        self._trained = trained
        self._optimizer = make_optimizer(trained, settings)

    @property
    def done(self) -> int:
        """Return how many steps are made."""
        return len(self._rows)

    @property
    def last(self) -> dict[str, float]:
        """Return what the last step logged."""
        return self._rows[-1]

    def step(self) -> None:
        """Make a step. Raises TrainingError for a loss that is not finite: the weights are lost."""
        scope, method, regularizers = self._scope, self._method, self._regularizers.values()
        logs = numbers_in(method.backward(scope, method.batch(scope, self.done)), method)
        for name, regularizer in self._regularizers.items():
            penalty = as_scalar(regularizer, "penalty", regularizer.penalty(scope.params))
            if penalty is not None:
                penalty.backward()
                logs[f"{name}_penalty"] = penalty.item()
                logs["loss"] += logs[f"{name}_penalty"]
        if not math.isfinite(logs["loss"]):
            raise TrainingError(self._diverged(f"a loss of {logs['loss']}", self.done + 1))
        method.on_gradients(scope.params)
        for regularizer in regularizers:
            regularizer.on_gradients(scope.params)
        if self._adapters:
            self._adapters.take_gradients()
        if self._settings.grad_clip:
            nn.utils.clip_grad_norm_(self._trained, self._settings.grad_clip)
        before = {}
        if self._edits_step:
            before = self._from or snapshot(scope.params)
        method.update(scope, self._optimizer)
        if self._adapters:
            self._adapters.put()
            for parameter in self._params:
                parameter.grad = None
        for regularizer in regularizers:
            regularizer.on_step(scope.params, before)
        self._optimizer.zero_grad()
        self._rows.append({"step": self.done + 1, **logs})

    def _diverged(self, what: str, step: int) -> str:
        """Return the line for a training that went astray, with what of it can be changed."""
        ways = [] if self._method.closed_form else ["lower train.lr"]
        ways += [f"lower the weight of reg={'+'.join(self._regularizers)}"] * bool(
            self._regularizers
        )
        request = self._scope.request
        return (
            f"training led to {what} at request {request.index} ({request.label}), step {step} of "
            f"{self.steps}; {' or '.join(ways) or 'change the settings of the method'}. "
            "Finished requests are kept"
        )

    def finish(self) -> TrainingReport:
        """Return what was logged. Raises TrainingError when a weight is not finite."""
        for parameter in self._params:
            parameter.requires_grad_(False)
        if not all(parameter.isfinite().all() for parameter in self._params):
            raise TrainingError(self._diverged("weights that are not finite", self.done))
        found = self._method.end_request(self._scope)
        record = as_record(self._method, "end_request", found)
        return TrainingReport(self._rows, record, self._records)

    def state(self) -> dict[str, Any]:
        """Return what restore() needs: weights, moments, multipliers, masks, what was logged."""
        return {
            "rows": self._rows,
            "ended": self.ended,
            "params": {name: parameter.detach() for name, parameter in self._scope.params.items()},
            "optimizer": self._optimizer.state_dict(),
            "adapters": self._adapters.state() if self._adapters else {},
            "method": self._method.state(),
            "regularizers": {
                name: regularizer.state() for name, regularizer in self._regularizers.items()
            },
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what state() gave of an equal request, after some of its steps."""
        self._rows, self.ended = state["rows"], state["ended"]
        assign(self._scope.params, state["params"])
        self._optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in self._optimizer.state.items():
            for name, moment in moments.items():
                if (
                    moment.shape == parameter.shape
                ):  # fused optimisers take no memory layout but the weight's
                    moments[name] = torch.empty_like(parameter).copy_(moment)
        if self._adapters:
            self._adapters.restore(state["adapters"])
        self._method.restore(state["method"])
        for name, regularizer in self._regularizers.items():
            regularizer.restore(state["regularizers"][name])


def erase(
    scope: Scope,
    method: Method[Any],
    regularizers: dict[str, Regularizer],
    settings: TrainSettings,
    on_step: Callable[[Training], None] = lambda training: None,
    state: dict[str, Any] | None = None,
    undisturbed: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    stage: Callable[[str], None] = lambda name: None,
    shown: int | None = None,
) -> TrainingReport:
    """Unlearn one request, in place in scope.params.

    Args:
        scope, method, regularizers, settings, stage: as for Training.
        on_step: called after every step; it may set training.ended.
        state: of a Training that was interrupted; None begins with the first step.
        shown: how many steps the progress counts up to; None is all that there may be.
        undisturbed: entered for the steps, but not for what the method and the regularizers prepare
            before the first one.

    Raises:
        TrainingError: the loss or a weight is not finite; the weights in scope are then of no use.
    """
    with distributed.averaged_gradients(list(scope.params.values())):
        training = Training(scope, method, regularizers, settings, stage)
        if state is not None:
            training.restore(state)
        what = f"unlearn {scope.request.label}"
        with (
            undisturbed(),
            Progress(
                what, min(shown or training.steps, training.steps), "step", training.done
            ) as progress,
        ):
            while training.done < training.steps and not training.ended:
                training.step()
                progress.advance(loss=training.last["loss"])
                on_step(training)
        return training.finish()


def numbers_in(logs: object, method: Method[Any]) -> dict[str, float]:
    """Return what a step logs as numbers, tensors of one too.

    Raises:
        TrainingError, ReturnedError: it logs something else.
    """
    if not isinstance(logs, Mapping):
        wanted = "a mapping of what to log, 'loss' among it"
        raise refused(method, "backward", kind_of(logs), wanted)
    numbers: dict[str, float] = {}
    for name, value in logs.items():
        one = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        if not isinstance(one, Real):
            raise TrainingError(
                f"{type(method).__name__}: logs {name!r}, which is a {type(value).__name__}; "
                "log numbers, or tensors of one number"
            )
        numbers[name] = float(one)
    if "loss" not in numbers:
        raise TrainingError(f"{type(method).__name__}: logs no 'loss', which is needed; add it")
    return numbers
