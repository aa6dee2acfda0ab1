"""Which slices of a scan are worth a picture, and which part of them.

Volumes come in canonical RAS+ orientation, index growing towards the patient's right, front and head, and are
shown as a radiologist hangs them: right and front on the left, front and head on top. For axial, coronal and
sagittal planes alike that means turning both axes round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from liverseg.pictures.palette import Pen
from pipeline.nifti import FileAxis, VolumeStream, read_planes

Scalar = TypeVar("Scalar", bound=np.generic)
Spacing = tuple[float, float, float]
View = tuple[slice, slice, slice]
Along = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]

# Between fat (-100) and air (-1000), so that the skin is the edge of the body.
_BODY_ABOVE_HU = -300


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """One slice of a zyx volume: the axis it is cut across (0 axial, 1 coronal, 2 sagittal) and where."""

    axis: int
    index: int

    def take(self, volume_zyx: NDArray[Scalar]) -> NDArray[Scalar]:
        """The whole slice, in the order of the volume's axes; not copied."""
        slice_: NDArray[Scalar] = volume_zyx[(slice(None),) * self.axis + (self.index,)]
        return slice_

    def hang(self, taken: NDArray[Scalar], view: View) -> NDArray[Scalar]:
        """The part of a whole slice inside the box, as it hangs: rows from the top, columns from the left."""
        rows, columns = (part for axis, part in enumerate(view) if axis != self.axis)
        return taken[rows, columns][::-1, ::-1]

    def cut(self, volume_zyx: NDArray[Scalar], view: View) -> NDArray[Scalar]:
        """The part of the slice of a volume inside the box, as it hangs."""
        return self.hang(self.take(volume_zyx), view)

    def pixel_mm(self, spacing_zyx_mm: Spacing) -> tuple[float, float]:
        """Height and width of a pixel of the slice."""
        height, width = (s for axis, s in enumerate(spacing_zyx_mm) if axis != self.axis)
        return height, width

    def height_over_width(self, view: View, spacing_zyx_mm: Spacing) -> float:
        """Of what is cut, in mm."""
        sizes_mm = [(part.stop - part.start) * mm for part, mm in zip(view, spacing_zyx_mm, strict=True)]
        height, width = (size for axis, size in enumerate(sizes_mm) if axis != self.axis)
        return float(height / width)

    @property
    def name(self) -> str:
        """The direction of the cut, and its axis."""
        return ("axial z", "coronal y", "sagittal x")[self.axis]

    @property
    def sides(self) -> tuple[str, str]:
        """What is on the left and on the right of the picture."""
        return ("A", "P") if self.axis == 2 else ("R", "L")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outline:
    """One class of one label, its pen, and how many of its voxels each slice holds, along each axis.

    Attributes:
        take: Gives a whole slice of the label, as ``Plane.take`` does of a volume.
    """

    take: Callable[[Plane], NDArray[Any]]
    pen: Pen
    voxels_along_zyx: Along

    @property
    def empty(self) -> bool:
        """No voxel at all."""
        return not self.voxels_along_zyx[0].any()

    def largest(self, axis: int) -> int:
        """The slice with most voxels; the first of equals."""
        return int(self.voxels_along_zyx[axis].argmax())

    def extent(self, axis: int) -> slice:
        """From the first slice with a voxel past the last one."""
        return _extent(self.voxels_along_zyx[axis] > 0)


def outlines_of(label_zyx: NDArray[np.uint8] | None, pens: Sequence[Pen]) -> list[Outline]:
    """The classes that the label has, liver first; none without a label."""
    if label_zyx is None:
        return []
    return _outlines(
        _voxels_along(label_zyx, label_zyx.shape, pens), pens, take=lambda plane: plane.take(label_zyx)
    )


