"""The 120 styles of ShapeCanvas: a shade of one of 12 palettes times one of 10 textures.

A palette is four colours, a texture a scalar pattern; a style's name is the two words, e.g. "ember
stripe". Styles of one palette family share their colours up to a small turn of hue, styles of one
texture share its word and pattern: related styles look related.

Shapes: B batch, S image side in pixels.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from cu_runner.runtime.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

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

# The ten shades of each palette, from the most negative turn of hue to the most positive; the first
# has the palette's own name.
SHADE_NAMES = """
ember cinder blaze lava flame torch magma furnace spark coal
frost ice snow glacier sleet hail polar winter arctic crystal
forest fern moss ivy pine jungle cedar clover bamboo grove
ocean sea lagoon tide reef marine river harbor atoll abyss
dusk twilight violet plum sunset lilac orchid mauve evening iris
candy bubblegum rose blossom petal sugar peony sherbet taffy flamingo
sand dune desert clay wheat camel straw cocoa walnut cork
ash smoke slate stone iron steel granite pewter fog lead
neon laser acid plasma cyber disco arcade glow voltage radium
gold honey amber sun lemon brass saffron mustard canary corn
cherry ruby crimson scarlet poppy tomato berry garnet wine lobster
mint jade pistachio sage apple aloe lime celery basil melon
"""
SHADES = {names.split()[0]: tuple(names.split()) for names in SHADE_NAMES.strip().splitlines()}
HUE_TURN = 0.035  # largest turn of hue of a shade, as a fraction of the colour circle


def _soft_square(phase: Tensor, sharpness: float = 3.0) -> Tensor:
    """Return a smoothed square wave of period 2 pi, in 0..1."""
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


# Each maps x, y [B, S, S], phase [B, 4, 1, 1] in 0..1 and frequency [B, 1, 1] (near 3 periods) to
# 0..1.
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

# Style name -> (palette, place of the shade 0..9, texture): the j-th shade of every palette wears
# the j-th texture.
STYLE_PARTS: dict[str, tuple[str, int, str]] = {
    f"{SHADES[palette][place]} {texture}": (palette, place, texture)
    for palette in PALETTES
    for place, texture in enumerate(TEXTURES)
}

STYLES = tuple(STYLE_PARTS)


def shade_colours(style: str) -> list[tuple[float, float, float]]:
    """Return the four colours of a style, RGB in 0..1: its palette, the hue turned by its shade."""
    palette, place, _ = STYLE_PARTS[style]
    turn = HUE_TURN * (2 * place / (len(TEXTURES) - 1) - 1)
    colours = []
    for colour in PALETTES[palette]:
        hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))
        colours.append(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value))
    return colours
