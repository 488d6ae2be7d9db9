"""Batched text-to-image generation with noise fixed per image.

Shapes: B batch, C latent channels, H W latent size, S image side.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, overload

from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.process import is_flow
from cu_runner.models.schedulers import build_scheduler, find_scheduler, scaled
from cu_runner.models.trajectory import Trajectory
from cu_runner.runtime import distributed
from cu_runner.runtime.lazy import torch, without_gradients
from cu_runner.runtime.progress import Progress
from cu_runner.schema.errors import SamplingError
from cu_runner.schema.settings import Sampler

if TYPE_CHECKING:
    import diffusers
    from torch import Tensor

logger = logging.getLogger(__name__)


Value = TypeVar("Value")


@overload
def generate(
    model: DiffusionModel,
    prompts: list[str],
    seeds: list[int],
    sampler: Sampler,
    *,
    batch_size: int,
    label: str,
) -> Iterator[Tensor]: ...


@overload
def generate(
    model: DiffusionModel,
    prompts: list[str],
    seeds: list[int],
    sampler: Sampler,
    *,
    batch_size: int,
    label: str,
    transform: Callable[[Tensor], Value],
) -> Iterator[Value]: ...


def generate(
    model: DiffusionModel,
    prompts: list[str],
    seeds: list[int],
    sampler: Sampler,
    *,
    batch_size: int,
    label: str,
    transform: Callable[[Tensor], Any] = lambda images: images,
) -> Iterator[Any]:
    """Yield images batch by batch, in the order of the prompts, and show how far they are.

    Where GPU memory runs out, batches become half as large.

    Args:
        prompts, seeds: one of each per image; together they fix its noise.
        batch_size: images per forward pass (twice as many rows with guidance).
        label: what the progress bar says.
        transform: what is made of each batch and yielded in its place; it may run out of memory
            too.

    Yields:
        [B, 3, S, S] float in 0..1, on the model's device.
    """

    def make(rows: slice, on_step: Callable[[float], None]) -> Any:
        return transform(sample_images(model, prompts[rows], seeds[rows], sampler, on_step))

    return in_batches(model, len(prompts), batch_size, label, make)


def in_batches(
    model: DiffusionModel,
    number: int,
    batch_size: int,
    label: str,
    make: Callable[[slice, Callable[[float], None]], Value],
) -> Iterator[Value]:
    """Yield what is made of each batch of `number` images, in order, and show how far they are.

    Where GPU memory runs out, batches become half as large.

    Args:
        label: what the progress bar says.
        make: is given the rows of a batch, and what to tell which share of it is done.
    """
    done = 0
    with Progress(label, number, "image") as bar:
        while done < number:
            size = largest_batch(model, batch_size)
            rows = slice(done, min(done + size, number))
            try:
                found = make(rows, bar.between(rows.start, rows.stop))
            except torch.OutOfMemoryError:
                if not halve_batches(model, size):
                    raise
                continue
            yield found
            done = rows.stop
            bar.reach(done)


def largest_batch(model: DiffusionModel, batch_size: int) -> int:
    """Return the images of a batch: at most batch_size, and not more than memory was found to hold.

    Of processes that share a batch, it is not more than the memory of each of them.
    """
    own = min(batch_size, model.batch_limit or batch_size)
    return min(distributed.in_turn(own)) if distributed.is_shared() else own


def halve_batches(model: DiffusionModel, size: int) -> bool:
    """Limit batches from now on to half of `size` images, which GPU memory did not hold.

    Returns:
        False where there is nothing to halve: a single image, or a batch of which other processes
        wait for this one's share.
    """
    if size == 1 or distributed.is_shared():
        return False
    model.batch_limit = size // 2
    logger.warning(
        "   out of GPU memory: sampling goes on with batches of %d images", model.batch_limit
    )
    return True


def sample_images(
    model: DiffusionModel,
    prompts: list[str],
    seeds: list[int],
    sampler: Sampler,
    on_step: Callable[[float], None] = lambda share: None,
) -> Tensor:
    """Sample one batch of images [B, 3, S, S], float in 0..1, on the model's device."""
    return model.decode_latents(sample_latents(model, prompts, seeds, sampler, on_step))


