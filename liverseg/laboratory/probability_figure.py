"""A picture of what a network says of a case: probabilities of liver and tumour beside the truth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, Stroke
from numpy.typing import NDArray

from liverseg.laboratory.figures import TITLE_IN, draw_scale, titled_figure
from liverseg.pictures.figures import LIVER_TRUTH, TEXT, TUMOUR_TRUTH, Plane, Spacing, View

Image = NDArray[np.int16]
Shares = NDArray[np.float32]

WINDOW_HU = (-110.0, 190.0)
PROBABILITY = "magma"  # black for none, and lighter with every step: it reads without colours, too
_BODY_ABOVE_HU = -300
_ZOOM_MM, _ZOOM_FACTOR = 70.0, 3.0


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
    views = [_body_view(image_zyx, plane)]
    if has_tumour:
        views.append(_zoom_view(truth_czyx[1], plane, spacing_zyx_mm))
    figure, axes = _probability_layout(views, spacing_zyx_mm, title)
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
    _draw_probability_keys(figure, has_tumour=has_tumour)
    return figure


def _body_view(image_zyx: Image, plane: Plane) -> View:
    """The body in its slice, so that it fills the picture."""
    body_yx = image_zyx[plane.index] > _BODY_ABOVE_HU
    if not body_yx.any():
        return slice(0, image_zyx.shape[0]), slice(0, image_zyx.shape[1]), slice(0, image_zyx.shape[2])
    y, x = (np.flatnonzero(body_yx.any(axis=axis)) for axis in (1, 0))
    return slice(0, image_zyx.shape[0]), slice(int(y[0]), int(y[-1]) + 1), slice(int(x[0]), int(x[-1]) + 1)


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


def _probability_layout(
    views: Sequence[View], spacing_zyx_mm: Spacing, title: str
) -> tuple[Figure, list[list[Axes]]]:
    """Three panels a row, as wide as each other and as high as their view needs."""
    width_in, gap_in, edge_in, foot_in, head_in = 4.3, 0.1, 0.2, 0.62, TITLE_IN + 0.32
    heights_in = [width_in * _height_over_width(view, spacing_zyx_mm) for view in views]
    size = (
        2 * edge_in + 3 * width_in + 2 * gap_in,
        head_in + foot_in + sum(heights_in) + gap_in * len(views),
    )
    figure = titled_figure(width_in=size[0], height_in=size[1], title=title)
    rows, top_in = [], size[1] - head_in
    for height_in in heights_in:
        lefts = [edge_in + column * (width_in + gap_in) for column in range(3)]
        box = [(left / size[0], (top_in - height_in) / size[1]) for left in lefts]
        rows.append([figure.add_axes((x, y, width_in / size[0], height_in / size[1])) for x, y in box])
        top_in -= height_in + gap_in
    return figure, rows


def _height_over_width(view: View, spacing_zyx_mm: Spacing) -> float:
    height, width = (
        (part.stop - part.start) * mm for part, mm in zip(view[1:], spacing_zyx_mm[1:], strict=True)
    )
    return float(height / width)


def _draw_row(
    row: Sequence[Axes],
    view: View,
    plane: Plane,
    image_zyx: Image,
    shares: tuple[Shares, Shares],
    spacing_zyx_mm: Spacing,
) -> None:
    height_mm, width_mm = plane.pixel_mm(spacing_zyx_mm)
    truth_czyx, foreground_czyx = shares
    liver_yx, tumour_yx = (_cut(plane, share, view) for share in (truth_czyx.sum(axis=0), truth_czyx[1]))
    pictures = (
        (plane.cut(image_zyx, view), "gray", WINDOW_HU),
        (_cut(plane, foreground_czyx.sum(axis=0), view), PROBABILITY, (0.0, 1.0)),
        (_cut(plane, foreground_czyx[1], view), PROBABILITY, (0.0, 1.0)),
    )
    rows, columns = liver_yx.shape
    extent = (0.0, columns * width_mm, rows * height_mm, 0.0)
    for axis, (picture, colours, (low, high)) in zip(row, pictures, strict=True):
        axis.imshow(picture, cmap=colours, vmin=low, vmax=high, extent=extent, interpolation="nearest")
        axis.set_axis_off()
        _draw_edge(axis, liver_yx, (height_mm, width_mm), colour=LIVER_TRUTH)
        _draw_edge(axis, tumour_yx, (height_mm, width_mm), colour=TUMOUR_TRUTH)
    for x, side, ha in ((0.015, plane.sides[0], "left"), (0.985, plane.sides[1], "right")):
        note = row[0].text(x, 0.5, side, color=TEXT, fontsize=10, ha=ha, transform=row[0].transAxes)
        # Black around white: legible on air and on bone.
        note.set(fontweight="bold", path_effects=[Stroke(linewidth=2.2, foreground="black"), Normal()])


def _cut(plane: Plane, share_zyx: Shares, view: View) -> Shares:
    _, y, x = view
    cut: Shares = share_zyx[plane.index, y, x][::-1, ::-1]
    return cut


def _draw_edge(axis: Axes, share_yx: Shares, pixel_mm: tuple[float, float], *, colour: str) -> None:
    if not share_yx.max() > 0.5 > share_yx.min():
        return
    y, x = ((np.arange(n) + 0.5) * mm for n, mm in zip(share_yx.shape, pixel_mm, strict=True))
    axis.contour(x, y, share_yx, levels=[0.5], colors=[colour], linewidths=1.6)


def _frame(views: Sequence[View], spacing_zyx_mm: Spacing) -> Rectangle:
    """Where the second row is in the first."""
    (_, whole_y, whole_x), (_, y, x) = views
    _, height_mm, width_mm = spacing_zyx_mm
    # Both axes are turned round.
    corner = ((whole_x.stop - x.stop) * width_mm, (whole_y.stop - y.stop) * height_mm)
    size = ((x.stop - x.start) * width_mm, (y.stop - y.start) * height_mm)
    return Rectangle(corner, *size, fill=False, ec=TEXT, lw=0.9, ls=(0, (3, 2)))


def _draw_probability_keys(figure: Figure, *, has_tumour: bool) -> None:
    width_in, height_in = figure.get_size_inches()
    keys = [Line2D([], [], color=LIVER_TRUTH, lw=2, label="liver, truth")]
    if has_tumour:
        keys.append(Line2D([], [], color=TUMOUR_TRUTH, lw=2, label="tumour, truth"))
        keys.append(Line2D([], [], color=TEXT, lw=1, ls=(0, (3, 2)), label="shown larger below"))
    figure.legend(
        handles=keys,
        loc="center left",
        bbox_to_anchor=(0.15 / width_in, 0.32 / height_in),
        ncols=3,
        frameon=False,
        labelcolor=TEXT,
        fontsize=10,
    )
    bar = figure.add_axes((1 - 4.4 / width_in, 0.38 / height_in, 4.2 / width_in, 0.13 / height_in))
    draw_scale(figure, bar, PROBABILITY, "probability")
