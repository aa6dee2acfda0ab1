"""Pictures of scans: one with the outlines of its labels, and a cached case at a glance.

All are drawn with matplotlib's objects and never with pyplot: no global state, no display, safe in threads.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from liverseg.pictures.palette import LIVER_TRUTH, PRED_PENS, TRUTH_PENS, TUMOUR_PRED
from liverseg.pictures.panel import area_key, draw_outlines, draw_shares, line_key, show_plane
from liverseg.pictures.planes import (
    Spacing,
    axial_height_over_width,
    body_view,
    montage_planes,
    outlines_of,
    overlay_planes,
    overlay_view,
)
from liverseg.pictures.sheet import draw_legend, montage_layout, overlay_layout


def overlay_figure(
    image_zyx: NDArray[np.int16],
    truth_zyx: NDArray[np.uint8] | None,
    pred_zyx: NDArray[np.uint8] | None,
    spacing_zyx_mm: Spacing,
    *,
    title: str,
    window_hu: tuple[float, float] = (-110.0, 190.0),
) -> Figure:
    """Four axial slices, a coronal and a sagittal one, with the outlines of both labels.

    The slices are spread over the liver (of the truth, or else of the prediction, or else over the scan); one
    of the axial ones, and the other two, pass through the largest tumour area if there is one. A class that is
    nowhere has no outline and is not in the legend.

    Args:
        image_zyx: HU, canonical RAS+, any size; only the slices shown are copied.
        truth_zyx: Labels 0/1/2 on the same grid, or None.
        pred_zyx: The same.
        spacing_zyx_mm: Distance between voxel centres.
        title: First line bold, the others (scores, say) smaller below it.
        window_hu: Shown as black and as white.
    """
    outlines = outlines_of(truth_zyx, TRUTH_PENS) + outlines_of(pred_zyx, PRED_PENS)
    planes = overlay_planes(outlines, image_zyx.shape)
    view = overlay_view(image_zyx, outlines, spacing_zyx_mm[0])
    figure, axes = overlay_layout(axial_height_over_width(view, spacing_zyx_mm), title)
    for axis, plane in zip(axes, planes, strict=True):
        show_plane(axis, image_zyx, plane, view, spacing_zyx_mm, window_hu=window_hu)
        draw_outlines(axis, outlines, plane, view, spacing_zyx_mm)
    draw_legend(figure, [line_key(outline.pen) for outline in outlines])
    return figure


def case_montage(
    image_zyx: NDArray[np.int16],
    fractions_czyx: NDArray[np.uint8] | None,
    spacing_zyx_mm: Spacing,
    *,
    title: str,
    window_hu: tuple[float, float] = (-110.0, 190.0),
) -> Figure:
    """A cached case at a glance: 18 axial slices over its depth, one coronal and one sagittal.

    Args:
        image_zyx: HU, canonical RAS+, as cached (64×128×128).
        fractions_czyx: Share of each voxel that is liver (without tumour) and that is tumour, 255 = all of it;
            None shows the image alone.
        spacing_zyx_mm: Distance between the cached voxels' centres.
        title: First line bold, the others smaller below it.
        window_hu: Shown as black and as white.
    """
    view = body_view(image_zyx, slice(0, image_zyx.shape[0]))
    figure, axes = montage_layout(axial_height_over_width(view, spacing_zyx_mm), title)
    for axis, plane in zip(axes, montage_planes(image_zyx.shape, fractions_czyx), strict=True):
        show_plane(axis, image_zyx, plane, view, spacing_zyx_mm, window_hu=window_hu)
        if fractions_czyx is not None:
            liver, tumour = (plane.cut(share_zyx, view) * np.float32(1 / 255) for share_zyx in fractions_czyx)
            draw_shares(axis, liver, tumour, plane.pixel_mm(spacing_zyx_mm))
    if fractions_czyx is not None:
        draw_legend(figure, [area_key("liver", LIVER_TRUTH), area_key("tumour", TUMOUR_PRED)])
    return figure
