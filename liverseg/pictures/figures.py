"""Pictures of scans: one with the outlines of its labels, and a cached case at a glance.

All are drawn with matplotlib's objects and never with pyplot: no global state, no display, safe in threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from liverseg.pictures.palette import BOX_PEN, LIVER_TRUTH, PRED_PENS, TRUTH_PENS, TUMOUR_PRED
from liverseg.pictures.panel import area_key, draw_edge, draw_outlines, draw_shares, line_key, show_plane
from liverseg.pictures.planes import (
    Outline,
    Plane,
    Spacing,
    axial_height_over_width,
    body_view,
    montage_planes,
    outlines_of,
    outlines_of_file,
    overlay_planes,
    overlay_view,
    three_planes,
)
from liverseg.pictures.sheet import draw_legend, montage_layout, overlay_layout, row_layout
from pipeline.nifti import read_planes

SOFT_TISSUE_HU = (-110.0, 190.0)
Layout = Callable[[float], tuple[Figure, list[Axes]]]  # of the height over width of the axial panels


def overlay_figure(
    image_zyx: NDArray[np.int16],
    truth_zyx: NDArray[np.uint8] | None,
    pred_zyx: NDArray[np.uint8] | None,
    spacing_zyx_mm: Spacing,
    *,
    title: str,
    window_hu: tuple[float, float] = SOFT_TISSUE_HU,
) -> Figure:
    """Four axial slices, a coronal and a sagittal one, with the outlines of both labels.

    The slices are spread over the liver (of the truth, or else of the prediction, or else over the scan); one
    of the axial ones, and the other two, pass through the largest tumour area if there is one. A class that is
    nowhere has no outline and is not in the legend.

    Args:
        image_zyx: HU, canonical RAS+, any size; only the slices shown are looked at.
        truth_zyx: Labels 0/1/2 on the same grid, or None.
        pred_zyx: The same.
        spacing_zyx_mm: Distance between voxel centres.
        title: First line bold, the others (scores, say) smaller below it.
        window_hu: Shown as black and as white.
    """
    outlines = outlines_of(truth_zyx, TRUTH_PENS) + outlines_of(pred_zyx, PRED_PENS)
    planes = overlay_planes(outlines, image_zyx.shape)
    taken = [plane.take(image_zyx) for plane in planes]
    return _overlay(
        outlines,
        planes,
        taken,
        image_zyx.shape,
        spacing_zyx_mm,
        layout=partial(overlay_layout, title=title),
        window_hu=window_hu,
    )


def preview_figure(
    image: Path,
    label: Path,
    shape_zyx: tuple[int, int, int],
    spacing_zyx_mm: Spacing,
    *,
    title: str,
    alarm: bool,
) -> Figure:
    """The same of a predicted label on its scan's own slices, both read from their files: no volume in memory.

    Args:
        image: NIfTI file in HU.
        label: NIfTI file of labels 0/1/2 on the same grid.
        shape_zyx: Of that grid, canonical RAS+.
        spacing_zyx_mm: Distance between voxel centres.
        title: First line bold, the others smaller below it.
        alarm: Draw the others in a colour that is not overlooked.

    Raises:
        VolumeError: A file cannot be read.
    """
    outlines, planes = outlines_of_file(label, PRED_PENS, partial(overlay_planes, shape_zyx=shape_zyx))
    layout = partial(overlay_layout, title=title, alarm=alarm)
    return _drawn_from_file(image, outlines, planes, shape_zyx, spacing_zyx_mm, layout=layout)


def three_plane_figure(image: Path, label_zyx: NDArray[np.uint8], spacing_zyx_mm: Spacing) -> Figure:
    """An axial, a coronal and a sagittal slice of the scan in a row, through most of the tumour or of the liver."""
    outlines = outlines_of(label_zyx, PRED_PENS)
    planes = three_planes(outlines, label_zyx.shape)
    return _drawn_from_file(image, outlines, planes, label_zyx.shape, spacing_zyx_mm, layout=row_layout)


def _drawn_from_file(
    image: Path,
    outlines: Sequence[Outline],
    planes: Sequence[Plane],
    shape_zyx: tuple[int, ...],
    spacing_zyx_mm: Spacing,
    *,
    layout: Layout,
) -> Figure:
    taken = read_planes(image, [(plane.axis, plane.index) for plane in planes])
    return _overlay(
        outlines, planes, taken, shape_zyx, spacing_zyx_mm, layout=layout, window_hu=SOFT_TISSUE_HU
    )


def _overlay(
    outlines: Sequence[Outline],
    planes: Sequence[Plane],
    taken: Sequence[NDArray[np.int16]],
    shape_zyx: tuple[int, ...],
    spacing_zyx_mm: Spacing,
    *,
    layout: Layout,
    window_hu: tuple[float, float],
) -> Figure:
    axial_nyx = np.stack([slice_ for slice_, plane in zip(taken, planes, strict=True) if plane.axis == 0])
    view = overlay_view(axial_nyx, outlines, shape_zyx[0], spacing_zyx_mm[0])
    figure, axes = layout(axial_height_over_width(view, spacing_zyx_mm))
    for axis, plane, slice_ in zip(axes, planes, taken, strict=True):
        n_slices = shape_zyx[plane.axis]
        show_plane(axis, slice_, plane, view, spacing_zyx_mm, n_slices=n_slices, window_hu=window_hu)
        draw_outlines(axis, outlines, plane, view, spacing_zyx_mm)
    draw_legend(figure, [line_key(outline.pen) for outline in outlines])
    return figure


def case_montage(
    image_zyx: NDArray[np.int16],
    fractions_czyx: NDArray[np.uint8] | None,
    spacing_zyx_mm: Spacing,
    *,
    title: str,
    box_zyx: tuple[slice, slice, slice] | None = None,
    window_hu: tuple[float, float] = SOFT_TISSUE_HU,
) -> Figure:
    """A cached case at a glance: 18 axial slices over its depth, one coronal and one sagittal.

    Args:
        image_zyx: HU, canonical RAS+, as cached (64×128×128).
        fractions_czyx: Share of each voxel that is liver (without tumour) and that is tumour, 255 = all of it;
            None shows the image alone.
        spacing_zyx_mm: Distance between the cached voxels' centres.
        title: First line bold, the others smaller below it.
        box_zyx: Drawn as an outline: on the view of the whole scan, what the close view shows.
        window_hu: Shown as black and as white.
    """
    view = body_view(image_zyx, slice(0, image_zyx.shape[0]))
    figure, axes = montage_layout(axial_height_over_width(view, spacing_zyx_mm), title)
    for axis, plane in zip(axes, montage_planes(image_zyx.shape, fractions_czyx), strict=True):
        n_slices = image_zyx.shape[plane.axis]
        taken = plane.take(image_zyx)
        show_plane(axis, taken, plane, view, spacing_zyx_mm, n_slices=n_slices, window_hu=window_hu)
        if fractions_czyx is not None:
            liver, tumour = (plane.cut(share_zyx, view) * np.float32(1 / 255) for share_zyx in fractions_czyx)
            draw_shares(axis, liver, tumour, plane.pixel_mm(spacing_zyx_mm))
        if box_zyx is not None:
            inside_zyx = np.zeros(image_zyx.shape, dtype=np.float32)
            inside_zyx[box_zyx] = 1
            draw_edge(axis, plane.cut(inside_zyx, view), plane.pixel_mm(spacing_zyx_mm), BOX_PEN)
    keys: list[Artist] = []
    if fractions_czyx is not None:
        keys += [area_key("liver", LIVER_TRUTH), area_key("tumour", TUMOUR_PRED)]
    if box_zyx is not None:
        keys.append(line_key(BOX_PEN))
    draw_legend(figure, keys)
    return figure
