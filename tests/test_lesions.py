"""Lesion detection: against loops over lesions, by hand, and at the empty edges."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from liverseg.measure.lesion_count import LesionCounter
from liverseg.measure.lesions import (
    DetectionCounts,
    burden_errors,
    lesion_details,
    lesion_overlaps,
    lits_counts,
    match,
    score_lesions,
    tumour_burden,
)
from liverseg.measure.overlap import Mask, Spacing
from pipeline.lesions import equivalent_diameters_mm

ONE_MM: Spacing = (1.0, 1.0, 1.0)
Voxel = tuple[int, int, int]

sparse_masks = hnp.arrays(np.bool_, (3, 6, 7), fill=hnp.from_dtype(np.dtype(np.bool_)))


def flood_fill(mask: Mask) -> list[frozenset[Voxel]]:
    """The definition: grow each lesion through all 26 neighbours, in the order of its first voxel."""
    todo = {(int(z), int(y), int(x)) for z, y, x in np.argwhere(mask)}
    lesions = []
    for seed in sorted(todo):
        if seed not in todo:
            continue
        todo.discard(seed)
        lesion, front = {seed}, [seed]
        while front:
            z, y, x = front.pop()
            near = {q for q in todo if max(abs(q[0] - z), abs(q[1] - y), abs(q[2] - x)) == 1}
            todo -= near
            lesion |= near
            front += near
        lesions.append(frozenset(lesion))
    return lesions


def cubes(shape: Voxel, *corners_and_sizes: tuple[Voxel, Voxel]) -> Mask:
    mask = np.zeros(shape, dtype=np.bool_)
    for corner, size in corners_and_sizes:
        mask[tuple(slice(c, c + n) for c, n in zip(corner, size, strict=True))] = True
    return mask


# ---- laws


@settings(deadline=None, max_examples=60)
@given(pred=sparse_masks, truth=sparse_masks)
def test_overlaps_are_those_of_flood_filled_lesions(pred: Mask, truth: Mask) -> None:
    preds, truths = flood_fill(pred), flood_fill(truth)
    expected = sorted(len(t & p) / len(t | p) for t in truths for p in preds if t & p)
    got = lesion_overlaps(pred, truth, ONE_MM)
    assert sorted(got.pair_iou) == pytest.approx(expected)
    sizes = equivalent_diameters_mm(np.array([len(t) for t in truths]) / 1000)
    assert sorted(got.truth_diameters_mm) == pytest.approx(sorted(sizes))
    assert got.pred_diameters_mm.size == len(preds)


@settings(deadline=None, max_examples=60)
@given(pred=sparse_masks, truth=sparse_masks)
def test_each_lesion_is_counted_once(pred: Mask, truth: Mask) -> None:
    n_pred, n_truth = len(flood_fill(pred)), len(flood_fill(truth))
    loose, tight = score_lesions(pred, truth, ONE_MM)
    for scores in (loose, tight):
        counts = scores.overall
        assert counts.true_positives + counts.false_positives == n_pred
        assert counts.true_positives + counts.false_negatives == n_truth
    assert tight.overall.true_positives <= loose.overall.true_positives


@settings(deadline=None, max_examples=30)
@given(pred=sparse_masks, truth=sparse_masks)
def test_a_match_is_one_to_one(pred: Mask, truth: Mask) -> None:
    pairs = match(lesion_overlaps(pred, truth, ONE_MM), iou_threshold=0.0)
    assert len({t for t, _ in pairs}) == len({p for _, p in pairs}) == len(pairs)


def largest_matching(iou: dict[tuple[int, int], float]) -> tuple[int, float]:
    """Most pairs, and then most IoU, over every choice of pairs that share no lesion."""
    best = (0, 0.0)
    for n in range(len(iou) + 1):
        for pairs in itertools.combinations(iou, n):
            if len({t for t, _ in pairs}) == len({p for _, p in pairs}) == n:
                best = max(best, (n, sum(iou[pair] for pair in pairs)))
    return best


@settings(deadline=None, max_examples=60)
@given(pred=sparse_masks, truth=sparse_masks)
def test_no_matching_has_more_pairs_or_more_overlap(pred: Mask, truth: Mask) -> None:
    got = lesion_overlaps(pred, truth, ONE_MM)
    if got.pair_iou.size > 10:
        return
    keys = zip(got.pair_truth.tolist(), got.pair_pred.tolist(), strict=True)
    iou = dict(zip(keys, got.pair_iou.tolist(), strict=True))
    pairs = match(got, iou_threshold=0.0)
    expected = largest_matching(iou)
    assert (len(pairs), sum(iou[pair] for pair in pairs)) == (expected[0], pytest.approx(expected[1]))


def test_two_small_overlaps_are_matched_before_one_large() -> None:
    # Truth A 0..1 and B 3..22; prediction 1..20 has IoU 1/21 with A and 18/22 with B, prediction 22 has 1/20 with B.
    # Greedy, and the largest sum of IoU, would pair 1..20 with B and leave A and 22 alone.
    truth = cubes((1, 1, 24), ((0, 0, 0), (1, 1, 2)), ((0, 0, 3), (1, 1, 20)))
    pred = cubes((1, 1, 24), ((0, 0, 1), (1, 1, 20)), ((0, 0, 22), (1, 1, 1)))
    got = lesion_overlaps(pred, truth, ONE_MM)
    assert sorted(got.pair_iou) == pytest.approx([1 / 21, 1 / 20, 18 / 22])
    assert match(got, iou_threshold=0.0) == ((0, 0), (1, 1))
    assert match(got, iou_threshold=0.5) == ((1, 0),)


# ---- as LiTS counts


def lits(pred: Mask, truth: Mask) -> tuple[int, int, int]:
    """True positives, false positives, false negatives."""
    counts = lits_counts(lesion_overlaps(pred, truth, ONE_MM, connectivity=1))
    return counts.true_positives, counts.false_positives, counts.false_negatives


def numbered(mask: Mask) -> list[set[Voxel]]:
    """The face-connected lesions in scipy's order, as sets of voxels."""
    ids, n = ndimage.label(mask)
    return [{(z, y, x) for z, y, x in np.argwhere(ids == i + 1).tolist()} for i in range(n)]


