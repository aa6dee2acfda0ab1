"""One panel of a picture: a slice as it hangs, and the edges and shares of classes on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import Normal, Stroke
from numpy.typing import NDArray

from liverseg.pictures.palette import LIVER_TRUTH, TEXT, TUMOUR_PRED, Pen
from liverseg.pictures.planes import Outline, Plane, Spacing, View

Share = NDArray[np.float32]


def show_plane(
    axis: Axes,
    taken: NDArray[np.int16],
    plane: Plane,
    view: View,
    spacing_zyx_mm: Spacing,
    *,
    n_slices: int,
    window_hu: tuple[float, float],
) -> None:
    """Draw the part of a whole slice that is inside ``view``, with its number of ``n_slices`` and its sides."""
    picture = plane.hang(taken, view)
    extent = _extent_mm(picture.shape, plane.pixel_mm(spacing_zyx_mm))
    low, high = window_hu
    axis.imshow(picture, cmap="gray", vmin=low, vmax=high, extent=extent, interpolation="antialiased")
    _fill_panel(axis, width_mm=extent[1], height_mm=extent[2])
    _clear(axis)
    note_slice(axis, plane, n_slices)
    note_sides(axis, plane)


def show_values(
    axis: Axes,
    picture: NDArray[Any],
    pixel_mm: tuple[float, float],
    *,
    cmap: str,
    limits: tuple[float, float],
) -> AxesImage:
    """Draw a slice as it was cut, its voxels as they are, ``limits`` in the first and the last colour."""
    shown = axis.imshow(
        picture,
        cmap=cmap,
        vmin=limits[0],
        vmax=limits[1],
        extent=_extent_mm(picture.shape, pixel_mm),
        interpolation="nearest",
    )
    axis.autoscale(False)  # outlines begin half a pixel outside of the picture
    _clear(axis)
    return shown


def _clear(axis: Axes) -> None:
    axis.set(facecolor="black", xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def note_slice(axis: Axes, plane: Plane, n_slices: int, *, why: str = "") -> None:
    """Write which slice it is, counted from 1, and why it is shown."""
    number = f"{plane.name} {plane.index + 1}/{n_slices}"
    _note(axis, 0.02, 0.98, f"{number}: {why}" if why else number, va="top")


def note_sides(axis: Axes, plane: Plane) -> None:
    """Write what is on the left and on the right."""
    left, right = plane.sides
    _note(axis, 0.02, 0.5, left, weight="bold")
    _note(axis, 0.98, 0.5, right, weight="bold", ha="right")


def _note(
    axis: Axes, x: float, y: float, text: str, *, weight: str = "normal", ha: str = "left", va: str = "center"
) -> None:
    # Black around white: legible on air and on bone.
    halo = [Stroke(linewidth=2.2, foreground="black"), Normal()]
    written = axis.text(x, y, text, transform=axis.transAxes, color=TEXT, fontsize=8.5, ha=ha, va=va)
    written.set(fontweight=weight, path_effects=halo)


def _fill_panel(axis: Axes, *, width_mm: float, height_mm: float) -> None:
    """Centre the picture, and let the panel go on in black: flat and tall pictures stand in one grid."""
    panel = axis.get_window_extent()
    scale = max(width_mm / panel.width, height_mm / panel.height)
    spare_x, spare_y = panel.width * scale - width_mm, panel.height * scale - height_mm
    axis.set_xlim(-spare_x / 2, width_mm + spare_x / 2)
    axis.set_ylim(height_mm + spare_y / 2, -spare_y / 2)


def _extent_mm(shape: tuple[int, ...], pixel_mm: tuple[float, float]) -> tuple[float, float, float, float]:
    """Left, right, bottom, top: in mm, so that an equal aspect is the true one."""
    return 0.0, shape[1] * pixel_mm[1], shape[0] * pixel_mm[0], 0.0


def draw_outlines(
    axis: Axes, outlines: Sequence[Outline], plane: Plane, view: View, spacing_zyx_mm: Spacing
) -> None:
    """The edges that classes of labels have in a slice, in their order: the last is on top."""
    for outline in outlines:
        inside = plane.hang(outline.take(plane), view) >= outline.pen.from_label
        draw_edge(axis, inside.astype(np.float32), plane.pixel_mm(spacing_zyx_mm), outline.pen)


def draw_edge(
    axis: Axes, share: Share, pixel_mm: tuple[float, float], pen: Pen, *, closed: bool = True
) -> None:
    """The line where the share of a class is a half; nothing where there is no such place.

    ``closed`` draws it along the edge of the picture, too, where the class reaches that: not for a picture that is
    a part of what there is, in which a class goes on beyond the edge.
    """
    padded = np.pad(share, 1) if closed else np.pad(share, 1, mode="edge")
    if not padded.min() < 0.5 < padded.max():
        return  # matplotlib before 3.11 warns of a level outside the data
    y, x = ((np.arange(n) - 0.5) * mm for n, mm in zip(padded.shape, pixel_mm, strict=True))
    axis.contour(x, y, padded, levels=[0.5], colors=[pen.colour], linewidths=pen.width, linestyles=pen.style)


def draw_shares(axis: Axes, liver: Share, tumour: Share, pixel_mm: tuple[float, float]) -> None:
    """Both classes as a tint as strong as their share, and their edges."""
    for share, colour, strength in ((liver, LIVER_TRUTH, 0.25), (tumour, TUMOUR_PRED, 0.45)):
        tint = np.empty((*share.shape, 4), dtype=np.float32)
        tint[..., :3] = to_rgb(colour)
        tint[..., 3] = share * strength
        axis.imshow(tint, extent=_extent_mm(share.shape, pixel_mm), interpolation="nearest")
    draw_share_edges(axis, liver, tumour, pixel_mm)


def draw_share_edges(axis: Axes, liver: Share, tumour: Share, pixel_mm: tuple[float, float]) -> None:
    """The edges of the liver with its tumours, and of the tumours, from the shares of both."""
    for share, colour in ((liver + tumour, LIVER_TRUTH), (tumour, TUMOUR_PRED)):
        draw_edge(axis, share, pixel_mm, Pen(name="", from_label=0, colour=colour, width=1.1, style="solid"))


def line_key(pen: Pen) -> Line2D:
    """What the legend shows of an outline."""
    return Line2D([], [], color=pen.colour, lw=pen.width + 0.4, ls=pen.style, label=pen.name)


def area_key(name: str, colour: str) -> Patch:
    """What the legend shows of a tinted class."""
    return Patch(facecolor=to_rgba(colour, 0.35), edgecolor=colour, label=name)
