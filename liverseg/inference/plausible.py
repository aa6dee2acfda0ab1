"""Whether what was found in a scan is believable: its facts beside those of the training labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from liverseg.inference.segment import ScanSegmentation, resample_to_box
from liverseg.measure.overlap import dice_counts
from liverseg.measure.plausibility import LabelledView, Plausibility, ReferenceRanges, judge, measure_facts
from liverseg.training.training_data import TrainingData
from pipeline.labels import decide, is_foreground
from pipeline.prepare import HeldScan


def judge_segmentation(
    found: ScanSegmentation, scan: HeldScan, training: Sequence[TrainingData | None]
) -> Plausibility:
    """The verdict on a segmentation.

    Args:
        found: What was found.
        scan: In which scan.
        training: What each network learned from. Where no network records it, only what no patient has counts.
    """
    known = [data.ranges for data in training if data is not None]
    reference = ReferenceRanges.together(known) if known else None
    if found.box is None:
        return judge(None, reference)
    close, label_zyx = scan.view(found.box), decide(found.foreground_czyx)
    view = LabelledView(
        label_zyx=label_zyx,
        image_zyx=close.image_zyx,
        grid=close.grid,
        scan_zyx=scan.scan_view.image_zyx,
        scan_grid=scan.scan_view.grid,
    )
    facts, liver_zyx = measure_facts(view), label_zyx > 0
    if facts is None:
        return judge(None, reference)
    coarse_czyx = resample_to_box(found.coarse_czyx, scan.scan_box, found.box)
    coarse_zyx = is_foreground(coarse_czyx.sum(axis=0))
    facts = replace(
        facts,
        in_one_piece=found.largest_share,
        agreement=dice_counts(coarse_zyx, liver_zyx).dice,
        confidence=float(np.mean(found.foreground_czyx.sum(axis=0)[liver_zyx], dtype=np.float64)),
    )
    return judge(facts, reference)
