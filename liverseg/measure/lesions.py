"""Which lesions were found: tumours matched one to one, counted by size, and the tumour burden of the liver."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from liverseg.measure.overlap import Mask, Spacing, union_box
from pipeline.lesions import CUBE, equivalent_diameters_mm, size_bins


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionCounts:
    """Lesions found, false positives and missed lesions; counts add up over cases."""

    true_positives: int
    false_positives: int
    false_negatives: int

    def __add__(self, other: DetectionCounts) -> DetectionCounts:
        return DetectionCounts(
            true_positives=self.true_positives + other.true_positives,
            false_positives=self.false_positives + other.false_positives,
            false_negatives=self.false_negatives + other.false_negatives,
        )

    @property
    def precision(self) -> float | None:
        """The share of predicted lesions that are real; None where none was predicted."""
        return _ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float | None:
        """The share of real lesions that were found; None where there is none."""
        return _ratio(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def f1(self) -> float | None:
        """2·TP / (2·TP + FP + FN); 0 where one side is empty, None where both are."""
        found_twice = 2 * self.true_positives
        return _ratio(found_twice, found_twice + self.false_positives + self.false_negatives)

    def to_json(self) -> dict[str, int | float | None]:
        """The counts and what follows from them."""
        return {
            "true_positives": self.true_positives,
            "false_positives": self.false_positives,
            "false_negatives": self.false_negatives,
            "precision": self.precision,
            "recall": self.recall,
            "f1": self.f1,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LesionScores:
    """Detection at one IoU threshold, by equivalent-sphere diameter.

    A found lesion counts in the bin of its true diameter, a missed one too, a false positive in the bin of its
    own. So each lesion is in exactly one bin, and the bins add up to ``overall``.
    """

    iou_threshold: float
    below_10_mm: DetectionCounts
    from_10_to_20_mm: DetectionCounts
    above_20_mm: DetectionCounts

    @property
    def overall(self) -> DetectionCounts:
        """All sizes together."""
        return self.below_10_mm + self.from_10_to_20_mm + self.above_20_mm

    def __add__(self, other: LesionScores) -> LesionScores:
        if self.iou_threshold != other.iou_threshold:
            raise ValueError(
                f"IoU > {self.iou_threshold} and IoU > {other.iou_threshold} count different things"
            )
        return LesionScores(
            iou_threshold=self.iou_threshold,
            below_10_mm=self.below_10_mm + other.below_10_mm,
            from_10_to_20_mm=self.from_10_to_20_mm + other.from_10_to_20_mm,
            above_20_mm=self.above_20_mm + other.above_20_mm,
        )

    def to_json(self) -> dict[str, object]:
        """One object a bin, and ``overall``."""
        return {
            "iou_threshold": self.iou_threshold,
            "overall": self.overall.to_json(),
            "below_10_mm": self.below_10_mm.to_json(),
            "from_10_to_20_mm": self.from_10_to_20_mm.to_json(),
            "above_20_mm": self.above_20_mm.to_json(),
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LesionOverlaps:
    """The lesions of both masks and how they overlap, measured once for any number of thresholds.

    Attributes:
        truth_diameters_mm: (n_truth,) float64, diameter of the sphere with the lesion's volume.
        pred_diameters_mm: (n_pred,) float64.
        pair_truth: (n_pairs,) int64 index into the truth's lesions, of each pair that shares a voxel.
        pair_pred: (n_pairs,) int64 index into the predicted ones.
        pair_iou: (n_pairs,) float64, above 0.
    """

    truth_diameters_mm: NDArray[np.float64]
    pred_diameters_mm: NDArray[np.float64]
    pair_truth: NDArray[np.int64]
    pair_pred: NDArray[np.int64]
    pair_iou: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class BurdenErrors:
    """Errors of the tumour burden over cases, as fractions of the liver; None without a case."""

    rmse: float | None
    max_abs: float | None
    n_cases: int


def score_lesions(
    pred_zyx: Mask, truth_zyx: Mask, spacing_zyx_mm: Spacing, *, iou_thresholds: Sequence[float] = (0.0, 0.5)
) -> tuple[LesionScores, ...]:
    """Detection scores of one case's tumour masks, one record a threshold; empty masks give zero counts."""
    overlaps = lesion_overlaps(pred_zyx, truth_zyx, spacing_zyx_mm)
    return tuple(detection(overlaps, iou_threshold=threshold) for threshold in iou_thresholds)


