"""Whether a scan is a CT in Hounsfield units on a grid that a scanner could have made: what every command asks.

A *fault* makes ``preprocess`` and ``predict`` refuse the scan; a *warning* is said and no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_cache.errors import ImplausibleScanError
from data_cache.geometry import Grid
from data_cache.schema import MISSING_HU
from pipeline.nifti import VolumeHeader

SAMPLED_VOXELS = 200_000  # of an image, evenly spread: enough for percentiles and shares, and bounded
HU_RANGE = (MISSING_HU + 1, 32767)

# Air is -1000 HU, lung -900 to -600, fat -100, soft tissue with contrast 0 to 250, dense bone up to 2000.
PADDING_BELOW_HU = -1100.0  # nothing in a scanner is thinner than air
AIR_BELOW_HU = -500.0
FAT_BELOW_HU = -30.0
BODY_HU = (-200.0, 300.0)
BETWEEN_HU = (-600.0, -250.0)  # few voxels of any patient: borders of air and tissue
SOFT_HU = (-150.0, 200.0)
BONE_HU = (300.0, 650.0)
BRIGHT_HU = 3000.0  # metal fills no half per cent
# Soft tissue of HU + 1000 or + 1024, and air of HU times -1; in HU only dense bone.
OFFSET_SOFT_HU = (900.0, 1250.0)
LIVER_HU = (-40.0, 400.0)  # severe steatosis is at -30, an enhanced liver at 40 keV at 300
NARROW_HU = 300.0  # fat to enhanced liver alone is wider

LEAST_BODY = 0.02  # share of a scan that is soft tissue: 0.05 to 0.6 of whole scans
LEAST_FAT_AND_AIR = 0.005  # 0.25 to 0.9 of whole scans
MOST_TOO_THIN = 0.05  # below padding's limit and not padding: streaks of metal are well below 0.01
MOST_DENSE_BONE = 0.1  # below 0.003 of whole scans; 0.3 to 0.5 where the offset or the sign is wrong
LEAST_LIVER_VOXELS = 30  # of which noise leaves the median alone
LEAST_PEAK = 3.0  # soft tissue against what lies beside it, per HU: 5 and more in CT, 1 in noise

IMPOSSIBLE_SPACING_MM = (0.01, 50.0)
UNUSUAL_SPACING_MM = (0.2, 12.0)
# Left to right and back to front. No bore is wider than 850 mm, and no field of view of a trunk smaller than 100.
IMPOSSIBLE_WIDTH_MM = (5.0, 2500.0)
UNUSUAL_WIDTH_MM = (100.0, 850.0)
IMPOSSIBLE_LENGTH_MM = 2500.0  # a few slices may be as short as they like
IDENTITY_FROM_VOXELS = (
    400  # 1 mm voxels are real in small or resampled volumes, but scanners' 512×512 are finer
)
SKEWED = 0.02  # cosine between two axes

RESCALE = "undo the normalisation or apply the rescale slope and intercept: HU are needed"
CONVERT = "convert it again from DICOM, such as with dcm2niix"
OTHER_LABEL = "undo the rescaling, or list the label of this scan"
LOOK = "see that soft tissue is at 0 to 100"
HEADER = "correct the header, or convert it again from DICOM"

Severity = Literal["fault", "warning"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Doubt:
    """One thing that speaks against a scan.

    Attributes:
        severity: "fault" where the scan cannot be what it is taken for.
        remedy: What to do.
    """

    severity: Severity
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}"


def require_plausible(path: object, doubts: Sequence[Doubt], *, force: bool) -> None:
    """Raise ImplausibleScanError with all faults, unless ``force`` is set."""
    faults = "; ".join(str(doubt) for doubt in doubts if doubt.severity == "fault")
    if faults and not force:
        raise ImplausibleScanError(f"{path}: {faults} (with --force, or force=True, it is taken as it is)")


def scan_doubts(header: VolumeHeader, intensities: Intensities) -> list[Doubt]:
    """All that speaks against a scan: its values, then its grid. What the header's notes say is not repeated."""
    return [*intensity_doubts(intensities), *grid_doubts(header.grid)]


def liver_doubts(liver_hu: NDArray[Any]) -> list[Doubt]:
    """Whether voxels that a label calls liver, without tumour, can be liver in HU.

    The median, because lipiodol, clips, gas and the border of a rough label leave it alone.
    """
    if liver_hu.size < LEAST_LIVER_VOXELS:
        return []
    median_hu = float(np.median(liver_hu))
    if LIVER_HU[0] <= median_hu <= LIVER_HU[1]:
        return []
    what = (
        f"the labelled liver is at {median_hu:.0f} (median), expected {LIVER_HU[0]:g} to {LIVER_HU[1]:g} HU: "
        "the values are not HU, or the label is of another scan"
    )
    return [_fault(what, OTHER_LABEL)]


