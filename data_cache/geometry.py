"""Where voxels are: grids in RAS+ millimetres, depth windows, and the target grid of a resampled volume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from data_cache.records import STRICT

Affine = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A voxel lattice in space.

    Attributes:
        shape_zyx: Number of voxels, slowest axis first, as the arrays are laid out.
        affine_xyz: 4×4, takes homogeneous voxel indices (x, y, z, 1) of voxel centres to RAS+ mm, as
            NIfTI and nibabel have it. Tuples, so that grids compare, hash and go to JSON exactly.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    shape_zyx: tuple[int, int, int]
    affine_xyz: Affine

    @classmethod
    def from_array(cls, shape_zyx: Sequence[int], affine_xyz: NDArray[np.floating]) -> Grid:
        """Build a grid from an array's shape and a 4×4 affine; plain Python numbers are kept."""
        z, y, x = (int(n) for n in shape_zyx)
        rows = tuple(tuple(float(v) for v in row) for row in affine_xyz)
        return cls(shape_zyx=(z, y, x), affine_xyz=rows)

    @property
    def affine(self) -> NDArray[np.float64]:
        """The affine as a fresh 4×4 array."""
        return np.array(self.affine_xyz, dtype=np.float64)

    @property
    def spacing_zyx_mm(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxel centres along z, y and x."""
        x, y, z = (float(v) for v in np.linalg.norm(self.affine[:3, :3], axis=0))
        return z, y, x

    @property
    def voxel_volume_ml(self) -> float:
        """Volume of one voxel in millilitres; the determinant, so that sheared axes count right."""
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthWindow:
    """A run of slices ``start <= z < stop`` of a canonical (RAS+) native grid."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"a depth window needs 0 <= start < stop, got {self.start}:{self.stop}")

    def __len__(self) -> int:
        return self.stop - self.start


def window_with_margin(first: int, last: int, *, depth: int, margin_fraction: float) -> DepthWindow:
    """The slices ``first..last`` (inclusive) and ``depth * margin_fraction`` more each side, inside the scan.

    The margin is rounded up: a thin scan keeps at least one slice of context.
    """
    margin = math.ceil(depth * margin_fraction)
    return DepthWindow(start=max(0, first - margin), stop=min(depth, last + 1 + margin))


def resampled_grid(native: Grid, window: DepthWindow, shape_zyx: tuple[int, int, int]) -> Grid:
    """The grid of ``native``'s slices in ``window`` after resampling to ``shape_zyx``.

    Both cover the same box edge to edge, so voxel ``i`` of the target has its centre at source index
    ``(i + 0.5) * n_source / n_target - 0.5`` along each axis.
    """
    _, ny, nx = native.shape_zyx
    source_xyz = np.array([nx, ny, len(window)], dtype=np.float64)
    origin_xyz = np.array([0.0, 0.0, float(window.start)])
    scale = source_xyz / np.array(shape_zyx[::-1], dtype=np.float64)
    to_native = np.diag([*scale, 1.0])
    to_native[:3, 3] = 0.5 * scale - 0.5 + origin_xyz
    return Grid.from_array(shape_zyx, native.affine @ to_native)


def corner_distance_mm(a: Grid, b: Grid) -> float:
    """How far the corners of two grids of one shape are apart at most."""
    z, y, x = a.shape_zyx
    corners = np.array([(i, j, k, 1.0) for i in (0, x - 1) for j in (0, y - 1) for k in (0, z - 1)])
    return float(np.linalg.norm((corners @ (a.affine - b.affine).T)[:, :3], axis=1).max())
