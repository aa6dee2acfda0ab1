"""The fingerprint of a data set: grids, classes, intensities and tumours, and the augmentation levels that follow.

Everything is measured on prepared cases, so that a cache and a raw data set go through the same code:

- Spacings, slices, voxel counts and volumes are *native*: they come from the case's metadata.
- *Intensities*, in HU, are those of the cached voxels of the ``liver`` view (of ``scan`` without a labelled liver).
  A voxel counts toward each class by the fraction of its footprint that belongs to that class, and toward the
  background by the remainder. Cached voxels are box averages: less noisy than the native scan, and what a network
  sees.
- *Tumours* are 26-connected groups of cached voxels that contain any tumour; the volume is the sum of the
  fractions, so that small tumours are not lost. Two tumours closer than a cached voxel count as one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from data_cache.geometry import Grid
from data_cache.reader import CacheStore, natural_order
from data_cache.schema import FRACTION_ONE, LABEL_NAMES, CaseMeta, PreprocessSpec, View
from pipeline.decathlon import CaseFiles, RawDataSet
from pipeline.lesions import CUBE, equivalent_diameters_mm
from pipeline.prepare import prepare_case
from pipeline.workers import Failure, run_parallel

HU_FIRST, N_HU = -32768, 65536  # one bin per int16 value
PERCENTILES = (0.5, 5.0, 25.0, 50.0, 75.0, 95.0, 99.5)
LEVEL_IMAGES = 20  # number of random images from which the original estimated its augmentation levels
INPUT_CENTRE_HU, INPUT_SCALE_HU = 50.0, 200.0  # the network's input is (HU - 50) / 200
AIR_HU = -1024  # nothing is thinner than air: lower values are padding outside the field of view


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Mean and standard deviation of an image in the network's units, (HU - 50) / 200."""

    mean: float
    sd: float

    @classmethod
    def of(cls, image_zyx: NDArray[np.int16]) -> Self:
        """Over all voxels of an image in HU."""
        mean_hu, sd_hu = image_zyx.mean(dtype=np.float64), image_zyx.std(dtype=np.float64)
        return cls(mean=float((mean_hu - INPUT_CENTRE_HU) / INPUT_SCALE_HU), sd=float(sd_hu / INPUT_SCALE_HU))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CaseFingerprint:
    """The contribution of one case.

    Attributes:
        grid: The native grid.
        voxel_counts: Native voxels of background, liver and tumour; None without a label.
        histogram_ch: (3, 65536) int64: weights of background, liver and tumour by HU from -32768 up; each cached
            voxel has a total weight of 255.
        image: Moments over all voxels of the view, unweighted.
        image_no_padding: The same after values below -1024 HU were raised to -1024 HU.
        tumour_volumes_ml: Volume of each tumour, largest first.
    """

    case_id: str
    grid: Grid
    voxel_counts: tuple[int, int, int] | None
    histogram_ch: NDArray[np.int64]
    image: Moments
    image_no_padding: Moments
    tumour_volumes_ml: tuple[float, ...]

    def volume_ml(self, first_label: int) -> float | None:
        """Native volume of the labels ``first_label`` and higher; None without a label."""
        if self.voxel_counts is None:
            return None
        return sum(self.voxel_counts[first_label:]) * self.grid.voxel_volume_ml


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentationLevels:
    """How much images differ in brightness and contrast (the original project found 0.200 and 0.755).

    All voxels of an image's cached view (``liver``, or ``scan`` without a labelled liver), air included, in the
    network's units v = (HU - 50) / 200, have a mean m and a standard deviation s. Over the images,

        brightness = SD(m)    in units of 200 HU        contrast = SD(s) / mean(s)    a ratio

    with population standard deviations throughout (divided by n). None with fewer than two images.
    """

    brightness: float | None
    contrast: float | None


def fingerprint_cache(
    store: CacheStore, *, report: Callable[[CaseFingerprint | Failure[CaseMeta]], None]
) -> list[CaseFingerprint]:
    """Measure the cached cases; one thread reads 380 views per second."""
    found = []
    metas = [store.meta(case_id) for case_id in store.case_ids]
    for result in run_parallel(partial(_measure_cached, store=store), metas, jobs=1):
        report(result)
        if not isinstance(result, Failure):
            found.append(result)
    return found


