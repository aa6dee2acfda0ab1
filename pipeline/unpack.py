"""Unpack the archive of a Decathlon task so that no path leaves its folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Literal

from data_cache.errors import DataSetError
from data_cache.files import scratch_folder

Stage = Literal["download", "check", "unpack"]
Progress = Callable[[Stage, int, "int | None"], None]  # bytes done and in all, None while that is unknown


def unpack(archive: Path, raw: Path, *, progress: Progress = lambda *_: None) -> None:
    """Unpack the tar file of one Decathlon task so that ``raw`` is the folder of its dataset.json.

    Only files and folders below ``raw`` are unpacked, without the ``._`` litter of macOS. ``raw`` appears once it is
    complete.

    Raises:
        DataSetError: The archive is damaged, holds links, devices or paths that leave the folder, or no
            data set.
    """
    check_space(raw.parent, archive.stat().st_size, have=archive.stat().st_size)
    with scratch_folder(raw.parent) as folder:
        inside = (
            folder / raw.name
        )  # a flat archive's folder is renamed itself, and must not be the scratch folder
        inside.mkdir()
        _extract(archive, inside, progress=progress)
        found = _task_folder(archive, inside)
        os.sync()  # thousands of files: once for all of them, before the name says that they are there
        with contextlib.suppress(FileNotFoundError):
            raw.rmdir()  # empty, or this raises
        os.replace(found, raw)


def _extract(archive: Path, folder: Path, *, progress: Progress) -> None:
    size = archive.stat().st_size
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                if not _is_litter(member):
                    _refuse_unsafe(archive, member)
                    tar.extract(member, folder, filter="data")
                progress("unpack", min(size, member.offset_data + member.size), size)
    except tarfile.FilterError as failure:
        raise DataSetError(
            f"{archive}: unsafe: {failure}: nothing was unpacked; do not trust it"
        ) from failure
    except (tarfile.TarError, EOFError) as failure:
        raise DataSetError(f"{archive}: damaged ({failure}): delete it and download again") from failure


def _is_litter(member: tarfile.TarInfo) -> bool:
    name = PurePosixPath(member.name).name
    return name.startswith("._") or name == ".DS_Store"


def _refuse_unsafe(archive: Path, member: tarfile.TarInfo) -> None:
    """Stricter than tarfile's filter "data", which strips a leading slash and allows links inside the folder."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        what = "a path that leaves the folder"
    elif not (member.isfile() or member.isdir()):
        what = "a link or a device"
    else:
        return
    raise DataSetError(
        f"{archive}: unsafe: holds {what} ({member.name!r}): nothing was unpacked; do not trust it"
    )


def _task_folder(archive: Path, folder: Path) -> Path:
    for candidate in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        if (candidate / "dataset.json").exists():
            return candidate
    raise DataSetError(f"{archive}: no dataset.json inside: not the archive of a Decathlon task")


def check_space(folder: Path, size: int | None, *, have: int) -> None:
    """Refuse to begin what cannot end: the rest of the archive, and as much as all of it unpacked.

    Nothing is checked where the server does not tell the size.

    Raises:
        DataSetError: The disk has less.
    """
    if size is None:
        return
    needed, free = 2 * size - have, shutil.disk_usage(folder).free
    if free < needed:
        raise DataSetError(
            f"{folder}: has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed (the archive and as much "
            "unpacked): make room, or name a folder on another disk"
        )