def outlines_of_file(
    path: Path, pens: Sequence[Pen], choose: Callable[[Sequence[Outline]], Sequence[Plane]]
) -> tuple[list[Outline], Sequence[Plane]]:
    """The classes of a label file, from which the planes that ``choose`` names can be taken; no volume in memory.

    Raises:
        VolumeError: The file cannot be read.
    """
    with VolumeStream.open(path) as stream:
        axes, shape_kji = stream.header.axes_kji, stream.header.shape_kji
        slices = (slice_ji for _, block_kji in stream.blocks() for slice_ji in block_kji)
        voxels = [_canonical(along_kji, axes) for along_kji in _voxels_along(slices, shape_kji, pens)]
    planes = choose(_outlines(voxels, pens, take=_not_read))
    slices_of = dict(zip(planes, read_planes(path, [(p.axis, p.index) for p in planes]), strict=True))
    return _outlines(voxels, pens, take=slices_of.__getitem__), planes


def _not_read(plane: Plane) -> NDArray[Any]:
    raise AssertionError(f"{plane} is asked for before it is read")


def _outlines(
    voxels: Sequence[Along], pens: Sequence[Pen], *, take: Callable[[Plane], NDArray[Any]]
) -> list[Outline]:
    drawn = (
        Outline(take=take, pen=pen, voxels_along_zyx=along) for along, pen in zip(voxels, pens, strict=True)
    )
    return [outline for outline in drawn if not outline.empty]


def _voxels_along(
    slices: Iterable[NDArray[np.uint8]], shape: tuple[int, ...], pens: Sequence[Pen]
) -> list[Along]:
    """How many voxels of each class the slices along each axis hold."""
    # Slice by slice: the comparison of a whole 512×512×1000 label is 260 MB.
    found = [tuple(np.zeros(n, dtype=np.int64) for n in shape) for _ in pens]
    for number, slice_ in enumerate(slices):
        if slice_.any():
            for (first, second, third), pen in zip(found, pens, strict=True):
                mask = slice_ >= pen.from_label
                first[number] = np.count_nonzero(mask)
                second += np.count_nonzero(mask, axis=1)
                third += np.count_nonzero(mask, axis=0)
    return [(first, second, third) for first, second, third in found]


def _canonical(along_kji: Along, axes_kji: Sequence[FileAxis]) -> Along:
    """The same along z, y and x."""
    turned = {
        axis.canonical: along[::-1] if axis.flipped else along
        for along, axis in zip(along_kji, axes_kji, strict=True)
    }
    return turned[0], turned[1], turned[2]


def whole_view(shape_zyx: tuple[int, ...]) -> View:
    """The box with all voxels."""
    z, y, x = (slice(0, n) for n in shape_zyx)
    return z, y, x


