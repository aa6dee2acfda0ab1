"""Which lesions were found: one to one and as LiTS counts them, how well, split or merged; and the tumour burden."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, optimize, sparse

from liverseg.measure.overlap import Mask, Spacing, surface_distances, union_box
from pipeline.lesions import equivalent_diameters_mm, size_bins


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
                f"IoU > {self.iou_threshold} and IoU > {other.iou_threshold} cannot be added: they count different things"
            )
        return LesionScores(
            iou_threshold=self.iou_threshold,
            below_10_mm=self.below_10_mm + other.below_10_mm,
            from_10_to_20_mm=self.from_10_to_20_mm + other.from_10_to_20_mm,
            above_20_mm=self.above_20_mm + other.above_20_mm,
        )

    def to_json(self) -> dict[str, object]:
        """One object per size, and ``overall``."""
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
        truth_ids_zyx, pred_ids_zyx: Lesion numbers from 1, on the box of both masks.
        truth_voxels, pred_voxels: (n_truth,), (n_pred,) int64, voxels of each lesion.
        pair_truth: (n_pairs,) int64 index into the truth's lesions, of each pair that shares a voxel.
        pair_pred: (n_pairs,) int64 index into the predicted ones.
        pair_voxels: (n_pairs,) int64, shared voxels, above 0.
    """

    spacing_zyx_mm: Spacing
    truth_ids_zyx: NDArray[np.int32]
    pred_ids_zyx: NDArray[np.int32]
    truth_voxels: NDArray[np.int64]
    pred_voxels: NDArray[np.int64]
    pair_truth: NDArray[np.int64]
    pair_pred: NDArray[np.int64]
    pair_voxels: NDArray[np.int64]

    @property
    def truth_diameters_mm(self) -> NDArray[np.float64]:
        """(n_truth,) diameters of the spheres with the lesions' volumes."""
        return equivalent_diameters_mm(self.truth_voxels * _voxel_ml(self.spacing_zyx_mm))

    @property
    def pred_diameters_mm(self) -> NDArray[np.float64]:
        """(n_pred,) diameters of the predicted lesions, likewise."""
        return equivalent_diameters_mm(self.pred_voxels * _voxel_ml(self.spacing_zyx_mm))

    @property
    def pair_iou(self) -> NDArray[np.float64]:
        """(n_pairs,) intersection over union of each pair."""
        union = self.truth_voxels[self.pair_truth] + self.pred_voxels[self.pair_pred] - self.pair_voxels
        iou: NDArray[np.float64] = self.pair_voxels / union
        return iou


@dataclass(frozen=True, slots=True, kw_only=True)
class LesionDetails:
    """What the lesions of one case add to the one-to-one counts.

    Attributes:
        lits: Counts by the rule of the LiTS challenge: see ``lits_counts``.
        n_split: True lesions that two or more predicted lesions share.
        n_merged: Predicted lesions that share two or more true lesions.
        dice: Dice of each found lesion with its prediction, matched one to one at IoU > 0.
        assd_mm: Average symmetric surface distance of the same pairs.
    """

    lits: DetectionCounts
    n_split: int
    n_merged: int
    dice: tuple[float, ...]
    assd_mm: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BurdenErrors:
    """Errors of the tumour burden over cases, as fractions of the liver; None without a case."""

    rmse: float | None
    max_abs: float | None
    n_cases: int


def score_lesions(
    pred_zyx: Mask, truth_zyx: Mask, spacing_zyx_mm: Spacing, *, iou_thresholds: Sequence[float] = (0.0, 0.5)
) -> tuple[LesionScores, ...]:
    """Detection scores of one case's tumour masks, one record per threshold; empty masks give zero counts."""
    overlaps = lesion_overlaps(pred_zyx, truth_zyx, spacing_zyx_mm)
    return tuple(detection(overlaps, iou_threshold=threshold) for threshold in iou_thresholds)


def lesion_overlaps(
    pred_zyx: Mask, truth_zyx: Mask, spacing_zyx_mm: Spacing, *, connectivity: int = 3
) -> LesionOverlaps:
    """Split both masks into lesions and intersect them.

    Args:
        pred_zyx, truth_zyx: Tumour masks of one shape.
        spacing_zyx_mm: Distance between voxel centres.
        connectivity: 3 joins voxels that share a corner (26 neighbours), 1 only those that share a face (6).

    Raises:
        ValueError: The shapes differ.
    """
    if pred_zyx.shape != truth_zyx.shape:
        raise ValueError(f"need two masks of one shape, got {pred_zyx.shape} and {truth_zyx.shape}")
    # Tumours fill little of a scan: two int32 volumes of their box, not of 512×512×1000.
    box = union_box(pred_zyx, truth_zyx)
    pred_ids, pred_voxels = _components(pred_zyx[box], connectivity)
    truth_ids, truth_voxels = _components(truth_zyx[box], connectivity)
    pair_truth, pair_pred, shared = _shared_voxels(pred_ids, truth_ids)
    return LesionOverlaps(
        spacing_zyx_mm=spacing_zyx_mm,
        truth_ids_zyx=truth_ids,
        pred_ids_zyx=pred_ids,
        truth_voxels=truth_voxels,
        pred_voxels=pred_voxels,
        pair_truth=pair_truth,
        pair_pred=pair_pred,
        pair_voxels=shared,
    )


