"""A run as a page: where it comes from, headline scores, training curves, and every scored case, worst first."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from data_cache.errors import CacheError, RunError
from data_cache.files import read_csv, read_json
from data_cache.inspection import summarise_case
from data_cache.outputs import carries, is_intact, json_mark
from data_cache.reader import CacheStore, read_schema
from data_cache.records import to_json
from data_cache.text import pluralise
from liverseg.evaluation.score_table import CASE_COLUMNS, footnotes, lesion_rows, summary_rows
from liverseg.evaluation.tables import rows_checksum
from liverseg.measure.summary import CLASSES, ROWS, SCORES, SUMMARY, VOLUMES, WEIGHTS
from liverseg.pictures.curves import Curve, chart, read_history, training_charts
from liverseg.pictures.page import Page, PageCase, PageFiles, html_table, write_page
from liverseg.pictures.slices import cached_case
from liverseg.training.checkpoint import BEST, content_checksum, load_checkpoint
from liverseg.training.config import TrainConfig, load_config
from liverseg.version import __version__

BAD_LIVER = 0.5
ORDER = (
    f"Worst first: livers with a Dice below {BAD_LIVER:g}, then the most missed and false-positive lesions, then the lowest "
    "mean Dice of the liver and, where the truth or the prediction has one, the tumour."
)
OUTDATED = "outdated"
PATHS = ("data.split", "watch.raw")  # settings that name a file or a folder
PLAUSIBLE = {"True": "yes", "False": "NO"}  # by what scores.csv says; earlier versions say nothing
# What files raise that were edited, damaged or written by another version, where they are JSON or CSV all the same.
_DAMAGE = (LookupError, TypeError, ValueError, AttributeError)


def write_report(run: Path, scores: Path, out: Path) -> PageFiles:
    """Write the page of a run to ``out``, from what ``evaluate`` wrote into the folder ``scores``.

    Raises:
        RunError: The folder does not hold a finished evaluation, or a file of it or of the run is damaged.
    """
    summary, rows = _read_scores(scores)
    facts, curves = _facts(run, scores, summary), training_charts(read_history(run / "history.csv"))
    try:
        subtitle, headline = _subtitle(summary), tuple(_headline(summary))
        cases = [_case(row, scores) for row in sorted(rows, key=_worst_first)]
    except _DAMAGE as failure:
        raise RunError(
            f"{scores}: {SCORES} or {SUMMARY} lacks what an evaluation has ({type(failure).__name__}: {failure}): run "
            "liverseg evaluate again"
        ) from None
    page = Page(
        title=f"{run.resolve().name}: liver and tumour segmentation",
        subtitle=subtitle,
        sections=(facts, *headline, curves),
        order=ORDER,
        columns=("plausible", *(header for _, header, _ in CASE_COLUMNS)),
        digits=(0, *(digits for _, _, digits in CASE_COLUMNS)),
        cases=cases,
    )
    return write_page(page, out, command="report")


def write_cache_page(store: CacheStore, case_ids: Sequence[str], out: Path) -> PageFiles:
    """Write a page of cached cases to ``out``, both views and their fractions.

    Raises:
        CacheError: A case is not in the store, or damaged.
    """
    summaries = [summarise_case(store, case_id) for case_id in case_ids]
    z, y, x = store.schema.spec.shape_zyx
    page = Page(
        title=f"{store.path.name}: cached cases",
        subtitle=f"{len(case_ids)} of {len(store.case_ids)} cases of {z}×{y}×{x}, spec {store.schema.fingerprint}",
        sections=(),
        order="",
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
                content=partial(_cached_case, store, meta.case_id),
            )
            for summary in summaries
            for meta in (summary.meta,)
        ],
    )
    return write_page(page, out, command="inspect")


def _cached_case(store: CacheStore, case_id: str) -> str:
    meta = store.meta(case_id)
    # liver before scan: what is trained on first
    views = [(f"{name} view", store.read(case_id, name), box) for name, box in sorted(meta.boxes.items())]
    return json.dumps(cached_case(meta.grid, views))


# ---- what an evaluation wrote


def _read_scores(scores: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    if (scores / SCORES).exists() and not (scores / SUMMARY).exists():
        raise RunError(f"{scores}: an evaluation that was not finished: run liverseg evaluate again")
    try:
        summary = read_json(scores / SUMMARY)
        rows = read_csv(scores / SCORES)
    except FileNotFoundError as failure:
        raise RunError(f"{failure.filename}: no such file: run liverseg evaluate first") from None
    except (OSError, ValueError) as failure:
        raise RunError(f"{scores}: unreadable: {failure}") from failure
    if not carries(scores / SUMMARY, json_mark("evaluate")):
        raise RunError(
            f"{scores / SUMMARY}: expected a file of liverseg evaluate, found one of another command or version: "
            "name the folder of an evaluation, or evaluate into a new one"
        )
    if not is_intact(summary):
        raise RunError(f"{scores / SUMMARY}: was changed since it was written: run liverseg evaluate again")
    if summary.get(ROWS, rows_checksum(scores)) != rows_checksum(scores):  # earlier versions have none
        raise RunError(
            f"{scores / SCORES}: was changed since {SUMMARY} was written: restore it, or run liverseg evaluate again"
        )
    return summary, rows


def _number(row: Mapping[str, str], key: str) -> float | None:
    return float(row[key]) if row[key] else None


def _worst_first(row: Mapping[str, str]) -> tuple[bool, float, float]:
    """See ``ORDER``."""
    liver_fits = float(row["liver_dice"]) >= BAD_LIVER
    wrong_lesions = float(row["lesions_iou0_missed"]) + float(row["lesions_iou0_false_positives"])
    has_tumour = float(row["tumour_volume_truth_ml"]) > 0 or float(row["tumour_volume_ml"]) > 0
    names = CLASSES if has_tumour else ("liver",)
    return liver_fits, -wrong_lesions, sum(float(row[f"{name}_dice"]) for name in names) / len(names)


def _case(row: Mapping[str, str], scores: Path) -> PageCase:
    notes = []
    if row.get("trained_on") == "True":
        notes.append("trained on this case")
    if row.get("liver_found") == "False":
        notes.append("no liver found")
    if row.get("plausible") == "False":
        notes.append(f"not plausible: {row['not_plausible_because']}")
    return PageCase(
        name=row["case"],
        note=", ".join(notes),
        cells=(PLAUSIBLE.get(row.get("plausible", "")), *(_number(row, key) for key, _, _ in CASE_COLUMNS)),
        content=partial(_content, scores / VOLUMES / f"{row['case']}.json"),
    )


def _content(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RunError(f"{path}: no such file: run liverseg evaluate again") from None
    if not carries(path, json_mark("evaluate")):
        raise RunError(
            f"{path}: expected a file of liverseg evaluate, found one of another command or version: evaluate into "
            "a new folder"
        )
    return text


# ---- where it comes from


def _facts(run: Path, scores: Path, summary: Mapping[str, Any]) -> str:
    """What a reader must know before the first number: data, network, settings, dates, versions.

    Names, not paths: a page is sent to others, and a folder often carries the name of a person.
    """
    facts = {
        "plausible": _plausible(summary),
        "network": ", ".join(Path(model).name for model in summary.get("models", ())) or None,
        "samples": str(summary["samples"]) if summary.get("samples") else None,
        "evaluated": f"{_date(scores / SUMMARY)}, report by liverseg {__version__}",
        OUTDATED: _outdated(run, summary),
        **_training_facts(run),
        "settings": _settings(run / "config.toml"),
    }
    lines = [
        f"<dt>{name}</dt><dd{_emphasis(name, summary)}>{html.escape(text)}</dd>"
        for name, text in facts.items()
        if text
    ]
    return f'<dl class="facts">{"".join(lines)}</dl>'


def _plausible(summary: Mapping[str, Any]) -> str | None:
    """How many answers can be a liver, and which cannot; None of an evaluation that did not ask."""
    doubtful = summary.get("not_plausible")
    if doubtful is None:
        return None
    cases = pluralise(summary["n_cases"], "case")
    which = f"; not plausible: {', '.join(doubtful)}" if doubtful else ""
    return f"{summary['n_cases'] - len(doubtful)} of {cases}{which}"


def _outdated(run: Path, summary: Mapping[str, Any]) -> str | None:
    """Whether the run has learnt on since it was scored; None where it has not, or where that cannot be told."""
    best = run / BEST
    if WEIGHTS not in summary or not best.exists():
        return None
    try:
        weights = content_checksum(load_checkpoint(best)["average"])
    except RunError:
        return f"{BEST} cannot be read: whether it has these scores cannot be told"
    return (
        None if weights in summary[WEIGHTS] else f"{BEST} has other weights now: run liverseg evaluate again"
    )


def _emphasis(name: str, summary: Mapping[str, Any]) -> str:
    is_bad = name == OUTDATED or (name == "plausible" and summary["not_plausible"])
    return ' class="bad"' if is_bad else ""


def _training_facts(run: Path) -> dict[str, str | None]:
    """From the latest start in ``run.json``; nothing without it."""
    path = run / "run.json"
    if not path.exists():
        return {}
    try:
        start = read_json(path)[-1]
        versions = ", ".join(f"{name} {version}" for name, version in start["versions"].items())
        return {
            "trained": f"{start['time']}, on {start['device']}",
            "training data": _data_set(Path(start["cache"])),
            "versions": f"{versions}; commit {start['commit']}" if start["commit"] else versions,
        }
    except (OSError, *_DAMAGE) as failure:
        raise RunError(f"{path}: unreadable ({failure}): restore it from a backup, or move it away") from None


def _data_set(cache: Path) -> str:
    """What a cache was built from, where it can still be read, and its name."""
    try:
        info = read_schema(cache).data_set
    except CacheError:
        info = None
    if info is None:
        return cache.name
    parts = [info.name, *([info.licence] if info.licence else []), *(["synthetic"] if info.phantom else [])]
    return f"{', '.join(parts)}: {cache.name}"


def _settings(path: Path) -> str | None:
    """The settings that are not the defaults."""
    if not path.exists():
        return None
    default, chosen = _flat(to_json(TrainConfig())), _flat(to_json(load_config(path)))
    names = {key: Path(chosen[key]).name for key in PATHS if chosen[key] is not None}
    changed = [f"{key} = {value}" for key, value in {**chosen, **names}.items() if value != default[key]]
    return " · ".join(changed) or "all defaults"


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _date(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC")


# ---- the headline


def _subtitle(summary: Mapping[str, Any]) -> str:
    parts = [f"{summary['n_cases']} cases, native space"]
    if summary.get("failed"):  # earlier versions did not say
        parts.append(
            f"{pluralise(len(summary['failed']), 'case')} could not be scored: {', '.join(summary['failed'])}"
        )
    if summary["trained_on"]:
        parts.append(f"{len(summary['trained_on'])} of them TRAINED ON")
    if summary["no_liver_found"]:
        parts.append(f"no liver found in {', '.join(summary['no_liver_found'])}")
    return "; ".join(parts)


def _headline(summary: Mapping[str, Any]) -> Iterator[str]:
    notes = "".join(f'<p class="muted">{html.escape(line)}.</p>' for line in footnotes(summary))
    yield f'<div class="headline"><div><h2>Scores</h2>{html_table(*summary_rows(summary))}</div>{_nsd_chart(summary)}'
    yield f"<div><h2>Lesions</h2>{html_table(*lesion_rows(summary))}</div>"
    yield f'<div class="rest"><h2>How it is counted</h2>{notes}</div></div>'


def _nsd_chart(summary: Mapping[str, Any]) -> str:
    """Mean normalised surface Dice of both classes against its tolerance; nothing without a case."""
    curves = {name: summary[name]["nsd_curve"] for name in CLASSES if summary[name]["nsd_curve"]}
    if not curves:
        return ""
    columns = {name: curve["mean"] for name, curve in curves.items()}
    columns["epoch"] = next(iter(curves.values()))["tolerance_mm"]
    drawn = [Curve(key=name, name=name, colour=name) for name in curves]
    svg = chart("NSD", columns, drawn, top=1.0, x_name="{} mm")
    return f'<div class="rest"><h2>Surface Dice by tolerance</h2>{svg}</div>'
