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
UNTOUCHED = "untouched model"  # label of its pictures, below those of a request's weights

Pictures = dict[tuple[str, str], Image.Image]  # by concept and cross concept


def to_picture(image: Tensor, largest: int = 128) -> Image.Image:
    """Return an image [3, S, S] in 0..1 as a picture of at most `largest` pixels a side."""
    picture = Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())
    picture.thumbnail((largest, largest))
    return picture


def draw_grid(
    thumbnails: Pictures, unlearned: list[str], title: str, before: Pictures | None = None
) -> bytes:
    """Draw a PNG of thumbnails: rows are concepts, columns cross concepts.

    The rows of unlearned concepts have a red bar and label. before: pictures of the untouched model
    from the same prompts and seeds; each row then has one of them below it, white where there are
    none.
    """
    rows = list(dict.fromkeys(row for row, _ in thumbnails))
    columns = list(dict.fromkeys(column for _, column in thumbnails))
    side = next(iter(thumbnails.values())).width
    cell, lines = side + GRID_GAP, len(rows) * (1 if before is None else 2)
    font, left, top = ImageFont.load_default(size=12), GRID_LEFT, GRID_TOP
    canvas = Image.new("RGB", (left + len(columns) * cell, top + lines * cell), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((6, 5), title, fill="black", font=font)
    for x, column in enumerate(columns):
        place = (left + x * cell + side / 2, top - 5)
        pen.text(place, column, fill="black", font=font, anchor="ms")

    def draw_row(line: int, concept: str, pictures: Pictures, label: str, colour: str) -> None:
        height = top + line * cell
        place = (left - 12, height + side / 2)
        pen.text(place, label, fill=colour, font=font, anchor="rm")
        for x, column in enumerate(columns):
            if (concept, column) in pictures:
                canvas.paste(pictures[concept, column], (left + x * cell, height))

    for y, row in enumerate(rows):
        line, gone = (y if before is None else 2 * y), row in unlearned
        draw_row(line, row, thumbnails, row, "#c00000" if gone else "black")
        if gone:
            height = top + line * cell
            pen.rectangle((left - 7, height, left - 3, height + side - 1), fill="#c00000")
        if before is not None:
            draw_row(line + 1, row, before, UNTOUCHED, "#707070")
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()


def read_grid(png: bytes, rows: list[str], columns: list[str]) -> Pictures:
    """Cut a grid that draw_grid made into its thumbnails, without those of the untouched model.

    Args:
        rows: its concepts from the top.
        columns: its cross concepts from the left.
    """
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    cell = (picture.width - GRID_LEFT) // len(columns)
    apart = (picture.height - GRID_TOP) // len(rows)  # one line of pictures for each row, or two
    corners = {
        (row, column): (GRID_LEFT + x * cell, GRID_TOP + y * apart)
        for y, row in enumerate(rows)
        for x, column in enumerate(columns)
    }
    side = cell - GRID_GAP
    return {
        place: picture.crop((left, top, left + side, top + side))
        for place, (left, top) in corners.items()
    }