def fingerprint_raw(
    data_set: RawDataSet,
    spec: PreprocessSpec,
    *,
    jobs: int,
    report: Callable[[CaseFingerprint | Failure[CaseFiles]], None],
) -> list[CaseFingerprint]:
    """Prepare the cases of a raw data set in memory, write nothing, and measure them; natural order."""
    found = []
    task = partial(_measure_raw, spec=spec, root=data_set.root)
    for result in run_parallel(task, data_set.cases, jobs=jobs):
        report(result)
        if not isinstance(result, Failure):
            found.append(result)
    return sorted(found, key=lambda case: natural_order(case.case_id))


def _measure_cached(meta: CaseMeta, *, store: CacheStore) -> CaseFingerprint:
    return fingerprint_case(meta, store.read(meta.case_id, _view_name(meta)))


def _measure_raw(files: CaseFiles, *, spec: PreprocessSpec, root: Path) -> CaseFingerprint:
    case = prepare_case(files.case_id, files.image, files.label, spec, root=root)
    return fingerprint_case(case.meta, case.views[_view_name(case.meta)])


def _view_name(meta: CaseMeta) -> str:
    return "liver" if "liver" in meta.boxes else "scan"


# ---- one case


def fingerprint_case(meta: CaseMeta, view: View) -> CaseFingerprint:
    """Measure one view of a case; without a label the histogram is all zero."""
    return CaseFingerprint(
        case_id=meta.case_id,
        grid=meta.grid,
        voxel_counts=meta.voxel_counts,
        histogram_ch=class_histograms(view),
        image=Moments.of(view.image_zyx),
        image_no_padding=Moments.of(np.maximum(view.image_zyx, np.int16(AIR_HU))),
        tumour_volumes_ml=tumour_volumes_ml(view),
    )


def class_histograms(view: View) -> NDArray[np.int64]:
    """(3, 65536) weights of background, liver and tumour at each HU; each cached voxel has a total weight of 255."""
    if view.fractions_czyx is None:
        return np.zeros((len(LABEL_NAMES), N_HU), dtype=np.int64)
    bins = view.image_zyx.ravel().astype(np.intp) - HU_FIRST
    liver, tumour = view.fractions_czyx.reshape(2, -1).astype(np.int64)
    weights = (FRACTION_ONE - liver - tumour, liver, tumour)
    # float64 adds whole numbers exactly up to 2**53; the weights of 131 cases add up to 2**36.
    return np.stack([np.bincount(bins, w, minlength=N_HU) for w in weights]).astype(np.int64)


def tumour_volumes_ml(view: View) -> tuple[float, ...]:
    """Volumes of the separate tumours, largest first."""
    if view.fractions_czyx is None:
        return ()
    tumour_zyx = view.fractions_czyx[1]
    ids, n_tumours = ndimage.label(tumour_zyx > 0, structure=CUBE)
    sums = np.bincount(ids.ravel(), tumour_zyx.ravel(), minlength=n_tumours + 1)[1:]
    volumes_ml = sums * (view.grid.voxel_volume_ml / FRACTION_ONE)
    return tuple(sorted(map(float, volumes_ml), reverse=True))


# ---- all cases


def draw_images(cases: Sequence[CaseFingerprint], *, rng: np.random.Generator) -> list[CaseFingerprint]:
    """Up to 20 cases, drawn without replacement, in the order of ``cases``."""
    drawn = rng.choice(len(cases), size=min(LEVEL_IMAGES, len(cases)), replace=False)
    return [cases[i] for i in sorted(drawn)]


def augmentation_levels(images: Sequence[Moments]) -> AugmentationLevels:
    """The augmentation levels that follow from the images' moments; see ``AugmentationLevels``."""
    if len(images) < 2:
        return AugmentationLevels(brightness=None, contrast=None)
    means, deviations = np.array([image.mean for image in images]), np.array([image.sd for image in images])
    return AugmentationLevels(
        brightness=float(means.std()),
        contrast=float(deviations.std() / deviations.mean()) if deviations.any() else None,
    )


