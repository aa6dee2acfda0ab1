"""What is fitted on held-back cases before others are scored: a temperature, and how far volume intervals reach."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_cache.errors import CacheError, ConfigError
from data_cache.reader import CacheStore
from data_cache.schema import FRACTION_ONE
from liverseg.inference.segment import Predictor, keep_largest_component
from liverseg.measure.calibration import (
    TemperatureFit,
    fit_temperature,
)
from liverseg.measure.near_liver import near_liver
from liverseg.measure.selective import (
    fit_widening,
)
from liverseg.measure.summary import CLASSES
from liverseg.measure.uncertainty import (
    VolumeInterval,
    mean_foreground,
    volume_interval,
)
from liverseg.training.split import Split
from pipeline.labels import decide


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was fitted on cases that neither trained the network nor are scored.

    Attributes:
        case_ids: Those cases.
        temperature: None without a voxel.
        widening: By class, how many standard deviations an interval of 90 % needs; None where the cases are too few.
    """

    case_ids: tuple[str, ...]
    temperature: TemperatureFit | None
    widening: Mapping[str, float | None]


def calibrate_apart(
    predictor: Predictor, store: CacheStore, split: Split, *, scored: Collection[str]
) -> Calibration:
    """``calibrate`` on the labelled cases of a store that were not trained on and are not scored, by their images' sha256.

    Raises:
        CacheError: The store has another spec than the network.
        ConfigError: It has no such case.
    """
    if store.schema.spec != predictor.spec:
        raise CacheError(f"{store.path}: built with another spec than the network was trained with")
    metas = [store.meta(case_id) for case_id in store.case_ids]
    known = {*split.train_sha256, *scored}
    apart = [m.case_id for m in metas if m.label is not None and m.image.sha256 not in known]
    if not apart:
        raise ConfigError(
            f"{store.path}: all of its labelled cases were trained on or are scored: nothing is left to calibrate on; "
            "score some of them with --case, or name another store"
        )
    return calibrate(predictor, store, apart)


def calibrate(predictor: Predictor, store: CacheStore, case_ids: Sequence[str]) -> Calibration:
    """Fit a temperature, and how far volume intervals must be widened, on cases that are not scored.

    On the cached grid and in the crop that the label gives, where a case costs the samples and no more; scores are of the
    predicted crop, which is nearly the same. A case without a liver has no such view and is left out.

    Args:
        predictor: With samples.
        store: The cache that holds the cases.
        case_ids: Labelled ones, never trained on.
    """
    with_liver = [case_id for case_id in case_ids if "liver" in store.meta(case_id).boxes]
    fitted = [_calibration_case(predictor, store, case_id) for case_id in with_liver]
    having = {name: [c for c in fitted if c.truth_ml[name] > 0] for name in CLASSES}
    return Calibration(
        case_ids=tuple(with_liver),
        temperature=fit_temperature([c.foreground_cv for c in fitted], [c.truth_v for c in fitted]),
        widening={
            name: fit_widening([c.intervals[name] for c in cases], [c.truth_ml[name] for c in cases])
            for name, cases in having.items()
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _CalibrationCase:
    foreground_cv: NDArray[np.float32]
    truth_v: NDArray[np.uint8]
    intervals: Mapping[str, VolumeInterval]
    truth_ml: Mapping[str, float]


def _calibration_case(predictor: Predictor, store: CacheStore, case_id: str) -> _CalibrationCase:
    view = store.read(case_id, "liver")
    assert view.fractions_czyx is not None
    samples_nczyx = predictor.draw(view.image_zyx)
    mean_czyx = mean_foreground(samples_nczyx)
    truth_czyx = view.fractions_czyx.astype(np.float32) / np.float32(FRACTION_ONE)
    truth_zyx, voxel_ml = decide(truth_czyx), view.grid.voxel_volume_ml
    predicted_zyx = decide(keep_largest_component(mean_czyx, voxel_volume_ml=voxel_ml))
    near_zyx = near_liver((truth_zyx > 0) | (predicted_zyx > 0), view.grid.spacing_zyx_mm)
    labels = [decide(keep_largest_component(sample, voxel_volume_ml=voxel_ml)) for sample in samples_nczyx]
    volumes = {"liver": [int((x > 0).sum()) for x in labels], "tumour": [int((x == 2).sum()) for x in labels]}
    _, liver_ml, tumour_ml = (store.meta(case_id).volume_ml(label) or 0.0 for label in range(3))
    return _CalibrationCase(
        foreground_cv=mean_czyx[:, near_zyx],
        truth_v=truth_zyx[near_zyx],
        intervals={name: volume_interval(np.array(v) * voxel_ml) for name, v in volumes.items()},
        truth_ml={"liver": liver_ml + tumour_ml, "tumour": tumour_ml},
    )
