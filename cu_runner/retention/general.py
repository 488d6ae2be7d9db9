"""What a model keeps on general prompts, after every request: CLIP score, FID, KID.

CLIP score: 100 x cosine of image and prompt, a mean over images (Hessel et al. 2021, arXiv
2104.08718, without its weight 2.5 and its clip at zero). FID: Heusel et al. 2017, arXiv 1706.08500.
KID: Binkowski et al. 2018, arXiv 1801.01401; both by torchmetrics. FID falls with the number of
images: compare only runs with as many.

Shapes: N images, B batch, S image side, D feature width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import NonNegativeInt, PositiveInt

from cu_runner.concepts.entries import read_entries, spread
from cu_runner.concepts.picture_folder import CAPTIONS, find_pictures, read_folder
from cu_runner.concepts.prompt_csv import read_prompts
from cu_runner.concepts.sequence_file import refuse_repeated
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.image_text import ImageTextSource, load_image_text
from cu_runner.models.pictures import read_pictures
from cu_runner.models.sampling import generate, not_finite
from cu_runner.request.anchors import sampler_key
from cu_runner.retention.base import Retention
from cu_runner.retention.features import FeatureExtractor, FeatureSource
from cu_runner.runtime.lazy import torch
from cu_runner.runtime.progress import Progress
from cu_runner.schema.errors import ModelError
from cu_runner.schema.settings import EvalSettings
from cu_runner.store.cache import ARRAYS, Cache
from cu_runner.store.files import from_safetensors, sha256_of, to_safetensors

if TYPE_CHECKING:
    from torch import Tensor


class PromptScorer:
    """Cosines of images with their prompts, in the space of an image-text model."""

    def __init__(self, source: ImageTextSource, prompts: list[str], device: str) -> None:
        """Load the model and embed the prompts. Raises ModelError or WeightFileError."""
        self.model = load_image_text(source, device)
        self._texts = self.model.embed_texts(prompts)

    def __call__(self, images: Tensor, first: int) -> Tensor:
        """Compare images [B, 3, S, S] in 0..1 with the prompts from number `first` on; [B]."""
        texts = self._texts[first : first + len(images)]
        return (self.model.embed_images(images) * texts).sum(1).cpu()


class GeneralRetention(Retention):
    """Measures one set of images per step, with the same noise for the same prompt each time."""

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
            prompts: themselves, a shipped list (cu_runner/concepts/lists), a text file with one a
                line, a CSV file with a column prompt and, for images of its own, a column seed, or
                a folder of pictures with captions (a path
                with a slash).
            seeds: evaluation noise; one image per prompt and seed. Not used if the CSV file has
                seeds.
            num_prompts: at most so many, evenly spread over all.
            clip_score: the image-text model of the CLIP score; None: not measured.
            features: what FID and KID compare; None: neither is measured.
            reference: a folder of images, each turned as its camera held it, on white where it is
                transparent, and cropped to its middle square; None: the untouched model's own
                images.
            kid_subset: images in each random subset of KID.

        Raises:
            ValueError: prompts or a folder that cannot be read, nothing to measure, or fewer than
                two images for FID.
        """
        if clip_score is None and features is None:
            raise ValueError(
                "retention: neither clip_score nor features is set, so nothing is measured; "
                "use retention=none"
            )
        self._images = read_images(prompts, seeds, num_prompts)
        self._pictures = None if reference is None else find_pictures(reference)
        if features and min(len(self._images), len(self._pictures or self._images)) < 2:
            raise ValueError("retention: FID and KID need at least two images on each side")
        self._prompts = [prompt for prompt, _ in self._images]
        self._clip_score, self._features = clip_score, features
        self._kid_subset, self._device = kid_subset, device

    @property
    def num_images(self) -> int:
        """Return the number of images that are made at every step."""
        return len(self._images)

    def load(self) -> None:
        """Load the image-text model and what computes features, as far as they are asked for."""
        source, features, device = self._clip_score, self._features, self._device
        self._scorer = PromptScorer(source, self._prompts, device) if source else None
        self._extractor = FeatureExtractor(features, device) if features else None
        self._networks = self._fingerprint = self._hash_networks()  # once: it reads every weight
        if self._pictures is not None:
            pictures = [sha256_of(path) for path in self._pictures]
            known = repr((self._networks, pictures)).encode()
            self._fingerprint = hashlib.sha256(known).hexdigest()

    def begin(
        self, model: DiffusionModel, model_sha256: str, settings: EvalSettings, cache: Cache
    ) -> None:
        """Load, and measure the untouched model and the reference's images."""
        self.load()
        self._model, self._settings = model, settings
        common: dict[str, object] = {
            "judges": self._networks,
            "torch": torch.__version__,
            "device": model.device.type,
        }
        drawn: dict[str, object] = {
            "model": model_sha256,
            "precision": model.precision,
            "images": self._images,
            "sampler": sampler_key(model, settings),
        }
        self._base = fetch(cache, common | drawn, self._measure_images)
        if (extractor := self._extractor) is None:
            return
        self._reference = self._base["features"]
        if (paths := self._pictures) is not None:
            side = model.resolution
            named = {"pictures": [sha256_of(path) for path in paths], "side": side}

            def measure_pictures() -> dict[str, Tensor]:
                found, batches = [], read_pictures(paths, side, settings.batch_size)
                with Progress("reference images", len(paths), "image") as bar:
                    for images in batches:
                        found.append(extractor(images))
                        bar.advance(len(images))
                return {"features": refuse_nan("features", torch.cat(found))}

            self._reference = fetch(cache, common | named, measure_pictures)["features"]

    def measure(self, step: int) -> dict[str, float | None]:
        """Measure clip_score, fid and kid of the model as it is.

        fid and kid of the untouched model against itself are None.
        """
        arrays = self._measure_images(step) if step else self._base
        measured: dict[str, float | None] = {}
        if self._scorer:
            measured["clip_score"] = round(100 * arrays["cosines"].mean().item(), 3)
        if self._extractor and (step or self._pictures is not None):
            from cu_runner.retention.distances import frechet_distance, kernel_distance

            reference, features = self._reference, arrays["features"]
            measured["fid"] = round(frechet_distance(reference, features), 4)
            measured["kid"] = round(kernel_distance(reference, features, self._kid_subset), 6)
        elif self._extractor:
            measured |= {"fid": None, "kid": None}
        return measured

    def fingerprint(self) -> str:
        """Return the sha256 over what measures, the reference's pictures among it."""
        return self._fingerprint

    def _hash_networks(self) -> str:
        networks = (self._scorer and self._scorer.model, self._extractor)
        hashes = [network.fingerprint() for network in networks if network]
        return hashlib.sha256(
            repr((hashes, bool(self._scorer), bool(self._extractor))).encode()
        ).hexdigest()

    def _measure_images(self, step: int = 0) -> dict[str, Tensor]:
        """Return the cosines of the images with their prompts [N], and their features [N, D]."""
        cosines, features, done = [], [], 0
        for images in generate(
            self._model,
            self._prompts,
            [seed for _, seed in self._images],
            self._settings,
            batch_size=self._settings.batch_size,
            label="retention",
        ):
            if not images.isfinite().all():
                raise not_finite(self._model, "the images of general prompts", step)
            if self._scorer:
                cosines.append(self._scorer(images, done))
            if self._extractor:
                features.append(self._extractor(images))
            done += len(images)
        arrays = {"cosines": cosines, "features": features}
        return {name: refuse_nan(name, torch.cat(rows)) for name, rows in arrays.items() if rows}


