"""Reliability, entropy as a detector of errors, temperature: by hand, by brute force, split and whole."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from liverseg.measure.calibration import (
    MIN_PROBABILITY,
    TEMPERATURES,
    ErrorDetection,
    ReliabilityCounts,
    fit_temperature,
    fit_temperature_that_helps,
    tempered,
)

Probabilities = NDArray[np.float32]
seeds = st.integers(0, 10_000)


def random_block(seed: int, n: int = 200) -> tuple[Probabilities, NDArray[np.bool_]]:
    generator = np.random.default_rng(seed)
    # Rounded, so that edges of bins and ties occur.
    prob = generator.beta(0.5, 0.5, n).round(generator.integers(1, 5)).astype(np.float32)
    return prob, generator.random(n) < prob**2


def softmax(logits_cv: NDArray[np.float64]) -> NDArray[np.float64]:
    odds = np.exp(logits_cv - logits_cv.max(axis=0))
    shares: NDArray[np.float64] = odds / odds.sum(axis=0)
    return shares


# ---- reliability


def test_reliability_by_hand() -> None:
    # Bins of a half. Below: 0.1 (no), 0.4 (yes): confidence 0.25, frequency 0.5. Above: 0.6, 0.7, 0.8 (all): 0.7, 1.
    # ECE = 2/5 · 0.25 + 3/5 · 0.3 = 0.28; MCE = 0.3.
    prob = np.array([0.1, 0.4, 0.6, 0.7, 0.8], dtype=np.float32)
    counts = ReliabilityCounts.from_block(prob, np.array([False, True, True, True, True]), n_bins=2)
    assert counts.n_voxels.tolist() == [2, 3]
    np.testing.assert_allclose(counts.confidence, [0.25, 0.7], rtol=1e-6)
    np.testing.assert_allclose(counts.frequency, [0.5, 1.0])
    assert counts.ece == pytest.approx(0.28)
    assert counts.mce == pytest.approx(0.3)


@settings(deadline=None, max_examples=40)
@given(seed=seeds, n_bins=st.integers(1, 20))
def test_reliability_is_its_definition(seed: int, n_bins: int) -> None:
    prob, is_class = random_block(seed)
    bins = [min(int(p * np.float32(n_bins)), n_bins - 1) for p in prob]
    gaps, weights = [], []
    for at in range(n_bins):
        inside = [i for i, b in enumerate(bins) if b == at]
        if inside:
            gaps.append(abs(sum(map(float, prob[inside])) - int(is_class[inside].sum())) / len(inside))
            weights.append(len(inside) / prob.size)
    counts = ReliabilityCounts.from_block(prob, is_class, n_bins=n_bins)
    assert counts.ece == pytest.approx(sum(w * g for w, g in zip(weights, gaps, strict=True)))
    assert counts.mce == pytest.approx(max(gaps))


@settings(deadline=None, max_examples=20)
@given(seed=seeds, cut=st.integers(0, 200))
def test_counts_of_blocks_are_those_of_the_whole(seed: int, cut: int) -> None:
    prob, is_class = random_block(seed)
    whole = ReliabilityCounts.from_block(prob, is_class)
    parts = sum(
        (ReliabilityCounts.from_block(prob[s], is_class[s]) for s in (slice(0, cut), slice(cut, None))),
        start=ReliabilityCounts.empty(),
    )
    np.testing.assert_array_equal(parts.n_voxels, whole.n_voxels)
    np.testing.assert_array_equal(parts.n_correct, whole.n_correct)
    np.testing.assert_allclose(parts.confidence_sum, whole.confidence_sum)
    ranking = ErrorDetection.from_block(prob, is_class)
    other = ErrorDetection.from_block(prob[:cut], is_class[:cut]) + ErrorDetection.from_block(
        prob[cut:], is_class[cut:]
    )
    np.testing.assert_array_equal((other + ErrorDetection.empty()).n_wrong, ranking.n_wrong)
    np.testing.assert_array_equal(other.n_right, ranking.n_right)


def test_the_shape_of_a_block_does_not_matter() -> None:
    prob, is_class = random_block(3)
    flat = ReliabilityCounts.from_block(prob, is_class)
    block = ReliabilityCounts.from_block(prob.reshape(2, 10, 10), is_class.reshape(2, 10, 10))
    assert block.to_json() == flat.to_json()


def test_no_voxel_has_no_error() -> None:
    counts = ReliabilityCounts.empty()
    assert (counts.ece, counts.mce) == (None, None)
    assert np.isnan(counts.confidence).all()
    ranking = ErrorDetection.empty()
    assert (ranking.auroc, ranking.auprc, ranking.error_rate) == (None, None, None)


def test_sure_and_right_is_calibrated_and_sure_and_wrong_is_not() -> None:
    prob = np.array([0.0, 1.0, 1.0000001, -1e-8], dtype=np.float32)
    truth = np.array([False, True, True, False])
    assert ReliabilityCounts.from_block(prob, truth).ece == pytest.approx(0.0, abs=1e-7)
    assert ReliabilityCounts.from_block(prob, ~truth).ece == pytest.approx(1.0)


def test_reliability_goes_to_json_as_plain_numbers() -> None:
    content = json.loads(
        json.dumps(ReliabilityCounts.from_block(*random_block(0)).to_json(), allow_nan=False)
    )
    assert sum(content["n_voxels"]) == 200
    assert json.loads(json.dumps(ReliabilityCounts.empty().to_json(), allow_nan=False))["ece"] is None


# ---- entropy and errors


def test_auroc_of_errors_by_hand() -> None:
    # Right at 0.1, 0.2, 0.4; wrong at 0.2, 0.9. Pairs (wrong above right): 0.2: 1 + 1/2 + 0; 0.9: 3. 4.5 / 6 = 0.75.
    entropy = np.array([0.1, 0.2, 0.4, 0.2, 0.9], dtype=np.float32)
    ranking = ErrorDetection.from_block(entropy, np.array([False, False, False, True, True]))
    assert ranking.auroc == pytest.approx(0.75)
    # From the top: 0.9 (1 of 1 wrong), 0.4 (1 of 2), both of 0.2 (2 of 4): (1 · 1 + 1 · 2/4) / 2 = 0.75.
    assert ranking.auprc == pytest.approx(0.75)
    assert ranking.error_rate == pytest.approx(0.4)


@settings(deadline=None, max_examples=40)
@given(seed=seeds, n=st.integers(1, 40))
def test_auroc_of_errors_is_its_definition(seed: int, n: int) -> None:
    generator = np.random.default_rng(seed)
    entropy = generator.choice([0.0, 0.01, 0.05, 0.3, 0.6, 1.0], n).astype(
        np.float32
    )  # each in a bin of its own
    wrong = generator.random(n) < 0.4
    ranking = ErrorDetection.from_block(entropy, wrong)
    pairs = [(w > r) + 0.5 * (w == r) for w in entropy[wrong] for r in entropy[~wrong]]
    assert ranking.auroc == (pytest.approx(np.mean(pairs)) if pairs else None)
    steps = [(entropy[wrong] == h).sum() * wrong[entropy >= h].mean() for h in np.unique(entropy[wrong])]
    assert ranking.auprc == (pytest.approx(sum(steps) / wrong.sum()) if wrong.any() else None)


def test_all_right_and_all_wrong_have_no_ranking() -> None:
    entropy = np.linspace(0, 1, 7, dtype=np.float32)
    right = ErrorDetection.from_block(entropy, np.zeros(7, dtype=np.bool_))
    wrong = ErrorDetection.from_block(entropy, np.ones(7, dtype=np.bool_))
    assert (right.auroc, right.auprc, right.error_rate) == (None, None, 0.0)
    assert (wrong.auroc, wrong.auprc, wrong.error_rate) == (None, 1.0, 1.0)


def test_small_entropies_are_told_apart_and_the_largest_has_a_bin() -> None:
    entropy = np.array(
        [1e-5, 1e-4, math.log(3), 1.0986125], dtype=np.float32
    )  # the last above ln 3 by rounding
    assert ErrorDetection.from_block(entropy[:2], np.array([False, True])).auroc == 1.0
    assert ErrorDetection.from_block(entropy[2:], np.array([False, True])).auroc == 0.5


def test_binning_costs_the_fourth_digit() -> None:
    generator = np.random.default_rng(1)
    right, wrong = generator.exponential(0.02, 2000), 0.3 * generator.random(300)
    entropy = np.concatenate((right, wrong)).astype(np.float32)
    got = ErrorDetection.from_block(entropy, np.arange(2300) >= 2000).auroc
    exact = np.mean(wrong[:, None] > right[None, :])
    assert got == pytest.approx(exact, abs=1e-3)


# ---- temperature


def test_tempering_by_hand() -> None:
    # Background 0.32, liver 0.64, tumour 0.04; T = 2 takes roots: 0.5657, 0.8, 0.2, sum 1.5657.
    got = tempered(np.array([[0.64], [0.04]], dtype=np.float32), 2.0)
    root = math.sqrt(0.32)
    np.testing.assert_allclose(got.ravel(), [0.8 / (1 + root), 0.2 / (1 + root)], rtol=1e-5)
    # T = 1/2 squares: 0.1024, 0.4096, 0.0016, sum 0.5136.
    got = tempered(np.array([[0.64], [0.04]], dtype=np.float32), 0.5)
    np.testing.assert_allclose(got.ravel(), [0.4096 / 0.5136, 0.0016 / 0.5136], rtol=1e-5)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, temperature=st.floats(0.01, 20.0))
def test_tempering_keeps_order_and_stays_a_distribution(seed: int, temperature: float) -> None:
    p = softmax(np.random.default_rng(seed).normal(0, 6, (3, 50)))
    foreground = p[1:].astype(np.float32)
    got = tempered(foreground, temperature)
    assert np.isfinite(got).all()
    assert (got >= 0).all()
    assert (got.sum(axis=0) <= 1 + 1e-6).all()
    after = np.concatenate((1 - got.sum(axis=0, keepdims=True), got))
    top = np.take_along_axis(after, p.argmax(axis=0)[None], axis=0)[0]
    assert (top >= after.max(axis=0) - 1e-5).all()
    np.testing.assert_allclose(tempered(foreground, 1.0), foreground, atol=1e-6)


def test_no_temperature_moves_a_sure_voxel_or_thirds() -> None:
    sure = np.array([[1, 0, 0], [0, 1, 0]], dtype=np.float32)
    thirds = np.full((2, 1), 1 / 3, dtype=np.float32)
    for temperature in (1e-3, 0.05, 1.0, 20.0):
        np.testing.assert_array_equal(tempered(sure, temperature), sure)
        np.testing.assert_allclose(tempered(thirds, temperature), thirds, rtol=2e-4)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_of_the_data_is_found(temperature: float) -> None:
    generator = np.random.default_rng(5)
    logits = generator.normal(0, 2, (3, 30_000))
    drawn = (softmax(logits).cumsum(axis=0) < generator.random(30_000)).sum(axis=0).astype(np.uint8)
    foreground = softmax(logits * temperature)[1:].astype(np.float32)
    fit = fit_temperature([foreground[:, :9000], foreground[:, 9000:]], [drawn[:9000], drawn[9000:]])
    assert fit is not None
    assert fit.temperature == pytest.approx(temperature, rel=0.03)
    assert fit.nll_after <= fit.nll_before
    assert fit.n_voxels == 30_000
    grid = [nll_brute(tempered(foreground, t), drawn) for t in np.geomspace(0.1, 10, 40)]
    assert fit.nll_after <= min(grid) + 1e-5
    assert fit.nll_before == pytest.approx(nll_brute(foreground, drawn), abs=1e-4)


def nll_brute(foreground: Probabilities, truth: NDArray[np.uint8]) -> float:
    p = np.concatenate((1 - foreground.sum(axis=0, keepdims=True), foreground)).astype(np.float64)
    return float(-np.log(np.maximum(p[truth, np.arange(truth.size)], MIN_PROBABILITY)).mean())


def test_the_likelihood_by_hand() -> None:
    # Truths liver (0.5) and background (0.25): (ln 2 + ln 4) / 2 = 1.5 ln 2.
    foreground = np.array([[0.5, 0.5], [0.25, 0.25]], dtype=np.float32)
    fit = fit_temperature([foreground], [np.array([1, 0], dtype=np.uint8)])
    assert fit is not None
    assert fit.nll_before == pytest.approx(1.5 * math.log(2), rel=1e-5)


def test_an_impossible_truth_costs_much_but_not_infinitely() -> None:
    fit = fit_temperature([np.array([[1.0], [0.0]], dtype=np.float32)], [np.array([2], dtype=np.uint8)])
    assert fit is not None
    assert fit.nll_before == pytest.approx(-math.log(MIN_PROBABILITY), abs=1e-4)
    assert fit.temperature == pytest.approx(TEMPERATURES[1], rel=0.01)  # as soft as allowed


def test_what_is_all_right_is_sharpened_as_far_as_allowed() -> None:
    foreground = np.full((2, 50), 0.2, dtype=np.float32)
    fit = fit_temperature([foreground], [np.zeros(50, dtype=np.uint8)])
    assert fit is not None
    assert fit.temperature < 2 * TEMPERATURES[0]
    assert fit.nll_after < 1e-3 < fit.nll_before


def test_no_voxel_has_no_temperature() -> None:
    assert fit_temperature([], []) is None
    assert fit_temperature([np.zeros((2, 0), dtype=np.float32)], [np.zeros(0, dtype=np.uint8)]) is None


def overconfident(seed: int, *, power: float, n: int = 4000) -> tuple[Probabilities, NDArray[np.uint8]]:
    """Probabilities of liver and tumour whose logits are ``power`` times what the truth is drawn by."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 1.5, (3, n))
    honest = softmax(logits)
    truth = (generator.random(n)[None] > np.cumsum(honest, axis=0)).sum(axis=0).clip(0, 2).astype(np.uint8)
    return softmax(power * logits)[1:].astype(np.float32), truth


def test_a_temperature_is_taken_where_it_helps_left_out_cases() -> None:
    cases = [overconfident(seed, power=2.5) for seed in range(4)]
    fit = fit_temperature_that_helps([c[0] for c in cases], [c[1] for c in cases])
    assert fit is not None
    assert fit.temperature == pytest.approx(2.5, rel=0.1)
    # Two networks in one: what fits one spoils the other, and nothing helps a case that was left out.
    mixed = [overconfident(0, power=6.0), overconfident(1, power=0.15)]
    assert fit_temperature_that_helps([c[0] for c in mixed], [c[1] for c in mixed]) is None
    assert fit_temperature_that_helps([cases[0][0]], [cases[0][1]]) is None
    assert fit_temperature_that_helps([], []) is None
