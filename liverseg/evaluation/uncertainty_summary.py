"""The uncertainty of all cases together: a summary, a table, curves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from data_cache.files import write_csv
from data_cache.geometry import Box
from data_cache.outputs import Mark, carries, csv_mark, json_mark, png_mark, write_signed_json
from data_cache.schema import View
from data_cache.text import pluralise
from liverseg.evaluation.uncertainty import CaseUncertainty, NativeCase
from liverseg.inference.calibration import Calibration
from liverseg.inference.segment import keep_large_components
from liverseg.inference.uncertainty_files import UncertaintySummary, map_values
from liverseg.measure.calibration import (
    ErrorDetection,
    ReliabilityCounts,
)
from liverseg.measure.near_liver import NEAR_MM
from liverseg.measure.selective import (
    Correlation,
    Coverage,
    RiskCoverage,
    auroc_of_scores,
    interval_coverage,
    risk_coverage,
    spearman,
    widened,
)
from liverseg.measure.summary import CLASSES, interval
from liverseg.measure.uncertainty import (
    VolumeInterval,
    mean_foreground,
)
from liverseg.pictures.reliability_figures import reliability_figure, risk_coverage_figure
from liverseg.pictures.sheet import save
from liverseg.pictures.uncertainty_figures import UncertaintyMaps, uncertainty_figure
from pipeline.labels import decide

UNCERTAINTY = "uncertainty"  # in the folder of an evaluation: a .json, a .csv, and a folder of pictures
# Numbers of a case that may tell how wrong it is, by the field of ``UncertaintySummary``.
NUMBERS = {
    "disagreement": "disagreement of the samples",
    "mean_entropy": "mean entropy",
    "hu_deviation": "HU deviation",
}
SHIFTED = f"{UNCERTAINTY}_shifted.csv"  # the same numbers of scans that differ from the training data
NO_CASES: Mapping[str, UncertaintySummary] = MappingProxyType({})
RELIABILITY, RISK_COVERAGE = "reliability.png", "risk_coverage.png"
# What is written into the folder of an evaluation, and the marks that earlier files carry.
FILES: Mapping[str, Mark] = {
    f"{UNCERTAINTY}.json": json_mark("evaluate"),
    f"{UNCERTAINTY}.csv": csv_mark("case", *NUMBERS, "risk"),
    SHIFTED: csv_mark("case", *NUMBERS),
    RELIABILITY: png_mark("evaluate"),
    RISK_COVERAGE: png_mark("evaluate"),
}


def write_uncertainty_summary(
    out: Path,
    cases: Sequence[CaseUncertainty],
    calibration: Calibration | None,
    shifted: Mapping[str, UncertaintySummary] = NO_CASES,
) -> None:
    """Write ``uncertainty.json``, ``uncertainty.csv``, ``reliability.png`` and ``risk_coverage.png`` into ``out``.

    Of shifted scans, also write ``uncertainty_shifted.csv``.

    Files of an earlier evaluation are deleted, its pictures of other cases included: they would lie beside scores of another run.

    Args:
        out: The folder of the evaluation.
        cases: Empty without samples.
        calibration: What was fitted on other cases, if it was.
        shifted: By case ID, the summaries of scans that differ from the training data, if any were measured.
    """
    pictures = {f"{case.case_id}.png" for case in cases}
    found = [(path, png_mark("evaluate")) for path in (out / UNCERTAINTY).glob("*.png")]
    stale = [(path, mark) for path, mark in found if path.name not in pictures]
    if not cases:
        stale += [(out / name, mark) for name, mark in FILES.items()]
    elif not shifted:
        stale.append((out / SHIFTED, FILES[SHIFTED]))
    for path, mark in stale:
        if carries(path, mark):
            path.unlink()
    if not cases:
        return
    summary = summarise_uncertainties(cases, calibration, shifted)
    write_signed_json(out / f"{UNCERTAINTY}.json", summary, command="evaluate")
    write_csv(out / f"{UNCERTAINTY}.csv", [uncertainty_row(case) for case in cases])
    if shifted:
        write_csv(out / SHIFTED, [{"case": name} | _numbers(found) for name, found in shifted.items()])
    title = (
        f"Probability against frequency\n{pluralise(len(cases), 'case')}, within {NEAR_MM:g} mm of the liver"
    )
    save(
        reliability_figure(pooled(cases), pooled_tempered(cases), title=title),
        out / RELIABILITY,
        command="evaluate",
    )
    curves = {label: coverage_curve(cases, name) for name, label in NUMBERS.items() if _values(cases, name)}
    title = (
        f"Risk of the cases that remain when the most uncertain are left out\n{pluralise(len(cases), 'case')}"
    )
    save(risk_coverage_figure(curves, title=title), out / RISK_COVERAGE, command="evaluate")


def uncertainty_picture(uncertainty: CaseUncertainty, case: NativeCase, view: View) -> Figure:
    """A case's image, maps and outlines on the grid of the view that it was segmented on."""
    mean_czyx = keep_large_components(
        mean_foreground(case.samples_nczyx), voxel_volume_ml=view.grid.voxel_volume_ml
    )
    values = {f"{name}_zyx": value for name, value in map_values(case.samples_nczyx).items()}
    title = f"{uncertainty.case_id}\n{uncertainty.uncertainty.line()}, 1 - Dice {uncertainty.risk:.3f}"
    return uncertainty_figure(
        view.image_zyx,
        UncertaintyMaps(label_zyx=decide(mean_czyx), **values),
        view.grid.spacing_zyx_mm,
        title=title,
        truth_zyx=_nearest(case.truth_zyx, case.box, view.image_zyx.shape),
    )