def fingerprint(cases: Sequence[CaseFingerprint], *, seed: int) -> dict[str, Any]:
    """The fingerprint of a data set as plain numbers, strings and None.

    Args:
        cases: At least one.
        seed: Seed for drawing the images of the augmentation levels.
    """
    drawn = draw_images(cases, rng=np.random.default_rng(seed))
    spacings_zyx_mm = np.array([case.grid.spacing_zyx_mm for case in cases])
    shapes_zyx = np.array([case.grid.shape_zyx for case in cases])
    return {
        "n_cases": len(cases),
        "cases": [case.case_id for case in cases],
        "voxel_ratio": voxel_ratios(cases),
        "hu": {name: hu_statistics(h) for name, h in zip(LABEL_NAMES, total_histogram(cases), strict=True)},
        "spacing_mm": {axis: _spread(spacings_zyx_mm[:, i]) for i, axis in enumerate("zyx")},
        "shape": {axis: _spread(shapes_zyx[:, i]) for i, axis in enumerate("zyx")},
        "volume_ml": {
            "liver_with_tumour": _spread([v for case in cases if (v := case.volume_ml(1))]),
            "tumour": _spread([v for case in cases if (v := case.volume_ml(2))]),
        },
        "tumours": _tumours(cases),
        "augmentation": {
            **asdict(augmentation_levels([case.image for case in drawn])),
            "without_padding": asdict(augmentation_levels([case.image_no_padding for case in drawn])),
            "images": [case.case_id for case in drawn],
            "seed": seed,
            "unit_hu": INPUT_SCALE_HU,
        },
    }


def total_histogram(cases: Sequence[CaseFingerprint]) -> NDArray[np.int64]:
    """The sum of the cases' histograms."""
    total: NDArray[np.int64] = np.sum([case.histogram_ch for case in cases], axis=0)
    return total


def voxel_ratios(cases: Sequence[CaseFingerprint]) -> dict[str, list[float] | None]:
    """Background : liver : tumour in voxels of all cases, scaled so that the rarest class is 1; None without a label.

    "native" counts the labels' voxels in whole scans; "view" counts the cached voxels of the liver view, which is
    what a network trains on. (The original project found 14000 : 1100 : 1.)
    """
    counted = [case.voxel_counts for case in cases if case.voxel_counts is not None]
    native = np.sum(counted, axis=0) if counted else np.zeros(len(LABEL_NAMES))
    return {"native": _ratio(native), "view": _ratio(total_histogram(cases).sum(axis=1))}


def _ratio(counts: NDArray[Any]) -> list[float] | None:
    return [float(count / counts[counts > 0].min()) for count in counts] if counts.any() else None


def hu_statistics(weights_h: NDArray[np.int64]) -> dict[str, Any]:
    """Mean, standard deviation and percentiles of HU under these weights; None for a class that does not occur.

    The p-th percentile is the smallest HU with at least p percent of the weight at or below it.
    """
    total = int(weights_h.sum())
    if not total:
        return {"mean": None, "sd": None, "percentiles": None}
    hu = np.arange(HU_FIRST, HU_FIRST + N_HU, dtype=np.float64)
    mean = float(weights_h @ hu / total)
    cumulative = np.cumsum(weights_h)
    wanted = [math.ceil(total * p / 100) for p in PERCENTILES]
    at = np.searchsorted(cumulative, wanted)
    return {
        "mean": mean,
        "sd": math.sqrt(float(weights_h @ (hu - mean) ** 2 / total)),
        "percentiles": {f"{p:g}": int(HU_FIRST + i) for p, i in zip(PERCENTILES, at, strict=True)},
    }


def _tumours(cases: Sequence[CaseFingerprint]) -> dict[str, Any]:
    labelled = [case for case in cases if case.voxel_counts is not None]
    counts = [len(case.tumour_volumes_ml) for case in labelled]
    volumes_ml = [v for case in labelled for v in case.tumour_volumes_ml]
    return {
        "n": len(volumes_ml),
        "n_cases_with_any": sum(count > 0 for count in counts),
        "per_case": _spread(counts),
        "volume_ml": _spread(volumes_ml),
        "diameter_mm": _spread(equivalent_diameters_mm(np.array(volumes_ml, dtype=np.float64))),
    }


def _spread(values: Any) -> dict[str, float] | None:
    """Minimum, quartiles, maximum and mean; None without values."""
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        return None
    low, q1, median, q3, high = (float(v) for v in np.percentile(array, [0, 25, 50, 75, 100]))
    return {
        "min": low,
        "q25": q1,
        "median": median,
        "q75": q3,
        "max": high,
        "mean": float(array.mean()),
    }
