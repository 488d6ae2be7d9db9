"""The 32 objects of ShapeCanvas as signed distance functions.

Shapes: B batch, S image side in pixels. Each maps x, y [B, S, S], local coordinates of about -1..1
with y downwards, to the distance from its outline [B, S, S], negative inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from cu_runner.runtime.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def _circle(x: Tensor, y: Tensor, cx: float, cy: float, radius: float) -> Tensor:
    return torch.hypot(x - cx, y - cy) - radius


def _rectangle(
    x: Tensor, y: Tensor, cx: float, cy: float, half_width: float, half_height: float
) -> Tensor:
    dx, dy = (x - cx).abs() - half_width, (y - cy).abs() - half_height
    return torch.hypot(dx.clamp_min(0), dy.clamp_min(0)) + torch.maximum(dx, dy).clamp_max(0)


def _polygon(x: Tensor, y: Tensor, vertices: list[tuple[float, float]]) -> Tensor:
    """Return the exact signed distance to a simple polygon.

    It is the distance to the nearest edge, with its sign by the crossing rule.
    """
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


def _gear(x: Tensor, y: Tensor) -> Tensor:
    teeth = [
        _polygon(
            x,
            y,
            [
                (c * 0.5 - s * 0.14, s * 0.5 + c * 0.14),
                (c - s * 0.1, s + c * 0.1),
                (c + s * 0.1, s - c * 0.1),
                (c * 0.5 + s * 0.14, s * 0.5 - c * 0.14),
            ],
        )
        for c, s in ((math.cos(math.pi * i / 4), math.sin(math.pi * i / 4)) for i in range(8))
    ]
    return _without(_union(_circle(x, y, 0, 0, 0.72), *teeth), _circle(x, y, 0, 0, 0.3))


def _umbrella(x: Tensor, y: Tensor) -> Tensor:
    canopy = torch.maximum(_circle(x, y, 0, 0.05, 0.92), y - 0.05)
    for centre in (-0.61, 0.0, 0.61):
        canopy = _without(canopy, _circle(x, y, centre, 0.14, 0.27))
    hook = torch.maximum(
        _without(_circle(x, y, 0.2, 0.68, 0.28), _circle(x, y, 0.2, 0.68, 0.12)), 0.68 - y
    )
    return _union(canopy, _rectangle(x, y, 0, 0.25, 0.08, 0.45), hook)


BOLT = [(0.15, -1.0), (-0.6, 0.18), (-0.08, 0.18), (-0.25, 1.0)]
BOLT += [(0.6, -0.28), (0.06, -0.28), (0.55, -1.0)]
CROWN = [(-0.9, -0.6), (-0.42, 0.02), (0, -0.75), (0.42, 0.02), (0.9, -0.6)]
CROWN += [(0.75, 0.7), (-0.75, 0.7)]

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
    "bolt": lambda x, y: _polygon(x, y, BOLT),
    "leaf": lambda x, y: _without(
        _without(_circle(x, y, -0.62, 0, 1.12), -_circle(x, y, 0.62, 0, 1.12)),
        _rectangle(x, y, 0, 0.35, 0.05, 0.6),
    ),
    "boat": lambda x, y: _union(
        _polygon(x, y, [(-0.95, 0.35), (0.95, 0.35), (0.6, 0.85), (-0.6, 0.85)]),
        _polygon(x, y, [(0.02, -0.95), (0.02, 0.2), (-0.7, 0.2)]),
        _polygon(x, y, [(0.14, -0.7), (0.7, 0.2), (0.14, 0.2)]),
    ),
    "crown": lambda x, y: _polygon(x, y, CROWN),
    "mushroom": lambda x, y: _union(
        torch.maximum(_circle(x, y, 0, 0.05, 0.9), y - 0.05), _rectangle(x, y, 0, 0.45, 0.24, 0.42)
    ),
    "bell": lambda x, y: _union(
        torch.maximum(_circle(x, y, 0, -0.3, 0.58), y + 0.2),
        _polygon(x, y, [(-0.58, -0.3), (0.58, -0.3), (0.86, 0.55), (-0.86, 0.55)]),
        _circle(x, y, 0, 0.66, 0.24),
    ),
    "kite": lambda x, y: _union(
        _polygon(x, y, [(0, -0.98), (0.6, -0.3), (0, 0.45), (-0.6, -0.3)]),
        _polygon(x, y, [(0, 0.4), (0.3, 0.95), (-0.3, 0.95)]),
    ),
    "ladder": lambda x, y: _union(
        _rectangle(x, y, -0.45, 0, 0.11, 0.95),
        _rectangle(x, y, 0.45, 0, 0.11, 0.95),
        *[_rectangle(x, y, 0, height, 0.45, 0.1) for height in (-0.66, -0.22, 0.22, 0.66)],
    ),
    "hourglass": lambda x, y: _union(
        _polygon(x, y, [(-0.62, -0.8), (0.62, -0.8), (0.06, 0), (-0.06, 0)]),
        _polygon(x, y, [(-0.06, 0), (0.06, 0), (0.62, 0.8), (-0.62, 0.8)]),
        _rectangle(x, y, 0, -0.84, 0.74, 0.12),
        _rectangle(x, y, 0, 0.84, 0.74, 0.12),
    ),
    "umbrella": _umbrella,
    "bottle": lambda x, y: _union(
        _rectangle(x, y, 0, 0.35, 0.42, 0.6),
        _polygon(x, y, [(-0.42, -0.25), (-0.15, -0.55), (0.15, -0.55), (0.42, -0.25)]),
        _rectangle(x, y, 0, -0.72, 0.15, 0.25),
    ),
    "rocket": lambda x, y: _union(
        _rectangle(x, y, 0, 0.1, 0.3, 0.55),
        _polygon(x, y, [(0, -1.0), (0.3, -0.45), (-0.3, -0.45)]),
        _polygon(x, y, [(-0.3, 0.1), (-0.72, 0.85), (-0.3, 0.65)]),
        _polygon(x, y, [(0.3, 0.1), (0.72, 0.85), (0.3, 0.65)]),
    ),
    "flag": lambda x, y: _union(
        _rectangle(x, y, -0.6, 0, 0.1, 0.97),
        _polygon(x, y, [(-0.5, -0.95), (0.85, -0.9), (0.45, -0.5), (0.85, -0.05), (-0.5, -0.1)]),
    ),
    "cactus": lambda x, y: _union(
        _rectangle(x, y, 0, 0, 0.2, 0.95),
        _rectangle(x, y, -0.4, 0.15, 0.3, 0.13),
        _rectangle(x, y, -0.6, -0.1, 0.13, 0.38),
        _rectangle(x, y, 0.4, -0.1, 0.3, 0.13),
        _rectangle(x, y, 0.6, -0.4, 0.13, 0.42),
    ),
    "cloud": lambda x, y: _union(
        _circle(x, y, -0.48, 0.12, 0.4),
        _circle(x, y, 0.0, -0.2, 0.5),
        _circle(x, y, 0.5, 0.1, 0.42),
        _rectangle(x, y, 0, 0.3, 0.5, 0.22),
    ),
    "gear": _gear,
    "lamp": lambda x, y: _union(
        _polygon(x, y, [(-0.35, -0.9), (0.35, -0.9), (0.75, -0.05), (-0.75, -0.05)]),
        _rectangle(x, y, 0, 0.35, 0.09, 0.5),
        _rectangle(x, y, 0, 0.84, 0.5, 0.12),
    ),
}

OBJECTS = tuple(SHAPES)