def _nearest(label_zyx: NDArray[np.uint8], box: Box, shape_zyx: tuple[int, ...]) -> NDArray[np.uint8]:
    """A native label on a view's grid, for a picture: the id at each centre."""
    parts = zip(box.start_zyx, box.shape_zyx, shape_zyx, strict=True)
    nearest_zyx: NDArray[np.uint8] = label_zyx[
        np.ix_(*(start + ((np.arange(n) + 0.5) * length / n).astype(int) for start, length, n in parts))
    ]
    return nearest_zyx


def summarise_uncertainties(
    cases: Sequence[CaseUncertainty],
    calibration: Calibration | None,
    shifted: Mapping[str, UncertaintySummary] = NO_CASES,
) -> dict[str, Any]:
    """Everything over all cases, as plain JSON; voxels are pooled, cases averaged."""
    errors = sum((case.errors for case in cases), start=ErrorDetection.empty())
    return {
        "n_cases": len(cases),
        "samples": [case.uncertainty.samples for case in cases],
        "near_mm": NEAR_MM,
        "calibration": {name: counts.to_json() for name, counts in pooled(cases).items()},
        "calibration_tempered": _tempered_json(cases),
        "fitted": None if calibration is None else _fitted_json(calibration),
        "errors": {"auroc": errors.auroc, "auprc": errors.auprc, "rate": errors.error_rate},
        "case_numbers": {name: _judged(cases, name, shifted) for name in NUMBERS},
        "n_shifted": len(shifted),
        "volume_intervals": {name: _coverage_json(cases, name, calibration) for name in CLASSES},
        **_means([case.pairs.to_json() for case in cases]),
    }


def pooled(cases: Sequence[CaseUncertainty]) -> dict[str, ReliabilityCounts]:
    """The voxels of all cases, by class."""
    return {
        name: sum((case.reliability[name] for case in cases), start=ReliabilityCounts.empty())
        for name in CLASSES
    }


def pooled_tempered(cases: Sequence[CaseUncertainty]) -> dict[str, ReliabilityCounts] | None:
    """The same after temperature scaling; None without one."""
    after = [case.tempered for case in cases if case.tempered is not None]
    if not after:
        return None
    return {name: sum((c[name] for c in after), start=ReliabilityCounts.empty()) for name in CLASSES}


