"""Sculpting memory: concept ablation under a dynamic mask (Li et al., ICCV 2025, arXiv 2504.09039).

Only a part of every weight tensor moves: the entries whose signed gradients add up to the most.
Warm-up steps are dense: they move every weight and gather the gradients that choose the first mask.
The released code (Lee et al. 2026) masks gradients before AdamW, so that momentum and decay still
move what is shut (mask="gradient"); with mask="update" the step itself is masked, and a shut entry
keeps its value. A regularizer of the step that mixes weights (gradproj with apply=update,
nullspace) comes after it and fills the mask again.

Shapes: any weight tensor [...]; a mask and gathered gradients have the shape of their weight.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from cu_runner.methods.conabl import ConAbl
from cu_runner.models.parameters import gradients, largest, snapshot
from cu_runner.request.scope import Scope
from cu_runner.runtime.lazy import nn, torch, without_gradients
from cu_runner.schema.settings import ParameterGroup

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

Fraction = Annotated[float, Field(ge=0, le=1)]


class SculpMem(ConAbl):
    """ConAbl's loss; each tensor moves in its active entries alone, which change in training."""

    masks_step = True

    changing = ("_step", "_exchanges", "_gathered", "_masks")

    def __init__(
        self,
        active: Annotated[float, Field(gt=0, le=1)] = 0.5,
        warmup: PositiveInt = 50,
        interval: PositiveInt = 100,
        exchanged: Fraction = 0.2,
        until: Fraction = 0.8,
        loss: Literal["model", "noise"] = "model",
        teacher: Literal["current", "previous", "base"] = "current",
        preservation: NonNegativeFloat = 0.0,
        num_anchors: PositiveInt = 200,
        flip: bool = False,
        params: ParameterGroup = "kv_xattn",
        loss_sum: Literal["mean", "channels"] = "mean",
        begin_token: Literal["trained", "detached"] = "trained",
        border: Literal["kept", "masked"] = "kept",
        mask: Literal["gradient", "update"] = "update",
        schedule: Literal["steps", "epochs"] = "steps",
    ) -> None:
        """
        Args:
            active: fraction of the entries of every tensor that may move after the warm-up.
            warmup: dense steps before the first mask.
            interval: steps between exchanges of active entries.
            exchanged: fraction of the active entries that the first exchange would replace; it
                falls to 0 along a cosine.
            until: fraction of the request's steps after which the mask stays as it is.
            loss, teacher, preservation, num_anchors, flip, params, loss_sum, begin_token, border:
                as in ConAbl.
            mask: of the "gradient", as released, or of the "update" that the optimiser makes.
            schedule: how progress is counted. "steps": all `warmup` steps are dense, and an
                exchange at step n knows the progress n / steps. "epochs", as released: the last
                step of the warm-up makes the mask and moves nothing; progress is counted in whole
                epochs, of num_anchors images per target, the last of which may exchange too; an
                exchange is of one entry at least.
        """
        anchors = (loss, teacher, preservation, num_anchors, flip, params)
        super().__init__(*anchors, loss_sum, begin_token, border)
        self.mask, self.schedule = mask, schedule
        self.active, self.warmup, self.interval = active, warmup, interval
        self.exchanged, self.until = exchanged, until

    def begin_request(self, scope: Scope) -> None:
        """Make anchor images, and no mask yet.

        Raises:
            ValueError: the warm-up leaves no step for a mask.
        """
        if self.warmup >= scope.steps:
            raise ValueError(
                f"method.warmup={self.warmup}: train.steps={scope.steps} leaves no step under a "
                "mask; lower it"
            )
        super().begin_request(scope)
        self._step, self._exchanges = 0, 0
        self._gathered = {
            name: torch.zeros_like(parameter) for name, parameter in scope.params.items()
        }
        self._masks: dict[str, Tensor] = {}

    def on_gradients(self, params: dict[str, nn.Parameter]) -> None:
        """Gather all gradients, then mask them: clipping counts what moves."""
        for name, gradient in gradients(params).items():
            self._gathered[name] += gradient
            if self._masks:
                gradient.mul_(self._masks[name])

    @without_gradients
    def update(self, scope: Scope, optimizer: Optimizer) -> None:
        """Take the optimiser's step, with mask="update" in the active entries alone, bitwise.

        Then make the mask of the next step.
        """
        self._step += 1
        at_warmup, by_epochs = self._step == self.warmup, self.schedule == "epochs"
        if not (at_warmup and by_epochs):
            before = snapshot(scope.params) if self._masks and self.mask == "update" else {}
            optimizer.step()
            for name, values in before.items():
                parameter = scope.params[name]
                parameter.copy_(torch.where(self._masks[name], parameter, values))
        if at_warmup:
            self._change(
                {name: keep_top(gathered, self.active) for name, gathered in self._gathered.items()}
            )
        elif self._masks and self._step % self.interval == 0:
            progress, exchanges = self._progress(scope)
            if exchanges:
                fraction = turnover(self.exchanged, progress)
                masks = self._masks.items()
                least = int(by_epochs)
                self._change(
                    {
                        name: exchange(mask, self._gathered[name], fraction, least)
                        for name, mask in masks
                    }
                )
                self._exchanges += 1

    def _progress(self, scope: Scope) -> tuple[float, bool]:
        """Return how far the request is, 0..1, and whether entries are still exchanged."""
        if self.schedule == "steps":
            return self._step / scope.steps, self._step < self.until * scope.steps
        images = self.num_anchors * len(scope.request.targets)
        per_epoch = math.ceil(images / scope.batch_size)
        epochs, epoch = math.ceil(scope.steps / per_epoch), (self._step - 1) // per_epoch
        return epoch / epochs, epoch < int(epochs * self.until)

    def _change(self, masks: dict[str, Tensor]) -> None:
        """Take new masks and gather gradients afresh."""
        self._masks = masks
        for gathered in self._gathered.values():
            gathered.zero_()

    def end_request(self, scope: Scope) -> dict[str, object]:
        """Return the share of shut entries (0 without a mask) and the number of exchanges."""
        shut = sum(int((~mask).sum()) for mask in self._masks.values())
        entries = sum(gathered.numel() for gathered in self._gathered.values())
        return {"masked_fraction": shut / entries, "exchanges": self._exchanges}


def turnover(initial: float, progress: float) -> float:
    """Return f = f_0 * (1 + cos(pi * progress)) / 2, progress in 0..1   (Li et al. 2025)."""
    return initial * 0.5 * (1 + math.cos(math.pi * progress))


def keep_top(gathered: Tensor, fraction: float) -> Tensor:
    """Return a mask of exactly floor(fraction * n) of the n entries, in the same shape.

    They are those of largest magnitude, of equal ones the first.
    """
    return largest(gathered.flatten().abs(), int(fraction * gathered.numel())).view_as(gathered)


def exchange(mask: Tensor, gathered: Tensor, fraction: float, least: int = 0) -> Tensor:
    """Return a new mask with floor(fraction * active) active entries exchanged, `least` at least.

    Those of smallest |gathered| give way to as many inactive ones of largest. Where fewer are
    inactive, fewer are exchanged: the number of active entries stays. Of equal entries the first
    are taken.
    """
    flat, size = mask.flatten(), gathered.flatten().abs()
    active, inactive = flat.nonzero().squeeze(1), (~flat).nonzero().squeeze(1)
    count = min(max(int(fraction * len(active)), least), len(inactive), len(active))
    changed = flat.clone()
    changed[active[size[active].argsort(stable=True)[:count]]] = False
    changed[inactive[size[inactive].argsort(descending=True, stable=True)[:count]]] = True
    return changed.view_as(mask)
