"""Fetch the Decathlon's liver data: over any number of dropped connections, checked, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from data_cache.errors import DataSetError
from data_cache.files import write_json
from pipeline.decathlon import RawDataSet, read_data_set
from pipeline.unpack import Progress, check_space, unpack

URL = "https://msd-for-monai.s3-us-west-2.amazonaws.com/Task03_Liver.tar"
MD5 = "a90ec6c4aa7f6a3d087205e23d4e6397"
CHUNK_BYTES = 1 << 20
TIMEOUT_S = 60.0
ATTEMPTS = 8  # in a row that bring nothing; any byte that comes starts the count again
LONGEST_PAUSE_S = 60.0
RESUMABLE_STATUS = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """What a server says of the file that it is sending.

    Attributes:
        size: Bytes of the whole file, None where the server does not tell.
        validator: ETag, or else date of the last change: what tells that the file is still the same.
    """

    url: str
    size: int | None
    validator: str | None

    @classmethod
    def of(cls, url: str, response: Any) -> Self:
        """From the headers of a 200 or 206."""
        headers = response.headers
        etag = headers.get("ETag", "")
        # A weak ETag may stay the same while bytes change.
        strong = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")
        return cls(url=url, size=_total_bytes(response), validator=strong)


class _Dropped(Exception):
    """The connection broke or the server is busy: try again from where it stopped."""


class _Changed(_Dropped):
    """The server has another file now: what came so far is worthless."""


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
    """Make ``raw`` the data set that the archive at ``url`` holds.

    The archive is kept beside ``raw`` while it comes (``….partial``), so that the same call goes on where an
    interrupted one stopped, or uses an archive of that name which is there already. The data set is unpacked
    into a sibling folder and renamed when it is whole. A data set that is complete already is left as it is.

    Args:
        raw: Folder to make.
        url: Of a tar file of one Decathlon task, http or https.
        md5: Of that file.
        keep_archive: Do not delete the archive at the end.
        progress: Told of every piece.
        notify: Told in a line why there will be another attempt, and when.
        pause: Waits so many seconds before another attempt.

    Raises:
        DataSetError: ``raw`` is something else, the disk is too small, the server does not have the file or
            breaks off again and again, the checksum is wrong, or the archive is damaged or unsafe.
    """
    raw = raw.absolute()
    present = _existing(raw)
    if present is not None:
        return present
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    if urlsplit(url).scheme not in ("http", "https") or name in ("", ".."):
        raise DataSetError(f"{url}: is no address of a file (http:// or https://)")
    archive = raw.parent / name
    with _full_disk_named(raw.parent):
        raw.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, archive, md5=md5, progress=progress, notify=notify, pause=pause)
        unpack(archive, raw, progress=progress)
    if not keep_archive:
        archive.unlink()
    return read_data_set(raw)


def _existing(raw: Path) -> RawDataSet | None:
    """The data set in ``raw`` if it is complete, None where there is nothing yet."""
    if not raw.exists() or (raw.is_dir() and not any(raw.iterdir())):
        return None
    remedy = "move it away or delete it, and download again"
    try:
        data_set = read_data_set(raw)
    except DataSetError as failure:
        raise DataSetError(f"{raw}: is there already, but is no data set ({failure}): {remedy}") from failure
    files = [path for case in data_set.cases for path in (case.image, case.label)]
    missing = [path for path in (*files, *data_set.tests) if not path.exists()]
    if missing:
        raise DataSetError(
            f"{raw}: is there already, but lacks {len(missing)} of its files, {missing[0].name} first: {remedy}"
        )
    return data_set


# ---- fetching


def _fetch(
    url: str,
    archive: Path,
    *,
    md5: str,
    progress: Progress,
    notify: Callable[[str], None],
    pause: Callable[[float], None],
) -> None:
    """Bring ``archive`` here, whole and with this md5; one that is there already is only checked."""
    if archive.exists():
        actual = md5_of(archive, progress=progress)
        if actual != md5.lower():
            raise DataSetError(
                f"{archive}: its md5 is {actual}, not {md5}: damaged, or another file; delete it, or name its --md5"
            )
        return
    partial, known = (archive.with_name(archive.name + end) for end in (".partial", ".partial.json"))
    _receive_all(url, partial, known, progress=progress, notify=notify, pause=pause)
    actual = md5_of(partial, progress=progress)
    known.unlink(missing_ok=True)
    if actual != md5.lower():
        partial.unlink()
        raise DataSetError(
            f"{url}: what came has the md5 {actual}, not {md5}: damaged on the way, or a changed file; it was "
            "deleted: download again, or name another --url or --md5"
        )
    os.replace(partial, archive)


def _receive_all(
    url: str,
    partial: Path,
    known: Path,
    *,
    progress: Progress,
    notify: Callable[[str], None],
    pause: Callable[[float], None],
) -> None:
    """Append to ``partial`` until it is whole, over any number of dropped connections."""
    fruitless = 0
    while True:
        before = _size(partial)
        try:
            _receive(url, partial, known, progress=progress)
            return
        except _Dropped as failure:
            if isinstance(failure, _Changed):
                known.unlink(missing_ok=True)
            fruitless = 1 if _size(partial) > before else fruitless + 1
            if fruitless >= ATTEMPTS:
                raise DataSetError(
                    f"{url}: {failure}, {ATTEMPTS} times in a row: see that the network works and run the "
                    f"same command again; the {_size(partial)} bytes that came are kept in {partial}"
                ) from None
            seconds = min(LONGEST_PAUSE_S, 2.0 ** (fruitless - 1))
            notify(f"{failure}: trying again in {seconds:g} s")
            pause(seconds)


def _receive(url: str, partial: Path, known: Path, *, progress: Progress) -> None:
    """One request: the rest of the file, or all of it where the server cannot go on or its file has changed.

    Raises:
        _Dropped: Nothing is wrong with the file; what came is in ``partial``.
        _Changed: What the server has now does not continue ``partial``.
    """
    # Bytes without a note of what they are of are never built upon.
    earlier = _read_known(known, url)
    have = 0 if earlier is None else _size(partial)
    if earlier is not None and have == earlier.size:
        return
    with _open(url, have, earlier) as response:
        remote, start = Remote.of(url, response), _start(response, have)
        # A server may ignore If-Range, and send the rest of another file.
        if start is None or (start and earlier is not None and not _is_same(earlier, remote)):
            raise _Changed("the file has changed on the server")
        check_space(partial.parent, remote.size, have=_size(partial))
        if start == 0:
            partial.unlink(
                missing_ok=True
            )  # before the note: it must not vouch for the bytes of another file
        write_json(known, asdict(remote))
        _append(response, partial, start=start, size=remote.size, progress=progress)


def _is_same(a: Remote, b: Remote) -> bool:
    return (a.size, a.validator) == (b.size, b.validator)


def _read_known(known: Path, url: str) -> Remote | None:
    """What was noted of a partial file; None where there is no note, or one of another address."""
    try:
        remote = Remote(**json.loads(known.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return remote if remote.url == url else None


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
            raise _Changed("the file on the server is shorter than what came of it") from None
        if failure.code in RESUMABLE_STATUS:
            raise _Dropped(f"the server answers {failure.code} {failure.reason}") from None
        raise DataSetError(
            f"{url}: the server answers {failure.code} {failure.reason}: see that the address is right, or "
            "name a mirror with --url"
        ) from None
    except (OSError, http.client.HTTPException) as failure:
        raise _Dropped(f"no connection ({_reason(failure)})") from None


def _reason(failure: BaseException) -> str:
    reason = getattr(failure, "reason", None)
    return str(reason or failure) or type(failure).__name__


def _start(response: Any, have: int) -> int | None:
    """Where the response's bytes belong: 0 for a whole file, None for bytes that fit nowhere."""
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
        # read1, so that what came before a connection breaks is kept.
        chunk: bytes = response.read1(CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as failure:
        raise _Dropped(f"the connection broke ({_reason(failure)})") from None
    return chunk


def md5_of(path: Path, *, progress: Progress = lambda *_: None) -> str:
    """The md5 of a file, in hexadecimal, read in pieces."""
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
            f"{folder}: the disk is full: make room and run the same command again, it goes on where it stopped"
        ) from failure
