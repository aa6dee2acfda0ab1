"""``liverseg download`` against a local server: dropped, resumed, changed, damaged, unsafe; whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import re
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from click.testing import CliRunner

from data_cache.errors import DataSetError
from liverseg.cli import main
from pipeline import download as dl
from pipeline.decathlon import RawDataSet

LISTING = (
    b'{"name": "LIVER", "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],'
    b' "test": ["./imagesTs/b.nii.gz"]}'
)
NOISE = np.random.default_rng(0).bytes(300_000)
FILES = {
    "Task03_Liver/dataset.json": LISTING,
    "Task03_Liver/imagesTr/a.nii.gz": NOISE,
    "Task03_Liver/labelsTr/a.nii.gz": b"label",
    "Task03_Liver/imagesTs/b.nii.gz": b"test",
}


def tar_of(files: dict[str, bytes], *extra: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in extra:
            tar.addfile(info)
    return buffer.getvalue()


TAR = tar_of(FILES)


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


# --- A server with faults


class Handler(BaseHTTPRequestHandler):
    """Serves ``server.content``, as the server's switches say."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        server = self.server
        server.requests.append(self.headers.get("Range"))
        if server.statuses:
            self.send_error(server.statuses.pop(0))
            return
        start = self._start()
        if start > len(server.content):
            self.send_error(416)
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            total = len(server.content)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if server.etag:
            self.send_header("ETag", server.etag)
        if server.tells_length:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body[: server.drops.pop(0)] if server.drops else body)
        self.close_connection = True

    def _start(self) -> int:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        condition = self.headers.get("If-Range")
        if match is None or not self.server.ranges:
            return 0
        if self.server.honours_if_range and condition is not None and condition != self.server.etag:
            return 0
        return int(match[1])

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    """What is served and what goes wrong.

    Attributes:
        drops: Bytes after which the next responses break off.
        statuses: What the next requests are answered with.
        requests: The ranges asked for.
    """

    content: bytes = TAR
    etag = '"one"'
    ranges = True
    honours_if_range = True
    tells_length = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.drops: list[int] = []
        self.statuses: list[int] = []
        self.requests: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/data/Task03_Liver.tar?version=1"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return tmp_path / "data" / "liver"


def fetch(server: Server, raw: Path, **options: Any) -> RawDataSet:
    settings: dict[str, Any] = {"url": server.url, "md5": md5(TAR), "pause": lambda _: None, **options}
    return dl.download(raw, **settings)


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


EXPECTED = {name.removeprefix("Task03_Liver/"): text for name, text in FILES.items()}


# --- All well


def test_a_data_set_comes_whole_and_nothing_else_stays(server: Server, raw: Path) -> None:
    data_set = fetch(server, raw)
    assert content(raw) == EXPECTED
    assert [case.case_id for case in data_set.cases] == ["a"]
    assert [path.name for path in raw.parent.iterdir()] == ["liver"]


def test_the_archive_stays_if_wanted_and_is_used_without_a_request(server: Server, raw: Path) -> None:
    fetch(server, raw, keep_archive=True)
    archive = raw.parent / "Task03_Liver.tar"
    assert archive.read_bytes() == TAR
    shutil.rmtree(raw)
    fetch(server, raw, keep_archive=True)
    assert content(raw) == EXPECTED
    assert server.requests == [None]
    assert sorted(path.name for path in raw.parent.iterdir()) == ["Task03_Liver.tar", "liver"]


# --- Files that it did not write


def test_an_archive_of_the_user_is_used_and_stays(server: Server, raw: Path) -> None:
    raw.parent.mkdir(parents=True)
    (raw.parent / "Task03_Liver.tar").write_bytes(TAR)
    fetch(server, raw, keep_archive=False)
    assert content(raw) == EXPECTED
    assert (raw.parent / "Task03_Liver.tar").read_bytes() == TAR
    assert server.requests == []


@pytest.mark.parametrize("name", ["Task03_Liver.tar.partial", "Task03_Liver.tar.partial.json"])
def test_a_partial_file_of_something_else_is_left_alone(server: Server, raw: Path, name: str) -> None:
    raw.parent.mkdir(parents=True)
    (raw.parent / name).write_bytes(b'{"mine": 1}')
    with pytest.raises(DataSetError, match=f"{name}: exists and was not written by liverseg download: move"):
        fetch(server, raw)
    assert content(raw.parent) == {name: b'{"mine": 1}'}
    assert server.requests == []


def test_a_folder_beside_the_data_set_is_left_alone(server: Server, raw: Path) -> None:
    mine = raw.parent / ".liver.unpacking/mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("note")
    fetch(server, raw)
    assert mine.read_text() == "note"


def test_a_complete_data_set_is_left_alone(server: Server, raw: Path) -> None:
    fetch(server, raw)
    (raw / "mine.txt").write_text("note")
    fetch(server, raw)
    assert (raw / "mine.txt").exists()
    assert len(server.requests) == 1


