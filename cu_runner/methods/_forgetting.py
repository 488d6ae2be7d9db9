"""What methods share that train on images of the concept itself: batches, losses, flat gradients.

Shapes: B batch, L tokens, D text width, G concepts, M prompts per concept, P trainable weights in
one vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cu_runner.models.diffusion import DiffusionModel
from cu_runner.request.images import CaptionedImages, NoisyBatch, diffusion_loss
from cu_runner.request.own_images import TargetImages, images_of_target
from cu_runner.request.scope import Scope
from cu_runner.runtime.lazy import F, nn, torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ForgetBatch:
    """Images of the concepts to unlearn, and images to be kept.

    forget: its first texts are the concepts' own prompts. retain: None where they weigh 0.
    """

    forget: NoisyBatch
    retain: NoisyBatch | None


def forget_set(scope: Scope, number: int) -> list[TargetImages]:
    """Return what shows every concept to unlearn, at most `number` pictures where there are any."""
    return [images_of_target(scope.sequence, each, number) for each in scope.request.targets]


def captioned(
    scope: Scope, shown: list[TargetImages], *further: list[list[str]], number: int
) -> CaptionedImages:
    """Make the images of every concept to unlearn, `number` where there are no pictures.

    Their first texts are its own prompts. further: more texts for the same images, [G][M].
    """
    pictures = [each.pictures for each in shown]
    own = [each.prompts for each in shown]
    return CaptionedImages(scope, own, *further, number=number, pictures=pictures)


def draw_pair(
    scope: Scope, step: int, forget: CaptionedImages, retain: CaptionedImages | None
) -> ForgetBatch:
    """Draw batch number `step`: scope.batch_size images of each kind."""
    kept = None
    if retain is not None:
        kept = retain.draw(scope.rng.generator("retain", step), scope.batch_size)
    return ForgetBatch(forget.draw(scope.rng.generator("train", step), scope.batch_size), kept)


def matching_loss(
    model: DiffusionModel, batch: NoisyBatch, weights: dict[str, Tensor] | None = None
) -> Tensor:
    """Return E ||e(x_t, c*) - sg e(x_t, other)||^2.

    Args:
        batch: its texts are the concept's prompts and the others'.
        weights: used in place of the UNet's own.
    """
    own, other = batch.texts
    with torch.no_grad():
        wanted = model.predict(batch.noisy, batch.timesteps, other, weights)
    return F.mse_loss(model.predict(batch.noisy, batch.timesteps, own, weights), wanted)


def add_retained(
    model: DiffusionModel, loss: Tensor, retain: NoisyBatch | None, weight: float
) -> tuple[Tensor, dict[str, float]]:
    """Return loss + weight x diffusion loss on the retained images, and both terms for the log."""
    logs = {"forget_loss": loss.item()}
    if retain is None:
        return loss, logs
    kept = diffusion_loss(model, retain)
    return loss + weight * kept, logs | {"retain_loss": kept.item()}


def flat_gradient(loss: Tensor, params: dict[str, nn.Parameter]) -> Tensor:
    """Return d loss / d theta as one vector [P], in the order of params; .grad stays as it is."""
    gradients = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def split(flat: Tensor, params: dict[str, nn.Parameter]) -> list[Tensor]:
    """Cut a vector [P] into views with the shapes of the weights."""
    parts = flat.split([parameter.numel() for parameter in params.values()])
    return [part.view_as(parameter) for part, parameter in zip(parts, params.values(), strict=True)]


def add_gradient(params: dict[str, nn.Parameter], flat: Tensor) -> None:
    """Add a vector [P] to .grad.

    .grad gets the strides of its weight: fused optimisers take no others.
    """
    for parameter, part in zip(params.values(), split(flat, params), strict=True):
        total = part if parameter.grad is None else parameter.grad + part
        parameter.grad = torch.empty_like(parameter).copy_(total)
