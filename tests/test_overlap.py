"""Overlap and surface metrics: against definitions written out, by hand, and at the empty edges."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from liverseg.measure import overlap
from liverseg.measure.overlap import (
    NSD_CURVE_MM,
    DiceCounts,
    Mask,
    Spacing,
    dice_counts,
    mean_interval,
    score_case,
    score_class,
    surface_distances,
    union_box,
)

UNEQUAL_MM: Spacing = (2.5, 0.7, 1.3)
SHAPE = (4, 5, 6)

masks = hnp.arrays(np.bool_, SHAPE)


def surface_points_mm(mask: Mask, spacing: Spacing) -> NDArray[np.float64]:
    """The definition, voxel by voxel: set, with a face neighbour that is unset or outside the array."""
    points = []
    for at in np.argwhere(mask):
        neighbours = [at + sign * step for step in np.eye(3, dtype=int) for sign in (-1, 1)]
        inside = [((n >= 0) & (n < mask.shape)).all() and mask[tuple(n)] for n in neighbours]
        if not all(inside):
            points.append(at * np.array(spacing))
    return np.array(points, dtype=np.float64).reshape(-1, 3)


def brute_distances(a: Mask, b: Mask, spacing: Spacing) -> tuple[list[float], list[float]]:
    """All pairs of surface points in float64."""
    pa, pb = surface_points_mm(a, spacing), surface_points_mm(b, spacing)
    table = np.sqrt(((pa[:, None] - pb[None]) ** 2).sum(-1))
    return sorted(table.min(axis=1)), sorted(table.min(axis=0))


def cuboid(corner: tuple[int, int, int], size: tuple[int, int, int], shape: tuple[int, int, int]) -> Mask:
    mask = np.zeros(shape, dtype=np.bool_)
    mask[tuple(slice(c, c + n) for c, n in zip(corner, size, strict=True))] = True
    return mask


# ---- laws


@settings(deadline=None, max_examples=60)
@given(pred=masks, truth=masks, spacing=st.sampled_from([(1.0, 1.0, 1.0), UNEQUAL_MM]))
def test_every_metric_is_its_definition(pred: Mask, truth: Mask, spacing: Spacing) -> None:
    if not (pred.any() and truth.any()):
        return
    forth, back = brute_distances(pred, truth, spacing)
    both = forth + back
    got = score_class(pred, truth, spacing, tolerance_mm=1.0)
    sets = [set(map(tuple, np.argwhere(m).tolist())) for m in (pred, truth)]
    shared, union = len(sets[0] & sets[1]), len(sets[0] | sets[1])
    assert got.dice == pytest.approx(2 * shared / (len(sets[0]) + len(sets[1])))
    assert got.voe_percent == pytest.approx(100 * (1 - shared / union))
    assert got.rvd_percent == pytest.approx(100 * (len(sets[0]) / len(sets[1]) - 1))
    assert got.assd_mm == pytest.approx(math.fsum(both) / len(both))
    assert got.rmsd_mm == pytest.approx(math.sqrt(math.fsum(d * d for d in both) / len(both)))
    assert got.nsd_curve == pytest.approx([sum(d <= mm for d in both) / len(both) for mm in NSD_CURVE_MM])
    assert got.hd_mm == pytest.approx(max(both))
    assert got.hd95_mm == pytest.approx(max(np.percentile(forth, 95), np.percentile(back, 95)))
    assert got.nsd == pytest.approx(sum(d <= 1.0 for d in both) / len(both))


@settings(deadline=None, max_examples=40)
@given(pred=masks, truth=masks)
def test_tree_and_transform_measure_the_same(pred: Mask, truth: Mask) -> None:
    if pred.any() and truth.any():
        by_tree = overlap._distances_by_tree(pred, truth, UNEQUAL_MM)
        by_transform = overlap._distances_by_transform(pred, truth, UNEQUAL_MM)
        np.testing.assert_allclose(by_tree, by_transform, rtol=1e-6)


def test_many_surface_voxels_go_to_the_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    pred, truth = np.random.default_rng(3).random((2, 6, 7, 8)) < 0.5
    few = surface_distances(pred, truth, UNEQUAL_MM)
    monkeypatch.setattr(overlap, "_TREE_MAX_POINTS", 0)
    monkeypatch.delattr(overlap, "KDTree")  # the transform must not need it
    many = surface_distances(pred, truth, UNEQUAL_MM)
    np.testing.assert_allclose(many.pred_to_truth_mm, few.pred_to_truth_mm, rtol=1e-6)
    np.testing.assert_allclose(many.truth_to_pred_mm, few.truth_to_pred_mm, rtol=1e-6)


@settings(deadline=None, max_examples=30)
@given(pred=masks, truth=masks)
def test_swapping_the_masks_changes_only_the_sign_of_the_volume(pred: Mask, truth: Mask) -> None:
    one = score_class(pred, truth, UNEQUAL_MM, tolerance_mm=1.0)
    other = score_class(truth, pred, UNEQUAL_MM, tolerance_mm=1.0)
    for name in ("dice", "voe_percent", "assd_mm", "rmsd_mm", "hd_mm", "hd95_mm", "nsd"):
        assert getattr(one, name) == pytest.approx(getattr(other, name))
    assert one.volume_pred_ml == other.volume_truth_ml


@settings(deadline=None, max_examples=30)
@given(pred=masks, truth=masks, padding=st.integers(1, 3))
def test_background_around_changes_nothing(pred: Mask, truth: Mask, padding: int) -> None:
    """Also proves that the cut to the union needs no margin and that the array's border is a surface."""
    padded = score_class(np.pad(pred, padding), np.pad(truth, padding), UNEQUAL_MM, tolerance_mm=1.0)
    assert padded == score_class(pred, truth, UNEQUAL_MM, tolerance_mm=1.0)