def lits_by_masks(pred: Mask, truth: Mask) -> tuple[int, int, int]:
    """The rule read literally, with sets of voxels that are merged step by step."""
    preds, truths = numbered(pred), numbered(truth)
    merged: dict[int, list[int]] = {}  # numbers of true lesions, by the prediction that they share most with
    for number, lesion in enumerate(truths):
        shared = [len(lesion & p) for p in preds]
        if any(shared):
            merged.setdefault(shared.index(max(shared)), []).append(number)
    groups = sorted(merged.values())
    references = [set().union(*(truths[i] for i in group)) for group in groups]
    taken: list[list[int]] = [[] for _ in groups]
    for number, lesion in enumerate(preds):
        shared = [len(lesion & r) for r in references]
        if any(shared):
            taken[shared.index(max(shared))].append(number)
    found = right = 0
    for group, reference, numbers in zip(groups, references, taken, strict=True):
        prediction = set().union(*(preds[i] for i in numbers))
        if len(prediction & reference) > 0.5 * len(prediction | reference):
            found, right = found + len(group), right + len(numbers)
    return found, len(preds) - right, len(truths) - found


@settings(deadline=None, max_examples=200)
@given(pred=sparse_masks, truth=sparse_masks)
def test_lits_counts_are_the_rule_read_literally(pred: Mask, truth: Mask) -> None:
    assert lits(pred, truth) == lits_by_masks(pred, truth)


def test_lits_counts_of_dense_noise_are_the_rule_read_literally() -> None:
    rng = np.random.default_rng(4)
    for _ in range(100):
        truth = rng.random((5, 7, 7)) < 0.3
        pred = truth ^ (rng.random(truth.shape) < 0.12)
        assert lits(pred, truth) == lits_by_masks(pred, truth)


LINE = (1, 1, 12)


