"""Lesions: their diameters, the voxels of a view that are theirs, and how each keeps its volume when it is decided."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

SMALL_BELOW_MM = 10.0
LARGE_ABOVE_MM = 20.0
DIAMETERS_MM = ("< 10", "10-20", "> 20")  # the names of ``size_bins``
CUBE = np.ones((3, 3, 3), dtype=bool)  # voxels that share a corner are connected

LOWEST_SHARE = 0.2  # of the foreground that a lesion is widened to


def equivalent_diameters_mm(volumes_ml: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Diameters of the spheres with these volumes, (6·V / π)^(1/3)."""
    diameters_mm: NDArray[np.float64] = np.cbrt(volumes_ml * (6000.0 / np.pi))
    return diameters_mm


def size_bins(diameters_mm: NDArray[np.float64]) -> NDArray[np.int64]:
    """0 below 10 mm, 1 from 10 to 20 mm with both ends, 2 above."""
    return (diameters_mm >= SMALL_BELOW_MM).astype(np.int64) + (diameters_mm > LARGE_ABOVE_MM)


def lesion_regions(tumour_zyx: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Numbers from 1 on the voxels of each 26-connected lesion and on their 26 neighbors; 0 elsewhere.

    The neighbors hold what the average of a voxel that is less than half tumour has of the lesion.
    """
    ids_zyx = np.zeros(tumour_zyx.shape, dtype=np.int32)
    ndimage.label(tumour_zyx, structure=CUBE, output=ids_zyx)
    # No voxel of a lesion is a neighbor of another lesion, so each lesion keeps all of its own.
    regions_zyx: NDArray[np.int32] = ndimage.maximum_filter(ids_zyx, size=3, mode="constant")
    return regions_zyx


def lowest_shares(counts: NDArray[np.int64], expected: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """The share of tumour from which on each lesion has the number of voxels nearest to the expected one.

    One half at most, so that no lesion is narrowed, and ``LOWEST_SHARE`` at least.

    Args:
        counts: (n, levels) voxels, by equal steps of their share from 0 to 1, an even number of steps; the first row
            is of voxels outside of all lesions.
        expected: (n,) voxels that the probabilities add up to.

    Returns:
        (n,) shares; out of reach for the first row and for a lesion that has no voxel of one half.
    """
    n_levels = counts.shape[1]
    half, least = n_levels // 2, int(np.ceil(LOWEST_SHARE * n_levels))
    at_least = np.cumsum(counts[:, ::-1], axis=1)[:, ::-1][:, least : half + 1]
    # From one half down: of equally good shares, the first and highest is taken.
    miss = np.abs(at_least[:, ::-1] - expected[:, None])
    lowest: NDArray[np.float32] = ((half - miss.argmin(axis=1)) / n_levels).astype(np.float32)
    lowest[at_least[:, -1] == 0] = 2
    lowest[0] = 2
    return lowest
