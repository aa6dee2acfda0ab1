"""A volume as it streams by: averaged in the plane, slab by slab, in canonical orientation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.nifti import FileAxis, VolumeStream, to_canonical
from pipeline.resample import Slab, average_plane, box_weights

Z, Y, X = 0, 1, 2

# Takes a block of stored values (n, j, i) to the channels that are averaged, or to None where all are zero.
Channels = Callable[[NDArray[Any]], "tuple[NDArray[Any], ...] | None"]


def thin_slabs(stream: VolumeStream, plane_yx: tuple[int, int], *, channels: Channels) -> Iterator[Slab]:
    """Average a volume in the plane to ``plane_yx``, its depth untouched.

    One slab a block of slices, in the order of the file. Where the file's slowest axis is not the
    depth, one slab comes at the end: the thin volume is then summed up as the slices come.
    """
    if stream.header.axes_kji[0].canonical == Z:
        return _depth_last(stream, plane_yx, channels=channels)
    return _depth_inside(stream, plane_yx, channels=channels)


def _depth_last(stream: VolumeStream, plane_yx: tuple[int, int], *, channels: Channels) -> Iterator[Slab]:
    axes = stream.header.axes_kji
    depth = stream.header.shape_kji[0]
    for first, block_kji in stream.blocks():
        parts = channels(block_kji)
        if parts is None:
            continue
        thin_ckji = np.stack([_average(part, axes, plane_yx) for part in parts])
        start = depth - first - len(block_kji) if axes[0].flipped else first
        yield Slab(start_zyx=(start, 0, 0), values_czyx=to_canonical(thin_ckji, axes))


def _depth_inside(stream: VolumeStream, plane_yx: tuple[int, int], *, channels: Channels) -> Iterator[Slab]:
    axes = stream.header.axes_kji
    n_target = (0, *plane_yx)[axes[0].canonical]
    weights = box_weights(stream.header.shape_kji[0], n_target).astype(np.float32)
    total_ckji: NDArray[np.float32] | None = None
    for first, block_kji in stream.blocks():
        parts = channels(block_kji)
        if parts is None:
            continue
        thin_ckji = np.stack([_average(part, axes, plane_yx) for part in parts])
        summed = np.einsum(
            "tk,ckji->ctji", weights[:, first : first + len(block_kji)], thin_ckji, optimize=True
        )
        total_ckji = summed if total_ckji is None else total_ckji + summed
    if total_ckji is not None:
        yield Slab(start_zyx=(0, 0, 0), values_czyx=to_canonical(total_ckji, axes))


def _average(
    block_kji: NDArray[Any], axes: tuple[FileAxis, FileAxis, FileAxis], plane_yx: tuple[int, int]
) -> NDArray[np.float32]:
    n_target = (None, *plane_yx)  # by canonical axis: the depth is kept
    return average_plane(block_kji, n_j=n_target[axes[1].canonical], n_i=n_target[axes[2].canonical])
