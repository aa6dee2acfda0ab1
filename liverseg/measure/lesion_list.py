"""Each lesion of a case by itself: where it is, how large, and whether it was found."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from liverseg.measure.lesions import lesion_overlaps, match
from liverseg.measure.overlap import Mask, Spacing, union_box
from pipeline.lesions import equivalent_diameters_mm

Status = Literal["missed", "false positive", "found", "lesion"]
ORDER: tuple[Status, ...] = ("missed", "false positive", "found", "lesion")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesion:
    """One 26-connected lesion.

    Attributes:
        status: ``found`` and ``missed`` lesions are the truth's, ``false positive`` ones the prediction's;
            ``lesion`` where there is one label alone.
        diameter_mm: Diameter of the sphere with its volume.
        at_zyx: A voxel inside it, in its largest slice, near the middle.
    """

    status: Status
    diameter_mm: float
    volume_ml: float
    at_zyx: tuple[int, int, int]


def list_lesions(pred_zyx: Mask, truth_zyx: Mask | None, spacing_zyx_mm: Spacing) -> tuple[Lesion, ...]:
    """The lesions of a case: what was missed first, then the false positives, then the rest; large before small.

    Matched one to one by IoU, as the counts of ``score_lesions`` at IoU > 0 are.

    Args:
        pred_zyx: Predicted tumour.
        truth_zyx: True tumour, or None: then ``pred_zyx`` is any label, and all are ``lesion``.
        spacing_zyx_mm: Distance between voxel centres.

    Raises:
        ValueError: The shapes differ.
    """
    if truth_zyx is None:
        found = [*_lesions(pred_zyx, union_box(pred_zyx, pred_zyx), spacing_zyx_mm)]
        listed: list[Lesion] = [_lesion("lesion", at, n, spacing_zyx_mm) for at, n in found]
    else:
        overlaps = lesion_overlaps(pred_zyx, truth_zyx, spacing_zyx_mm)
        pairs = match(overlaps, iou_threshold=0.0)
        matched_truth, matched_pred = {truth for truth, _ in pairs}, {pred for _, pred in pairs}
        box = union_box(pred_zyx, truth_zyx)  # the one that the overlaps number lesions in
        listed = [
            _lesion("found" if number in matched_truth else "missed", at, n, spacing_zyx_mm)
            for number, (at, n) in enumerate(_lesions(truth_zyx, box, spacing_zyx_mm))
        ]
        listed += [
            _lesion("false positive", at, n, spacing_zyx_mm)
            for number, (at, n) in enumerate(_lesions(pred_zyx, box, spacing_zyx_mm))
            if number not in matched_pred
        ]
    return tuple(sorted(listed, key=lambda lesion: (ORDER.index(lesion.status), -lesion.volume_ml)))


def _lesions(
    mask_zyx: Mask, box: tuple[slice, slice, slice], spacing_zyx_mm: Spacing
) -> Iterator[tuple[tuple[int, int, int], int]]:
    """A voxel inside each lesion, and how many it has, in the order in which they are labelled."""
    inside_zyx = mask_zyx[box]
    if not inside_zyx.size:
        return
    ids_zyx, _ = ndimage.label(inside_zyx, structure=np.ones((3, 3, 3)))
    for number, part in enumerate(ndimage.find_objects(ids_zyx), start=1):
        lesion_zyx = ids_zyx[part] == number
        offsets = [outer.start + inner.start for outer, inner in zip(box, part, strict=True)]
        z, y, x = (int(o + i) for o, i in zip(offsets, _inner_voxel(lesion_zyx, spacing_zyx_mm), strict=True))
        yield (z, y, x), int(np.count_nonzero(lesion_zyx))


def _inner_voxel(lesion_zyx: NDArray[np.bool_], spacing_zyx_mm: Spacing) -> tuple[int, int, int]:
    """In the slice with most voxels, the one nearest to their mean: a crescent's mean lies outside of it."""
    areas = np.count_nonzero(lesion_zyx, axis=(1, 2))
    largest = np.flatnonzero(areas == areas.max())
    z = int(largest[len(largest) // 2])
    voxels = np.argwhere(lesion_zyx[z])
    distances = ((voxels - voxels.mean(axis=0)) * spacing_zyx_mm[1:]) ** 2
    y, x = voxels[int(distances.sum(axis=1).argmin())]
    return z, int(y), int(x)


def _lesion(status: Status, at: tuple[int, int, int], n_voxels: int, spacing_zyx_mm: Spacing) -> Lesion:
    volume_ml = n_voxels * math.prod(spacing_zyx_mm) / 1000
    (diameter_mm,) = equivalent_diameters_mm(np.array([volume_ml]))
    return Lesion(
        status=status,
        diameter_mm=float(diameter_mm),
        volume_ml=volume_ml,
        at_zyx=at,
    )