def not_finite(model: DiffusionModel, what: str, step: int = 0) -> SamplingError:
    """Return the error for images that are not finite.

    Args:
        what: which images they are, in words.
        step: the request after which they were made; 0: the weights are untouched.
    """
    if step:
        advice = "the weights diverged; lower train.lr. Finished requests are kept"
    elif model.precision != "fp32":
        advice = f"the model overflows in model.precision={model.precision}; try fp32"
    else:
        advice = (
            "the checkpoint overflows, or its sampler does; try others of steps, guidance and "
            "scheduler, or another checkpoint"
        )
    return SamplingError(f"{what} are not finite: {advice}")


def make_scheduler(
    model: DiffusionModel, sampler: Sampler, *, steps_offset: int | None = None
) -> diffusers.SchedulerMixin:
    """Make a fresh scheduler with its timesteps set; the state of one trajectory lives in it.

    It is changed as diffusers' pipelines change it (components.scheduler_changes), and offsets its
    timesteps by steps_offset where that is given.

    Raises:
        ValueError: diffusers has no such scheduler, or it is none of a diffusion model, or cannot
            take the checkpoint's configuration.
    """
    kind, name, config = type(model.scheduler), sampler.scheduler, model.scheduler.config
    changes = model.components.scheduler_changes(config)
    if steps_offset is not None:
        changes["steps_offset"] = steps_offset
    if name and is_flow(model.scheduler):
        changes |= same_shift(config, name)
    try:
        scheduler: Any = build_scheduler(find_scheduler(name) if name else kind, config, changes)
    except ValueError as error:
        raise ValueError(f"scheduler={name or kind.__name__}: {error}") from None
    if is_flow(scheduler) != is_flow(model.scheduler):
        raise ValueError(
            f"scheduler={name}: samples no {'flow' if is_flow(model.scheduler) else 'diffusion'}, "
            f"which the model is; give one such as {kind.__name__}"
        )
    side = model.latent_shape[-1]
    more = model.components.timestep_arguments(scheduler, sampler.steps, side)
    scheduler.set_timesteps(sampler.steps, device=model.device, **more)
    return scheduler


def same_shift(config: Mapping[str, Any], name: str) -> dict[str, object]:
    """Return the shift of a flow's scheduler as that of another class, which may name it otherwise.

    Raises:
        ValueError: diffusers has no such scheduler.
    """
    taken = inspect.signature(find_scheduler(name).__init__).parameters
    own = config.get("flow_shift") if config.get("shift") is None else config["shift"]
    if own is None:
        return {}
    found = {key: own for key in ("shift", "flow_shift") if key in taken}
    if "use_flow_sigmas" in taken:
        found |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    return found


@without_gradients
def sample_latents(
    model: DiffusionModel,
    prompts: list[str],
    seeds: list[int],
    sampler: Sampler,
    on_step: Callable[[float], None] = lambda share: None,
) -> Tensor:
    """Denoise one batch to scaled latents [B, C, H, W]. on_step: is told the share that is done."""
    scheduler = make_scheduler(model, sampler)
    steps = len(scheduler.timesteps)
    return denoise(model, scheduler, prompts, seeds, sampler.guidance, steps, on_step)


@without_gradients
def sample_partly(
    model: DiffusionModel,
    prompts: list[str],
    seeds: list[int],
    sampler: Sampler,
    stop: int,
    *,
    steps_offset: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Denoise one batch for the first `stop` steps; steps_offset as for make_scheduler.

    Returns:
        x_t [B, C, H, W] as add_noise would scale it, and t, a scalar.
    """
    scheduler = make_scheduler(model, sampler, steps_offset=steps_offset)
    latents = denoise(model, scheduler, prompts, seeds, sampler.guidance, stop)
    timestep = scheduler.timesteps[stop]
    return scaled(scheduler, latents, timestep), timestep


def denoise(
    model: DiffusionModel,
    scheduler: diffusers.SchedulerMixin,
    prompts: list[str],
    seeds: list[int],
    guidance: float,
    stop: int,
    on_step: Callable[[float], None] = lambda share: None,
) -> Tensor:
    """Return latents [B, C, H, W] after the first `stop` steps from each image's own noise.

    Args:
        on_step: is told after each step which share of them is done.
    """
    return Trajectory(model, scheduler, prompts, seeds, guidance).advance(stop, on_step)
