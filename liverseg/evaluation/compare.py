"""Several runs side by side: folds pooled into one table, or two runs compared case by case."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from data_cache.outputs import csv_mark, json_mark, require_replaceable, write_signed_json
from liverseg.evaluation.tables import write_tables
from liverseg.measure.overlap import mean_interval
from liverseg.measure.summary import (
    CLASSES,
    SCORES,
    SUMMARY,
    LabelScores,
    score_columns,
    summarise_scores,
)

COMPARISON = "comparison.json"
COMPARED = ("dice", "hd95_mm", "assd_mm", "nsd")
MIN_CASES_FOR_TEST = 6  # below, no outcome of the two-sided signed-rank test is under 0.05

Scored = Mapping[str, LabelScores]  # by case id


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """One metric of the second run minus the first, over the cases where both have it.

    Attributes:
        mean, low95, high95: Mean difference and its Student's t interval; None without a case, and below two cases.
        rose, fell: Cases whose metric is higher, and lower, in the second run (for distances, lower is better).
        wilcoxon_p: Two-sided signed-rank test (Wilcoxon 1945); None for fewer than six differences that are not 0.
    """

    metric: str
    n_cases: int
    mean: float | None
    low95: float | None
    high95: float | None
    rose: int
    fell: int
    wilcoxon_p: float | None


def shared_cases(runs: Sequence[Iterable[str]]) -> tuple[str, ...]:
    """The cases that more than one run scores: none in a proper k-fold."""
    ids = [case_id for scored in runs for case_id in scored]
    return tuple(dict.fromkeys(case_id for case_id in ids if ids.count(case_id) > 1))


def require_own_folds(out: Path) -> None:
    """Raise OutputError if ``write_folds`` would replace files that ``liverseg pool`` did not write."""
    require_replaceable(out / SCORES, csv_mark("case", "run", "liver_dice"), command="pool")
    require_replaceable(out / SUMMARY, json_mark("pool"), command="pool")


def write_folds(out: Path, runs: Mapping[str, Scored], *, failed: Sequence[str] = ()) -> dict[str, Any]:
    """Write ``scores.csv`` with a column ``run``, and ``summary.json`` of all cases, each scored once.

    Args:
        out: Created if it does not exist.
        runs: The scores of each.
        failed: Cases that could not be scored.

    Raises:
        ValueError: A case was scored by two runs: its weight would be double.
        OutputError: ``out`` has files of these names that ``liverseg pool`` did not write.
    """
    require_own_folds(out)
    if shared_cases(list(runs.values())):
        raise ValueError("folds must not share cases")
    rows = [
        {"case": case_id, "run": run} | score_columns(scores)
        for run, scored in runs.items()
        for case_id, scores in scored.items()
    ]
    everything = [scores for scored in runs.values() for scores in scored.values()]
    summary = {
        "n_cases": len(everything),
        "failed": list(failed),
        "runs": list(runs),
        **summarise_scores(everything),
    }
    write_tables(out, rows, summary, command="pool")
    return summary


def paired_differences(first: Scored, second: Scored) -> list[PairedDifference]:
    """Each compared metric of both classes, over the cases that both runs scored and that have the class."""
    both = [case_id for case_id in first if case_id in second]
    return [
        _difference(f"{name}_{metric}", [(first[i].of(name), second[i].of(name)) for i in both], metric)
        for name in CLASSES
        for metric in COMPARED
    ]


def require_own_comparison(out: Path) -> None:
    """Raise OutputError if ``out`` has a ``comparison.json`` that ``liverseg compare`` did not write."""
    require_replaceable(out / COMPARISON, json_mark("compare"), command="compare")


def write_comparison(out: Path, names: tuple[str, str], differences: Sequence[PairedDifference]) -> None:
    """Write ``comparison.json``; raises OutputError as ``require_own_comparison`` does."""
    require_own_comparison(out)
    out.mkdir(parents=True, exist_ok=True)
    content = {"first": names[0], "second": names[1], "differences": [asdict(d) for d in differences]}
    write_signed_json(out / COMPARISON, content, command="compare")


def _difference(name: str, pairs: Sequence[tuple[Any, Any]], metric: str) -> PairedDifference:
    values = [(getattr(a, metric), getattr(b, metric)) for a, b in pairs if a.volume_truth_ml > 0]
    differences = np.array([b - a for a, b in values if a is not None and b is not None], dtype=np.float64)
    mean = mean_interval(differences.tolist())
    return PairedDifference(
        metric=name,
        n_cases=differences.size,
        mean=mean.mean,
        low95=mean.low,
        high95=mean.high,
        rose=int(np.count_nonzero(differences > 0)),
        fell=int(np.count_nonzero(differences < 0)),
        wilcoxon_p=_wilcoxon_p(differences[differences != 0]),
    )


def _wilcoxon_p(differences: np.ndarray[Any, np.dtype[np.float64]]) -> float | None:
    if differences.size < MIN_CASES_FOR_TEST:
        return None
    return float(stats.wilcoxon(differences).pvalue)