@settings(deadline=None, max_examples=30)
@given(mask=masks)
def test_a_mask_agrees_with_itself(mask: Mask) -> None:
    got = score_class(mask, mask, UNEQUAL_MM, tolerance_mm=0.0)
    assert (got.dice, got.voe_percent, got.rvd_percent, got.nsd) == (1.0, 0.0, 0.0, 1.0)
    assert (got.assd_mm, got.rmsd_mm, got.hd_mm, got.hd95_mm) == (0.0, 0.0, 0.0, 0.0)


def test_arguments_are_left_as_they_were() -> None:
    labels = np.random.default_rng(0).integers(0, 3, (2, *SHAPE)).astype(np.uint8)
    before = labels.copy()
    score_case(labels[0], labels[1], UNEQUAL_MM, liver_tolerance_mm=1.0, tumour_tolerance_mm=1.0)
    np.testing.assert_array_equal(labels, before)


# ---- by hand


def test_two_shifted_bars_by_hand() -> None:
    # Bars of 4 voxels along x at x = 2..5 and x = 3..6, spacing 2 mm along x, in the middle of a volume:
    # |P∩T| = 3, |P∪T| = 5; one voxel wide, so that all are surface; each bar has 1 voxel 2 mm off and 3 at 0.
    pred = cuboid((2, 2, 2), (1, 1, 4), (5, 5, 9))
    truth = cuboid((2, 2, 3), (1, 1, 4), (5, 5, 9))
    got = score_class(pred, truth, (5.0, 3.0, 2.0), tolerance_mm=1.9)
    assert got.counts == DiceCounts(intersection=3, predicted=4, truth=4)
    assert got.dice == pytest.approx(6 / 8)
    assert got.voe_percent == pytest.approx(100 * (1 - 3 / 5))
    assert got.rvd_percent == 0.0
    assert got.assd_mm == pytest.approx((2 + 2) / 8)
    assert got.hd_mm == pytest.approx(2.0)
    # sorted 0 0 0 2; the 95th percentile lies at index .95·3 = 2.85: 0 + .85·2 = 1.7
    assert got.hd95_mm == pytest.approx(1.7)
    assert got.nsd == pytest.approx(6 / 8)
    assert got.volume_pred_ml == pytest.approx(4 * 30 / 1000)


def test_two_far_voxels_use_the_spacing_of_each_axis() -> None:
    # offsets (2, 3, 1) voxels of (3, 2, 6) mm: (6, 6, 6), length √108
    pred, truth = cuboid((0, 0, 0), (1, 1, 1), (3, 4, 2)), cuboid((2, 3, 1), (1, 1, 1), (3, 4, 2))
    got = score_class(pred, truth, (3.0, 2.0, 6.0), tolerance_mm=1.0)
    assert got.hd_mm == got.hd95_mm == got.assd_mm == pytest.approx(math.sqrt(108))
    assert (got.dice, got.voe_percent, got.nsd) == (0.0, 100.0, 0.0)


