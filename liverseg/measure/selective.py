"""How well uncertainty ranks cases: risk against coverage, rank correlation, intervals that hold.

There are tens of cases at most: everything is computed exactly, and too few cases give None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from liverseg.measure.uncertainty import VolumeInterval

MIN_CASES_TO_CORRELATE = 3
_RESAMPLES = 2_000

Values = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RiskCoverage:
    """The mean risk of the k most certain cases, for each k.

    Cases of equal uncertainty have no order: each counts with the mean risk of its equals, which makes every
    point the expectation over their orders.

    Attributes:
        selective_risk: (n,) float64, at coverage 1/n, 2/n, ... 1; at the end the mean risk of all.
        optimum: (n,) float64, the same if uncertainty sorted the cases as risk does.
    """

    selective_risk: NDArray[np.float64]
    optimum: NDArray[np.float64]

    @property
    def coverage(self) -> NDArray[np.float64]:
        """(n,) share of the cases that are kept."""
        n = self.selective_risk.size
        return np.arange(1, n + 1) / max(n, 1)

    @property
    def aurc(self) -> float | None:
        """Area under the curve: the mean over its n points (Geifman & El-Yaniv 2017); None without a case.

        With risks 1 - Dice from 0 to 1. ValUES (Kahl et al. 2024) reports 100 times this; its code takes the
        trapezoids from 1/n to 1, which are less by the mean of both end points over n.
        """
        return float(self.selective_risk.mean()) if self.selective_risk.size else None

    @property
    def excess_aurc(self) -> float | None:
        """AURC less that of the best order (Geifman et al. 2019, arXiv:1805.08206): 0 and above; None as it."""
        return float((self.selective_risk - self.optimum).mean()) if self.selective_risk.size else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Correlation:
    """Spearman's rank correlation; all None for fewer than three cases or where one side is constant.

    Attributes:
        p_value: Two-sided, of no correlation; Student's t, a rough guide below ten cases.
        low95, high95: Percentile bootstrap over cases.
    """

    rho: float | None
    p_value: float | None
    low95: float | None
    high95: float | None
    n_cases: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How many intervals hold their truth.

    Attributes:
        low95, high95: Wilson's interval of the share; None, as the share, without a case.
    """

    n_covered: int
    n_cases: int
    share: float | None
    low95: float | None
    high95: float | None


def risk_coverage(risks: Values, uncertainties: Values) -> RiskCoverage:
    """The curve of one risk (1 - Dice, say) and one uncertainty per case; empty for no case.

    Raises:
        ValueError: The two differ in length, or a value is not finite.
    """
    risk, uncertainty = _same_cases(risks, uncertainties)
    _, group, n_equal = np.unique(uncertainty, return_inverse=True, return_counts=True)
    shared = np.bincount(group, weights=risk) / n_equal
    return RiskCoverage(
        selective_risk=_running_mean(np.repeat(shared, n_equal)), optimum=_running_mean(np.sort(risk))
    )


def spearman(a: Values, b: Values, *, generator: np.random.Generator) -> Correlation:
    """Rank correlation over cases, equal values sharing their mean rank.

    Args:
        a, b: One value per case.
        generator: Draws the bootstrap's resamples; those in which a side is constant are left out.

    Raises:
        ValueError: The two differ in length, or a value is not finite.
    """
    first, second = _same_cases(a, b)
    n = first.size
    if n < MIN_CASES_TO_CORRELATE or np.ptp(first) == 0 or np.ptp(second) == 0:
        return Correlation(rho=None, p_value=None, low95=None, high95=None, n_cases=n)
    found = stats.spearmanr(first, second)
    drawn = generator.integers(n, size=(_RESAMPLES, n))
    low, high = np.percentile(_rank_correlations(first[drawn], second[drawn]), [2.5, 97.5])
    return Correlation(
        rho=float(found.statistic),
        p_value=float(found.pvalue),
        low95=float(low),
        high95=float(high),
        n_cases=n,
    )


