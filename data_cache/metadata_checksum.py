"""Checksum stored inside the metadata that it covers: JSON with a flipped bit is often still valid JSON."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from data_cache.reader import METADATA

KEY = "metadata_sha256"
_CHECKSUM = re.compile(rf'"{KEY}": "[0-9a-f]{{64}}"'.encode())
_BLANK = f'"{KEY}": "{"0" * 64}"'.encode()


def write_with_checksum(folder: Path, attributes: dict[str, Any]) -> None:
    """Write a group's attributes together with a checksum of its ``zarr.json`` and of all those below it."""
    path = folder / METADATA
    group = json.loads(path.read_text())
    group["attributes"] = {**attributes, KEY: "0" * 64}
    blank = json.dumps(group, indent=2, allow_nan=False).encode()
    path.write_bytes(blank)
    path.write_bytes(blank.replace(_BLANK, _entry(_digest(folder))))


def has_valid_checksum(folder: Path, *, alone: bool = False) -> bool:
    """Whether every byte of the metadata is as it was written.

    Args:
        folder: Folder of a case, or of a store.
        alone: Check only the folder's own ``zarr.json``: a store's checksum is written before it has any case.
    """
    try:
        return _CHECKSUM.findall((folder / METADATA).read_bytes()) == [_entry(_digest(folder, alone=alone))]
    except OSError:  # a bad sector, or another process is replacing the case right now
        return False


def _entry(digest: str) -> bytes:
    return f'"{KEY}": "{digest}"'.encode()


def _digest(folder: Path, *, alone: bool = False) -> str:
    digest = hashlib.sha256()
    for path in [folder / METADATA] if alone else sorted(folder.rglob(METADATA)):
        content = path.read_bytes()
        if path.parent == folder:
            content = _CHECKSUM.sub(_BLANK, content)  # a checksum cannot cover itself
        digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()
