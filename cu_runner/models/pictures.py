"""People's own pictures, read as they look.

Shapes: B batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from cu_runner.runtime.lazy import torch
from cu_runner.schema.errors import one_line

if TYPE_CHECKING:
    from torch import Tensor

SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L")  # modes of Pillow that a PNG of 16 bits has


def read_pictures(
    paths: Sequence[Path], side: int, batch_size: int, key: str = "retention.reference"
) -> Iterator[Tensor]:
    """Yield image files as batches [B, 3, side, side] in 0..1, cropped to their middle square.

    Args:
        key: the setting that names their folder, for the error's text.

    Raises:
        ValueError: a file is damaged, or no single picture.
    """
    from torchvision.transforms.functional import pil_to_tensor

    for start in range(0, len(paths), batch_size):
        rows = []
        for path in paths[start : start + batch_size]:
            seen = read_picture(path, key)
            square = ImageOps.fit(seen, (side, side), Image.Resampling.BICUBIC)
            rows.append(pil_to_tensor(square) / 255)
        yield torch.stack(rows)


def read_picture(path: Path, key: str) -> Image.Image:
    """Read a picture whole, in RGB as a viewer shows it.

    Args:
        key: the setting that names its folder.

    Raises:
        ValueError: it is damaged, or no single picture.
    """
    try:
        with Image.open(path) as picture:
            return as_seen(picture)
    except Exception as error:  # what is damaged or too large raises many types
        raise ValueError(
            f"{path}: cannot be read as an image ({one_line(error)[:200]}); remove it from {key}"
        ) from None


def as_seen(picture: Image.Image) -> Image.Image:
    """Return a picture in RGB as a viewer shows it: turned as its EXIF says, on white.

    Raises:
        ValueError: it has several frames, or numbers of no known range.
    """
    # the others of a phone's MPO are the same picture in small, or its depth
    if picture.format != "MPO" and (frames := getattr(picture, "n_frames", 1)) > 1:
        raise ValueError(f"it has {frames} frames")
    turned = ImageOps.exif_transpose(picture)
    if turned.mode == "F":
        raise ValueError("its numbers are fractions, of no known range")
    if turned.mode in SIXTEEN_BITS:  # Pillow would clip them to 255
        turned = turned.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if turned.has_transparency_data:
        colours = turned.convert("RGBA")
        turned = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours)
    return turned.convert("RGB")
