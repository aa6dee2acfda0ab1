"""Pictures: a scan with its outlines, a cached case at a glance, the course of a training run.

All are drawn with matplotlib's objects and never with pyplot: no global state, no display, safe in threads.
Volumes come in canonical RAS+ orientation, index growing towards the patient's right, front and head, and are
shown as a radiologist hangs them: right and front on the left, front and head on top. For axial, coronal and
sagittal planes alike that means turning both axes round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from scipy import ndimage

from data_cache.files import replacing

Volume = NDArray[np.uint8] | NDArray[np.int16]
Share = NDArray[np.float32]
Spacing = tuple[float, float, float]
View = tuple[slice, slice, slice]

BACKGROUND = "#0d1117"
PANEL = "#151b23"
GRID = "#30363d"
TEXT = "#e6edf3"
MUTED = "#8b949e"
# Searched for: at least 33 apart (CIELAB) with usual vision and under each colour blindness; a green for the tumour
# came within 11 of the blue under tritanopia. A test repeats the measurement.
LIVER_TRUTH = "#56b4e9"
LIVER_PRED = "#f0e442"
TUMOUR_TRUTH = "#b740ff"
TUMOUR_PRED = "#f2452d"

DPI = 110
_TITLE_IN, _LEGEND_IN, _GAP_IN, _EDGE_IN = 0.9, 0.5, 0.06, 0.2
# Between fat (-100) and air (-1000), so that the skin is the edge of the body.
_BODY_ABOVE_HU = -300


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """One slice of a zyx volume: the axis it is cut across (0 axial, 1 coronal, 2 sagittal) and where."""

    axis: int
    index: int

    def cut(self, volume_zyx: Volume, view: View) -> Volume:
        """The part of the slice inside the box, as it hangs: rows from the top, columns from the left."""
        at = tuple(self.index if axis == self.axis else part for axis, part in enumerate(view))
        return volume_zyx[at][::-1, ::-1]

    def pixel_mm(self, spacing_zyx_mm: Spacing) -> tuple[float, float]:
        """Height and width of a pixel of the slice."""
        height, width = (s for axis, s in enumerate(spacing_zyx_mm) if axis != self.axis)
        return height, width

    @property
    def sides(self) -> tuple[str, str]:
        """What is on the left and on the right of the picture."""
        return ("A", "P") if self.axis == 2 else ("R", "L")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pen:
    """How the edge of one class of one label is drawn; the class is all labels from ``from_label`` up."""

    name: str
    from_label: int
    colour: str
    width: float
    style: str


# The truth solid and wide, the prediction thin on top of it: where both agree, both are seen.
TRUTH_PENS = (
    Pen(name="liver, truth", from_label=1, colour=LIVER_TRUTH, width=1.9, style="solid"),
    Pen(name="tumour, truth", from_label=2, colour=TUMOUR_TRUTH, width=1.9, style="solid"),
)
PRED_PENS = (
    Pen(name="liver, predicted", from_label=1, colour=LIVER_PRED, width=1.4, style="dashed"),
    Pen(name="tumour, predicted", from_label=2, colour=TUMOUR_PRED, width=1.4, style="dashed"),
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outline:
    """One class of one label, its pen, and how many of its voxels each slice holds, along each axis."""

    label_zyx: NDArray[np.uint8]
    pen: Pen
    voxels_along_zyx: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]

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
    outlines = _outlines(truth_zyx, TRUTH_PENS) + _outlines(pred_zyx, PRED_PENS)
    planes = _overlay_planes(outlines, image_zyx.shape)
    view = _overlay_view(image_zyx, outlines, spacing_zyx_mm[0])
    figure, axes = _overlay_layout(_aspect(view, spacing_zyx_mm), title)
    for axis, plane in zip(axes, planes, strict=True):
        _show_plane(axis, image_zyx, plane, view, spacing_zyx_mm, window_hu=window_hu)
        for outline in outlines:
            inside = plane.cut(outline.label_zyx, view) >= outline.pen.from_label
            _draw_edge(axis, inside.astype(np.float32), plane.pixel_mm(spacing_zyx_mm), outline.pen)
    _draw_legend(figure, [_line_key(outline.pen) for outline in outlines])
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
    view = _body_view(image_zyx, slice(0, image_zyx.shape[0]))
    figure, axes = _montage_layout(_aspect(view, spacing_zyx_mm), title)
    for axis, plane in zip(axes, _montage_planes(image_zyx.shape, fractions_czyx), strict=True):
        _show_plane(axis, image_zyx, plane, view, spacing_zyx_mm, window_hu=window_hu)
        if fractions_czyx is not None:
            liver, tumour = (plane.cut(share_zyx, view) * np.float32(1 / 255) for share_zyx in fractions_czyx)
            _draw_shares(axis, liver, tumour, plane.pixel_mm(spacing_zyx_mm))
    if fractions_czyx is not None:
        _draw_legend(figure, [_area_key("liver", LIVER_TRUTH), _area_key("tumour", TUMOUR_PRED)])
    return figure


def progress_figure(history: Mapping[str, Sequence[float]]) -> Figure:
    """The course of a training run: losses, Dice, learning rate and speed over epochs.

    Args:
        history: Sequences under "epoch", "train_loss", "val_loss", "val_dice_liver", "val_dice_tumour",
            "learning_rate" and "samples_per_second". A missing or empty one is not drawn; NaN is left out
            (validation need not run each epoch) and its neighbours are joined; without "epoch", epochs
            count from 1.
    """
    figure = _figure(width_in=12.6, height_in=7.6)
    _draw_title(figure, "Training progress")
    panels = _grid(figure, 2, 2, left_in=0.65, right_in=12.4, bottom_in=0.6, gap_in=(0.85, 0.65))
    loss, dice, rate, speed = panels
    _draw_curves(
        loss, history, {"train_loss": ("train", LIVER_TRUTH), "val_loss": ("validation", LIVER_PRED)}
    )
    classes = {"val_dice_liver": ("liver", LIVER_TRUTH), "val_dice_tumour": ("tumour", TUMOUR_PRED)}
    _draw_curves(dice, history, classes, mark_best=True)
    _draw_curves(rate, history, {"learning_rate": ("_", LIVER_TRUTH)}, log=True)
    _draw_curves(speed, history, {"samples_per_second": ("_", LIVER_TRUTH)})
    dice.set_ylim(0.0, 1.03)
    speed.set_ylim(0.0, 1.1 * speed.dataLim.y1 if speed.lines else 1.0)
    for axis, name in zip(
        panels, ("Loss", "Validation Dice", "Learning rate", "Samples per second"), strict=True
    ):
        _style_curves(axis, name)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write the figure as PNG, whole or not at all, and return the path."""
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=DPI)
    return path


