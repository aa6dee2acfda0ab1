"""The files of a folder or a zip, whatever they hold; a zip is opened once."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Self, cast

from data_cache.errors import VolumeError

MAX_FILE_BYTES = 1 << 30  # of one DICOM file; bounds what a member of a zip can unpack to
PREAMBLE_BYTES = 128
HEAD_BYTES = 1024  # enough to recognize what a file is
BROKEN_LINK = "link to a file that is not there"
AGAIN = "copy or download it again"
UNPACK = "unpack it and name the folder"
# What zipfile and its decompressors raise for a damaged, an encrypted or an unsupported member.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    RuntimeError,
    NotImplementedError,
    ValueError,
    OSError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DicomFile:
    """A file of a folder, or a member of a zip.

    Attributes:
        name: Its path relative to the folder or within the zip.
        irregular: What it is where it is not a regular file: nothing of it is read then.
    """

    name: str
    size_bytes: int
    irregular: str = ""


class DicomSource:
    """A folder or zip, open for reading its files; use as a context manager.

    Raises:
        VolumeError: The folder cannot be listed, or the zip cannot be opened.
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile | None) -> None:
        self.path = path
        self._archive = archive

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a folder or a zip."""
        if path.is_dir():
            return cls(path, None)
        try:
            return cls(path, zipfile.ZipFile(path))
        except _ZIP_ERRORS as failure:
            raise VolumeError(f"{path}: cannot be opened as a zip ({failure}): {AGAIN}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._archive is not None:
            self._archive.close()

    def files(self) -> list[DicomFile]:
        """All files, subfolders included, by name."""
        if self._archive is None:
            return sorted(_walk(self.path, self.path, seen=set()), key=lambda file: file.name)
        # A zip that was packed on Windows may have backslashes in its names, which zipfile keeps here.
        members = (i for i in self._archive.infolist() if not i.filename.endswith(("/", "\\")))
        return sorted(
            (DicomFile(name=info.filename, size_bytes=info.file_size) for info in members),
            key=lambda file: file.name,
        )

    @contextlib.contextmanager
    def opened(self, file: DicomFile) -> Iterator[BinaryIO]:
        """A file's bytes as a stream, of which no more is read than is asked for.

        Raises:
            VolumeError: The file cannot be opened or inflated, also while the stream is read.
        """
        if file.size_bytes > MAX_FILE_BYTES:
            raise VolumeError(
                f"{self.path}: {file.name} has {file.size_bytes} bytes; at most {MAX_FILE_BYTES} are supported"
            )
        if self._archive is None:
            try:
                with open(self.path / file.name, "rb") as stream:
                    yield stream
            except OSError as failure:
                raise VolumeError(
                    f"{self.path}: {file.name} cannot be read: {failure.strerror or failure}"
                ) from None
            return
        try:
            with self._archive.open(file.name) as member:
                yield io.BufferedReader(cast("io.RawIOBase", member))  # small reads are slow
        except _ZIP_ERRORS as failure:
            raise VolumeError(f"{self.path}: {file.name} {_zip_fault(failure)}") from None

    def read(self, file: DicomFile) -> bytes:
        """All bytes of a file; those of a zip have passed its checksum.

        Raises:
            VolumeError: The file cannot be opened or inflated.
        """
        with self.opened(file) as stream:
            return stream.read()


def is_dicom_source(path: Path) -> bool:
    """Whether a path can be asked for a series: a folder or a zip file."""
    return path.is_dir() or path.suffix.lower() == ".zip"


def looks_like_dicom(path: Path) -> bool:
    """Whether a regular file starts as DICOM files do: 128 bytes, then ``DICM``."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with open(path, "rb") as file:
            return has_preamble(file.read(HEAD_BYTES))
    except OSError:
        return False