def match(overlaps: LesionOverlaps, *, iou_threshold: float) -> tuple[tuple[int, int], ...]:
    """Pairs (truth, prediction) of lesions with IoU above the threshold, each lesion in one pair at most.

    As many pairs as there can be, and of these the ones with the largest sum of IoU (maximum matching). From a
    threshold of 0.5 up the pairs are unique anyway. Below, a prediction that spans two lesions finds one of them,
    and the other is missed.
    """
    usable = np.flatnonzero(overlaps.pair_iou > iou_threshold)
    n_truth, n_pred = overlaps.truth_voxels.size, overlaps.pred_voxels.size
    links = sparse.coo_array(
        (np.ones(usable.size), (overlaps.pair_truth[usable], n_truth + overlaps.pair_pred[usable])),
        shape=(n_truth + n_pred,) * 2,
    )
    _, group_of = sparse.csgraph.connected_components(links, directed=False)
    group_of_pair = group_of[overlaps.pair_truth[usable]]
    groups = np.split(usable[np.argsort(group_of_pair, kind="stable")], _ends(group_of_pair))
    return tuple(sorted(pair for group in groups if group.size for pair in _matched(overlaps, group)))


def _ends(group_of_pair: NDArray[np.int32]) -> NDArray[np.int64]:
    """Where the sorted groups end, but for the last."""
    _, counts = np.unique(group_of_pair, return_counts=True)
    ends: NDArray[np.int64] = np.cumsum(counts)[:-1]
    return ends


def _matched(overlaps: LesionOverlaps, group: NDArray[np.int64]) -> list[tuple[int, int]]:
    """The best pairs of lesions that overlaps connect; ``group`` are indices of pairs."""
    truths, rows = np.unique(overlaps.pair_truth[group], return_inverse=True)
    preds, columns = np.unique(overlaps.pair_pred[group], return_inverse=True)
    worth = np.zeros((truths.size, preds.size))
    # One more pair is worth more than any sum of IoU, each of which is at most 1.
    worth[rows, columns] = 1 + overlaps.pair_iou[group] / (min(worth.shape) + 1)
    chosen = zip(*optimize.linear_sum_assignment(worth, maximize=True), strict=True)
    return [(int(truths[t]), int(preds[p])) for t, p in chosen if worth[t, p] > 0]


def lits_counts(overlaps: LesionOverlaps, *, iou_threshold: float = 0.5) -> DetectionCounts:
    """Detection by the rule of the LiTS challenge (Bilic et al. 2023; its scoring code, ``detect_lesions``).

    Each true lesion goes to the prediction that it shares most voxels with, and the true lesions of one prediction
    are merged. Each prediction then goes to the merged lesion that it shares most voxels with, and the predictions
    of one merged lesion are merged, too. A merged lesion is detected if its IoU with its merged prediction is above
    the threshold; its true lesions are then all found, and its predictions are all right. So a lesion predicted in
    two pieces is 1 found and nothing else, and two lesions predicted as one are 2 found. Of equal overlaps the lesion
    with the lower number counts.

    Args:
        overlaps: With ``connectivity=1``, as the challenge has it.
        iou_threshold: What the IoU must exceed.
    """
    n_truth, n_pred = overlaps.truth_voxels.size, overlaps.pred_voxels.size
    # A true lesion is merged into the group of its prediction's number; without one it is alone, and missed.
    owner = _largest(overlaps.pair_truth, overlaps.pair_pred, overlaps.pair_voxels, n_truth)
    groups = owner[overlaps.pair_truth]
    keys, at = np.unique(overlaps.pair_pred * max(n_pred, 1) + groups, return_inverse=True)
    voxels = np.bincount(at, weights=overlaps.pair_voxels, minlength=keys.size).astype(np.int64)
    pred, group = keys // max(n_pred, 1), keys % max(n_pred, 1)
    # Groups are ordered by their first true lesion, so that ties go to the lower number.
    first = np.full(n_pred, n_truth, dtype=np.int64)
    np.minimum.at(first, owner[owner >= 0], np.flatnonzero(owner >= 0))
    chosen = _largest(pred, group, voxels, n_pred, rank=first)
    kept = chosen[pred] == group
    shared = np.bincount(group[kept], weights=voxels[kept], minlength=n_pred)
    found, right = owner >= 0, chosen >= 0
    size = np.bincount(owner[found], weights=overlaps.truth_voxels[found], minlength=n_pred)
    size += np.bincount(chosen[right], weights=overlaps.pred_voxels[right], minlength=n_pred)
    detected = shared > iou_threshold * (size - shared)
    n_found = int(np.count_nonzero(detected[owner[found]]))
    n_right = int(np.count_nonzero(detected[chosen[right]]))
    return DetectionCounts(
        true_positives=n_found, false_positives=n_pred - n_right, false_negatives=n_truth - n_found
    )