# ---- what is shown


def _outlines(label_zyx: NDArray[np.uint8] | None, pens: Sequence[Pen]) -> list[Outline]:
    """The classes that the label has, liver first; none without a label."""
    if label_zyx is None:
        return []
    drawn = (_outline(label_zyx, pen) for pen in pens)
    return [outline for outline in drawn if not outline.empty]


def _outline(label_zyx: NDArray[np.uint8], pen: Pen) -> Outline:
    # Slice by slice: the comparison of a whole 512×512×1000 label is 260 MB.
    per_z, per_y, per_x = (np.zeros(n, dtype=np.int64) for n in label_zyx.shape)
    for z, label_yx in enumerate(label_zyx):
        if label_yx.any():
            mask_yx = label_yx >= pen.from_label
            per_z[z] = np.count_nonzero(mask_yx)
            per_y += np.count_nonzero(mask_yx, axis=1)
            per_x += np.count_nonzero(mask_yx, axis=0)
    return Outline(label_zyx=label_zyx, pen=pen, voxels_along_zyx=(per_z, per_y, per_x))


def _overlay_planes(outlines: Sequence[Outline], shape_zyx: tuple[int, ...]) -> tuple[Plane, ...]:
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


def _montage_planes(
    shape_zyx: tuple[int, ...], fractions_czyx: NDArray[np.uint8] | None
) -> tuple[Plane, ...]:
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


