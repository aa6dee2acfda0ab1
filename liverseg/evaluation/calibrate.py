"""Fit a temperature and interval widths on held-back cases, through the native path that a user's scan takes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_cache.errors import CacheError, ConfigError
from data_cache.reader import CacheStore
from liverseg.evaluation.raw_case import native_case, native_label, read_raw_case, require_raw
from liverseg.evaluation.uncertainty import near_voxels
from liverseg.inference.calibration import WIDEST, Calibration, weight_checksums
from liverseg.inference.segment import Predictor, segment
from liverseg.inference.uncertainty_files import summarise_uncertainty
from liverseg.measure.calibration import fit_temperature_that_helps
from liverseg.measure.selective import fit_widening
from liverseg.measure.summary import CLASSES
from liverseg.measure.uncertainty import VolumeInterval
from liverseg.training.split import Split, image_identity

MAX_VOXELS = (
    100_000  # of a case, drawn at random: one temperature needs no more, and 512×512×500 has 10 million
)


def calibrate_apart(
    predictor: Predictor,
    store: CacheStore,
    split: Split,
    *,
    raw: Path,
    scored: Collection[str],
    report: Callable[[str, Exception | None], None] = lambda *_: None,
) -> Calibration:
    """``calibrate`` on the labelled cases of a store that were not trained on and are not scored.

    Args:
        predictor: With samples.
        store: The cache that holds the cases.
        split: What the networks were trained on.
        raw: Folder of the data set that the store was built from.
        scored: ``image_identity`` of the images that are scored, all together.
        report: As in ``calibrate``.

    Raises:
        CacheError: The store was built with another spec than the network was trained with.
        ConfigError: It has no such case.
        DataSetError: ``raw`` is another data set.
    """
    if store.schema.spec != predictor.spec:
        raise CacheError(f"{store.path}: built with another spec than the network was trained with")
    for case_id, failure in store.damaged.items():
        report(case_id, failure)
    known, apart = split.trained_on | set(scored), list[str]()
    for case_id in (i for i in store.case_ids if store.meta(i).label is not None):
        try:
            if known.isdisjoint(image_identity(store, case_id)):
                apart.append(case_id)
        except CacheError as failure:  # its voxels are damaged
            report(case_id, failure)
    if not apart:
        raise ConfigError(
            f"{store.path}: all of its labelled cases were trained on or are scored: nothing is left to calibrate on; "
            "score some of them with --case, or name another store"
        )
    require_raw(store, apart, raw)
    return calibrate(predictor, store, apart, raw=raw, report=report)


def calibrate(
    predictor: Predictor,
    store: CacheStore,
    case_ids: Sequence[str],
    *,
    raw: Path,
    report: Callable[[str, Exception | None], None] = lambda *_: None,
) -> Calibration:
    """Fit a temperature, and how far volume intervals must be widened, on cases that are not scored.

    Each case is segmented as a user's scan is, and compared with its label on its own grid: fitted on the cached grid,
    where a lesion of 6 mm has another volume, neither would hold where it is used.

    Args:
        predictor: With samples.
        store: The cache that holds the cases.
        case_ids: Labelled cases, never trained on.
        raw: Folder of the data set that the store was built from.
        report: Called with each case, and with why it could not be used; it does not stop the others.
    """
    fitted = []
    for case_id in case_ids:
        try:
            fitted.append(_calibration_case(predictor, store, case_id, raw))
        except Exception as failure:  # of whatever kind: it must not cost the other cases
            report(case_id, failure)
        else:
            report(case_id, None)
    having = {name: [c for c in fitted if c.truth_ml[name] > 0] for name in CLASSES}
    return Calibration(
        case_ids=tuple(case.case_id for case in fitted),
        spec_fingerprint=predictor.spec.fingerprint(),
        sources=predictor.sources,
        weights=weight_checksums(predictor),
        temperature=fit_temperature_that_helps(
            [c.foreground_cv for c in fitted], [c.truth_v for c in fitted]
        ),
        widening={
            name: _widening([c.intervals[name] for c in cases], [c.truth_ml[name] for c in cases])
            for name, cases in having.items()
        },
    )


def _widening(intervals: Sequence[VolumeInterval], truths_ml: Sequence[float]) -> float | None:
    """``fit_widening``; None also where only a factor would do that ``Calibration`` does not take."""
    factor = fit_widening(intervals, truths_ml)
    return factor if factor is not None and factor <= WIDEST else None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _CalibrationCase:
    case_id: str
    foreground_cv: NDArray[np.float32]
    truth_v: NDArray[np.uint8]
    intervals: Mapping[str, VolumeInterval]
    truth_ml: Mapping[str, float]


def _calibration_case(predictor: Predictor, store: CacheStore, case_id: str, raw: Path) -> _CalibrationCase:
    raw_case = read_raw_case(case_id, store, raw, predictor.spec)
    found = segment(raw_case.scan, predictor)
    box, header = found.box or raw_case.scan.scan_box, raw_case.label_header
    case = native_case(found, native_label(found.foreground_czyx, box, header), raw_case)
    foreground_cv, truth_v = near_voxels(case)
    at = np.random.default_rng(0).permutation(truth_v.size)[:MAX_VOXELS]
    summary = summarise_uncertainty(case.samples_nczyx, box, raw_case.scan.header)
    voxel_ml = header.grid.voxel_volume_ml
    return _CalibrationCase(
        case_id=case_id,
        foreground_cv=foreground_cv[:, at],
        truth_v=truth_v[at],
        intervals={"liver": summary.liver_ml, "tumour": summary.tumour_ml},
        truth_ml={
            "liver": int(np.count_nonzero(case.truth_zyx)) * voxel_ml,
            "tumour": int(np.count_nonzero(case.truth_zyx == 2)) * voxel_ml,
        },
    )
