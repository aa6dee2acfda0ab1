"""Decides which existing files a command may replace: only earlier output of the same command.

Each file that liverseg writes under a name chosen by the user starts with a mark: the first key of a JSON file, the
generator of an HTML page, the software of a PNG, the description of a NIfTI file, the header row of a CSV file.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_cache.errors import OutputError
from data_cache.files import json_checksum, write_json

HEAD_BYTES = 8192  # all marks lie within the first bytes of a file
GZIP_MAGIC = b"\x1f\x8b"
SIGNATURE = "written_by"  # the first key of a signed JSON file
SEAL = "sha256"  # the last key of a sealed one: the checksum of everything else in it

Mark = re.Pattern[bytes]


def author(command: str) -> str:
    """The name under which a command signs its files, such as ``liverseg predict``."""
    return f"liverseg {command}"


def write_signed_json(path: Path, content: Mapping[str, Any], *, command: str) -> None:
    """Write JSON that ``json_mark`` recognises, completely or not at all."""
    write_json(path, {SIGNATURE: author(command), **content})


def write_sealed_json(path: Path, content: Mapping[str, Any], *, command: str) -> None:
    """Write signed JSON with a checksum of its content, which ``is_intact`` verifies."""
    signed = json.loads(json.dumps({SIGNATURE: author(command), **content}))  # as it will be read
    write_json(path, {**signed, SEAL: json_checksum(signed)})


def is_intact(content: Mapping[str, Any]) -> bool:
    """Whether the content of a sealed JSON file is what was written; files of earlier versions have no seal."""
    rest = {key: value for key, value in content.items() if key != SEAL}
    return SEAL not in content or content[SEAL] == json_checksum(rest)


def json_mark(command: str) -> Mark:
    """Matches a file written by ``write_signed_json``."""
    return re.compile(rb'\{\s*"written_by": ' + _quoted(command))


def html_mark(command: str) -> Mark:
    """Matches a page whose ``<meta name="generator">`` is the command."""
    return re.compile(rb'(?s)<!doctype html>.*?<meta name="generator" content=' + _quoted(command))


def png_mark(command: str) -> Mark:
    """Matches a PNG whose text chunk ``Software`` is the command."""
    return re.compile(rb"(?s)\x89PNG\r\n\x1a\n.*?tEXtSoftware\x00" + re.escape(author(command)).encode())


def nifti_mark(description: str) -> Mark:
    """Matches a NIfTI-1 or -2 file, compressed or not, whose field ``descrip`` starts with ``description``."""
    return re.compile(rb"(?s)(.{148}|.{240})" + re.escape(description).encode())


def csv_mark(*columns: str) -> Mark:
    """Matches a CSV file whose first row starts with these columns."""
    return re.compile(rb",".join(re.escape(column).encode() for column in columns) + rb"(?=[,\r\n])")


def carries(path: Path, mark: Mark) -> bool:
    """Whether a path is a file with the mark; a symbolic link is judged by what it points to."""
    return path.is_file() and mark.match(_head(path)) is not None


def require_replaceable(path: Path, mark: Mark, *, command: str) -> None:
    """Check that a command may write a file.

    Args:
        path: The file; a symbolic link is judged by what it points to.
        mark: From one of the functions above.
        command: Name of the command, for the message.

    Raises:
        OutputError: The file exists and does not carry the mark.
    """
    if not os.path.lexists(path) or carries(path, mark):
        return
    raise OutputError(
        f"{path}: exists and was not written by {author(command)}: name another place, or move it away"
    )


def _head(path: Path) -> bytes:
    """The first bytes of a file, decompressed."""
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    if not head.startswith(GZIP_MAGIC):
        return head
    try:
        return zlib.decompressobj(wbits=31).decompress(head, HEAD_BYTES)
    except zlib.error:  # it only starts like gzip
        return b""


def _quoted(command: str) -> bytes:
    return f'"{re.escape(author(command))}"'.encode()
