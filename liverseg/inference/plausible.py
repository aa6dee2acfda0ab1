"""Whether what was found in a scan is believable: its facts beside those of the training labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from liverseg.inference.segment import ScanSegmentation, resample_to_box
from liverseg.measure.overlap import dice_counts
from liverseg.measure.plausibility import (
    AnswerFacts,
    LabelledView,
    Plausibility,
    ReferenceRanges,
    judge,
    measure_facts,
)
from liverseg.training.training_data import TrainingData
from pipeline.labels import decide, is_foreground
from pipeline.prepare import HeldScan


def measure_segmentation(found: ScanSegmentation, scan: HeldScan) -> AnswerFacts | None:
    """The facts of what was found in a scan, its volumes those of the network's view; None where no liver was found."""
    if found.box is None:
        return None
    close, label_zyx = scan.view(found.box), decide(found.foreground_czyx)
    view = LabelledView(
        label_zyx=label_zyx,
        image_zyx=close.image_zyx,
        grid=close.grid,
        scan_zyx=scan.scan_view.image_zyx,
        scan_grid=scan.scan_view.grid,
        slice_mm=scan.header.grid.spacing_zyx_mm[0],
    )
    facts, liver_zyx = measure_facts(view), label_zyx > 0
    if facts is None:
        return None
    coarse_czyx = resample_to_box(found.coarse_czyx, scan.scan_box, found.box)
    coarse_zyx = is_foreground(coarse_czyx.sum(axis=0))
    return replace(
        facts,
        in_one_piece=found.largest_share,
        agreement=dice_counts(coarse_zyx, liver_zyx).dice,
        confidence=float(np.mean(found.foreground_czyx.sum(axis=0)[liver_zyx], dtype=np.float64)),
    )


def judge_segmentation(
    facts: AnswerFacts | None, training: Sequence[TrainingData | None], *, liver_ml: float, tumour_ml: float
) -> Plausibility:
    """The verdict on a segmentation.

    Args:
        facts: From ``measure_segmentation``.
        training: What each network learned from. Where no network records it, only what no patient has counts.
        liver_ml: Volume of the label on the scan's own grid, with its tumours: the one that the user is told.
        tumour_ml: Volume of its tumours.
    """
    known = [data.ranges for data in training if data is not None]
    reference = ReferenceRanges.together(known) if known else None
    if facts is None or not liver_ml:
        return judge(None, reference)
    return judge(facts.with_volumes(liver_ml=liver_ml, tumour_ml=tumour_ml), reference)
