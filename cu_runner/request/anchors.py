"""Images that the untouched model makes of prompts, as latents, cached across runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.parameters import placed
from cu_runner.models.sampling import generate, make_scheduler, not_finite
from cu_runner.runtime.lazy import nn, torch
from cu_runner.runtime.seeding import derive_seed
from cu_runner.schema.settings import Sampler
from cu_runner.store.cache import Cache
from cu_runner.store.files import from_safetensors, to_safetensors

if TYPE_CHECKING:
    from torch import Tensor

ANCHOR_SEED = 0  # the images of a prompt list are the same for every run
ENCODED = ("latents", "mirrored")  # what is kept of every image


@dataclass(frozen=True)
class AnchorImages:
    """Images of prompts, made by the untouched model or taken from the cache.

    params: the weights in training, set to base while images are made. fingerprint: of the
    untouched model.
    """

    model: DiffusionModel
    fingerprint: str
    params: dict[str, nn.Parameter]
    base: dict[str, Tensor]
    sampler: Sampler
    cache: Cache
    batch_size: int

    def latents(self, prompts: list[str], number: int, *, mirrored: bool = False) -> Tensor:
        """Return latents [number, C, H, W] on the CPU.

        Image i is made from prompt i modulo the number of prompts. mirrored: of the images turned
        left to right.
        """
        captions = [prompts[i % len(prompts)] for i in range(number)]
        key = {
            "model": self.fingerprint,
            "prompts": captions,
            "sampler": sampler_key(self.model, self.sampler),
            "precision": self.model.precision,
            "device": self.model.device.type,
            "torch": torch.__version__,
            "encoded": list(ENCODED),
        }
        files = self.cache.fetch("anchors", key)
        if files is None:
            seeds = [derive_seed("anchor", ANCHOR_SEED, i) for i in range(number)]
            with placed(self.params, self.base):
                both = list(
                    generate(
                        self.model,
                        captions,
                        seeds,
                        self.sampler,
                        batch_size=self.batch_size,
                        label="anchor images",
                        transform=self._encode,
                    )
                )
            latents = {
                name: torch.cat(parts)
                for name, parts in zip(ENCODED, zip(*both, strict=True), strict=True)
            }
            files = {"latents.safetensors": to_safetensors(latents)}
            self.cache.put("anchors", key, files)
        return from_safetensors(files["latents.safetensors"])["mirrored" if mirrored else "latents"]

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if not images.isfinite().all():
            raise not_finite(self.model, "the anchor images")
        return self.model.encode_images(images), self.model.encode_images(images.flip(-1))


def sampler_key(model: DiffusionModel, sampler: Sampler) -> list[object]:
    """Return a sampler as part of a cache's key.

    It holds the scheduler as it is made, with what a checkpoint leaves unsaid.
    """
    scheduler = make_scheduler(model, sampler)
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return [sampler.steps, float(sampler.guidance), type(scheduler).__name__, config]
