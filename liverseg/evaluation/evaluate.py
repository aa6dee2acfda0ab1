"""Score a run in native space: as a user gets it, with the label's crop, and what the grid allows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_cache.errors import CacheError, ConfigError, LiversegError
from data_cache.files import write_csv, write_json, write_text
from data_cache.geometry import Box
from data_cache.reader import CacheStore
from data_cache.schema import FRACTION_ONE
from liverseg.evaluation.calibrate import Calibration
from liverseg.evaluation.uncertainty import CaseUncertainty, NativeCase, evaluate_uncertainty
from liverseg.evaluation.uncertainty_summary import (
    UNCERTAINTY,
    uncertainty_picture,
    write_uncertainty_summary,
)
from liverseg.inference.segment import Predictor, keep_largest_component, segment
from liverseg.measure.overlap import DiceCounts, dice_counts
from liverseg.measure.summary import (
    CLASSES,
    SCORES,
    SUMMARY,
    VOLUMES,
    LabelScores,
    interval,
    score_columns,
    score_labels,
    summarise_scores,
)
from liverseg.pictures.figures import overlay_figure
from liverseg.pictures.sheet import save
from liverseg.pictures.slices import evaluation_volume
from liverseg.training.split import Split
from pipeline.nifti import VolumeHeader, read_canonical, to_canonical
from pipeline.prepare import read_scan
from pipeline.restore import native_labels, one_thread

OVERLAYS = "overlays"


@dataclass(frozen=True, slots=True, kw_only=True)
class CropDice:
    """Dice counts of both classes for one way of cropping."""

    liver: DiceCounts
    tumour: DiceCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseEvaluation:
    """One case's scores in native space.

    Attributes:
        found: Whether the scan was found to have a liver at all.
        predicted: With the predicted crop: what a user gets.
        label_crop: With the crop that the label gives: what the original project reported; None without liver.
        ceiling: Of the cached fractions themselves: the most that the grid allows; None without liver.
        trust: What the samples are worth; None where none were drawn.
    """

    case_id: str
    trained_on: bool
    found: bool
    predicted: LabelScores
    label_crop: CropDice | None
    ceiling: CropDice | None
    uncertainty: CaseUncertainty | None


def choose_cases(store: CacheStore, split: Split, named: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """The cases to score, and whether the run has never trained on any of them.

    The named ones; else all labelled ones whose images are not among the training images, whatever they
    are called; else, where there are none of these, all labelled ones.

    Raises:
        ConfigError: A named case is not in the store, or the store has no labelled case.
    """
    labelled = [case_id for case_id in store.case_ids if store.meta(case_id).label is not None]
    unknown = sorted(set(named) - set(labelled))
    if unknown or not labelled:
        raise ConfigError(f"{store.path}: has no labelled case{' ' if unknown else ''}{', '.join(unknown)}")
    unseen = [case_id for case_id in labelled if not _is_trained_on(store, split, case_id)]
    chosen = tuple(named or unseen or labelled)
    return chosen, set(chosen) <= set(unseen)


def _is_trained_on(store: CacheStore, split: Split, case_id: str) -> bool:
    return store.meta(case_id).image.sha256 in split.train_sha256


def evaluate(
    predictor: Predictor,
    store: CacheStore,
    split: Split,
    *,
    case_ids: Sequence[str],
    raw: Path,
    out: Path,
    report: Callable[[str, CaseEvaluation | LiversegError], None],
    calibration: Calibration | None = None,
) -> list[CaseEvaluation]:
    """Score cases one by one; write ``scores.csv``, ``summary.json``, and of each case an overlay picture and
    the small volume that ``liverseg report`` shows, into ``out``; with samples also what ``write_uncertainty_summary`` does, and a
    picture of each case's uncertainty.

    Args:
        predictor: The network.
        store: The cache, of the spec that the network was trained with.
        split: What the run trained on.
        case_ids: What to score.
        raw: Folder of the data set that the cache was built from.
        out: Created where there is none.
        report: Told each case's scores, or why it has none; a case that fails does not stop the others.
        calibration: Fitted on other cases, for the samples.

    Raises:
        CacheError: The store has another spec than the network.
    """
    if store.schema.spec != predictor.spec:
        raise CacheError(f"{store.path}: built with another spec than the network was trained with")
    for folder in (OVERLAYS, VOLUMES, *((UNCERTAINTY,) if predictor.samples else ())):
        (out / folder).mkdir(parents=True, exist_ok=True)
    done = []
    for case_id in case_ids:
        try:
            trained_on = _is_trained_on(store, split, case_id)
            done.append(
                _evaluate_case(
                    case_id,
                    predictor,
                    store,
                    raw=raw,
                    out=out,
                    trained_on=trained_on,
                    calibration=calibration,
                )
            )
            report(case_id, done[-1])
        except LiversegError as failure:
            report(case_id, failure)
    if done:
        write_csv(out / SCORES, [_row(e) for e in done])
        content = {"models": list(predictor.sources), "samples": predictor.n_drawn, **summarise(done)}
        write_json(out / SUMMARY, content)
        write_uncertainty_summary(
            out, [e.uncertainty for e in done if e.uncertainty is not None], calibration
        )
    return done


def _evaluate_case(
    case_id: str,
    predictor: Predictor,
    store: CacheStore,
    *,
    raw: Path,
    out: Path,
    trained_on: bool,
    calibration: Calibration | None,
) -> CaseEvaluation:
    meta = store.meta(case_id)
    if meta.label is None:
        raise CacheError(f"{store.path}: case {case_id} has no label")
    truth_zyx, header = read_canonical(raw / meta.label.path)
    if header.grid.shape_zyx != meta.grid.shape_zyx:
        raise CacheError(f"{raw / meta.label.path}: is not the file that {store.path} was built from")
    truth = truth_zyx.astype(np.uint8)
    thin = read_scan(raw / meta.image.path, predictor.spec)
    found = segment(thin, predictor)
    box = found.box or thin.scan_box
    predicted = _native(found.foreground_czyx, box, header)
    scores = score_labels(predicted, truth, meta.grid.spacing_zyx_mm)
    uncertainty = None
    if found.samples_nczyx is not None:
        native = NativeCase(
            samples_nczyx=found.samples_nczyx,
            box=box,
            header=header,
            predicted_zyx=predicted,
            truth_zyx=truth,
        )
        uncertainty = evaluate_uncertainty(case_id, native, scores, calibration=calibration)
        view = thin.view(box)
        save(uncertainty_picture(uncertainty, native, view), out / UNCERTAINTY / f"{case_id}.png")
    evaluation = CaseEvaluation(
        case_id=case_id,
        trained_on=trained_on,
        found=found.box is not None,
        predicted=scores,
        label_crop=_label_crop(case_id, predictor, store, truth, header),
        ceiling=_ceiling(case_id, store, truth, header),
        uncertainty=uncertainty,
    )
    image_zyx, _ = read_canonical(raw / meta.image.path)
    figure = overlay_figure(image_zyx, truth, predicted, meta.grid.spacing_zyx_mm, title=_title(evaluation))
    save(figure, out / OVERLAYS / f"{case_id}.png")
    volume = evaluation_volume(
        image_zyx, truth, predicted, meta.grid, foreground_czyx=found.foreground_czyx, box=box
    )
    write_text(out / VOLUMES / f"{case_id}.json", json.dumps(volume))
    return evaluation


def _native(foreground_czyx: NDArray[np.float32], box: Box, header: VolumeHeader) -> NDArray[np.uint8]:
    with one_thread():
        labels_kji = np.concatenate(list(native_labels(foreground_czyx, box, header)))
    return to_canonical(labels_kji, header.axes_kji)


def _label_crop(
    case_id: str, predictor: Predictor, store: CacheStore, truth: NDArray[np.uint8], header: VolumeHeader
) -> CropDice | None:
    meta = store.meta(case_id)
    if "liver" not in meta.boxes:
        return None
    view = store.read(case_id, "liver")
    foreground = keep_largest_component(
        predictor.foreground(view.image_zyx), voxel_volume_ml=view.grid.voxel_volume_ml
    )
    return _crop_dice(_native(foreground, meta.boxes["liver"], header), truth)


def _ceiling(
    case_id: str, store: CacheStore, truth: NDArray[np.uint8], header: VolumeHeader
) -> CropDice | None:
    meta = store.meta(case_id)
    fractions = store.read(case_id, "liver").fractions_czyx if "liver" in meta.boxes else None
    if fractions is None:
        return None
    foreground = fractions.astype(np.float32) / np.float32(FRACTION_ONE)
    return _crop_dice(_native(foreground, meta.boxes["liver"], header), truth)


def _crop_dice(predicted: NDArray[np.uint8], truth: NDArray[np.uint8]) -> CropDice:
    return CropDice(
        liver=dice_counts(predicted >= 1, truth >= 1), tumour=dice_counts(predicted == 2, truth == 2)
    )


def _title(evaluation: CaseEvaluation) -> str:
    scores = evaluation.predicted
    parts = [f"liver Dice {scores.liver.dice:.3f}"]
    if scores.liver.hd95_mm is not None:
        parts.append(f"HD95 {scores.liver.hd95_mm:.1f} mm")
    if scores.tumour.volume_truth_ml or scores.tumour.volume_pred_ml:
        parts.append(f"tumour Dice {scores.tumour.dice:.3f}")
        parts.append(
            f"tumour {scores.tumour.volume_pred_ml:.1f} mL of {scores.tumour.volume_truth_ml:.1f} mL"
        )
    seen = " (trained on)" if evaluation.trained_on else ""
    return f"{evaluation.case_id}{seen}\n{' · '.join(parts)}"


# ---- tables


def summarise(evaluations: Sequence[CaseEvaluation]) -> dict[str, Any]:
    """All of ``summarise_scores``, which cases are special, and the Dice of the other two crops."""
    summary = {
        "n_cases": len(evaluations),
        "trained_on": [e.case_id for e in evaluations if e.trained_on],
        "no_liver_found": [e.case_id for e in evaluations if not e.found],
        **summarise_scores([e.predicted for e in evaluations]),
    }
    for name in CLASSES:
        scored = [e for e in evaluations if e.predicted.of(name).volume_truth_ml > 0]
        summary[name]["dice_with_label_crop"] = interval(list(_crop_values(scored, "label_crop", name)))
        summary[name]["dice_grid_ceiling"] = interval(list(_crop_values(scored, "ceiling", name)))
    return summary


def _crop_values(evaluations: Sequence[CaseEvaluation], crop: str, name: str) -> Iterator[float | None]:
    for evaluation in evaluations:
        dice = getattr(evaluation, crop)
        yield None if dice is None else getattr(dice, name).dice


def _row(e: CaseEvaluation) -> dict[str, Any]:
    row: dict[str, Any] = {"case": e.case_id, "trained_on": e.trained_on, "liver_found": e.found}
    row |= score_columns(e.predicted)
    for name in CLASSES:
        row[f"{name}_dice_label_crop"] = None if e.label_crop is None else getattr(e.label_crop, name).dice
        row[f"{name}_dice_grid_ceiling"] = None if e.ceiling is None else getattr(e.ceiling, name).dice
    return row
