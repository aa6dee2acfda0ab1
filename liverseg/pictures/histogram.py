"""Intensities of a cached view by class, for the terminal."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from data_cache.schema import FRACTION_ONE, View

EDGES_HU = (-1100, -200, -150, -100, -50, -25, 0, 25, 50, 75, 100, 125, 150, 200, 300, 500, 3100)
BAR_CELLS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class HistogramBin:
    """Which share of all voxels, of the liver's and of the tumour's has ``low_hu`` ≤ HU < ``high_hu``."""

    low_hu: int
    high_hu: int
    everything: float
    liver: float
    tumour: float


def intensity_histogram(view: View) -> list[HistogramBin]:
    """Bins of HU from air to bone.

    Voxels count for a class with their fraction of it. A class without a voxel has zeros; what lies beyond the
    outer edges counts in the outer bins.
    """
    hu = np.clip(view.image_zyx, EDGES_HU[0], EDGES_HU[-1] - 1).ravel()
    fractions = np.zeros((2, hu.size)) if view.fractions_czyx is None else view.fractions_czyx.reshape(2, -1)
    weights = [np.ones(hu.size), *(fractions / FRACTION_ONE)]
    counts = [np.histogram(hu, EDGES_HU, weights=weight)[0] for weight in weights]
    everything, liver, tumour = (count / (count.sum() or 1) for count in counts)
    return [
        HistogramBin(
            low_hu=low,
            high_hu=high,
            everything=float(everything[i]),
            liver=float(liver[i]),
            tumour=float(tumour[i]),
        )
        for i, (low, high) in enumerate(itertools.pairwise(EDGES_HU))
    ]
