"""A run as one HTML page: headline scores, training curves, and every scored case to look at, worst first."""

from __future__ import annotations

import csv
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_cache.errors import RunError
from data_cache.inspection import summarise_case
from data_cache.reader import CacheStore
from liverseg.measure.summary import CLASSES, SCORES, SUMMARY, VOLUMES
from liverseg.pictures.curves import read_history, training_charts
from liverseg.pictures.page import Page, PageCase, html_table, write_page
from liverseg.pictures.slices import cached_volume

# Column of scores.csv, its header on the page, digits.
COLUMNS = (
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
    ("lesions_iou0_invented", "lesions invented", 0),
)
HEADLINE = (
    ("dice", "Dice per case", 3),
    ("dice_with_label_crop", "with the label's crop", 3),
    ("dice_grid_ceiling", "grid's ceiling", 3),
    ("voe_percent", "VOE %", 1),
    ("rvd_percent", "RVD %", 1),
    ("assd_mm", "ASSD mm", 2),
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


def write_report(run: Path, scores: Path, out: Path) -> Path:
    """Write the page of a run, from what ``evaluate`` wrote into the folder ``scores``; returns ``out``.

    Raises:
        RunError: The folder does not hold a finished evaluation.
    """
    summary, rows = _read_scores(scores)
    worst_first = sorted(rows, key=_worst_first)
    page = Page(
        title=f"{run.resolve().name}: liver and tumour segmentation",
        subtitle=_subtitle(summary),
        sections=(
            *_headline(summary),
            training_charts(read_history(run / "history.csv")),
        ),
        columns=tuple(header for _, header, _ in COLUMNS),
        digits=tuple(digits for _, _, digits in COLUMNS),
        cases=[_case(row, scores) for row in worst_first],
    )
    return write_page(page, out)


def write_cache_page(store: CacheStore, case_ids: Sequence[str], out: Path) -> Path:
    """Write a page of cached cases, both views and their fractions; returns ``out``.

    Raises:
        CacheError: A case is not in the store, or damaged.
    """
    summaries = [summarise_case(store, case_id) for case_id in case_ids]
    z, y, x = store.schema.spec.shape_zyx
    page = Page(
        title=f"{store.path.name}: cached cases",
        subtitle=f"{len(case_ids)} of {len(store.case_ids)} cases of {z}×{y}×{x}, spec {store.schema.fingerprint}",
        sections=(),
        columns=("native x×y×z", "mm", "axes", "liver mL", "tumour mL"),
        digits=(0, 0, 0, 0, 1),
        cases=[
            PageCase(
                name=meta.case_id,
                note="; ".join(meta.notes),
                cells=(
                    "×".join(map(str, meta.grid.shape_zyx[::-1])),
                    "×".join(f"{s:.2f}" for s in meta.grid.spacing_zyx_mm[::-1]),
                    meta.file_axes,
                    summary.liver_ml,
                    summary.tumour_ml,
                ),
                volumes=_cached_volumes(store, meta.case_id),
            )
            for summary in summaries
            for meta in (summary.meta,)
        ],
    )
    return write_page(page, out)


def _cached_volumes(store: CacheStore, case_id: str) -> Iterator[str]:
    boxes = store.meta(case_id).boxes
    for view in sorted(boxes):  # liver before scan: what is trained on first
        yield json.dumps(cached_volume(f"{view} view", store.read(case_id, view), boxes[view]))


# ---- what an evaluation wrote


def _read_scores(scores: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    try:
        summary = json.loads((scores / SUMMARY).read_text(encoding="utf-8"))
        with (scores / SCORES).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError as failure:
        raise RunError(f"{failure.filename}: no such file: run liverseg evaluate first") from None
    except (OSError, ValueError) as failure:
        raise RunError(f"{scores}: unreadable: {failure}") from failure
    if not {"case", *(key for key, _, _ in COLUMNS)} <= rows[0].keys():
        raise RunError(f"{scores / SCORES}: written by an older version: run liverseg evaluate again")
    return summary, rows


def _number(row: Mapping[str, str], key: str) -> float | None:
    return float(row[key]) if row[key] else None


def _worst_first(row: Mapping[str, str]) -> float:
    """The mean Dice of what the case has: a liver always counts, a tumour where there is one."""
    liver, tumour = float(row["liver_dice"]), float(row["tumour_dice"])
    return (liver + tumour) / 2 if float(row["tumour_volume_truth_ml"]) > 0 else liver


def _case(row: Mapping[str, str], scores: Path) -> PageCase:
    notes = []
    if row.get("trained_on") == "True":
        notes.append("trained on this case")
    if row.get("liver_found") == "False":
        notes.append("no liver found")
    return PageCase(
        name=row["case"],
        note=", ".join(notes),
        cells=tuple(_number(row, key) for key, _, _ in COLUMNS),
        volumes=_volume(scores / VOLUMES / f"{row['case']}.json"),
    )


def _volume(path: Path) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RunError(f"{path}: no such file: run liverseg evaluate again") from None


# ---- the headline


def _subtitle(summary: Mapping[str, Any]) -> str:
    parts = [f"{summary['n_cases']} cases, native space"]
    if summary["trained_on"]:
        parts.append(f"{len(summary['trained_on'])} of them TRAINED ON")
    if summary["no_liver_found"]:
        parts.append(f"no liver found in {', '.join(summary['no_liver_found'])}")
    return "; ".join(parts)


def _headline(summary: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        (header, *(_interval(summary[name][key], digits) for name in CLASSES))
        for key, header, digits in HEADLINE
    ]
    rows.insert(1, ("global Dice", *(f"{summary[name]['global_dice']:.3f}" for name in CLASSES)))
    headers = ("mean [95 % interval]", *(f"{n}, {summary[n]['n_cases_with_it']} cases" for n in CLASSES))
    yield f'<div class="charts"><div><h2>Scores</h2>{html_table(headers, rows)}</div>'
    lesions = [_lesion_row(at, key, size) for at in summary["lesions"] for key, size in SIZES]
    headers = ("lesions", "true", "found", "invented", "precision", "recall", "F1")
    yield f"<div><h2>Lesions</h2>{html_table(headers, lesions)}</div></div>"
    burden = summary["burden"]
    yield (
        f'<p class="muted">Tumour burden: RMSE {burden["rmse"]:.4f}, largest error {burden["max_error"]:.4f}. '
        f"NSD at {summary['nsd_tolerance_mm']:g} mm. {html.escape(summary['rule'])}.</p>"
    )


def _interval(mean: Mapping[str, float | None], digits: int) -> str:
    if mean["mean"] is None:
        return "–"
    return f"{mean['mean']:.{digits}f} [{mean['low95']:.{digits}f}, {mean['high95']:.{digits}f}]"


def _lesion_row(at: Mapping[str, Any], key: str, size: str) -> tuple[str, ...]:
    counts = at[key]
    found, missed = counts["true_positives"], counts["false_negatives"]
    ratios = ("–" if counts[r] is None else f"{counts[r]:.2f}" for r in ("precision", "recall", "f1"))
    name = f"IoU > {at['iou_threshold']:g}, {size}"
    return name, str(found + missed), str(found), str(counts["false_positives"]), *ratios
