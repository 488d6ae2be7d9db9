"""What a model keeps on general prompts, after every request: CLIP score, FID, KID.

CLIP score: 100 x cosine of image and prompt, a mean over images (Hessel et al. 2021, arXiv 2104.08718, without its weight 2.5 and
its clip at zero). FID: Heusel et al. 2017, arXiv 1706.08500. KID: Binkowski et al. 2018, arXiv 1801.01401; both by torchmetrics.
FID falls with the number of images: compare only runs with as many.

Shapes: N images, B batch, S image side, D feature width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import NonNegativeInt, PositiveInt

from cu_runner.concepts.entries import read_entries
from cu_runner.concepts.prompt_csv import read_prompts
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.image_text import ImageTextSource, load_image_text
from cu_runner.models.sampling import generate
from cu_runner.request.anchors import sampler_key
from cu_runner.request.images import spread
from cu_runner.retention.base import Retention
from cu_runner.retention.features import FeatureExtractor, FeatureSource
from cu_runner.runtime.lazy import torch
from cu_runner.schema.settings import EvalSettings
from cu_runner.store.cache import Cache
from cu_runner.store.files import from_safetensors, sha256_of, to_safetensors

if TYPE_CHECKING:
    from torch import Tensor

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


ARRAYS = "arrays.safetensors"


class GeneralRetention(Retention):
    """Measures one set of images per step, with the same noise for the same prompt at every step."""

    def __init__(
        self,
        prompts: str | list[str],
        seeds: list[NonNegativeInt],
        *,
        num_prompts: PositiveInt = 1000,
        clip_score: ImageTextSource | None = None,
        features: FeatureSource | None = None,
        reference: str | None = None,
        kid_subset: PositiveInt = 100,
        device: str = "cpu",
    ) -> None:
        """
        Args:
            prompts: themselves, a shipped list (cu_runner/concepts/lists), a text file with one a line, or a CSV file with a column prompt
                and, for images of its own, a column seed.
            seeds: evaluation noise; one image per prompt and seed. Not used if the CSV file has seeds.
            num_prompts: at most so many, evenly spread over all.
            clip_score: the image-text model of the CLIP score; None: not measured.
            features: what FID and KID compare; None: neither is measured.
            reference: a folder of images, each cropped to its middle square; None: the untouched model's own images.
            kid_subset: images in each random subset of KID.

        Raises:
            ValueError: prompts or a folder that cannot be read, nothing to measure, or fewer than two images for FID.
        """
        if clip_score is None and features is None:
            raise ValueError(
                "retention: neither clip_score nor features is set, so nothing is measured; use retention=none"
            )
        self._images = read_images(prompts, seeds, num_prompts)
        self._pictures = None if reference is None else find_pictures(reference)
        if features and min(len(self._images), len(self._pictures or self._images)) < 2:
            raise ValueError("retention: FID and KID need at least two images on each side")
        self._clip_score, self._features, self._kid_subset, self._device = (
            clip_score,
            features,
            kid_subset,
            device,
        )

    @property
    def num_images(self) -> int:
        return len(self._images)

    def load(self) -> None:
        self._scorer = load_image_text(self._clip_score, self._device) if self._clip_score else None
        self._texts = (
            self._scorer.embed_texts([prompt for prompt, _ in self._images])
            if self._scorer
            else None
        )
        self._extractor = FeatureExtractor(self._features, self._device) if self._features else None
        self._fingerprint = self._hash_judges()  # once: it reads every weight

    def begin(
        self, model: DiffusionModel, model_sha256: str, settings: EvalSettings, cache: Cache
    ) -> None:
        self.load()
        self._model, self._settings = model, settings
        common = {
            "judges": self._fingerprint,
            "torch": torch.__version__,
            "device": model.device.type,
        }
        drawn = {"model": model_sha256, "precision": model.precision, "images": self._images}
        drawn["sampler"] = sampler_key(model, settings)
        self._base = fetch(cache, common | drawn, self._measure_images)
        self._reference = self._base.get("features")
        if self._extractor and self._pictures:
            side = model.latent_shape[-1] * 2 ** (len(model.vae.config.block_out_channels) - 1)
            named = {"pictures": [sha256_of(path) for path in self._pictures], "side": side}
            self._reference = fetch(cache, common | named, lambda: self._measure_pictures(side))[
                "features"
            ]

    def measure(self, step: int) -> dict[str, float | None]:
        """clip_score, fid and kid of the model as it is; fid and kid of the untouched model against itself are None."""
        arrays = self._measure_images() if step else self._base
        measured = {}
        if self._scorer:
            measured["clip_score"] = round(100 * arrays["cosines"].mean().item(), 3)
        if self._extractor:
            itself = not step and self._pictures is None
            from cu_runner.retention.distances import frechet_distance, kernel_distance

            measured["fid"] = (
                None if itself else round(frechet_distance(self._reference, arrays["features"]), 4)
            )
            measured["kid"] = (
                None
                if itself
                else round(
                    kernel_distance(self._reference, arrays["features"], self._kid_subset), 6
                )
            )
        return measured

    def fingerprint(self) -> str:
        return self._fingerprint

    def _hash_judges(self) -> str:
        judges = [judge.fingerprint() for judge in (self._scorer, self._extractor) if judge]
        return hashlib.sha256(
            repr((judges, bool(self._scorer), bool(self._extractor))).encode()
        ).hexdigest()

    def _measure_images(self) -> dict[str, Tensor]:
        """Of the model's images: cosines with their prompts [N], features [N, D]."""
        prompts, seeds = [prompt for prompt, _ in self._images], [seed for _, seed in self._images]
        cosines, features, done = [], [], 0
        batches = generate(
            self._model,
            prompts,
            seeds,
            self._settings,
            batch_size=self._settings.batch_size,
            label="retention",
        )
        for images in batches:
            if self._scorer:
                cosines.append(
                    (self._scorer.embed_images(images) * self._texts[done : done + len(images)])
                    .sum(1)
                    .cpu()
                )
            if self._extractor:
                features.append(self._extractor(images))
            done += len(images)
        arrays = {"cosines": cosines, "features": features}
        return {name: torch.cat(rows) for name, rows in arrays.items() if rows}

    def _measure_pictures(self, side: int) -> dict[str, Tensor]:
        batches = read_pictures(self._pictures, side, self._settings.batch_size)
        return {"features": torch.cat([self._extractor(images) for images in batches])}