def _overlay_view(image_zyx: NDArray[np.int16], outlines: Sequence[Outline], spacing_z_mm: float) -> View:
    """The body with all that is labelled, and in depth 60 mm around that: a whole-body scan would be a thread."""
    if not outlines:
        return _body_view(image_zyx, slice(0, image_zyx.shape[0]))
    z, y, x = (_hull([outline.extent(axis) for outline in outlines]) for axis in range(3))
    z = _widened(z, round(60.0 / spacing_z_mm), image_zyx.shape[0])
    _, body_y, body_x = _body_view(image_zyx, z)
    return z, _hull([y, body_y]), _hull([x, body_x])


def _body_view(image_zyx: NDArray[np.int16], depth: slice) -> View:
    """The box worth showing at this depth: the body without its table, and a little air."""
    # A dozen slices tell the width of the body. In their mean a table is a thin line apart.
    some_zyx = image_zyx[depth][:: max(1, (depth.stop - depth.start) // 12)]
    pieces_yx, n_pieces = ndimage.label((some_zyx > _BODY_ABOVE_HU).mean(axis=0) > 0.3)
    _, ny, nx = image_zyx.shape
    if n_pieces == 0:
        return depth, slice(0, ny), slice(0, nx)
    body_yx = pieces_yx == np.bincount(pieces_yx.ravel())[1:].argmax() + 1
    y, x = _extent(body_yx.any(axis=1)), _extent(body_yx.any(axis=0))
    return depth, _widened(y, ny // 50, ny), _widened(x, nx // 50, nx)


def _extent(set_along: NDArray[np.bool_]) -> slice:
    set_at = np.flatnonzero(set_along)
    return slice(int(set_at[0]), int(set_at[-1]) + 1)


def _hull(parts: Sequence[slice]) -> slice:
    return slice(min(part.start for part in parts), max(part.stop for part in parts))


def _widened(part: slice, margin: int, size: int) -> slice:
    return slice(max(0, part.start - margin), min(size, part.stop + margin))


def _aspect(view: View, spacing_zyx_mm: Spacing) -> float:
    """Height over width of the axial pictures, within what a page bears."""
    _, height, width = ((part.stop - part.start) * s for part, s in zip(view, spacing_zyx_mm, strict=True))
    return min(max(float(height / width), 0.5), 1.2)


# ---- layout, in inches


def _figure(*, width_in: float, height_in: float) -> Figure:
    figure = Figure(figsize=(width_in, height_in), dpi=DPI, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    return figure


def _overlay_layout(aspect: float, title: str) -> tuple[Figure, list[Axes]]:
    """2×2 axial panels of this height over width, and a column with the coronal over the sagittal."""
    return _layout(title, rows=2, columns=2, panel_in=(4.1 * aspect, 4.1), side_in=4.1)


def _montage_layout(aspect: float, title: str) -> tuple[Figure, list[Axes]]:
    """3×6 axial panels of this height over width, and a column with the coronal over the sagittal."""
    return _layout(title, rows=3, columns=6, panel_in=(2.1 * aspect, 2.1), side_in=3.1)


def _layout(
    title: str, *, rows: int, columns: int, panel_in: tuple[float, float], side_in: float
) -> tuple[Figure, list[Axes]]:
    height_in = rows * (panel_in[0] + _GAP_IN) - _GAP_IN
    middle_in = _EDGE_IN + columns * (panel_in[1] + _GAP_IN)
    width_in = middle_in + side_in + _EDGE_IN
    figure = _figure(width_in=width_in, height_in=height_in + _TITLE_IN + _LEGEND_IN)
    _draw_title(figure, title)
    axial = _grid(figure, rows, columns, left_in=_EDGE_IN, right_in=middle_in - _GAP_IN)
    sides = _grid(figure, 2, 1, left_in=middle_in, right_in=width_in - _EDGE_IN)
    return figure, [*axial, *sides]


def _grid(
    figure: Figure,
    rows: int,
    columns: int,
    *,
    left_in: float,
    right_in: float,
    bottom_in: float = _LEGEND_IN,
    gap_in: tuple[float, float] = (_GAP_IN, _GAP_IN),
) -> list[Axes]:
    """Panels row by row from under the title down to ``bottom_in``."""
    size = figure.get_size_inches()
    height = (size[1] - _TITLE_IN - bottom_in - gap_in[0] * (rows - 1)) / rows
    width = (right_in - left_in - gap_in[1] * (columns - 1)) / columns
    lefts = [left_in + column * (width + gap_in[1]) for column in range(columns)]
    bottoms = [bottom_in + row * (height + gap_in[0]) for row in reversed(range(rows))]
    return [
        figure.add_axes((left / size[0], bottom / size[1], width / size[0], height / size[1]))
        for bottom in bottoms
        for left in lefts
    ]


def _draw_title(figure: Figure, title: str) -> None:
    head, _, rest = title.partition("\n")
    _title_line(figure, 0.34, head, colour=TEXT, size=15.0, weight="bold")
    _title_line(figure, 0.64, rest, colour=MUTED, size=10.5, weight="normal")


def _title_line(figure: Figure, down_in: float, text: str, *, colour: str, size: float, weight: str) -> None:
    width_in, height_in = figure.get_size_inches()
    # No mathematics: a case may be called a$b$c.
    figure.text(
        _EDGE_IN / width_in,
        1 - down_in / height_in,
        text,
        color=colour,
        fontsize=size,
        weight=weight,
        va="center",
        parse_math=False,
    )


def _draw_legend(figure: Figure, keys: Sequence[Artist]) -> None:
    if not keys:
        return
    width_in, height_in = figure.get_size_inches()
    figure.legend(
        handles=list(keys),
        loc="center left",
        bbox_to_anchor=(0.12 / width_in, 0.25 / height_in),
        ncols=len(keys),
        frameon=False,
        labelcolor=TEXT,
        fontsize=10,
        handlelength=2.8,
        columnspacing=2.4,
    )


def _line_key(pen: Pen) -> Line2D:
    return Line2D([], [], color=pen.colour, lw=pen.width + 0.4, ls=pen.style, label=pen.name)


def _area_key(name: str, colour: str) -> Patch:
    return Patch(facecolor=to_rgba(colour, 0.35), edgecolor=colour, label=name)


# ---- one panel


def _show_plane(
    axis: Axes,
    image_zyx: NDArray[np.int16],
    plane: Plane,
    view: View,
    spacing_zyx_mm: Spacing,
    *,
    window_hu: tuple[float, float],
) -> None:
    picture = plane.cut(image_zyx, view)
    extent = _extent_mm(picture.shape, plane.pixel_mm(spacing_zyx_mm))
    low, high = window_hu
    axis.imshow(picture, cmap="gray", vmin=low, vmax=high, extent=extent, interpolation="antialiased")
    _fill_panel(axis, width_mm=extent[1], height_mm=extent[2])
    axis.set(facecolor="black", xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    name = ("axial z", "coronal y", "sagittal x")[plane.axis]
    left, right = plane.sides
    _note(axis, 0.02, 0.98, f"{name} {plane.index + 1}/{image_zyx.shape[plane.axis]}", va="top")
    _note(axis, 0.02, 0.5, left, weight="bold")
    _note(axis, 0.98, 0.5, right, weight="bold", ha="right")


def _note(
    axis: Axes, x: float, y: float, text: str, *, weight: str = "normal", ha: str = "left", va: str = "center"
) -> None:
    # Black around white: legible on air and on bone.
    halo = [Stroke(linewidth=2.2, foreground="black"), Normal()]
    note = axis.text(x, y, text, transform=axis.transAxes, color=TEXT, fontsize=8.5, ha=ha, va=va)
    note.set(fontweight=weight, path_effects=halo)


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


def _draw_edge(axis: Axes, share: Share, pixel_mm: tuple[float, float], pen: Pen) -> None:
    """The line where the share of a class is a half; nothing where it is nowhere above."""
    if share.max() <= 0.5:
        return  # matplotlib before 3.11 warns of a level outside the data
    # Zeros around close the line where the class reaches the edge of the picture.
    padded = np.pad(share, 1)
    y, x = ((np.arange(n) - 0.5) * mm for n, mm in zip(padded.shape, pixel_mm, strict=True))
    axis.contour(x, y, padded, levels=[0.5], colors=[pen.colour], linewidths=pen.width, linestyles=pen.style)


def _draw_shares(axis: Axes, liver: Share, tumour: Share, pixel_mm: tuple[float, float]) -> None:
    """Both classes as a tint as strong as their share, and their edges."""
    for share, colour, strength in ((liver, LIVER_TRUTH, 0.25), (tumour, TUMOUR_PRED, 0.45)):
        tint = np.empty((*share.shape, 4), dtype=np.float32)
        tint[..., :3] = to_rgb(colour)
        tint[..., 3] = share * strength
        axis.imshow(tint, extent=_extent_mm(share.shape, pixel_mm), interpolation="nearest")
    for share, colour in ((liver + tumour, LIVER_TRUTH), (tumour, TUMOUR_PRED)):
        _draw_edge(axis, share, pixel_mm, Pen(name="", from_label=0, colour=colour, width=1.1, style="solid"))


# ---- curves


def _draw_curves(
    axis: Axes,
    history: Mapping[str, Sequence[float]],
    curves: Mapping[str, tuple[str, str]],
    *,
    log: bool = False,
    mark_best: bool = False,
) -> None:
    """One line a key of ``curves`` (name in the legend, "_" for none, and colour) that has values."""
    for key, (name, colour) in curves.items():
        epoch, value = _points(history, key, positive=log)
        if value.size == 0:
            continue
        best = int(value.argmax())
        label = f"{name}, best {value[best]:.3f} at epoch {epoch[best]:.0f}" if mark_best else name
        # A line through one point is invisible.
        axis.plot(epoch, value, color=colour, lw=1.8, marker="o" if value.size < 3 else "", ms=4, label=label)
        if mark_best:
            axis.plot(epoch[best], value[best], marker="o", ms=6, color=colour, mec=TEXT, mew=0.9)
    if log and axis.lines:
        axis.set_yscale("log")


def _points(
    history: Mapping[str, Sequence[float]], key: str, *, positive: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Epochs and values of one curve, without what cannot be drawn."""
    value = np.asarray(history.get(key, ()), dtype=np.float64)
    epoch = np.asarray(history.get("epoch", range(1, value.size + 1)), dtype=np.float64)
    # A run stopped in the middle of an epoch may have one list longer than the other.
    n = min(value.size, epoch.size)
    value, epoch = value[:n], epoch[:n]
    drawn = np.isfinite(value) & np.isfinite(epoch)
    if positive:
        drawn &= value > 0
    return epoch[drawn], value[drawn]


def _style_curves(axis: Axes, name: str) -> None:
    axis.set_facecolor(PANEL)
    axis.set_title(name, color=TEXT, fontsize=11, loc="left", pad=8)
    axis.spines[:].set_visible(False)
    if not axis.lines:
        axis.set(xticks=[], yticks=[])
        axis.text(0.5, 0.5, "no values yet", color=MUTED, ha="center", va="center", transform=axis.transAxes)
        return
    axis.set_xlabel("epoch", color=MUTED, fontsize=9)
    axis.tick_params(colors=MUTED, which="both", labelsize=9, length=0)
    axis.grid(color=GRID, lw=0.7)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, labelcolor=TEXT, fontsize=9.5)
