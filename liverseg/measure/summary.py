"""One label scored against another, and cases summed up: the one ruler for runs, folds and other tools' files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liverseg.measure.lesions import LesionScores, burden_errors, score_lesions, tumour_burden
from liverseg.measure.overlap import (
    CaseScores,
    ClassScores,
    DiceCounts,
    Spacing,
    bootstrap_mean,
    score_case,
)

SCORES, SUMMARY, VOLUMES = "scores.csv", "summary.json", "volumes"  # in the folder of an evaluation
NSD_TOLERANCE_MM = 2.0
CLASSES = ("liver", "tumour")
METRICS = ("dice", "voe_percent", "rvd_percent", "assd_mm", "hd_mm", "hd95_mm", "nsd")
EMPTY_RULE = (
    "liver is label >= 1; both masks empty: Dice 1 and distances 0; one empty: Dice 0 and no distance; "
    "means are over the cases that have the class in the truth; lesions are 26-connected, matched one to one "
    "by IoU, sized by the sphere of their volume; burden is tumour over liver volume, 0 without a liver"
)
NO_COUNTS = DiceCounts(intersection=0, predicted=0, truth=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelScores:
    """Everything that is measured of one predicted label.

    Attributes:
        overlap: Overlap, volumes and surface distances of both classes.
        lesions: Detection at IoU > 0 and at IoU > 0.5.
        burden_pred, burden_truth: Tumour over liver volume.
    """

    overlap: CaseScores
    lesions: tuple[LesionScores, ...]
    burden_pred: float
    burden_truth: float

    @property
    def liver(self) -> ClassScores:
        """Of label ≥ 1."""
        return self.overlap.liver

    @property
    def tumour(self) -> ClassScores:
        """Of label 2."""
        return self.overlap.tumour

    def of(self, name: str) -> ClassScores:
        """The scores of "liver" or "tumour"."""
        return self.liver if name == "liver" else self.tumour


def score_labels(
    pred_zyx: NDArray[np.uint8], truth_zyx: NDArray[np.uint8], spacing_zyx_mm: Spacing
) -> LabelScores:
    """Score a label against the true one on the grid that both share; raises ValueError where they do not."""
    return LabelScores(
        overlap=score_case(pred_zyx, truth_zyx, spacing_zyx_mm, tolerance_mm=NSD_TOLERANCE_MM),
        lesions=score_lesions(pred_zyx == 2, truth_zyx == 2, spacing_zyx_mm),
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
    return row | {"burden": scores.burden_pred, "burden_truth": scores.burden_truth}


def summarise_scores(cases: Sequence[LabelScores]) -> dict[str, Any]:
    """Means with bootstrap 95 % intervals, global Dice, detection by size and burden errors; plain JSON."""
    burden = burden_errors([c.burden_pred for c in cases], [c.burden_truth for c in cases])
    return {
        "rule": EMPTY_RULE,
        "nsd_tolerance_mm": NSD_TOLERANCE_MM,
        **{name: _summarise_class([case.of(name) for case in cases]) for name in CLASSES},
        "lesions": [at.to_json() for at in pooled_lesions(cases)],
        "burden": {"rmse": burden.rmse, "max_error": burden.max_abs, "n_cases": burden.n_cases},
    }


def pooled_lesions(cases: Sequence[LabelScores]) -> tuple[LesionScores, ...]:
    """The lesions of all cases together, one record a threshold; none without a case."""
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
        **{metric: interval([getattr(scores, metric) for scores in having]) for metric in METRICS},
        "global_dice": sum((scores.counts for scores in cases), start=NO_COUNTS).dice,
    }


def interval(values: Sequence[float | None]) -> dict[str, float | int | None]:
    """Mean and bootstrap 95 % interval, and how many cases had no value."""
    mean = bootstrap_mean(values, generator=np.random.default_rng(0))
    return {"mean": mean.mean, "low95": mean.low, "high95": mean.high, "n_undefined": mean.n_undefined}