def test_the_inside_is_no_surface_but_the_array_border_is() -> None:
    # 3×3×3 filled array: 26 voxels touch the outside, the middle one does not.
    full = np.ones((3, 3, 3), dtype=np.bool_)
    assert surface_distances(full, full, (1.0, 1.0, 1.0)).pred_to_truth_mm.size == 26


def test_hd95_is_the_larger_direction_and_not_the_pooled_percentile() -> None:
    # One voxel against a bar of 101 that starts there: one way 0, the other 0..100 mm, 95th percentile 95.
    # Pooled it would be the 95th percentile of 102 values, 94.95.
    pred, truth = cuboid((0, 0, 0), (1, 1, 1), (1, 1, 101)), np.ones((1, 1, 101), dtype=np.bool_)
    assert surface_distances(pred, truth, (1.0, 1.0, 1.0)).hd95_mm == pytest.approx(95.0)


def test_nsd_counts_a_distance_equal_to_the_tolerance() -> None:
    # 3 · 0.1 is 0.30000000000000004 in float64 and still within 0.3 mm.
    pred, truth = cuboid((0, 0, 0), (1, 1, 1), (1, 1, 4)), cuboid((0, 0, 3), (1, 1, 1), (1, 1, 4))
    distances = surface_distances(pred, truth, (1.0, 1.0, 0.1))
    assert distances.nsd(tolerance_mm=float(np.float64(0.3))) == 1.0
    assert distances.nsd(tolerance_mm=0.29) == 0.0


def test_a_tumour_is_part_of_its_liver() -> None:
    truth = np.array([[[0, 1, 2, 2]]], dtype=np.uint8)
    pred = np.array([[[0, 1, 1, 2]]], dtype=np.uint8)
    got = score_case(pred, truth, (1.0, 1.0, 1.0), liver_tolerance_mm=1.0, tumour_tolerance_mm=1.0)
    assert got.liver.dice == 1.0
    assert got.tumour.counts == DiceCounts(intersection=1, predicted=1, truth=2)
    assert got.tumour.dice == pytest.approx(2 / 3)
    assert got.tumour.rvd_percent == pytest.approx(-50.0)


def test_global_dice_weighs_by_voxels() -> None:
    # 10 of 10 right and 0 of 30 (30 missed): mean Dice .5; pooled 2·10 / (10 + 40) = .4
    cases = [
        DiceCounts(intersection=10, predicted=10, truth=10),
        DiceCounts(intersection=0, predicted=0, truth=30),
    ]
    assert sum(cases, DiceCounts(intersection=0, predicted=0, truth=0)).dice == pytest.approx(0.4)


# ---- empty edges


def test_nothing_there_and_nothing_claimed_is_perfect() -> None:
    none = np.zeros(SHAPE, dtype=np.bool_)
    got = score_class(none, none, UNEQUAL_MM, tolerance_mm=1.0)
    assert (got.dice, got.voe_percent, got.rvd_percent, got.nsd) == (1.0, 0.0, 0.0, 1.0)
    assert (got.assd_mm, got.rmsd_mm, got.hd_mm, got.hd95_mm) == (0.0, 0.0, 0.0, 0.0)
    assert (got.volume_pred_ml, got.volume_truth_ml) == (0.0, 0.0)


@pytest.mark.parametrize("filled", [np.ones(SHAPE, np.bool_), cuboid((1, 2, 3), (1, 1, 1), SHAPE)])
@pytest.mark.parametrize("pred_is_empty", [True, False])
def test_one_empty_mask_has_no_distances(filled: Mask, pred_is_empty: bool) -> None:
    none = np.zeros(SHAPE, dtype=np.bool_)
    pred, truth = (none, filled) if pred_is_empty else (filled, none)
    got = score_class(pred, truth, UNEQUAL_MM, tolerance_mm=1e9)
    assert (got.dice, got.voe_percent, got.nsd) == (0.0, 100.0, 0.0)
    assert (got.assd_mm, got.rmsd_mm, got.hd_mm, got.hd95_mm) == (None, None, None, None)
    assert got.rvd_percent == (-100.0 if pred_is_empty else None)


