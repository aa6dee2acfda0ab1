"""Names of NIfTI files, and what lies near a file that is missing."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = (".nii.gz", ".nii")
CHANNEL = "_0000"  # nnU-Net: the first and only channel of an image
MAX_NEARBY = 3


def volume_stem(path: Path) -> str | None:
    """The file's name without .nii or .nii.gz, in whatever case; None for other files and AppleDouble litter (``._x``)."""
    name = path.name
    if name.startswith("."):
        return None
    return next((name[: -len(suffix)] for suffix in SUFFIXES if name.lower().endswith(suffix)), None)


def other_names(path: Path) -> Iterator[Path]:
    """Names under which a listed NIfTI file may lie instead: packed or not, with nnU-Net's channel or without."""
    stem = volume_stem(path)
    if stem is None:
        return
    for other in (stem, f"{stem}{CHANNEL}", stem.removesuffix(CHANNEL)):
        for suffix in (*SUFFIXES, *(s.upper() for s in SUFFIXES)):
            yield path.with_name(other + suffix)


def nearby(path: Path) -> str:
    """What to say after "no such file": where its link leads, or the most similar names in its folder."""
    if os.path.islink(path):
        return f"; it is a link to {os.readlink(path)}, which leads to no file"
    folder = path.parent
    try:
        names = [name for name in os.listdir(folder) if not name.startswith(".")]
    except (OSError, ValueError):
        return f"; its folder {folder} cannot be listed"
    similar = sorted(difflib.get_close_matches(path.name, names, n=MAX_NEARBY))
    return f"; its folder holds {', '.join(similar)}" if similar else ""