@pytest.mark.parametrize(
    ("truth", "pred", "expected", "one_to_one"),
    [
        # Split: 0..8 predicted as 0..3 and 5..8. Merged, IoU 8/9: one found. One to one: 4/9 and 4/9, neither above a half.
        (["0-8"], ["0-3", "5-8"], (1, 0, 0), (0, 2, 1)),
        # Merged: 0..3 and 5..8 predicted as 0..8: both found. One to one: 4/9 each.
        (["0-3", "5-8"], ["0-8"], (2, 0, 0), (0, 1, 2)),
        # Both: 0..3 and 5..8 belong to 2..7 (2 and 3 of its voxels); 0..0 goes to them, too: 6 of 10 voxels shared.
        (["0-3", "5-8"], ["0-0", "2-7"], (2, 0, 0), (0, 2, 2)),
        # Split too finely: 0 and 8 of nine voxels are 2/9, so that one is missed, and two are false.
        (["0-8"], ["0-0", "8-8"], (0, 2, 1), (0, 2, 1)),
        # Nothing in common, nothing predicted, nothing there.
        (["0-2"], ["5-7"], (0, 1, 1), (0, 1, 1)),
        (["0-2"], [], (0, 0, 1), (0, 0, 1)),
        ([], ["0-2"], (0, 1, 0), (0, 1, 0)),
        # One found, one missed, one false.
        (["0-2", "10-11"], ["0-2", "5-6"], (1, 1, 1), (1, 1, 1)),
    ],
)
def test_lits_counts_by_hand(
    truth: list[str],
    pred: list[str],
    expected: tuple[int, int, int],
    one_to_one: tuple[int, int, int],
) -> None:
    masks = []
    for bars in (pred, truth):
        mask = np.zeros(LINE, dtype=np.bool_)
        for bar in bars:
            first, last = map(int, bar.split("-"))
            mask[0, 0, first : last + 1] = True
        masks.append(mask)
    assert lits(masks[0], masks[1]) == expected
    counts = score_lesions(masks[0], masks[1], ONE_MM)[1].overall
    assert (counts.true_positives, counts.false_positives, counts.false_negatives) == one_to_one


def test_lits_lesions_touch_by_faces() -> None:
    # Two voxels that share a corner are one lesion of ours and two of LiTS.
    mask = cubes((2, 2, 2), ((0, 0, 0), (1, 1, 1)), ((1, 1, 1), (1, 1, 1)))
    assert lits(mask, mask) == (2, 0, 0)
    assert score_lesions(mask, mask, ONE_MM)[1].overall.true_positives == 1


def test_details_by_hand() -> None:
    # Truth 0..4 predicted as 0..1 and 3..4 (split); truth 7..8 and 10..11 predicted as 7..11 (merged). One to one at
    # IoU > 0 each prediction but one finds a lesion: 0..1 of 0..4, IoU 2/5, Dice 4/7; 7..11 of 7..8, the same.
    truth = cubes((1, 1, 14), ((0, 0, 0), (1, 1, 5)), ((0, 0, 7), (1, 1, 2)), ((0, 0, 10), (1, 1, 2)))
    pred = cubes((1, 1, 14), ((0, 0, 0), (1, 1, 2)), ((0, 0, 3), (1, 1, 2)), ((0, 0, 7), (1, 1, 5)))
    got = lesion_details(pred, truth, ONE_MM)
    assert (got.n_split, got.n_merged) == (1, 1)
    assert got.dice == pytest.approx([4 / 7, 4 / 7])
    # 0, 1 are on 0..4; 2, 3, 4 are 1, 2 and 3 voxels from 1: 6 over 7 surface voxels, both times.
    assert got.assd_mm == pytest.approx([6 / 7, 6 / 7])
    nothing = lesion_details(np.zeros_like(pred), truth, ONE_MM)
    assert (nothing.n_split, nothing.n_merged, nothing.dice, nothing.assd_mm) == (0, 0, (), ())


def test_a_truth_finds_all_of_itself() -> None:
    truth = np.random.default_rng(2).random((6, 20, 20)) < 0.03
    for scores in score_lesions(truth, truth, ONE_MM):
        assert (scores.overall.precision, scores.overall.recall, scores.overall.f1) == (1.0, 1.0, 1.0)


# ---- by hand


def test_corner_touching_voxels_are_one_lesion() -> None:
    mask = cubes((2, 2, 2), ((0, 0, 0), (1, 1, 1)), ((1, 1, 1), (1, 1, 1)))
    assert lesion_overlaps(mask, mask, ONE_MM).truth_diameters_mm.size == 1


