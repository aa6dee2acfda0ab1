"""Files that are written completely or not at all, and their checksums."""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import io
import json
import os
import re
import shutil
import tomllib
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from data_cache.processes import has_ended, own_name, own_name_pattern

S = TypeVar("S")
T = TypeVar("T")

FORMULA_STARTS = (
    "=",
    "+",
    "-",
    "@",
    "\t",
    "\r",
    "'",
)  # an apostrophe, so that reading gives back what was written
ROW_CHECKSUM = "crc32"  # the last column of a sealed CSV file
PARTIAL_SUFFIX = ".partial"  # of files and folders that are being written
MAX_NAME_BYTES = 255


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces ``path`` when the block ends, and is deleted if the block fails.

    What killed writers left in the same folder is deleted first.
    """
    _remove_leftovers(path.parent)
    partial = path.with_name(partial_name(path.name))
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new hidden folder in ``parent``, deleted when the block ends; those of killed processes are deleted first."""
    _remove_leftovers(parent)
    folder = parent / partial_name(uuid.uuid4().hex[:8])
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def partial_name(name: str) -> str:
    """Hidden name of a file or folder while this process is writing it: ``.NAME.PROCESS.partial``."""
    end = f".{own_name()}{PARTIAL_SUFFIX}"
    if len(os.fsencode(name)) + len(os.fsencode(end)) >= MAX_NAME_BYTES:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return f".{name}{end}"


def parse_partial_name(partial: str) -> tuple[str, str] | None:
    """The NAME and PROCESS of a ``partial_name`` made on this machine; None for any other name."""
    pattern = rf"\.(.+)\.({own_name_pattern()}){re.escape(PARTIAL_SUFFIX)}"
    match = re.fullmatch(pattern, partial, flags=re.DOTALL)
    return None if match is None else (match[1], match[2])


@functools.cache  # once per folder and process: listing a folder for each file in it would take ever longer
def _remove_leftovers(folder: Path) -> None:
    with contextlib.suppress(OSError):
        for path in folder.glob(f".*{PARTIAL_SUFFIX}"):
            written = parse_partial_name(path.name)
            if written is None or not has_ended(written[1]):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


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


def read_json(path: Path) -> Any:
    """The content of a JSON file in UTF-8, with a byte order mark or without, or in UTF-16.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not JSON, or is nested too deeply.
    """
    return _parsed(json.loads, path.read_bytes())


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file, with a byte order mark or without; raises as ``read_json`` does."""
    return parse_toml(path.read_text(encoding="utf-8-sig"))


def parse_toml(text: str) -> dict[str, Any]:
    """The content of TOML; raises ValueError where it is none, or is nested too deeply."""
    return _parsed(tomllib.loads, text)


def json_checksum(content: object) -> str:
    """SHA-256 of plain values: the order of a dict's keys and the layout of the file do not count."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _parsed(parse: Callable[[S], T], source: S) -> T:
    try:
        return parse(source)
    except RecursionError:  # not an error of the file to the parsers, which is all that it is
        raise ValueError("nested too deeply") from None


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], *, sealed: bool = False) -> None:
    """Write rows as CSV, completely or not at all.

    The columns are the keys of all rows in order of appearance; None and a missing key are an empty field. Without
    any row, the file is empty. Text that a spreadsheet would run as a formula gets an apostrophe in front.

    Args:
        path: The file.
        rows: Dicts of text, numbers and None.
        sealed: Add a column with a checksum of each row, which ``read_csv`` checks.
    """
    table = io.StringIO(newline="")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.writer(table)
    if columns:
        writer.writerow([*columns, ROW_CHECKSUM] if sealed else columns)
    for row in rows:
        fields = [_as_text(row.get(column)) for column in columns]
        writer.writerow([*fields, _row_checksum(columns, fields)] if sealed else fields)
    write_text(path, table.getvalue())


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file written by ``write_csv``, without their checksums.

    Raises:
        ValueError: A row has too many or too few fields or does not match its checksum, or the file is not UTF-8.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            columns, *rows = list(csv.reader(file, strict=True)) or [[]]
    except csv.Error as failure:
        raise ValueError(str(failure)) from failure
    for number, fields in enumerate(rows, 1):
        if len(fields) != len(columns):
            raise ValueError(f"row {number}: expected {len(columns)} fields, found {len(fields)}")
        if ROW_CHECKSUM in columns[-1:] and fields[-1] != _row_checksum(columns[:-1], fields[:-1]):
            raise ValueError(f"row {number} does not match its checksum")
    read = (dict(zip(columns, map(_without_apostrophe, fields), strict=True)) for fields in rows)
    return [{column: value for column, value in row.items() if column != ROW_CHECKSUM} for row in read]


def _row_checksum(columns: Sequence[str], fields: Sequence[str]) -> str:
    return f"{zlib.crc32(json.dumps([columns, fields]).encode()):08x}"


def _as_text(value: Any) -> str:
    if isinstance(value, str) and value.startswith(FORMULA_STARTS):
        return f"'{value}"
    return "" if value is None else str(value)


def _without_apostrophe(value: str) -> str:
    return value[1:] if value.startswith("'") and value[1:].startswith(FORMULA_STARTS) else value


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
