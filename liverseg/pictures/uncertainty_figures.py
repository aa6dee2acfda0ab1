"""Pictures of doubt: whether probabilities are frequencies, whether doubt finds bad cases, and where it lies.

Drawn as in ``liverseg.pictures.figures``: no pyplot, and slices hang as a radiologist hangs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke
from numpy.typing import NDArray

from liverseg.evaluation.calibration import ReliabilityCounts
from liverseg.evaluation.ranking import RiskCoverage
from liverseg.inference.uncertainty import MOST_ENTROPY
from liverseg.pictures.figures import (
    BACKGROUND,
    DPI,
    GRID,
    LIVER_PRED,
    LIVER_TRUTH,
    MUTED,
    PANEL,
    PRED_PENS,
    TEXT,
    TRUTH_PENS,
    TUMOUR_PRED,
    TUMOUR_TRUTH,
    Pen,
    Plane,
    Spacing,
)

CLASS_COLOURS = {"liver": LIVER_TRUTH, "tumour": TUMOUR_PRED}
CURVE_COLOURS = (LIVER_TRUTH, LIVER_PRED, TUMOUR_PRED, TUMOUR_TRUTH)
LEAST_INFORMATION_SCALE = 0.05  # nats: the samples of a network without any chance differ by rounding alone
_DASHED, _DOTTED = (0, (5, 3)), (0, (1, 2.5))
_PANEL_IN, _GAP_IN, _EDGE_IN, _TITLE_IN, _BAR_IN = 3.3, 0.06, 0.2, 0.85, 1.05


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
    low: float
    high: float


# ---- curves


def reliability_figure(
    before: Mapping[str, ReliabilityCounts], after: Mapping[str, ReliabilityCounts] | None, *, title: str
) -> Figure:
    """Share of voxels that are of a class against the probability given, a column a class; below, how many voxels.

    Args:
        before: By class name, at least one; a class without a voxel has an empty panel.
        after: The same classes after temperature scaling, or None.
        title: First line bold, the others smaller below it.
    """
    figure = _figure(width_in=0.4 + 5.0 * len(before), height_in=7.4)
    _draw_title(figure, title)
    axes = figure.subplots(2, len(before), squeeze=False, height_ratios=(3.2, 1), sharex=True)
    margin = 0.72 / float(figure.get_size_inches()[0])
    figure.subplots_adjust(left=margin, right=0.98, top=0.85, bottom=0.085, wspace=0.24, hspace=0.1)
    for (upper, lower), (name, counts) in zip(axes.T, before.items(), strict=True):
        for axis in (upper, lower):
            _style(axis)
        upper.plot([0, 1], [0, 1], color=MUTED, lw=1.0, ls=_DASHED, label="calibrated")
        _draw_reliability((upper, lower), counts, "as predicted", colour=CLASS_COLOURS.get(name, TEXT))
        if after is not None:
            label = "after temperature"
            _draw_reliability((upper, lower), after[name], label, colour=LIVER_PRED, style=_DASHED)
        upper.set(xlim=(0, 1), ylim=(0, 1))
        lower.set_yscale("log")
        lower.set_ylim(bottom=0.7)
        _name(upper, name, x="", y="share of voxels of the class")
        _name(lower, "", x=f"probability of {name}", y="voxels")
        upper.legend(frameon=False, labelcolor=TEXT, fontsize=9.5, loc="upper left")
    return figure


def _draw_reliability(
    axes: tuple[Axes, Axes], counts: ReliabilityCounts, label: str, *, colour: str, style: Any = "solid"
) -> None:
    upper, lower = axes
    filled = counts.n_voxels > 0
    ece = "no voxel" if counts.ece is None else f"ECE {counts.ece:.4f}"
    line = {"color": colour, "ls": style, "marker": "o", "ms": 4.5, "label": f"{label}: {ece}"}
    upper.plot(counts.confidence[filled], counts.frequency[filled], lw=1.8, **line)
    # A tenth of a voxel is below the axis: an empty bin would otherwise break the logarithmic line.
    edges = np.linspace(0, 1, filled.size + 1)
    lower.stairs(np.maximum(counts.n_voxels, 0.1), edges, color=colour, lw=1.6, ls=style)


def risk_coverage_figure(curves: Mapping[str, RiskCoverage], *, title: str, risk: str = "1 - Dice") -> Figure:
    """Mean risk of the most certain cases against how many are kept; dashed the best order, dotted any order.

    Args:
        curves: By name, at most four; one alone has its excess over the optimum shaded.
        title: First line bold, the others smaller below it.
        risk: What it is the mean of.
    """
    figure = _figure(width_in=7.6, height_in=5.6)
    _draw_title(figure, title)
    axis = figure.add_axes((0.1, 0.11, 0.87, 0.7))
    _style(axis)
    for (name, curve), colour in zip(curves.items(), CURVE_COLOURS, strict=False):
        if curve.aurc is None or curve.excess_aurc is None:
            continue
        label = f"{name}: AURC {curve.aurc:.4f}, excess {curve.excess_aurc:.4f}, {curve.coverage.size} cases"
        axis.plot(curve.coverage, curve.selective_risk, color=colour, lw=1.9, marker="o", ms=3.2, label=label)
        axis.plot(curve.coverage, curve.optimum, color=colour, lw=1.2, ls=_DASHED)
        axis.axhline(curve.selective_risk[-1], color=colour, lw=1.0, ls=_DOTTED)
        if len(curves) == 1:
            axis.fill_between(curve.coverage, curve.optimum, curve.selective_risk, color=colour, alpha=0.12)
    axis.set_xlim(0, 1.02)
    room = 1.2 + 0.1 * len(curves)  # for the legend
    axis.set_ylim(0, room * axis.dataLim.y1 if axis.lines else 1.0)
    _name(axis, "", x="coverage: share of cases kept, most certain first", y=f"mean {risk} of the cases kept")
    keys = [
        *axis.get_legend_handles_labels()[0],
        Line2D([], [], color=MUTED, ls=_DASHED, lw=1.2, label="best order"),
        Line2D([], [], color=MUTED, ls=_DOTTED, lw=1.0, label="random order"),
    ]
    axis.legend(handles=keys, frameon=False, labelcolor=TEXT, fontsize=9.5, loc="upper left")
    return figure


# ---- slices


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
    information_high = max(float(maps.information_zyx.max()), LEAST_INFORMATION_SCALE)
    columns = (
        _Column(name="CT, HU", cmap="gray", low=window_hu[0], high=window_hu[1]),
        _Column(name="predictive entropy, nats (at most ln 3)", cmap="inferno", low=0, high=MOST_ENTROPY),
        _Column(name="mutual information, nats", cmap="inferno", low=0, high=information_high),
        _Column(name="mean tumour probability", cmap="magma", low=0, high=1),
    )
    volumes: tuple[NDArray[Any], ...] = (image_zyx, maps.entropy_zyx, maps.information_zyx, maps.tumour_zyx)
    rows = _planes(maps, truth_zyx)
    figure, axes, bars = _slice_layout([plane for plane, _ in rows], image_zyx.shape, spacing_zyx_mm, title)
    for (plane, why), row in zip(rows, axes, strict=True):
        pixel_mm = plane.pixel_mm(spacing_zyx_mm)
        for axis, column, volume in zip(row, columns, volumes, strict=True):
            shown = _show(axis, _cut(volume, plane), column, pixel_mm)
            _draw_outlines(axis, plane, pixel_mm, maps=maps, truth_zyx=truth_zyx, on_image=axis is row[0])
            if axis in axes[-1]:
                _draw_bar(figure, shown, bars[row.index(axis)], column.name)
        _note_plane(row[0], plane, image_zyx.shape[plane.axis], why)
    _draw_key(figure, truth_zyx, maps.label_zyx)
    return figure


def _planes(maps: UncertaintyMaps, truth_zyx: NDArray[np.uint8] | None) -> list[tuple[Plane, str]]:
    """Axial and coronal plane with most entropy, then with most tumour, if any; one that is both comes once."""
    truth = np.zeros(0) if truth_zyx is None else truth_zyx == 2
    tumour = truth if truth.any() else maps.label_zyx == 2
    most = {"most entropy": maps.entropy_zyx} | ({"most tumour": tumour} if tumour.any() else {})
    found: dict[tuple[int, int], list[str]] = {}
    for why, volume in most.items():
        for axis in (0, 1):
            across = tuple(other for other in range(3) if other != axis)
            index = int(volume.sum(axis=across, dtype=np.float64).argmax())
            found.setdefault((axis, index), []).append(why)
    return [(Plane(axis=axis, index=index), " and ".join(why)) for (axis, index), why in found.items()]


def _slice_layout(
    planes: Sequence[Plane], shape_zyx: tuple[int, ...], spacing_zyx_mm: Spacing, title: str
) -> tuple[Figure, list[list[Axes]], list[Axes]]:
    """Rows as high as their planes are in mm, up to one and a half times the width; the axes of bars below."""
    heights_in = []
    for plane in planes:
        height, width = (
            n * mm
            for axis, (n, mm) in enumerate(zip(shape_zyx, spacing_zyx_mm, strict=True))
            if axis != plane.axis
        )
        heights_in.append(_PANEL_IN * min(height / width, 1.5))
    width_in = 2 * _EDGE_IN + 4 * _PANEL_IN + 3 * _GAP_IN
    height_in = _TITLE_IN + sum(heights_in) + _GAP_IN * (len(planes) - 1) + _BAR_IN
    figure = _figure(width_in=width_in, height_in=height_in)
    _draw_title(figure, title)
    lefts_in = [_EDGE_IN + column * (_PANEL_IN + _GAP_IN) for column in range(4)]

    def add(left_in: float, top_in: float, size_in: tuple[float, float]) -> Axes:
        bottom = 1 - (top_in + size_in[0]) / height_in
        return figure.add_axes((left_in / width_in, bottom, size_in[1] / width_in, size_in[0] / height_in))

    tops_in = [_TITLE_IN + sum(heights_in[:row]) + _GAP_IN * row for row in range(len(planes))]
    axes = [
        [add(left_in, top_in, (row_in, _PANEL_IN)) for left_in in lefts_in]
        for top_in, row_in in zip(tops_in, heights_in, strict=True)
    ]
    bar_top_in = height_in - _BAR_IN + 0.1
    bars = [add(left_in + 0.1, bar_top_in, (0.12, _PANEL_IN - 0.2)) for left_in in lefts_in]
    return figure, axes, bars


def _cut(volume_zyx: NDArray[Any], plane: Plane) -> NDArray[Any]:
    """A slice as it hangs."""
    hung: NDArray[Any] = np.take(volume_zyx, plane.index, axis=plane.axis)[::-1, ::-1]
    return hung


def _show(axis: Axes, picture: NDArray[Any], column: _Column, pixel_mm: tuple[float, float]) -> AxesImage:
    height, width = (n * mm for n, mm in zip(picture.shape, pixel_mm, strict=True))
    shown = axis.imshow(
        picture,
        cmap=column.cmap,
        vmin=column.low,
        vmax=column.high,
        extent=(0, width, height, 0),
        interpolation="nearest",
    )
    axis.autoscale(False)  # outlines begin half a pixel outside of the picture
    axis.set(facecolor="black", xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    return shown


def _draw_outlines(
    axis: Axes,
    plane: Plane,
    pixel_mm: tuple[float, float],
    *,
    maps: UncertaintyMaps,
    truth_zyx: NDArray[np.uint8] | None,
    on_image: bool,
) -> None:
    if not on_image:
        pen = Pen(name="", from_label=1, colour=TEXT, width=0.6, style="solid")
        _draw_edge(axis, _cut(maps.label_zyx, plane), pixel_mm, pen)
        return
    truths = () if truth_zyx is None else tuple((truth_zyx, pen) for pen in TRUTH_PENS)
    for label_zyx, pen in (*truths, *((maps.label_zyx, pen) for pen in PRED_PENS)):
        _draw_edge(axis, _cut(label_zyx, plane), pixel_mm, pen)


def _draw_edge(axis: Axes, label: NDArray[np.uint8], pixel_mm: tuple[float, float], pen: Pen) -> None:
    # Zeros around close the line where the class reaches the edge of the picture.
    inside = np.pad(label >= pen.from_label, 1)
    if inside.any():  # matplotlib before 3.11 warns of a level outside the data
        y, x = ((np.arange(n) - 0.5) * mm for n, mm in zip(inside.shape, pixel_mm, strict=True))
        axis.contour(
            x, y, inside, levels=[0.5], colors=[pen.colour], linewidths=pen.width, linestyles=pen.style
        )


def _draw_bar(figure: Figure, shown: AxesImage, axis: Axes, name: str) -> None:
    bar = figure.colorbar(shown, cax=axis, orientation="horizontal")
    bar.outline.set_visible(False)
    axis.tick_params(colors=MUTED, labelsize=8, length=2)
    axis.set_xlabel(name, color=TEXT, fontsize=9.5)


def _note_plane(axis: Axes, plane: Plane, n_slices: int, why: str) -> None:
    name = ("axial z", "coronal y", "sagittal x")[plane.axis]
    left, right = plane.sides
    notes = (
        (0.02, 0.98, f"{name} {plane.index + 1}/{n_slices}: {why}", "left", "top"),
        (0.02, 0.5, left, "left", "center"),
        (0.98, 0.5, right, "right", "center"),
    )
    for x, y, text, ha, va in notes:
        note = axis.text(x, y, text, transform=axis.transAxes, color=TEXT, fontsize=8.5, ha=ha, va=va)
        note.set_path_effects([Stroke(linewidth=2.2, foreground="black"), Normal()])


def _draw_key(figure: Figure, truth_zyx: NDArray[np.uint8] | None, label_zyx: NDArray[np.uint8]) -> None:
    """Which line is which, under the CT's column; a class that is nowhere has none."""
    keys = list(_keys(truth_zyx, TRUTH_PENS)) + list(_keys(label_zyx, PRED_PENS))
    if keys:
        left, bottom = _EDGE_IN / figure.get_size_inches()[0], 0.02 / figure.get_size_inches()[1]
        figure.legend(
            handles=keys,
            loc="lower left",
            bbox_to_anchor=(left, bottom),
            ncols=len(keys),
            frameon=False,
            labelcolor=TEXT,
            fontsize=9.5,
        )


