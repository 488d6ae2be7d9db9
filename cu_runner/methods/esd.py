"""Erased Stable Diffusion: steer the concept's prompt away from the concept (Gandikota et al., ICCV
2023, arXiv 2303.07345).

Two forms of the target are in circulation. The paper's (Sec. 4) is coded here:
    e_q(x_t, null) - eta (e_q(x_t, c*) - e_q(x_t, null));
newer releases write e_q(x_t, c*) - eta' (e_q(x_t, c*) - e_q(x_t, null)), which is the same target
with eta' = eta + 1.

x_t is sampled on-policy: with S sampler steps, S - 1 forward rows per image on average (half of the
steps, two rows each for guidance). With the teacher's two rows and the trained one a step counts S
+ 4 rows against ConAbl's 4, a backward row as two: 3.5 times as much at S = 10 (measured on
ShapeCanvas: 2.6, for sampling keeps no activations), 13.5 times at the published S = 50.
`sampler_steps` bounds it.

Shapes: B batch, C latent channels, H W latent size, L tokens, D text width.
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from cu_runner.concepts.sequence import KNOWN
from cu_runner.concepts.templates import check_template, fill, fill_caption
from cu_runner.methods.base import Method
from cu_runner.models.parameters import placed
from cu_runner.models.sampling import sample_partly
from cu_runner.request.scope import Scope
from cu_runner.runtime.lazy import F, torch
from cu_runner.schema.settings import ParameterGroup

if TYPE_CHECKING:
    from torch import Tensor

VARIANTS: dict[str, ParameterGroup] = {
    "esd-x": "xattn",
    "esd-x-strict": "kv_xattn",
    "esd-u": "non_xattn_layers",
    "esd-all": "layers",
}


@dataclass(frozen=True)
class Trajectories:
    """Partly denoised samples of the model in training, all stopped at the same timestep."""

    noisy: Tensor  # [B, C, H, W]
    timesteps: Tensor  # [B]
    prompts: list[str]  # B of them, each names the concept


class ESD(Method[Trajectories]):
    """Train the prediction for the concept's prompt towards the teacher's.

    The teacher's is pushed from the concept to the empty prompt's side.
    """

    scored_against = "empty"

    def __init__(
        self,
        variant: Literal["esd-x", "esd-x-strict", "esd-u", "esd-all"] = "esd-x",
        prompt: str = "{concept}",
        eta: NonNegativeFloat = 1.0,
        teacher: Literal["previous", "base"] = "previous",
        guidance: Annotated[float, Field(ge=1)] = 3.0,
        sampler_steps: PositiveInt = 50,
        trajectories: Literal["current", "teacher"] = "current",
    ) -> None:
        """
        Args:
            variant: which weights are trained. "esd-x" cross-attention, "esd-x-strict" its keys and
                values, "esd-u" the linear layers and convolutions outside of it, "esd-all" those of
                the whole UNet. Normalisation layers are trained in none of them, as released.
            prompt: c*, with {concept}, and {caption} at most besides, which runs through the
                sequence's. Whatever else the prompt names is steered away from too, so the
                published form is the concept's name alone.
            eta: strength of the negative guidance; 0 makes the prompt act like the empty one.
            teacher: q in the target: the weights at the start of the request, as in the released
                code, or the base's.
            guidance: classifier-free guidance of the samples that are trained on.
            sampler_steps: denoising steps of a whole trajectory; a sample stops after a random
                number of them.
            trajectories: whose samples are trained on: those of the weights in training, or of the
                teacher, as in the released code for SDXL.
        """
        check_template(prompt, "method.prompt", ("concept",), KNOWN)
        self.params = VARIANTS[variant]
        self.prompt, self.eta, self.teacher = prompt, eta, teacher
        self.guidance, self.sampler_steps = guidance, sampler_steps
        self.trajectories = trajectories

    def batch(self, scope: Scope, step: int) -> Trajectories:
        """Sample for the concepts' prompts, up to a random step."""
        captions = scope.sequence.captions if "{caption}" in self.prompt else [""]
        prompts = [
            fill(fill_caption(self.prompt, caption), concept=concept.prompt_name)
            for concept in scope.request.targets
            for caption in captions
        ]
        sampler = dataclasses.replace(
            scope.model.sampler, steps=self.sampler_steps, guidance=self.guidance
        )
        generator = scope.rng.generator("train", step)
        stop = int(torch.randint(self.sampler_steps, (), generator=generator))
        chosen = [
            prompts[row]
            for row in torch.randint(len(prompts), (scope.batch_size,), generator=generator)
        ]
        seeds = torch.randint(2**62, (scope.batch_size,), generator=generator).tolist()
        teacher = placed(scope.params, self._teacher_weights(scope))
        with teacher if self.trajectories == "teacher" else contextlib.nullcontext():
            noisy, timestep = sample_partly(scope.model, chosen, seeds, sampler, stop)
        trained = scope.model.process.as_trained(timestep)
        return Trajectories(noisy, trained.expand(scope.batch_size), chosen)

    def _teacher_weights(self, scope: Scope) -> dict[str, Tensor]:
        return {"previous": scope.start, "base": scope.base}[self.teacher]

    def scored_loss(self, concept: Tensor, wanted: Tensor) -> Tensor:
        """Return the mean of ||e(c*) - e(null)||^2.

        The released code scores by this method's own loss with the empty prompt for an anchor: the
        target e(null) - eta (e(anchor) - e(null)) is then e(null).
        """
        return F.mse_loss(concept, wanted)

    def loss(self, scope: Scope, batch: Trajectories) -> tuple[Tensor, dict[str, float]]:
        """Return E ||e(x_t, c*) - sg [e_q(x_t, null) - eta (e_q(x_t, c*) - e_q(x_t, null))]||^2
        (Sec. 4).
        """
        model, weights = scope.model, self._teacher_weights(scope)
        text = model.encode_prompts(batch.prompts)
        both = model.encode_prompts([""] * len(text) + batch.prompts)
        with torch.no_grad():
            taught = model.predict(
                torch.cat([batch.noisy] * 2), torch.cat([batch.timesteps] * 2), both, weights
            )
        empty, concept = taught.chunk(2)
        loss = F.mse_loss(
            model.predict(batch.noisy, batch.timesteps, text),
            erasing_target(empty, concept, self.eta),
        )
        return loss, {"unlearn_loss": loss.item(), "timestep": batch.timesteps[0].item()}


def erasing_target(empty: Tensor, concept: Tensor, eta: float) -> Tensor:
    """Return e(null) - eta (e(c*) - e(null)) of predictions [B, C, H, W]   (Gandikota et al. 2023,
    Sec. 4).
    """
    return empty - eta * (concept - empty)