def test_scores_are_strict_json() -> None:
    empty = np.zeros(SHAPE, dtype=np.uint8)
    liver_only = np.ones(SHAPE, dtype=np.uint8)
    for pred, truth in itertools.product((empty, liver_only), repeat=2):
        scores = dataclasses.asdict(
            score_case(pred, truth, UNEQUAL_MM, liver_tolerance_mm=2.0, tumour_tolerance_mm=2.0)
        )
        written = json.loads(json.dumps(scores, allow_nan=False))
        for name in ("liver", "tumour"):
            written[name]["nsd_curve"] = tuple(written[name]["nsd_curve"])
        assert written == scores


def test_the_box_of_nothing_is_nothing() -> None:
    none = np.zeros(SHAPE, dtype=np.bool_)
    assert none[union_box(none, none)].size == 0
    one = cuboid((1, 2, 3), (1, 1, 1), SHAPE)
    two = cuboid((3, 2, 0), (1, 1, 1), SHAPE)
    assert union_box(one, two) == (slice(1, 4), slice(2, 3), slice(0, 4))


@pytest.mark.parametrize(
    ("shape", "spacing", "tolerance", "said"),
    [
        ((4, 5, 7), UNEQUAL_MM, 1.0, r"\(4, 5, 6\) and \(4, 5, 7\)"),
        (SHAPE, (0.0, 1.0, 1.0), 1.0, "above 0 mm"),
        (SHAPE, (math.nan, 1.0, 1.0), 1.0, "above 0 mm"),
        (SHAPE, UNEQUAL_MM, -1.0, "at least 0 mm"),
        (SHAPE, UNEQUAL_MM, math.nan, "at least 0 mm"),
    ],
)
def test_nonsense_is_refused(
    shape: tuple[int, int, int], spacing: Spacing, tolerance: float, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        score_case(
            np.zeros(SHAPE, np.uint8),
            np.zeros(shape, np.uint8),
            spacing,
            liver_tolerance_mm=tolerance,
            tumour_tolerance_mm=tolerance,
        )


# ---- intervals


@pytest.mark.parametrize("n", [2, 6, 26])
def test_intervals_of_normal_values_cover_as_often_as_they_say(n: int) -> None:
    drawn = np.random.default_rng(5).normal(0.7, 1.0, (2000, n))
    got = [mean_interval(list(row)) for row in drawn]
    held = sum(i.low is not None and i.high is not None and i.low <= 0.7 <= i.high for i in got)
    assert held / len(got) == pytest.approx(0.95, abs=0.015)  # three standard errors


def test_a_t_interval_by_hand() -> None:
    # Mean 0.8, deviations -0.1, 0, 0.1: s = 0.1; t of two degrees of freedom is 4.3027; 4.3027 · 0.1 / √3 = 0.2484.
    got = mean_interval([0.7, None, 0.8, 0.9])
    assert got.mean == pytest.approx(0.8)
    assert got.low == pytest.approx(0.8 - 0.24841, abs=1e-5)
    assert got.high == pytest.approx(0.8 + 0.24841, abs=1e-5)
    assert (got.n_cases, got.n_undefined) == (3, 1)
    assert mean_interval([0.7, 0.8, 0.9], bounds=(0.6, 1.0)).high == 1.0
    assert mean_interval([0.7, 0.8, 0.9], bounds=(0.6, 1.0)).low == 0.6


def test_one_case_has_no_interval_and_none_no_mean() -> None:
    one = mean_interval([0.5])
    assert (one.mean, one.low, one.high, one.n_cases) == (0.5, None, None, 1)
    none = mean_interval([None])
    assert (none.mean, none.low, none.high, none.n_cases, none.n_undefined) == (None, None, None, 0, 1)


def test_dice_counts_of_a_known_pair() -> None:
    pred, truth = np.array([[[1, 1, 0]]], np.bool_), np.array([[[0, 1, 1]]], np.bool_)
    assert dice_counts(pred, truth) == DiceCounts(intersection=1, predicted=2, truth=2)
