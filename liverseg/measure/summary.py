"""One label scored against another, and cases summed up: the one ruler for runs, folds and other tools' files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liverseg.measure.lesions import (
    DetectionCounts,
    LesionDetails,
    LesionScores,
    burden_errors,
    lesion_details,
    score_lesions,
    tumour_burden,
)
from liverseg.measure.overlap import (
    NSD_CURVE_MM,
    CaseScores,
    ClassScores,
    DiceCounts,
    Spacing,
    mean_interval,
    score_case,
)

SCORES, SUMMARY, VOLUMES = "scores.csv", "summary.json", "volumes"  # in the folder of an evaluation
ROWS = "scores_sha256"  # key of a summary: the checksum of scores.csv
WEIGHTS = "weights_sha256"  # key of an evaluation's summary: the checksum of each network's weights
# Those of the FLARE 2022 and 2023 challenges' scoring code.
NSD_TOLERANCE_MM = {"liver": 5.0, "tumour": 2.0}
CLASSES = ("liver", "tumour")
METRICS = ("dice", "voe_percent", "rvd_percent", "assd_mm", "rmsd_mm", "hd_mm", "hd95_mm", "nsd")
BOUNDS = {
    "dice": (0.0, 1.0),
    "nsd": (0.0, 1.0),
    "voe_percent": (0.0, 100.0),
    "rvd_percent": (-100.0, math.inf),
}
BOUNDS |= {metric: (0.0, math.inf) for metric in METRICS if metric.endswith("_mm")}
EMPTY_RULE = (
    "liver is label >= 1; both masks empty: Dice 1 and distances 0; one empty: Dice 0 and no distance; "
    "means are over the cases that have the class in the truth, with Student's t intervals; lesions are 26-connected, "
    "matched one to one by IoU as often as possible, sized by the sphere of their volume; LiTS's own count merges "
    "face-connected lesions that overlaps join, before IoU > 0.5; burden is tumour over liver volume, 0 without a "
    "predicted liver (LiTS takes 9001 there)"
)
NO_COUNTS = DiceCounts(intersection=0, predicted=0, truth=0)
NO_LESIONS = DetectionCounts(true_positives=0, false_positives=0, false_negatives=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelScores:
    """Everything that is measured of one predicted label.

    Attributes:
        overlap: Overlap, volumes and surface distances of both classes.
        lesions: Detection one to one, at IoU > 0 and at IoU > 0.5.
        details: Detection as LiTS counts it, splits and merges, Dice and ASSD of each found lesion.
        burden_pred, burden_truth: Tumour over liver volume.
    """

    overlap: CaseScores
    lesions: tuple[LesionScores, ...]
    details: LesionDetails
    burden_pred: float
    burden_truth: float

    @property
    def liver(self) -> ClassScores:
        """The scores of label ≥ 1."""
        return self.overlap.liver

    @property
    def tumour(self) -> ClassScores:
        """The scores of label 2."""
        return self.overlap.tumour

    def of(self, name: str) -> ClassScores:
        """The scores of "liver" or "tumour"."""
        return self.liver if name == "liver" else self.tumour


def score_labels(
    pred_zyx: NDArray[np.uint8], truth_zyx: NDArray[np.uint8], spacing_zyx_mm: Spacing
) -> LabelScores:
    """Score a label against the true one on the grid that both share; raises ValueError where they do not."""
    return LabelScores(
        overlap=score_case(
            pred_zyx,
            truth_zyx,
            spacing_zyx_mm,
            liver_tolerance_mm=NSD_TOLERANCE_MM["liver"],
            tumour_tolerance_mm=NSD_TOLERANCE_MM["tumour"],
        ),
        lesions=score_lesions(pred_zyx == 2, truth_zyx == 2, spacing_zyx_mm),
        details=lesion_details(pred_zyx == 2, truth_zyx == 2, spacing_zyx_mm),
        burden_pred=tumour_burden(pred_zyx),
        burden_truth=tumour_burden(truth_zyx),
    )


def score_columns(scores: LabelScores) -> dict[str, float | int | None]:
    """A case as a row of ``scores.csv``: every metric, volume and lesion count by name."""
    row: dict[str, float | int | None] = {}
    for name in CLASSES:
        of = scores.of(name)
        row |= {f"{name}_{metric}": getattr(of, metric) for metric in METRICS}
        row |= {f"{name}_volume_ml": of.volume_pred_ml, f"{name}_volume_truth_ml": of.volume_truth_ml}
    for at in scores.lesions:
        counts, prefix = at.overall, f"lesions_iou{at.iou_threshold:g}"
        row |= {f"{prefix}_found": counts.true_positives, f"{prefix}_false_positives": counts.false_positives}
        row[f"{prefix}_missed"] = counts.false_negatives
    return (
        row
        | _detail_columns(scores.details)
        | {"burden": scores.burden_pred, "burden_truth": scores.burden_truth}
    )


def _detail_columns(details: LesionDetails) -> dict[str, float | int | None]:
    lits = details.lits
    return {
        "lesions_lits_found": lits.true_positives,
        "lesions_lits_false_positives": lits.false_positives,
        "lesions_lits_missed": lits.false_negatives,
        "lesions_split": details.n_split,
        "lesions_merged": details.n_merged,
        "lesions_dice": float(np.mean(details.dice)) if details.dice else None,
        "lesions_assd_mm": float(np.mean(details.assd_mm)) if details.assd_mm else None,
    }


def summarise_scores(cases: Sequence[LabelScores]) -> dict[str, Any]:
    """Means with 95 % intervals, global Dice, detection by size and burden errors; plain JSON."""
    burden = burden_errors([c.burden_pred for c in cases], [c.burden_truth for c in cases])
    return {
        "rule": EMPTY_RULE,
        "nsd_tolerance_mm": dict(NSD_TOLERANCE_MM),
        **{name: _summarise_class([case.of(name) for case in cases]) for name in CLASSES},
        "lesions": [at.to_json() for at in pooled_lesions(cases)],
        "lesion_details": _summarise_details([case.details for case in cases]),
        "burden": {"rmse": burden.rmse, "max_error": burden.max_abs, "n_cases": burden.n_cases},
    }


def pooled_lesions(cases: Sequence[LabelScores]) -> tuple[LesionScores, ...]:
    """The lesions of all cases together, one record per threshold; empty without a case."""
    if not cases:
        return ()
    first, *others = (case.lesions for case in cases)
    total = list(first)
    for lesions in others:
        total = [a + b for a, b in zip(total, lesions, strict=True)]
    return tuple(total)


def _summarise_class(cases: Sequence[ClassScores]) -> dict[str, Any]:
    having = [scores for scores in cases if scores.volume_truth_ml > 0]
    return {
        "n_cases_with_it": len(having),
        **{
            metric: interval([getattr(scores, metric) for scores in having], bounds=BOUNDS[metric])
            for metric in METRICS
        },
        "nsd_curve": _nsd_curve(having),
        "global_dice": sum((scores.counts for scores in cases), start=NO_COUNTS).dice,
    }


def interval(
    values: Sequence[float | None], *, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> dict[str, float | int | None]:
    """Mean and 95 % interval, how many cases they are of, and how many had no value."""
    mean = mean_interval(values, bounds=bounds)
    return {
        "mean": mean.mean,
        "low95": mean.low,
        "high95": mean.high,
        "n_cases": mean.n_cases,
        "n_undefined": mean.n_undefined,
    }


def _nsd_curve(cases: Sequence[ClassScores]) -> dict[str, list[float]] | None:
    """Mean NSD at each tolerance; None without a case."""
    if not cases:
        return None
    means = np.mean([scores.nsd_curve for scores in cases], axis=0)
    return {"tolerance_mm": list(NSD_CURVE_MM), "mean": means.tolist()}


def _summarise_details(cases: Sequence[LesionDetails]) -> dict[str, Any]:
    """LiTS's counts of all cases together, splits, merges, and means over all found lesions."""
    lits = sum((case.lits for case in cases), start=NO_LESIONS)
    dice, assd_mm = ([v for case in cases for v in getattr(case, name)] for name in ("dice", "assd_mm"))
    return {
        "lits": lits.to_json(),
        "n_split": sum(case.n_split for case in cases),
        "n_merged": sum(case.n_merged for case in cases),
        "n_found": len(dice),
        "dice": float(np.mean(dice)) if dice else None,
        "assd_mm": float(np.mean(assd_mm)) if assd_mm else None,
    }
