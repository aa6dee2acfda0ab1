"""Whether the HU in and around a liver are like those that a network learned from: a test that needs no samples.

Samples agree on what a network is confidently wrong about, such as a tumour denser than any that it has seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict
from scipy import ndimage

from data_cache.records import STRICT
from liverseg.measure.near_liver import near_liver

MIN_VOXELS = 50  # fewer have no percentiles
MIN_CASES = 3
LOWEST_SD_HU = (2.0, 2.0, 2.0, 2.0, 0.3)  # by fact: few cases may happen to be alike
Five = tuple[float, float, float, float, float]
INDEPENDENT: tuple[Five, ...] = (
    (1.0, 0.0, 0.0, 0.0, 0.0),
    (0.0, 1.0, 0.0, 0.0, 0.0),
    (0.0, 0.0, 1.0, 0.0, 0.0),
    (0.0, 0.0, 0.0, 1.0, 0.0),
    (0.0, 0.0, 0.0, 0.0, 1.0),
)
NO_LIVER_DEVIATION = 100.0  # where there is no liver to look at: beyond any that was measured


@dataclass(frozen=True, slots=True, kw_only=True)
class DensityFacts:
    """HU of one scan, on a view of it.

    Attributes:
        liver_hu: Median inside the liver with its tumours, the outermost voxels left out.
        low_hu, high_hu: 1st and 99th percentile of the same voxels, relative to the median.
        around_hu: Median within 10 mm around it.
        grain_hu: Median difference between neighboring slices inside: the noise that is left in the view.
    """

    liver_hu: float
    low_hu: float
    high_hu: float
    around_hu: float
    grain_hu: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DensityReference:
    """The facts over training cases, in the order of ``DensityFacts``.

    Attributes:
        mean_hu, sd_hu: Mean and standard deviation in HU, the latter at least ``LOWEST_SD_HU``.
        correlation: Of the facts, drawn towards independence by 5 / (n + 5), since few cases tell little of it.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    n_cases: int
    mean_hu: Five
    sd_hu: Five
    correlation: tuple[Five, ...] = INDEPENDENT

    @classmethod
    def of(cls, facts: Sequence[DensityFacts]) -> Self | None:
        """The reference of these cases; None for fewer than ``MIN_CASES``."""
        if (n := len(facts)) < MIN_CASES:
            return None
        values = np.array([astuple(one) for one in facts])
        mean_hu, sd_hu = values.mean(axis=0), np.maximum(values.std(axis=0, ddof=1), LOWEST_SD_HU)
        deviations = (values - mean_hu) / sd_hu
        correlation = deviations.T @ deviations / (n - 1) * (n / (n + len(sd_hu)))
        np.fill_diagonal(correlation, 1.0)
        return cls(
            n_cases=n,
            mean_hu=_five(mean_hu),
            sd_hu=_five(sd_hu),
            correlation=tuple(_five(row) for row in correlation),
        )

    def deviation(self, facts: DensityFacts | None) -> float:
        """How unlike the training cases the facts are, 1 being usual; large without a liver.

        The Mahalanobis distance over the root of the number of facts: a deviation counts the more, the less the other
        facts explain it. A liver of 70 HU is ordinary, and so is one whose darkest and brightest parts are 40 HU
        apart; one that is both has hardly any contrast.
        """
        if facts is None:
            return NO_LIVER_DEVIATION
        deviations = (np.array(astuple(facts)) - self.mean_hu) / np.maximum(self.sd_hu, LOWEST_SD_HU)
        return math.sqrt(deviations @ np.linalg.solve(self.correlation, deviations) / len(deviations))


def _five(values: NDArray[np.float64]) -> Five:
    liver, low, high, around, grain = (round(float(value), 3) for value in values)
    return liver, low, high, around, grain


def measure_density(
    image_zyx: NDArray[np.int16], label_zyx: NDArray[np.uint8], spacing_zyx_mm: Sequence[float]
) -> DensityFacts | None:
    """Measure a labelled or segmented view in HU; None where the liver has too few voxels."""
    liver_zyx = label_zyx > 0
    core_zyx = ndimage.binary_erosion(liver_zyx)
    around_zyx = near_liver(liver_zyx, spacing_zyx_mm) & ~ndimage.binary_dilation(liver_zyx)
    if min(np.count_nonzero(core_zyx), np.count_nonzero(around_zyx)) < MIN_VOXELS:
        return None
    low, middle, high = np.percentile(image_zyx[core_zyx], (1, 50, 99))
    both_zyx = core_zyx[1:] & core_zyx[:-1]
    steps_hu = np.abs(np.diff(image_zyx.astype(np.int32), axis=0))[both_zyx]
    return DensityFacts(
        liver_hu=float(middle),
        low_hu=float(low - middle),
        high_hu=float(high - middle),
        around_hu=float(np.median(image_zyx[around_zyx])),
        grain_hu=float(np.median(steps_hu)) if steps_hu.size else 0.0,
    )
