"""How sure a network is of one scan: entropy maps, volume intervals, possible lesions, the mean entropy of a case.

All on a view's grid, from n samples ``foreground_nczyx``: float32 (n, 2, Z, Y, X), the softmax probabilities of
liver and tumour; the background has the rest. A single network's one answer is n = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, special

from data_cache.geometry import Grid
from pipeline.labels import decide
from pipeline.lesions import CUBE, equivalent_diameters_mm

Samples = NDArray[np.float32]  # foreground_nczyx

MAX_ENTROPY = math.log(3)  # nats, of three classes alike
NEIGHBOURHOOD_VOXELS = 2  # around the liver: as far as segment.keep_liver leaves probabilities standing
# About three voxels of a view, which are 3 mm wide: what is smaller in every sample is speckle.
SMALLEST_LESION_MM = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeInterval:
    """A volume over samples.

    Attributes:
        mean_ml: Over the samples.
        sd_ml: Standard deviation over the samples (n - 1); 0 for a single one.
        low_ml, high_ml: 5 % and 95 % quantiles.
    """

    mean_ml: float
    sd_ml: float
    low_ml: float
    high_ml: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LesionCandidate:
    """One possible lesion; the fields are plain numbers, so that ``dataclasses.asdict`` is the JSON.

    Attributes:
        probability: Share of the samples that have tumour in it.
        peak: Highest mean tumour probability of its voxels.
        volume_ml: Mean over all samples, those without it counting 0.
        centre_mm: RAS+, of its voxels, each weighted by how many samples call it tumour.
    """

    probability: float
    peak: float
    volume_ml: float
    centre_mm: tuple[float, float, float]


def mean_foreground(foreground_nczyx: Samples) -> NDArray[np.float32]:
    """The samples' mean (2, Z, Y, X), summed in float64: n times the same sample gives that sample, bit for bit."""
    total_czyx = np.zeros(foreground_nczyx.shape[1:], dtype=np.float64)
    for foreground_czyx in foreground_nczyx:
        total_czyx += foreground_czyx
    return (total_czyx / len(foreground_nczyx)).astype(np.float32)


# ---- maps


def entropy(foreground_czyx: NDArray[np.float32]) -> NDArray[np.float32]:
    """Predictive entropy -Σ p log p of the three classes in nats, 0 to ln 3; exactly 0 where one class is sure.

    Probabilities that rounding took out of [0, 1] are put back.

    Args:
        foreground_czyx: (2, ...) of liver and tumour; the rest may have any shape.
    """
    liver, tumour = np.clip(foreground_czyx, 0, 1)
    total: NDArray[np.float32] = special.entr(liver) + special.entr(tumour)
    total += special.entr(np.clip(1 - liver - tumour, 0, 1))
    return total


def mutual_information(foreground_nczyx: Samples) -> NDArray[np.float32]:
    """H(mean) - mean H in nats: how far the samples disagree; 0 for one, or for n equal ones, never below.

    Houlsby et al. 2011 (arXiv:1112.5745), with the expectations over the samples.
    """
    expected_zyx = np.zeros(foreground_nczyx.shape[2:], dtype=np.float64)
    for foreground_czyx in foreground_nczyx:
        expected_zyx += entropy(foreground_czyx)
    gained_zyx = entropy(mean_foreground(foreground_nczyx)) - expected_zyx / len(foreground_nczyx)
    return np.maximum(gained_zyx, 0).astype(np.float32)


# ---- volumes and lesions


def volume_interval(volumes_ml: Sequence[float] | NDArray[np.float64]) -> VolumeInterval:
    """Mean, standard deviation and 5-95 % quantiles of the samples' volumes.

    Quantiles are Weibull's, at rank p·(n + 1) (Hyndman & Fan 1996, type 6), and not NumPy's default: if truth
    and samples come from one distribution, the interval then holds the truth in 90 % of the cases from 19
    samples on, and in (n - 1) / (n + 1) below, where it reaches from the least to the most. At 16 samples that
    is 88 %, and the default's is 80 %.

    Raises:
        ValueError: No volume.
    """
    volumes = np.asarray(volumes_ml, dtype=np.float64)
    if not volumes.size:
        raise ValueError("expected at least one sample's volume, got none")
    low, high = np.quantile(volumes, (0.05, 0.95), method="weibull")
    return VolumeInterval(
        mean_ml=float(volumes.mean()),
        sd_ml=float(volumes.std(ddof=1)) if volumes.size > 1 else 0.0,
        low_ml=float(low),
        high_ml=float(high),
    )


def lesion_candidates(
    foreground_nczyx: Samples, grid: Grid, *, smallest_mm: float = SMALLEST_LESION_MM
) -> list[LesionCandidate]:
    """Possible lesions, the likeliest first, and of equally likely ones the largest.

    They are the 26-connected components of all voxels that any sample calls tumour, so that samples which
    disagree on an outline still mean one lesion; two lesions that one sample joins are one.

    Args:
        foreground_nczyx: Samples; everything outside of the liver's component must be 0 in them.
        grid: Grid of the view.
        smallest_mm: A component smaller than a sphere of this diameter in every sample is left out as noise.
    """
    tumour_nzyx = np.stack([decide(foreground_czyx) == 2 for foreground_czyx in foreground_nczyx])
    lesion_zyx, n_lesions = ndimage.label(tumour_nzyx.any(axis=0), structure=CUBE)
    if not n_lesions:
        return []
    numbers = np.arange(1, n_lesions + 1)
    counted = [np.bincount(lesion_zyx[tumour_zyx], minlength=n_lesions + 1)[1:] for tumour_zyx in tumour_nzyx]
    voxels_nl = np.stack(counted)
    peaks = ndimage.maximum(mean_foreground(foreground_nczyx)[1], lesion_zyx, numbers)
    centres_zyx = ndimage.center_of_mass(tumour_nzyx.sum(axis=0, dtype=np.float64), lesion_zyx, numbers)
    diameters_mm = equivalent_diameters_mm(voxels_nl.max(axis=0) * grid.voxel_volume_ml)
    found = [
        LesionCandidate(
            probability=float((voxels_nl[:, i] > 0).mean()),
            peak=float(peaks[i]),
            volume_ml=float(voxels_nl[:, i].mean()) * grid.voxel_volume_ml,
            centre_mm=_ras_mm(grid, centres_zyx[i]),
        )
        for i in np.flatnonzero(diameters_mm >= smallest_mm)
    ]
    return sorted(found, key=lambda lesion: (-lesion.probability, -lesion.volume_ml))


def _ras_mm(grid: Grid, index_zyx: tuple[float, float, float]) -> tuple[float, float, float]:
    x, y, z = (float(mm) for mm in (grid.affine @ (*index_zyx[::-1], 1.0))[:3])
    return x, y, z


# ---- one number per case


def mean_entropy(foreground_nczyx: Samples, label_zyx: NDArray[np.uint8]) -> float:
    """Mean predictive entropy, in nats, in and around the predicted liver.

    Args:
        foreground_nczyx: Samples.
        label_zyx: What was predicted, the liver's component alone. Without any liver the number is the highest
            that there is, ln 3.
    """
    near_zyx = ndimage.binary_dilation(label_zyx > 0, iterations=NEIGHBOURHOOD_VOXELS)
    if not near_zyx.any():
        return MAX_ENTROPY
    return float(entropy(mean_foreground(foreground_nczyx))[near_zyx].mean(dtype=np.float64))
