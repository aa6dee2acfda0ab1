"""Score label files of any tool: two files, or two folders matched by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_cache.errors import DataSetError
from data_cache.outputs import csv_mark, json_mark, require_replaceable
from liverseg.evaluation.tables import write_tables
from liverseg.measure.summary import (
    SCORES,
    SUMMARY,
    LabelScores,
    score_columns,
    score_labels,
    summarise_scores,
)
from pipeline.labels import read_label
from pipeline.names import nearby, volume_stem
from pipeline.prepare import check_same_grid


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelPair:
    """A predicted label file and the true one; ``name`` is theirs without .nii.gz."""

    name: str
    predicted: Path
    truth: Path


def pair_labels(predicted: Path, truth: Path) -> tuple[list[LabelPair], list[str]]:
    """The pairs of two files, or of two folders by name, and a line for each file without a counterpart.

    Raises:
        DataSetError: One is a file and the other a folder, one is missing, no two names are equal, or a folder has two
            files for one name.
    """
    if predicted.is_file() and truth.is_file():
        return [LabelPair(name=volume_stem(truth) or truth.name, predicted=predicted, truth=truth)], []
    for path in (predicted, truth):
        if not path.is_dir():
            there = "" if os.path.exists(path) else nearby(path)
            raise DataSetError(
                f"{path}: no such folder{there}: name two folders of label files, or two files"
            )
    ours, theirs = _volumes(predicted), _volumes(truth)
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        raise DataSetError(f"{predicted} and {truth} have no two .nii or .nii.gz files of the same name")
    alone = [f"{theirs[n]}: has no prediction" for n in _files_only_in(theirs, ours)]
    alone += [f"{ours[n]}: has no truth" for n in _files_only_in(ours, theirs)]
    return [LabelPair(name=n, predicted=ours[n], truth=theirs[n]) for n in both], alone


def score_files(pair: LabelPair) -> LabelScores:
    """Score one file against another, whatever their orientations.

    Raises:
        VolumeError: A file cannot be read.
        LabelError: They are not on one grid, or hold other values than 0, 1 and 2.
    """
    truth, predicted = read_label(pair.truth), read_label(pair.predicted)
    check_same_grid(predicted.header, truth.header)
    return score_labels(predicted.label_zyx, truth.label_zyx, truth.header.grid.spacing_zyx_mm)


def score_pairs(
    pairs: list[LabelPair], *, report: Callable[[str, LabelScores | Exception], None]
) -> dict[str, LabelScores]:
    """Scores by name; ``report`` hears of each, and of each failure, which does not stop the others."""
    done: dict[str, LabelScores] = {}
    for pair in pairs:
        try:
            done[pair.name] = score_files(pair)
            report(pair.name, done[pair.name])
        except Exception as failure:  # of whatever kind: it must not cost the other pairs
            report(pair.name, failure)
    return done


def require_own_scores(out: Path) -> None:
    """Raise OutputError if ``write_scores`` would replace files that ``liverseg score`` did not write."""
    require_replaceable(out / SCORES, csv_mark("case", "liver_dice", "liver_voe_percent"), command="score")
    require_replaceable(out / SUMMARY, json_mark("score"), command="score")


def write_scores(
    out: Path, scores: dict[str, LabelScores], *, failed: Sequence[str] = (), alone: int = 0
) -> dict[str, Any]:
    """Write ``scores.csv`` and ``summary.json`` into ``out``, and return the summary.

    Args:
        out: Created if it does not exist.
        scores: By name.
        failed: Pairs that could not be scored.
        alone: Files without a counterpart.

    Raises:
        OutputError: ``out`` has files of these names that ``liverseg score`` did not write.
    """
    require_own_scores(out)
    rows = [{"case": name} | score_columns(case) for name, case in scores.items()]
    incomplete = {"failed": list(failed), "n_without_counterpart": alone}
    summary = {"n_cases": len(scores), **incomplete, **summarise_scores(list(scores.values()))}
    write_tables(out, rows, summary, command="score")
    return summary


def _files_only_in(folder: dict[str, Path], other: dict[str, Path]) -> list[str]:
    return [name for name in sorted(folder.keys() - other.keys()) if not folder[name].is_dir()]


def _volumes(folder: Path) -> dict[str, Path]:
    """Files by their names without the ending; a folder or a broken link only where no file has its name."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir(), key=lambda path: (not os.path.isfile(path), path)):
        stem = volume_stem(path)
        if stem is None or (stem in found and not os.path.isfile(path)):
            continue
        if found.setdefault(stem, path) is not path:
            raise DataSetError(
                f"{folder}: has both {found[stem].name} and {path.name}, of one name: move one of them away"
            )
    return found
