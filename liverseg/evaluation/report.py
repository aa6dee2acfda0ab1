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
from liverseg.evaluation.score_table import CASE_COLUMNS, footnotes, lesion_rows, summary_rows
from liverseg.measure.summary import SCORES, SUMMARY, VOLUMES
from liverseg.pictures.curves import read_history, training_charts
from liverseg.pictures.page import Page, PageCase, html_table, write_page
from liverseg.pictures.slices import cached_volume


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
        columns=tuple(header for _, header, _ in CASE_COLUMNS),
        digits=tuple(digits for _, _, digits in CASE_COLUMNS),
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
    if not {"case", *(key for key, _, _ in CASE_COLUMNS)} <= rows[0].keys():
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
        cells=tuple(_number(row, key) for key, _, _ in CASE_COLUMNS),
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
    yield f'<div class="charts"><div><h2>Scores</h2>{html_table(*summary_rows(summary))}</div>'
    yield f"<div><h2>Lesions</h2>{html_table(*lesion_rows(summary['lesions']))}</div></div>"
    yield "".join(f'<p class="muted">{html.escape(line)}.</p>' for line in footnotes(summary))
