"""HU in and around a liver: facts by hand, and what deviates from the training cases."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from data_cache.errors import RunError
from data_cache.records import parse, to_json
from liverseg.measure.density import (
    INDEPENDENT,
    LOWEST_SD_HU,
    NO_LIVER_DEVIATION,
    DensityFacts,
    DensityReference,
    measure_density,
)

SPACING_MM = (2.0, 2.0, 2.0)


def a_scan(
    *, liver_hu: int = 100, tumour_hu: int = 40, around_hu: int = -80
) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """A liver of 20³ voxels with a tumour of 8³ in fat."""
    label = np.zeros((32, 32, 32), dtype=np.uint8)
    label[6:26, 6:26, 6:26], label[10:18, 10:18, 10:18] = 1, 2
    return np.choose(label, [around_hu, liver_hu, tumour_hu]).astype(np.int16), label


def facts(**hu: int) -> DensityFacts:
    found = measure_density(*a_scan(**hu), SPACING_MM)
    assert found is not None
    return found


def test_facts_by_hand() -> None:
    # Of the core of 18³ the tumour is 512 / 5832, more than 1 %: the 1st percentile is its HU.
    assert facts() == DensityFacts(liver_hu=100, low_hu=-60, high_hu=0, around_hu=-80, grain_hu=0)
    image, label = a_scan()
    assert measure_density(image, np.zeros_like(label), SPACING_MM) is None


def test_a_tumour_denser_than_any_deviates_and_an_ordinary_one_does_not() -> None:
    training = [facts(liver_hu=100 + d, tumour_hu=40 + d) for d in (-10, -5, 0, 5, 10)]
    reference = DensityReference.of(training)
    assert reference is not None
    assert reference.mean_hu == (100, -60, 0, -80, 0)
    assert reference.deviation(facts(liver_hu=103, tumour_hu=43)) < 1
    # 99th percentile 60 HU above the median, where it was 0 in training: 60 over the lowest deviation counted. The 1st
    # is 0 instead of -60, and so is the median of |it|: two of five facts, and neither explains the other.
    assert reference.deviation(facts(tumour_hu=160)) == pytest.approx(
        math.hypot(60 / LOWEST_SD_HU[1], 60 / LOWEST_SD_HU[2]) / math.sqrt(5)
    )
    assert reference.deviation(facts(liver_hu=0, tumour_hu=-60)) > 5
    assert reference.deviation(None) == NO_LIVER_DEVIATION
    assert DensityReference.of(training[:2]) is None


def test_what_other_facts_explain_deviates_less() -> None:
    # Brighter livers have brighter parts in training: one that is bright alone deviates more than one that is both.
    rng = np.random.default_rng(0)

    def one(liver_hu: float, high_hu: float) -> DensityFacts:
        return DensityFacts(liver_hu=liver_hu, low_hu=-30, high_hu=high_hu, around_hu=-50, grain_hu=5)

    levels = rng.normal(0, 1, (100, 2)) @ np.array([[1, 0.9], [0, 0.4]])
    reference = DensityReference.of([one(100 + 20 * a, 60 + 10 * b) for a, b in levels])
    assert reference is not None
    assert reference.correlation[0][2] == pytest.approx(
        float(np.corrcoef(*levels.T)[0][1]) * 100 / 105, abs=0.01
    )
    both, alone = reference.deviation(one(140, 80)), reference.deviation(one(140, 40))
    assert both < 1.2 < 2 < alone
    # Records of before it was kept say nothing of it.
    independent = replace(reference, correlation=INDEPENDENT)
    assert independent.deviation(one(140, 80)) == pytest.approx(independent.deviation(one(140, 40)), rel=0.1)
    read = parse(DensityReference, to_json(reference), source="a record", error=RunError)
    assert read == reference


def test_more_noise_than_in_training_deviates() -> None:
    rng = np.random.default_rng(0)
    image, label = a_scan()

    def noisy(sd_hu: float) -> DensityFacts:
        found = measure_density(
            (image + rng.normal(0, sd_hu, image.shape)).astype(np.int16), label, SPACING_MM
        )
        assert found is not None
        return found

    reference = DensityReference.of([noisy(sd_hu) for sd_hu in (4, 4.5, 5, 5.5, 6)])
    assert reference is not None
    # The median of |difference| of two normal values is 0.95 of their standard deviation.
    assert noisy(10).grain_hu == pytest.approx(9.5, rel=0.1)
    assert reference.deviation(noisy(5)) < 3 < reference.deviation(noisy(10))
