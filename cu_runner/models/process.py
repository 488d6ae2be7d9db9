"""How noise is added to images, and what a network predicts of it.

Two processes: the variance-preserving one of Stable Diffusion 1 and 2 (Ho et al. 2020), and
rectified flow (Liu et al. 2022; Esser et al. 2024). Methods compare predictions, whatever these
are: the noise of the first, the velocity of the second.

Shapes: B batch, C latent channels, H W latent size, T noise levels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from cu_runner.runtime.lazy import torch

if TYPE_CHECKING:
    import diffusers
    from torch import Generator, Tensor


def across(values: Tensor) -> Tensor:
    """Return values [B] as [B, 1, 1, 1], or one value as [1, 1, 1, 1]."""
    return values.view(-1, 1, 1, 1)


class Process(ABC):
    """A path from images to noise. num_train_timesteps: T, its noise levels in training.

    Timesteps are on the scale of the scheduler: 0..T-1 of the variance-preserving process, and
    numbers above 0 up to T of rectified flow.
    """

    num_train_timesteps: int

    @abstractmethod
    def draw(self, generator: Generator, count: int) -> Tensor:
        """Draw timesteps [count], as models are trained on them."""

    @abstractmethod
    def at(self, share: Tensor) -> Tensor:
        """Return the timesteps at uniform shares 0 <= u < 1 of the training timesteps."""

    @abstractmethod
    def as_trained(self, timestep: Tensor) -> Tensor:
        """Return the timestep of a sampler as one that a model is trained on."""

    @abstractmethod
    def level(self, timesteps: Tensor) -> Tensor:
        """Return the number 0..T-1 of the noise level of timesteps [B]."""

    @abstractmethod
    def log_snr(self) -> Tensor:
        """Return log(signal / noise), as variances, of the noise levels [T]; it may be infinite."""

    @abstractmethod
    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise clean latents x_0 to x_t, all [B, C, H, W], at timesteps [B]."""

    @abstractmethod
    def target(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Return what a perfect prediction is of images that are known, [B, C, H, W]."""

    @abstractmethod
    def prediction(self, output: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Return the prediction that a network's output [B, C, H, W] means."""

    @abstractmethod
    def noise_error(self, timesteps: Tensor) -> Tensor:
        """Return the factor [B] by which a difference of predictions is one of predicted noise."""


class VariancePreserving(Process):
    """x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) eps; the prediction is eps   (Ho et al. 2020)."""

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str) -> None:
        """Take ab [T], and what the network puts out: epsilon or v_prediction."""
        self.alphas_cumprod = alphas_cumprod
        self.num_train_timesteps = len(alphas_cumprod)
        self._predicts_noise = prediction_type == "epsilon"

    def draw(self, generator: Generator, count: int) -> Tensor:
        """Draw whole timesteps, all alike."""
        return torch.randint(self.num_train_timesteps, (count,), generator=generator)

    def at(self, share: Tensor) -> Tensor:
        """Return whole timesteps."""
        return (share * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)

    def as_trained(self, timestep: Tensor) -> Tensor:
        """Return the nearest whole one: some schedulers stop between two."""
        return timestep.round().long()

    def level(self, timesteps: Tensor) -> Tensor:
        """Return the timesteps themselves."""
        return timesteps

    def log_snr(self) -> Tensor:
        """Return log(ab / (1 - ab))."""
        return self.alphas_cumprod.double().logit()

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return sqrt(ab_t) x_0 + sqrt(1 - ab_t) eps   (Ho et al. 2020, eq. 4)."""
        alpha_bar = across(self.alphas_cumprod[timesteps])
        return alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise

    def target(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Return the noise."""
        return noise

    def prediction(self, output: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noise e(x_t, t, c)."""
        if self._predicts_noise:
            return output
        # v = sqrt(ab) eps - sqrt(1 - ab) x_0   =>   eps = sqrt(ab) v + sqrt(1 - ab) x_t
        # (Salimans & Ho 2022, App. D)
        alpha_bar = across(self.alphas_cumprod[timesteps])
        return alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * noisy

    def noise_error(self, timesteps: Tensor) -> Tensor:
        """Return 1: predictions are noise."""
        return torch.ones(timesteps.shape, device=timesteps.device)


class RectifiedFlow(Process):
    """x_s = (1 - s) x_0 + s eps; the prediction is the velocity eps - x_0   (Liu et al. 2022).

    The timestep that a network is given is T s.
    """

    def __init__(self, num_train_timesteps: int, shift: float = 1.0) -> None:
        """Take T, and the shift of training's noise levels   (Esser et al. 2024, Sec. 5.3.2)."""
        self.num_train_timesteps, self._shift = num_train_timesteps, shift

    def draw(self, generator: Generator, count: int) -> Tensor:
        """Draw logit-normal timesteps   (Esser et al. 2024, Sec. 3.1), shifted."""
        levels = torch.randn(count, generator=generator, device=generator.device).sigmoid()
        return self._timesteps(levels)

    def at(self, share: Tensor) -> Tensor:
        """Return the logit-normal timesteps at those shares; the lowest is that of 1/2T."""
        least = 1 / (2 * self.num_train_timesteps)
        return self._timesteps(torch.special.ndtri(share.clamp(least, 1 - least)).sigmoid())

    def _timesteps(self, levels: Tensor) -> Tensor:
        shifted = self._shift * levels / (1 + (self._shift - 1) * levels)
        return shifted.float() * self.num_train_timesteps

    def as_trained(self, timestep: Tensor) -> Tensor:
        """Return the timestep itself: levels are continuous."""
        return timestep

    def level(self, timesteps: Tensor) -> Tensor:
        """Return the nearest of the levels s = (t + 1) / T."""
        return (timesteps.round().long() - 1).clamp(0, self.num_train_timesteps - 1)

    def log_snr(self) -> Tensor:
        """Return log((1 - s)^2 / s^2) of the levels s = (t + 1) / T; the last is -inf."""
        steps = torch.arange(1, self.num_train_timesteps + 1, dtype=torch.float64)
        levels = steps / self.num_train_timesteps
        return 2 * ((1 - levels) / levels).log()

    def _sigma(self, timesteps: Tensor) -> Tensor:
        return timesteps.float() / self.num_train_timesteps

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return (1 - s) x_0 + s eps."""
        sigma = across(self._sigma(timesteps))
        return (1 - sigma) * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Return the velocity eps - x_0."""
        return noise - clean

    def prediction(self, output: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Return the velocity, which is what the network puts out."""
        return output

    def noise_error(self, timesteps: Tensor) -> Tensor:
        """Return 1 - s: eps = x_s + (1 - s) v."""
        return 1 - self._sigma(timesteps)


def is_flow(scheduler: diffusers.SchedulerMixin) -> bool:
    """Tell whether a scheduler of diffusers samples a rectified flow."""
    config = scheduler.config
    named = "FlowMatch" in type(scheduler).__name__
    return named or config.get("prediction_type") == "flow_prediction"


def process_of(scheduler: diffusers.SchedulerMixin, device: torch.device) -> Process:
    """Return the process that a checkpoint's scheduler belongs to.

    A shift that depends on the resolution (use_dynamic_shifting) is one of sampling alone.
    """
    config = scheduler.config
    if not is_flow(scheduler):
        return VariancePreserving(scheduler.alphas_cumprod.to(device), config.prediction_type)
    fixed = 1.0 if config.get("use_dynamic_shifting") else config.get("shift")
    shift = config.get("flow_shift") if fixed is None else fixed
    return RectifiedFlow(int(config.num_train_timesteps), float(shift or 1.0))
