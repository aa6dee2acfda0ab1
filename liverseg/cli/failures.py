"""Failures in words: one line for what the machine refuses (memory, disk space, permissions) and for our own faults."""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from pathlib import Path

from data_cache.errors import LiversegError
from data_cache.files import parse_partial_name

TRAINS = ("train", "overfit", "tune")
TAKES_JOBS = ("preprocess", "check", "fidelity", "fingerprint")
TAKES_DEVICE = ("predict", "evaluate")
# torch and NumPy say how much they asked for: "tried to allocate 2.00 GiB", "Unable to allocate 7.45 GiB".
_ASKED = re.compile(r"allocate ([\d.]+ ?[KMGTPE]?i?[Bb](?:ytes)?)")
# Of PyTorch's allocator of main memory, a RuntimeError like any other of its errors.
_HOST_WORDS = ("not enough memory", "can't allocate memory")
# "The operator 'aten::NAME' is not currently implemented for the MPS device", "Could not run 'aten::NAME' with arguments
# from the 'MPS' backend".
_OPERATOR = re.compile(r"(?:operator|run) '(?:aten::)?([\w.:]+)'")
_OPERATOR_DEVICE = re.compile(r"(?:for the|from the) '?(\w+)'? (?:device|backend)")

_REFUSED = "permission denied: choose another path, or change its permissions"
_NOT_A_FOLDER = "is a file where a folder should be: choose another folder, or move the file away"
_FULL = "the disk is full: free some space or choose a path on another disk, then run the same command again"
_OS_WORDS: Mapping[int, str] = {
    errno.EACCES: _REFUSED,
    errno.EPERM: _REFUSED,
    errno.EROFS: "the disk is mounted read-only: choose a path on another one",
    errno.ENOTDIR: _NOT_A_FOLDER,
    errno.EEXIST: _NOT_A_FOLDER,
    errno.EISDIR: "is a folder where a file should be: name a file",
    errno.ENOENT: "no such file or folder: check the path",
    errno.ENAMETOOLONG: "the name is too long for this file system: use a shorter one",
    errno.ELOOP: "is a symbolic link that leads back to itself: name the file itself",
}


def in_words(failure: Exception, command: str | None, *, about: str = "") -> str:
    """One line for any failure: the input's fault, what the machine refuses, or else a fault of ours.

    Args:
        failure: What was raised.
        command: Name of the command that failed, for advice on memory.
        about: The file or case that was at work, for messages that do not name it.
    """
    if isinstance(failure, LiversegError):
        return str(failure)
    message = memory_message(failure, command) or operator_message(failure, command)
    if message is None and isinstance(failure, OSError):
        message = os_message(failure)
        if failure.filename:
            return message
    if message is None:
        # A fault of ours: say so, without a page of traceback.
        message = f"internal: {type(failure).__name__}: {failure} (liverseg --debug … shows where)"
    return f"{about}: {message}" if about else message


def memory_message(failure: BaseException, command: str | None) -> str | None:
    """Which memory ran out, and what to do about it in ``command``; None for another failure."""
    text = str(failure)
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(failure).__mro__) or (
        isinstance(failure, RuntimeError) and "CUDA" in text and "out of memory" in text
    ):
        return f"out of GPU memory{_asked(text)}: {_gpu_remedy(command)}"
    if (
        isinstance(failure, MemoryError)
        or (isinstance(failure, OSError) and failure.errno == errno.ENOMEM)
        or (isinstance(failure, RuntimeError) and any(words in text for words in _HOST_WORDS))
    ):
        return f"out of main memory{_asked(text)}: {_host_remedy(command)}"
    return None


def operator_message(failure: BaseException, command: str | None) -> str | None:
    """Which operator this torch lacks on the device that was asked for, and what to do; None for another failure."""
    found = _OPERATOR.search(str(failure))
    if not isinstance(failure, NotImplementedError) or found is None:
        return None
    device = _OPERATOR_DEVICE.search(str(failure))
    return (
        f"this build of torch cannot compute {found[1]} on {'this device' if device is None else device[1].lower()}: "
        f"{_device_remedy(command)}, or set PYTORCH_ENABLE_MPS_FALLBACK=1 to compute that operator alone on the CPU"
    )


def os_message(failure: OSError) -> str:
    """What the file system refused, and where: a sentence for the usual errors, the system's words for others."""
    if failure.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{_file(failure)}: {_FULL}" if failure.filename else _FULL
    words = _OS_WORDS.get(failure.errno or 0) if failure.filename else None
    words = words or failure.strerror or str(failure)
    return f"{_file(failure)}: {words}" if failure.filename else words


def _asked(text: str) -> str:
    found = _ASKED.search(text)
    return f" ({found[1]} more were requested)" if found else ""


def _device_remedy(command: str | None) -> str:
    return "use --set device=cpu" if command in TRAINS else "use --device cpu"


def _gpu_remedy(command: str | None) -> str:
    if command in TRAINS:
        return (
            "use a smaller batch (--set optim.batch_size=1, with --set optim.accumulate=2 for the same step), or "
            "--set recompute=true, or --set precision=fp16 instead of float32, or --set data.resident=memory"
        )
    if command in TAKES_DEVICE:
        return "close other programs, or use fewer --samples or --device cpu"
    if command == "bench":
        return "close other programs that use it, or use bench train --base-channels 32"
    return "close other programs that use it"


def _host_remedy(command: str | None) -> str:
    if command in TRAINS:
        return "use a smaller batch (--set optim.batch_size=1) or network (--set model.base_channels=16)"
    if command in TAKES_DEVICE:
        return "use fewer --samples, or close other programs"
    if command in TAKES_JOBS:
        return "use --jobs 1, or close other programs"
    return "close other programs, or use a machine with more"


def _file(failure: OSError) -> str:
    """The file as the user knows it: not its name while it is being written, and the file that takes a folder's place."""
    path = Path(str(failure.filename))
    written = parse_partial_name(path.name)
    if written is not None:
        path = path.with_name(written[0])
    if failure.errno == errno.ENOTDIR:
        path = next((p for p in (path, *path.parents) if p.is_file()), path)
    return str(path)
