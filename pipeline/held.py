"""Blocks of a file's voxels held in memory, compressed without loss, so that a file is read once and looked at often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldBlock:
    """A cuboid of a file's stored values.

    Attributes:
        start_kji: Index of its first voxel in the file, slowest axis first.
        shape_kji: Number of voxels.
        dtype: Type of the values, in this machine's byte order.
        packed: LZ4 of the shuffled bytes: 40 % of a CT's size, and faster than inflating the file again.
    """

    start_kji: tuple[int, int, int]
    shape_kji: tuple[int, int, int]
    dtype: np.dtype[Any]
    packed: bytes

    @classmethod
    def of(cls, start_kji: tuple[int, int, int], values_kji: NDArray[Any]) -> Self:
        """Compress ``values_kji``, integers of at most 16 bits."""
        values = np.ascontiguousarray(values_kji, dtype=values_kji.dtype.newbyteorder("="))
        k, j, i = values.shape
        packed: bytes = blosc.compress(values, b"lz4", 1, blosc.SHUFFLE)
        return cls(start_kji=start_kji, shape_kji=(k, j, i), dtype=values.dtype, packed=packed)

    def values_kji(self) -> NDArray[Any]:
        """The values, read-only."""
        return np.frombuffer(blosc.decompress(self.packed), dtype=self.dtype).reshape(self.shape_kji)