def refuse_nan(name: str, rows: Tensor) -> Tensor:
    """Return what a judge made of images. Raises ModelError where it is not finite."""
    if not rows.isfinite().all():
        key = {"cosines": "clip_score"}.get(name, name)
        raise ModelError(
            f"retention.{key}: its network answers NaN to a finite image; its weights or its mean "
            "and std are damaged: give another one"
        )
    return rows


def read_images(
    prompts: str | list[str], seeds: list[int], num_prompts: int
) -> list[tuple[str, int]]:
    """Read the (prompt, seed) of every image.

    Raises:
        ValueError: prompts that cannot be read, none, or one twice.
    """
    key = "retention.prompts"
    if isinstance(prompts, str) and prompts.endswith(".csv"):
        rows = read_prompts(key, prompts, ("prompt",), distinct=("prompt", "seed"))
        rows = spread(rows, num_prompts)
        if "seed" in rows[0]:
            return [(row["prompt"], int(row["seed"])) for row in rows]
        entries = [row["prompt"] for row in rows]
    elif isinstance(prompts, str) and "/" in prompts and Path(prompts).expanduser().is_dir():
        captions = list(dict.fromkeys(read_folder(key, prompts).captions))
        if not captions:
            raise ValueError(f"{key}={prompts}: has no {', '.join(CAPTIONS)}; add one of them")
        entries = spread(captions, num_prompts)
    else:
        entries = spread(read_entries(key, prompts), num_prompts)
    if not entries or not seeds:
        raise ValueError(
            f"{'retention.seeds' if entries else key} is empty; it needs at least one entry"
        )
    refuse_repeated(key, entries)  # an image would be there twice
    refuse_repeated("retention.seeds", seeds)
    return [(prompt, seed) for prompt in entries for seed in seeds]


def fetch(
    cache: Cache, key: dict[str, object], make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return arrays from the cache; they are made and kept there if they are not in it."""
    files = cache.fetch("retention", key)
    if files is None:
        files = {ARRAYS: to_safetensors(make())}
        cache.put("retention", key, files)
    return from_safetensors(files[ARRAYS])
