"""From a view back to the native grid: values interpolated, labels decided there, slice block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from data_cache.geometry import Box, resampled_grid
from pipeline.labels import decide, is_foreground
from pipeline.lesions import LOWEST_SHARE, lesion_regions, lowest_shares
from pipeline.nifti import FileAxis, VolumeHeader
from pipeline.resample import linear_weights

BLOCK_VOXELS = 4 << 20
MOST_COUNTS = 4 << 20  # of voxels by lesion and share: an untrained network has tens of thousands of lesions
T = TypeVar("T", bound=np.generic)


def one_thread() -> threadpool_limits:
    """For the time of a restoration: a thousand small products, with two threads that wait for each other, took 1.7
    to 8.5 s for 512×512×1000 on a busy machine, and with one 0.3 to 0.5 s."""
    return threadpool_limits(limits=1, user_api="blas")


def native_labels(
    foreground_czyx: NDArray[np.float32], box: Box, header: VolumeHeader
) -> Iterator[NDArray[np.uint8]]:
    """Labels (n, j, i) of consecutive slices of the file that ``header`` is of, all of them in order.

    Probabilities are interpolated linearly and decided at native resolution. A voxel is foreground where
    liver and tumour together reach one half; outside of ``box`` it is background. Averaging and interpolating
    blur a lesion twice, and a threshold of one half takes half of a 6 mm lesion's volume away. So a lesion is
    found where tumour is more than half of the foreground, in the view and at native resolution, and is then
    widened until it has the volume that its probabilities add up to. There is no tumour anywhere else.

    Args:
        foreground_czyx: Probabilities (or fractions) of liver and tumour on the view's grid, in [0, 1].
        box: The voxels that the view covers.
        header: Of the native file.
    """
    whole = _Part.of(foreground_czyx.sum(axis=0), box, header)
    lesions = _Lesions.of(foreground_czyx, whole, box, header)
    for first, stop in _blocks(header):
        label_kji = np.zeros((stop - first, *header.shape_kji[1:]), dtype=np.uint8)
        _decide(label_kji, first, whole, lesions)
        yield label_kji


def native_values(
    values_zyx: NDArray[np.float32], box: Box, header: VolumeHeader
) -> Iterator[NDArray[np.float32]]:
    """A view's values at the voxels of consecutive slices (n, j, i) of the file, in the blocks of ``native_labels``.

    Interpolated linearly, as probabilities are before a label is decided; 0 outside of ``box``.
    """
    part = _Part.of(values_zyx, box, header)
    _, box_j, box_i = part.box_kji
    for first, stop in _blocks(header):
        values_kji = np.zeros((stop - first, *header.shape_kji[1:]), dtype=np.float32)
        inside_k, inside_kji = part.slices(first, stop)
        if len(inside_kji):
            values_kji[inside_k.start - first : inside_k.stop - first, box_j, box_i] = inside_kji
        yield values_kji


def _blocks(header: VolumeHeader) -> Iterator[tuple[int, int]]:
    """First and past-the-last slice of each block."""
    n_k, n_j, n_i = header.shape_kji
    per_block = max(1, BLOCK_VOXELS // (n_j * n_i))
    for first in range(0, n_k, per_block):
        yield first, min(n_k, first + per_block)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Part:
    """One channel of a view: only what is not zero, and the box of the file's voxels that it reaches.

    A liver fills a twentieth of a long scan, and its tumours less: the rest is never interpolated.

    Attributes:
        view_kji: The part of the view, along the file's axes.
        small_kji: Its values.
        box_kji: Voxels of the file; empty where the channel is zero.
        weights_kji: Of each axis, from ``small_kji`` to the box.
    """

    view_kji: tuple[slice, slice, slice]
    small_kji: NDArray[np.float32]
    box_kji: tuple[slice, slice, slice]
    weights_kji: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]

    @classmethod
    def of(cls, values_zyx: NDArray[np.float32], box: Box, header: VolumeHeader) -> Self:
        parts = [_weights_inside(values_zyx, axis, box, header) for axis in header.axes_kji]
        (view_k, box_k, w_k), (view_j, box_j, w_j), (view_i, box_i, w_i) = parts
        values_kji = values_zyx.transpose([axis.canonical for axis in header.axes_kji])
        return cls(
            view_kji=(view_k, view_j, view_i),
            small_kji=np.ascontiguousarray(values_kji[view_k, view_j, view_i]),
            box_kji=(box_k, box_j, box_i),
            weights_kji=(w_k, w_j, w_i),
        )

    def slices(self, first: int, stop: int) -> tuple[slice, NDArray[np.float32]]:
        """Which of the slices ``first:stop`` the box has, and their values in its plane."""
        box_k = self.box_kji[0]
        start = min(max(first, box_k.start), box_k.stop)
        stop = max(start, min(stop, box_k.stop))
        w_k, w_j, w_i = self.weights_kji
        n_k, n_j, n_i = self.small_kji.shape
        rows = w_k[start - box_k.start : stop - box_k.start]
        planes = (rows @ self.small_kji.reshape(n_k, n_j * n_i)).reshape(len(rows), n_j, n_i)
        values: NDArray[np.float32] = np.matmul(w_j, planes @ w_i.T)
        return slice(start, stop), values

    def within(self, box_kji: tuple[slice, slice, slice]) -> Self:
        """The same values in a box inside of this one."""
        rows = [
            weights[inner.start - outer.start : inner.stop - outer.start]
            for weights, inner, outer in zip(self.weights_kji, box_kji, self.box_kji, strict=True)
        ]
        return replace(self, box_kji=box_kji, weights_kji=(rows[0], rows[1], rows[2]))


def _decide(label_kji: NDArray[np.uint8], first: int, whole: _Part, lesions: _Lesions) -> None:
    """Fill in the labels of the slices from ``first`` on."""
    stop = first + len(label_kji)
    whole_k, foreground_kji = whole.slices(first, stop)
    if not len(foreground_kji):
        return
    _, whole_j, whole_i = whole.box_kji
    label_kji[whole_k.start - first : whole_k.stop - first, whole_j, whole_i] = is_foreground(foreground_kji)
    tumour_k, share_kji = lesions.tumour.slices(first, stop)
    if not len(share_kji):
        return
    # Where there is tumour there is foreground, so that its box lies within the other one.
    _, tumour_j, tumour_i = lesions.tumour.box_kji
    both_kji = foreground_kji[
        _within(tumour_k, whole_k), _within(tumour_j, whole_j), _within(tumour_i, whole_i)
    ]
    is_tumour_kji = share_kji >= both_kji * lesions.nearest(lesions.lowest_kji, tumour_k)
    is_tumour_kji &= is_foreground(both_kji)
    label_kji[tumour_k.start - first : tumour_k.stop - first, tumour_j, tumour_i] += is_tumour_kji


def _within(inner: slice, outer: slice) -> slice:
    return slice(inner.start - outer.start, inner.stop - outer.start)


# ---- lesions


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Lesions:
    """The lesions of a view, and the share of the foreground from which on a voxel of the file belongs to one.

    Attributes:
        tumour: Probabilities in the lesions' regions alone; what a network suspects elsewhere is not interpolated.
        near_kji: For each axis of its box, the nearest voxel of the view, counted from 1 at the first one of
            ``tumour``; 0 where that is not among them.
        lowest_kji: The share that makes tumour, for each voxel of ``tumour`` and a margin of one: its lesion's, or
            out of reach where there is none.
    """

    tumour: _Part
    near_kji: tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]
    lowest_kji: NDArray[np.float32]

    @classmethod
    def of(cls, foreground_czyx: NDArray[np.float32], whole: _Part, box: Box, header: VolumeHeader) -> Self:
        ids_zyx = lesion_regions(decide(foreground_czyx) == 2)
        tumour_zyx = np.where(ids_zyx > 0, foreground_czyx[1], np.float32(0))
        tumour = _Part.of(tumour_zyx, box, header)
        near_k, near_j, near_i = map(_nearest, tumour.weights_kji)
        ids_kji = np.pad(ids_zyx.transpose([axis.canonical for axis in header.axes_kji])[tumour.view_kji], 1)
        unread = cls(tumour=tumour, near_kji=(near_k, near_j, near_i), lowest_kji=np.zeros(0, np.float32))
        view_ml = resampled_grid(header.grid, box, tumour_zyx.shape).voxel_volume_ml
        expected = np.bincount(ids_zyx.ravel(), tumour_zyx.ravel()) * (view_ml / header.grid.voxel_volume_ml)
        counts = unread._counts(ids_kji, whole, header, n_ids=len(expected))
        return replace(unread, lowest_kji=lowest_shares(counts, expected)[ids_kji])

    def nearest(self, values_kji: NDArray[T], inside_k: slice) -> NDArray[T]:
        """Of ``values_kji``, laid out like ``lowest_kji``, the one nearest to each voxel of the slices ``inside_k``."""
        near_k, near_j, near_i = self.near_kji
        rows = near_k[_within(inside_k, self.tumour.box_kji[0])]
        return values_kji[rows].take(near_j, axis=1).take(near_i, axis=2)

    def _counts(
        self, ids_kji: NDArray[np.int32], whole: _Part, header: VolumeHeader, *, n_ids: int
    ) -> NDArray[np.int64]:
        """(n_ids, levels) voxels of the file that are foreground, by their lesion and their share of tumour."""
        n_levels = 2 * int(np.clip(MOST_COUNTS // (2 * n_ids), 32, 2048))
        counts = np.zeros(n_ids * n_levels, dtype=np.int64)
        whole = whole.within(self.tumour.box_kji)
        for first, stop in _blocks(header):
            inside_k, share_kji = self.tumour.slices(first, stop)
            _, both_kji = whole.slices(first, stop)
            likely = np.flatnonzero(
                (share_kji >= both_kji * np.float32(LOWEST_SHARE)) & is_foreground(both_kji)
            )
            share = share_kji.ravel()[likely] / both_kji.ravel()[likely]
            level = np.minimum((share * n_levels).astype(np.int32), n_levels - 1)
            ids = self.nearest(ids_kji, inside_k).ravel()[likely]
            counts += np.bincount(ids * n_levels + level, minlength=len(counts))
        return counts.reshape(n_ids, n_levels)


def _nearest(weights: NDArray[np.float32]) -> NDArray[np.intp]:
    """The column, counted from 1, of each row's nearest voxel; 0 where that is not among the columns."""
    if not weights.size:
        return np.zeros(len(weights), dtype=np.intp)
    return np.where(weights.max(axis=1) >= 0.5, weights.argmax(axis=1) + 1, 0)


