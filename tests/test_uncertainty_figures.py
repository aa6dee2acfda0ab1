"""Figures of uncertainty: what the curves hold, which slices are shown, and pixels of the true aspect."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from numpy.typing import NDArray

from liverseg.measure.calibration import ReliabilityCounts
from liverseg.measure.selective import risk_coverage
from liverseg.measure.uncertainty import MAX_ENTROPY
from liverseg.pictures.palette import LIVER_PRED, LIVER_TRUTH, TUMOUR_PRED, TUMOUR_TRUTH
from liverseg.pictures.reliability_figures import reliability_figure, risk_coverage_figure
from liverseg.pictures.sheet import save
from liverseg.pictures.uncertainty_figures import UncertaintyMaps, uncertainty_figure

SHAPE = (20, 30, 40)
SPACING = (6.0, 2.0, 1.5)


def counts(seed: int) -> ReliabilityCounts:
    generator = np.random.default_rng(seed)
    prob = generator.random(500).astype(np.float32)
    return ReliabilityCounts.from_block(prob, generator.random(500) < prob**2, n_bins=10)


def block(z: slice, y: slice, x: slice) -> NDArray[np.bool_]:
    mask = np.zeros(SHAPE, dtype=np.bool_)
    mask[z, y, x] = True
    return mask


LIVER = block(slice(3, 17), slice(5, 25), slice(8, 34))
LESION = block(slice(4, 7), slice(8, 12), slice(10, 16))  # most in z = 4, y = 8
DOUBT = block(slice(14, 15), slice(20, 21), slice(20, 30))  # z = 14, y = 20


def maps(*, lesion: bool = True, doubt: NDArray[np.bool_] = DOUBT) -> UncertaintyMaps:
    label = LIVER.astype(np.uint8)
    label[LESION] += lesion
    return UncertaintyMaps(
        label_zyx=label,
        entropy_zyx=doubt.astype(np.float32),
        information_zyx=(0.3 * doubt).astype(np.float32),
        tumour_zyx=(LESION * np.float32(0.9 * lesion)),
    )


def image() -> NDArray[np.int16]:
    return np.where(LIVER, 100, -1000).astype(np.int16)


def rendered(figure: Figure) -> NDArray[np.uint8]:
    assert isinstance(figure.canvas, FigureCanvasAgg)
    canvas: Any = figure.canvas  # matplotlib leaves these two methods untyped
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def notes(figure: Figure) -> list[str]:
    return [text.get_text() for axis in figure.axes for text in axis.texts if len(text.get_text()) > 1]


def legend_of(axis: Axes) -> list[str]:
    legend = axis.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def outline_colours(figure: Figure) -> set[str]:
    """Which of the four pens are seen on the CT's panels, the key below not counted."""
    pixels = rendered(figure)
    panels = [axis.get_window_extent() for axis in figure.axes[:-4:4]]
    rows = (pixels[len(pixels) - round(p.y1) : len(pixels) - round(p.y0), : round(p.x1)] for p in panels)
    seen = np.concatenate([row.reshape(-1, 3) for row in rows])
    return {
        colour
        for colour in (LIVER_TRUTH, TUMOUR_TRUTH, LIVER_PRED, TUMOUR_PRED)
        if (np.abs(seen - np.array(to_rgb(colour)) * 255).max(axis=-1) < 12).any()
    }


# ---- curves


def test_the_reliability_curve_is_that_of_the_counts() -> None:
    before, after = {"liver": counts(0), "tumour": counts(1)}, {"liver": counts(2), "tumour": counts(3)}
    figure = reliability_figure(before, after, title="calibration")
    rendered(figure)
    for axis, name in zip(figure.axes[:2], before, strict=True):
        assert axis.get_title("left") == name
        for line, shown in zip(axis.lines[1:], (before[name], after[name]), strict=True):
            drawn = np.asarray(line.get_xydata())
            np.testing.assert_allclose(drawn, np.c_[shown.confidence, shown.frequency])
            assert str(line.get_label()).endswith(f"ECE {shown.ece:.4f}")
    for axis, name in zip(figure.axes[2:], before, strict=True):
        for steps, shown in zip(axis.patches, (before[name], after[name]), strict=True):
            np.testing.assert_array_equal(steps.get_data().values, shown.n_voxels)  # type: ignore[attr-defined]


def test_a_class_without_a_voxel_has_an_empty_curve() -> None:
    figure = reliability_figure({"tumour": ReliabilityCounts.empty()}, None, title="nothing")
    rendered(figure)
    assert [np.asarray(line.get_xdata()).size for line in figure.axes[0].lines] == [2, 0]
    assert legend_of(figure.axes[0]) == ["calibrated", "as predicted: no voxel"]


def test_the_risk_curve_and_its_optimum_are_drawn() -> None:
    curve = risk_coverage([0.1, 0.5, 0.3], [1.0, 2.0, 3.0])
    figure = risk_coverage_figure({"entropy": curve}, title="risk")
    rendered(figure)
    (axis,) = figure.axes
    drawn, best, random = axis.lines
    np.testing.assert_allclose(np.asarray(drawn.get_xydata()), np.c_[curve.coverage, curve.selective_risk])
    np.testing.assert_allclose(np.asarray(best.get_ydata()), curve.optimum)
    np.testing.assert_allclose(np.asarray(random.get_ydata()), 0.3)  # the mean of all
    assert legend_of(axis)[0] == "entropy: AURC 0.2333, excess 0.0333, 3 cases"


