"""Whether a segmentation can be a liver: facts of an answer, ranges of the labels a network learnt from, a verdict.

The same facts are measured of training labels and of predictions, on the views that both have, so that they compare;
volumes are counted on the scan's own grid.
A *reason* alone makes an answer implausible: no patient has such a liver, or the network contradicts itself. A fact
outside of its range over the training labels is a *peculiarity*; two of them together also make it implausible.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict
from scipy import ndimage

from data_cache.geometry import Grid
from data_cache.records import STRICT

Mask = NDArray[np.bool_]

BODY_ABOVE_HU = -300.0
LUNG_HU = (-950.0, -500.0)  # bowel gas is thinner, but for its borders
TRUNK_SHARE = 0.15  # of the rows that a column of the trunk fills: a table and arms beside it fill less
CORE_VOXELS = 50  # fewer make no median

# What livers have, in any patient with a liver to segment. Volumes from atrophy to polycystic disease; HU from fatty
# livers without contrast to iron and arterial contrast.
LIVER_ML = (300.0, 5000.0)
LIVER_HU = (-20.0, 220.0)
NO_PATIENT_ML = (5.0, 10_000.0)  # outside of this not even a number is printed
LENGTH_MM = (50.0, 350.0)
OFFSET_RIGHT = (0.10, 0.70)  # 0 is the middle of the body, 1 its right side
MOST_TUMOUR = 0.8  # share of the liver
LEAST_AGREEMENT = 0.85  # Dice of coarse and fine pass: 0.92 and more where the Dice with the truth is
LEAST_IN_ONE_PIECE = 0.80  # of the coarse pass's liver
LEAST_CONFIDENCE = 0.80  # mean probability of what is called liver: 0.9 and more
LUNG_BELOW_ML, LUNG_BELOW_RATIO = 300.0, 3.0
WIDENED = 0.25  # of a training range's width, on each side: 32 cases do not have the extremes
PECULIARITIES = 2
ROUNDING = 1e-6  # of slices: a liver that leaves one slice free is not cut off


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFacts:
    """What can be measured of a labelled liver; None where it cannot.

    Attributes:
        liver_ml: With its tumours.
        tumour_share: Of the liver's volume.
        liver_hu: Median of the liver without tumours, its outermost voxels left out.
        tumour_contrast_hu: Median of the tumours minus ``liver_hu``.
        length_mm: From the lowest to the highest slice.
        sphericity: Surface of the ball of the same volume over the surface of the voxels: 1 only for a ball of round voxels.
        offset_right: How far right of the body's middle it lies: 1 is the body's right side.
        lung_above_ml, lung_below_ml: Lung above and below the liver's middle.
        cut_below, cut_above: It leaves less than one slice free at the end of the scan there.
        in_one_piece: Share of the coarse pass's liver that its largest component has; None of a label.
        agreement: Dice of coarse and fine pass; None of a label.
        confidence: Mean probability of the voxels that were called liver or tumour; None of a label.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    liver_ml: float
    tumour_share: float
    liver_hu: float | None
    tumour_contrast_hu: float | None
    length_mm: float
    sphericity: float
    offset_right: float | None
    lung_above_ml: float
    lung_below_ml: float
    cut_below: bool
    cut_above: bool
    in_one_piece: float | None = None
    agreement: float | None = None
    confidence: float | None = None

    def with_volumes(self, *, liver_ml: float, tumour_ml: float) -> Self:
        """The same with volumes that were counted on the scan's own grid."""
        return replace(self, liver_ml=liver_ml, tumour_share=tumour_ml / liver_ml)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceRanges:
    """Least and largest of some facts over training labels; None where no case has the fact."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    n_cases: int
    liver_ml: tuple[float, float] | None
    tumour_share: tuple[float, float] | None
    liver_hu: tuple[float, float] | None
    tumour_contrast_hu: tuple[float, float] | None
    length_mm: tuple[float, float] | None
    sphericity: tuple[float, float] | None

    @classmethod
    def of(cls, facts: Sequence[AnswerFacts]) -> Self:
        """Over these cases; what a scan's end cuts off says nothing of a whole liver."""
        whole = [f for f in facts if not (f.cut_below or f.cut_above)]
        names = {f.name for f in fields(cls)} - {"n_cases"}
        ranges = {name: _range(whole if name in OF_WHOLE_LIVERS else facts, name) for name in names}
        return cls(n_cases=len(facts), **ranges)

    @classmethod
    def together(cls, ranges: Sequence[Self]) -> Self:
        """What any member of an ensemble has seen."""
        names = [f.name for f in fields(cls) if f.name != "n_cases"]
        hulls = {name: _hull([limits for r in ranges if (limits := getattr(r, name))]) for name in names}
        return cls(n_cases=sum(r.n_cases for r in ranges), **hulls)


