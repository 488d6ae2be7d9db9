"""What the primal-dual methods share: dual ascent, path divergences, samples, a retain term.

Constrained unlearning (arXiv 2605.30825) poses three problems with a constraint for each unlearning
distribution q_i: reverse_kl.py, forward_kl.py and likelihood.py. The problems and minimisers are
the paper's; thresholds, step sizes and the retain term are ours.

Shapes: B batch, C latent channels, H W latent size, L tokens, D text width, T timesteps, m
unlearning concepts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal, cast

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass as checked_dataclass

from cu_runner.methods.base import Batch, Method
from cu_runner.request.images import NoisyBatch
from cu_runner.request.scope import Resumable, Scope
from cu_runner.runtime.lazy import F, torch, without_gradients

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from torch.optim import Optimizer

Reference = Literal["empty", "anchor"]


Teacher = Literal["previous", "base"]


# of the initial value: a smaller violation on the fresh samples is the noise of their mean
TOLERANCE = 0.05


def dual_step(lam: Tensor, violation: Tensor, step_size: float) -> Tensor:
    """Return [lam + eta_d violation]_+   (dual ascent).

    Both are [m]; the violation is positive where the constraint is violated.
    """
    return (lam + step_size * violation).clamp(min=0)


def moving_average(mean: Tensor, measured: Tensor, decay: float) -> Tensor:
    """Return decay mean + (1 - decay) measured, all [m].

    NaN is unknown: a first value is taken as it is, a missing one is ignored.
    """
    mixed = decay * mean + (1 - decay) * measured
    return torch.where(measured.isnan(), mean, torch.where(mean.isnan(), measured, mixed))


def group_means(values: Tensor, groups: list[int], number: int) -> Tensor:
    """Return the mean [number] of the values [B] of each group, in float64 on the CPU.

    A group without values has NaN.
    """
    index, values = torch.tensor(groups), values.detach().double().cpu()
    sums = torch.zeros(number, dtype=torch.float64).index_add(0, index, values)
    return sums / torch.bincount(index, minlength=number)


def snr_weights(log_snr: Tensor) -> Tensor:
    """Return w_t = 1/2 log(SNR_{t-1} / SNR_t) of log SNR in float64; [T] to [T] in fp32.

    KL between the paths of two models is sum_t w_t ||e_p - e_q||^2, the squared norm of predicted
    noise summed over C, H, W. SNR is ab / (1 - ab), of rectified flow ((1 - s) / s)^2. The first
    level has none before it, and one without any signal shows nothing of a prediction: both weigh
    0.
    """
    weights = torch.zeros_like(log_snr)
    weights[1:] = (log_snr[:-1] - log_snr[1:]) / 2
    return torch.where(weights.isfinite(), weights, 0).float()


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean squared difference of each row, [B] of two [B, C, H, W]."""
    return (a - b).pow(2).flatten(1).mean(1)


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class DualAscent:
    """How multipliers follow their constraints.

    step_size: eta_d, per violation in units of the initial value. every: primal steps between dual
    steps. decay: of the running mean of the constraint, per primal step. rounds: how many fresh
    batches per concept (and noise level) measure the constraint at the start and at the end of a
    request.
    """

    step_size: PositiveFloat = 0.1
    every: PositiveInt = 5
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    rounds: PositiveInt = 2


class Duals(Resumable):
    """One multiplier per constraint, and the running mean of what it bounds.

    All tensors are [m] on the CPU.
    """

    changing = ("lam", "mean", "cut", "_steps")

    def __init__(
        self,
        settings: DualAscent,
        initial: Tensor,
        bound: Tensor,
        sense: Literal["at least", "at most"],
        limit: Callable[[Tensor], Tensor],
    ) -> None:
        """
        Args:
            initial: the values that violations are divided by.
            bound: values must be at least, or at most, this.
            limit: brings multipliers back under their cap.
        """
        self.settings, self.initial, self.bound, self.limit = settings, initial, bound, limit
        self.sense, self._sign = sense, {"at least": 1, "at most": -1}[sense]
        self.lam = torch.zeros_like(initial)
        # measured by the latest backward pass, in effect only with update()
        self.measured = torch.full_like(initial, torch.nan)
        self.mean = self.measured
        # whether the last dual step would have left the cap
        self.cut = torch.zeros(len(initial), dtype=torch.bool)
        self._steps = 0

    def violation(self, values: Tensor) -> Tensor:
        """Return (b - g) / g_0 where g must be at least b, (g - b) / g_0 where at most."""
        return self._sign * (self.bound - values) / self.initial

    def note(self, measured: Tensor) -> dict[str, float]:
        """Keep what a backward pass measured, and return what to log.

        That is the largest multiplier, the most extreme measurement, and the mean of the most
        violated constraint.
        """
        self.measured = measured
        mean = self.averaged()
        worst = int(self.violation(mean).nan_to_num(-torch.inf).argmax())
        seen = measured[~measured.isnan()]
        extreme = seen.min() if self.sense == "at least" else seen.max()
        return {
            "lambda": self.lam.max().item(),
            "constraint": extreme.item(),
            "constraint_mean": mean[worst].item(),
        }

    def averaged(self) -> Tensor:
        """Return the running mean with the latest measurement in it."""
        return moving_average(self.mean, self.measured, self.settings.decay)

    def advance(self) -> None:
        """Update the running mean after a primal step.

        Every `settings.every`-th time the dual step follows.
        """
        self.mean = self.averaged()
        self._steps += 1
        if self._steps % self.settings.every == 0:
            wanted = dual_step(
                self.lam, self.violation(self.mean).nan_to_num(0), self.settings.step_size
            )
            self.lam = self.limit(wanted)
            self.cut = self.lam < wanted

    def status(self, final: Tensor) -> list[str]:
        """Return the status of each constraint by its final value.

        "feasible", "infeasible" (violated with lam stuck at its cap) or "unfinished".
        """
        violated = self.violation(final) > TOLERANCE
        return [
            "feasible" if not bad else "infeasible" if stuck else "unfinished"
            for bad, stuck in zip(violated.tolist(), self.cut.tolist(), strict=True)
        ]

    def record(self, names: list[str], final: Tensor) -> dict[str, object]:
        """Return what step.json holds of the constraints.

        Multipliers and constraints by concept, the status of the worst, and a note unless it is
        feasible.
        """
        statuses = self.status(final)
        columns = {"lambda": self.lam, "initial": self.initial, "bound": self.bound, "final": final}
        rows = {
            name: {key: values[i].item() for key, values in columns.items()}
            | {"status": statuses[i]}
            for i, name in enumerate(names)
        }
        status = next(kind for kind in ("infeasible", "unfinished", "feasible") if kind in statuses)
        worst = int(self.violation(final).argmax())
        text = (
            f"the constraint on {names[worst]} is violated on fresh samples: {final[worst]:.3g}, "
            f"must be {self.sense} {self.bound[worst]:.3g}"
        )
        reasons = {
            "infeasible": f"infeasible: lambda is stuck at its cap and {text}; "
            "loosen method.bound or raise method.cap",
            "unfinished": f"unfinished: {text} with lambda below its cap; "
            "raise train.steps, train.lr or method.dual.step_size",
        }
        return {"status": status, "constraints": rows} | (
            {"note": reasons[status]} if status in reasons else {}
        )


