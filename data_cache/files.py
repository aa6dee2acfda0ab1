"""Files that are written completely or not at all, and their checksums."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces ``path`` when the block ends, and is deleted if the block fails."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, completely or not at all."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))  # names of files need not be UTF-8


def write_json(path: Path, content: object) -> None:
    """Write plain dicts, lists, strings and finite numbers as JSON, completely or not at all.

    Raises:
        ValueError: ``content`` contains NaN or infinity, which JSON does not have.
    """
    write_text(path, json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV, whole or not at all.

    The columns are the keys of all rows in order of appearance; None and a missing key are an empty field. Without
    any row the file is empty.
    """
    table = io.StringIO(newline="")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(table, fieldnames=columns)
    if columns:
        writer.writeheader()
    writer.writerows(rows)
    write_text(path, table.getvalue())


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
