"""The two tables of scored cases: a row per case, and the summary that says that the rows are complete."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_cache.files import write_csv
from data_cache.outputs import write_sealed_json
from liverseg.measure.summary import ROWS, SCORES, SUMMARY


def write_tables(
    out: Path, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], *, command: str
) -> None:
    """Write ``scores.csv`` and, last, ``summary.json`` into the folder ``out``.

    The summary of earlier rows is deleted first: killed at any moment, a command leaves a summary that belongs to the
    rows beside it, or none. It also has their checksum and its own, so that nobody takes scores that were changed since for an evaluation's.

    Args:
        out: Created if it does not exist.
        rows: Of ``scores.csv``.
        summary: Of the same cases.
        command: Signs the summary.
    """
    out.mkdir(parents=True, exist_ok=True)
    set_unfinished(out)
    write_csv(out / SCORES, rows)
    write_sealed_json(out / SUMMARY, {**summary, ROWS: rows_checksum(out)}, command=command)


def rows_checksum(out: Path) -> str:
    """SHA-256 of ``scores.csv`` in the folder ``out``."""
    return hashlib.sha256((out / SCORES).read_bytes()).hexdigest()


def set_unfinished(out: Path) -> None:
    """Delete the summary in ``out``, which says that everything beside it is complete and of one evaluation."""
    (out / SUMMARY).unlink(missing_ok=True)