class PrimalDual(Method[Batch]):
    """A method whose loss holds multipliers.

    begin_request sets self.duals; the loss notes constraints; update moves lam.
    """

    duals: Duals

    @abstractmethod
    def final_constraint(self, scope: Scope) -> Tensor:
        """Measure the constrained values [m] on fresh samples of the weights as they are."""

    def state(self) -> dict[str, object]:
        """Return what changes from step to step, the duals among it."""
        return super().state() | {"duals": self.duals.state()}

    def restore(self, state: dict[str, object]) -> None:
        """Take what state() gave."""
        super().restore(state)
        self.duals.restore(cast("dict[str, object]", state["duals"]))

    def update(self, scope: Scope, optimizer: Optimizer) -> None:
        """Take the primal step, then move the duals.

        This is not done in backward, which a regularizer may call to score weights.
        """
        optimizer.step()
        self.duals.advance()

    @without_gradients
    def end_request(self, scope: Scope) -> dict[str, object]:
        """Return the final constraints, and whether the problem was solved."""
        return self.duals.record(
            [concept.name for concept in scope.request.targets], self.final_constraint(scope)
        )


def teacher_weights(scope: Scope, teacher: Teacher) -> dict[str, Tensor]:
    """Return q's weights: those at the start of the request, or those of the untouched model."""
    return {"previous": scope.start, "base": scope.base}[teacher]


def own_prompts(scope: Scope, concepts: list[int], captions: list[int]) -> list[str]:
    """Return each row's prompt of its own unlearning concept."""
    return [
        scope.sequence.training_pairs(scope.request.targets[i])[j][0]
        for i, j in zip(concepts, captions, strict=True)
    ]


def reference_prompts(
    scope: Scope, reference: Reference, concepts: list[int], captions: list[int]
) -> list[str]:
    """Return each row's prompt of q: the empty one, or that of its concept's anchor."""
    if reference == "empty":
        return [""] * len(concepts)
    return [
        scope.sequence.training_pairs(scope.request.targets[i])[j][1]
        for i, j in zip(concepts, captions, strict=True)
    ]


def draw_rows(
    scope: Scope, generator: Generator, rows: int
) -> tuple[list[int], list[int], list[int]]:
    """Draw for each row an unlearning concept, a caption, and a seed of the image's noise.

    All concepts come about equally often.
    """
    number = len(scope.request.targets)
    order = torch.randperm(number, generator=generator)
    concepts = order[torch.arange(rows) % number].tolist()
    return concepts, *draw_captions(scope, generator, rows)


def draw_captions(scope: Scope, generator: Generator, rows: int) -> tuple[list[int], list[int]]:
    """Draw for each row a caption and a seed of the image's noise."""
    fewest = min(len(scope.sequence.training_pairs(target)) for target in scope.request.targets)
    captions = torch.randint(fewest, (rows,), generator=generator).tolist()
    return captions, torch.randint(2**31, (rows,), generator=generator).tolist()


def retain_loss(
    scope: Scope,
    batch: NoisyBatch,
    kind: Literal["teacher", "diffusion"],
    weights: dict[str, Tensor],
) -> Tensor:
    """Return E ||e_theta - sg e_q||^2 ("teacher"), or the diffusion loss.

    Both are on kept images with their own captions.
    """
    (texts,) = batch.texts
    wanted = batch.wanted
    if kind == "teacher":
        with torch.no_grad():
            wanted = scope.model.predict(batch.noisy, batch.timesteps, texts, weights)
    return F.mse_loss(scope.model.predict(batch.noisy, batch.timesteps, texts), wanted)


def concept_predictions(
    scope: Scope, noisy: Tensor, timesteps: Tensor, captions: list[int], weights: dict[str, Tensor]
) -> Tensor:
    """Return e_{q,c_i}(x_t) of every unlearning concept with each row's caption, [m, B, C, H, W].

    That takes one pass of the teacher per concept.
    """
    return torch.stack(
        [
            scope.model.predict(
                noisy,
                timesteps,
                scope.model.encode_prompts(own_prompts(scope, [i] * len(captions), captions)),
                weights,
            )
            for i in range(len(scope.request.targets))
        ]
    )