def first_dicom_below(folder: Path) -> Path | None:
    """A file in a subfolder that starts as DICOM files do; None if there is none, or it cannot be found out."""
    with contextlib.suppress(VolumeError):
        for file in _walk(folder, folder, seen=set()):
            name = PurePosixPath(file.name)
            if len(name.parts) > 1 and other_kind(file.name, b"") is None and looks_like_dicom(folder / name):
                return folder / name
    return None


def has_preamble(head: bytes) -> bool:
    """Whether a file's first bytes are those of a DICOM file."""
    return head[PREAMBLE_BYTES : PREAMBLE_BYTES + 4] == b"DICM"


# ---- what is recognizably something else

_OTHER_NAMES = ("dicomdir", "thumbs.db", "desktop.ini", "lockfile", "version")
# fmt: off
_OTHER_SUFFIXES = frozenset((
    ".txt", ".md", ".csv", ".tsv", ".json", ".xml", ".html", ".htm", ".css", ".js", ".pdf", ".png", ".jpg", ".jpeg",
    ".gif", ".bmp", ".tif", ".tiff", ".svg", ".ico", ".exe", ".dll", ".inf", ".ini", ".log", ".zip", ".gz", ".nii",
    ".doc", ".docx", ".xls", ".xlsx", ".rtf", ".py", ".sh", ".bat", ".cfg", ".yaml", ".yml", ".toml", ".jar", ".db",
    ".nrrd", ".mha", ".mhd", ".bval", ".bvec", ".sha256", ".md5",
))
# fmt: on
_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_MAGIC = (
    (b"%PDF", "PDF file"),
    (b"\x89PNG", "picture"),
    (b"\xff\xd8\xff", "picture"),
    (b"GIF8", "picture"),
    (b"PK\x03\x04", "zip file"),
    (b"\x1f\x8b", "gzip file"),
    (b"SQLite format", "database"),
)


def other_kind(name: str, head: bytes) -> str | None:
    """What a file without a DICOM preamble recognizably is; None where it may be a DICOM file."""
    path = PurePosixPath(name.replace("\\", "/"))
    if any(part.startswith((".", "__MACOSX")) for part in path.parts):
        return "hidden file"
    if path.name.lower() in _OTHER_NAMES or path.suffix.lower() in _OTHER_SUFFIXES:
        return f"{path.suffix.lower() or path.name} file"
    if path.suffix.lower() in _DICOM_SUFFIXES:
        return None
    return next((what for magic, what in _MAGIC if head.startswith(magic)), _text(head))


def _text(head: bytes) -> str | None:
    printable = bytes(range(32, 127)) + b"\t\r\n"
    return "text file" if len(head) >= 8 and not head.translate(None, printable) else None


# ---- folders and zips


def _walk(folder: Path, root: Path, *, seen: set[tuple[int, int]]) -> Iterator[DicomFile]:
    """Every file below a folder; links are followed, each folder once, so that a loop of links ends."""
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as failure:
        raise VolumeError(f"{folder}: cannot be listed: {failure.strerror or failure}") from None
    for entry in entries:
        path = Path(entry.path)
        try:
            status = entry.stat()
        except OSError:  # a link to nothing, or to itself
            yield DicomFile(name=path.relative_to(root).as_posix(), size_bytes=0, irregular=BROKEN_LINK)
            continue
        if stat.S_ISDIR(status.st_mode):
            yield from _walk(path, root, seen=seen)
        else:
            yield DicomFile(
                name=path.relative_to(root).as_posix(),
                size_bytes=status.st_size,
                irregular="" if stat.S_ISREG(status.st_mode) else "FIFO, socket or device",
            )


def _zip_fault(failure: Exception) -> str:
    if isinstance(failure, NotImplementedError):
        return f"is compressed in a way that cannot be read here (Deflate64?): {UNPACK}"
    if isinstance(failure, RuntimeError) and "encrypted" in str(failure):
        return f"is encrypted: {UNPACK}"
    return f"is damaged in the zip ({failure}): {AGAIN}"
