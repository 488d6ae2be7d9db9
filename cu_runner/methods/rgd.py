"""Restricted gradient descent on diversified data (Ko et al., NeurIPS 2024, arXiv 2412.07808).

The step goes up the diffusion loss of the concept and down that of what is to be kept, each without
the part that hurts the other. Neither loss is hurt to first order by a plain gradient step
(train.optimizer=sgd); the released code uses Adam (train.optimizer=adam), whose rescaling breaks
that guarantee.

Shapes: P trainable weights in one vector.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from cu_runner.concepts.entries import read_file, read_shipped, spread
from cu_runner.methods._forgetting import (
    ForgetBatch,
    add_gradient,
    captioned,
    draw_pair,
    flat_gradient,
    forget_set,
)
from cu_runner.methods.base import Method
from cu_runner.request.images import CaptionedImages, RetainSet, diffusion_loss
from cu_runner.request.scope import Scope
from cu_runner.schema.settings import ParameterGroup

if TYPE_CHECKING:
    from torch import Tensor


def restricted_gradient(
    g_forget: Tensor, g_retain: Tensor, alpha: float = 1.0, always: bool = False
) -> Tensor:
    """Return d_f + alpha d_r [P], the direction to descend   (Ko et al. 2024).

    d_f = g_f - (g_f.g_r / ||g_r||^2) g_r,   d_r = g_r - (g_f.g_r / ||g_f||^2) g_f, both from the
    original gradients.

    Args:
        g_forget: [P], the gradient of MINUS the diffusion loss on the forget data.
        g_retain: [P], the gradient of the diffusion loss on the retain data.
        always: project also when the gradients agree; the released code projects only when g_f.g_r
            < 0. A zero gradient has nothing to project.
    """
    dot = (g_forget.double() @ g_retain.double()).item()
    if dot == 0 or (dot > 0 and not always):
        return g_forget + alpha * g_retain
    squared_forget, squared_retain = (
        gradient.double().square().sum().item() for gradient in (g_forget, g_retain)
    )
    return (g_forget - dot / squared_retain * g_retain) + alpha * (
        g_retain - dot / squared_forget * g_forget
    )


def without_concept(template: str) -> str:
    """Return the prompt that is left when {concept} is taken out of a template."""
    parts = [" ".join(part.split()) for part in template.replace("{concept}", "").split(",")]
    return ", ".join(part for part in parts if part)


class RGD(Method[ForgetBatch]):
    """Ascent on the concept and descent on the rest, restricted to what does not hurt the other."""

    def __init__(
        self,
        alpha: NonNegativeFloat = 1.5,
        always: bool = False,
        truncate_at: PositiveFloat | None = None,
        diversity: Literal["sequence", "diversified", "narrow"] = "sequence",
        templates: Annotated[str, Field(min_length=1)] = "scenes_with_concept",
        num_prompts: PositiveInt = 100,
        num_images: PositiveInt = 200,
        retain: RetainSet = RetainSet(),
        params: ParameterGroup = "kv_xattn",
    ) -> None:
        """
        Args:
            alpha: weight of the retain direction.
            always: project also when the two gradients agree.
            truncate_at: m, the diffusion loss on the forget batch above which the step follows the
                retain gradient alone; None is never.
            diversity: "sequence" forgets the sequence's target prompts and keeps `retain`.
                "diversified" forgets `templates` with the concept and keeps the same prompts
                without it. "narrow", the ablation: one target prompt against its anchor's.
            templates: with "diversified", a shipped list or a text file (*.txt) with one prompt a
                line, each with one {concept}.
            num_prompts: at most so many of the templates, evenly spread.
            num_images: images of each concept, and with "diversified" and "narrow" as many to be
                kept; by the untouched model. With "sequence", of pictures in sequence.images at
                most.
            retain: with "sequence", what is to be kept.
            params: the weights that are trained.

        Raises:
            ValueError: the templates cannot be read, or one of them does not hold {concept} once.
        """
        self.alpha, self.always, self.truncate_at = alpha, always, truncate_at
        self.diversity, self.num_images = diversity, num_images
        self.pictured = "targets" if diversity == "sequence" else None
        self.retain, self.params = retain, params
        self._templates = (
            read_templates(templates, num_prompts) if diversity == "diversified" else []
        )

    def begin_request(self, scope: Scope) -> None:
        """Make images of the concepts and of what is to be kept."""
        if self.diversity == "diversified":
            names = [concept.prompt_name for concept in scope.request.targets]
            forget = [
                [template.replace("{concept}", name) for template in self._templates]
                for name in names
            ]
            keep = [[without_concept(template) for template in self._templates]]
        elif self.diversity == "narrow":
            pairs = [scope.sequence.training_pairs(concept)[0] for concept in scope.request.targets]
            forget, keep = [[target] for target, _ in pairs], [[anchor] for _, anchor in pairs]
        if self.diversity == "sequence":
            shown = forget_set(scope, self.num_images)
            self._forget = captioned(scope, shown, number=self.num_images)
            self._kept = self.retain.images_of(scope)
        else:
            self._forget = CaptionedImages(scope, forget, number=self.num_images)
            self._kept = CaptionedImages(scope, keep, number=self.num_images)

    def batch(self, scope: Scope, step: int) -> ForgetBatch:
        """Draw both kinds of images under noise, each with its own prompts."""
        return draw_pair(scope, step, self._forget, self._kept)

    def backward(self, scope: Scope, batch: ForgetBatch) -> dict[str, float]:
        """Add the restricted gradient.

        Where the concept is forgotten enough, that of the retained images alone is added.
        """
        assert batch.retain is not None  # batch() always draws some
        forget = diffusion_loss(scope.model, batch.forget)
        kept = diffusion_loss(scope.model, batch.retain)
        g_retain = flat_gradient(kept, scope.params)
        logs = {"forget_loss": forget.item(), "retain_loss": kept.item()}
        if self.truncate_at is not None and forget.item() > self.truncate_at:
            add_gradient(scope.params, g_retain)
            return {"loss": kept.item(), **logs, "truncated": 1.0}
        g_forget = flat_gradient(-forget, scope.params)
        add_gradient(scope.params, restricted_gradient(g_forget, g_retain, self.alpha, self.always))
        return {"loss": self.alpha * kept.item() - forget.item(), **logs, "truncated": 0.0}


def read_templates(source: str, number: int) -> list[str]:
    """Read at most `number` prompts of a shipped list or a text file. Raise ValueError."""
    try:
        found = (read_file if source.endswith(".txt") else read_shipped)(source)
    except ValueError as error:
        raise ValueError(f"method.templates={error}") from None
    for template in found:
        if template.count("{concept}") != 1:
            raise ValueError(
                f"method.templates={source}: {template!r} must hold {{concept}} once, where the "
                "concept stands"
            )
    return spread(found, number)
