"""How images are prepared for a network that reads them: as it was trained, unless settings say
otherwise.

Shapes: B batch, S image side.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cu_runner.runtime.lazy import F, nn, torch, transformers
from cu_runner.schema.errors import ModelError, one_line

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

Interpolation = Literal["bilinear", "bicubic"]
RESAMPLING: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}  # by Pillow's numbers


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop, normalise.

    size: the side that images get, in pixels. crop: the side of their middle that is read; None is
    all. mean, std: of each colour channel, for images in 0..1.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation
    crop: int | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Prepare images [B, 3, S, S] in 0..1."""
        if images.shape[-1] != self.size:
            side = (self.size, self.size)
            images = F.interpolate(images, size=side, mode=self.interpolation, antialias=True)
        if self.crop is not None:
            first = (self.size - self.crop) // 2
            images = images[..., first : first + self.crop, first : first + self.crop]
        mean, std = (
            torch.tensor(value, device=images.device).view(1, -1, 1, 1)
            for value in (self.mean, self.std)
        )
        return (images - mean) / std


def choose_preprocessing(
    key: str,
    path: str,
    network: nn.Module,
    *,
    size: int | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    interpolation: Interpolation | None,
) -> Preprocessing:
    """Return a network's own preprocessing, with what the settings give in its place.

    Args:
        key: the group of the settings (evaluator), for lines.
        path: a transformers directory, or the weight file of a timm network.

    Raises:
        ModelError: the directory does not say what the settings leave open.
    """
    if size and mean and std and interpolation:  # nothing is left open, whatever it says
        return Preprocessing(size, mean, std, interpolation)
    if isinstance(network, transformers.PreTrainedModel):
        own = read_processor(key, Path(path))
    else:
        own = read_timm(network)
    given = {"size": size, "mean": mean, "std": std, "interpolation": interpolation}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    chosen = replace(own, **changes, crop=None if size else own.crop)
    said = " ".join(f"{name}={value}" for name, value in asdict(chosen).items() if value)
    logger.info("%s: %s reads images with %s", key, path, said)
    return chosen


def read_timm(network: nn.Module) -> Preprocessing:
    """Return how a timm architecture is evaluated: its middle is cut out of a larger image."""
    config: Any = network.pretrained_cfg
    side = config["input_size"][-1]
    return Preprocessing(
        math.floor(side / config["crop_pct"]),
        tuple(config["mean"]),
        tuple(config["std"]),
        "bicubic" if config["interpolation"] == "bicubic" else "bilinear",
        None if config["crop_pct"] == 1 else side,
    )


def read_processor(key: str, directory: Path) -> Preprocessing:
    """Read the image processor of a transformers directory.

    Raises:
        ModelError: there is none, or it does something else than resize, crop and normalise.
    """
    advice = f"set {key}.size, {key}.mean, {key}.std and {key}.interpolation"
    file = directory / "preprocessor_config.json"
    if not file.is_file():
        raise ModelError(f"{directory}: holds no preprocessor_config.json; {advice}")
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(
            directory, local_files_only=True
        )
        config = processor.to_dict()
        size = side_of(config["size"])
        crop = side_of(config["crop_size"]) if config.get("do_center_crop") else None
        # ConvNeXt: what is smaller than 384 pixels is cut out of a larger image
        if config.get("crop_pct") and size < 384:
            size, crop = int(size / config["crop_pct"]), size
        if not config["do_rescale"] or abs(255 * config["rescale_factor"] - 1) > 1e-6:
            raise ValueError("rescale_factor is not 1/255")
        if config.get("rescale_offset") or not config["do_resize"]:
            raise ValueError("it does not resize, or shifts what it reads")
        if crop is not None and crop > size:
            raise ValueError(f"crop_size={crop} is larger than size={size}")
        normalised = config["do_normalize"]
        own = Preprocessing(
            size,
            tuple(config["image_mean"]) if normalised else (0.0, 0.0, 0.0),
            tuple(config["image_std"]) if normalised else (1.0, 1.0, 1.0),
            RESAMPLING[int(config["resample"])],
            crop,
        )
        # some classes do more: turn colours around, normalise twice
        image = torch.rand(3, 2 * size, 2 * size, generator=torch.Generator().manual_seed(0))
        found = processor(images=[image], do_rescale=False, return_tensors="pt").pixel_values
        ours = own(image[None])
        if found.shape != ours.shape or not torch.allclose(found, ours, atol=1e-3):
            raise ValueError(f"{type(processor).__name__} makes something else of an image")
        return own
    # of processors there are many classes, with keys of their own
    except Exception as error:
        reason = one_line(error)[:150]
        raise ModelError(
            f"{file}: cannot be followed ({type(error).__name__}: {reason}); {advice}"
        ) from error


def side_of(size: int | dict[str, int]) -> int:
    """Return the side of a square, as an image processor writes it. Raises ValueError."""
    sides = {size} if isinstance(size, int) else {side for side in size.values() if side}
    if len(sides) != 1:
        raise ValueError(f"{size} is no square")
    return sides.pop()