OF_WHOLE_LIVERS = ("liver_ml", "length_mm", "sphericity")


def _hull(ranges: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    return (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None


def _range(facts: Sequence[AnswerFacts], name: str) -> tuple[float, float] | None:
    values = [value for f in facts if (value := getattr(f, name)) is not None]
    return (min(values), max(values)) if values else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plausibility:
    """The verdict on one answer.

    Attributes:
        reasons: Why it is not plausible; empty where it is.
        peculiarities: What is unlike the training labels; not enough by itself, or part of a reason.
        facts: None where no liver was found.
    """

    reasons: tuple[str, ...]
    peculiarities: tuple[str, ...]
    facts: AnswerFacts | None

    @property
    def plausible(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.reasons


# ---- facts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelledView:
    """A label on the view that it was drawn or decided on, and the scan around it.

    Attributes:
        label_zyx: 0, 1 liver, 2 tumour, on ``grid``.
        image_zyx: HU, on ``grid``.
        scan_zyx: HU of the whole scan, on ``scan_grid``; both grids are canonical.
        slice_mm: Distance between the scan's own slices.
    """

    label_zyx: NDArray[np.uint8]
    image_zyx: NDArray[np.int16]
    grid: Grid
    scan_zyx: NDArray[np.int16]
    scan_grid: Grid
    slice_mm: float


def measure_facts(view: LabelledView) -> AnswerFacts | None:
    """The facts of a label, its volumes those of the view; None of an empty one."""
    liver_zyx = view.label_zyx > 0
    if not liver_zyx.any():
        return None
    hu, tumour_hu = _intensities(view, liver_zyx)
    index_zyx = np.array(ndimage.center_of_mass(liver_zyx))
    to_scan = np.linalg.inv(view.scan_grid.affine) @ view.grid.affine
    slices = np.flatnonzero(liver_zyx.any(axis=(1, 2)))
    low, high = ((to_scan @ [*index_zyx[:0:-1], z, 1.0])[2] for z in (slices[0] - 0.5, slices[-1] + 0.5))
    centre_xyz = (to_scan @ [*index_zyx[::-1], 1.0])[:3]
    # A view may have many slices for each of the scan's own, within which a border can lie anywhere.
    step = max(view.grid.spacing_zyx_mm[0], view.slice_mm) / view.scan_grid.spacing_zyx_mm[0] - ROUNDING
    lung_above_ml, lung_below_ml = _lung_ml(view, middle=float(centre_xyz[2]))
    return AnswerFacts(
        liver_ml=int(np.count_nonzero(liver_zyx)) * view.grid.voxel_volume_ml,
        tumour_share=int(np.count_nonzero(view.label_zyx == 2)) / int(np.count_nonzero(liver_zyx)),
        liver_hu=hu,
        tumour_contrast_hu=None if hu is None or tumour_hu is None else tumour_hu - hu,
        length_mm=float(slices[-1] - slices[0] + 1) * view.grid.spacing_zyx_mm[0],
        sphericity=sphericity(liver_zyx, view.grid.spacing_zyx_mm),
        offset_right=_offset_right(view, float(centre_xyz[0]), low=low, high=high),
        lung_above_ml=lung_above_ml,
        lung_below_ml=lung_below_ml,
        cut_below=bool(low < -0.5 + step),
        cut_above=bool(high > view.scan_grid.shape_zyx[0] - 0.5 - step),
    )


def _intensities(view: LabelledView, liver_zyx: Mask) -> tuple[float | None, float | None]:
    """Median HU of liver and of tumour, without the borders where there is enough of them."""
    liver = ndimage.binary_erosion(liver_zyx) & (view.label_zyx == 1)
    liver = liver if np.count_nonzero(liver) >= CORE_VOXELS else view.label_zyx == 1
    tumour = view.label_zyx == 2
    return _median(view.image_zyx[liver]), _median(view.image_zyx[tumour])


def _median(values: NDArray[np.int16]) -> float | None:
    return float(np.median(values)) if values.size else None


def sphericity(mask_zyx: Mask, spacing_zyx_mm: Sequence[float]) -> float:
    """π^(1/3) (6 V)^(2/3) / A (Wadell 1935), A being the voxels' faces: 0.67 of a ball, 0.81 of a cube."""
    padded = np.pad(mask_zyx, 1).astype(np.int8)
    face_mm2 = math.prod(spacing_zyx_mm) / np.asarray(spacing_zyx_mm)
    area_mm2 = sum(np.count_nonzero(np.diff(padded, axis=i)) * face_mm2[i] for i in range(3))
    volume_mm3 = int(np.count_nonzero(mask_zyx)) * math.prod(spacing_zyx_mm)
    return float(math.pi ** (1 / 3) * (6 * volume_mm3) ** (2 / 3) / area_mm2)


def _offset_right(view: LabelledView, x: float, *, low: float, high: float) -> float | None:
    """Where the index ``x`` lies in the trunk of the slices from ``low`` to ``high``; None where there is no trunk."""
    start = min(max(0, round(low)), view.scan_zyx.shape[0] - 1)
    body_zyx = view.scan_zyx[start : max(start + 1, round(high) + 1)] > BODY_ABOVE_HU
    columns = np.flatnonzero(body_zyx.mean(axis=(0, 1)) > TRUNK_SHARE)
    if not columns.size:
        return None
    middle, half = (columns[0] + columns[-1]) / 2, (columns[-1] - columns[0] + 1) / 2
    return float((x - middle) / half)


def _lung_ml(view: LabelledView, *, middle: float) -> tuple[float, float]:
    """Air inside the body that is as dense as lung, above and below a slice."""
    inside = np.stack([ndimage.binary_fill_holes(s > BODY_ABOVE_HU) for s in view.scan_zyx])
    lung = inside & (view.scan_zyx > LUNG_HU[0]) & (view.scan_zyx < LUNG_HU[1])
    # A border of air and tissue is as dense, but thin.
    lung = np.stack([ndimage.binary_opening(s) for s in lung])
    by_slice_ml = lung.sum(axis=(1, 2)) * view.scan_grid.voxel_volume_ml
    split = min(max(0, round(middle)), len(by_slice_ml))
    return float(by_slice_ml[split:].sum()), float(by_slice_ml[:split].sum())


# ---- verdict


def judge(facts: AnswerFacts | None, reference: ReferenceRanges | None) -> Plausibility:
    """The verdict on an answer; without a reference only what no patient has counts."""
    if facts is None:
        return Plausibility(reasons=("no liver was found",), peculiarities=(), facts=None)
    reasons = [*_impossible(facts), *_contradictions(facts)]
    peculiarities = [] if reference is None else list(_unlike(facts, reference))
    if len(peculiarities) >= PECULIARITIES:
        reasons.append("unlike the training labels: " + "; ".join(peculiarities))
    return Plausibility(reasons=tuple(reasons), peculiarities=tuple(peculiarities), facts=facts)


def _impossible(f: AnswerFacts) -> Iterator[str]:
    """What no patient has. A liver that the scan cuts off may be as small as it likes."""
    cut = f.cut_below or f.cut_above
    if f.liver_ml > LIVER_ML[1] or (f.liver_ml < LIVER_ML[0] and not (f.cut_below and f.cut_above)):
        yield f"the liver has {f.liver_ml:.0f} mL: expected {LIVER_ML[0]:.0f} to {LIVER_ML[1]:.0f}"
    if f.length_mm > LENGTH_MM[1] or (f.length_mm < LENGTH_MM[0] and not cut):
        yield f"the liver is {f.length_mm:.0f} mm long: expected {LENGTH_MM[0]:.0f} to {LENGTH_MM[1]:.0f}"
    if f.liver_hu is not None and not LIVER_HU[0] <= f.liver_hu <= LIVER_HU[1]:
        yield f"the liver has {f.liver_hu:.0f} HU: expected {LIVER_HU[0]:.0f} to {LIVER_HU[1]:.0f}"
    if f.offset_right is not None and not OFFSET_RIGHT[0] <= f.offset_right <= OFFSET_RIGHT[1]:
        yield _misplaced(f.offset_right)
    if f.lung_below_ml > max(LUNG_BELOW_ML, LUNG_BELOW_RATIO * f.lung_above_ml):
        yield (
            f"{f.lung_below_ml:.0f} mL of lung lie below the liver and {f.lung_above_ml:.0f} above: is the scan upside down?"
        )
    if f.tumour_share > MOST_TUMOUR:
        yield f"{100 * f.tumour_share:.0f} % of the liver are tumour"


def _misplaced(offset_right: float) -> str:
    side = "right" if offset_right > 0 else "left"
    where = f"{100 * abs(offset_right):.0f} % of the way from the middle of the body to its {side} side"
    mirrored = " (is the scan mirrored?)" if offset_right < -OFFSET_RIGHT[0] else ""
    return f"the liver's middle lies {where}: expected {100 * OFFSET_RIGHT[0]:.0f} to {100 * OFFSET_RIGHT[1]:.0f} % to the right{mirrored}"


def _contradictions(f: AnswerFacts) -> Iterator[str]:
    """Where the network contradicts itself."""
    if f.in_one_piece is not None and f.in_one_piece < LEAST_IN_ONE_PIECE:
        yield f"only {100 * f.in_one_piece:.0f} % of what was taken for liver hangs together"
    if f.agreement is not None and f.agreement < LEAST_AGREEMENT:
        yield f"coarse and fine pass disagree (Dice {f.agreement:.2f})"
    if f.confidence is not None and f.confidence < LEAST_CONFIDENCE:
        yield f"the network is unsure of the liver (mean probability {f.confidence:.2f})"


NAMES = {
    "liver_ml": "liver volume {:.0f} mL",
    "tumour_share": "tumour share {:.2f}",
    "liver_hu": "liver {:.0f} HU",
    "tumour_contrast_hu": "tumours {:+.0f} HU against the liver",
    "length_mm": "liver length {:.0f} mm",
    "sphericity": "sphericity {:.2f}",
}


def _unlike(f: AnswerFacts, reference: ReferenceRanges) -> Iterator[str]:
    for name, words in NAMES.items():
        value, limits = getattr(f, name), getattr(reference, name)
        if value is None or limits is None or (name in OF_WHOLE_LIVERS and (f.cut_below or f.cut_above)):
            continue
        margin = WIDENED * (limits[1] - limits[0])
        if not limits[0] - margin <= value <= limits[1] + margin:
            yield f"{words.format(value)} (training {_number(name, limits[0])} to {_number(name, limits[1])})"


def _number(name: str, value: float) -> str:
    return NAMES[name][NAMES[name].index("{") : NAMES[name].index("}") + 1].format(value)
