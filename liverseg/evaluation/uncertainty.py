"""A network's uncertainty beside its errors: what ``evaluate --samples`` measures for each case.

In native space, in the liver's neighbourhood: the true and the predicted liver and ``NEAR_MM`` around. A whole scan is
mostly air and fat that every network is rightly sure of, which makes any of them look calibrated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_cache.geometry import Box, resampled_grid
from liverseg.inference.calibration import Calibration
from liverseg.inference.segment import keep_large_components
from liverseg.inference.uncertainty_files import UncertaintySummary
from liverseg.measure.calibration import (
    ErrorDetection,
    ReliabilityCounts,
    tempered,
)
from liverseg.measure.diversity import PairCounts
from liverseg.measure.near_liver import near_liver
from liverseg.measure.summary import CLASSES, LabelScores
from liverseg.measure.uncertainty import (
    VolumeInterval,
    entropy,
    mean_foreground,
)
from pipeline.nifti import VolumeHeader, from_canonical
from pipeline.restore import native_labels, native_values, one_thread


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CaseUncertainty:
    """One case's uncertainty beside its errors.

    Attributes:
        risk: 1 - Dice, the mean over liver and, where truth or prediction has any, tumour.
        reliability, tempered: By class, before and after temperature scaling; the latter None without one.
        errors: Entropy of right and of wrong voxels.
        pairs: Overlaps of the samples and the truth, over the whole scan.
        truth_ml: By class.
    """

    case_id: str
    uncertainty: UncertaintySummary
    risk: float
    reliability: Mapping[str, ReliabilityCounts]
    tempered: Mapping[str, ReliabilityCounts] | None
    errors: ErrorDetection
    pairs: PairCounts
    truth_ml: Mapping[str, float]

    def interval(self, name: str) -> VolumeInterval:
        """The volume of "liver" or "tumour" over the samples."""
        return self.uncertainty.liver_ml if name == "liver" else self.uncertainty.tumour_ml


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NativeCase:
    """What a case was segmented as, and what is true, on its own grid.

    Attributes:
        samples_nczyx: As ``ScanSegmentation`` has them, on the view of ``box``.
        header: Header of the scan or of its label: the grid and the order of its axes.
        predicted_zyx, truth_zyx: Labels, canonical.
    """

    samples_nczyx: NDArray[np.float32]
    box: Box
    header: VolumeHeader
    predicted_zyx: NDArray[np.uint8]
    truth_zyx: NDArray[np.uint8]


def evaluate_uncertainty(
    case_id: str,
    case: NativeCase,
    scores: LabelScores,
    *,
    summary: UncertaintySummary,
    calibration: Calibration | None = None,
) -> CaseUncertainty:
    """Measure a case; ``scores`` are those of its predicted label, ``summary`` is what a user is told of it."""
    temperature = None if calibration is None else calibration.temperature
    reliability = {name: ReliabilityCounts.empty() for name in CLASSES}
    after = dict(reliability)
    errors, pairs = ErrorDetection.empty(), PairCounts.empty(len(case.samples_nczyx))
    for block in _blocks(case):
        reliability = _counted(reliability, block.foreground_cv, block.truth_v)
        if temperature is not None:
            after = _counted(after, tempered(block.foreground_cv, temperature.temperature), block.truth_v)
        errors += ErrorDetection.from_block(entropy(block.foreground_cv), block.predicted_v != block.truth_v)
        pairs += block.pairs
    return CaseUncertainty(
        case_id=case_id,
        uncertainty=summary,
        risk=risk_of(scores),
        reliability=reliability,
        tempered=None if temperature is None else after,
        errors=errors,
        pairs=pairs,
        truth_ml={name: scores.of(name).volume_truth_ml for name in CLASSES},
    )


def risk_of(scores: LabelScores) -> float:
    """1 - Dice, the mean over liver and, where truth or prediction has any, tumour."""
    dice = [scores.liver.dice]
    if scores.tumour.volume_truth_ml or scores.tumour.volume_pred_ml:
        dice.append(scores.tumour.dice)
    return 1.0 - sum(dice) / len(dice)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Block:
    """Some slices: the voxels of the liver's neighbourhood, and how all samples overlap."""

    foreground_cv: NDArray[np.float32]
    predicted_v: NDArray[np.uint8]
    truth_v: NDArray[np.uint8]
    pairs: PairCounts


def near_voxels(case: NativeCase) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Mean probabilities (2, voxels) and true labels (voxels,) near the liver, on the case's own grid."""
    axes = case.header.axes_kji
    near_zyx = near_liver((case.truth_zyx > 0) | (case.predicted_zyx > 0), case.header.grid.spacing_zyx_mm)
    near, truth = (from_canonical(values, axes) for values in (near_zyx, case.truth_zyx))
    parts, start = [], 0
    with one_thread():
        means = [native_values(mean, case.box, case.header) for mean in mean_foreground(case.samples_nczyx)]
        for liver, tumour in zip(*means, strict=True):
            inside = near[start : start + len(liver)]
            start += len(liver)
            parts.append(np.stack((liver[inside], tumour[inside])))
    return np.concatenate(parts, axis=1), truth[near]


def _blocks(case: NativeCase) -> Iterator[_Block]:
    """The slices of a case, block by block: n samples of a whole scan would not fit into memory."""
    axes, header, box = case.header.axes_kji, case.header, case.box
    near_zyx = near_liver((case.truth_zyx > 0) | (case.predicted_zyx > 0), header.grid.spacing_zyx_mm)
    near, predicted, truth = (
        from_canonical(values, axes) for values in (near_zyx, case.predicted_zyx, case.truth_zyx)
    )
    voxel_ml = resampled_grid(header.grid, box, case.samples_nczyx.shape[2:]).voxel_volume_ml
    means = [native_values(mean, box, header) for mean in mean_foreground(case.samples_nczyx)]
    labels = [
        native_labels(keep_large_components(sample, voxel_volume_ml=voxel_ml), box, header)
        for sample in case.samples_nczyx
    ]
    start = 0
    with one_thread():
        for liver, tumour, *samples in zip(*means, *labels, strict=True):
            part = slice(start, start + len(liver))
            start, inside = part.stop, near[part]
            yield _Block(
                foreground_cv=np.stack((liver[inside], tumour[inside])),
                predicted_v=predicted[part][inside],
                truth_v=truth[part][inside],
                pairs=PairCounts.from_block(np.stack(samples), np.ascontiguousarray(truth[part])),
            )


def _counted(
    counts: Mapping[str, ReliabilityCounts], foreground_cv: NDArray[np.float32], truth_v: NDArray[np.uint8]
) -> dict[str, ReliabilityCounts]:
    """Liver is label ≥ 1, as it is scored, and has the probability of both."""
    liver = ReliabilityCounts.from_block(foreground_cv.sum(axis=0), truth_v >= 1)
    tumour = ReliabilityCounts.from_block(foreground_cv[1], truth_v == 2)
    return {"liver": counts["liver"] + liver, "tumour": counts["tumour"] + tumour}
