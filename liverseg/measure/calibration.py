"""Whether probabilities mean what they say: reliability, entropy as a detector of errors, one temperature.

The two counts are filled block by block and add up, over the blocks of a case and over cases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict
from scipy import optimize, special

from data_cache.records import STRICT
from liverseg.measure.uncertainty import MAX_ENTROPY

N_BINS = 15  # as Guo et al. 2017
N_ENTROPY_BINS = 1024
TEMPERATURES = (0.05, 20.0)  # the range that is searched
# A true class that the samples call impossible costs 13.8 nats instead of infinitely many. It also bounds what the
# finite number of samples and 16-bit storage could tell apart.
MIN_PROBABILITY = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReliabilityCounts:
    """The voxels of one class counted by the probability that they were given, in equal bins of [0, 1].

    A bin holds its lower edge, the last one both: Guo et al. 2017 have the upper one, and no bin for 0.

    Attributes:
        n_voxels: (bins,) int64.
        confidence_sum: (bins,) float64, of the class's probabilities.
        n_correct: (bins,) int64, voxels that are of the class in truth.
    """

    n_voxels: NDArray[np.int64]
    confidence_sum: NDArray[np.float64]
    n_correct: NDArray[np.int64]

    @classmethod
    def empty(cls, *, n_bins: int = N_BINS) -> ReliabilityCounts:
        """No voxel yet."""
        nothing = np.zeros(n_bins, dtype=np.int64)
        return cls(n_voxels=nothing, confidence_sum=np.zeros(n_bins), n_correct=nothing)

    @classmethod
    def from_block(
        cls, prob_zyx: NDArray[np.float32], is_class_zyx: NDArray[np.bool_], *, n_bins: int = N_BINS
    ) -> ReliabilityCounts:
        """Count voxels of any shape: the class's probability, and whether the truth is of the class."""
        prob = prob_zyx.ravel()
        # Truncated towards 0 and cut at the last: rounding beyond [0, 1] stays in the outer bins.
        at = np.minimum((prob * np.float32(n_bins)).astype(np.intp), n_bins - 1)
        return cls(
            n_voxels=np.bincount(at, minlength=n_bins),
            confidence_sum=np.asarray(np.bincount(at, weights=prob, minlength=n_bins), dtype=np.float64),
            n_correct=np.bincount(at[is_class_zyx.ravel()], minlength=n_bins),
        )

    def __add__(self, other: ReliabilityCounts) -> ReliabilityCounts:
        return ReliabilityCounts(
            n_voxels=self.n_voxels + other.n_voxels,
            confidence_sum=self.confidence_sum + other.confidence_sum,
            n_correct=self.n_correct + other.n_correct,
        )

    @property
    def confidence(self) -> NDArray[np.float64]:
        """(bins,) mean probability; NaN where a bin is empty."""
        return _shares(self.confidence_sum, self.n_voxels)

    @property
    def frequency(self) -> NDArray[np.float64]:
        """(bins,) share of voxels that are of the class; NaN where a bin is empty."""
        return _shares(self.n_correct, self.n_voxels)

    @property
    def ece(self) -> float | None:
        """Expected calibration error Σ n_b / N · |frequency - confidence|; None without a voxel.

        Naeini et al. 2015, of one class's probability as Kull et al. 2019 (arXiv:1910.12656) have it. It
        depends on what is counted: a scan full of certain air makes every network calibrated.
        """
        total = int(self.n_voxels.sum())
        gap = np.abs(self.n_correct - self.confidence_sum)  # n_b times the difference of the two means
        return float(gap.sum()) / total if total else None

    @property
    def mce(self) -> float | None:
        """The largest |frequency - confidence| of any bin with a voxel; None without one."""
        filled = self.n_voxels > 0
        if not filled.any():
            return None
        return float(np.abs(self.frequency - self.confidence)[filled].max())

    def to_json(self) -> dict[str, object]:
        """The counts and what follows from them."""
        return {
            "n_voxels": self.n_voxels.tolist(),
            "confidence_sum": self.confidence_sum.tolist(),
            "n_correct": self.n_correct.tolist(),
            "ece": self.ece,
            "mce": self.mce,
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ErrorDetection:
    """Voxels counted by entropy, those labelled right apart from those labelled wrong.

    The bins are equal in the square root of the entropy: a confident network has most voxels under 0.001 nats,
    which bins equal in the entropy itself would make ties of.

    Attributes:
        n_right, n_wrong: (``N_ENTROPY_BINS``,) int64, from certain to ln 3 nats.
    """

    n_right: NDArray[np.int64]
    n_wrong: NDArray[np.int64]

    @classmethod
    def empty(cls) -> ErrorDetection:
        """No voxel yet."""
        nothing = np.zeros(N_ENTROPY_BINS, dtype=np.int64)
        return cls(n_right=nothing, n_wrong=nothing)

    @classmethod
    def from_block(cls, entropy_zyx: NDArray[np.float32], wrong_zyx: NDArray[np.bool_]) -> ErrorDetection:
        """Count voxels of any shape: their entropy in nats, and whether their label is wrong."""
        share = np.sqrt(np.clip(entropy_zyx.ravel() / np.float32(MAX_ENTROPY), 0, 1))
        at = np.minimum((share * N_ENTROPY_BINS).astype(np.intp), N_ENTROPY_BINS - 1)
        n_all = np.bincount(at, minlength=N_ENTROPY_BINS)
        n_wrong = np.bincount(at[wrong_zyx.ravel()], minlength=N_ENTROPY_BINS)
        return cls(n_right=n_all - n_wrong, n_wrong=n_wrong)

    def __add__(self, other: ErrorDetection) -> ErrorDetection:
        return ErrorDetection(n_right=self.n_right + other.n_right, n_wrong=self.n_wrong + other.n_wrong)

    @property
    def auroc(self) -> float | None:
        """P(a wrong voxel has more entropy than a right one), one bin counting half: Mann & Whitney's U.

        None where all are right, or all wrong.
        """
        right, wrong = self.n_right.astype(np.float64), self.n_wrong.astype(np.float64)
        pairs = right.sum() * wrong.sum()
        below = np.cumsum(right) - right / 2
        return float(wrong @ below / pairs) if pairs else None

    @property
    def auprc(self) -> float | None:
        """Average precision of finding wrong voxels from the highest entropy down; None where none is wrong.

        Chance has the share of wrong voxels, which ``auroc`` does not show: of 1 % errors, a detector of
        AUROC 0.95 may still be wrong nine times out of ten.
        """
        found, flagged = np.cumsum(self.n_wrong[::-1]), np.cumsum((self.n_wrong + self.n_right)[::-1])
        n_wrong = int(self.n_wrong.sum())
        precision = found / np.maximum(flagged, 1)
        return float(self.n_wrong[::-1] @ precision) / n_wrong if n_wrong else None

    @property
    def error_rate(self) -> float | None:
        """Share of voxels that are wrong; None without a voxel."""
        n_wrong, total = int(self.n_wrong.sum()), int(self.n_wrong.sum() + self.n_right.sum())
        return n_wrong / total if total else None


@dataclass(frozen=True, slots=True, kw_only=True)
class TemperatureFit:
    """The temperature that makes validation voxels likeliest; below 1 sharpens, above 1 softens.

    Attributes:
        nll_before, nll_after: Mean negative log-likelihood in nats per voxel, at 1 and at ``temperature``.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    temperature: float
    nll_before: float
    nll_after: float
    n_voxels: int


def tempered(foreground_czyx: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """p^(1/T) of the three classes, normalised; 1 changes nothing, and neither does any T where one class is sure.

    For samples it is applied to their mean: "pool-then-calibrate" (Rahaman & Thiery 2021, arXiv:2007.08792);
    tempering each sample first leaves the mean underconfident. The order of the classes stays, but not the
    rule that liver and tumour together reach one half: decide on the probabilities as they were.

    Args:
        foreground_czyx: (2, ...) of liver and tumour; the rest may have any shape.
        temperature: Above 0.
    """
    probabilities = _three_classes(foreground_czyx)
    # By their largest: a small T would make all of 1/3, 1/3, 1/3 underflow, and 0/0 of them.
    probabilities /= probabilities.max(axis=0)
    sharpened = probabilities ** np.float32(1 / temperature)
    foreground: NDArray[np.float32] = sharpened[1:] / sharpened.sum(axis=0)
    return foreground


def fit_temperature(
    foreground_cases: Sequence[NDArray[np.float32]], truth_cases: Sequence[NDArray[np.uint8]]
) -> TemperatureFit | None:
    """The one temperature of least mean negative log-likelihood over all voxels given (Guo et al. 2017, §4.2).

    The search covers ``TEMPERATURES``; voxels that are all right drive it to the lower end. Probabilities count as
    ``MIN_PROBABILITY`` where they are less.

    Args:
        foreground_cases: (2, ...) mean probabilities of liver and tumour, one array per validation case: the
            voxels near the liver, or a random part of them; no test case may be among them.
        truth_cases: Labels 0, 1, 2 of the same voxels.

    Returns:
        None without a voxel.
    """
    foreground = [foreground_czyx.reshape(2, -1) for foreground_czyx in foreground_cases]
    truth = [truth_zyx.ravel() for truth_zyx in truth_cases]
    if not sum(ids.size for ids in truth):
        return None
    log_p = np.log(np.maximum(_three_classes(np.concatenate(foreground, axis=1)), MIN_PROBABILITY))
    ids = np.concatenate(truth)
    found = optimize.minimize_scalar(
        lambda log_t: _nll(log_p, ids, math.exp(log_t)),
        bounds=tuple(math.log(t) for t in TEMPERATURES),
        method="bounded",
    )
    return TemperatureFit(
        temperature=math.exp(found.x),
        nll_before=_nll(log_p, ids, 1.0),
        nll_after=float(found.fun),
        n_voxels=ids.size,
    )


def fit_temperature_that_helps(
    foreground_cases: Sequence[NDArray[np.float32]], truth_cases: Sequence[NDArray[np.uint8]]
) -> TemperatureFit | None:
    """``fit_temperature``, if temperatures fitted without a case lower that case's calibration error, on the whole.

    The likeliest temperature is not the best calibrated one. So each case is left out once: the expected calibration
    errors of liver and tumour, over the voxels of all left-out cases, must both be lower after than before.

    Returns:
        None without a voxel, for a single case, or where it does not help.
    """
    n = len(truth_cases)
    if n < 2:
        return None
    before = {name: ReliabilityCounts.empty() for name in ("liver", "tumour")}
    after = dict(before)
    for i in range(n):
        rest = [j for j in range(n) if j != i]
        fit = fit_temperature([foreground_cases[j] for j in rest], [truth_cases[j] for j in rest])
        if fit is None:
            return None
        before = _with_case(before, foreground_cases[i], truth_cases[i])
        after = _with_case(after, tempered(foreground_cases[i], fit.temperature), truth_cases[i])
    helps = all((after[name].ece or 0.0) < (before[name].ece or 0.0) for name in before)
    return fit_temperature(foreground_cases, truth_cases) if helps else None


def _with_case(
    counts: dict[str, ReliabilityCounts], foreground: NDArray[np.float32], truth: NDArray[np.uint8]
) -> dict[str, ReliabilityCounts]:
    liver = ReliabilityCounts.from_block(foreground.sum(axis=0), truth >= 1)
    tumour = ReliabilityCounts.from_block(foreground[1], truth == 2)
    return {"liver": counts["liver"] + liver, "tumour": counts["tumour"] + tumour}


def _nll(log_p: NDArray[np.float32], ids: NDArray[np.uint8], temperature: float) -> float:
    scaled = log_p / np.float32(temperature)
    of_truth = np.take_along_axis(scaled, ids[None].astype(np.intp), axis=0)[0]
    return float((special.logsumexp(scaled, axis=0) - of_truth).mean(dtype=np.float64))


def _three_classes(foreground_czyx: NDArray[np.float32]) -> NDArray[np.float32]:
    """Background, liver and tumour (3, ...), each put back into [0, 1]."""
    foreground = np.clip(foreground_czyx, 0, 1)
    background = np.clip(1 - foreground.sum(axis=0, keepdims=True), 0, 1)
    return np.concatenate((background, foreground))


def _shares(part: NDArray[np.generic], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    shares = np.full(whole.shape, np.nan)
    np.divide(part, whole, out=shares, where=whole > 0)
    return shares