def test_progress_reaches_the_end_of_each_stage(server: Server, raw: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    fetch(server, raw, progress=lambda *step: told.append(step))
    stages = dict.fromkeys(stage for stage, _, _ in told)
    assert list(stages) == ["download", "check", "unpack"]
    for stage in ("download", "check"):
        assert [step for step in told if step[0] == stage][-1] == (stage, len(TAR), len(TAR))
    assert all(a[1] <= b[1] for a, b in itertools.pairwise(told) if a[0] == b[0])


def test_a_server_that_tells_no_length(server: Server, raw: Path) -> None:
    server.tells_length = False
    fetch(server, raw)
    assert content(raw) == EXPECTED


# --- Dropped connections


def test_a_dropped_connection_goes_on_where_it_stopped(server: Server, raw: Path) -> None:
    server.drops = [100_000, 50_000]
    pauses: list[float] = []
    notes: list[str] = []
    fetch(server, raw, pause=pauses.append, notify=notes.append)
    assert content(raw) == EXPECTED
    assert server.requests == [None, "bytes=100000-", "bytes=150000-"]
    assert pauses == [1.0, 1.0]
    assert notes[0] == f"the connection ended after 100000 of {len(TAR)} bytes: trying again in 1 s"


def test_a_later_call_goes_on_where_an_earlier_one_was_killed(server: Server, raw: Path) -> None:
    def killed(_: float) -> None:
        raise KeyboardInterrupt

    server.drops = [120_000]
    with pytest.raises(KeyboardInterrupt):
        fetch(server, raw, pause=killed)
    assert not raw.exists()
    fetch(server, raw)
    assert content(raw) == EXPECTED
    assert server.requests == [None, "bytes=120000-"]


def test_without_ranges_it_starts_again(server: Server, raw: Path) -> None:
    server.ranges = False
    server.drops = [100_000]
    fetch(server, raw)
    assert content(raw) == EXPECTED


@pytest.mark.parametrize("honours_if_range", [True, False])
@pytest.mark.parametrize("same_size", [True, False])
def test_a_changed_file_is_not_spliced(
    server: Server, raw: Path, honours_if_range: bool, same_size: bool
) -> None:
    server.honours_if_range = honours_if_range
    server.content = bytes(len(TAR) if same_size else 2 * len(TAR))
    server.drops = [100_000]

    def changed(_: float) -> None:
        server.content, server.etag = TAR, '"two"'

    fetch(server, raw, pause=changed)  # the md5 is that of the new file
    assert content(raw) == EXPECTED


def test_a_file_that_became_shorter_than_its_part(server: Server, raw: Path) -> None:
    server.content, server.drops, server.honours_if_range = bytes(2 * len(TAR)), [len(TAR) + 10], False

    def changed(_: float) -> None:
        server.content, server.etag = TAR, '"two"'

    fetch(server, raw, pause=changed)
    assert content(raw) == EXPECTED


def test_bytes_of_another_address_are_not_built_upon(server: Server, raw: Path) -> None:
    def killed(_: float) -> None:
        raise KeyboardInterrupt

    server.drops = [120_000]
    with pytest.raises(KeyboardInterrupt):
        fetch(server, raw, url=server.url + "&mirror=2", pause=killed)
    assert (raw.parent / "Task03_Liver.tar.partial").stat().st_size == 120_000
    fetch(server, raw)
    assert content(raw) == EXPECTED
    assert server.requests == [None, None]


def test_a_busy_server_is_asked_again_and_pauses_grow(server: Server, raw: Path) -> None:
    server.statuses = [503, 429, 500]
    pauses: list[float] = []
    fetch(server, raw, pause=pauses.append)
    assert content(raw) == EXPECTED
    assert pauses == [1.0, 2.0, 4.0]


def test_it_gives_up_after_so_many_fruitless_attempts(server: Server, raw: Path) -> None:
    server.drops = [70_000]
    server.statuses = []
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        server.statuses = [503]

    with pytest.raises(DataSetError, match="the 70000 bytes received so far are kept"):
        fetch(server, raw, pause=pause)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0]
    assert (raw.parent / "Task03_Liver.tar.partial").stat().st_size == 70_000


def test_no_server(raw: Path) -> None:
    with pytest.raises(DataSetError, match="no connection"):
        dl.download(raw, url="http://127.0.0.1:1/x.tar", md5="0", pause=lambda _: None)


# --- What no other attempt helps


@pytest.mark.parametrize("status", [403, 404])
def test_a_wrong_address_fails_at_once(server: Server, raw: Path, status: int) -> None:
    server.statuses = [status]
    with pytest.raises(DataSetError, match=f"answered {status}.*--url"):
        fetch(server, raw)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://x/y.tar", "http://x", "http://x/a/%2E%2E", "x.tar"]
)
def test_only_addresses_of_files(raw: Path, url: str) -> None:
    with pytest.raises(DataSetError, match="expected the address of a file"):
        dl.download(raw, url=url)


def test_an_address_cannot_name_another_folder(server: Server, raw: Path) -> None:
    fetch(server, raw, url=server.url.replace("data/", "..%2F..%2F"), keep_archive=True)
    assert [path.name for path in sorted(raw.parent.iterdir())] == ["Task03_Liver.tar", "liver"]


