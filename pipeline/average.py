"""Box averages of a file's voxels as they stream by: each view is summed up block by block, in any orientation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from data_cache.geometry import Box
from pipeline.nifti import FileAxis, VolumeHeader, to_canonical
from pipeline.resample import average_plane, box_weights

Slices = tuple[slice, slice, slice]


class BoxAverage:
    """The mean of a volume over the footprint of each voxel of one view, summed up from blocks in any order.

    Args:
        header: Header of the file that the blocks come from.
        box: What the view covers, in canonical orientation.
        shape_zyx: Voxels of the view.
    """

    def __init__(self, header: VolumeHeader, box: Box, shape_zyx: tuple[int, int, int]) -> None:
        self._axes = header.axes_kji
        self._box_kji = file_slices(box, header)
        self._shape_kji = tuple(shape_zyx[axis.canonical] for axis in self._axes)
        self._weights = [
            _file_weights(axis, header.grid.shape_zyx, box, shape_zyx).astype(np.float32)
            for axis in self._axes
        ]
        # A row of weights has three or four voxels of hundreds: a sparse product takes a third of a dense one's time.
        self._sparse_j = csr_array(self._weights[1][:, self._box_kji[1]])
        self._sum_kji = np.zeros(self._shape_kji, dtype=np.float32)

    def add(
        self, start_kji: tuple[int, int, int], block_kji: NDArray[Any], *, largest: int | None = None
    ) -> None:
        """Add a block of voxels; what lies outside of the view's box is passed over.

        Args:
            start_kji: Index of the block's first voxel in the file.
            block_kji: Integers or floats.
            largest: No integer of the block is greater in magnitude. None: what its type can hold.
        """
        inside = self._inside(start_kji, block_kji.shape)
        if not all(part.start < part.stop for part in inside):
            return
        voxels = tuple(
            slice(part.start - start, part.stop - start)
            for part, start in zip(inside, start_kji, strict=True)
        )
        touched, weights = zip(*map(_touched, self._weights, inside), strict=True)
        self._sum_kji[touched] += self._averaged(block_kji[voxels], weights, largest=largest)

    def reaches(self, start_kji: tuple[int, int, int], shape_kji: tuple[int, int, int]) -> bool:
        """Whether a block has any voxel in the view's box."""
        return all(part.start < part.stop for part in self._inside(start_kji, shape_kji))

    def _inside(self, start_kji: tuple[int, int, int], shape_kji: tuple[int, ...]) -> list[slice]:
        return [
            slice(max(start, part.start), min(start + n, part.stop))
            for start, n, part in zip(start_kji, shape_kji, self._box_kji, strict=True)
        ]

    def values_zyx(self) -> NDArray[np.float32]:
        """The means, canonical; voxels that no block covered count as 0."""
        return to_canonical(self._sum_kji, self._axes)

    def _averaged(
        self, block_kji: NDArray[Any], weights: Sequence[NDArray[np.float32]], *, largest: int | None
    ) -> NDArray[np.float32]:
        w_k, w_j, w_i = weights
        if self._divides(block_kji):
            # Whole groups of integers: summed as integers, before anything becomes a float.
            planes = average_plane(block_kji, n_j=len(w_j), n_i=len(w_i), largest=largest)
            return _along_k(w_k, planes)
        block = block_kji.astype(np.float32, copy=False)
        if len(w_k) < len(block):  # fewer planes are left to average: a third of the arithmetic
            return self._in_plane(_along_k(w_k, block), w_j, w_i)
        return _along_k(w_k, self._in_plane(block, w_j, w_i))

    def _in_plane(
        self, block_kji: NDArray[np.float32], w_j: NDArray[np.float32], w_i: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        if w_j.shape == self._sparse_j.shape:
            rows = np.stack([self._sparse_j @ plane_ji for plane_ji in block_kji])
        else:
            rows = np.matmul(w_j, block_kji)
        means: NDArray[np.float32] = rows @ w_i.T
        return means

    def _divides(self, block_kji: NDArray[Any]) -> bool:
        """Whether a block has the whole plane of the box, and each voxel of the view whole ones of it."""
        plane = [part.stop - part.start for part in self._box_kji[1:]]
        targets = self._shape_kji[1:]
        return list(block_kji.shape[1:]) == plane and all(
            n % target == 0 for n, target in zip(plane, targets, strict=True)
        )


def file_slices(box: Box, header: VolumeHeader) -> Slices:
    """A canonical box as an index of the file's own array (k, j, i)."""
    k, j, i = (_mirrored(box.slices_zyx[axis.canonical], axis, header) for axis in header.axes_kji)
    return k, j, i


def canonical_box(slices_kji: Slices, header: VolumeHeader) -> Box:
    """The way back of ``file_slices``."""
    by_axis = {
        axis.canonical: _mirrored(part, axis, header)
        for part, axis in zip(slices_kji, header.axes_kji, strict=True)
    }
    return Box.from_slices([by_axis[canonical] for canonical in range(3)])


def _mirrored(part: slice, axis: FileAxis, header: VolumeHeader) -> slice:
    n = header.grid.shape_zyx[axis.canonical]
    return slice(n - part.stop, n - part.start) if axis.flipped else part


def _file_weights(
    axis: FileAxis, native_zyx: tuple[int, int, int], box: Box, shape_zyx: tuple[int, int, int]
) -> NDArray[np.float64]:
    c = axis.canonical
    weights = box_weights(native_zyx[c], shape_zyx[c], box.start_zyx[c], box.stop_zyx[c])
    return weights[::-1, ::-1] if axis.flipped else weights


def _touched(weights: NDArray[np.float32], inside: slice) -> tuple[slice, NDArray[np.float32]]:
    """Which voxels of the view a run of the file's voxels reaches along an axis, and their weights."""
    columns = weights[:, inside]
    rows = np.flatnonzero(columns.any(axis=1))
    reached = slice(int(rows[0]), int(rows[-1]) + 1)
    return reached, columns[reached]


def _along_k(weights: NDArray[np.float32], block_kji: NDArray[np.float32]) -> NDArray[np.float32]:
    n, j, i = block_kji.shape
    planes: NDArray[np.float32] = weights @ block_kji.reshape(n, j * i)
    return planes.reshape(len(weights), j, i)
