"""Where voxels are: grids in RAS+ millimetres, boxes of voxels, and the target grid of a resampled volume."""

from __future__ import annotations

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
class Box:
    """The voxels ``start <= index < stop`` along z, y and x of a canonical (RAS+) native grid."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    start_zyx: tuple[int, int, int]
    stop_zyx: tuple[int, int, int]

    def __post_init__(self) -> None:
        if not all(0 <= start < stop for start, stop in zip(self.start_zyx, self.stop_zyx, strict=True)):
            raise ValueError(f"a box needs 0 <= start < stop along each axis, got {self}")

    @classmethod
    def whole(cls, shape_zyx: tuple[int, int, int]) -> Box:
        """All voxels of a volume."""
        return cls(start_zyx=(0, 0, 0), stop_zyx=shape_zyx)

    @classmethod
    def from_slices(cls, slices_zyx: Sequence[slice]) -> Box:
        """The box of three slices with start and stop."""
        (z, z_stop), (y, y_stop), (x, x_stop) = ((int(part.start), int(part.stop)) for part in slices_zyx)
        return cls(start_zyx=(z, y, x), stop_zyx=(z_stop, y_stop, x_stop))

    @property
    def shape_zyx(self) -> tuple[int, int, int]:
        """Number of voxels along each axis."""
        z, y, x = (stop - start for start, stop in zip(self.start_zyx, self.stop_zyx, strict=True))
        return z, y, x

    @property
    def slices_zyx(self) -> tuple[slice, slice, slice]:
        """The box as an index of a native volume."""
        z, y, x = (slice(*ends) for ends in zip(self.start_zyx, self.stop_zyx, strict=True))
        return z, y, x

    def with_margin(self, margin_zyx: Sequence[int], shape_zyx: tuple[int, int, int]) -> Box:
        """The box with ``margin_zyx`` more voxels on both sides of each axis, inside a volume of ``shape_zyx``."""
        return Box.from_slices(
            [
                slice(max(0, start - margin), min(n, stop + margin))
                for start, stop, margin, n in zip(
                    self.start_zyx, self.stop_zyx, margin_zyx, shape_zyx, strict=True
                )
            ]
        )

    def __str__(self) -> str:
        """Numpy's notation, slowest axis first: ``20:84, 100:356, 80:300``."""
        return ", ".join(f"{a}:{b}" for a, b in zip(self.start_zyx, self.stop_zyx, strict=True))


def resampled_grid(native: Grid, box: Box, shape_zyx: tuple[int, int, int]) -> Grid:
    """The grid of ``native``'s voxels in ``box`` after resampling to ``shape_zyx``.

    Both cover the same cuboid face to face, so voxel ``i`` of the target has its centre at source index
    ``start + (i + 0.5) * n_source / n_target - 0.5`` along each axis.
    """
    source_xyz = np.array(box.shape_zyx[::-1], dtype=np.float64)
    scale = source_xyz / np.array(shape_zyx[::-1], dtype=np.float64)
    to_native = np.diag([*scale, 1.0])
    to_native[:3, 3] = 0.5 * scale - 0.5 + np.array(box.start_zyx[::-1], dtype=np.float64)
    return Grid.from_array(shape_zyx, native.affine @ to_native)


def corner_distance_mm(a: Grid, b: Grid) -> float:
    """How far the corners of two grids of one shape are apart at most."""
    z, y, x = a.shape_zyx
    corners = np.array([(i, j, k, 1.0) for i in (0, x - 1) for j in (0, y - 1) for k in (0, z - 1)])
    return float(np.linalg.norm((corners @ (a.affine - b.affine).T)[:, :3], axis=1).max())
