"""Scores as rows of text: the same labels and numbers in the terminal and in the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_cache.text import pluralise
from liverseg.measure.summary import CLASSES

Rows = list[tuple[str, ...]]

# Column of scores.csv, its header, digits.
CASE_COLUMNS = (
    ("liver_dice", "liver Dice", 3),
    ("liver_hd95_mm", "liver HD95 mm", 1),
    ("liver_volume_ml", "liver mL", 0),
    ("liver_volume_truth_ml", "true liver mL", 0),
    ("tumour_dice", "tumour Dice", 3),
    ("tumour_hd95_mm", "tumour HD95 mm", 1),
    ("tumour_volume_ml", "tumour mL", 1),
    ("tumour_volume_truth_ml", "true tumour mL", 1),
    ("lesions_iou0_found", "lesions found", 0),
    ("lesions_iou0_missed", "lesions missed", 0),
    ("lesions_iou0_false_positives", "false lesions", 0),
)
# Key of summary.json, its header, digits.
METRIC_ROWS = (
    ("dice", "Dice per case", 3),
    ("dice_with_label_crop", "Dice with the label's crop", 3),
    ("dice_grid_ceiling", "Dice that the grid allows", 3),
    ("voe_percent", "VOE %", 1),
    ("rvd_percent", "RVD %", 1),
    ("assd_mm", "ASSD mm", 2),
    ("rmsd_mm", "RMSD mm", 2),
    ("hd_mm", "HD mm", 1),
    ("hd95_mm", "HD95 mm", 1),
    ("nsd", "NSD", 3),
)
SIZES = (
    ("overall", "all"),
    ("below_10_mm", "< 10 mm"),
    ("from_10_to_20_mm", "10–20 mm"),
    ("above_20_mm", "> 20 mm"),
)


def number_text(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def interval_text(mean: Mapping[str, float | None], digits: int, *, sign: str = "") -> str:
    """A mean with its 95 % interval and the number of cases that they are of; a dash without a case."""
    if mean["mean"] is None:
        return "–"
    value, low, high = (
        "–" if mean[key] is None else f"{mean[key]:{sign}.{digits}f}" for key in ("mean", "low95", "high95")
    )
    n = f", n {mean['n_cases']}" if "n_cases" in mean else ""
    return f"{value} [{low}, {high}]{n}"


def case_cells(row: Mapping[str, float | None]) -> tuple[str, ...]:
    """The columns of ``CASE_COLUMNS`` of one case, as text."""
    return tuple(number_text(row[key], digits) for key, _, digits in CASE_COLUMNS)


def summary_rows(summary: Mapping[str, Any]) -> tuple[tuple[str, ...], Rows]:
    """Header and rows of the means over cases, both classes side by side."""
    rows: Rows = [
        (header, *(interval_text(summary[name][key], digits) for name in CLASSES))
        for key, header, digits in METRIC_ROWS
        if key in summary[CLASSES[0]]
    ]
    rows.insert(1, ("Dice of all voxels", *(number_text(summary[name]["global_dice"]) for name in CLASSES)))
    counts = (f"{name}, {pluralise(summary[name]['n_cases_with_it'], 'case')}" for name in CLASSES)
    return ("mean [95 % interval]", *counts), rows


def lesion_rows(summary: Mapping[str, Any]) -> tuple[tuple[str, ...], Rows]:
    """Header and rows of lesion detection: one to one by threshold and size, and as LiTS counts."""
    headers = ("lesions of all cases", "true", "found", "false positives", "precision", "recall", "F1")
    rows = [
        _lesion_row(f"one to one, IoU > {at['iou_threshold']:g}, {size}", at[key])
        for at in summary["lesions"]
        for key, size in SIZES
    ]
    return headers, [*rows, _lesion_row("LiTS, IoU > 0.5, all", summary["lesion_details"]["lits"])]


def _lesion_row(name: str, counts: Mapping[str, Any]) -> tuple[str, ...]:
    found, missed = counts["true_positives"], counts["false_negatives"]
    ratios = (number_text(counts[ratio], 2) for ratio in ("precision", "recall", "f1"))
    return name, str(found + missed), str(found), str(counts["false_positives"]), *ratios


def footnotes(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """Lines under the tables: found lesions, tumour burden, tolerances and rules."""
    burden, details, tolerance_mm = summary["burden"], summary["lesion_details"], summary["nsd_tolerance_mm"]
    return (
        f"found lesions: mean Dice {number_text(details['dice'])}, mean ASSD {number_text(details['assd_mm'], 2)} mm "
        f"(n {details['n_found']}); {details['n_split']} true lesions split, {details['n_merged']} predicted lesions "
        "merge several true ones",
        f"tumour burden: RMSE {number_text(burden['rmse'], 4)}, largest error {number_text(burden['max_error'], 4)} "
        f"(n {burden['n_cases']})",
        f"NSD at {tolerance_mm['liver']:g} mm for liver and {tolerance_mm['tumour']:g} mm for tumour (FLARE 2023); "
        f"rule: {summary['rule']}",
    )
