"""A batch of images on its way from noise to latents; it can stop, be kept, and go on.

Shapes: B batch, C latent channels, H W latent size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.schedulers import real_eta, scaled
from cu_runner.models.text import Text
from cu_runner.runtime.lazy import torch, without_gradients
from cu_runner.runtime.seeding import derive_seed, image_noise

if TYPE_CHECKING:
    import diffusers
    from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """One image after some denoising steps.

    latents: [C, H, W]. history: what the scheduler remembers of the image, by attribute. common:
    what it remembers of them all. generator: the state of the image's own random numbers.
    """

    latents: Tensor
    history: dict[str, Any]
    common: dict[str, Any]
    generator: Tensor | None


class Trajectory:
    """Denoises a batch step by step, each image from its own noise. The scheduler is its own."""

    def __init__(
        self,
        model: DiffusionModel,
        scheduler: diffusers.SchedulerMixin,
        prompts: list[str],
        seeds: list[int],
        guidance: float,
        *,
        eta: float = 0.0,
        noise_scales: list[float] | None = None,
        text: Text | None = None,
    ) -> None:
        """Begin with noise.

        Args:
            scheduler: fresh, with its timesteps set.
            prompts, seeds: one of each per image; together they fix its noise.
            guidance: classifier-free guidance scale; 1 turns it off.
            eta: of schedulers that take one: 0 adds no noise on the way, as diffusers' pipelines.
            noise_scales: factor of the first noise of each image; 1 where it is left out.
            text: of the prompts, where their words are not what the model reads.
        """
        self._model, self._scheduler, self._guidance = model, scheduler, guidance
        noise = image_noise(prompts, seeds, model.latent_shape).to(model.device)
        if noise_scales is not None:
            noise *= torch.tensor(noise_scales, device=model.device).view(-1, 1, 1, 1)
        self.latents: Tensor = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        self._second_pass = guidance != 1 and not model.guides_itself
        text = model.encode_prompts(prompts) if text is None else text
        if self._second_pass:
            text = Text.cat([model.encode_prompts([""] * len(prompts)), text])
        self._text = text
        self.done = 0  # steps
        self._extra: dict[str, Any] = {}
        parameters = inspect.signature(scheduler.step).parameters
        if "eta" in parameters:
            self._extra["eta"] = real_eta(scheduler, eta)  # TCDScheduler's own is 0.3
        # stochastic samplers draw per image too
        if "generator" in parameters:
            self._extra["generator"] = [
                torch.Generator().manual_seed(derive_seed("sampler", prompt, seed))
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]

    @property
    def num_steps(self) -> int:
        """Return how many denoising steps there are in all."""
        return len(self._scheduler.timesteps)

    @without_gradients
    def advance(self, stop: int, on_step: Callable[[float], None] = lambda share: None) -> Tensor:
        """Denoise up to step `stop` with the weights as they are; return latents [B, C, H, W].

        Args:
            on_step: is told after each step which share of `stop` is done.
        """
        with self._model.constant_text():
            for number in range(self.done, stop):
                timestep = self._scheduler.timesteps[number]
                self.latents = self._step(timestep)
                on_step((number + 1) / stop)
        self.done = max(self.done, stop)
        return self.latents

    def _step(self, timestep: Tensor) -> Tensor:
        guided = self._second_pass
        rows = torch.cat([self.latents, self.latents]) if guided else self.latents
        noisy = scaled(self._scheduler, rows, timestep)
        output = self._model.output(noisy, timestep, self._text, guidance=self._guidance)
        if guided:
            unconditional, conditional = output.chunk(2)
            output = unconditional + self._guidance * (conditional - unconditional)
        stepped: Tensor = self._scheduler.step(
            output, timestep, self.latents, **self._extra
        ).prev_sample
        return stepped

    def keep(self) -> list[Kept]:
        """Return the state of each image, on the CPU, as resume() takes it."""
        count, shape = len(self.latents), self.latents.shape
        generators = self._extra.get("generator")

        def of_batch(value: object) -> bool:
            return isinstance(value, torch.Tensor) and value.shape == shape

        common: dict[str, Any] = {}
        remembered: dict[str, Any] = {}
        for name, value in vars(self._scheduler).items():
            if of_batch(value) or (isinstance(value, list) and any(map(of_batch, value))):
                remembered[name] = value
            elif value is None or isinstance(value, int | float):
                common[name] = value
            elif isinstance(value, torch.Tensor) and value.ndim == 0:
                common[name] = value.clone()
        return [
            Kept(
                self.latents[row].cpu(),
                {name: row_of(value, row) for name, value in remembered.items()},
                {**common, "done": self.done},
                generators[row].get_state() if generators else None,
            )
            for row in range(count)
        ]

    def resume(self, kept: list[Kept]) -> None:
        """Take the states of as many images, all after the same number of steps."""
        common = dict(kept[0].common)
        self.done = common.pop("done")
        device = self._model.device
        self.latents = torch.stack([each.latents for each in kept]).to(device)
        vars(self._scheduler).update(common)
        for name in kept[0].history:
            rows = [each.history[name] for each in kept]
            setattr(self._scheduler, name, together(rows, device))
        if "generator" in self._extra:
            for generator, each in zip(self._extra["generator"], kept, strict=True):
                generator.set_state(each.generator)


def row_of(value: Any, row: int) -> Any:
    """Return an image's part of what a scheduler remembers: a tensor [B, ...], or a list of such
    and of None.
    """
    if isinstance(value, list):
        return [None if each is None else each[row].cpu() for each in value]
    return value[row].cpu()


def together(rows: list[Any], device: torch.device) -> Any:
    """Return what row_of() took apart."""
    if isinstance(rows[0], list):
        parts = zip(*rows, strict=True)
        return [None if part[0] is None else torch.stack(list(part)).to(device) for part in parts]
    return torch.stack(rows).to(device)