def read_images(
    prompts: str | list[str], seeds: list[int], num_prompts: int
) -> list[tuple[str, int]]:
    """(prompt, seed) of every image. Raises ValueError for prompts that cannot be read, or none."""
    key = "retention.prompts"
    if isinstance(prompts, str) and prompts.endswith(".csv"):
        rows = spread(read_prompts(key, prompts, ("prompt",)), num_prompts)
        if "seed" in rows[0]:
            return [(row["prompt"], int(row["seed"])) for row in rows]
        entries = [row["prompt"] for row in rows]
    else:
        entries = spread(read_entries(key, prompts), num_prompts)
    if not entries or not seeds:
        raise ValueError(
            f"{'retention.seeds' if entries else key} is empty; it needs at least one entry"
        )
    return [(prompt, seed) for prompt in entries for seed in seeds]


def find_pictures(folder: str) -> list[Path]:
    """The image files in a folder and below, by name. Raises ValueError for none."""
    found = sorted(
        path for path in Path(folder).expanduser().rglob("*") if path.suffix.lower() in PICTURES
    )
    if not found:
        raise ValueError(
            f"retention.reference={folder}: no such folder, or no {', '.join(PICTURES)} file in it"
        )
    return found


def read_pictures(paths: list[Path], side: int, batch_size: int) -> Iterator[Tensor]:
    """Image files as batches [B, 3, side, side] in 0..1, cropped to their middle square. Raises ValueError for a damaged one."""
    from torchvision.transforms.functional import pil_to_tensor

    for start in range(0, len(paths), batch_size):
        rows = []
        for path in paths[start : start + batch_size]:
            try:
                with Image.open(path) as picture:
                    square = ImageOps.fit(
                        picture.convert("RGB"), (side, side), Image.Resampling.BICUBIC
                    )
            except (OSError, UnidentifiedImageError) as error:
                raise ValueError(
                    f"{path}: cannot be read as an image ({error}); remove it from retention.reference"
                ) from None
            rows.append(pil_to_tensor(square) / 255)
        yield torch.stack(rows)


def fetch(
    cache: Cache, key: dict[str, object], make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Arrays from the cache; made and kept there if they are not in it."""
    files = cache.fetch("retention", key)
    if files is None:
        files = {ARRAYS: to_safetensors(make())}
        cache.put("retention", key, files)
    return from_safetensors(files[ARRAYS])