def test_a_wrong_checksum_leaves_nothing(server: Server, raw: Path) -> None:
    with pytest.raises(DataSetError, match=md5(TAR)):
        fetch(server, raw, md5="0" * 32)
    assert list(raw.parent.iterdir()) == []


def test_an_archive_that_was_there_is_not_deleted_for_its_checksum(server: Server, raw: Path) -> None:
    raw.parent.mkdir(parents=True)
    (raw.parent / "Task03_Liver.tar").write_bytes(b"mine")
    with pytest.raises(DataSetError, match="delete it"):
        fetch(server, raw)
    assert (raw.parent / "Task03_Liver.tar").read_bytes() == b"mine"


@pytest.mark.parametrize("file", ["notes.txt", "dataset.json"])
def test_a_folder_of_something_else_is_left_alone(server: Server, raw: Path, file: str) -> None:
    raw.mkdir(parents=True)
    (raw / file).write_bytes(LISTING)  # a data set without its files
    with pytest.raises(DataSetError, match="move it away"):
        fetch(server, raw)
    assert content(raw) == {file: LISTING}
    assert server.requests == []


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.mark.parametrize(("spare", "enough"), [(0, True), (-1, False)])
def test_room_for_the_archive_and_as_much_again(
    server: Server, raw: Path, monkeypatch: pytest.MonkeyPatch, spare: int, enough: bool
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 2 * len(TAR) + spare))
    if enough:
        fetch(server, raw)
        return
    with pytest.raises(DataSetError, match="make room"):
        fetch(server, raw)
    assert content(raw.parent) == {}


@pytest.mark.parametrize("tells_length", [True, False])
def test_a_disk_that_fills_up_meanwhile_keeps_what_came(
    server: Server, raw: Path, monkeypatch: pytest.MonkeyPatch, tells_length: bool
) -> None:
    server.tells_length = tells_length

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(dl, "unpack", full)
        with pytest.raises(
            DataSetError, match="the disk is full: free some space and run the same command again"
        ):
            fetch(server, raw)
    fetch(server, raw)
    assert content(raw) == EXPECTED
    assert [path.name for path in raw.parent.iterdir()] == ["liver"]
    assert len(server.requests) == 1


# --- Archives that lie


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


UNSAFE: dict[str, Callable[[], bytes]] = {
    "parent": lambda: tar_of({**FILES, "../evil": b"!"}),
    "deep parent": lambda: tar_of({**FILES, "Task03_Liver/imagesTr/../../../evil": b"!"}),
    "absolute": lambda: tar_of({**FILES, "/liverseg_evil": b"!"}),
    "symlink out": lambda: tar_of(FILES, link("Task03_Liver/evil", "/etc/passwd")),
    "symlink in": lambda: tar_of(FILES, link("Task03_Liver/evil", "dataset.json")),
    "hard link": lambda: tar_of(FILES, link("Task03_Liver/evil", "../../evil", tarfile.LNKTYPE)),
    "device": lambda: tar_of(FILES, link("Task03_Liver/evil", "", tarfile.CHRTYPE)),
}


@pytest.mark.parametrize("kind", UNSAFE)
def test_nothing_of_an_unsafe_archive_is_kept(server: Server, raw: Path, kind: str) -> None:
    server.content = UNSAFE[kind]()
    before = set(raw.parent.parent.rglob("*"))
    with pytest.raises(DataSetError, match="unsafe: holds"):
        fetch(server, raw, md5=md5(server.content))
    left = set(raw.parent.parent.rglob("*")) - before
    partial = raw.parent / "Task03_Liver.tar.partial"
    assert left == {raw.parent, partial, partial.with_name(f"{partial.name}.json")}
    assert not Path("/liverseg_evil").exists()


def test_litter_is_left_out_and_a_flat_archive_is_taken(server: Server, raw: Path) -> None:
    server.content = tar_of({**EXPECTED, "imagesTr/._a.nii.gz": b"litter", "._dataset.json": b"litter"})
    fetch(server, raw, md5=md5(server.content))
    assert content(raw) == EXPECTED


@pytest.mark.parametrize(
    ("archive", "text"),
    [
        (b"no tar at all" * 100, "damaged"),
        (TAR[:200_000], "damaged"),
        (tar_of({"Task03_Liver/imagesTr/a.nii.gz": b"x"}), "no dataset.json"),
    ],
)
def test_archives_that_are_no_data_set(server: Server, raw: Path, archive: bytes, text: str) -> None:
    server.content = archive
    with pytest.raises(DataSetError, match=text):
        fetch(server, raw, md5=md5(archive))
    assert not raw.exists()


# --- The command


def test_command(server: Server, raw: Path) -> None:
    def run(*options: str) -> Any:
        return CliRunner().invoke(main, ["download", str(raw), "--url", server.url, *options])

    assert run().exit_code == 1  # the md5 of the real archive
    assert not raw.exists()
    result = run("--md5", md5(TAR), "--keep-archive")
    assert (result.exit_code, "1 labelled case and 1 unlabelled case\n" in result.output) == (0, True)
    assert (raw.parent / "Task03_Liver.tar").exists()
    assert "already complete" in run().output
