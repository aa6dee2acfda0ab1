"""Whether the HU in and around a liver are like those that a network learned from: a test that needs no samples.

Samples agree on what a network is confidently wrong about, such as a tumour denser than any that it has seen.
"""

from __future__ import annotations

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
    """The facts over training cases, in the order of ``DensityFacts``: mean and standard deviation in HU."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    n_cases: int
    mean_hu: tuple[float, float, float, float, float]
    sd_hu: tuple[float, float, float, float, float]

    @classmethod
    def of(cls, facts: Sequence[DensityFacts]) -> Self | None:
        """The reference of these cases; None for fewer than ``MIN_CASES``."""
        if len(facts) < MIN_CASES:
            return None
        values = np.array([astuple(one) for one in facts])
        return cls(
            n_cases=len(facts), mean_hu=_five(values.mean(axis=0)), sd_hu=_five(values.std(axis=0, ddof=1))
        )

    def deviation(self, facts: DensityFacts | None) -> float:
        """How many standard deviations the most unusual fact is from the training mean; large without a liver."""
        if facts is None:
            return NO_LIVER_DEVIATION
        off_hu = np.abs(np.array(astuple(facts)) - self.mean_hu)
        return float((off_hu / np.maximum(self.sd_hu, LOWEST_SD_HU)).max())


def _five(values: NDArray[np.float64]) -> tuple[float, float, float, float, float]:
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
