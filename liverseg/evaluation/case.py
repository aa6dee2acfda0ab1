"""One case of a store, segmented and scored in native space; nothing is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_cache.geometry import Box, Grid
from data_cache.reader import CacheStore
from data_cache.schema import FRACTION_ONE, View
from liverseg.evaluation.raw_case import RawCase, native_case, native_label, read_raw_case
from liverseg.evaluation.uncertainty import CaseUncertainty, NativeCase, evaluate_uncertainty
from liverseg.inference.calibration import Calibration
from liverseg.inference.plausible import judge_segmentation, measure_segmentation
from liverseg.inference.segment import (
    Predictor,
    keep_large_components,
    leave_out_doubtful_tumours,
    segment,
)
from liverseg.inference.uncertainty_files import summarise_segmentation
from liverseg.measure.overlap import DiceCounts, dice_counts
from liverseg.measure.plausibility import Plausibility
from liverseg.measure.summary import LabelScores, score_labels
from liverseg.measure.uncertainty import mean_foreground


@dataclass(frozen=True, slots=True, kw_only=True)
class CropDice:
    """Dice counts of both classes for one way of cropping."""

    liver: DiceCounts
    tumour: DiceCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseEvaluation:
    """One case's scores in native space.

    Attributes:
        found: Whether a liver was found in the scan.
        predicted: Scores with the predicted crop: what a user gets.
        label_crop: Dice with the crop that the label gives, as the original project reported it; None without a liver.
        ceiling: Dice of the cached fractions themselves: the most that the grid allows; None without a liver.
        uncertainty: The uncertainty of the samples beside the case's errors; None where no samples were drawn.
        plausibility: Whether the prediction can be a liver, judged without the label.
        notes: What was assumed or replaced while reading the scan, and what speaks against its being a CT in HU.
    """

    case_id: str
    trained_on: bool
    found: bool
    plausibility: Plausibility
    predicted: LabelScores
    label_crop: CropDice | None
    ceiling: CropDice | None
    uncertainty: CaseUncertainty | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EvaluatedCase:
    """The scores of a case, and the arrays that they were computed from, for pictures.

    Attributes:
        image_zyx: Native HU, canonical.
        truth_zyx, predicted_zyx: Native labels, canonical.
        grid: Grid of these three.
        foreground_czyx: Predicted probabilities on the view of ``box``.
        view: The scan as the network saw it, on the view of ``box``.
        native: What the uncertainty was computed from; None where no samples were drawn.
    """

    scores: CaseEvaluation
    image_zyx: NDArray[np.int16]
    truth_zyx: NDArray[np.uint8]
    predicted_zyx: NDArray[np.uint8]
    grid: Grid
    foreground_czyx: NDArray[np.float32]
    box: Box
    view: View
    native: NativeCase | None


def evaluate_case(
    case_id: str,
    predictor: Predictor,
    store: CacheStore,
    *,
    raw: Path,
    trained_on: bool,
    calibration: Calibration | None = None,
) -> EvaluatedCase:
    """Segment a case as a user would, and score it.

    Args:
        case_id: A labelled case of ``store``.
        predictor: The network.
        store: The cache, built with the spec that the network was trained with.
        raw: Folder of the data set that the cache was built from.
        trained_on: Whether the network has seen the case; noted in the scores.
        calibration: Fitted on other cases, for the samples.

    Raises:
        CacheError: The case has no label, or a raw file is not the one that the cache was built from.
        VolumeError: A raw file cannot be read.
    """
    case = read_raw_case(case_id, store, raw, predictor.spec)
    header, truth_zyx = case.label_header, case.truth_zyx
    found = segment(case.scan, predictor)
    box = found.box or case.scan.scan_box
    predicted_zyx = native_label(found.foreground_czyx, box, header)
    scores = score_labels(predicted_zyx, truth_zyx, header.grid.spacing_zyx_mm)
    native = None if found.samples_nczyx is None else native_case(found, predicted_zyx, case)
    uncertainty = None
    if native is not None:
        summary = summarise_segmentation(found, case.scan, predictor.training)
        uncertainty = evaluate_uncertainty(case_id, native, scores, summary=summary, calibration=calibration)
    evaluation = CaseEvaluation(
        case_id=case_id,
        trained_on=trained_on,
        found=found.box is not None,
        plausibility=judge_segmentation(
            measure_segmentation(found, case.scan),
            predictor.training,
            liver_ml=scores.liver.volume_pred_ml,
            tumour_ml=scores.tumour.volume_pred_ml,
        ),
        predicted=scores,
        label_crop=_label_crop(case_id, predictor, store, case),
        ceiling=_ceiling(case_id, store, case),
        uncertainty=uncertainty,
        notes=(*case.scan.notes, *map(str, case.scan.doubts)),
    )
    return EvaluatedCase(
        scores=evaluation,
        image_zyx=case.scan.volume_zyx(),
        truth_zyx=truth_zyx,
        predicted_zyx=predicted_zyx,
        grid=header.grid,
        foreground_czyx=found.foreground_czyx,
        box=box,
        view=case.scan.view(box),
        native=native,
    )


def _label_crop(case_id: str, predictor: Predictor, store: CacheStore, case: RawCase) -> CropDice | None:
    meta = store.meta(case_id)
    if "liver" not in meta.boxes:
        return None
    view = store.read(case_id, "liver")
    # As ``segment`` makes its answer from the last look, so that the crop alone is another.
    drawn = mean_foreground(predictor.draw(view.image_zyx)) if predictor.samples else None
    foreground_czyx, _ = leave_out_doubtful_tumours(
        keep_large_components(
            predictor.foreground(view.image_zyx) if drawn is None else drawn,
            voxel_volume_ml=view.grid.voxel_volume_ml,
        )
    )
    return _crop_dice(native_label(foreground_czyx, meta.boxes["liver"], case.label_header), case.truth_zyx)


def _ceiling(case_id: str, store: CacheStore, case: RawCase) -> CropDice | None:
    meta = store.meta(case_id)
    fractions = store.read(case_id, "liver").fractions_czyx if "liver" in meta.boxes else None
    if fractions is None:
        return None
    foreground_czyx = fractions.astype(np.float32) / np.float32(FRACTION_ONE)
    return _crop_dice(native_label(foreground_czyx, meta.boxes["liver"], case.label_header), case.truth_zyx)


def _crop_dice(predicted_zyx: NDArray[np.uint8], truth_zyx: NDArray[np.uint8]) -> CropDice:
    return CropDice(
        liver=dice_counts(predicted_zyx >= 1, truth_zyx >= 1),
        tumour=dice_counts(predicted_zyx == 2, truth_zyx == 2),
    )