def _largest(
    of: NDArray[np.int64],
    to: NDArray[np.int64],
    voxels: NDArray[np.int64],
    n: int,
    *,
    rank: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """For each of n, the ``to`` that shares most voxels, of equal ones the lowest (by ``rank``); -1 without any."""
    result = np.full(n, -1, dtype=np.int64)
    best_last = np.lexsort((-(to if rank is None else rank[to]), voxels))
    result[of[best_last]] = to[best_last]
    return result


def lesion_details(pred_zyx: Mask, truth_zyx: Mask, spacing_zyx_mm: Spacing) -> LesionDetails:
    """LiTS's counts, splits, merges, and how well each found lesion was outlined; see ``LesionDetails``."""
    overlaps = lesion_overlaps(pred_zyx, truth_zyx, spacing_zyx_mm)
    by_faces = lesion_overlaps(pred_zyx, truth_zyx, spacing_zyx_mm, connectivity=1)
    iou = dict(
        zip(
            zip(overlaps.pair_truth.tolist(), overlaps.pair_pred.tolist(), strict=True),
            overlaps.pair_iou.tolist(),
            strict=True,
        )
    )
    pairs = match(overlaps, iou_threshold=0.0)
    return LesionDetails(
        lits=lits_counts(by_faces),
        n_split=int(np.count_nonzero(np.bincount(overlaps.pair_truth) > 1)),
        n_merged=int(np.count_nonzero(np.bincount(overlaps.pair_pred) > 1)),
        dice=tuple(2 * iou[pair] / (1 + iou[pair]) for pair in pairs),
        assd_mm=tuple(_assd_mm(overlaps, truth, pred) for truth, pred in pairs),
    )


def _assd_mm(overlaps: LesionOverlaps, truth: int, pred: int) -> float:
    # In the box of both: a lesion is small, and the array holds all of them.
    is_truth, is_pred = overlaps.truth_ids_zyx == truth + 1, overlaps.pred_ids_zyx == pred + 1
    assd_mm = surface_distances(is_pred, is_truth, overlaps.spacing_zyx_mm).assd_mm
    assert assd_mm is not None
    return assd_mm


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
    the case out would hide its worst failure. LiTS counts a burden of 9001 there, which makes its RMSE that of
    such cases alone.
    """
    liver = int(np.count_nonzero(label_zyx))
    return int(np.count_nonzero(label_zyx == 2)) / liver if liver else 0.0


def burden_errors(pred: Sequence[float], truth: Sequence[float]) -> BurdenErrors:
    """Root mean square and largest error of the tumour burden, one number per case in each sequence (LiTS).

    Raises:
        ValueError: The sequences differ in length.
    """
    if len(pred) != len(truth):
        raise ValueError(f"expected one burden per case, got {len(pred)} predicted and {len(truth)} true")
    if not pred:
        return BurdenErrors(rmse=None, max_abs=None, n_cases=0)
    error = np.asarray(pred, dtype=np.float64) - np.asarray(truth, dtype=np.float64)
    return BurdenErrors(
        rmse=float(np.sqrt(np.mean(error**2))), max_abs=float(np.abs(error).max()), n_cases=error.size
    )


def _voxel_ml(spacing_zyx_mm: Spacing) -> float:
    return math.prod(spacing_zyx_mm) / 1000


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _components(mask_zyx: Mask, connectivity: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Lesion numbers from 1 in the mask's shape, and the voxels of each (index 0 is lesion 1)."""
    ids = np.zeros(mask_zyx.shape, dtype=np.int32)
    structure = ndimage.generate_binary_structure(3, connectivity)
    n_lesions = ndimage.label(mask_zyx, structure=structure, output=ids) if mask_zyx.size else 0
    return ids, np.bincount(ids[mask_zyx], minlength=n_lesions + 1)[1:]


def _shared_voxels(
    pred_ids: NDArray[np.int32], truth_ids: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Index of the truth, of the prediction, and the shared voxels of each pair that has any."""
    both = (pred_ids > 0) & (truth_ids > 0)
    n_pred = int(pred_ids.max(initial=0)) + 1
    # One number per pair: a sort of the shared voxels finds all pairs, however many lesions there are.
    keys, shared = np.unique(truth_ids[both].astype(np.int64) * n_pred + pred_ids[both], return_counts=True)
    return keys // n_pred - 1, keys % n_pred - 1, shared
