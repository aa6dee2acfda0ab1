"""Samples against each other and the truth: by hand, by sets of voxels, block by block."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from liverseg.measure import diversity
from liverseg.measure.diversity import Overlap, PairCounts

SHAPE = (3, 4, 5)
Labels = NDArray[np.uint8]


def random_labels(seed: int, n: int, rate: float) -> Labels:
    """n samples and, last, the truth."""
    generator = np.random.default_rng(seed)
    drawn = generator.integers(1, 3, (n + 1, *SHAPE)) * (generator.random((n + 1, *SHAPE)) < rate)
    return drawn.astype(np.uint8)


labels_with_truth = st.builds(
    random_labels, st.integers(0, 10_000), st.integers(1, 5), st.sampled_from([0.0, 0.03, 0.3, 0.9])
)
overlaps: st.SearchStrategy[Overlap] = st.sampled_from(("iou", "dice"))


def of(labels: Labels) -> PairCounts:
    return PairCounts.from_block(labels[:-1], labels[-1])


def brute_overlap(a: Labels, b: Labels, least: int, overlap: Overlap) -> float:
    first, second = (set(np.flatnonzero(label >= least).tolist()) for label in (a, b))
    if not first | second:
        return 1.0
    shared = len(first & second)
    return shared / len(first | second) if overlap == "iou" else 2 * shared / (len(first) + len(second))


def brute_distance(a: Labels, b: Labels, overlap: Overlap) -> float:
    return 1 - (brute_overlap(a, b, 1, overlap) + brute_overlap(a, b, 2, overlap)) / 2


# ---- laws


@settings(deadline=None, max_examples=40)
@given(labels=labels_with_truth, overlap=overlaps)
def test_everything_is_its_definition(labels: Labels, overlap: Overlap) -> None:
    samples, truth = labels[:-1], labels[-1]
    counts = of(labels)
    to_truth = [brute_distance(s, truth, overlap) for s in samples]
    among = [brute_distance(a, b, overlap) for a in samples for b in samples]
    assert counts.ged(overlap) == pytest.approx(2 * np.mean(to_truth) - np.mean(among))
    pairs = [brute_distance(a, b, "iou") for a, b in itertools.combinations(samples, 2)]
    assert counts.diversity == (pytest.approx(np.mean(pairs)) if pairs else None)
    for name, least in (("liver", 1), ("tumour", 2)):
        dice = np.mean([brute_overlap(s, truth, least, "dice") for s in samples])
        assert counts.to_json()[f"{name}_dice_of_samples"] == pytest.approx(dice)
        volumes = counts.volumes_ml(0.5)[least - 1]
        np.testing.assert_array_equal(volumes, [0.5 * np.count_nonzero(s >= least) for s in samples])


@settings(deadline=None, max_examples=40)
@given(labels=labels_with_truth, overlap=overlaps, data=st.data())
def test_the_energy_distance_is_a_distance(labels: Labels, overlap: Overlap, data: st.DataObject) -> None:
    # Overlap by IoU and by Dice are both positive definite, so that the squared distance is never below 0.
    counts = of(labels)
    assert counts.ged(overlap) >= -1e-12
    assert of(np.repeat(labels[-1:], 4, axis=0)).ged(overlap) == 0.0
    order = data.draw(st.permutations(range(len(labels) - 1)))
    assert of(labels[[*order, -1]]).ged(overlap) == pytest.approx(counts.ged(overlap))


@settings(deadline=None, max_examples=30)
@given(labels=labels_with_truth, cut=st.integers(0, 3), chunk=st.integers(1, 70))
def test_blocks_add_up_to_the_whole(labels: Labels, cut: int, chunk: int) -> None:
    parts = sum((of(part) for part in (labels[:, :cut], labels[:, cut:])), PairCounts.empty(len(labels) - 1))
    np.testing.assert_array_equal(parts.shared_cmm, of(labels).shared_cmm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diversity, "_CHUNK_VOXELS", chunk)
        np.testing.assert_array_equal(of(labels).shared_cmm, parts.shared_cmm)
    assert parts.shared_cmm.dtype == np.int64


# ---- by hand


def test_two_samples_by_hand() -> None:
    # Livers {0, 1}, {1, 2}, truth {1}; no tumours, which overlap by 1 and halve every distance.
    # IoU: 1/2 and 1/2 with the truth, 1/3 between them. d = 1/4, 1/4; 1/3.
    # GED² = 2 · 1/4 - (0 + 1/3 + 1/3 + 0) / 4 = 1/3; diversity 1/3.
    counts = of(np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0]], dtype=np.uint8))
    assert counts.shared_cmm[0].tolist() == [[2, 1, 1], [1, 2, 1], [1, 1, 1]]
    assert counts.ged() == pytest.approx(1 / 3)
    assert counts.diversity == pytest.approx(1 / 3)
    # Dice: 2/3 and 2/3, 1/2 between them. d = 1/6; 1/4. GED² = 1/3 - 1/8 = 5/24.
    assert counts.ged("dice") == pytest.approx(5 / 24)
    assert counts.dice_of_samples == pytest.approx((2 / 3, 1.0))
    assert counts.volumes_ml(3.0).tolist() == [[6.0, 6.0], [0.0, 0.0]]


def test_a_tumour_is_liver_too() -> None:
    # The truth's tumour {1} called liver: liver agrees, tumour is missed: d = (0 + 1) / 2, and twice that for n = 1.
    counts = of(np.array([[1, 1], [1, 2]], dtype=np.uint8))
    assert counts.ged() == pytest.approx(1.0)
    assert counts.dice_of_samples == (1.0, 0.0)


def test_one_sample_has_no_diversity() -> None:
    counts = of(np.array([[1, 0], [1, 1]], dtype=np.uint8))
    assert counts.diversity is None
    assert counts.ged() == pytest.approx(2 * (1 - (1 / 2 + 1) / 2))
    assert json.loads(json.dumps(counts.to_json(), allow_nan=False))["diversity"] is None


def test_nothing_anywhere_agrees() -> None:
    counts = PairCounts.empty(3)
    assert (counts.ged(), counts.diversity, counts.dice_of_samples) == (0.0, 0.0, (1.0, 1.0))


def test_more_voxels_than_float32_counts_are_counted() -> None:
    half = PairCounts(shared_cmm=np.full((2, 2, 2), 1 << 40, dtype=np.int64))
    assert (half + half).volumes_ml(1.0).tolist() == [[float(1 << 41)], [float(1 << 41)]]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="truth's shape"):
        PairCounts.from_block(np.zeros((2, 3, 4), dtype=np.uint8), np.zeros((4, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="2 and 3 samples"):
        PairCounts.empty(2) + PairCounts.empty(3)


def test_pairwise_dice_by_hand() -> None:
    # Livers of voxels 0..3, 0..1 and none; tumour in the first alone. Liver: 2·2/6 = 2/3, 0, 0; tumour: 0, 0 and 1
    # of the two that both have none.
    labels = np.zeros((3, 1, 1, 5), dtype=np.uint8)
    labels[0, ..., :4], labels[0, ..., 3], labels[1, ..., :2] = 1, 2, 1
    counts = PairCounts.from_block(labels, np.ones((1, 1, 5), dtype=np.uint8))
    assert counts.pairwise_dice is not None
    assert list(counts.pairwise_dice) == pytest.approx([2 / 9, 1 / 3])
    assert PairCounts.from_block(labels[:1], labels[0]).pairwise_dice is None
