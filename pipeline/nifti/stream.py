"""A NIfTI file as a stream of slices, inflated once and checked to its last byte."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import stat
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from data_cache.errors import VolumeError
from pipeline.names import nearby
from pipeline.nifti.header import CorruptStreamError, VolumeHeader, read_header, to_canonical

# What inflating raises; gzip.BadGzipFile is an OSError.
INFLATE_ERRORS: tuple[type[Exception], ...] = (EOFError, OSError, zlib.error)
try:
    from isal import igzip, igzip_lib
except ImportError:  # no wheel for this platform: the standard library inflates at half the speed
    igzip = None  # type: ignore[assignment]
else:
    # Its own error is none of these; its stubs take the class for an instance.
    INFLATE_ERRORS += (cast("type[Exception]", igzip_lib.IsalError),)

T = TypeVar("T")

BLOCK_BYTES = 4 << 20  # stays in the L2/L3 cache while it is averaged


class _HashingFile(io.RawIOBase):
    """Reads a file and hashes every byte that passes, so that it is read once.

    Where ``later`` is set, ``hash_passed`` does so: another thread than the one that inflates.
    """

    def __init__(self, path: Path, *, later: bool) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed with the stream)
        self.status = os.fstat(self._file.fileno())
        self.is_gzip = self._file.read(2) == b"\x1f\x8b"
        self._file.seek(0)
        self.sha256 = hashlib.sha256()
        self._later = later
        self._passed = deque[bytes]()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = self._file.readinto(buffer)
        part = memoryview(buffer)[:n]
        if self._later:
            self._passed.append(part.tobytes())
        else:
            self.sha256.update(part)
        return n

    def hash_passed(self) -> None:
        while self._passed:
            self.sha256.update(self._passed.popleft())

    def close(self) -> None:
        self._file.close()
        super().close()


class VolumeStream:
    """A NIfTI file open for one pass from its first slice to its checksum.

    Use as a context manager::

        with VolumeStream.open(path) as stream:
            for first, block_kji in stream.blocks():
                ...
        stream.sha256

    Args of ``open``:
        path: ``.nii`` or ``.nii.gz``.
        use_stdlib: Inflate with the standard library instead of ISA-L.
        prefetch: Inflate the next block in a thread of its own while one is used, for when a core is idle. Takes 10
            to 35 MiB more: glibc keeps a heap for each thread. The thread ends with the context.

    Raises:
        VolumeError: The file cannot be read or is not a NIfTI volume of real numbers.
        CorruptStreamError: Its compressed bytes are damaged or end early.
    """

    def __init__(
        self, header: VolumeHeader, raw: _HashingFile, stream: io.BufferedIOBase, *, prefetch: bool
    ) -> None:
        self.header = header
        self._raw = raw
        self._stream = stream
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inflate") if prefetch else None

    @classmethod
    def open(cls, path: Path, *, use_stdlib: bool = False, prefetch: bool = False) -> Self:
        """Open a file and parse its header."""
        try:
            mode = path.stat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                # Opening a named pipe would wait forever.
                raise VolumeError(
                    f"{path}: expected a file, found a pipe, socket or device: copy it to a file"
                )
            raw = _HashingFile(path, later=prefetch)
        except (OSError, ValueError) as failure:  # ValueError: a NUL in the name
            there = nearby(path) if isinstance(failure, FileNotFoundError) else ""
            reason = getattr(failure, "strerror", None) or failure
            raise VolumeError(f"{path}: cannot be opened: {reason}{there}") from None
        try:
            stream = _inflating(raw, use_stdlib=use_stdlib)
            with _corruption_named(path):
                header = read_header(path, stream)
            return cls(header, raw, stream, prefetch=prefetch)
        except BaseException:
            raw.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown()  # waits for the block that it is at
        self._raw.close()

    @property
    def status(self) -> os.stat_result:
        """Of the file when it was opened: one that is replaced meanwhile then does not pass for the one read."""
        return self._raw.status

    @property
    def sha256(self) -> str:
        """Of the file's bytes, once ``blocks`` has come to its end."""
        return self._raw.sha256.hexdigest()

    def blocks(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """Runs of slices as stored values: index of the first, and an array (n, j, i), read-only.

        After the last one the file is read to its end: that is what checks the CRC, and that there are
        no more voxels than the header says.
        """
        return self._blocks() if self._thread is None else self._ahead(self._thread)

    def _ahead(self, thread: Executor) -> Iterator[tuple[int, NDArray[Any]]]:
        blocks = self._blocks()
        coming = thread.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = thread.submit(next, blocks, None)
            self._raw.hash_passed()
            yield block
        self._raw.hash_passed()

    def _blocks(self) -> Iterator[tuple[int, NDArray[Any]]]:
        header = self.header
        n_slices = header.shape_kji[0]
        per_block = max(1, BLOCK_BYTES // header.slice_bytes)
        for first in range(0, n_slices, per_block):
            yield first, self._block(first, min(per_block, n_slices - first))
        with _corruption_named(header.path):
            surplus = sum(map(len, iter(lambda: self._stream.read(1 << 20), b"")))
        if surplus:
            raise VolumeError(
                f"{header.path}: holds {surplus} bytes after its last voxel: its header (shape "
                f"{header.shape_kji[::-1]}, {header.dtype}) does not describe it"
            )

    def _block(self, first: int, n_slices: int) -> NDArray[Any]:
        header = self.header
        with _corruption_named(header.path):
            # Not readinto: GzipFile has none of its own, and the inherited one copies what read returns.
            data = self._stream.read(n_slices * header.slice_bytes)
        if len(data) < n_slices * header.slice_bytes:
            raise CorruptStreamError(
                f"{header.path}: ends in slice {first + len(data) // header.slice_bytes} of "
                f"{header.shape_kji[0]}: truncated; copy or download it again"
            )
        return np.frombuffer(data, dtype=header.dtype).reshape(n_slices, *header.shape_kji[1:])


class _corruption_named:
    """Turns what inflating raises into one error that names the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, failure: BaseException | None, _: object) -> None:
        if isinstance(failure, INFLATE_ERRORS):
            raise CorruptStreamError(
                f"{self._path}: damaged gzip data ({failure}): copy or download it again"
            ) from failure


def _inflating(raw: _HashingFile, *, use_stdlib: bool) -> io.BufferedIOBase:
    if not raw.is_gzip:
        return io.BufferedReader(raw)
    if igzip is None or use_stdlib:
        return gzip.GzipFile(fileobj=io.BufferedReader(raw, 1 << 20), mode="rb")
    stream: io.BufferedIOBase = igzip.GzipFile(fileobj=raw, mode="rb")  # buffers 512 KiB by itself
    return stream


def retry_with_stdlib_gzip(read: Callable[[bool], T]) -> T:
    """Call ``read`` with ISA-L, and once more with the standard library (True) if the stream looks corrupt."""
    try:
        return read(False)
    except CorruptStreamError:
        # ISA-L has an open false alarm (checksums on aarch64): the standard library has the last word.
        return read(True)


def as_int16(block_kji: NDArray[Any], header: VolumeHeader) -> NDArray[Any]:
    """Stored values scaled and rounded to int16; what is not finite becomes air."""
    if block_kji.dtype.newbyteorder("=") == np.int16 and (header.slope, header.intercept) == (1.0, 0.0):
        return block_kji
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = block_kji * header.slope + header.intercept
    scaled = np.nan_to_num(scaled, nan=-1024, posinf=-1024, neginf=-1024)
    return np.clip(np.rint(scaled), -32767, 32767)


def read_canonical(path: Path) -> tuple[NDArray[np.int16], VolumeHeader]:
    """A whole volume (z, y, x), scaled and rounded to int16, for pictures; raises what ``VolumeStream`` does."""
    with VolumeStream.open(path) as stream:
        header = stream.header
        volume_kji = np.empty(header.shape_kji, dtype=np.int16)
        for first, block in stream.blocks():
            volume_kji[first : first + len(block)] = as_int16(block, header)
        return to_canonical(volume_kji, header.axes_kji), header