def test_curves_of_several_and_of_no_case() -> None:
    curves = {"one": risk_coverage([0.2], [1.0]), "none": risk_coverage([], [])}
    figure = risk_coverage_figure(curves, title="a$\\q$c\nunder it")
    rendered(figure)
    assert legend_of(figure.axes[0])[0].startswith("one")
    assert len(figure.axes[0].lines) == 3
    rendered(risk_coverage_figure({}, title="no curve"))


# ---- slices


def test_the_slices_of_most_doubt_and_of_most_tumour_are_shown() -> None:
    figure = uncertainty_figure(image(), maps(), SPACING, title="case")
    assert notes(figure) == [
        "axial z 15/20: most entropy",
        "coronal y 21/30: most entropy",
        "axial z 5/20: most tumour",
        "coronal y 9/30: most tumour",
    ]


def test_doubt_far_from_the_liver_does_not_choose_the_slice() -> None:
    far = maps().entropy_zyx.copy()
    far[10, :, 38:] = 0.9  # more than in the slice below, but in the air
    doubtful = replace(maps(), entropy_zyx=far)
    nothing = replace(doubtful, label_zyx=np.zeros_like(doubtful.label_zyx))
    first, without_liver = (
        notes(uncertainty_figure(image(), shown, SPACING, title="case"))[0] for shown in (doubtful, nothing)
    )
    assert (first, without_liver) == ("axial z 15/20: most entropy", "axial z 11/20: most entropy")


def test_the_largest_true_tumour_decides_before_the_predicted() -> None:
    truth = LIVER.astype(np.uint8)
    truth[9, 14, 12:20] = 2
    assert "axial z 10/20: most tumour" in notes(
        uncertainty_figure(image(), maps(), SPACING, title="case", truth_zyx=truth)
    )
    no_tumour = np.minimum(truth, 1)
    assert "axial z 5/20: most tumour" in notes(
        uncertainty_figure(image(), maps(), SPACING, title="case", truth_zyx=no_tumour)
    )


def test_a_slice_that_is_both_comes_once_and_without_a_tumour_there_are_two() -> None:
    at_lesion = block(slice(4, 5), slice(8, 9), slice(10, 20))
    both = uncertainty_figure(image(), maps(doubt=at_lesion), SPACING, title="case")
    assert notes(both) == [
        "axial z 5/20: most entropy and most tumour",
        "coronal y 9/30: most entropy and most tumour",
    ]
    assert len(notes(uncertainty_figure(image(), maps(lesion=False), SPACING, title="case"))) == 2


def test_pictures_hang_with_right_front_and_head_first_and_in_true_aspect() -> None:
    figure = uncertainty_figure(image(), maps(), SPACING, title="case")
    rendered(figure)
    axial, coronal = figure.axes[1], figure.axes[5]  # entropy
    shown = np.asarray(axial.images[0].get_array())
    np.testing.assert_array_equal(shown, maps().entropy_zyx[14, ::-1, ::-1])
    np.testing.assert_array_equal(
        np.asarray(coronal.images[0].get_array()), maps().entropy_zyx[::-1, 20, ::-1]
    )
    for axis, height_mm in ((axial, 30 * 2.0), (coronal, 20 * 6.0)):
        area = axis.get_window_extent()
        assert area.height / area.width == pytest.approx(height_mm / (40 * 1.5), rel=1e-3)
        scale_x = area.width / np.ptp(axis.get_xlim())
        scale_y = area.height / np.ptp(axis.get_ylim())
        assert scale_x == pytest.approx(scale_y, rel=1e-3)  # the same millimetres both ways


def test_scales_are_the_same_for_all_cases_but_that_of_the_information() -> None:
    figure = uncertainty_figure(image(), maps(), SPACING, title="case")
    limits = [axis.images[0].get_clim() for axis in figure.axes[:4]]
    assert limits == [(-110, 190), (0, MAX_ENTROPY), (0, pytest.approx(0.3)), (0, 1)]
    labels = [axis.get_xlabel() for axis in figure.axes if axis.get_xlabel()]
    assert labels == [
        "CT, HU",
        "predictive entropy, nats (at most ln 3)",
        "mutual information, nats",
        "mean tumour probability",
    ]


def test_one_sample_has_no_information_and_is_drawn() -> None:
    nothing = np.zeros(SHAPE, dtype=np.float32)
    silent = UncertaintyMaps(
        label_zyx=np.zeros(SHAPE, dtype=np.uint8),
        entropy_zyx=nothing,
        information_zyx=nothing,
        tumour_zyx=nothing,
    )
    figure = uncertainty_figure(image(), silent, SPACING, title="empty")
    rendered(figure)
    assert figure.axes[2].images[0].get_clim()[1] > 0
    assert not figure.legends


def test_each_label_has_its_outline_and_its_key() -> None:
    truth = LIVER.astype(np.uint8)
    truth[5, 9, 12:30] = 2  # through the predicted lesion
    with_truth = uncertainty_figure(image(), maps(), SPACING, title="case", truth_zyx=truth)
    assert outline_colours(with_truth) == {LIVER_TRUTH, TUMOUR_TRUTH, LIVER_PRED, TUMOUR_PRED}
    keys = [text.get_text() for text in with_truth.legends[0].get_texts()]
    assert keys == ["liver, truth", "tumour, truth", "liver, predicted", "tumour, predicted"]
    without = uncertainty_figure(image(), maps(lesion=False), SPACING, title="case")
    assert outline_colours(without) == {LIVER_PRED}
    assert [text.get_text() for text in without.legends[0].get_texts()] == ["liver, predicted"]


def test_a_figure_is_written_whole(tmp_path: Path) -> None:
    path = save(risk_coverage_figure({}, title="none"), tmp_path / "case.png")
    assert imread(path).ndim == 3
    assert [p.name for p in tmp_path.iterdir()] == ["case.png"]
