"""A volume as it streams by: averaged in the plane, slab by slab, in canonical orientation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.nifti import FileAxis, VolumeStream, to_canonical
from pipeline.resample import Slab, average_plane, box_weights

Z, Y, X = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Channels:
    """What is averaged of one block.

    Attributes:
        values: Arrays (n, j, i).
        largest: Greatest magnitude in any of them, if they are integers; None: what their type can hold.
    """

    values: tuple[NDArray[Any], ...]
    largest: int | None = None


# Takes a block of stored values (n, j, i) to its channels, or to None where all are zero.
Split = Callable[[NDArray[Any]], Channels | None]


def average_in_plane(stream: VolumeStream, plane_yx: tuple[int, int], *, split: Split) -> Iterator[Slab]:
    """Average a volume in the plane to ``plane_yx``, its depth untouched.

    One slab a block of slices, in the order of the file. Where the file's slowest axis is not the
    depth, one slab comes at the end: the thin volume is then summed up as the slices come.
    """
    if stream.header.axes_kji[0].canonical == Z:
        return _depth_last(stream, plane_yx, split=split)
    return _depth_inside(stream, plane_yx, split=split)


def _depth_last(stream: VolumeStream, plane_yx: tuple[int, int], *, split: Split) -> Iterator[Slab]:
    axes = stream.header.axes_kji
    depth = stream.header.shape_kji[0]
    for first, block_kji in stream.blocks():
        channels = split(block_kji)
        if channels is None:
            continue
        thin_ckji = _average(channels, axes, plane_yx)
        start = depth - first - len(block_kji) if axes[0].flipped else first
        yield Slab(start_zyx=(start, 0, 0), values_czyx=to_canonical(thin_ckji, axes))


def _depth_inside(stream: VolumeStream, plane_yx: tuple[int, int], *, split: Split) -> Iterator[Slab]:
    axes = stream.header.axes_kji
    n_target = (0, *plane_yx)[axes[0].canonical]
    weights = box_weights(stream.header.shape_kji[0], n_target).astype(np.float32)
    total_ckji: NDArray[np.float32] | None = None
    for first, block_kji in stream.blocks():
        channels = split(block_kji)
        if channels is None:
            continue
        thin_ckji = _average(channels, axes, plane_yx)
        summed = np.einsum(
            "tk,ckji->ctji", weights[:, first : first + len(block_kji)], thin_ckji, optimize=True
        )
        total_ckji = summed if total_ckji is None else total_ckji + summed
    if total_ckji is not None:
        yield Slab(start_zyx=(0, 0, 0), values_czyx=to_canonical(total_ckji, axes))


def _average(
    channels: Channels, axes: tuple[FileAxis, FileAxis, FileAxis], plane_yx: tuple[int, int]
) -> NDArray[np.float32]:
    n_target = (None, *plane_yx)  # by canonical axis: the depth is kept
    n_j, n_i = (n_target[axis.canonical] for axis in axes[1:])
    return np.stack(
        [average_plane(part, n_j=n_j, n_i=n_i, largest=channels.largest) for part in channels.values]
    )