def _keys(label_zyx: NDArray[np.uint8] | None, pens: Sequence[Pen]) -> Iterator[Line2D]:
    highest = 0 if label_zyx is None else int(label_zyx.max())
    for pen in pens:
        if highest >= pen.from_label:
            yield Line2D([], [], color=pen.colour, lw=pen.width + 0.4, ls=pen.style, label=pen.name)


# ---- as the other figures


def _figure(*, width_in: float, height_in: float) -> Figure:
    figure = Figure(figsize=(width_in, height_in), dpi=DPI, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    return figure


def _draw_title(figure: Figure, title: str) -> None:
    width_in, height_in = figure.get_size_inches()
    head, _, rest = title.partition("\n")
    lines = ((0.32, head, TEXT, 14.0, "bold"), (0.61, rest, MUTED, 10.0, "normal"))
    for down_in, text, colour, size, weight in lines:
        # No mathematics: a case may be called a$b$c.
        line = figure.text(_EDGE_IN / width_in, 1 - down_in / height_in, text, parse_math=False, va="center")
        line.set(color=colour, fontsize=size, fontweight=weight)


def _style(axis: Axes) -> None:
    axis.set_facecolor(PANEL)
    axis.spines[:].set_visible(False)
    axis.tick_params(colors=MUTED, which="both", labelsize=9, length=0)
    axis.grid(color=GRID, lw=0.7)
    axis.set_axisbelow(True)


def _name(axis: Axes, title: str, *, x: str, y: str) -> None:
    axis.set_title(title, color=TEXT, fontsize=11, loc="left", pad=8)
    axis.set_xlabel(x, color=MUTED, fontsize=9)
    axis.set_ylabel(y, color=MUTED, fontsize=9)
