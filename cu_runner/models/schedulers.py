"""Schedulers of diffusers: found by name, and made of configurations that they can take."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cu_runner.models.process import is_flow
from cu_runner.runtime.lazy import diffusers, torch
from cu_runner.schema.errors import first_line

if TYPE_CHECKING:
    from torch import Tensor

NO_DIFFUSION = (
    "has no noise schedule of a diffusion model (alphas_cumprod) or of a flow; give one such as "
    "DDIMScheduler or FlowMatchEulerDiscreteScheduler"
)
LONGEST = 100_000  # steps of a noise schedule; published ones have 1000
DEFAULTED = "_use_default_values"  # in a configuration: the keys that its file left out
SHOWN = 60  # characters of a value in a line


def find_scheduler(name: str) -> type[diffusers.SchedulerMixin]:
    """Return a scheduler class of diffusers. Raises ValueError, which does not repeat the name."""
    kind = getattr(diffusers, name, None)
    if isinstance(kind, diffusers.utils.DummyObject):  # its package is not installed
        packages = " and ".join(kind._backends[1:])
        raise ValueError(
            f"needs the package {packages}, and draws noise that an image's seed does not fix; "
            "give one such as EulerAncestralDiscreteScheduler"
        )
    bases = (diffusers.SchedulerMixin, diffusers.ConfigMixin)
    if not (inspect.isclass(kind) and all(issubclass(kind, base) for base in bases)):
        raise ValueError("diffusers has no such scheduler; give a class such as DDIMScheduler")
    return kind


def build_scheduler(
    kind: type[diffusers.SchedulerMixin],
    config: Mapping[str, Any],
    changes: Mapping[str, object],
) -> diffusers.SchedulerMixin:
    """Make a scheduler of a configuration, with other values for some keys.

    Raises:
        ValueError: it cannot be made, or cannot denoise; the line names the key of the
            configuration that is at fault, where it is one.
    """
    # what a file left to defaults is left to those of this class too, unless it is changed
    default = [key for key in config.get(DEFAULTED, []) if key not in changes]
    config = {**config, **changes, DEFAULTED: default}
    library: Any = kind  # without types
    reason = failure(library, json.dumps(config, default=str))
    if reason == NO_DIFFUSION:
        raise ValueError(reason)
    if reason is not None:
        for key, value in config.items():
            rest = {name: entry for name, entry in config.items() if name != key}
            if not key.startswith("_") and failure(library, json.dumps(rest, default=str)) is None:
                shown = repr(value)
                shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
                raise ValueError(
                    f"cannot take {key}={shown} ({reason}); correct it or leave it out"
                )
        raise ValueError(f"cannot be used ({reason}); give one such as DDIMScheduler")
    return library.from_config(config)


def wrong_levels(scheduler: diffusers.SchedulerMixin) -> str | None:
    """Say what is wrong with the noise levels of a scheduler; None if nothing is."""
    if not hasattr(scheduler, "alphas_cumprod"):
        return None if is_flow(scheduler) else NO_DIFFUSION
    levels = scheduler.alphas_cumprod
    if not (levels.isfinite().all() and (levels >= 0).all() and (levels < 1).all()):
        return "its noise levels are not between 0 and 1"
    if len(levels) != scheduler.config.num_train_timesteps:
        return f"it has {len(levels)} noise levels"
    return None


def scaled(scheduler: diffusers.SchedulerMixin, latents: Tensor, timestep: Tensor) -> Tensor:
    """Return latents [B, C, H, W] as the denoiser reads them; those of FlowMatch... as they are."""
    if not hasattr(scheduler, "scale_model_input"):
        return latents
    found: Tensor = scheduler.scale_model_input(latents, timestep)
    return found


@functools.cache
def failure(kind: type[diffusers.SchedulerMixin], config: str) -> str | None:
    """Say why a scheduler of a configuration, as JSON, cannot take two steps; None if it can."""
    library: Any = kind  # without types
    settings = json.loads(config)
    length = settings.get("num_train_timesteps", 1000)
    if not isinstance(length, int) or not 1 <= length <= LONGEST:
        return f"allowed: whole numbers from 1 to {LONGEST}"
    try:
        scheduler = library.from_config(settings)
        if (reason := wrong_levels(scheduler)) is not None:
            return reason
        shifted = {"mu": 0.5} if scheduler.config.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(2, **shifted)
        latents = torch.ones(1, 1, 8, 8)
        with torch.random.fork_rng(devices=[]):  # some draw noise of their own
            for timestep in scheduler.timesteps:
                noisy = scaled(scheduler, latents, timestep)
                latents = scheduler.step(torch.ones_like(noisy), timestep, latents).prev_sample
    except Exception as error:  # what a configuration breaks raises many types
        return first_line(error)[:150]
    return None if latents.isfinite().all() else "what it denoises is not finite"


def ddim_rooms(scheduler: diffusers.SchedulerMixin) -> list[tuple[Tensor, Tensor]]:
    """Return, for each step of DDIM, 1 - a_prev and the deviation of the noise at an eta of 1.

    A step adds noise of sigma = eta sqrt((1 - a_prev) / (1 - a_t) (1 - a_t / a_prev)) and takes
    the root of 1 - a_prev - sigma^2 (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16). Both are
    scalars, computed as diffusers does. Other schedulers have none.
    """
    if not isinstance(scheduler, diffusers.DDIMScheduler | diffusers.DDIMParallelScheduler):
        return []
    ddim: Any = scheduler
    stride = ddim.config.num_train_timesteps // ddim.num_inference_steps
    rooms = []
    for timestep in ddim.timesteps.tolist():
        before = timestep - stride
        alpha = ddim.alphas_cumprod[before] if before >= 0 else ddim.final_alpha_cumprod
        rooms.append((1 - alpha, ddim._get_variance(timestep, before) ** 0.5))
    return rooms


def largest_eta(scheduler: diffusers.SchedulerMixin) -> float:
    """Return the largest eta with which no step adds more noise than there is room for.

    Of schedulers other than DDIM it is 1.
    """
    rooms = ddim_rooms(scheduler)
    return min(
        (float(room) ** 0.5 / float(deviation) for room, deviation in rooms if deviation > 0),
        default=1.0,
    )


def real_eta(scheduler: diffusers.SchedulerMixin, eta: float) -> float:
    """Return eta, or a number smaller by 1e-4 of it at most, with which no step is imaginary.

    At the largest eta the root of ddim_rooms() is that of 0, and as computed of some 1e-8 to either
    side of it, which depends on the machine: below 0 the whole image would be no number. An eta
    that is further beyond is returned as it is.
    """
    rooms = ddim_rooms(scheduler) if eta else []
    for less in (0.0, *(1e-7 * 2**power for power in range(10))):
        smaller = eta * (1 - less)
        if all(room - (smaller * deviation) ** 2 >= 0 for room, deviation in rooms):
            return smaller
    return eta