def _weights_inside(
    values_zyx: NDArray[np.float32], axis: FileAxis, box: Box, header: VolumeHeader
) -> tuple[slice, slice, NDArray[np.float32]]:
    """Of one file axis: the part of the view that is not zero, the file's voxels it reaches, and the weights."""
    others = tuple(other for other in range(3) if other != axis.canonical)
    filled = np.flatnonzero(values_zyx.any(axis=others))
    if not filled.size:
        return slice(0, 0), slice(0, 0), np.zeros((0, 0), dtype=np.float32)
    view = slice(int(filled[0]), int(filled[-1]) + 1)
    matrix = _file_weights(header, axis.canonical, values_zyx.shape[axis.canonical], box)[:, view]
    matrix = matrix[::-1] if axis.flipped else matrix
    reached = np.flatnonzero(matrix.any(axis=1))
    if not reached.size:  # a view finer than the file: what lies between two of its centres is not seen
        return slice(0, 0), slice(0, 0), np.zeros((0, 0), dtype=np.float32)
    region = slice(int(reached[0]), int(reached[-1]) + 1)
    return view, region, matrix[region].astype(np.float32)


def _file_weights(header: VolumeHeader, canonical: int, n_view: int, box: Box) -> NDArray[np.float64]:
    inside = box.slices_zyx[canonical]
    weights = np.zeros((header.grid.shape_zyx[canonical], n_view))
    weights[inside] = linear_weights(n_view, inside.stop - inside.start)
    return weights
