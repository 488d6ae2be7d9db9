"""A folder of people's own pictures, read as they look.

Shapes: B batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from cu_runner.runtime.lazy import torch
from cu_runner.schema.errors import one_line

if TYPE_CHECKING:
    from torch import Tensor

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
# Pictures in formats that are not read, some of them not by Pillow either.
OTHERS = frozenset(
    [
        ".arw",
        ".avif",
        ".bmp",
        ".cr2",
        ".dng",
        ".gif",
        ".heic",
        ".heif",
        ".jfif",
        ".jp2",
        ".jxl",
        ".nef",
        ".pgm",
        ".ppm",
        ".svg",
        ".tga",
        ".tif",
        ".tiff",
    ]
)
SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L")  # modes of Pillow that a PNG of 16 bits has


def find_pictures(folder: str, key: str = "retention.reference") -> list[Path]:
    """Find the image files in a folder and below, by name.

    Args:
        key: the setting that names the folder, for the error's text.

    Raises:
        ValueError: there are none, or some in a format that is not read.
    """
    files = sorted(path for path in Path(folder).expanduser().rglob("*") if path.is_file())
    found = [path for path in files if path.suffix.lower() in PICTURES]
    if not found:
        raise ValueError(f"{key}={folder}: no such folder, or no {', '.join(PICTURES)} file in it")
    if left := [path for path in files if path.suffix.lower() in OTHERS]:
        raise ValueError(
            f"{key}={folder}: {left[0]} and {len(left) - 1} more are pictures in a "
            f"format that is not read; convert them to one of {', '.join(PICTURES)}, or remove them"
        )
    return found


def read_pictures(
    paths: list[Path], side: int, batch_size: int, key: str = "retention.reference"
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
            try:
                with Image.open(path) as picture:
                    seen = as_seen(picture)
                    square = ImageOps.fit(seen, (side, side), Image.Resampling.BICUBIC)
            except Exception as error:  # what is damaged or too large raises many types
                raise ValueError(
                    f"{path}: cannot be read as an image ({one_line(error)[:200]}); "
                    f"remove it from {key}"
                ) from None
            rows.append(pil_to_tensor(square) / 255)
        yield torch.stack(rows)


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