def test_one_found_one_missed_one_false_positive() -> None:
    shape = (3, 3, 30)
    truth = cubes(shape, ((1, 1, 0), (1, 1, 4)), ((1, 1, 10), (1, 1, 2)))
    pred = cubes(shape, ((1, 1, 1), (1, 1, 4)), ((1, 1, 20), (1, 1, 3)))
    # x 0..3 against 1..4: 3 shared of 5, IoU .6
    assert lesion_overlaps(pred, truth, ONE_MM).pair_iou == pytest.approx([0.6])
    for scores in score_lesions(pred, truth, ONE_MM):
        counts = scores.overall
        assert counts == DetectionCounts(true_positives=1, false_positives=1, false_negatives=1)
        assert (counts.precision, counts.recall, counts.f1) == (0.5, 0.5, 0.5)


def test_iou_must_be_above_the_threshold() -> None:
    # x 0..3 against 0..1: 2 of 4, IoU .5 exactly, which is not above .5
    truth, pred = cubes((1, 1, 9), ((0, 0, 0), (1, 1, 4))), cubes((1, 1, 9), ((0, 0, 0), (1, 1, 2)))
    loose, tight = score_lesions(pred, truth, ONE_MM)
    assert (loose.overall.true_positives, tight.overall.true_positives) == (1, 0)


def test_a_prediction_that_spans_two_lesions_finds_the_better_one() -> None:
    # truth x 0..1 and 3..7, prediction 0..7: IoU 2/8 and 5/8
    truth = cubes((1, 1, 9), ((0, 0, 0), (1, 1, 2)), ((0, 0, 3), (1, 1, 5)))
    pred = cubes((1, 1, 9), ((0, 0, 0), (1, 1, 8)))
    overlaps = lesion_overlaps(pred, truth, ONE_MM)
    assert match(overlaps, iou_threshold=0.0) == ((1, 0),)
    counts = score_lesions(pred, truth, ONE_MM)[0].overall
    assert counts == DetectionCounts(true_positives=1, false_positives=0, false_negatives=1)


def test_a_lesion_split_in_two_leaves_one_false_positive() -> None:
    # truth 0..8; pieces 0..5 (IoU 6/9) and 7..8 (2/9): the larger matches, the other is a false positive.
    truth = cubes((1, 1, 9), ((0, 0, 0), (1, 1, 9)))
    pred = cubes((1, 1, 9), ((0, 0, 0), (1, 1, 6)), ((0, 0, 7), (1, 1, 2)))
    counts = score_lesions(pred, truth, ONE_MM)[1].overall
    assert counts == DetectionCounts(true_positives=1, false_positives=1, false_negatives=0)


def test_size_bins_use_the_spacing_and_a_found_lesion_its_true_size() -> None:
    # Voxels of 5×4×5 = 100 mm³: 5 voxels are 500 mm³, (6·500/π)^(1/3) = 9.85 mm, below 10;
    # 6 are 10.46 mm; 42 are 20.02 mm, above 20. The prediction of the large one has only 30 voxels (17.9 mm).
    spacing = (5.0, 4.0, 5.0)
    shape = (9, 9, 40)
    truth = cubes(shape, ((0, 0, 0), (1, 1, 5)), ((0, 4, 0), (1, 1, 6)), ((3, 0, 0), (6, 7, 1)))
    pred = cubes(shape, ((3, 0, 0), (5, 6, 1)), ((0, 0, 20), (1, 1, 5)))
    got = score_lesions(pred, truth, spacing)[0]
    assert got.below_10_mm == DetectionCounts(true_positives=0, false_positives=1, false_negatives=1)
    assert got.from_10_to_20_mm == DetectionCounts(true_positives=0, false_positives=0, false_negatives=1)
    assert got.above_20_mm == DetectionCounts(true_positives=1, false_positives=0, false_negatives=0)


def test_diameter_of_a_sphere_is_its_diameter() -> None:
    z, y, x = np.ogrid[-12:13, -24:25, -24:25]
    ball = (z * 1.0) ** 2 + (y * 0.5) ** 2 + (x * 0.5) ** 2 <= 10.0**2
    got = lesion_overlaps(ball, ball, (1.0, 0.5, 0.5)).truth_diameters_mm
    assert got == pytest.approx([20.0], rel=5e-3)