# ---- values


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Intensities:
    """What is learnt of an image while it streams by.

    Attributes:
        minimum_hu, maximum_hu: Over the finite voxels; NaN where there are none.
        sample_hu: Evenly spread finite voxels.
    """

    minimum_hu: float
    maximum_hu: float
    sample_hu: NDArray[np.float64]


class VoxelSample:
    """Evenly spread voxels of a volume, taken while it streams by: a few milliseconds per scan.

    Which voxels they are depends on the shape alone: the samples of an image and of its label correspond.
    """

    def __init__(self, shape_kji: Sequence[int]) -> None:
        # Odd, so that the sample does not stay in one column of voxels.
        self._step = max(1, int(np.prod(shape_kji)) // SAMPLED_VOXELS) | 1
        self._seen = 0
        self._parts: list[NDArray[Any]] = []

    def add(self, values: NDArray[Any]) -> None:
        """Take some voxels of the next block."""
        first = -self._seen % self._step
        self._seen += values.size
        self._parts.append(values.reshape(-1)[first :: self._step].copy())  # a view would keep the block

    def values(self) -> NDArray[Any]:
        """The voxels taken, as they were given."""
        return np.concatenate(self._parts) if self._parts else np.empty(0)

    def values_hu(self, slope: float, intercept: float) -> NDArray[np.float64]:
        """The voxels taken as value * slope + intercept, NaN and infinity among them."""
        with np.errstate(over="ignore", invalid="ignore"):
            values_hu: NDArray[np.float64] = self.values().astype(np.float64) * slope + intercept
        return values_hu

    def intensities(self, ends: tuple[float, float], *, slope: float, intercept: float) -> Intensities:
        """The finite voxels in HU = value * slope + intercept; ``ends`` are the least and largest of all finite values."""
        sample_hu = self.values_hu(slope, intercept)
        sample_hu = sample_hu[np.isfinite(sample_hu)]
        if not sample_hu.size:
            return Intensities(minimum_hu=np.nan, maximum_hu=np.nan, sample_hu=sample_hu)
        with np.errstate(over="ignore"):
            low, high = sorted(value * slope + intercept for value in ends)
        return Intensities(minimum_hu=low, maximum_hu=high, sample_hu=sample_hu)


def intensity_doubts(image: Intensities) -> list[Doubt]:
    """Whether the values can be Hounsfield units of a body, judged by their distribution and not by their extremes.

    Faults: no fat and no air (values from 0 up, whatever the padding says), next to no soft tissue, values thinner
    than air that are not padding, no peak of soft tissue, one where HU have dense bone only, or all within ``NARROW_HU``.
    Without air, or with much that is brighter than bone, they may be HU.
    """
    if not image.sample_hu.size:
        return [_fault("the image has no finite voxel", CONVERT)]
    low, high, found = image.minimum_hu, image.maximum_hu, []
    if low == high:
        return [_fault(f"all voxels of the image are {low:g}", CONVERT)]
    span = f"values are {low:g} to {high:g}"
    fault = _not_hu(image.sample_hu, low=low, high=high)
    if fault is not None:
        found.append(_fault(f"{span}, {fault}", CONVERT if "nothing but air" in fault else RESCALE))
    elif low > AIR_BELOW_HU:
        found.append(_warning(f"{span}: no air, so perhaps no HU, or clipped", LOOK))
    if float(np.percentile(image.sample_hu, 99.5)) > BRIGHT_HU:
        what = f"{span}, and 0.5 % of the voxels are above {BRIGHT_HU:g}: too bright for HU"
        found.append(_warning(what, LOOK))
    if low <= HU_RANGE[0] or high >= HU_RANGE[1]:
        found.append(_warning(f"{span}: beyond int16, clipped in the cache", RESCALE))
    return found


def _not_hu(sample_hu: NDArray[np.float64], *, low: float, high: float) -> str | None:
    """Why the values are not HU of a body, or None."""
    if high < AIR_BELOW_HU:
        return "nothing but air"
    inside = sample_hu[sample_hu >= PADDING_BELOW_HU]
    thin = sample_hu[sample_hu < PADDING_BELOW_HU]
    too_thin = np.count_nonzero(thin != low) / sample_hu.size  # padding is one value, the least
    if high - low < NARROW_HU or not inside.size:
        return f"not HU: {_guess(low, high)}"
    if np.count_nonzero(inside < FAT_BELOW_HU) / inside.size < LEAST_FAT_AND_AIR:
        return f"not HU: no fat and no air, {_guess(float(inside.min()), high)}"
    if too_thin > MOST_TOO_THIN:
        at = float(np.median(thin[thin != low]))
        return f"not HU: {100 * too_thin:.0f} % of the voxels are thinner than air, around {at:.0f}"
    body = _share(inside, *BODY_HU)
    if body < LEAST_BODY:
        return f"not HU of a body: {100 * body:.1f} % of the voxels are fat or soft tissue ({BODY_HU[0]:g} to {BODY_HU[1]:g})"
    beside = max(_share(inside, *BETWEEN_HU), _share(inside, *BONE_HU))
    if _share(inside, *SOFT_HU) < LEAST_PEAK * beside:
        return "not HU of a body: no peak of soft tissue around 0 to 100"
    dense = _share(inside, *OFFSET_SOFT_HU)
    if dense > MOST_DENSE_BONE:
        low_hu, high_hu = OFFSET_SOFT_HU
        return (
            f"not HU: {100 * dense:.0f} % of the voxels are {low_hu:g} to {high_hu:g}, which only dense bone is: "
            "HU + 1024, the rescale intercept lost? or HU times -1?"
        )
    return None


def _share(sample_hu: NDArray[np.float64], low_hu: float, high_hu: float) -> float:
    return float(np.count_nonzero((sample_hu >= low_hu) & (sample_hu < high_hu)) / sample_hu.size)


def _guess(low: float, high: float) -> str:
    if low >= 0 and high <= 1:
        return "normalised to 0..1?"
    if low >= 0 and high <= 255:
        return "gray values of a picture?"
    if low < 0 and high - low < NARROW_HU:
        return "normalised?"
    return "HU + 1024, the rescale intercept lost? or MR or PET?"


# ---- grid


def grid_doubts(grid: Grid) -> list[Doubt]:
    """Whether spacing and extent are those of a scanned body.

    Spacing and extent outside of what any scanner gives are faults: usually a wrong unit. Unusual ones, an identity
    affine on a scanner's matrix and skewed axes are warnings.
    """
    spacing_mm = np.array(grid.spacing_zyx_mm[::-1])
    extent_mm = spacing_mm * grid.shape_zyx[::-1]
    sizes = f"voxels of {_by(spacing_mm)} mm, {_by(extent_mm)} mm in all (left-right × front-back × length)"
    if (
        _outside(spacing_mm, IMPOSSIBLE_SPACING_MM)
        or _outside(extent_mm[:2], IMPOSSIBLE_WIDTH_MM)
        or extent_mm[2] > IMPOSSIBLE_LENGTH_MM
    ):
        return [_fault(f"no scanner makes {sizes}", "correct the unit or the spacing in the header")]
    found = []
    if _outside(spacing_mm, UNUSUAL_SPACING_MM) or _outside(extent_mm[:2], UNUSUAL_WIDTH_MM):
        found.append(_warning(f"unusual for a body: {sizes}", "see that unit and spacing are right"))
    if _is_identity(grid):
        what = f"the affine is an identity: voxels of exactly 1 mm on {grid.shape_zyx[2]}×{grid.shape_zyx[1]}"
        found.append(_warning(what, "volumes and lengths are wrong if the real spacing was lost"))
    skew = _skew(grid)
    if skew > SKEWED:
        what = f"the axes are skewed by {np.degrees(np.arcsin(min(skew, 1.0))):.0f}° (a tilted gantry?)"
        found.append(_warning(what, "see that the affine is right"))
    return found


def _outside(values: NDArray[np.float64], limits: tuple[float, float]) -> bool:
    return not bool(((values >= limits[0]) & (values <= limits[1])).all())


def _by(values: NDArray[np.float64]) -> str:
    return "×".join(f"{v:.3g}" for v in values)


def _is_identity(grid: Grid) -> bool:
    """Ones on the diagonal, up to signs, of a matrix as scanners make them."""
    unit = np.allclose(np.abs(grid.affine[:3, :3]), np.eye(3), atol=1e-6)
    return bool(unit) and min(grid.shape_zyx[1:]) >= IDENTITY_FROM_VOXELS


def _skew(grid: Grid) -> float:
    """The largest cosine between two axes: 0 at right angles."""
    axes = grid.affine[:3, :3] / np.linalg.norm(grid.affine[:3, :3], axis=0)
    return float(np.abs(axes.T @ axes - np.eye(3)).max())


def _fault(what: str, remedy: str) -> Doubt:
    return Doubt(severity="fault", what=what, remedy=remedy)


def _warning(what: str, remedy: str) -> Doubt:
    return Doubt(severity="warning", what=what, remedy=remedy)
