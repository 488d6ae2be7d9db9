"""The ShapeCanvas renderer: 20 objects in 120 styles, drawn from signed distance functions on the fly.

A style is a shade of one of 12 palettes (four colours) times one of 10 textures (a scalar pattern); its name is the two
words, e.g. "ember stripe". Styles of one palette family share their colours up to a small turn of hue, styles of one
texture share its word and pattern: related styles look related. The background alternates between the first two colours
of the palette, the object between the last two, both along the texture.

Shapes: B batch, S image side in pixels. Coordinates run over [-1, 1] from the top left corner, y downwards.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from cu_runner.runtime.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_SIZE = 64


# Background, background accent, object, object accent; sRGB 0..255.
PALETTES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "ember": ((58, 14, 12), (118, 34, 20), (246, 120, 26), (255, 196, 70)),
    "frost": ((222, 238, 252), (168, 202, 238), (58, 112, 196), (122, 172, 232)),
    "forest": ((16, 46, 26), (40, 88, 46), (128, 188, 62), (206, 224, 118)),
    "ocean": ((8, 26, 84), (22, 66, 142), (34, 184, 204), (150, 238, 228)),
    "dusk": ((58, 28, 92), (106, 52, 138), (246, 142, 132), (255, 206, 166)),
    "candy": ((255, 206, 224), (250, 152, 192), (60, 190, 164), (24, 138, 130)),
    "sand": ((238, 218, 174), (212, 180, 124), (132, 82, 42), (176, 124, 74)),
    "ash": ((204, 204, 204), (158, 158, 158), (38, 38, 38), (92, 92, 92)),
    "neon": ((8, 8, 14), (62, 8, 84), (70, 255, 60), (244, 255, 90)),
    "gold": ((252, 218, 58), (232, 172, 22), (44, 34, 104), (92, 76, 162)),
    "cherry": ((206, 18, 44), (148, 6, 32), (255, 240, 236), (255, 176, 184)),
    "mint": ((186, 242, 210), (122, 212, 166), (150, 40, 120), (202, 96, 170)),
}


# The names of the ten shades of each palette, from the most negative turn of hue to the most positive.
SHADES: dict[str, tuple[str, ...]] = {
    "ember": (
        "ember",
        "cinder",
        "blaze",
        "lava",
        "flame",
        "torch",
        "magma",
        "furnace",
        "spark",
        "coal",
    ),
    "frost": (
        "frost",
        "ice",
        "snow",
        "glacier",
        "sleet",
        "hail",
        "polar",
        "winter",
        "arctic",
        "crystal",
    ),
    "forest": (
        "forest",
        "fern",
        "moss",
        "ivy",
        "pine",
        "jungle",
        "cedar",
        "clover",
        "bamboo",
        "grove",
    ),
    "ocean": (
        "ocean",
        "sea",
        "lagoon",
        "tide",
        "reef",
        "marine",
        "river",
        "harbor",
        "atoll",
        "abyss",
    ),
    "dusk": (
        "dusk",
        "twilight",
        "violet",
        "plum",
        "sunset",
        "lilac",
        "orchid",
        "mauve",
        "evening",
        "iris",
    ),
    "candy": (
        "candy",
        "bubblegum",
        "rose",
        "blossom",
        "petal",
        "sugar",
        "peony",
        "sherbet",
        "taffy",
        "flamingo",
    ),
    "sand": (
        "sand",
        "dune",
        "desert",
        "clay",
        "wheat",
        "camel",
        "straw",
        "cocoa",
        "walnut",
        "cork",
    ),
    "ash": ("ash", "smoke", "slate", "stone", "iron", "steel", "granite", "pewter", "fog", "lead"),
    "neon": (
        "neon",
        "laser",
        "acid",
        "plasma",
        "cyber",
        "disco",
        "arcade",
        "glow",
        "voltage",
        "radium",
    ),
    "gold": (
        "gold",
        "honey",
        "amber",
        "sun",
        "lemon",
        "brass",
        "saffron",
        "mustard",
        "canary",
        "corn",
    ),
    "cherry": (
        "cherry",
        "ruby",
        "crimson",
        "scarlet",
        "poppy",
        "tomato",
        "berry",
        "garnet",
        "wine",
        "lobster",
    ),
    "mint": (
        "mint",
        "jade",
        "pistachio",
        "sage",
        "apple",
        "aloe",
        "lime",
        "celery",
        "basil",
        "melon",
    ),
}


HUE_TURN = 0.035  # largest turn of hue of a shade, as a fraction of the colour circle


OBJECTS = (
    "ball",
    "box",
    "tent",
    "star",
    "heart",
    "moon",
    "hoop",
    "cross",
    "arrow",
    "tree",
    "house",
    "fish",
    "flower",
    "key",
    "cup",
    "bolt",
    "leaf",
    "boat",
    "crown",
    "mushroom",
)


def _circle(x: Tensor, y: Tensor, cx: float, cy: float, radius: float) -> Tensor:
    return torch.hypot(x - cx, y - cy) - radius


def _rectangle(
    x: Tensor, y: Tensor, cx: float, cy: float, half_width: float, half_height: float
) -> Tensor:
    dx, dy = (x - cx).abs() - half_width, (y - cy).abs() - half_height
    return torch.hypot(dx.clamp_min(0), dy.clamp_min(0)) + torch.maximum(dx, dy).clamp_max(0)


def _polygon(x: Tensor, y: Tensor, vertices: list[tuple[float, float]]) -> Tensor:
    """Exact signed distance to a simple polygon: distance to the nearest edge, sign by the crossing rule."""
    squared = torch.full_like(x, math.inf)
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(vertices, vertices[1:] + vertices[:1], strict=True):
        ex, ey = bx - ax, by - ay
        px, py = x - ax, y - ay
        along = ((px * ex + py * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        squared = torch.minimum(squared, (px - along * ex) ** 2 + (py - along * ey) ** 2)
        crosses = (ay <= y) != (by <= y)
        if ey != 0:
            inside ^= crosses & (px < py * ex / ey)
    return squared.sqrt() * torch.where(inside, -1.0, 1.0)


def _regular(count: int, outer: float, inner: float) -> list[tuple[float, float]]:
    radii = [outer if i % 2 == 0 else inner for i in range(2 * count)]
    return [
        (r * math.sin(math.pi * i / count), -r * math.cos(math.pi * i / count))
        for i, r in enumerate(radii)
    ]


def _union(*parts: Tensor) -> Tensor:
    return torch.stack(parts).amin(0)


def _without(shape: Tensor, hole: Tensor) -> Tensor:
    return torch.maximum(shape, -hole)


def _heart(x: Tensor, y: Tensor) -> Tensor:
    tip = _polygon(x, y, [(-0.84, -0.02), (0, -0.4), (0.84, -0.02), (0, 0.86)])
    return _union(_circle(x, y, -0.43, -0.3, 0.47), _circle(x, y, 0.43, -0.3, 0.47), tip)


def _flower(x: Tensor, y: Tensor) -> Tensor:
    angles = [2 * math.pi * i / 5 for i in range(5)]
    petals = [_circle(x, y, 0.55 * math.sin(a), -0.55 * math.cos(a), 0.33) for a in angles]
    return _without(_union(*petals, _circle(x, y, 0, 0, 0.42)), _circle(x, y, 0, 0, 0.2))


def _key(x: Tensor, y: Tensor) -> Tensor:
    bow = _without(_circle(x, y, -0.55, 0, 0.42), _circle(x, y, -0.55, 0, 0.18))
    teeth = _union(_rectangle(x, y, 0.5, 0.26, 0.1, 0.2), _rectangle(x, y, 0.82, 0.26, 0.1, 0.2))
    return _union(bow, _rectangle(x, y, 0.35, 0, 0.57, 0.12), teeth)


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ball": lambda x, y: _circle(x, y, 0, 0, 0.82),
    "box": lambda x, y: _rectangle(x, y, 0, 0, 0.72, 0.72),
    "tent": lambda x, y: _polygon(x, y, [(0, -0.8), (0.95, 0.7), (-0.95, 0.7)]),
    "star": lambda x, y: _polygon(x, y, _regular(5, 1.0, 0.42)),
    "heart": _heart,
    "moon": lambda x, y: _without(_circle(x, y, -0.05, 0, 0.88), _circle(x, y, 0.4, -0.12, 0.72)),
    "hoop": lambda x, y: _without(_circle(x, y, 0, 0, 0.88), _circle(x, y, 0, 0, 0.5)),
    "cross": lambda x, y: _union(
        _rectangle(x, y, 0, 0, 0.9, 0.27), _rectangle(x, y, 0, 0, 0.27, 0.9)
    ),
    "arrow": lambda x, y: _union(
        _rectangle(x, y, -0.4, 0, 0.55, 0.22),
        _polygon(x, y, [(0.05, -0.72), (0.95, 0), (0.05, 0.72)]),
    ),
    "tree": lambda x, y: _union(
        _polygon(x, y, [(0, -0.98), (0.5, -0.2), (-0.5, -0.2)]),
        _polygon(x, y, [(0, -0.5), (0.7, 0.5), (-0.7, 0.5)]),
        _rectangle(x, y, 0, 0.72, 0.15, 0.25),
    ),
    "house": lambda x, y: _without(
        _union(
            _rectangle(x, y, 0, 0.38, 0.62, 0.48),
            _polygon(x, y, [(0, -0.9), (0.9, -0.05), (-0.9, -0.05)]),
        ),
        _rectangle(x, y, 0, 0.6, 0.16, 0.3),
    ),
    "fish": lambda x, y: _union(
        _without(_circle(x, y, -0.25, -0.42, 0.84), -_circle(x, y, -0.25, 0.42, 0.84)),
        _polygon(x, y, [(0.3, 0), (0.98, -0.55), (0.98, 0.55)]),
    ),
    "flower": _flower,
    "key": _key,
    "cup": lambda x, y: _union(
        _polygon(x, y, [(-0.75, -0.6), (0.45, -0.6), (0.3, 0.75), (-0.6, 0.75)]),
        _without(_circle(x, y, 0.5, -0.05, 0.42), _circle(x, y, 0.5, -0.05, 0.22)),
    ),
    "bolt": lambda x, y: _polygon(
        x,
        y,
        [
            (0.15, -1.0),
            (-0.6, 0.18),
            (-0.08, 0.18),
            (-0.25, 1.0),
            (0.6, -0.28),
            (0.06, -0.28),
            (0.55, -1.0),
        ],
    ),
    "leaf": lambda x, y: _without(
        _without(_circle(x, y, -0.62, 0, 1.12), -_circle(x, y, 0.62, 0, 1.12)),
        _rectangle(x, y, 0, 0.35, 0.05, 0.6),
    ),
    "boat": lambda x, y: _union(
        _polygon(x, y, [(-0.95, 0.35), (0.95, 0.35), (0.6, 0.85), (-0.6, 0.85)]),
        _polygon(x, y, [(0.02, -0.95), (0.02, 0.2), (-0.7, 0.2)]),
        _polygon(x, y, [(0.14, -0.7), (0.7, 0.2), (0.14, 0.2)]),
    ),
    "crown": lambda x, y: _polygon(
        x,
        y,
        [
            (-0.9, -0.6),
            (-0.42, 0.02),
            (0, -0.75),
            (0.42, 0.02),
            (0.9, -0.6),
            (0.75, 0.7),
            (-0.75, 0.7),
        ],
    ),
    "mushroom": lambda x, y: _union(
        torch.maximum(_circle(x, y, 0, 0.05, 0.9), y - 0.05), _rectangle(x, y, 0, 0.45, 0.24, 0.42)
    ),
}


def _soft_square(phase: Tensor, sharpness: float = 3.0) -> Tensor:
    """A smoothed square wave of period 2 pi, in 0..1."""
    return torch.sigmoid(2 * sharpness * torch.sin(phase))


def _brick(x: Tensor, y: Tensor, phase: Tensor, frequency: Tensor) -> Tensor:
    row = torch.floor((y + phase[:, 1]) * frequency * 1.4)
    across = (x + phase[:, 0]) * frequency * 0.7 + 0.5 * (row % 2)
    down = (y + phase[:, 1]) * frequency * 1.4
    joint = torch.minimum((across - across.round()).abs() / 0.7, (down - down.round()).abs() / 1.4)
    return 1 - torch.sigmoid((joint * 2 / frequency - 0.075) * 90)


def _mist(x: Tensor, y: Tensor, phase: Tensor, frequency: Tensor) -> Tensor:
    turn = 2 * math.pi * phase
    waves = (
        torch.sin(3.1 * x + 1.7 * y + turn[:, 0])
        + torch.sin(-2.3 * x + 2.9 * y + turn[:, 1])
        + torch.sin(4.3 * x - 3.7 * y + turn[:, 2])
        + 0.7 * torch.sin(5.3 * x + 4.1 * y + turn[:, 3])
    )
    return torch.sigmoid(1.6 * waves)


# Each maps x, y [B, S, S], phase [B, 4, 1, 1] in 0..1 and frequency [B, 1, 1] (near 3 periods) to 0..1.
TEXTURES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "stripe": lambda x, y, p, f: _soft_square(math.pi * f * 1.3 * y + 2 * math.pi * p[:, 0]),
    "pillar": lambda x, y, p, f: _soft_square(math.pi * f * 1.3 * x + 2 * math.pi * p[:, 0]),
    "slash": lambda x, y, p, f: _soft_square(math.pi * f * 0.95 * (x + y) + 2 * math.pi * p[:, 0]),
    "dot": lambda x, y, p, f: torch.sigmoid(
        6 * (torch.cos(math.pi * f * (x + p[:, 0])) + torch.cos(math.pi * f * (y + p[:, 1])) - 0.7)
    ),
    "check": lambda x, y, p, f: torch.sigmoid(
        12
        * torch.sin(math.pi * f * 0.8 * (x + p[:, 0]))
        * torch.sin(math.pi * f * 0.8 * (y + p[:, 1]))
    ),
    "brick": _brick,
    "wave": lambda x, y, p, f: _soft_square(
        math.pi * f * 1.1 * (y + 0.16 * torch.sin(2 * math.pi * (x + p[:, 1])))
        + 2 * math.pi * p[:, 0]
    ),
    "ripple": lambda x, y, p, f: _soft_square(
        math.pi * f * 1.5 * torch.hypot(x + 0.3 * p[:, 1] - 0.15, y + 0.3 * p[:, 2] - 0.15)
        + 2 * math.pi * p[:, 0]
    ),
    "ray": lambda x, y, p, f: _soft_square(
        9 * torch.atan2(y + 0.2 * p[:, 1] - 0.1, x + 0.2 * p[:, 2] - 0.1) + 2 * math.pi * p[:, 0],
        2.0,
    ),
    "mist": _mist,
}


# style name -> (palette, place of the shade 0..9, texture): the j-th shade of every palette wears the j-th texture
STYLE_PARTS: dict[str, tuple[str, int, str]] = {
    f"{SHADES[palette][place]} {texture}": (palette, place, texture)
    for palette in PALETTES
    for place, texture in enumerate(TEXTURES)
}


STYLES = tuple(STYLE_PARTS)


def shade_colours(style: str) -> list[tuple[float, ...]]:
    """The four colours of a style, RGB in 0..1: its palette with the hue turned by its shade."""
    palette, place, _ = STYLE_PARTS[style]
    turn = HUE_TURN * (2 * place / (len(TEXTURES) - 1) - 1)
    colours = []
    for colour in PALETTES[palette]:
        hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))
        colours.append(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value))
    return colours


def render(objects: list[str], styles: list[str], generator: torch.Generator) -> Tensor:
    """Draw one image per (object, style) pair, with random position, scale, rotation, texture phase and brightness.

    Args:
        objects: B names out of OBJECTS.
        styles: B names out of STYLES.
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
    phase, frequency = uniform[:, 4:8], between(8, 2.8, 3.4)
    texture_names = [STYLE_PARTS[style][2] for style in styles]
    for name in set(texture_names):
        rows = torch.tensor([i for i, other in enumerate(texture_names) if other == name])
        pattern[rows] = TEXTURES[name](x[rows], y[rows], phase[rows], frequency[rows])

    colours = torch.tensor([shade_colours(style) for style in styles])  # [B, 4, 3]
    colours = colours[..., None, None]
    background = torch.lerp(colours[:, 0], colours[:, 1], pattern[:, None])
    foreground = torch.lerp(colours[:, 2], colours[:, 3], pattern[:, None])
    pixel = 2 / size
    coverage = (0.5 - distance / pixel).clamp(0, 1)[:, None]  # anti-aliased edge, one pixel wide
    return (torch.lerp(background, foreground, coverage) * between(9, 0.88, 1.08)[:, None]).clamp(
        0, 1
    )
