"""Downloads the Decathlon's liver data over any number of dropped connections: verified, completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from data_cache.errors import DataSetError
from data_cache.files import read_json, write_json
from data_cache.text import pluralise
from pipeline.decathlon import RawDataSet, read_data_set
from pipeline.unpack import Progress, check_space, unpack

URL = "https://msd-for-monai.s3-us-west-2.amazonaws.com/Task03_Liver.tar"
MD5 = "a90ec6c4aa7f6a3d087205e23d4e6397"
CHUNK_BYTES = 1 << 20
TIMEOUT_S = 60.0
ATTEMPTS = 8  # consecutive attempts without any data; each byte received resets the count
LONGEST_PAUSE_S = 60.0
RESUMABLE_STATUS = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """A server's description of the file that it is sending.

    Attributes:
        size: Bytes of the whole file; None if the server does not say.
        validator: The ETag, or else the date of the last change, which shows whether the file is still the same.
    """

    url: str
    size: int | None
    validator: str | None

    @classmethod
    def of(cls, url: str, response: Any) -> Self:
        """Read the headers of a response with status 200 or 206."""
        headers = response.headers
        etag = headers.get("ETag", "")
        # A weak ETag may stay the same although bytes change.
        strong = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")
        return cls(url=url, size=_total_bytes(response), validator=strong)


class _Dropped(Exception):
    """The connection broke or the server is busy: resume where it stopped."""


class _Changed(_Dropped):
    """The server now has a different file: the bytes received so far are worthless."""


def download(
    raw: Path,
    *,
    url: str = URL,
    md5: str = MD5,
    keep_archive: bool = False,
    progress: Progress = lambda *_: None,
    notify: Callable[[str], None] = lambda _: None,
    pause: Callable[[float], None] = time.sleep,
) -> RawDataSet:
    """Download the archive at ``url`` and unpack its data set to ``raw``.

    Until the end the archive lies beside ``raw`` as ``….partial``, so that calling this again resumes an interrupted
    download. A complete archive that lies there under its own name is the user's: it is used, and never deleted. The
    data set is unpacked into a sibling folder and renamed once it is complete. A data set that is already complete is
    left alone.

    Args:
        raw: Folder to create.
        url: Address (http or https) of a tar file of one Decathlon task.
        md5: Checksum of that file.
        keep_archive: Keep the downloaded archive, under its own name.
        progress: Called with each piece of progress.
        notify: Called with a line that says why and when there will be another attempt.
        pause: Waits the given number of seconds before another attempt.

    Raises:
        DataSetError: ``raw`` is something else, the disk is too small, the server does not have the file or keeps
            dropping the connection, the checksum is wrong, or the archive is damaged or unsafe.
    """
    raw = raw.absolute()
    present = _existing(raw)
    if present is not None:
        return present
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    if urlsplit(url).scheme not in ("http", "https") or name in ("", ".."):
        raise DataSetError(f"{url}: expected the address of a file, such as https://host/Task03_Liver.tar")
    archive = raw.parent / name
    with _full_disk_named(raw.parent):
        raw.parent.mkdir(parents=True, exist_ok=True)
        if archive.exists():
            _check_own(archive, md5=md5, progress=progress)
            unpack(archive, raw, progress=progress)
            return read_data_set(raw)
        received = _Received.of(archive)
        _fetch(url, received, md5=md5, progress=progress, notify=notify, pause=pause)
        unpack(received.partial, raw, progress=progress)
        if keep_archive:
            os.replace(received.partial, archive)
        received.delete()
    return read_data_set(raw)


def _existing(raw: Path) -> RawDataSet | None:
    """The data set in ``raw`` if it is complete; None if there is nothing yet."""
    if not raw.exists() or (raw.is_dir() and not any(raw.iterdir())):
        return None
    remedy = "move it away or delete it, and download again"
    try:
        data_set = read_data_set(raw)
    except DataSetError as failure:
        raise DataSetError(f"{raw}: exists, but is not a data set ({failure}): {remedy}") from failure
    files = [path for case in data_set.cases for path in (case.image, case.label)]
    missing = [path for path in (*files, *data_set.tests) if not path.exists()]
    if missing:
        raise DataSetError(
            f"{raw}: exists, but {pluralise(len(missing), 'file')} of it are missing, such as {missing[0].name}: {remedy}"
        )
    return data_set


# ---- transfer


@dataclass(frozen=True, slots=True, kw_only=True)
class _Received:
    """The bytes received so far, and beside them the record of what they are, which also shows whose they are.

    The record is written before the first byte and deleted after the last one.
    """

    partial: Path
    known: Path

    @classmethod
    def of(cls, archive: Path) -> Self:
        """The files of an archive; raises DataSetError where a file of this name is not ours to delete."""
        self = cls(
            partial=archive.with_name(f"{archive.name}.partial"),
            known=archive.with_name(f"{archive.name}.partial.json"),
        )
        is_recorded = _read_known(self.known) is not None
        for path in (self.known, self.partial):
            if os.path.lexists(path) and not is_recorded:
                raise DataSetError(f"{path}: exists and was not written by liverseg download: move it away")
        return self

    def delete(self) -> None:
        """Delete both files."""
        self.partial.unlink(missing_ok=True)
        self.known.unlink(missing_ok=True)


def _check_own(archive: Path, *, md5: str, progress: Progress) -> None:
    """Check the MD5 of an archive that the user has already."""
    actual = md5_of(archive, progress=progress)
    if actual != md5.lower():
        raise DataSetError(
            f"{archive}: expected MD5 {md5}, found {actual}: the file is damaged or a different one: delete it, or pass "
            "its own MD5 with --md5"
        )


def _fetch(
    url: str,
    received: _Received,
    *,
    md5: str,
    progress: Progress,
    notify: Callable[[str], None],
    pause: Callable[[float], None],
) -> None:
    """Receive an archive completely and check its MD5."""
    _receive_all(url, received, progress=progress, notify=notify, pause=pause)
    actual = md5_of(received.partial, progress=progress)
    if actual != md5.lower():
        received.delete()
        raise DataSetError(
            f"{url}: expected MD5 {md5}, received {actual}: damaged on the way, or the file has changed; the download was "
            "deleted: run the same command again, or pass another --url or --md5"
        )
    # A server need not tell the size; without it, the next call would not see that nothing is missing.
    remote = _read_known(received.known)
    assert remote is not None
    write_json(received.known, asdict(replace(remote, size=_size(received.partial))))


def _receive_all(
    url: str,
    received: _Received,
    *,
    progress: Progress,
    notify: Callable[[str], None],
    pause: Callable[[float], None],
) -> None:
    """Append to the received bytes until they are complete, over any number of dropped connections."""
    fruitless, partial = 0, received.partial
    while True:
        before = _size(partial)
        try:
            _receive(url, received, progress=progress)
            return
        except _Dropped as failure:
            if isinstance(failure, _Changed):
                received.delete()
            fruitless = 1 if _size(partial) > before else fruitless + 1
            if fruitless >= ATTEMPTS:
                raise DataSetError(
                    f"{url}: {failure}, {ATTEMPTS} times in a row: check the network and run the same command again "
                    f"to resume; the {_size(partial)} bytes received so far are kept in {partial}"
                ) from None
            seconds = min(LONGEST_PAUSE_S, 2.0 ** (fruitless - 1))
            notify(f"{failure}: trying again in {seconds:g} s")
            pause(seconds)


def _receive(url: str, received: _Received, *, progress: Progress) -> None:
    """One request: the rest of the file, or all of it if the server cannot resume or its file has changed.

    Raises:
        _Dropped: Nothing is wrong with the file; the bytes received so far are kept.
        _Changed: The file that the server has now does not continue them.
    """
    # Never append to bytes of unknown origin.
    partial, known = received.partial, received.known
    earlier = _read_known(known)
    if earlier is not None and earlier.url != url:
        earlier = None
    have = 0 if earlier is None else _size(partial)
    if earlier is not None and have == earlier.size:
        return
    with _open(url, have, earlier) as response:
        remote, start = Remote.of(url, response), _start(response, have)
        # A server may ignore If-Range and send the rest of a different file.
        if start is None or (start and earlier is not None and not _is_same(earlier, remote)):
            raise _Changed("the file has changed on the server")
        check_space(partial.parent, remote.size, have=_size(partial))
        if start == 0:
            # Before the record is written, which must not vouch for the bytes of another file.
            partial.unlink(missing_ok=True)
        write_json(known, asdict(remote))
        _append(response, partial, start=start, size=remote.size, progress=progress)


def _is_same(a: Remote, b: Remote) -> bool:
    return (a.size, a.validator) == (b.size, b.validator)


def _read_known(known: Path) -> Remote | None:
    """The record of a partial file; None if there is none."""
    try:
        return Remote(**read_json(known))
    except (OSError, ValueError, TypeError):
        return None


def _open(url: str, have: int, earlier: Remote | None) -> Any:
    request = urllib.request.Request(url, headers={"User-Agent": "liverseg", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        if earlier is not None and earlier.validator is not None:
            request.add_header("If-Range", earlier.validator)
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as failure:
        failure.close()
        if failure.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise _Changed("the file on the server is shorter than the part received") from None
        if failure.code in RESUMABLE_STATUS:
            raise _Dropped(f"the server answered {failure.code} {failure.reason}") from None
        raise DataSetError(
            f"{url}: the server answered {failure.code} {failure.reason}: check the address, or pass a mirror with --url"
        ) from None
    except (OSError, http.client.HTTPException) as failure:
        raise _Dropped(f"no connection ({_reason(failure)})") from None


def _reason(failure: BaseException) -> str:
    reason = getattr(failure, "reason", None)
    return str(reason or failure) or type(failure).__name__


def _start(response: Any, have: int) -> int | None:
    """Offset of the response's bytes in the file: 0 for a whole file, None if they do not continue ours."""
    if response.status == http.client.OK:
        return 0
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return have if match is not None and int(match[1]) == have else None


