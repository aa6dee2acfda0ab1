"""Solids as signed distances, and smooth random fields, from which phantoms are drawn. All lengths are in mm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Volume = NDArray[np.float32]
PointMm = tuple[float, float, float]
"""A position or an extent in the order x, y, z."""
Distance = Callable[["Points"], Volume]
"""Negative inside a solid, positive outside, in mm; exact on the surface and close to it."""

LATTICE_LOW_MM: PointMm = (-330.0, -330.0, -620.0)
LATTICE_HIGH_MM: PointMm = (330.0, 330.0, 420.0)
# A cubic B-spline of white noise keeps a share of 0.479 of the variance along each axis.
_SPLINE_GAIN = float(0.479**-1.5)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Points:
    """The positions at which solids and fields are evaluated.

    Attributes:
        axes_mm: Coordinates x (nx,), y (ny,), z (nz,) of the lattice, ascending, before any warp.
        x, y, z: Coordinates after the warp, each broadcasting to (nz, ny, nx).
    """

    axes_mm: tuple[Volume, Volume, Volume]
    x: Volume
    y: Volume
    z: Volume

    @classmethod
    def lattice(cls, axes_mm: tuple[Volume, Volume, Volume]) -> Points:
        """Points without a warp."""
        x, y, z = axes_mm
        return cls(axes_mm=axes_mm, x=x[None, None, :], y=y[None, :, None], z=z[:, None, None])

    def moved(self, shift_xyz: tuple[Volume, Volume, Volume]) -> Points:
        """The same lattice with its coordinates warped by ``shift_xyz`` (three arrays of shape (nz, ny, nx), mm)."""
        dx, dy, dz = shift_xyz
        return replace(self, x=self.x + dx, y=self.y + dy, z=self.z + dz)

    def window(self, low_mm: PointMm, high_mm: PointMm) -> tuple[slice, slice, slice]:
        """Index ranges (z, y, x) of the lattice points inside a box; empty if the box misses the lattice."""
        ranges = (
            slice(int(np.searchsorted(axis, low)), int(np.searchsorted(axis, high, side="right")))
            for axis, low, high in zip(self.axes_mm, low_mm, high_mm, strict=True)
        )
        x, y, z = ranges
        return z, y, x

    def crop(self, window_zyx: tuple[slice, slice, slice]) -> Points:
        """The points of ``window_zyx``; needs coordinates of full shape, as after ``moved``."""
        wz, wy, wx = window_zyx
        x, y, z = self.axes_mm
        axes = (x[wx], y[wy], z[wz])
        return Points(axes_mm=axes, x=self.x[window_zyx], y=self.y[window_zyx], z=self.z[window_zyx])


def ellipsoid(
    points: Points, center: PointMm, radii: PointMm, *, lean: tuple[float, float] = (0, 0)
) -> Volume:
    """Distance to an ellipsoid; ``lean`` shears x and y by this many mm per mm of height.

    The first-order distance k0(k0 - 1)/k1 of Quilez, https://iquilezles.org/articles/ellipsoids.
    """
    z = points.z - np.float32(center[2])
    x = points.x - np.float32(center[0]) - np.float32(lean[0]) * z
    y = points.y - np.float32(center[1]) - np.float32(lean[1]) * z
    scaled = [v / np.float32(r) for v, r in zip((x, y, z), radii, strict=True)]
    k0 = np.sqrt(sum(v * v for v in scaled))
    k1 = np.sqrt(sum((v / np.float32(r)) ** 2 for v, r in zip(scaled, radii, strict=True)))
    return _f32(k0 * (k0 - 1.0) / (k1 + np.float32(1e-6)))


def tube(points: Points, start: PointMm, end: PointMm, *, radii_mm: tuple[float, float]) -> Volume:
    """Distance to a straight tube with round ends whose radius runs from ``radii_mm[0]`` to ``radii_mm[1]``."""
    along = np.subtract(end, start).astype(np.float32)
    offset = [v - np.float32(s) for v, s in zip((points.x, points.y, points.z), start, strict=True)]
    share = sum(o * a for o, a in zip(offset, along, strict=True)) / float(along @ along)
    share = np.clip(share, 0.0, 1.0)
    gap = np.sqrt(sum((o - a * share) ** 2 for o, a in zip(offset, along, strict=True)))
    return _f32(gap - (radii_mm[0] + (radii_mm[1] - radii_mm[0]) * share))


def smooth_max(a: NDArray[np.floating], b: NDArray[np.floating], *, blend_mm: float) -> Volume:
    """Intersection of two solids with its edge rounded over ``blend_mm`` (Quilez, quadratic polynomial)."""
    near = np.maximum(np.float32(blend_mm) - np.abs(a - b), 0)
    return _f32(np.maximum(a, b) + near * near * np.float32(0.25 / blend_mm))


def smooth_min(a: NDArray[np.floating], b: NDArray[np.floating], *, blend_mm: float) -> Volume:
    """Union of two solids with its crease filled over ``blend_mm``."""
    return -smooth_max(-a, -b, blend_mm=blend_mm)


def random_field(points: Points, key: tuple[int, ...], *, spacing_mm: float) -> Volume:
    """A smooth random field of about unit standard deviation and zero mean, (nz, ny, nx).

    Cubic B-splines on a lattice of normal random numbers that is fixed in space, so that slabs of one volume fit
    together, whatever their size. Plain sums rather than matrix products: BLAS may round differently with another
    number of threads.

    Args:
        points: Where to evaluate; the warp is not applied.
        key: Seed of the field; the same key gives the same field.
        spacing_mm: Spacing of the lattice; features are about twice as large.
    """
    positions = [
        np.clip((axis_mm - low) / spacing_mm, 0.0, (high - low) / spacing_mm).astype(np.float32)
        for axis_mm, low, high in zip(points.axes_mm, LATTICE_LOW_MM, LATTICE_HIGH_MM, strict=True)
    ]
    x, y, z = positions
    nx, ny, _ = (
        int((h - lo) / spacing_mm) + 4 for lo, h in zip(LATTICE_LOW_MM, LATTICE_HIGH_MM, strict=True)
    )
    # Each plane has its own seed, so that a slab draws only the planes around it.
    first = int(z.min())
    planes = range(first, int(z.max()) + 4)
    lattice = np.stack(
        [np.random.default_rng((*key, plane)).standard_normal((ny, nx), dtype=np.float32) for plane in planes]
    )
    field = _spline_along(_spline_along(_spline_along(lattice, 0, z - first), 1, y), 2, x)
    return _f32(field * np.float32(_SPLINE_GAIN))


def _spline_along(field: Volume, axis: int, position: Volume) -> Volume:
    first = position.astype(np.intp)
    t = position - first.astype(np.float32)
    weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    shape = [1, 1, 1]
    shape[axis] = -1
    taps = (np.take(field, first + k, axis=axis) * (w / 6).reshape(shape) for k, w in enumerate(weights))
    return _f32(sum(taps))


def _f32(values: object) -> Volume:
    return np.asarray(values, dtype=np.float32)
