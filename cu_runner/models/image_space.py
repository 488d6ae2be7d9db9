"""What the UNet denoises in place of images: an autoencoder's latents, or the pixels themselves.

Shapes: B batch, C latent channels, H W latent size, S image side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from cu_runner.runtime.lazy import nn
from cu_runner.schema.errors import ModelError

if TYPE_CHECKING:
    import diffusers
    from torch import Tensor


class ImageSpace(ABC):
    """Images to what is denoised, and back. networks: that it computes with."""

    networks: tuple[nn.Module, ...] = ()
    overflows_in_fp16 = False  # whether decode() must run in fp32 where the rest runs in fp16

    @abstractmethod
    def side(self, resolution: int) -> int:
        """Return the side H = W of the latents of images of that side, in pixels.

        Raises:
            ModelError: there are none of that side.
        """

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Map images [B, 3, S, S] in 0..1 to latents [B, C, H, W] as the UNet was trained on."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Map latents [B, C, H, W] to images [B, 3, S, S], where 0..1 is what can be shown."""

    @property
    def vae(self) -> diffusers.AutoencoderKL:
        """Return the autoencoder. Raises ModelError where there is none."""
        raise ModelError("the model has no autoencoder: it denoises pixels")


class Autoencoder(ImageSpace):
    """Latents of an AutoencoderKL, scaled, and of Stable Diffusion 3 and FLUX shifted before."""

    def __init__(
        self, vae: diffusers.AutoencoderKL, *, slicing: bool, fp32: bool, multiple: int = 1
    ) -> None:
        """Take the autoencoder.

        Args:
            slicing: encode and decode images one by one: less memory.
            fp32: it must decode in fp32 where the rest runs in fp16.
            multiple: what the denoiser needs the side of the latents to be one of.
        """
        self._vae, self.networks, self.overflows_in_fp16 = vae, (vae,), fp32
        vae.use_slicing = slicing
        self._factor = self.factor(vae) * multiple
        self._multiple = multiple
        self._scale = vae.config.scaling_factor
        self._shift: float | None = vae.config.get("shift_factor")

    @staticmethod
    def factor(vae: diffusers.ModelMixin) -> int:
        """Return how many pixels a side become one latent."""
        return int(2 ** (len(vae.config.block_out_channels) - 1))

    @property
    def vae(self) -> diffusers.AutoencoderKL:
        """Return the autoencoder."""
        return self._vae

    def side(self, resolution: int) -> int:
        """Return the side of the latents."""
        if resolution % self._factor:
            raise ModelError(
                f"model.resolution={resolution}: not a multiple of {self._factor}, "
                "the autoencoder's factor" + " times the denoiser's patch" * (self._multiple > 1)
            )
        return resolution // self._factor * self._multiple

    def encode(self, images: Tensor) -> Tensor:
        """Return the posterior mean, shifted and scaled."""
        latents: Tensor = self._encoded(images * 2 - 1)
        return (latents if self._shift is None else latents - self._shift) * self._scale

    def _encoded(self, images: Tensor) -> Tensor:
        mean: Tensor = self._vae.encode(images).latent_dist.mean
        return mean

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images of shifted and scaled latents."""
        plain = latents / self._scale
        images: Tensor = self._vae.decode(
            plain if self._shift is None else plain + self._shift
        ).sample
        return images.float() / 2 + 0.5


class DeepAutoencoder(Autoencoder):
    """Latents of an AutoencoderDC, of Sana, scaled: it has no distribution."""

    @staticmethod
    def factor(vae: diffusers.ModelMixin) -> int:
        """Return how many pixels a side become one latent."""
        return int(2 ** (len(vae.config.encoder_block_out_channels) - 1))

    def _encoded(self, images: Tensor) -> Tensor:
        latents: Tensor = self._vae.encode(images).latent
        return latents


class Pixels(ImageSpace):
    """Pixels in -1..1, as DDPM's models denoise them (Ho et al. 2020, Sec. 3.3)."""

    def __init__(self, unet: diffusers.UNet2DModel) -> None:
        """Take the UNet, which halves the side of an image some times."""
        self._factor = 2 ** (len(unet.config.block_out_channels) - 1)

    def side(self, resolution: int) -> int:
        """Return the side of the images itself."""
        if resolution % self._factor:
            raise ModelError(
                f"model.resolution={resolution}: not a multiple of {self._factor}, "
                "by which the UNet makes images smaller"
            )
        return resolution

    def encode(self, images: Tensor) -> Tensor:
        """Return the pixels in -1..1."""
        return images * 2 - 1

    def decode(self, latents: Tensor) -> Tensor:
        """Return the pixels in 0..1."""
        return latents.float() / 2 + 0.5
