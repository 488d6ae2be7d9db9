"""The ShapeCanvas renderer: objects in styles, drawn from signed distance functions on the fly.

The background alternates between the first two colours of the style's palette, the object between
the last two, both along the texture; an outline of the style's own colour separates them.

Shapes: B batch, S image side in pixels. Coordinates run over [-1, 1] from the top left corner, y
downwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cu_runner.runtime.lazy import torch
from cu_runner.shapecanvas.objects import SHAPES
from cu_runner.shapecanvas.styles import STYLE_PARTS, TEXTURES, style_colours

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_SIZE = 64
OUTLINE_WIDTH = 2.2  # pixels


def render(objects: list[str], styles: list[str], generator: torch.Generator) -> Tensor:
    """Draw one image per (object, style) pair.

    Position, scale, rotation, texture phase and brightness are random.

    Args:
        objects: B names out of objects.OBJECTS.
        styles: B names out of styles.STYLES.
        generator: CPU generator; the same state gives the same images.

    Returns:
        [B, 3, S, S] float32 in 0..1.
    """
    count, size = len(objects), IMAGE_SIZE
    uniform = torch.rand(count, 12, 1, 1, generator=generator)

    def between(column: int, low: float, high: float) -> Tensor:
        return low + (high - low) * uniform[:, column]

    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = (grid.expand(count, size, size) for grid in torch.meshgrid(axis, axis, indexing="ij"))
    scale, angle = between(0, 0.56, 0.74), between(1, -0.28, 0.28)
    dx, dy = x - between(2, -0.18, 0.18), y - between(3, -0.18, 0.18)
    local_x = (dx * angle.cos() + dy * angle.sin()) / scale
    local_y = (dy * angle.cos() - dx * angle.sin()) / scale

    distance = torch.empty(count, size, size)
    for name in set(objects):
        rows = torch.tensor([i for i, other in enumerate(objects) if other == name])
        distance[rows] = SHAPES[name](local_x[rows], local_y[rows]) * scale[rows]

    pattern = torch.empty(count, size, size)
    fineness = torch.tensor([STYLE_PARTS[style].fineness for style in styles])[:, None, None]
    phase, frequency = uniform[:, 4:8], between(8, 2.8, 3.2) * fineness
    texture_names = [STYLE_PARTS[style].texture for style in styles]
    for name in set(texture_names):
        rows = torch.tensor([i for i, other in enumerate(texture_names) if other == name])
        pattern[rows] = TEXTURES[name](x[rows], y[rows], phase[rows], frequency[rows])

    colours = torch.tensor([style_colours(style) for style in styles])  # [B, 5, 3]
    colours = colours[..., None, None]
    background = torch.lerp(colours[:, 0], colours[:, 1], pattern[:, None])
    foreground = torch.lerp(colours[:, 2], colours[:, 3], pattern[:, None])
    pixel = 2 / size
    coverage = (0.5 - distance / pixel).clamp(0, 1)[:, None]  # anti-aliased edge, one pixel wide
    edge = (OUTLINE_WIDTH / 2 + 0.5 - distance.abs() / pixel).clamp(0, 1)
    outlined = torch.tensor([STYLE_PARTS[style].outline != "none" for style in styles])
    image = torch.lerp(background, foreground, coverage)
    image = torch.lerp(
        image, colours[:, 4].expand_as(image), (edge * outlined[:, None, None])[:, None]
    )
    return (image * between(9, 0.88, 1.08)[:, None]).clamp(0, 1)
