"""Names the process that writes a file, so that others can tell whether it has ended."""

from __future__ import annotations

import functools
import os
import re
import socket
from pathlib import Path
from typing import NamedTuple

UNKNOWN_START = 0


def own_name() -> str:
    """The ``process_name`` of this process."""
    return process_name(os.getpid())


def process_name(pid: int) -> str:
    """A running process as ``MACHINE@PID-START``; START tells it from a later process that is given the same PID.

    Machine names never contain "@". With a dash, a leftover from machine "ct-7" could pass for process 7 on "ct".
    """
    status = _read_status(pid)
    return f"{own_machine()}@{pid}-{UNKNOWN_START if status is None else status.start}"


def own_name_pattern() -> str:
    """A regular expression for the ``process_name`` of every process of this machine."""
    return rf"{re.escape(own_machine())}@[0-9]+-[0-9]+"


@functools.cache
def own_machine() -> str:
    """The host and the namespace of its PIDs: containers may share the host's name, and count from 1 each."""
    try:
        return f"{socket.gethostname()}+{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return socket.gethostname()


def has_ended(name: str) -> bool:
    """Whether the process of this ``process_name`` has ended; False where only another machine could tell."""
    if re.fullmatch(own_name_pattern(), name) is None:
        return False
    pid, start = map(int, name.rpartition("@")[2].split("-"))
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    status = _read_status(pid)
    if status is None:
        return False
    # A zombie was killed, but its parent never collected its exit code: in a container without an init, it stays that way.
    return status.state in ("Z", "X") or start not in (UNKNOWN_START, status.start)


class _Status(NamedTuple):
    state: str
    start: int  # in clock ticks since the machine was started


def _read_status(pid: int) -> _Status | None:
    """See proc(5); None without /proc, or where the process has just ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return _Status(state=fields[0], start=int(fields[19]))
    except (OSError, ValueError, IndexError):
        return None