def auroc_of_scores(positives: Values, negatives: Values) -> float | None:
    """P(a positive scores above a negative), equal ones counting half (Mann & Whitney); None where a side is empty.

    Positives are the cases that should have the higher score, such as scans that differ from the training data.

    Raises:
        ValueError: A value is not a number.
    """
    positive, negative = (np.asarray(v, dtype=np.float64) for v in (positives, negatives))
    if np.isnan(positive).any() or np.isnan(negative).any():
        raise ValueError("a score that is not a number has no rank")
    if not positive.size or not negative.size:
        return None
    ranks = stats.rankdata(np.concatenate((positive, negative)))[: positive.size]
    above = ranks.sum() - positive.size * (positive.size + 1) / 2
    return float(above / (positive.size * negative.size))


# ---- intervals


def interval_coverage(lows: Values, highs: Values, truths: Values) -> Coverage:
    """The share of cases whose truth is inside [low, high], ends included, with Wilson's 95 % interval (1927).

    Raises:
        ValueError: The three differ in length, or a value is not finite.
    """
    low, high, truth = _same_cases(lows, highs, truths)
    n, n_covered = truth.size, int(np.count_nonzero((low <= truth) & (truth <= high)))
    if not n:
        return Coverage(n_covered=0, n_cases=0, share=None, low95=None, high95=None)
    wilson = stats.binomtest(n_covered, n).proportion_ci(method="wilson")
    return Coverage(
        n_covered=n_covered,
        n_cases=n,
        share=n_covered / n,
        low95=float(wilson.low),
        high95=float(wilson.high),
    )


def fit_widening(
    intervals: Sequence[VolumeInterval], truths_ml: Values, *, level: float = 0.9
) -> float | None:
    """How many standard deviations around the mean hold a new case's truth with probability ``level`` or more.

    Split-conformal with the normalised score |V - mean| / sd (Lei et al. 2018, locally weighted): the k-th smallest of n
    validation cases, k = ceil((n + 1)·level). That holds for any network, if validation and new cases are
    exchangeable; on average over draws of both, and not for each kind of case.

    Args:
        intervals: Of the validation cases' samples. A case without any spread scores 0 where its mean is the
            truth, and infinity otherwise: no factor would widen it.
        truths_ml: Their true volumes.
        level: Between 0 and 1.

    Returns:
        None where no finite factor holds: k > n (fewer than nine cases for 0.9), or as many infinite scores.
    """
    means = np.array([interval.mean_ml for interval in intervals])
    sds = np.array([interval.sd_ml for interval in intervals])
    mean, sd, truth = _same_cases(means, sds, truths_ml)
    off = np.abs(truth - mean)
    scores = np.divide(off, sd, out=np.where(off > 0, np.inf, 0.0), where=sd > 0)
    # Rounded: 9.000000000000002 of (9 + 1) · 0.9 would ask for a tenth case.
    k = math.ceil(round((scores.size + 1) * level, 9))
    if not 1 <= k <= scores.size:
        return None
    factor = float(np.sort(scores)[k - 1])
    return factor if math.isfinite(factor) else None


def widened(interval: VolumeInterval, factor: float) -> VolumeInterval:
    """The same mean with ``factor`` standard deviations to both sides, not below 0 mL.

    It may be narrower than the samples' own quantiles, if these held too much.
    """
    reach_ml = factor * interval.sd_ml
    return VolumeInterval(
        mean_ml=interval.mean_ml,
        sd_ml=interval.sd_ml,
        low_ml=max(0.0, interval.mean_ml - reach_ml),
        high_ml=interval.mean_ml + reach_ml,
    )


def _same_cases(*columns: Values) -> list[NDArray[np.float64]]:
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    if len({array.size for array in arrays}) > 1:
        raise ValueError(f"expected one value per case in each, got {', '.join(str(a.size) for a in arrays)}")
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("a value is not finite: leave its case out, and say so")
    return arrays


def _running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    means: NDArray[np.float64] = np.cumsum(values) / np.arange(1, values.size + 1)
    return means


def _rank_correlations(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank correlation of each pair of rows (resamples, n); rows in which a side is constant are left out."""
    ranks_a, ranks_b = (stats.rankdata(rows, axis=1) - (rows.shape[1] + 1) / 2 for rows in (a, b))
    norm = np.sqrt((ranks_a**2).sum(axis=1) * (ranks_b**2).sum(axis=1))
    defined = norm > 0
    rho: NDArray[np.float64] = (ranks_a * ranks_b).sum(axis=1)[defined] / norm[defined]
    return rho
