"""Constrained unlearning of concepts, reverse KL: min KL(p||q) subject to KL(p||q_i) >= b_i (arXiv
2605.30825).

The minimiser p ~ q prod (q/q_i)^alpha_i has the score s_q + sum alpha_i (s_q - s_{q,i}), so the
prediction for the concepts' prompts is regressed on that combination of the teacher's. With alpha =
1 and the empty prompt it is ESD's target with eta = 1. Exact only as t -> 0; a path KL above b is
necessary for forgetting, not sufficient, so the samples must be looked at.

A step costs 3.6 times ConAbl's on the embedded model: half a denoising run for x_t, two teacher
passes, and the retain term. A request of m concepts takes m + 1 teacher passes, since every q_i
enters the target: 5.5 times for six.

Shapes: B batch, C latent channels, H W latent size, L tokens, D text width, m unlearning concepts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from cu_runner.methods._primal_dual import (
    DualAscent,
    Duals,
    PrimalDual,
    Reference,
    Teacher,
    concept_predictions,
    draw_captions,
    draw_rows,
    group_means,
    own_prompts,
    reference_prompts,
    retain_loss,
    snr_weights,
    squared_error,
    teacher_weights,
)
from cu_runner.models.parameters import placed
from cu_runner.models.process import is_flow
from cu_runner.models.sampling import make_scheduler, sample_partly
from cu_runner.request.images import NoisyBatch, RetainSet
from cu_runner.request.scope import Scope
from cu_runner.runtime.lazy import F, torch, without_gradients
from cu_runner.schema.settings import ParameterGroup

if TYPE_CHECKING:
    from torch import Tensor


def alpha_from_lambda(lam: Tensor) -> Tensor:
    """Return alpha_i = lam_i / (1 - sum lam), [m]; the dual domain is sum lam < 1."""
    return lam / (1 - lam.sum())


def limit_lambda(lam: Tensor, cap: float) -> Tensor:
    """Scale lam [m] down where needed so that the largest alpha is `cap` at most.

    sum lam < 1 follows.
    """
    # s lam_i / (1 - s sum lam) <= cap  <=>  s <= cap / (lam_i + cap sum lam)
    largest = lam.max() + cap * lam.sum()
    return lam * (cap / largest).clamp(max=1) if largest > 0 else lam


def combined_target(reference: Tensor, concepts: Tensor, alpha: Tensor) -> Tensor:
    """Return e* = e_q + sum alpha_i (e_q - e_{q,c_i}).

    e_q is [B, C, H, W], e_{q,c_i} is [m, B, C, H, W], alpha is [m].
    """
    return reference + torch.einsum("m,mbchw->bchw", alpha.to(reference), reference - concepts)


@dataclass(frozen=True)
class OnPolicyBatch:
    """Partly denoised samples of the model in training.

    concepts, captions: of each row, as indices.
    """

    noisy: Tensor  # [B, C, H, W]
    timesteps: Tensor  # [B]
    concepts: list[int]
    captions: list[int]
    retain: NoisyBatch | None


class ReverseKL(PrimalDual[OnPolicyBatch]):
    """Push the concepts' prompts away from what the teacher makes of them.

    The push goes as far as the constraints ask.
    """

    def __init__(
        self,
        bound: PositiveFloat = 1.5,
        cap: PositiveFloat = 2.0,
        reference: Reference = "anchor",
        teacher: Teacher = "previous",
        weighting: Literal["mse", "snr"] = "mse",
        sampling_steps: PositiveInt = 8,
        guidance: Annotated[float, Field(ge=1)] = 1.0,
        retain_weight: NonNegativeFloat = 10.0,
        retain_loss: Literal["teacher", "diffusion"] = "teacher",
        retain: RetainSet = RetainSet(),
        dual: DualAscent = DualAscent(),
        params: ParameterGroup = "kv_xattn",
    ) -> None:
        """
        Args:
            bound: b_i as a multiple of KL(q||q_i), which is measured at the start; active above 1.
            cap: the largest alpha.
            reference: what q is prompted with: the empty prompt, or the concept's anchor.
            teacher: q's weights: at the start of the request, or the untouched model's.
            weighting: of noise levels in the path KL: "mse" takes all alike, "snr" as the KL of
                paths does (nats).
            sampling_steps: noise levels of the samples x_t; every run of that many steps visits
                each once.
            guidance: classifier-free guidance scale of the samples; 1 draws them from p itself.
            retain_weight: weight of the retain term; 0 leaves it out.
            retain_loss: "teacher" matches q on the kept images, "diffusion" is their diffusion
                loss.
            retain: the kept images.
            dual: the dual ascent.
            params: the weights that are trained.
        """
        self.bound, self.cap, self.reference = bound, cap, reference
        self.teacher, self.weighting = teacher, weighting
        self.sampling_steps, self.guidance = sampling_steps, guidance
        self.retain_weight, self.retain_kind, self.retain = retain_weight, retain_loss, retain
        self.dual, self.params = dual, params

    def begin_request(self, scope: Scope) -> None:
        """Make the kept images, and set b_i from KL(q||q_i) on samples of q."""
        self._images = self.retain.images_of(scope) if self.retain_weight else None
        self._process = scope.model.process
        self._spacing = self._sampler_spacing(scope) if is_flow(scope.model.scheduler) else None
        self._level_weights = snr_weights(scope.model.process.log_snr()).to(scope.model.device)
        with placed(scope.params, teacher_weights(scope, self.teacher)):
            initial = self._measure(scope, "initial")
        self.duals = Duals(
            self.dual,
            initial,
            self.bound * initial,
            "at least",
            lambda lam: limit_lambda(lam, self.cap),
        )

    def batch(self, scope: Scope, step: int) -> OnPolicyBatch:
        """Sample on-policy x_t for the concepts' prompts at one noise level per step."""
        generator = scope.rng.generator("train", step)
        concepts, captions, seeds = draw_rows(scope, generator, scope.batch_size)
        levels = scope.rng.generator("levels", step // self.sampling_steps)
        order = torch.randperm(self.sampling_steps, generator=levels)
        stop = int(order[step % self.sampling_steps])
        noisy, timesteps = self._sample(scope, own_prompts(scope, concepts, captions), seeds, stop)
        retain = self._images.draw(generator, scope.batch_size) if self._images else None
        return OnPolicyBatch(noisy, timesteps, concepts, captions, retain)

    def loss(self, scope: Scope, batch: OnPolicyBatch) -> tuple[Tensor, dict[str, float]]:
        """Return E ||e_theta(x_t, c*) - sg e*||^2 + w L_retain, x_t from the model in training."""
        model, weights = scope.model, teacher_weights(scope, self.teacher)
        reference, own = (
            model.encode_prompts(prompts)
            for prompts in (
                reference_prompts(scope, self.reference, batch.concepts, batch.captions),
                own_prompts(scope, batch.concepts, batch.captions),
            )
        )
        with torch.no_grad():
            concepts = concept_predictions(
                scope, batch.noisy, batch.timesteps, batch.captions, weights
            )
            target = combined_target(
                model.predict(batch.noisy, batch.timesteps, reference, weights),
                concepts,
                alpha_from_lambda(self.duals.lam),
            )
        predicted = model.predict(batch.noisy, batch.timesteps, own)
        loss = F.mse_loss(predicted, target)
        divergence = self._divergence(
            predicted.detach(), concepts[batch.concepts, range(len(own))], batch.timesteps
        )
        logs = {
            "unlearn_loss": loss.item(),
            **self.duals.note(group_means(divergence, batch.concepts, len(concepts))),
        }
        if batch.retain:
            retained = retain_loss(scope, batch.retain, self.retain_kind, weights)
            loss = loss + self.retain_weight * retained
            logs["retain_loss"] = retained.item()
        return loss, logs

    def final_constraint(self, scope: Scope) -> Tensor:
        """Return KL(p||q_i) on fresh samples of p."""
        return self._measure(scope, "final")

    def _sample(
        self, scope: Scope, prompts: list[str], seeds: list[int], stop: int
    ) -> tuple[Tensor, Tensor]:
        """Sample x_t [B, C, H, W] from the model as it is, and return it with its timesteps [B]."""
        sampler = replace(scope.model.sampler, steps=self.sampling_steps, guidance=self.guidance)
        noisy, timestep = sample_partly(scope.model, prompts, seeds, sampler, stop)
        return noisy, scope.model.process.as_trained(timestep).expand(len(prompts))

    def _sampler_spacing(self, scope: Scope) -> tuple[Tensor, Tensor]:
        """Return the timesteps [S] of the sampler, and how much of all levels each stands for, x S.

        Evenly spaced ones stand for 1 each, so that a mean over them is one over the levels.
        """
        sampler = replace(scope.model.sampler, steps=self.sampling_steps, guidance=self.guidance)
        levels = make_scheduler(scope.model, sampler).timesteps.float()
        gaps = levels - torch.cat([levels[1:], levels.new_zeros(1)])
        return levels, gaps * len(levels) / scope.model.num_train_timesteps

    def _divergence(self, predicted: Tensor, reference: Tensor, timesteps: Tensor) -> Tensor:
        """Return each row's share [B] of the path KL.

        That is ||e_p - e_q||^2 of predicted noise as a mean over elements, or as T w_t times the
        sum; of velocities it is (1 - s)^2 ||v_p - v_q||^2.
        """
        process = self._process
        error = squared_error(predicted, reference) * process.noise_error(timesteps) ** 2
        if self._spacing is not None:  # levels of a flow's sampler are not spaced evenly
            levels, spacing = self._spacing
            nearest = (timesteps[:, None].float() - levels).abs().argmin(1)
            error = error * spacing[nearest]
        if self.weighting == "mse":
            return error
        weights = self._level_weights[process.level(timesteps)]
        return error * predicted[0].numel() * len(self._level_weights) * weights

    @without_gradients
    def _measure(self, scope: Scope, purpose: Literal["initial", "final"]) -> Tensor:
        """Measure KL(p||q_i) [m], with every noise level weighted equally.

        p is the model as it is: at first q with q's prompt, at last c_i's.
        """
        model, number, values = scope.model, len(scope.request.targets), []
        for concept in range(number):
            rows = [concept] * scope.batch_size
            shares = []
            for n in range(self.dual.rounds * self.sampling_steps):
                captions, seeds = draw_captions(
                    scope, scope.rng.generator(f"{purpose} {concept}", n), scope.batch_size
                )
                own = own_prompts(scope, rows, captions)
                prompts = (
                    reference_prompts(scope, self.reference, rows, captions)
                    if purpose == "initial"
                    else own
                )
                noisy, timesteps = self._sample(scope, prompts, seeds, n % self.sampling_steps)
                predicted = model.predict(noisy, timesteps, model.encode_prompts(prompts))
                weights = teacher_weights(scope, self.teacher)
                reference = model.predict(noisy, timesteps, model.encode_prompts(own), weights)
                shares.append(self._divergence(predicted, reference, timesteps).double().mean())
            values.append(torch.stack(shares).mean().cpu())
        return torch.stack(values)