def coverage_curve(cases: Sequence[CaseUncertainty], name: str) -> RiskCoverage:
    """Risk against coverage, the cases sorted by one of ``NUMBERS``, which all of them must have."""
    return risk_coverage([case.risk for case in cases], _values(cases, name))


def _values(cases: Sequence[CaseUncertainty], name: str) -> list[float]:
    """One of ``NUMBERS`` of each case; empty unless all have it."""
    return number_of([case.uncertainty for case in cases], name)


def number_of(summaries: Iterable[UncertaintySummary], name: str) -> list[float]:
    """One of ``NUMBERS`` of each summary; empty unless all have it."""
    values = [getattr(summary, name) for summary in summaries]
    return [] if None in values else values


def _judged(
    cases: Sequence[CaseUncertainty], name: str, shifted: Mapping[str, UncertaintySummary]
) -> dict[str, Any] | None:
    """How well one number ranks the cases by Dice, and tells shifted scans from them."""
    values = _values(cases, name)
    if not values:
        return None
    curve = coverage_curve(cases, name)
    return {
        "spearman": _spearman_json(values, [1.0 - case.risk for case in cases]),
        "aurc": curve.aurc,
        "excess_aurc": curve.excess_aurc,
        "shifted_auroc": auroc_of_scores(number_of(shifted.values(), name), values),
    }


def uncertainty_row(case: CaseUncertainty) -> dict[str, Any]:
    """A case as a row of ``uncertainty.csv``."""
    row: dict[str, Any] = {
        "case": case.case_id,
        **_numbers(case.uncertainty),
        "risk": case.risk,
        "error_auroc": case.errors.auroc,
        "error_rate": case.errors.error_rate,
    }
    for name in CLASSES:
        volume = case.interval(name)
        row |= {f"{name}_ece": case.reliability[name].ece, f"{name}_truth_ml": case.truth_ml[name]}
        row |= {f"{name}_{key}": getattr(volume, key) for key in ("mean_ml", "low_ml", "high_ml")}
    return row | case.pairs.to_json()


def _numbers(summary: UncertaintySummary) -> dict[str, Any]:
    return {name: getattr(summary, name) for name in NUMBERS}


def _tempered_json(cases: Sequence[CaseUncertainty]) -> dict[str, Any] | None:
    after = pooled_tempered(cases)
    return None if after is None else {name: counts.to_json() for name, counts in after.items()}


def _fitted_json(calibration: Calibration) -> dict[str, Any]:
    fit = calibration.temperature
    return {
        "case_ids": list(calibration.case_ids),
        "temperature": None if fit is None else asdict(fit),
        "widening_sd": dict(calibration.widening),
    }


def _coverage_json(
    cases: Sequence[CaseUncertainty], name: str, calibration: Calibration | None
) -> dict[str, Any]:
    """How often the truth is inside the interval; of tumours, in the cases that have one."""
    having = [case for case in cases if case.truth_ml[name] > 0]
    truths, intervals = [case.truth_ml[name] for case in having], [case.interval(name) for case in having]
    factor = None if calibration is None else calibration.widening[name]
    wide = None if factor is None else _covered([widened(i, factor) for i in intervals], truths)
    return {"samples": _covered(intervals, truths), "widened": wide}


def _covered(intervals: Sequence[VolumeInterval], truths: Sequence[float]) -> dict[str, Any]:
    covered: Coverage = interval_coverage(
        [i.low_ml for i in intervals], [i.high_ml for i in intervals], truths
    )
    return asdict(covered)


def _spearman_json(uncertainties: Sequence[float], dice: Sequence[float]) -> dict[str, Any]:
    found: Correlation = spearman(uncertainties, dice, generator=np.random.default_rng(0))
    return asdict(found)


def _means(rows: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    return {name: interval([row[name] for row in rows]) for name in rows[0]} if rows else {}
