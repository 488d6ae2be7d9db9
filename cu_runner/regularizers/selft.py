"""SelFT: only the weights that matter most for the request move (Lee et al. 2026, arXiv 2511.07970,
Sec. 5).

Shapes: n trainable elements, C latent channels, H W latent size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt

from cu_runner.concepts.templates import fill
from cu_runner.methods.base import Batch, Method
from cu_runner.models.parameters import gradients, largest
from cu_runner.models.process import is_flow
from cu_runner.models.sampling import sample_partly
from cu_runner.regularizers.base import Regularizer
from cu_runner.request.scope import Scope
from cu_runner.runtime.lazy import nn, torch, without_gradients
from cu_runner.runtime.progress import counted
from cu_runner.schema.settings import Sampler

if TYPE_CHECKING:
    from torch import Tensor

GUIDANCE = 3.0  # of the trajectory that is scored, as released


@without_gradients
def topk_mask(
    params: Mapping[str, Tensor], grads: dict[str, Tensor], fraction: float
) -> dict[str, Tensor]:
    """Choose the top `fraction` of all elements together by importance |theta * dL/dtheta|.

    Args:
        params, grads: by name, of the same shapes.
        fraction: 0..1; exactly floor(fraction * n) of the n elements are chosen. Of equally
            important ones the first are, in the order of params: a gradient of zeros also gives a
            mask of that size.

    Returns:
        Boolean tensors, by name, shaped as params; True may move.

    Raises:
        ValueError: an importance is not finite.
    """
    importance = torch.cat(
        [(parameter * grads[name]).abs().flatten() for name, parameter in params.items()]
    )
    if not importance.isfinite().all():
        raise ValueError(
            "selft: |theta * gradient| is not finite at the start of the request; lower train.lr"
        )
    chosen = largest(importance, math.floor(fraction * len(importance)))
    parts = chosen.split([parameter.numel() for parameter in params.values()])
    return {
        name: part.view(parameter.shape)
        for (name, parameter), part in zip(params.items(), parts, strict=True)
    }


def score_trajectory(
    scope: Scope, method: Method[Batch], steps: int, prompts: Literal["bare", "training"]
) -> None:
    """Add to .grad that of the method's scored_loss over DDIM's timesteps and the targets.

    For each t a fresh noise is denoised from the start down to t, for the prompt of c* with
    guidance 3, which takes steps (steps - 1) / 2 guided passes per target. DDIM's timesteps have no
    offset, as in the released code. "bare" prompts are those of the concept and of its anchor
    alone, as released; "training" ones are the sequence's pairs, which follow each other from one t
    to the next.
    """
    model = scope.model
    # a flow has no DDIM: its own scheduler visits as many levels
    own = is_flow(model.scheduler)
    sampler = Sampler(steps, GUIDANCE, None if own else "DDIMScheduler")
    for number, concept in enumerate(scope.request.targets):
        bare = (fill(scope.sequence.bare_prompt, concept=concept.prompt_name), concept.anchor or "")
        pairs = [bare] if prompts == "bare" else scope.sequence.training_pairs(concept)
        for step in counted(f"score {concept.name}", steps, "step"):
            target, anchor = pairs[step % len(pairs)]
            seed = int(
                torch.randint(
                    2**62, (), generator=scope.rng.generator("selft", number * steps + step)
                )
            )
            noisy, timestep = sample_partly(
                model, [target], [seed], sampler, step, steps_offset=None if own else 0
            )  # [1, C, H, W]
            arguments = (noisy, timestep.expand(1))
            other = anchor if method.scored_against == "anchor" else ""
            with torch.no_grad():
                wanted = model.predict(*arguments, model.encode_prompts([other]))
            with method.trained_pass(model):
                predicted = model.predict(*arguments, model.encode_prompts([target]))
            method.scored_loss(predicted, wanted).backward()


class SelFT(Regularizer):
    """A mask, made at the start of a request, of the weights that the request may change."""

    def __init__(
        self,
        fraction: Annotated[float, Field(ge=0, le=1)],
        scoring: Literal["loss", "trajectory"] = "loss",
        num_batches: PositiveInt = 10,
        steps: PositiveInt = 50,
        apply: Literal["gradient", "update"] = "gradient",
        prompts: Literal["bare", "training"] = "bare",
    ) -> None:
        """
        Args:
            fraction: of all trained elements together that may move.
            scoring: "loss" takes the gradient of the method's own loss over its first batches, with
                its retain term where it has one and its multipliers as they start; "trajectory"
                that along DDIM sampling of the target, as released: of ConAbl's summed loss, for
                ESD of its own.
            num_batches: with scoring="loss"; their gradients are summed.
            steps: of DDIM, with scoring="trajectory".
            apply: "gradient" masks before the optimiser, as released: weight decay still shrinks
                what is masked. "update" puts masked elements back after the step, bitwise.
            prompts: with scoring="trajectory", of the concept and its anchor alone ("bare", as
                released) or those of training.
        """
        self.fraction, self.scoring, self.num_batches = fraction, scoring, num_batches
        self.steps, self.apply, self.prompts = steps, apply, prompts
        self.acts_on = ("gradient",) if apply == "gradient" else ("step",)

    def begin_request(self, scope: Scope, method: Method[Batch]) -> dict[str, object]:
        """Make the mask, and return its size."""
        self._mask = self.choose(scope, method)
        kept = sum(int(mask.sum()) for mask in self._mask.values())
        return {"kept": kept, "of": sum(mask.numel() for mask in self._mask.values())}

    def choose(self, scope: Scope, method: Method[Batch]) -> dict[str, Tensor]:
        """Score the weights as they are, and return the mask, as topk_mask does.

        Args:
            method: has begun the request of the scope.
        """
        if self.scoring == "trajectory":
            score_trajectory(scope, method, self.steps, self.prompts)
        elif method.closed_form:
            raise ValueError(
                "reg.selft.scoring=loss scores weights by the method's loss, and the method sets "
                "them in closed form without one; "
                "use reg.selft.scoring=trajectory"
            )
        else:
            for step in range(self.num_batches):
                method.backward(scope, method.batch(scope, step))
        mask = topk_mask(scope.params, gradients(scope.params), self.fraction)
        for parameter in scope.params.values():
            parameter.grad = None
        return mask

    def on_gradients(self, params: dict[str, nn.Parameter]) -> None:
        """Mask the gradients with apply=gradient."""
        if self.apply == "gradient":
            for name, gradient in gradients(params).items():
                gradient.mul_(self._mask[name])

    @without_gradients
    def on_step(self, params: dict[str, nn.Parameter], before: dict[str, Tensor]) -> None:
        """Put masked elements back with apply=update."""
        if self.apply == "update":
            for name, parameter in params.items():
                parameter.copy_(torch.where(self._mask[name], parameter, before[name]))
