"""Risk and coverage, rank correlation, intervals and their widening: by hand, by brute force, with few cases."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liverseg.measure.selective import (
    auroc_of_scores,
    fit_widening,
    interval_coverage,
    risk_coverage,
    spearman,
    widened,
)
from liverseg.measure.uncertainty import VolumeInterval, volume_interval

values = st.integers(0, 4).map(lambda n: n / 4)  # few, so that ties are common
cases = st.lists(st.tuples(values, values), min_size=1, max_size=6)


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def an_interval(mean_ml: float, sd_ml: float) -> VolumeInterval:
    return VolumeInterval(mean_ml=mean_ml, sd_ml=sd_ml, low_ml=mean_ml - sd_ml, high_ml=mean_ml + sd_ml)


# ---- risk and coverage


def test_risk_and_coverage_by_hand() -> None:
    # Risks 0.1, 0.5, 0.3 from certain to uncertain: means 0.1, 0.3, 0.3, AURC 0.7 / 3; best order 0.1, 0.2, 0.3: 0.2.
    curve = risk_coverage([0.3, 0.1, 0.5], [0.9, 0.1, 0.2])
    np.testing.assert_allclose(curve.coverage, [1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(curve.selective_risk, [0.1, 0.3, 0.3])
    np.testing.assert_allclose(curve.optimum, [0.1, 0.2, 0.3])
    assert curve.aurc == pytest.approx(0.7 / 3)
    assert curve.excess_aurc == pytest.approx(0.7 / 3 - 0.2)


@settings(deadline=None, max_examples=40)
@given(drawn=cases)
def test_ties_are_averaged_over_their_orders(drawn: list[tuple[float, float]]) -> None:
    risks, uncertainties = zip(*drawn, strict=True)
    areas = []
    for order in itertools.permutations(range(len(drawn))):
        by = [uncertainties[i] for i in order]
        if by == sorted(by):
            kept = [risks[i] for i in order]
            areas.append(np.mean([np.mean(kept[:k]) for k in range(1, len(kept) + 1)]))
    assert risk_coverage(risks, uncertainties).aurc == pytest.approx(np.mean(areas))


@settings(deadline=None, max_examples=40)
@given(drawn=cases)
def test_no_order_beats_the_best_nor_is_beaten_by_the_worst(drawn: list[tuple[float, float]]) -> None:
    risks, uncertainties = (np.array(column) for column in zip(*drawn, strict=True))
    curve = risk_coverage(risks, uncertainties)
    best, worst = risk_coverage(risks, risks), risk_coverage(risks, -risks)
    assert None not in (curve.aurc, curve.excess_aurc, best.aurc, worst.aurc)
    assert best.excess_aurc == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(curve.optimum, best.selective_risk)
    assert -1e-12 <= curve.selective_risk[-1] - risks.mean() <= 1e-12
    assert (curve.selective_risk >= best.selective_risk - 1e-12).all()
    assert (curve.selective_risk <= worst.selective_risk + 1e-12).all()


def test_constant_uncertainty_is_the_random_order() -> None:
    assert risk_coverage([0.0, 0.2, 0.7], [1, 1, 1]).aurc == pytest.approx(0.3)


def test_one_case_and_none() -> None:
    one = risk_coverage([0.25], [3.0])
    assert (one.aurc, one.excess_aurc, one.coverage.tolist()) == (0.25, 0.0, [1.0])
    none = risk_coverage([], [])
    assert (none.aurc, none.excess_aurc, none.coverage.size) == (None, None, 0)


def test_cases_must_pair_up_and_have_values() -> None:
    with pytest.raises(ValueError, match="got 2, 1"):
        risk_coverage([0.1, 0.2], [0.1])
    with pytest.raises(ValueError, match="not finite"):
        risk_coverage([0.1, math.nan], [0.1, 0.2])


# ---- correlation


def ranks(column: list[float]) -> list[float]:
    """Mean rank of each, from 1."""
    return [sum(v < x for v in column) + (sum(v == x for v in column) + 1) / 2 for x in column]


@settings(deadline=None, max_examples=30)
@given(drawn=st.lists(st.tuples(values, values), min_size=3, max_size=12))
def test_spearman_is_the_correlation_of_ranks(drawn: list[tuple[float, float]]) -> None:
    a, b = (list(column) for column in zip(*drawn, strict=True))
    got = spearman(a, b, generator=generator())
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert (got.rho, got.p_value, got.low95, got.high95) == (None, None, None, None)
        return
    expected = np.corrcoef(ranks(a), ranks(b))[0, 1]
    assert got.rho == pytest.approx(expected)
    assert got.low95 is not None
    assert got.high95 is not None
    assert -1 - 1e-9 <= got.low95 <= got.high95 <= 1 + 1e-9


def test_spearman_by_hand() -> None:
    # 1 - 6 Σ d² / (n (n² - 1)) with d = 0, 1, -1, 0, 0: 1 - 12 / 120 = 0.9.
    got = spearman([1, 2, 3, 4, 5], [10, 30, 20, 40, 50], generator=generator())
    assert got.rho == pytest.approx(0.9)
    # t = 0.9 · sqrt(3 / 0.19) = 3.576 on three degrees of freedom: two-sided 0.0374.
    assert got.p_value == pytest.approx(0.0374, abs=1e-4)


def test_the_bootstrap_of_spearman_is_that_of_its_resamples() -> None:
    a, b = np.array([1.0, 2, 2, 5, 7]), np.array([3.0, 1, 4, 4, 9])
    got = spearman(a, b, generator=np.random.default_rng(9))
    rows = np.random.default_rng(9).integers(5, size=(2000, 5))
    pairs = [(a[row].tolist(), b[row].tolist()) for row in rows]
    some = [np.corrcoef(ranks(x), ranks(y))[0, 1] for x, y in pairs if len(set(x)) > 1 and len(set(y)) > 1]
    assert len(some) < 2000
    assert (got.low95, got.high95) == pytest.approx(tuple(np.percentile(some, [2.5, 97.5])))
    assert spearman(a, b, generator=np.random.default_rng(9)) == got


def test_a_perfect_order_is_one() -> None:
    got = spearman([1, 2, 3], [2, 4, 8], generator=generator())
    assert got.rho == pytest.approx(1.0)
    assert got.n_cases == 3
    assert spearman([1, 2, 3, 4], [8, 4, 2, 1], generator=generator()).rho == pytest.approx(-1.0)


def test_too_few_cases_have_no_correlation() -> None:
    got = spearman([1, 2], [2, 1], generator=generator())
    assert (got.rho, got.p_value, got.low95, got.high95, got.n_cases) == (None, None, None, None, 2)


# ---- telling scans apart


@settings(deadline=None, max_examples=40)
@given(positives=st.lists(values, max_size=7), negatives=st.lists(values, max_size=7))
def test_auroc_is_the_share_of_pairs(positives: list[float], negatives: list[float]) -> None:
    pairs = [(p > n) + 0.5 * (p == n) for p in positives for n in negatives]
    assert auroc_of_scores(positives, negatives) == (pytest.approx(np.mean(pairs)) if pairs else None)


def test_auroc_by_hand() -> None:
    # 3 above 1 and 2; 2 above 1 and equal to 2: (2 + 1.5) / 4.
    assert auroc_of_scores([3, 2], [1, 2]) == pytest.approx(0.875)
    assert auroc_of_scores([math.inf], [1.0, 2.0]) == 1.0
    with pytest.raises(ValueError, match="not a number"):
        auroc_of_scores([math.nan], [1.0])


# ---- intervals


def test_coverage_by_hand() -> None:
    got = interval_coverage([0, 0, 5, 3], [1, 2, 6, 3], [1, 3, 5.5, 3])  # ends count: all but the second
    assert (got.n_covered, got.n_cases, got.share) == (3, 4, 0.75)
    # Wilson: (p + z²/2n ± z sqrt(p (1 - p) / n + z²/4n²)) / (1 + z²/n), z = 1.96.
    z, n, p = 1.959964, 4, 0.75
    centre, reach = p + z * z / 2 / n, z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    assert got.low95 == pytest.approx((centre - reach) / (1 + z * z / n), abs=1e-6)
    assert got.high95 == pytest.approx((centre + reach) / (1 + z * z / n), abs=1e-6)


def test_coverage_of_all_and_of_no_case() -> None:
    full = interval_coverage([0], [2], [1])
    assert (full.share, full.high95) == (1.0, 1.0)
    none = interval_coverage([], [], [])
    assert (none.share, none.low95, none.high95, none.n_cases) == (None, None, None, 0)


@pytest.mark.parametrize(
    ("n", "level", "k"),
    # k = ceil((n + 1) · level): ceil(9), ceil(10.8), ceil(18), ceil(10), ceil(9.5)
    [(9, 0.9, 9), (11, 0.9, 11), (19, 0.9, 18), (19, 0.5, 10), (18, 0.5, 10)],
)
def test_widening_is_an_order_statistic(n: int, level: float, k: int) -> None:
    # Spread 2 mL, off by 2, 4, 6, ... mL to alternating sides: scores 1, 2, 3, ...
    truths = [100 + 2.0 * (i + 1) * (-1) ** i for i in range(n)]
    assert fit_widening([an_interval(100.0, 2.0)] * n, truths, level=level) == pytest.approx(k)


def test_too_few_cases_have_no_widening() -> None:
    # ceil((8 + 1) · 0.9) = 9 > 8.
    assert fit_widening([an_interval(10, 1)] * 8, [10.0] * 8) is None
    assert fit_widening([], []) is None


def test_a_case_without_spread_is_right_or_beyond_help() -> None:
    usual, blind = an_interval(10.0, 1.0), an_interval(0.0, 0.0)
    one = [usual] * 19 + [blind]  # k = ceil(21 · 0.9) = 19 of 20
    assert fit_widening(one, [11.0] * 19 + [0.0]) == pytest.approx(1.0)  # no tumour seen, and none there
    assert fit_widening(one, [11.0] * 19 + [3.0]) == pytest.approx(1.0)  # one missed of twenty
    assert fit_widening([usual] * 18 + [blind] * 2, [11.0] * 18 + [3.0] * 2) is None  # two missed


def test_widened_by_hand() -> None:
    got = widened(an_interval(10.0, 2.0), 3.0)
    assert (got.mean_ml, got.sd_ml, got.low_ml, got.high_ml) == (10.0, 2.0, 4.0, 16.0)
    assert widened(an_interval(1.0, 2.0), 3.0).low_ml == 0.0


def test_widened_intervals_hold_what_they_promise() -> None:
    # Samples three times too narrow. With 19 cases the promise is 18 / 20 exactly, on average.
    drawn = np.random.default_rng(2)
    held = []
    for _ in range(300):
        truths = drawn.normal(1000, 90, 20)
        noise = drawn.normal(0, 30, (20, 8)) + truths[:, None] + drawn.normal(0, 90, (20, 1))
        intervals = [volume_interval(row) for row in noise]
        factor = fit_widening(intervals[:-1], truths[:-1])
        assert factor is not None
        last = widened(intervals[-1], factor)
        held.append(last.low_ml <= truths[-1] <= last.high_ml)
    assert np.mean(held) == pytest.approx(0.9, abs=0.05)  # three standard errors
