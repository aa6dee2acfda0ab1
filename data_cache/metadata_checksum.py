"""The seal of metadata: a checksum inside it, since JSON with a flipped bit often is JSON still."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from data_cache.reader import METADATA

KEY = "metadata_sha256"
_SEAL = re.compile(rf'"{KEY}": "[0-9a-f]{{64}}"'.encode())
_BLANK = f'"{KEY}": "{"0" * 64}"'.encode()


def write_with_checksum(folder: Path, attributes: dict[str, Any]) -> None:
    """Write a group's attributes, and with them the checksum of its ``zarr.json`` and of all those below it."""
    path = folder / METADATA
    group = json.loads(path.read_text())
    group["attributes"] = {**attributes, KEY: "0" * 64}
    blank = json.dumps(group, indent=2, allow_nan=False).encode()
    path.write_bytes(blank)
    path.write_bytes(blank.replace(_BLANK, _sealed(_digest(folder))))


def has_valid_checksum(folder: Path, *, alone: bool = False) -> bool:
    """Whether every byte of the metadata is as it was sealed.

    Args:
        folder: Of a case, or of a store.
        alone: Look at the folder's own ``zarr.json`` only: a store is sealed before it has any case.
    """
    try:
        return _SEAL.findall((folder / METADATA).read_bytes()) == [_sealed(_digest(folder, alone=alone))]
    except OSError:  # a bad sector, or another process just replaces the case
        return False


def _sealed(digest: str) -> bytes:
    return f'"{KEY}": "{digest}"'.encode()


def _digest(folder: Path, *, alone: bool = False) -> str:
    digest = hashlib.sha256()
    for path in [folder / METADATA] if alone else sorted(folder.rglob(METADATA)):
        content = path.read_bytes()
        if path.parent == folder:
            content = _SEAL.sub(_BLANK, content)  # the seal cannot hold its own checksum
        digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()
