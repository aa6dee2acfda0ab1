"""A case's picture of doubt: where a network is unsure, beside the scan and what it found in it.

Drawn as in ``liverseg.pictures.figures``: no pyplot, and slices hang as a radiologist hangs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import ndimage

from liverseg.measure.uncertainty import MAX_ENTROPY
from liverseg.pictures.chart import draw_bar
from liverseg.pictures.palette import PRED_PENS, TEXT, TRUTH_PENS, Pen
from liverseg.pictures.panel import draw_outlines, line_key, note_sides, note_slice, show_values
from liverseg.pictures.planes import Plane, Spacing, outlines_of, whole_view
from liverseg.pictures.sheet import add_panel, draw_legend, rows_layout

NEAR_VOXELS = 3
MIN_INFORMATION_SCALE = 0.05  # nats: the samples of a network without any chance differ by rounding alone
# The predicted liver on the maps, thin over what lies beneath.
MAP_PENS = (Pen(name="", from_label=1, colour=TEXT, width=0.6, style="solid"),)
_PANEL_IN, _BAR_IN = 3.3, 1.05


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UncertaintyMaps:
    """What is shown of one case, all on one grid.

    Attributes:
        label_zyx: Predicted labels 0, 1, 2.
        entropy_zyx: Predictive entropy, nats.
        information_zyx: Mutual information, nats.
        tumour_zyx: Mean probability of tumour.
    """

    label_zyx: NDArray[np.uint8]
    entropy_zyx: NDArray[np.float32]
    information_zyx: NDArray[np.float32]
    tumour_zyx: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Column:
    """One kind of picture and its colour scale."""

    name: str
    cmap: str
    limits: tuple[float, float]


def uncertainty_figure(
    image_zyx: NDArray[np.int16],
    maps: UncertaintyMaps,
    spacing_zyx_mm: Spacing,
    *,
    title: str,
    truth_zyx: NDArray[np.uint8] | None = None,
    window_hu: tuple[float, float] = (-110.0, 190.0),
) -> Figure:
    """An axial and a coronal slice with most entropy, and with most tumour: CT, entropy, information, tumour.

    The outlines of the prediction, and of the truth if there is one, are on the CT; the predicted liver's is on
    the maps, too. The scale of the mutual information ends at the case's highest.

    Args:
        image_zyx: HU, canonical RAS+, on the grid of the maps.
        maps: What was found.
        spacing_zyx_mm: Distance between voxel centres.
        title: First line bold, the others smaller below it.
        truth_zyx: Labels 0, 1, 2, or None.
        window_hu: Shown as black and as white.
    """
    information_high = max(float(maps.information_zyx.max()), MIN_INFORMATION_SCALE)
    columns = (
        _Column(name="CT, HU", cmap="gray", limits=window_hu),
        _Column(name="predictive entropy, nats (at most ln 3)", cmap="inferno", limits=(0, MAX_ENTROPY)),
        _Column(name="mutual information, nats", cmap="inferno", limits=(0, information_high)),
        _Column(name="mean tumour probability", cmap="magma", limits=(0, 1)),
    )
    volumes: tuple[NDArray[Any], ...] = (image_zyx, maps.entropy_zyx, maps.information_zyx, maps.tumour_zyx)
    view = whole_view(image_zyx.shape)
    labels = outlines_of(truth_zyx, TRUTH_PENS) + outlines_of(maps.label_zyx, PRED_PENS)
    on_columns = (labels, *3 * (outlines_of(maps.label_zyx, MAP_PENS),))
    rows = _planes(maps, truth_zyx)
    heights_in = [_PANEL_IN * min(plane.height_over_width(view, spacing_zyx_mm), 1.5) for plane, _ in rows]
    figure, axes = rows_layout(title, heights_in, columns=4, width_in=_PANEL_IN, foot_in=_BAR_IN)
    for (plane, why), row in zip(rows, axes, strict=True):
        pixel_mm = plane.pixel_mm(spacing_zyx_mm)
        for axis, column, volume, outlines in zip(row, columns, volumes, on_columns, strict=True):
            show_values(axis, plane.cut(volume, view), pixel_mm, cmap=column.cmap, limits=column.limits)
            draw_outlines(axis, outlines, plane, view, spacing_zyx_mm)
        note_slice(row[0], plane, image_zyx.shape[plane.axis], why=why)
        note_sides(row[0], plane)
    _draw_bars(figure, axes[-1], columns)
    draw_legend(figure, [line_key(outline.pen) for outline in labels])
    return figure


def _planes(maps: UncertaintyMaps, truth_zyx: NDArray[np.uint8] | None) -> list[tuple[Plane, str]]:
    """Axial and coronal plane with most entropy near the predicted liver, then with most tumour, if any; one that is both
    comes once. A network that was hardly trained is a little unsure of all the air, which is most of a scan."""
    liver_zyx = maps.label_zyx > 0
    near_zyx = ndimage.binary_dilation(liver_zyx, iterations=NEAR_VOXELS) if liver_zyx.any() else ~liver_zyx
    truth = np.zeros(0) if truth_zyx is None else truth_zyx == 2
    tumour = truth if truth.any() else maps.label_zyx == 2
    most = {"most entropy": np.where(near_zyx, maps.entropy_zyx, 0)} | (
        {"most tumour": tumour} if tumour.any() else {}
    )
    found: dict[tuple[int, int], list[str]] = {}
    for why, volume in most.items():
        for axis in (0, 1):
            across = tuple(other for other in range(3) if other != axis)
            index = int(volume.sum(axis=across, dtype=np.float64).argmax())
            found.setdefault((axis, index), []).append(why)
    return [(Plane(axis=axis, index=index), " and ".join(why)) for (axis, index), why in found.items()]


def _draw_bars(figure: Figure, above: Sequence[Axes], columns: Sequence[_Column]) -> None:
    """The scale of each column under its last picture."""
    width_in = float(figure.get_size_inches()[0])
    for axis, column in zip(above, columns, strict=True):
        left_in = axis.get_position().x0 * width_in + 0.1
        bar = add_panel(figure, (left_in, _BAR_IN - 0.22, _PANEL_IN - 0.2, 0.12))
        draw_bar(figure, bar, axis.images[0], name=column.name)