def test_cases_add_up() -> None:
    truth = cubes((1, 1, 9), ((0, 0, 0), (1, 1, 4)))
    one = score_lesions(truth, truth, ONE_MM)[0]
    missed = score_lesions(np.zeros_like(truth), truth, ONE_MM)[0]
    assert (one + one + missed).overall.recall == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match=r"IoU > 0\.0 and IoU > 0\.5"):
        _ = one + score_lesions(truth, truth, ONE_MM)[1]


# ---- empty edges


def test_without_lesions_nothing_can_be_said() -> None:
    none = np.zeros((2, 3, 4), dtype=np.bool_)
    counts = score_lesions(none, none, ONE_MM)[0].overall
    assert (counts.precision, counts.recall, counts.f1) == (None, None, None)


def test_one_side_without_lesions() -> None:
    none, full = np.zeros((2, 3, 4), dtype=np.bool_), np.ones((2, 3, 4), dtype=np.bool_)
    missed = score_lesions(none, full, ONE_MM)[0].overall
    assert (missed.precision, missed.recall, missed.f1) == (None, 0.0, 0.0)
    false = score_lesions(full, none, ONE_MM)[0].overall
    assert (false.precision, false.recall, false.f1) == (0.0, None, 0.0)


def test_scores_are_strict_json() -> None:
    none = np.zeros((2, 3, 4), dtype=np.bool_)
    written = json.loads(json.dumps(score_lesions(none, none, ONE_MM)[1].to_json(), allow_nan=False))
    assert written["iou_threshold"] == 0.5
    assert written["overall"]["f1"] is None
    assert set(written) == {"iou_threshold", "overall", "below_10_mm", "from_10_to_20_mm", "above_20_mm"}


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\(1, 1, 2\) and \(1, 1, 3\)"):
        lesion_overlaps(np.ones((1, 1, 2), np.bool_), np.ones((1, 1, 3), np.bool_), ONE_MM)


# ---- burden


def test_burden_counts_the_tumour_as_liver() -> None:
    # 3 liver, 1 tumour: 1 / (3 + 1)
    assert tumour_burden(np.array([[[0, 1, 1, 1, 2]]], dtype=np.uint8)) == 0.25
    assert tumour_burden(np.ones((1, 1, 3), dtype=np.uint8)) == 0.0
    assert tumour_burden(np.zeros((1, 1, 3), dtype=np.uint8)) == 0.0


def test_burden_errors_by_hand() -> None:
    # errors .1, -.3, 0: √((.01 + .09) / 3), largest .3
    got = burden_errors([0.2, 0.1, 0.5], [0.1, 0.4, 0.5])
    assert got.rmse == pytest.approx(math.sqrt(0.1 / 3))
    assert got.max_abs == pytest.approx(0.3)
    assert got.n_cases == 3
    none = burden_errors([], [])
    assert (none.rmse, none.max_abs, none.n_cases) == (None, None, 0)
    with pytest.raises(ValueError, match="2 predicted and 1 true"):
        burden_errors([0.1, 0.2], [0.1])


@given(
    hnp.arrays(np.bool_, (6, 5, 6)),
    hnp.arrays(np.int64, 3, elements={"min_value": 0, "max_value": 6}),
)
@settings(deadline=None)
def test_lesions_counted_block_by_block_are_those_of_the_whole(mask: Mask, cuts: np.ndarray) -> None:
    counter = LesionCounter()
    for block in np.split(mask, sorted({0, *cuts.tolist()} - {0})):
        if len(block):
            counter.add(block)
    assert counter.count == len(flood_fill(mask))


def test_lesions_that_meet_in_a_later_block_are_one_and_a_gap_parts_them() -> None:
    arms, bridge = np.zeros((2, 3, 7), dtype=bool), np.zeros((1, 3, 7), dtype=bool)
    arms[:, 1, [0, 6]] = True
    bridge[0, 0, 1:6] = True  # touches both arms at a corner
    counter = LesionCounter()
    counter.add(arms)
    assert counter.count == 2
    counter.add(bridge)
    assert counter.count == 1
    counter.add(np.zeros_like(bridge))
    counter.add(bridge)
    assert counter.count == 2
