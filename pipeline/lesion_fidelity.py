"""What the grid leaves of each lesion: truth and restored label compared lesion by lesion, and by size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, spatial

from pipeline.lesions import CUBE, DIAMETERS_MM, equivalent_diameters_mm, size_bins

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class LesionFidelity:
    """What comes back of one lesion through the cached fractions.

    Attributes:
        diameter_mm: Of the sphere with its volume.
        dice: 0 where nothing comes back.
        volume_ratio: Of what comes back to what was.
    """

    diameter_mm: float
    dice: float
    volume_ratio: float


class TumourBox:
    """Tumour of the truth and of the prediction in the box around both: a byte for each of its voxels."""

    def __init__(self) -> None:
        self._parts: list[tuple[tuple[int, int, int], NDArray[np.uint8]]] = []

    def add(self, first: int, truth: Mask, predicted: Mask) -> None:
        """Add a block of slices, the first of them ``first``."""
        codes = truth.view(np.uint8) | predicted.view(np.uint8) << 1
        if codes.any():
            ((k, j, i),) = ndimage.find_objects(np.minimum(codes, 1))
            self._parts.append(((first + k.start, j.start, i.start), codes[k, j, i].copy()))

    def masks(self) -> tuple[Mask, Mask]:
        """The truth and the prediction; empty where there is neither."""
        starts = np.array([start for start, _ in self._parts], dtype=np.int64).reshape(-1, 3)
        stops = starts + np.array([codes.shape for _, codes in self._parts], dtype=np.int64).reshape(-1, 3)
        origin = starts.min(axis=0, initial=np.iinfo(np.int64).max)
        whole = np.zeros(np.maximum(stops.max(axis=0, initial=0) - origin, 0), dtype=np.uint8)
        for start, codes in zip(starts - origin, (codes for _, codes in self._parts), strict=True):
            whole[tuple(slice(a, a + n) for a, n in zip(start, codes.shape, strict=True))] = codes
        return (whole & 1).view(np.bool_), (whole >> 1).view(np.bool_)


def lesion_fidelities(
    truth: Mask, predicted: Mask, spacing_mm: tuple[float, ...]
) -> tuple[LesionFidelity, ...]:
    """What comes back of each lesion: predicted voxels outside of all lesions count for the nearest one."""
    ids, n_lesions = ndimage.label(truth, structure=CUBE)
    if not n_lesions:
        return ()
    rim = np.argwhere(truth & ~ndimage.binary_erosion(truth))
    beyond = np.argwhere(predicted & ~truth)
    _, nearest = spatial.cKDTree(rim * spacing_mm).query(beyond * spacing_mm)

    def count(of: NDArray[np.int32]) -> NDArray[np.float64]:
        return np.bincount(of, minlength=n_lesions + 1)[1:].astype(np.float64)

    true, shared = count(ids[truth]), count(ids[truth & predicted])
    found = shared + count(ids[tuple(rim[nearest].T)])
    diameters_mm = equivalent_diameters_mm(true * (np.prod(spacing_mm) / 1000))
    return tuple(
        LesionFidelity(diameter_mm=float(d), dice=float(dice), volume_ratio=float(ratio))
        for d, dice, ratio in zip(diameters_mm, 2 * shared / (true + found), found / true, strict=True)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeFidelity:
    """The lesions of one size in all cases.

    Attributes:
        diameter_mm: ``< 10``, ``10-20`` or ``> 20``.
        lesions: How many there are.
        found: How many of these any voxel comes back of.
        dice, volume_ratio: Means over the lesions; None where there is none.
    """

    diameter_mm: str
    lesions: int
    found: int
    dice: float | None
    volume_ratio: float | None


def by_diameter(lesions: Sequence[LesionFidelity]) -> list[SizeFidelity]:
    """The lesions by size, small ones first."""
    bins = size_bins(np.array([lesion.diameter_mm for lesion in lesions], dtype=np.float64))
    sizes = []
    for number, name in enumerate(DIAMETERS_MM):
        inside = [lesion for lesion, at in zip(lesions, bins, strict=True) if at == number]
        sizes.append(
            SizeFidelity(
                diameter_mm=name,
                lesions=len(inside),
                found=sum(lesion.dice > 0 for lesion in inside),
                dice=mean([lesion.dice for lesion in inside]),
                volume_ratio=mean([lesion.volume_ratio for lesion in inside]),
            )
        )
    return sizes


def mean(values: Sequence[float | None]) -> float | None:
    """Of what is not None; None where nothing is."""
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None
