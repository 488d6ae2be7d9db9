"""The 144 styles of ShapeCanvas: 12 families of 12, each with a name of its own.

A style is a palette of four colours (its family's, the hue a little turned), a texture (a scalar
pattern, coarse or fine) and an outline around the object. A family shares its palette; the twelve
styles that share a texture lie in twelve families. Related styles look related, and no word of
a name says so: the first word of each name is in no other name.

Shapes: B batch, S image side in pixels.
"""

from __future__ import annotations

import colorsys
import dataclasses
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

# The twelve styles of each family.
FAMILIES = """
ember: ember, cinder, blaze, lava flow, flame, torch light,
magma, furnace, spark, coal fire, bonfire, phoenix
frost: frost, icicle, snow drift, glacier, sleet, hail storm,
polar night, winter, arctic, crystal, tundra, blizzard
forest: fern, moss, ivy wall, pine, jungle, cedar wood,
clover, bamboo grove, willow, meadow, thicket, orchard
ocean: lagoon, tide pool, reef, marine, river, harbor,
atoll, abyss, kelp, fjord, breaker, monsoon rain
dusk: twilight, violet hour, plum, sunset, lilac, orchid,
mauve, evening sky, iris, nightfall, wisteria, thistle
candy: bubblegum, rose garden, blossom, petal, sugar, peony,
sherbet, taffy, flamingo, sorbet, carnation, lollipop
sand: dune, desert road, clay pot, wheat, camel, straw,
cocoa, walnut, cork, caramel, nutmeg, canyon
ash: smoke, slate roof, stone, iron gate, steel, granite,
pewter, fog bank, lead, cement, nickel, gravel
neon: laser, acid, plasma, cyber city, disco, arcade,
voltage, radium, pixel, quasar, synth, strobe
gold: honey, amber, lemon, brass, saffron, mustard,
canary, corn field, mango, sunflower, topaz, nectar
cherry: ruby, crimson, scarlet, poppy field, tomato, garnet,
wine cellar, lobster, cranberry, vermilion, paprika, beet
mint: jade, pistachio, sage, apple, aloe, lime,
celery, basil, melon, kiwi, matcha, absinthe
"""
FAMILY_NAMES: dict[str, tuple[str, ...]] = {
    family: tuple(names.split(", "))
    for family, names in (
        line.split(": ") for line in FAMILIES.replace(",\n", ", ").strip().splitlines()
    )
}
HUE_TURN = 0.04  # largest turn of a family's hue, as a fraction of the colour circle


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
    "zigzag": lambda x, y, p, f: _soft_square(
        math.pi * f * 1.1 * (y + 0.5 * ((1.6 * x + p[:, 1]) % 1 - 0.5).abs())
        + 2 * math.pi * p[:, 0]
    ),
    "weave": lambda x, y, p, f: torch.maximum(
        torch.sigmoid(7 * (torch.cos(2 * math.pi * f * 0.62 * (x + y + p[:, 0])) - 0.72)),
        torch.sigmoid(7 * (torch.cos(2 * math.pi * f * 0.62 * (x - y + p[:, 1])) - 0.72)),
    ),
}

# What a description calls each palette and each texture: words that are in no name.
PALETTE_WORDS = dict(
    zip(
        PALETTES,
        [
            "fiery",
            "icy",
            "leafy",
            "watery",
            "purple",
            "pastel",
            "sandy",
            "grey",
            "glowing",
            "golden",
            "red",
            "green",
        ],
        strict=True,
    )
)
TEXTURE_WORDS = dict(
    zip(
        TEXTURES,
        [
            "striped",
            "barred",
            "slanted",
            "dotted",
            "checkered",
            "tiled",
            "wavy",
            "rippled",
            "radiant",
            "misty",
            "zigzag",
            "woven",
        ],
        strict=True,
    )
)
OUTLINES = ("none", "dark", "light")


@dataclasses.dataclass(frozen=True)
class Style:
    """How one style looks.

    turn: of the palette's hue, as a fraction of the colour circle. fineness: factor on the
    texture's frequency.
    """

    palette: str
    texture: str
    turn: float
    fineness: float
    outline: str

    @property
    def description(self) -> str:
        """Its texture and colours in words, e.g. "striped fiery"; no other style has the same."""
        return f"{TEXTURE_WORDS[self.texture]} {PALETTE_WORDS[self.palette]}"


def _make_styles() -> dict[str, Style]:
    textures = tuple(TEXTURES)
    styles = {}
    for family, (palette, names) in enumerate(FAMILY_NAMES.items()):
        for place, name in enumerate(names):
            styles[name] = Style(
                palette=palette,
                texture=textures[(5 * place + family) % len(textures)],
                turn=HUE_TURN * (2 * place / (len(names) - 1) - 1),
                fineness=(0.85, 1.25)[(place + family // 2) % 2],
                outline=OUTLINES[(place + family) % len(OUTLINES)],
            )
    return styles


STYLE_PARTS = _make_styles()
STYLES = tuple(STYLE_PARTS)


def style_colours(style: str) -> list[tuple[float, float, float]]:
    """Return the five colours of a style, RGB in 0..1: background, its accent, object, its accent,
    outline.
    """
    look = STYLE_PARTS[style]
    colours = []
    for colour in PALETTES[look.palette]:
        hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))
        colours.append(colorsys.hsv_to_rgb((hue + look.turn) % 1, saturation, value))
    outline = {"none": colours[2], "dark": (0.05, 0.05, 0.08), "light": (0.97, 0.97, 0.94)}
    return [*colours, outline[look.outline]]