def overlay_planes(outlines: Sequence[Outline], shape_zyx: tuple[int, ...]) -> tuple[Plane, ...]:
    """Four axial planes from the head down, then a coronal and a sagittal one."""
    # The truth comes first, and decides unless it is empty.
    liver = next((o for o in outlines if o.pen.from_label == 1), None)
    tumour = next((o for o in outlines if o.pen.from_label == 2), None)
    heights = _spread(slice(0, shape_zyx[0]) if liver is None else liver.extent(0), count=4)
    if tumour is not None:
        heights = _with_nearest_replaced(heights, tumour.largest(0))
    through = liver if tumour is None else tumour
    y, x = (shape_zyx[axis] // 2 if through is None else through.largest(axis) for axis in (1, 2))
    return _axial_then_sides(heights, y, x)


def three_planes(outlines: Sequence[Outline], shape_zyx: tuple[int, ...]) -> tuple[Plane, Plane, Plane]:
    """The axial, the coronal and the sagittal plane with most tumour, or else most liver, or else in the middle."""
    through = max(outlines, key=lambda outline: outline.pen.from_label, default=None)
    z, y, x = (n // 2 if through is None else through.largest(axis) for axis, n in enumerate(shape_zyx))
    return Plane(axis=0, index=z), Plane(axis=1, index=y), Plane(axis=2, index=x)


def montage_planes(shape_zyx: tuple[int, ...], fractions_czyx: NDArray[np.uint8] | None) -> tuple[Plane, ...]:
    """18 axial planes from the head down, then the coronal and the sagittal one with most tumour, or liver."""
    heights = _spread(slice(0, shape_zyx[0]), count=18)
    y, x = shape_zyx[1] // 2, shape_zyx[2] // 2
    if fractions_czyx is not None and fractions_czyx.any():
        liver_zyx, tumour_zyx = fractions_czyx
        share_zyx = tumour_zyx if tumour_zyx.any() else liver_zyx
        y, x = (int(share_zyx.sum(axis=across, dtype=np.int64).argmax()) for across in ((0, 2), (0, 1)))
    return _axial_then_sides(heights, y, x)


def _axial_then_sides(heights: Sequence[int], y: int, x: int) -> tuple[Plane, ...]:
    axial = [Plane(axis=0, index=z) for z in sorted(heights, reverse=True)]
    return (*axial, Plane(axis=1, index=y), Plane(axis=2, index=x))


def _spread(extent: slice, *, count: int) -> list[int]:
    """The middles of so many equal parts: off the ends, where a liver is only a rim."""
    step = (extent.stop - extent.start) / count
    return [int(extent.start + step * (part + 0.5)) for part in range(count)]


def _with_nearest_replaced(heights: Sequence[int], wanted: int) -> list[int]:
    nearest = int(np.argmin([abs(z - wanted) for z in heights]))
    return [*heights[:nearest], wanted, *heights[nearest + 1 :]]


def overlay_view(
    axial_nyx: NDArray[np.int16], outlines: Sequence[Outline], depth: int, spacing_z_mm: float
) -> View:
    """The body with everything labelled, and 60 mm above and below that: a whole-body scan would be a thread.

    Args:
        axial_nyx: The axial slices that are shown: they tell the width of the body.
        outlines: Of everything that is labelled.
        depth: Slices of the scan.
        spacing_z_mm: Between these.
    """
    body_y, body_x = body_extent(axial_nyx)
    if not outlines:
        return slice(0, depth), body_y, body_x
    z, y, x = (_hull([outline.extent(axis) for outline in outlines]) for axis in range(3))
    return _widened(z, round(60.0 / spacing_z_mm), depth), _hull([y, body_y]), _hull([x, body_x])


def body_view(image_zyx: NDArray[np.int16], depth: slice) -> View:
    """The box worth showing at this depth: the body without its table, and a little air."""
    # A dozen slices tell the width of the body.
    some_zyx = image_zyx[depth][:: max(1, (depth.stop - depth.start) // 12)]
    return (depth, *body_extent(some_zyx))


def body_extent(axial_nyx: NDArray[np.int16]) -> tuple[slice, slice]:
    """Rows and columns of the body without its table in some axial slices, and a little air."""
    # In the mean of several slices a table is a thin line apart.
    pieces_yx, n_pieces = ndimage.label((axial_nyx > _BODY_ABOVE_HU).mean(axis=0) > 0.3)
    _, ny, nx = axial_nyx.shape
    if n_pieces == 0:
        return slice(0, ny), slice(0, nx)
    body_yx = pieces_yx == np.bincount(pieces_yx.ravel())[1:].argmax() + 1
    y, x = _extent(body_yx.any(axis=1)), _extent(body_yx.any(axis=0))
    return _widened(y, ny // 50, ny), _widened(x, nx // 50, nx)


def _extent(set_along: NDArray[np.bool_]) -> slice:
    set_at = np.flatnonzero(set_along)
    return slice(int(set_at[0]), int(set_at[-1]) + 1)


def _hull(parts: Sequence[slice]) -> slice:
    return slice(min(part.start for part in parts), max(part.stop for part in parts))


def _widened(part: slice, margin: int, size: int) -> slice:
    return slice(max(0, part.start - margin), min(size, part.stop + margin))


def axial_height_over_width(view: View, spacing_zyx_mm: Spacing) -> float:
    """Height over width of the axial pictures, within what a page bears."""
    return min(max(Plane(axis=0, index=0).height_over_width(view, spacing_zyx_mm), 0.5), 1.2)