def lesion_overlaps(pred_zyx: Mask, truth_zyx: Mask, spacing_zyx_mm: Spacing) -> LesionOverlaps:
    """Split both masks into 26-connected lesions and intersect them.

    Raises:
        ValueError: The shapes differ.
    """
    if pred_zyx.shape != truth_zyx.shape:
        raise ValueError(f"need two masks of one shape, got {pred_zyx.shape} and {truth_zyx.shape}")
    # Tumours fill little of a scan: two int32 volumes of their box, not of 512×512×1000.
    box = union_box(pred_zyx, truth_zyx)
    pred_ids, pred_voxels = _components(pred_zyx[box])
    truth_ids, truth_voxels = _components(truth_zyx[box])
    pair_truth, pair_pred, shared = _shared_voxels(pred_ids, truth_ids)
    voxel_ml = math.prod(spacing_zyx_mm) / 1000
    union = truth_voxels[pair_truth] + pred_voxels[pair_pred] - shared
    return LesionOverlaps(
        truth_diameters_mm=equivalent_diameters_mm(truth_voxels * voxel_ml),
        pred_diameters_mm=equivalent_diameters_mm(pred_voxels * voxel_ml),
        pair_truth=pair_truth,
        pair_pred=pair_pred,
        pair_iou=shared / union,
    )


def match(overlaps: LesionOverlaps, *, iou_threshold: float) -> tuple[tuple[int, int], ...]:
    """Pairs (truth, prediction) of lesions with IoU above the threshold, each lesion in one pair at most.

    Greedy from the largest IoU down; equal ones by lesion number. From a threshold of 0.5 up the pairs are
    unique anyway. Below, a prediction that spans two lesions finds one of them, and the other is missed.
    """
    best_first = np.lexsort((overlaps.pair_pred, overlaps.pair_truth, -overlaps.pair_iou))
    matched: dict[int, int] = {}
    taken: set[int] = set()
    for pair in best_first[overlaps.pair_iou[best_first] > iou_threshold]:
        truth, pred = int(overlaps.pair_truth[pair]), int(overlaps.pair_pred[pair])
        if truth not in matched and pred not in taken:
            matched[truth] = pred
            taken.add(pred)
    return tuple(sorted(matched.items()))


def detection(overlaps: LesionOverlaps, *, iou_threshold: float) -> LesionScores:
    """Count found lesions, false positives and missed lesions by size."""
    pairs = np.array(match(overlaps, iou_threshold=iou_threshold), dtype=np.int64).reshape(-1, 2)
    truth_bins = size_bins(overlaps.truth_diameters_mm)
    false_bins = np.delete(size_bins(overlaps.pred_diameters_mm), pairs[:, 1])
    found = np.bincount(truth_bins[pairs[:, 0]], minlength=3)
    missed = np.bincount(truth_bins, minlength=3) - found
    false = np.bincount(false_bins, minlength=3)
    small, medium, large = (
        DetectionCounts(true_positives=int(tp), false_positives=int(fp), false_negatives=int(fn))
        for tp, fp, fn in zip(found, false, missed, strict=True)
    )
    return LesionScores(
        iou_threshold=iou_threshold, below_10_mm=small, from_10_to_20_mm=medium, above_20_mm=large
    )


def tumour_burden(label_zyx: NDArray[np.uint8]) -> float:
    """Tumour volume over liver volume, the tumour being part of the liver; between 0 and 1.

    0 where there is no liver: a network that finds none then has the whole burden as its error, where leaving
    the case out would hide its worst failure.
    """
    liver = int(np.count_nonzero(label_zyx))
    return int(np.count_nonzero(label_zyx == 2)) / liver if liver else 0.0


def burden_errors(pred: Sequence[float], truth: Sequence[float]) -> BurdenErrors:
    """Root mean square and largest error of the tumour burden, one number a case and sequence (LiTS).

    Raises:
        ValueError: The sequences differ in length.
    """
    if len(pred) != len(truth):
        raise ValueError(f"need one burden a case, got {len(pred)} predicted and {len(truth)} true")
    if not pred:
        return BurdenErrors(rmse=None, max_abs=None, n_cases=0)
    error = np.asarray(pred, dtype=np.float64) - np.asarray(truth, dtype=np.float64)
    return BurdenErrors(
        rmse=float(np.sqrt(np.mean(error**2))), max_abs=float(np.abs(error).max()), n_cases=error.size
    )


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _components(mask_zyx: Mask) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Lesion numbers from 1 in the mask's shape, and the voxels of each (index 0 is lesion 1)."""
    ids = np.zeros(mask_zyx.shape, dtype=np.int32)
    n_lesions = ndimage.label(mask_zyx, structure=CUBE, output=ids) if mask_zyx.size else 0
    return ids, np.bincount(ids[mask_zyx], minlength=n_lesions + 1)[1:]


def _shared_voxels(
    pred_ids: NDArray[np.int32], truth_ids: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Index of the truth, of the prediction, and the shared voxels of each pair that has any."""
    both = (pred_ids > 0) & (truth_ids > 0)
    n_pred = int(pred_ids.max(initial=0)) + 1
    # One number a pair: a sort of the shared voxels finds all pairs, however many lesions there are.
    keys, shared = np.unique(truth_ids[both].astype(np.int64) * n_pred + pred_ids[both], return_counts=True)
    return keys // n_pred - 1, keys % n_pred - 1, shared
