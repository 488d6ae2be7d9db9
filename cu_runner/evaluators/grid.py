"""The grid of sample images of a step, as grid.png: drawn, and read back."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from cu_runner.runtime.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

# Pixels of a grid: margin for the labels of rows and of columns, space between images.
GRID_LEFT, GRID_TOP, GRID_GAP = 132, 44, 2


def to_picture(image: Tensor, largest: int = 128) -> Image.Image:
    """Return an image [3, S, S] in 0..1 as a picture of at most `largest` pixels a side."""
    picture = Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())
    picture.thumbnail((largest, largest))
    return picture


def draw_grid(
    thumbnails: dict[tuple[str, str], Image.Image], unlearned: list[str], title: str
) -> bytes:
    """Draw a PNG of thumbnails: rows are concepts, columns cross concepts.

    The rows of unlearned concepts have a red bar and label.
    """
    rows = list(dict.fromkeys(row for row, _ in thumbnails))
    columns = list(dict.fromkeys(column for _, column in thumbnails))
    side = next(iter(thumbnails.values())).width
    font, gap, left, top = ImageFont.load_default(size=12), GRID_GAP, GRID_LEFT, GRID_TOP
    canvas = Image.new(
        "RGB", (left + len(columns) * (side + gap), top + len(rows) * (side + gap)), "white"
    )
    pen = ImageDraw.Draw(canvas)
    pen.text((6, 5), title, fill="black", font=font)
    for x, column in enumerate(columns):
        pen.text(
            (left + x * (side + gap) + side / 2, top - 5),
            column,
            fill="black",
            font=font,
            anchor="ms",
        )
    for y, row in enumerate(rows):
        height = top + y * (side + gap)
        gone = row in unlearned
        pen.text(
            (left - 12, height + side / 2),
            row,
            fill="#c00000" if gone else "black",
            font=font,
            anchor="rm",
        )
        if gone:
            pen.rectangle((left - 7, height, left - 3, height + side - 1), fill="#c00000")
        for x, column in enumerate(columns):
            if (row, column) in thumbnails:
                canvas.paste(thumbnails[row, column], (left + x * (side + gap), height))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()


def read_grid(
    png: bytes, rows: list[str], columns: list[str]
) -> dict[tuple[str, str], Image.Image]:
    """Cut a grid that draw_grid made into its thumbnails.

    Args:
        rows: its concepts from the top.
        columns: its cross concepts from the left.
    """
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    side = (picture.width - GRID_LEFT) // len(columns) - GRID_GAP
    cells = [(row, column, x, y) for y, row in enumerate(rows) for x, column in enumerate(columns)]
    corners = {
        (row, column): (GRID_LEFT + x * (side + GRID_GAP), GRID_TOP + y * (side + GRID_GAP))
        for row, column, x, y in cells
    }
    return {
        cell: picture.crop((left, top, left + side, top + side))
        for cell, (left, top) in corners.items()
    }
