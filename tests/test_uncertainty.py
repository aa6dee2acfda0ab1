"""Entropy, mutual information, volume intervals, doubtful lesions and case scores: laws, by hand, at the edges."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_cache.geometry import Grid
from liverseg.measure.uncertainty import (
    MAX_ENTROPY,
    LesionCandidate,
    Samples,
    entropy,
    lesion_candidates,
    mean_entropy,
    mean_foreground,
    mutual_information,
    volume_interval,
)
from liverseg.model.inputs import decide as decide_tensors
from pipeline.labels import decide

SHAPE = (3, 4, 5)
LIVER, TUMOUR = (1.0, 0.0), (0.0, 1.0)


def random_samples(seed: int, n: int, *, sharpness: float = 3.0) -> Samples:
    """Softmax of normal logits: (n, 2, 3, 4, 5)."""
    logits = np.random.default_rng(seed).normal(0, sharpness, (n, 3, *SHAPE))
    odds = np.exp(logits)
    foreground: Samples = (odds / odds.sum(axis=1, keepdims=True))[:, 1:].astype(np.float32)
    return foreground


samples = st.builds(
    random_samples, st.integers(0, 10_000), st.integers(1, 5), sharpness=st.sampled_from([0.1, 3.0, 40.0])
)


def three(foreground: NDArray[np.float32]) -> NDArray[np.float64]:
    """Background, liver, tumour in float64."""
    exact = foreground.astype(np.float64)
    return np.concatenate((np.clip(1 - exact.sum(axis=0, keepdims=True), 0, 1), exact))


def from_labels(*labels: NDArray[np.int64]) -> Samples:
    """Samples that are sure of these labels."""
    return np.stack([np.stack([label == 1, label == 2]) for label in labels]).astype(np.float32)


def rows(lesions: list[LesionCandidate]) -> NDArray[np.float64]:
    """Probability, volume, peak and centre, a row a lesion."""
    found = [(d.probability, d.volume_ml, d.peak, *d.centre_mm) for d in lesions]
    return np.array(found, dtype=np.float64).reshape(-1, 6)


# ---- laws


@settings(deadline=None, max_examples=40)
@given(foreground=samples)
def test_entropy_is_its_definition(foreground: Samples) -> None:
    got = entropy(foreground[0])
    for at in np.ndindex(SHAPE):
        p = three(foreground[0])[(slice(None), *at)]
        assert got[at] == pytest.approx(-sum(q * math.log(q) for q in p.tolist() if q > 0), abs=3e-6)
    assert got.dtype == np.float32
    assert (got >= 0).all()
    assert (got <= np.float32(MAX_ENTROPY) + np.float32(1e-6)).all()


@settings(deadline=None, max_examples=40)
@given(foreground=samples)
def test_mutual_information_is_the_mean_divergence_from_the_mean(foreground: Samples) -> None:
    # H(mean) - mean H = mean KL(sample || mean): another formula for the same.
    mean = np.mean([three(one) for one in foreground], axis=0)
    divergence = [
        np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(mean, 1e-300))), 0).sum(axis=0)
        for p in map(three, foreground)
    ]
    got = mutual_information(foreground)
    np.testing.assert_allclose(got, np.mean(divergence, axis=0), atol=5e-6)
    assert (got >= 0).all()
    assert (got <= entropy(mean_foreground(foreground)) + 1e-6).all()


@settings(deadline=None, max_examples=20)
@given(foreground=samples, data=st.data())
def test_the_order_of_the_samples_changes_nothing(foreground: Samples, data: st.DataObject) -> None:
    other = foreground[data.draw(st.permutations(range(len(foreground))))]
    np.testing.assert_allclose(mean_foreground(other), mean_foreground(foreground), rtol=1e-6)
    np.testing.assert_allclose(mutual_information(other), mutual_information(foreground), atol=1e-6)
    np.testing.assert_allclose(
        rows(lesion_candidates(other, GRID)), rows(lesion_candidates(foreground, GRID)), rtol=1e-6
    )
    label = decide(foreground[0])
    assert mean_entropy(other, label) == pytest.approx(mean_entropy(foreground, label), abs=1e-6)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), n=st.integers(1, 7))
def test_equal_samples_tell_nothing_about_each_other(seed: int, n: int) -> None:
    one = random_samples(seed, 1)
    many = np.repeat(one, n, axis=0)
    np.testing.assert_array_equal(mean_foreground(many), one[0])
    assert not mutual_information(many).any()


@settings(deadline=None, max_examples=30)
@given(foreground=samples)
def test_tensors_are_labelled_by_the_rule_of_arrays(foreground: Samples) -> None:
    expected = decide_tensors(torch.from_numpy(foreground)).numpy()
    np.testing.assert_array_equal(np.stack([decide(one) for one in foreground]), expected)
    quarters = np.round(foreground[0] * 4) / 4  # one half, and as much liver as tumour
    np.testing.assert_array_equal(
        decide(quarters), decide_tensors(torch.from_numpy(quarters)[None])[0].numpy()
    )
    assert decide(foreground[0]).dtype == np.uint8


def test_rounding_makes_no_negative_information() -> None:
    nearly_equal = np.float32(0.3) + np.random.default_rng(0).normal(0, 1e-7, (3, 2, 10, 10, 10))
    foreground = nearly_equal.astype(np.float32)
    raw = entropy(mean_foreground(foreground)) - np.mean([entropy(one) for one in foreground], axis=0)
    assert (raw < 0).any()  # what the law is proved on
    assert (mutual_information(foreground) >= 0).all()


def test_arguments_are_left_as_they_were() -> None:
    foreground = random_samples(0, 3)
    before = foreground.copy()
    mutual_information(foreground)
    lesion_candidates(foreground, GRID)
    mean_entropy(foreground, decide(foreground[0]))
    np.testing.assert_array_equal(foreground, before)


# ---- entropy by hand


def test_entropy_by_hand() -> None:
    # 1/2, 1/4, 1/4: ln 2 / 2 + 2 · ln 4 / 4 = 1.5 ln 2; thirds: ln 3; 1/2, 1/2, 0: ln 2.
    foreground = np.array([[0.25, 1 / 3, 0.5], [0.25, 1 / 3, 0.0]], dtype=np.float32)
    np.testing.assert_allclose(entropy(foreground), [1.5 * math.log(2), math.log(3), math.log(2)], rtol=1e-6)


def test_a_sure_voxel_has_exactly_no_entropy() -> None:
    foreground = np.array([[1, 0, 0], [0, 1, 0]], dtype=np.float32)
    assert entropy(foreground).tolist() == [0.0, 0.0, 0.0]


def test_probabilities_off_by_rounding_are_no_nan() -> None:
    foreground = np.array([[1.0000002, -1e-8, 0.5], [-2e-7, 1.0000001, 0.5000001]], dtype=np.float32)
    np.testing.assert_allclose(entropy(foreground), [0, 0, math.log(2)], atol=1e-6)


def test_mutual_information_by_hand() -> None:
    # Voxel 0: sure liver against sure background: H(1/2, 1/2) - 0 = ln 2. Voxel 1: both say 1/2, 1/2: ln 2 - ln 2 = 0.
    foreground = np.array([[[1, 0.5], [0, 0]], [[0, 0.5], [0, 0]]], dtype=np.float32).reshape(2, 2, 1, 1, 2)
    np.testing.assert_allclose(mutual_information(foreground).ravel(), [math.log(2), 0], atol=1e-7)


# ---- volumes


def test_a_volume_interval_by_hand() -> None:
    # Ranks 0.05 · 40 = 2 and 0.95 · 40 = 38 of 1, 2, ... 39 mL; variance of 1...n is n (n + 1) / 12 with n - 1.
    got = volume_interval(np.random.default_rng(0).permutation(np.arange(1.0, 40.0)))
    assert (got.mean_ml, got.low_ml, got.high_ml) == pytest.approx((20, 2, 38))
    assert got.sd_ml == pytest.approx(math.sqrt(39 * 40 / 12))


def test_few_samples_reach_from_the_least_to_the_most() -> None:
    got = volume_interval([4.0, 1.0, 7.0])
    assert (got.low_ml, got.high_ml, got.sd_ml) == pytest.approx((1, 7, 3))


def test_one_sample_is_its_own_interval() -> None:
    assert dataclasses.astuple(volume_interval([5.0])) == (5.0, 0.0, 5.0, 5.0)


def test_no_sample_has_no_interval() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        volume_interval([])


def test_the_interval_holds_nine_of_ten_truths_from_the_samples_own_distribution() -> None:
    drawn = np.random.default_rng(7).gamma(4.0, size=(3000, 25))
    intervals = [volume_interval(row[1:]) for row in drawn]
    held = [i.low_ml <= row[0] <= i.high_ml for i, row in zip(intervals, drawn, strict=True)]
    # Standard error 0.0055; NumPy's default quantiles would hold about 0.83.
    assert np.mean(held) == pytest.approx(0.9, abs=0.015)


# ---- lesions

# x turned round: RAS x = 100 - 2 i, y = 3 j, z = -10 + 4 k; a voxel is 24 mm³.
GRID = Grid.from_array(SHAPE, np.array([[-2, 0, 0, 100], [0, 3, 0, 0], [0, 0, 4, -10], [0, 0, 0, 1.0]]))


def brute_lesions(union: NDArray[np.bool_]) -> list[set[tuple[int, ...]]]:
    """Flood fill through all 26 neighbours."""
    left = {tuple(at) for at in np.argwhere(union).tolist()}
    found = []
    while left:
        queue, lesion = deque([left.pop()]), set()
        while queue:
            at = queue.popleft()
            lesion.add(at)
            around = {
                tuple(a + s for a, s in zip(at, step, strict=True))
                for step in itertools.product((-1, 0, 1), repeat=3)
            }
            queue.extend(around & left)
            left -= around
        found.append(lesion)
    return found


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 4), rate=st.sampled_from([0.03, 0.1, 0.3]))
def test_lesions_are_their_definition(seed: int, n: int, rate: float) -> None:
    labels = 1 + (np.random.default_rng(seed).random((n, *SHAPE)) < rate).astype(np.int64)
    expected = []
    for lesion in brute_lesions((labels == 2).any(axis=0)):
        counts = [sum(label[at] == 2 for at in lesion) for label in labels]
        votes = np.array([sum(label[at] == 2 for label in labels) for at in lesion])
        z, y, x = votes @ np.array(list(lesion)) / votes.sum()
        share = np.count_nonzero(counts) / n
        peak = float(votes.max() / n)
        expected.append((share, float(np.mean(counts)) * 0.024, peak, 100 - 2 * x, 3 * y, -10 + 4 * z))
    got = rows(lesion_candidates(from_labels(*labels), GRID, smallest_mm=0.0))
    assert got[:, 0].tolist() == sorted(got[:, 0], reverse=True)
    # Lesions that agree in probability and volume may come in any order among themselves.
    wanted = np.array(expected).reshape(-1, 6)
    order, wanted_order = (np.lexsort(table.round(6).T) for table in (got, wanted))
    np.testing.assert_allclose(got[order], wanted[wanted_order], rtol=1e-6)


def test_lesions_by_hand() -> None:
    first, second = np.ones(SHAPE, dtype=np.int64), np.ones(SHAPE, dtype=np.int64)
    first[0, 0, 0:3] = 2  # three voxels in the first sample, two of them in the second
    second[0, 0, 1:3] = 2
    second[2, 3, 1:5] = 2  # four voxels in the second sample alone
    got = lesion_candidates(from_labels(first, second), GRID)
    # Votes 1, 2, 2 along i: (0 · 1 + 1 · 2 + 2 · 2) / 5 = 1.2; 100 - 2.4 = 97.6. The other: i = 2.5, j = 3, k = 2.
    expected = [
        LesionCandidate(probability=1.0, peak=1.0, volume_ml=2.5 * 0.024, centre_mm=(97.6, 0.0, -10.0)),
        LesionCandidate(probability=0.5, peak=0.5, volume_ml=2.0 * 0.024, centre_mm=(95.0, 9.0, -2.0)),
    ]
    np.testing.assert_allclose(rows(got), rows(expected))


def test_voxels_that_touch_at_a_corner_are_one_lesion() -> None:
    label = np.ones(SHAPE, dtype=np.int64)
    label[0, 0, 0] = label[1, 1, 1] = 2
    (lesion,) = lesion_candidates(from_labels(label), GRID, smallest_mm=0.0)
    assert lesion.volume_ml == pytest.approx(2 * 0.024)


def test_what_is_a_speck_in_every_sample_is_noise() -> None:
    # A sphere of 5 mm has 65 mm³: two voxels (48 mm³) are less, three (72 mm³) more; the samples' union is four.
    one, other = np.ones(SHAPE, dtype=np.int64), np.ones(SHAPE, dtype=np.int64)
    one[1, 1, 0:2] = 2
    other[1, 1, 2:4] = 2
    assert lesion_candidates(from_labels(one, other), GRID) == []
    other[1, 1, 1] = 2
    assert len(lesion_candidates(from_labels(one, other), GRID)) == 1


def test_the_likeliest_comes_first_then_the_largest() -> None:
    grid = Grid.from_array((1, 1, 12), np.diag([10.0, 10.0, 10.0, 1.0]))
    both, once = np.ones((1, 1, 12), dtype=np.int64), np.ones((1, 1, 12), dtype=np.int64)
    both[0, 0, 0] = once[0, 0, 0] = 2  # in both samples, small
    once[0, 0, 2:4] = 2  # in one, of two voxels
    once[0, 0, 5:9] = 2  # in one, of four
    got = lesion_candidates(from_labels(both, once), grid)
    np.testing.assert_allclose(rows(got)[:, :2], [(1.0, 1.0), (0.5, 2.0), (0.5, 1.0)])


def test_no_tumour_is_no_lesion() -> None:
    assert lesion_candidates(from_labels(np.ones(SHAPE, dtype=np.int64)), GRID) == []


def test_a_lesion_goes_to_json_as_it_is() -> None:
    label = np.full(SHAPE, 2)
    (lesion,) = lesion_candidates(from_labels(label), GRID)
    content = json.loads(json.dumps(dataclasses.asdict(lesion), allow_nan=False))
    assert content == {
        "probability": 1.0,
        "peak": 1.0,
        "volume_ml": pytest.approx(60 * 0.024),
        "centre_mm": pytest.approx([96.0, 4.5, -6.0]),
    }


# ---- one number a case


@settings(deadline=None, max_examples=30)
@given(foreground=samples)
def test_the_mean_entropy_has_its_range(foreground: Samples) -> None:
    assert 0 <= mean_entropy(foreground, decide(foreground[0])) <= MAX_ENTROPY + 1e-6


def test_a_case_without_a_liver_comes_first_and_a_sure_one_last() -> None:
    label = np.random.default_rng(0).integers(0, 3, SHAPE).astype(np.uint8)
    sure = from_labels(label.astype(np.int64), label.astype(np.int64))
    assert mean_entropy(sure, label) == 0.0
    assert mean_entropy(sure, np.zeros_like(label)) == MAX_ENTROPY


def test_the_mean_entropy_is_the_entropy_near_the_liver_by_hand() -> None:
    # Liver in one corner with p = 3/4; what is within two face steps of it: 1 + 3 + 6 = 10 voxels of an octant.
    foreground = np.zeros((1, 2, 6, 6, 6), dtype=np.float32)
    foreground[0, 0, 0, 0, 0] = 0.75
    foreground[0, 0, 5, 5, 5] = 0.6  # another organ, taken for liver: not of the component that the label has
    label = np.zeros((6, 6, 6), dtype=np.uint8)
    label[0, 0, 0] = 1
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / 10
    assert mean_entropy(foreground, label) == pytest.approx(expected, rel=1e-6)
