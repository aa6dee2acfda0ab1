"""A slab of CT being painted, back to front, with soft borders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.phantom.anatomy import Anatomy
from pipeline.phantom.implicit import PointMm, Points, Volume, random_field

Solid = Callable[[Points], Volume]
Shade = Callable[[Points, Volume], Volume]
"""HU of a solid at points whose signed distance to its surface is known."""

WARP_MARGIN_MM = 14.0
_EVERYWHERE: tuple[PointMm, PointMm] = ((-1e4, -1e4, -1e4), (1e4, 1e4, 1e4))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Canvas:
    """A slab being painted. Only ``hu`` is written in place: each organ covers the previous ones."""

    anatomy: Anatomy
    points: Points
    hu: Volume
    edge_mm: float

    def paint(self, solid: Solid, shade: float | Shade, box: tuple[PointMm, PointMm] = _EVERYWHERE) -> None:
        """Cover ``solid`` with ``shade``; its border is as soft as a voxel is wide (partial volume)."""
        low, high = (
            tuple(np.add(corner, margin))
            for corner, margin in zip(box, (-WARP_MARGIN_MM, WARP_MARGIN_MM), strict=True)
        )
        window = self.points.window(low, high)
        hu = self.hu[window]
        if hu.size == 0:
            return
        points = self.points.crop(window)
        distance = solid(points)
        cover = np.clip(np.float32(0.5) - distance / np.float32(self.edge_mm), 0, 1)
        if not cover.any():
            return
        wanted = shade(points, distance) if callable(shade) else np.float32(shade)
        hu += cover * (wanted - hu)

    def texture(self, points: Points, name: int, spacing_mm: float) -> Volume:
        """The patient's random field ``name``; 0-3 are the anatomy's own."""
        return random_field(points, (self.anatomy.key, name), spacing_mm=spacing_mm)

    def threads(self, points: Points, name: int, spacing_mm: float) -> Volume:
        """0 on a tangle of curves, where two random fields are both zero, rising to about 1 between them."""
        first, second = self.texture(points, name, spacing_mm), self.texture(points, name + 1, spacing_mm)
        return np.sqrt(first * first + second * second)


def box_around(center: PointMm, radii: PointMm, *, slack: float = 1.0) -> tuple[PointMm, PointMm]:
    low, high = np.subtract(center, np.multiply(radii, slack)), np.add(center, np.multiply(radii, slack))
    return (low[0], low[1], low[2]), (high[0], high[1], high[2])