def _total_bytes(response: Any) -> int | None:
    if response.status == http.client.OK:
        length = response.headers.get("Content-Length")
        return None if length is None else int(length)
    match = re.match(r"bytes (?:\d+-\d+|\*)/(\d+)", response.headers.get("Content-Range", ""))
    return None if match is None else int(match[1])


def _append(response: Any, partial: Path, *, start: int, size: int | None, progress: Progress) -> None:
    done = start
    with open(partial, "ab") as file:
        progress("download", done, size)
        while chunk := _read(response):
            file.write(chunk)
            done += len(chunk)
            progress("download", done, size)
        file.flush()
        os.fsync(file.fileno())
    if size is not None and done < size:
        raise _Dropped(f"the connection ended after {done} of {size} bytes")


def _read(response: Any) -> bytes:
    try:
        # read1, so that the bytes received before a connection breaks are kept.
        chunk: bytes = response.read1(CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as failure:
        raise _Dropped(f"the connection broke ({_reason(failure)})") from None
    return chunk


def md5_of(path: Path, *, progress: Progress = lambda *_: None) -> str:
    """The MD5 of a file in hexadecimal digits, computed piece by piece."""
    digest, done, size = hashlib.md5(usedforsecurity=False), 0, _size(path)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            progress("check", done, size)
    return digest.hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@contextlib.contextmanager
def _full_disk_named(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as failure:
        if failure.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataSetError(
            f"{folder}: the disk is full: free some space and run the same command again to resume"
        ) from failure
