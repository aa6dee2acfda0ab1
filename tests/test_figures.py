"""Figures: the laws of hanging (sides, aspect), outlines, and files that are whole or absent. Read from pixels."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.image import imread
from numpy.typing import NDArray

from liverseg.laboratory.figures import curves_figure
from liverseg.laboratory.one_case import Point
from liverseg.pictures import palette
from liverseg.pictures.figures import case_montage, overlay_figure
from liverseg.pictures.panel import draw_edge, line_key
from liverseg.pictures.planes import Plane
from liverseg.pictures.probability_figure import probability_figure
from liverseg.pictures.progress import progress_figure
from liverseg.pictures.sheet import draw_legend, new_figure, save

Pixels = NDArray[np.uint8]
SHAPE = (24, 60, 80)
SPACING = (5.0, 2.0, 1.5)
AXIAL, CORONAL, SAGITTAL = (0, 1, 2, 3), 4, 5


def body(shape: tuple[int, int, int] = SHAPE) -> NDArray[np.int16]:
    """Soft tissue in air."""
    image = np.full(shape, -1000, dtype=np.int16)
    image[:, 6:-6, 6:-6] = 40
    return image


def ball(centre_zyx: tuple[float, float, float], radius_mm: float) -> NDArray[np.bool_]:
    z, y, x = np.ogrid[tuple(slice(0, n) for n in SHAPE)]
    offsets = ((a - c) * mm for a, c, mm in zip((z, y, x), centre_zyx, SPACING, strict=True))
    return np.asarray(sum(d**2 for d in offsets) <= radius_mm**2)


def a_label() -> NDArray[np.uint8]:
    label = ball((12, 30, 50), 35.0).astype(np.uint8)
    label[ball((15, 28, 55), 12.0)] = 2
    return label


def rendered(figure: Figure) -> Pixels:
    assert isinstance(figure.canvas, FigureCanvasAgg)
    canvas: Any = figure.canvas  # matplotlib leaves these two methods untyped
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def panel_pixels(figure: Figure, axis: Axes) -> Pixels:
    pixels = rendered(figure)
    area = axis.get_window_extent()
    height = pixels.shape[0]
    rows = slice(round(height - area.y1), round(height - area.y0))
    return pixels[rows, round(area.x0) : round(area.x1)]


def near(pixels: Pixels, colour: str) -> NDArray[np.bool_]:
    wanted = np.array(to_rgb(colour)) * 255
    return np.asarray(np.abs(pixels - wanted).max(axis=-1) < 12)


def points(axis: Axes, line: int) -> tuple[list[float], list[float]]:
    x, y = np.asarray(axis.lines[line].get_xydata()).T
    return x.tolist(), y.tolist()


def white(pixels: Pixels) -> NDArray[np.bool_]:
    return np.asarray(pixels.min(axis=-1) > 250)  # the notes are a shade darker


def off_centre_block() -> NDArray[np.bool_]:
    block = np.zeros(SHAPE, dtype=np.bool_)
    block[13:21, 33:49, 52:64] = True
    return block


def without_notes(axis: Axes) -> Axes:
    for note in axis.texts:
        note.set_visible(False)
    return axis


def extent_px(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """First row, last row, first column, last column."""
    rows, columns = np.nonzero(mask)
    return np.array([rows.min(), rows.max(), columns.min(), columns.max()], dtype=np.float64)


# ---- laws of hanging


def test_right_front_and_head_hang_on_the_left_and_on_top() -> None:
    image = body()
    # In RAS+ high x is right, high y is front, high z is head.
    image[14:22, 40:48, 56:64] = 500
    tumour = np.zeros(SHAPE, dtype=np.uint8)
    tumour[2:22] = 1
    tumour[14:22, 40:48, 56:64] = 2  # so that all planes pass through the marker
    figure = overlay_figure(image, tumour, None, SPACING, title="marker")
    for index in (0, CORONAL, SAGITTAL):
        pixels = panel_pixels(figure, figure.axes[index])
        rows, columns = np.nonzero(white(pixels))
        assert rows.size > 100
        assert columns.mean() < pixels.shape[1] / 2
        assert rows.mean() < pixels.shape[0] / 2


def test_the_side_letters_stand_where_the_sides_are() -> None:
    figure = overlay_figure(body(), None, None, SPACING, title="letters")
    for index, letters in ((0, "RL"), (CORONAL, "RL"), (SAGITTAL, "AP")):
        at = {text.get_text(): text.get_position()[0] for text in figure.axes[index].texts}
        assert at[letters[0]] < 0.5 < at[letters[1]]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_ball_is_round_in_each_plane(axis: int) -> None:
    image = body()
    sphere = ball((12, 30, 40), 25.0)
    image[sphere] = 500
    figure = overlay_figure(image, sphere.astype(np.uint8), None, SPACING, title="ball")
    panel = figure.axes[{0: 1, 1: CORONAL, 2: SAGITTAL}[axis]]
    rows, columns = np.nonzero(near(panel_pixels(figure, panel), palette.LIVER_TRUTH))
    height_mm, width_mm = Plane(axis=axis, index=0).pixel_mm(SPACING)
    pixel_mm = (panel.get_xlim()[1] - panel.get_xlim()[0]) / panel.get_window_extent().width
    # A digital ball's outline may be off by a voxel at both ends, and by its own width.
    slack_px = (height_mm + width_mm) / pixel_mm + 4
    assert np.ptp(rows) == pytest.approx(np.ptp(columns), abs=slack_px)
    assert np.ptp(columns) * pixel_mm == pytest.approx(50.0, abs=slack_px * pixel_mm)


def test_pixels_are_square_in_mm_in_all_panels() -> None:
    figure = case_montage(body(), None, SPACING, title="square")
    rendered(figure)
    assert len(figure.axes) == 20
    for axis in figure.axes:
        area = axis.get_window_extent()
        (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
        assert (right - left) / area.width == pytest.approx((bottom - top) / area.height, rel=1e-6)


@pytest.mark.parametrize("panel", [1, CORONAL, SAGITTAL])
def test_outlines_lie_around_what_they_outline(panel: int) -> None:
    image, block = body(), off_centre_block()
    image[block] = 500
    figure = overlay_figure(image, block.astype(np.uint8), None, SPACING, title="overlay")
    pixels = panel_pixels(figure, without_notes(figure.axes[panel]))
    outlined, marked = near(pixels, palette.LIVER_TRUTH), white(pixels)
    np.testing.assert_allclose(extent_px(outlined), extent_px(marked), atol=3)


@pytest.mark.parametrize("panel", [5, 18, 19])
def test_the_montage_outlines_lie_around_what_they_outline(panel: int) -> None:
    image, block = body(), off_centre_block()
    image[block] = 500
    fractions = np.stack([np.zeros_like(block), block]).astype(np.uint8) * 255
    figure = case_montage(image, fractions, SPACING, title="montage")
    pixels = panel_pixels(figure, without_notes(figure.axes[panel]))
    # Tissue is 128 grey; the tint leaves of the white block at least 160 in each channel.
    outlined, marked = near(pixels, palette.TUMOUR_PRED), pixels.min(axis=-1) > 150
    np.testing.assert_allclose(extent_px(outlined), extent_px(marked), atol=3)


def test_the_montage_frames_the_close_view() -> None:
    image, block = body(), off_centre_block()
    z, y, x = (slice(int(at.min()), int(at.max()) + 1) for at in np.nonzero(block))
    image[block] = 500
    figure = case_montage(image, None, SPACING, title="scan", box_zyx=(z, y, x))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["close view"]
    panels = [axis for axis in figure.axes if axis.collections]
    assert 2 <= len(panels) < len(figure.axes)  # those whose slice the box cuts
    edges = np.concatenate([path.vertices for path in panels[0].collections[0].get_paths()])
    width_mm, height_mm = np.ptp(edges, axis=0)  # of an axial slice
    assert width_mm == pytest.approx((x.stop - x.start) * SPACING[2], abs=SPACING[2])
    assert height_mm == pytest.approx((y.stop - y.start) * SPACING[1], abs=SPACING[1])


def test_a_cut_is_the_slice_turned_round() -> None:
    volume = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
    whole = (slice(0, 2), slice(0, 3), slice(0, 4))
    np.testing.assert_array_equal(Plane(axis=0, index=1).cut(volume, whole), volume[1, ::-1, ::-1])
    np.testing.assert_array_equal(Plane(axis=1, index=2).cut(volume, whole), volume[::-1, 2, ::-1])
    np.testing.assert_array_equal(Plane(axis=2, index=3).cut(volume, whole), volume[::-1, ::-1, 3])
    part = (slice(0, 1), slice(1, 3), slice(2, 4))
    np.testing.assert_array_equal(Plane(axis=0, index=1).cut(volume, part), volume[1, 2:0:-1, 3:1:-1])


# ---- what is shown


@pytest.mark.parametrize("with_truth", [True, False])
@pytest.mark.parametrize("with_pred", [True, False])
def test_the_outlines_drawn_are_those_given(with_truth: bool, with_pred: bool) -> None:
    label = a_label()
    figure = overlay_figure(
        body(), label if with_truth else None, label if with_pred else None, SPACING, title="outlines"
    )
    pixels = rendered(figure)
    for colour, drawn in (
        (palette.LIVER_TRUTH, with_truth),
        (palette.TUMOUR_TRUTH, with_truth),
        (palette.LIVER_PRED, with_pred),
        (palette.TUMOUR_PRED, with_pred),
    ):
        assert bool(near(pixels, colour).sum() > 50) is drawn


def test_one_axial_slice_passes_through_the_largest_tumour() -> None:
    label = a_label()
    largest = int((label == 2).sum(axis=(1, 2)).argmax())
    figure = overlay_figure(body(), label, None, SPACING, title="tumour")
    captions = [figure.axes[i].texts[0].get_text() for i in AXIAL]
    assert f"axial z {largest + 1}/24" in captions
    heights = [int(c.split()[-1].split("/")[0]) for c in captions]
    assert heights == sorted(heights, reverse=True)


def test_a_false_outline_outside_the_body_is_still_in_the_picture() -> None:
    pred = np.zeros(SHAPE, dtype=np.uint8)
    pred[8:16, 0:3, 0:3] = 1
    figure = overlay_figure(body(), None, pred, SPACING, title="outside")
    assert near(panel_pixels(figure, figure.axes[1]), palette.LIVER_PRED).sum() > 10


@pytest.mark.parametrize(
    "label",
    [np.zeros(SHAPE, np.uint8), np.full(SHAPE, 2, np.uint8), ball((12, 30, 40), 0.5).astype(np.uint8)],
    ids=["empty", "full", "one voxel"],
)
def test_odd_labels_are_drawn_without_a_warning(label: NDArray[np.uint8]) -> None:
    rendered(overlay_figure(body(), label, label, SPACING, title="odd"))


@pytest.mark.parametrize("shape", [(1, 20, 20), (3, 40, 50), (90, 12, 12)])
def test_odd_shapes_are_drawn_without_a_warning(shape: tuple[int, int, int]) -> None:
    air = np.full(shape, -1000, dtype=np.int16)
    rendered(overlay_figure(air, np.ones(shape, np.uint8), None, SPACING, title="odd"))
    rendered(case_montage(air, np.zeros((2, *shape), np.uint8), SPACING, title="odd"))


def test_the_montage_tints_by_the_share() -> None:
    # 40 HU in a window of -110..190 is 128 grey; a quarter of blue over it at a full share, an eighth at a half.
    blue = np.array(to_rgb(palette.LIVER_TRUTH)) * 255
    for share, alpha in ((255, 0.25), (127, 0.125), (0, 0.0)):
        fractions = np.zeros((2, *SHAPE), dtype=np.uint8)
        fractions[0] = share
        figure = case_montage(body(), fractions, SPACING, title="tint")
        pixels = panel_pixels(figure, figure.axes[8])
        middle = pixels[pixels.shape[0] // 3, pixels.shape[1] // 2]
        np.testing.assert_allclose(middle, (1 - alpha) * 127.5 + alpha * blue, atol=2.5)


def test_the_montage_outlines_liver_and_tumour() -> None:
    label = a_label()
    fractions = np.stack([(label == 1), (label == 2)]).astype(np.uint8) * 255
    pixels = rendered(case_montage(body(), fractions, SPACING, title="case"))
    assert near(pixels, palette.LIVER_TRUTH).sum() > 200
    assert near(pixels, palette.TUMOUR_PRED).sum() > 50


def test_arguments_are_left_as_they_were() -> None:
    image, label = body(), a_label()
    copies = image.copy(), label.copy()
    rendered(overlay_figure(image, label, label, SPACING, title="kept"))
    np.testing.assert_array_equal(image, copies[0])
    np.testing.assert_array_equal(label, copies[1])


def test_a_title_is_no_mathematics() -> None:
    figure = overlay_figure(body(), None, None, SPACING, title="case$\\1_$\nDice 0.95 $")
    rendered(figure)  # as mathematics this raises
    assert [text.get_text() for text in figure.texts] == ["case$\\1_$", "Dice 0.95 $"]


def test_a_name_that_the_font_lacks_is_drawn_without_a_warning(tmp_path: Path) -> None:
    """On the terminal it was a warning with a line of our code per character."""
    assert save(new_figure("患者 📁", width_in=2, height_in=1), tmp_path / "f.png").is_file()


def test_pyplot_is_never_imported() -> None:
    modules = "figures, liverseg.pictures.progress, liverseg.pictures.fingerprint_figure"
    code = f"import sys, liverseg.pictures.{modules}; print('matplotlib.pyplot' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# Severity 1 of Machado et al. 2009 (doi:10.1109/TVCG.2009.113), on linear RGB.
COLOUR_VISION = {
    "usual": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    "protan": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    "deutan": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    "tritan": ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
}


def lab_of(colour: str, vision: str) -> NDArray[np.float64]:
    """CIELAB (D65) of an sRGB colour as seen with this vision."""
    srgb = np.array(to_rgb(colour))
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(COLOUR_VISION[vision]) @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ seen / np.array([0.9505, 1.0, 1.089])
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", COLOUR_VISION)
def test_the_outlines_are_told_apart_under_colour_blindness(vision: str) -> None:
    pens = palette.TRUTH_PENS + palette.PRED_PENS
    seen = [lab_of(pen.colour, vision) for pen in pens]
    apart = {round(float(np.linalg.norm(a - b)), 1) for a, b in itertools.combinations(seen, 2)}
    assert min(apart) > 30


# ---- edges


def edges(axis: Axes) -> list[NDArray[np.float64]]:
    """The points of each line, in mm from the left and from the top."""
    drawn = [artist for artist in axis.get_children() if isinstance(artist, ContourSet)]
    return [np.asarray(path.vertices) for contours in drawn for path in contours.get_paths()]


@pytest.mark.parametrize(
    ("closed", "rows", "columns"),
    [
        # Three rows of 2 mm and four columns of 3 mm: round them, or below them and out of the picture.
        (True, (0.0, 6.0), (0.0, 12.0)),
        (False, (6.0, 6.0), (-1.5, 13.5)),
    ],
)
def test_a_class_at_the_edge_of_a_picture_ends_there_or_goes_on(
    closed: bool, rows: tuple[float, float], columns: tuple[float, float]
) -> None:
    share = np.zeros((8, 4), dtype=np.float32)
    share[:3] = 1.0
    axis = Figure().subplots()
    draw_edge(axis, share, (2.0, 3.0), palette.TRUTH_PENS[0], closed=closed)
    (line,) = edges(axis)
    assert (line[:, 1].min(), line[:, 1].max()) == pytest.approx(rows)
    assert (line[:, 0].min(), line[:, 0].max()) == pytest.approx(columns)


@pytest.mark.parametrize(("share", "closed", "drawn"), [(0.0, True, 0), (1.0, True, 1), (1.0, False, 0)])
def test_a_class_that_is_nowhere_or_everywhere(share: float, closed: bool, drawn: int) -> None:
    axis = Figure().subplots()
    everywhere = np.full((8, 4), share, dtype=np.float32)
    draw_edge(axis, everywhere, (2.0, 3.0), palette.TRUTH_PENS[0], closed=closed)
    assert len(edges(axis)) == drawn


# ---- experiments on one case


def test_the_larger_picture_of_a_tumour_has_no_edge_where_the_liver_goes_on() -> None:
    liver = np.zeros(SHAPE, dtype=np.float32)
    liver[:, 6:-6, 6:-6] = 1.0
    tumour = ball((12, 30, 40), 5.0).astype(np.float32)
    truth = np.stack([liver - tumour, tumour])
    figure = probability_figure(body(), truth, truth, SPACING, title="tumour")
    rendered(figure)
    assert [len(edges(axis)) for axis in figure.axes[:6]] == [2, 2, 2, 1, 1, 1]
    for axis, is_zoomed in zip(figure.axes[:6], (False,) * 3 + (True,) * 3, strict=True):
        area, (left, right) = axis.get_window_extent(), axis.get_xlim()
        assert area.height / area.width == pytest.approx(np.ptp(axis.get_ylim()) / (right - left), rel=1e-3)
        assert bool(right - left < 80) == is_zoomed


def test_each_column_of_losses_ends_with_the_numbers_of_its_steps() -> None:
    curve = (
        Point(step=50, loss=1.0, liver=0.5, tumour=None),
        Point(step=100, loss=1.0, liver=0.9, tumour=0.2),
    )
    losses = {f"loss {i}": curve for i in range(4)} | {"short": curve[:1], "none": ()}
    figure = curves_figure(losses, steps=100, learnt=0.8, title="losses")
    rendered(figure)
    shown = figure.axes[:6]
    assert [axis.get_xlabel() for axis in shown] == ["", "", "step", "step", "step", "step"]
    assert [axis.xaxis.get_major_ticks()[0].label1.get_visible() for axis in shown] == [
        False,
        False,
        *4 * (True,),
    ]
    assert [bool(axis.get_ylabel()) for axis in shown] == [True, False, False, False, True, False]
    assert [axis.get_visible() for axis in figure.axes] == [True] * 6 + [False] * 2
    notes = [axis.texts[-1].get_text() for axis in shown]
    assert notes[3:] == [
        "at the end: liver 0.90, tumour 0.20",
        "diverged after step 50",
        "diverged before its first score",
    ]


@pytest.mark.parametrize(("rows", "n_keys"), [(1, 4), (2, 4), (2, 3)])
def test_a_legend_is_inside_its_page(rows: int, n_keys: int) -> None:
    figure = new_figure("keys", width_in=10.0, height_in=4.0)
    draw_legend(
        figure, [line_key(pen) for pen in (palette.TRUTH_PENS + palette.PRED_PENS)[:n_keys]], rows=rows
    )
    rendered(figure)
    heights = {round(text.get_window_extent().y0) for text in figure.legends[0].get_texts()}
    assert len({height // 10 for height in heights}) == rows
    assert figure.legends[0].get_window_extent().y0 >= 0


# ---- training curves


def test_progress_draws_what_is_there() -> None:
    nan = float("nan")
    history = {
        "epoch": [10.0, 11.0, 12.0, 13.0],
        "train_loss": [4.0, 3.0, 2.0, 1.0],
        "val_loss": [nan, 3.5, nan, 2.5],
        "val_dice_liver": [nan, 0.9, nan, 0.8],
        "learning_rate": [0.0, 1e-3, 1e-4, 1e-5],
    }
    figure = progress_figure(history)
    rendered(figure)
    loss, dice, rate, speed = figure.axes
    assert points(loss, 0) == ([10, 11, 12, 13], [4, 3, 2, 1])
    assert points(loss, 1) == ([11, 13], [3.5, 2.5])
    assert dice.lines[0].get_label() == "liver, best 0.900 at epoch 11"
    assert rate.get_yscale() == "log"
    assert points(rate, 0)[0] == [11, 12, 13]  # 0 has no logarithm
    assert speed.texts[0].get_text() == "no values yet"


@pytest.mark.parametrize(
    "history",
    [
        {},
        {"epoch": []},
        {"epoch": [1.0], "train_loss": [0.5], "samples_per_second": [20.0]},
        {"val_loss": [float("nan")], "val_dice_liver": [float("nan")], "learning_rate": [0.0]},
        {"epoch": [1.0, 2.0], "train_loss": [0.5]},
        {"train_loss": [float("inf"), 1.0]},
    ],
)
def test_thin_histories_are_drawn_without_a_warning(history: dict[str, list[float]]) -> None:
    figure = progress_figure(history)
    rendered(figure)
    assert len(figure.axes) == 4


# ---- files


def test_save_writes_a_png_of_the_figures_size(tmp_path: Path) -> None:
    figure = progress_figure({"train_loss": [2.0, 1.0]})
    path = save(figure, tmp_path / "progress.png")
    assert path == tmp_path / "progress.png"
    width_in, height_in = figure.get_size_inches()
    pixels = imread(path)
    assert pixels.shape[:2] == (int(height_in * palette.DPI), int(width_in * palette.DPI))
    np.testing.assert_allclose(pixels[0, 0, :3], to_rgb(palette.BACKGROUND), atol=0.003)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_leaves_the_old_picture_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "old.png"
    path.write_bytes(b"old")

    def dies_halfway(_: Figure, stream: io.BufferedWriter, **__: object) -> None:
        stream.write(b"\x89PNG half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", dies_halfway)
    with pytest.raises(OSError, match="disk full"):
        save(Figure(), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_title_of_three_lines_hides_neither_itself_nor_the_pictures() -> None:
    label = np.ones(body().shape, dtype=np.uint8)
    figure = overlay_figure(
        body(), label, None, SPACING, title="scan.nii.gz\nNOT PLAUSIBLE: liver 2 mL\nbecause; because"
    )
    figure.canvas.draw()
    head, rest = (text.get_window_extent() for text in figure.texts[:2])
    assert "because" in figure.texts[1].get_text()
    assert head.y0 >= rest.y1
    assert rest.y0 >= max(axes.get_window_extent().y1 for axes in figure.axes)
