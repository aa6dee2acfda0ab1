"""What the machine refuses, in words: memory, room on the disk, rights. Neither the input's fault nor ours."""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from pathlib import Path

TRAINS = ("train", "overfit", "tune")
TAKES_JOBS = ("preprocess", "check", "fidelity", "fingerprint")
TAKES_DEVICE = ("predict", "evaluate")
# torch and NumPy say how much they asked for: "tried to allocate 2.00 GiB", "Unable to allocate 7.45 GiB".
_ASKED = re.compile(r"allocate ([\d.]+ ?[KMGTPE]?i?[Bb](?:ytes)?)")
# Of PyTorch's allocator of main memory, a RuntimeError like any other of its errors.
_HOST_WORDS = ("not enough memory", "can't allocate memory")
_PARTIAL = re.compile(r"\.(.+)\.\d+\.partial")

_REFUSED = "is not allowed: name another place, or change its rights"
_NOT_A_FOLDER = "is a file where a folder should be: name another folder, or move it away"
_FULL = "the disk is full: free some room or name a place on another disk, then run the same command again"
_OS_WORDS: Mapping[int, str] = {
    errno.EACCES: _REFUSED,
    errno.EPERM: _REFUSED,
    errno.EROFS: "is on a disk that is mounted read-only: name a place on another one",
    errno.ENOTDIR: _NOT_A_FOLDER,
    errno.EEXIST: _NOT_A_FOLDER,
    errno.EISDIR: "is a folder where a file should be: name a file",
    errno.ENOENT: "is not there: see whether the path is right",
}


def memory_message(failure: BaseException, command: str | None) -> str | None:
    """Which memory did not suffice, and what to do about it in ``command``; None for another failure."""
    text = str(failure)
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(failure).__mro__) or (
        isinstance(failure, RuntimeError) and "CUDA" in text and "out of memory" in text
    ):
        return f"the GPU's memory is not enough{_asked(text)}: {_gpu_remedy(command)}"
    if (
        isinstance(failure, MemoryError)
        or (isinstance(failure, OSError) and failure.errno == errno.ENOMEM)
        or (isinstance(failure, RuntimeError) and any(words in text for words in _HOST_WORDS))
    ):
        return f"the main memory is not enough{_asked(text)}: {_host_remedy(command)}"
    return None


def os_message(failure: OSError) -> str:
    """What the file system refuses, and where: a sentence for the usual errors, the system's words for others."""
    if failure.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{_file(failure)}: {_FULL}" if failure.filename else _FULL
    words = _OS_WORDS.get(failure.errno or 0) if failure.filename else None
    words = words or failure.strerror or str(failure)
    return f"{_file(failure)}: {words}" if failure.filename else words


def _asked(text: str) -> str:
    found = _ASKED.search(text)
    return f" ({found[1]} more were asked for)" if found else ""


def _gpu_remedy(command: str | None) -> str:
    if command in TRAINS:
        return (
            "take a smaller batch (--set optim.batch_size=1, with --set optim.accumulate=2 for the same step), or "
            "--set recompute=true, or --set data.resident=memory"
        )
    if command in TAKES_DEVICE:
        return "free it from other programs, or take fewer --samples or --device cpu"
    return "free it from other programs"


def _host_remedy(command: str | None) -> str:
    if command in TRAINS:
        return "take a smaller batch (--set optim.batch_size=1) or network (--set model.base_channels=16)"
    if command in TAKES_DEVICE:
        return "take fewer --samples, or free it from other programs"
    if command in TAKES_JOBS:
        return "take --jobs 1, or free it from other programs"
    return "free it from other programs, or take a machine that has more"


def _file(failure: OSError) -> str:
    """The file as a user knows it: not the name that it has while it is written, and the file in a folder's place."""
    path = Path(str(failure.filename))
    written = _PARTIAL.fullmatch(path.name)
    if written:
        path = path.with_name(written[1])
    if failure.errno == errno.ENOTDIR:
        path = next((p for p in (path, *path.parents) if p.is_file()), path)
    return str(path)
