"""How many workers the memory allows: the need of a case, estimated from its headers, against the free memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from pathlib import Path

from data_cache.errors import VolumeError
from pipeline.nifti import VolumeHeader, VolumeStream
from pipeline.nifti.stream import BLOCK_BYTES

# Measured peaks of a worker: 123 MiB for 512×512×78 int16, 116 for 512×512×60 float64, 235 for 2048×2048×8 float32.
WORKER_BYTES = 140 << 20  # Python, its libraries and the views of a case
HELD_BYTES = 2  # of a voxel at most: see pipeline.held
BLOCK_COPIES = 8  # copies of a block's bytes: float64 for the clipping, float32, masks


def affordable_jobs(jobs: int, *, needed_bytes: int, free_bytes: int | None) -> int:
    """How many of ``jobs`` workers fit, at least one; all of them if the free memory is not known."""
    return jobs if free_bytes is None else max(1, min(jobs, free_bytes // needed_bytes))


def worker_bytes(paths: Iterable[Path]) -> int:
    """Memory that a worker needs for the largest of these files, by their headers; unreadable files are ignored."""
    needed = [WORKER_BYTES]
    for path in paths:
        with contextlib.suppress(VolumeError), VolumeStream.open(path) as stream:
            needed.append(WORKER_BYTES + volume_bytes(stream.header))
    return max(needed)


def volume_bytes(header: VolumeHeader) -> int:
    """Memory for streaming a volume: a few copies of one block of slices, whatever the number of slices."""
    return max(header.slice_bytes, min(header.data_bytes, BLOCK_BYTES)) * BLOCK_COPIES


def held_bytes(path: Path) -> int:
    """Memory for reading a scan and holding its voxels, at most: 16 bits each; 0 for a file that is not readable."""
    with contextlib.suppress(VolumeError), VolumeStream.open(path) as stream:
        header = stream.header
        return volume_bytes(header) + math.prod(header.shape_kji) * min(header.dtype.itemsize, HELD_BYTES)
    return 0


def free_bytes() -> int | None:
    """Memory that this process may still use: the system's, or its container's if that is less; None if unknown."""
    known = [n for n in (_system_free(), *map(_container_free, _CONTAINERS)) if n is not None]
    return min(known) if known else None


_CONTAINERS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def _system_free() -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _container_free(files: tuple[str, str]) -> int | None:
    """A container's limit minus its use, without cached files, which make room when memory is needed."""
    with contextlib.suppress(OSError, ValueError):  # not in a container, or its limit is "max"
        limit, used = (int(Path(file).read_text()) for file in files)
        return max(0, limit - used + _inactive_file_bytes(Path(files[0]).parent))
    return None


def _inactive_file_bytes(folder: Path) -> int:
    for line in (folder / "memory.stat").read_text().splitlines():
        name, value = line.split()
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0
