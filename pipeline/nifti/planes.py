"""Single slices of a file, in any direction, without its volume in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.nifti.header import FileAxis, VolumeHeader
from pipeline.nifti.stream import VolumeStream, as_int16


def read_planes(path: Path, planes: Sequence[tuple[int, int]]) -> list[NDArray[np.int16]]:
    """Slices of a volume, scaled and rounded to int16, from one pass over its file.

    Args:
        path: ``.nii`` or ``.nii.gz``.
        planes: Of each, the canonical axis that it is across (0 z, 1 y, 2 x), and its index.

    Returns:
        Each slice in canonical RAS+ order: (y, x), (z, x) or (z, y).

    Raises:
        VolumeError: The file cannot be read.
    """
    with VolumeStream.open(path) as stream:
        header = stream.header
        parts: list[list[NDArray[np.int16]]] = [[] for _ in planes]
        for first, block_kji in stream.blocks():
            for part, (axis, index) in zip(parts, planes, strict=True):
                part += _part(block_kji, first, header, axis, index)
    return [_canonical(part, header, axis) for part, (axis, _) in zip(parts, planes, strict=True)]


def _file_axis(header: VolumeHeader, canonical: int) -> tuple[int, FileAxis]:
    """Which axis of (k, j, i) it is, and how it lies."""
    return next((n, axis) for n, axis in enumerate(header.axes_kji) if axis.canonical == canonical)


def _part(
    block_kji: NDArray[Any], first: int, header: VolumeHeader, axis: int, index: int
) -> list[NDArray[np.int16]]:
    """What a block has of a plane: at most one array, its axes in the file's order."""
    number, file_axis = _file_axis(header, axis)
    n = header.shape_kji[number]
    at = n - 1 - index if file_axis.flipped else index
    if number:
        return [as_int16(block_kji.take(at, axis=number), header).astype(np.int16)]
    inside = first <= at < first + len(block_kji)
    return [as_int16(block_kji[at - first], header).astype(np.int16)] if inside else []


def _canonical(parts: Sequence[NDArray[np.int16]], header: VolumeHeader, axis: int) -> NDArray[np.int16]:
    """The parts one after another, turned and flipped to canonical order."""
    number, _ = _file_axis(header, axis)
    plane = np.concatenate(parts) if number else parts[0]
    left = [file_axis for n, file_axis in enumerate(header.axes_kji) if n != number]
    plane = plane[tuple(slice(None, None, -1 if file_axis.flipped else 1) for file_axis in left)]
    return plane if left[0].canonical < left[1].canonical else plane.T
