"""A picture of what a network says of a case: probabilities of liver and tumour beside the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from liverseg.pictures.chart import draw_bar
from liverseg.pictures.palette import TEXT, TRUTH_PENS
from liverseg.pictures.panel import draw_edge, line_key, note_sides, show_values
from liverseg.pictures.planes import Plane, Spacing, View, body_view
from liverseg.pictures.sheet import add_panel, draw_legend, rows_layout

Image = NDArray[np.int16]
Shares = NDArray[np.float32]

WINDOW_HU = (-110.0, 190.0)
PROBABILITY = "magma"  # black for none, and lighter with every step: it reads without colours, too
_ZOOM_MM, _ZOOM_FACTOR = 70.0, 3.0
_PANEL_IN = 4.3
_FRAME = (0, (3, 2))


def probability_figure(
    image_zyx: Image, truth_czyx: Shares, foreground_czyx: Shares, spacing_zyx_mm: Spacing, *, title: str
) -> Figure:
    """The slice with the largest tumour area: the scan, the probability of liver, and that of tumour.

    The truth's outlines are on all three. Below them the same around that tumour; a case without one has the slice
    with most liver, and no second row. Voxels are shown as they are, unsmoothed.

    Args:
        image_zyx: HU, canonical RAS+, on the cached grid.
        truth_czyx: Shares of liver (without tumour) and of tumour.
        foreground_czyx: Probabilities of the same.
        spacing_zyx_mm: Distance between voxel centres.
        title: First line bold, the others smaller below it.
    """
    has_tumour = bool((truth_czyx[1] > 0.5).any())
    areas_z = (truth_czyx[1] if has_tumour else truth_czyx.sum(axis=0)).sum(axis=(1, 2))
    plane = Plane(axis=0, index=int(areas_z.argmax()))
    views = [body_view(image_zyx, slice(plane.index, plane.index + 1))]
    if has_tumour:
        views.append(_zoom_view(truth_czyx[1], plane, spacing_zyx_mm))
    heights_in = [_PANEL_IN * plane.height_over_width(view, spacing_zyx_mm) for view in views]
    figure, axes = rows_layout(title, heights_in, columns=3, width_in=_PANEL_IN, head_in=0.27, foot_in=0.8)
    for row, view in zip(axes, views, strict=True):
        _draw_row(row, view, plane, image_zyx, (truth_czyx, foreground_czyx), spacing_zyx_mm)
    depth = image_zyx.shape[0]
    names = (
        f"CT, axial slice {plane.index + 1} of {depth}",
        "probability of liver or tumour",
        "probability of tumour",
    )
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, color=TEXT, fontsize=11, pad=6)
    if has_tumour:
        axes[0][0].add_patch(_frame(views, spacing_zyx_mm))
    keys = [line_key(pen) for pen in TRUTH_PENS[: 1 + has_tumour]]
    if has_tumour:
        keys.append(Line2D([], [], color=TEXT, lw=1, ls=_FRAME, label="shown larger below"))
    draw_legend(figure, keys)
    bar = add_panel(figure, (float(figure.get_size_inches()[0]) - 4.4, 0.54, 4.2, 0.12))
    draw_bar(figure, bar, axes[0][1].images[0], name="probability")
    return figure


def _zoom_view(tumour_zyx: Shares, plane: Plane, spacing_zyx_mm: Spacing) -> View:
    """A square around the tumour that is largest in the slice's plane, with what surrounds it."""
    tumour_yx = tumour_zyx[plane.index]
    # Around the centre of mass: of several tumours, most of what there is stays in the picture.
    inside = np.argwhere(tumour_yx > 0.5 * tumour_yx.max())
    extent_mm = float(np.max((np.ptp(inside, axis=0) + 1) * spacing_zyx_mm[1:]))
    side_mm = max(_ZOOM_MM, _ZOOM_FACTOR * extent_mm)
    parts = []
    for centre, size, mm in zip(inside.mean(axis=0), tumour_yx.shape, spacing_zyx_mm[1:], strict=True):
        width = min(size, round(side_mm / mm))
        start = min(max(0, round(centre - width / 2)), size - width)
        parts.append(slice(start, start + width))
    return slice(0, tumour_zyx.shape[0]), parts[0], parts[1]


def _draw_row(
    row: Sequence[Axes],
    view: View,
    plane: Plane,
    image_zyx: Image,
    shares: tuple[Shares, Shares],
    spacing_zyx_mm: Spacing,
) -> None:
    pixel_mm = plane.pixel_mm(spacing_zyx_mm)
    truth_czyx, foreground_czyx = shares
    truths = [plane.cut(share_zyx, view) for share_zyx in (truth_czyx.sum(axis=0), truth_czyx[1])]
    pictures: tuple[tuple[NDArray[Any], str, tuple[float, float]], ...] = (
        (plane.cut(image_zyx, view), "gray", WINDOW_HU),
        (plane.cut(foreground_czyx.sum(axis=0), view), PROBABILITY, (0.0, 1.0)),
        (plane.cut(foreground_czyx[1], view), PROBABILITY, (0.0, 1.0)),
    )
    for axis, (picture, colours, limits) in zip(row, pictures, strict=True):
        show_values(axis, picture, pixel_mm, cmap=colours, limits=limits)
        for truth_yx, pen in zip(truths, TRUTH_PENS, strict=True):
            draw_edge(axis, truth_yx, pixel_mm, pen, closed=False)
    note_sides(row[0], plane)


def _frame(views: Sequence[View], spacing_zyx_mm: Spacing) -> Rectangle:
    """Where the second row is in the first."""
    (_, whole_y, whole_x), (_, y, x) = views
    _, height_mm, width_mm = spacing_zyx_mm
    # Both axes are turned round.
    corner = ((whole_x.stop - x.stop) * width_mm, (whole_y.stop - y.stop) * height_mm)
    size = ((x.stop - x.start) * width_mm, (y.stop - y.start) * height_mm)
    return Rectangle(corner, *size, fill=False, ec=TEXT, lw=0.9, ls=_FRAME)
