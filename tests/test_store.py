"""The store: what goes in comes out, damage is named, and a case is there whole or not at all."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from conftest import SMALL_SPEC, random_case, tree_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_cache import writer
from data_cache.errors import CacheError, SchemaError, SpecMismatchError
from data_cache.files import replacing, write_text
from data_cache.inspection import summarise_store
from data_cache.processes import own_name, process_name
from data_cache.reader import CacheStore, list_cases, read_meta
from data_cache.records import to_json
from data_cache.schema import CacheSchema, Case, DataSetInfo, PreprocessSpec, View
from data_cache.writer import open_or_create, remove_leftovers, write_case

ARRAYS = ("scan/image", "scan/fractions", "liver/image", "liver/fractions")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "cache.zarr"
    open_or_create(path, SMALL_SPEC)
    return path


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of one case that no test changes for longer than it runs."""
    path = tmp_path_factory.mktemp("filled") / "cache.zarr"
    open_or_create(path, SMALL_SPEC)
    write_case(path, random_case(), SMALL_SPEC)
    remove_leftovers(path)
    return path


def assert_equal_views(a: View, b: View) -> None:
    assert a.image_zyx.dtype == b.image_zyx.dtype == np.int16
    np.testing.assert_array_equal(a.image_zyx, b.image_zyx)
    assert a.grid == b.grid
    assert (a.fractions_czyx is None) == (b.fractions_czyx is None)
    if a.fractions_czyx is not None and b.fractions_czyx is not None:
        assert a.fractions_czyx.dtype == b.fractions_czyx.dtype == np.uint8
        np.testing.assert_array_equal(a.fractions_czyx, b.fractions_czyx)


def assert_holds(store: Path, case: Case) -> None:
    opened = CacheStore.open(store)
    assert opened.meta(case.meta.case_id) == case.meta
    for name, view in case.views.items():
        assert_equal_views(opened.read(case.meta.case_id, name), view)


def assert_nothing_left(store: Path) -> None:
    assert [path.name for path in store.glob(".*/*")] == []


# --- round trip and format


@pytest.mark.parametrize("labelled", [True, False])
def test_what_is_written_is_read(store: Path, labelled: bool) -> None:
    case = random_case(labelled=labelled)
    write_case(store, case, SMALL_SPEC)
    assert_holds(store, case)
    assert_nothing_left(store)


def test_reading_twice_uses_one_handle_and_gives_fresh_voxels(filled: Path) -> None:
    opened = CacheStore.open(filled)
    first = opened.read("liver_0", "scan")
    first.image_zyx[...] = 0
    assert opened.read("liver_0", "scan").image_zyx.any()


def test_a_case_written_again_is_replaced(store: Path) -> None:
    write_case(store, random_case(seed=1), SMALL_SPEC)
    newer = random_case(seed=2, labelled=False)
    write_case(store, newer, SMALL_SPEC)
    assert_holds(store, newer)
    assert list_cases(store) == ("liver_0",)
    assert not (store / "liver_0" / "liver").exists()  # of the older one, which had a label
    assert_nothing_left(store)


@pytest.mark.parametrize("name", ["notes.txt", "other/liver.nii"])
@pytest.mark.parametrize("has_case", [True, False])
def test_a_case_never_replaces_what_is_not_part_of_one(store: Path, name: str, has_case: bool) -> None:
    if has_case:
        write_case(store, random_case(seed=1), SMALL_SPEC)
    mine = store / "liver_0" / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine")
    before = tree_bytes(store)
    with pytest.raises(
        CacheError, match=r"liver_0/(notes.txt|other): was not written by liverseg preprocess"
    ):
        write_case(store, random_case(seed=2), SMALL_SPEC)
    assert tree_bytes(store) == before


def test_equal_cases_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        open_or_create(tmp_path / name, SMALL_SPEC)
        write_case(tmp_path / name, random_case(), SMALL_SPEC)
    assert tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "b")


def test_cases_come_in_natural_order(store: Path) -> None:
    for name in ("liver_10", "liver_2", "b", "liver_2b"):
        write_case(store, random_case(name), SMALL_SPEC)
    (store / "empty").mkdir()
    assert CacheStore.open(store).case_ids == ("b", "liver_2", "liver_2b", "liver_10")


def test_the_format_is_the_one_that_was_designed(filled: Path) -> None:
    root = json.loads((filled / "zarr.json").read_text())
    assert (root["zarr_format"], root["node_type"]) == (3, "group")
    assert root.get("consolidated_metadata") is None
    for name in ARRAYS:
        node = json.loads((filled / "liver_0" / name / "zarr.json").read_text())
        is_image = name.endswith("image")
        assert node["data_type"] == ("int16" if is_image else "uint8")
        assert node["fill_value"] == (-32768 if is_image else 0)
        assert node["chunk_grid"]["configuration"]["chunk_shape"] == node["shape"]  # one chunk an array
        assert node["dimension_names"] == (["z", "y", "x"] if is_image else ["c", "z", "y", "x"])
        _, blosc, crc = node["codecs"]
        assert crc["name"] == "crc32c"
        assert blosc["name"] == "blosc"
        settings = blosc["configuration"]
        assert (settings["cname"], settings["clevel"], settings["shuffle"]) == ("zstd", 2, "bitshuffle")


def test_zarr_alone_opens_the_store(filled: Path) -> None:
    group = zarr.open_group(filled, mode="r")
    assert sorted(name for name, _ in group.groups()) == ["liver_0"]
    np.testing.assert_array_equal(group["liver_0/scan/image"][...], random_case().views["scan"].image_zyx)  # type: ignore[index]
    ome: Any = group["liver_0"].attrs["ome"]
    assert ome["version"] == "0.5"
    scan = next(m for m in ome["multiscales"] if m["name"] == "scan/fractions")
    scale, translation = scan["datasets"][0]["coordinateTransformations"]
    # 12 × 20 × 16 voxels of 2.5 × 0.9 × 0.8 mm on 6 × 5 × 4: twice, four times and four times as large; the first
    # centre is half a target less half a source voxel from the origin: 410 + 1.25, 33.25 + 1.35, -120.5 + 1.2 mm.
    np.testing.assert_allclose(scale["scale"], [1, 5, 3.6, 3.2])
    np.testing.assert_allclose(translation["translation"], [0, 411.25, 34.6, -119.3])


def test_an_array_of_zeros_still_has_its_chunk(store: Path) -> None:
    case = random_case()
    views = {
        name: replace(view, fractions_czyx=np.zeros_like(view.fractions_czyx))
        for name, view in case.views.items()
    }
    write_case(store, replace(case, views=views), SMALL_SPEC)
    assert (store / "liver_0/scan/fractions/c/0/0/0/0").is_file()
    fractions = CacheStore.open(store).read("liver_0", "scan").fractions_czyx
    assert fractions is not None
    assert not fractions.any()


# --- damage


def read_all(store: Path) -> dict[str, bytes]:
    opened = CacheStore.open(store)
    views = {name: opened.read("liver_0", name) for name in opened.meta("liver_0").boxes}
    images = {f"{name}/image": view.image_zyx.tobytes() for name, view in views.items()}
    fractions = {
        f"{name}/fractions": view.fractions_czyx.tobytes()
        for name, view in views.items()
        if view.fractions_czyx is not None
    }
    return images | fractions


class damaged:
    """A file with other bytes, or none, for as long as the block lasts."""

    def __init__(self, path: Path, content: bytes | None) -> None:
        self.path, self.before, self.content = path, path.read_bytes(), content

    def __enter__(self) -> None:
        self.path.unlink()
        if self.content is not None:
            self.path.write_bytes(self.content)

    def __exit__(self, *_: object) -> None:
        self.path.write_bytes(self.before)


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def chunk_of(store: Path, array: str) -> Path:
    return next(path for path in (store / "liver_0" / array / "c").rglob("*") if path.is_file())


@pytest.mark.parametrize("array", ARRAYS)
def test_a_missing_chunk_is_named(filled: Path, array: str) -> None:
    with (
        damaged(chunk_of(filled, array), None),
        pytest.raises(CacheError, match=f"liver_0/{array}: a chunk is missing"),
    ):
        read_all(filled)


@given(array=st.sampled_from(ARRAYS), where=st.floats(0, 1, exclude_max=True))
@settings(max_examples=80, deadline=None)
def test_every_flipped_bit_of_a_chunk_is_noticed(filled: Path, array: str, where: float) -> None:
    chunk = chunk_of(filled, array)
    content = chunk.read_bytes()
    bit = int(where * 8 * len(content))
    with damaged(chunk, flipped(content, bit)), pytest.raises(CacheError, match=f"liver_0/{array}: damaged"):
        read_all(filled)


@given(array=st.sampled_from(ARRAYS), keep=st.floats(0, 1, exclude_max=True))
@settings(max_examples=20, deadline=None)
def test_a_truncated_chunk_is_noticed(filled: Path, array: str, keep: float) -> None:
    chunk = chunk_of(filled, array)
    content = chunk.read_bytes()
    with (
        damaged(chunk, content[: int(keep * len(content))]),
        pytest.raises(CacheError, match=f"liver_0/{array}"),
    ):
        read_all(filled)


@given(array=st.sampled_from(ARRAYS), where=st.floats(0, 1, exclude_max=True))
@settings(max_examples=150, deadline=None)
def test_a_flipped_bit_in_an_arrays_metadata_never_changes_voxels(
    filled: Path, array: str, where: float
) -> None:
    path = filled / "liver_0" / array / "zarr.json"
    before = read_all(filled)
    content = path.read_bytes()
    with damaged(path, flipped(content, int(where * 8 * len(content)))):
        try:
            after = read_all(filled)
        except CacheError as failure:
            assert "liver_0" in str(failure)  # noqa: PT017 (either outcome is right)
        else:
            assert after == before


def test_a_chunk_that_zarr_would_look_for_elsewhere_is_missing(filled: Path) -> None:
    # One flipped bit makes "/" a ".", which is valid: the chunk's key is then c.0.0.0, and zarr reads fill values.
    path = filled / "liver_0/scan/image/zarr.json"
    content = path.read_bytes()
    changed = content.replace(b'"separator": "/"', b'"separator": "."')
    assert changed != content
    opened = CacheStore.open(filled)  # before the damage, which opening would notice
    with damaged(path, changed), pytest.raises(CacheError, match="a chunk is missing"):
        opened.read("liver_0", "scan")


@given(where=st.floats(0, 1, exclude_max=True), name=st.sampled_from(["zarr.json", "liver_0/zarr.json"]))
@settings(max_examples=60, deadline=None)
def test_a_flipped_bit_in_attributes_is_an_error_that_names_the_store_or_another_value(
    filled: Path, where: float, name: str
) -> None:
    # A digit may become another digit, which no reader can know; what may not happen is anything but CacheError.
    path = filled / name
    content = path.read_bytes()
    with damaged(path, flipped(content, int(where * 8 * len(content)))):
        try:
            CacheStore.open(filled)
        except CacheError as failure:
            assert str(filled) in str(failure)  # noqa: PT017


def test_arrays_of_another_shape_or_type_are_refused(store: Path) -> None:
    case = random_case()
    wrong: list[View] = [
        replace(case.views["scan"], image_zyx=case.views["scan"].image_zyx[:-1]),
        replace(case.views["scan"], image_zyx=case.views["scan"].image_zyx.astype(np.int32)),
        replace(case.views["scan"], image_zyx=case.views["scan"].image_zyx[None]),
        replace(case.views["scan"], fractions_czyx=np.zeros((3, *SMALL_SPEC.shape_zyx), np.uint8)),
        replace(case.views["scan"], fractions_czyx=np.zeros(SMALL_SPEC.shape_zyx, np.uint8)),
    ]
    for view in wrong:
        write_case(store, replace(case, views={**case.views, "scan": view}), SMALL_SPEC)
        with pytest.raises(CacheError, match=r"liver_0/scan/.*: expected .*, found "):
            CacheStore.open(store).read("liver_0", "scan")


def test_unknown_cases_and_views_are_named(filled: Path) -> None:
    opened = CacheStore.open(filled)
    with pytest.raises(CacheError, match="no case 'liver_7'; it has liver_0"):
        opened.read("liver_7", "scan")
    with pytest.raises(CacheError, match="no 'lung' view; it has scan, liver"):
        opened.read("liver_0", "lung")
    with pytest.raises(CacheError, match="no case 'liver_7'"):
        read_meta(filled, "liver_7")


def test_a_renamed_case_is_refused(store: Path) -> None:
    write_case(store, random_case(), SMALL_SPEC)
    (store / "liver_0").rename(store / "liver_1")
    with pytest.raises(SchemaError, match="contains case 'liver_0': rename the folder to match"):
        CacheStore.open(store)


# --- what is no store


def foreign_zarr(path: Path) -> None:
    zarr.create_group(path)


def text_file(path: Path) -> None:
    path.write_text("hello")


def folder_of_files(path: Path) -> None:
    path.mkdir()
    (path / "thesis.doc").write_text("important")


def broken_json(path: Path) -> None:
    path.mkdir()
    (path / "zarr.json").write_bytes(b'{"attributes": \xff')


@pytest.mark.parametrize("make", [foreign_zarr, text_file, folder_of_files, broken_json])
def test_another_folder_is_refused_and_left_alone(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "other"
    make(path)
    before = tree_bytes(tmp_path)
    for use in (lambda: open_or_create(path, SMALL_SPEC), lambda: CacheStore.open(path)):
        with pytest.raises(CacheError, match=str(path)):
            use()
    assert tree_bytes(tmp_path) == before


def test_a_store_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no such folder: build the cache with"):
        CacheStore.open(tmp_path / "nowhere")


def test_an_empty_folder_becomes_a_store(tmp_path: Path) -> None:
    schema = open_or_create(tmp_path, SMALL_SPEC)
    assert schema.spec == SMALL_SPEC
    assert open_or_create(tmp_path, SMALL_SPEC) == schema
    assert CacheStore.open(tmp_path).case_ids == ()


def test_a_store_says_what_it_was_built_from_and_takes_nothing_else(tmp_path: Path) -> None:
    info = DataSetInfo(name="LIVER", licence="CC0", description=None, phantom=True)
    assert open_or_create(tmp_path, SMALL_SPEC, info).data_set == info
    assert CacheStore.open(tmp_path).schema.data_set == info
    assert open_or_create(tmp_path, SMALL_SPEC, info) == open_or_create(tmp_path, SMALL_SPEC)
    with pytest.raises(CacheError, match="licence: the store has 'CC0', dataset.json has 'CC-BY'"):
        open_or_create(tmp_path, SMALL_SPEC, replace(info, licence="CC-BY"))
    # What the message says to do does it.
    write_case(tmp_path, random_case(), SMALL_SPEC)
    (tmp_path / "zarr.json").unlink()
    assert open_or_create(tmp_path, SMALL_SPEC, replace(info, licence="CC-BY")).data_set != info
    assert_holds(tmp_path, random_case())


def test_a_store_that_says_nothing_of_its_data_set_is_read(tmp_path: Path) -> None:
    schema = open_or_create(tmp_path, SMALL_SPEC)
    written = to_json(schema)
    del written["data_set"]
    assert CacheSchema.from_json(written, source="test") == schema
    assert open_or_create(
        tmp_path, SMALL_SPEC, DataSetInfo(name="x", licence=None, description=None, phantom=False)
    )


def test_a_store_that_another_process_creates_at_the_same_time_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Between this one's look for zarr.json and its look for other people's files, the other wrote its root.
    create_root = writer._create_root

    def late(store: Path, schema: CacheSchema) -> None:
        create_root(store, schema)
        write_case(store, random_case(), SMALL_SPEC)
        create_root(store, schema)

    monkeypatch.setattr(writer, "_create_root", late)
    open_or_create(tmp_path, SMALL_SPEC)
    assert_holds(tmp_path, random_case())


def test_another_spec_is_refused_with_both_values(store: Path) -> None:
    other = PreprocessSpec(shape_zyx=(6, 5, 8), air_hu=-1000)
    with pytest.raises(SpecMismatchError) as caught:
        open_or_create(store, other)
    message = str(caught.value)
    assert "shape_zyx: the store has [6, 5, 4], this command has [6, 5, 8]" in message
    assert "air_hu: the store has -1024, this command has -1000" in message
    assert "margin_fraction" not in message


# --- interruptions


@pytest.mark.parametrize("step", ["_write_arrays", "_write_attributes", "_sync_tree", "_swap_in"])
@pytest.mark.parametrize("replacing_older", [False, True])
def test_an_interrupted_write_leaves_the_store_as_it_was(
    store: Path, monkeypatch: pytest.MonkeyPatch, step: str, replacing_older: bool
) -> None:
    if replacing_older:
        write_case(store, random_case(seed=1), SMALL_SPEC)
    before = tree_bytes(store)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_case(store, random_case(seed=2), SMALL_SPEC)
    assert tree_bytes(store) == before


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "target", ["os.fsync", "os.rename", "zarr.storage._local._put", "pathlib.Path.mkdir"], ids=str
)
def test_a_full_disk_is_one_clear_error_and_the_store_stays_valid(
    store: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    older = random_case(seed=1)
    write_case(store, older, SMALL_SPEC)
    with monkeypatch.context() as patch:
        patch.setattr(target, full_disk)
        with pytest.raises(CacheError, match=r"cannot write case liver_0: .*No space left"):
            write_case(store, random_case(seed=2), SMALL_SPEC)
    assert_holds(store, older)
    remove_leftovers(store)
    assert_nothing_left(store)


def test_a_full_disk_while_a_store_is_created_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache.zarr"
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full_disk)
        with pytest.raises(CacheError, match="cannot be created: .*No space left"):
            open_or_create(path, SMALL_SPEC)
    open_or_create(path, SMALL_SPEC)  # there is room again
    assert CacheStore.open(path).case_ids == ()
    assert_nothing_left(path)


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from conftest import SMALL_SPEC, random_case
from data_cache import writer

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

setattr(writer, sys.argv[2], die)
writer.write_case(Path(sys.argv[1]), random_case(seed=2), SMALL_SPEC)
"""


def test_a_killed_writer_leaves_nothing_that_a_reader_sees(store: Path) -> None:
    older = random_case(seed=1)
    write_case(store, older, SMALL_SPEC)
    before = tree_bytes(store)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WRITER, str(store), "_swap_in"], cwd=Path(__file__).parent, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(list((store / writer.PARTIAL).iterdir())) == 1  # it was killed while it wrote
    assert_holds(store, older)
    assert list_cases(store) == ("liver_0",)
    remove_leftovers(store)
    assert tree_bytes(store) == before
    assert_nothing_left(store)


# --- two at once


def write_often(store: Path, seed: int) -> None:
    for _ in range(15):
        write_case(store, random_case(seed=seed), SMALL_SPEC)
        remove_leftovers(store)


def test_two_processes_may_write_one_case_at_once(store: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_often, args=(store, seed)) for seed in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    remove_leftovers(store)
    assert_nothing_left(store)
    found = read_all(store)["scan/image"]
    assert found in {random_case(seed=s).views["scan"].image_zyx.tobytes() for s in (1, 2)}


def test_a_target_that_others_keep_filling_is_replaced_in_the_end(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another writer of the case comes first twice: each time its case has to be moved out of the way.
    write_case(store, random_case(seed=1), SMALL_SPEC)
    renamed, others = writer._renamed, [random_case(seed=3), random_case(seed=4)]

    def late(partial: Path, target: Path) -> bool:
        if others:
            shutil.rmtree(target, ignore_errors=True)
            other = others.pop()
            with monkeypatch.context() as patch:
                patch.setattr(writer, "_renamed", renamed)
                write_case(store, other, SMALL_SPEC)
        return renamed(partial, target)

    monkeypatch.setattr(writer, "_renamed", late)
    last = random_case(seed=2)
    write_case(store, last, SMALL_SPEC)
    assert_holds(store, last)
    assert_nothing_left(store)


def test_the_folder_of_partial_cases_may_vanish_while_it_is_used(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # remove_leftovers of another process deletes the folder while it is still empty.
    mkdir = os.mkdir
    races: list[Any] = []

    def raced(path: Any, *args: Any, **kwargs: Any) -> None:
        mkdir(path, *args, **kwargs)
        if Path(path).name == writer.PARTIAL and len(races) < 3:
            races.append(path)
            Path(path).rmdir()

    remove_leftovers(store)
    monkeypatch.setattr("os.mkdir", raced)
    case = random_case()
    write_case(store, case, SMALL_SPEC)
    assert len(races) == 3
    assert_holds(store, case)


# --- leftovers


def leftover(store: Path, process: str) -> Path:
    folder = store / writer.PARTIAL / writer.partial_name("liver_0", process=process)
    folder.mkdir(parents=True)
    (folder / "zarr.json").write_text("{}")
    return folder


def test_leftovers_of_ended_processes_go_and_of_running_and_foreign_ones_stay(store: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        ended = process_name(process.pid)
        process.communicate(b"\n")
    dead = leftover(store, ended)
    kept = [leftover(store, own_name()), leftover(store, f"elsewhere-{ended}")]
    remove_leftovers(store)
    assert not dead.exists()
    assert all(folder.exists() for folder in kept)


def test_what_someone_else_put_among_partial_cases_stays(store: Path) -> None:
    (store / writer.PARTIAL / "notes").mkdir(parents=True)
    remove_leftovers(store)
    assert (store / writer.PARTIAL / "notes").exists()


def test_no_leftovers_is_nothing_to_do(store: Path) -> None:
    before = tree_bytes(store)
    remove_leftovers(store)
    assert tree_bytes(store) == before


# --- files whole or not at all


def test_a_file_appears_whole_and_an_older_one_stays_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "första")
    assert path.read_text(encoding="utf-8") == "första"

    def fail() -> None:
        with replacing(path) as file:
            file.write(b"half of the sec")
            assert path.read_text(encoding="utf-8") == "första"
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        fail()
    assert tree_bytes(tmp_path) == {"a.txt": "första".encode()}


# --- inspection


def test_a_summary_of_each_case_by_hand(store: Path) -> None:
    write_case(store, random_case("liver_1"), SMALL_SPEC)
    write_case(store, random_case("liver_0", labelled=False), SMALL_SPEC)
    unlabelled, labelled = summarise_store(CacheStore.open(store))
    # 700 + 140 voxels of 1.8 mm³ are 1.512 mL of liver with its tumour.
    assert labelled.liver_ml == pytest.approx(1.512)
    assert labelled.tumour_ml == pytest.approx(0.252)
    assert (unlabelled.liver_ml, unlabelled.tumour_ml) == (None, None)
    assert labelled.size_bytes == sum(len(content) for content in tree_bytes(store / "liver_1").values())


def test_opening_decodes_nothing(store: Path) -> None:
    for number in range(20):
        write_case(store, random_case(f"liver_{number}"), SMALL_SPEC)
    shutil.rmtree(store / "liver_3/scan/image/c")  # voxels that are never read are not missed yet
    assert len(CacheStore.open(store).case_ids) == 20
    with pytest.raises(CacheError, match="liver_3/scan/image"):
        CacheStore.open(store).read("liver_3", "scan")


# --- seals on opening


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_flipped_bit_of_any_file_goes_unnoticed(filled: Path, data: st.DataObject) -> None:
    """Opening and reading either fails with a CacheError or gives what was written."""
    path = data.draw(st.sampled_from(sorted(p for p in filled.rglob("*") if p.is_file())))
    content = path.read_bytes()
    expected = everything(filled)
    with damaged(path, flipped(content, data.draw(st.integers(0, 8 * len(content) - 1)))):
        try:
            assert everything(filled) == expected
        except CacheError:
            return


def everything(store: Path) -> dict[str, Any]:
    opened = CacheStore.open(store)
    found: dict[str, Any] = {"schema": opened.schema}
    for case_id in opened.case_ids:
        found[case_id] = opened.meta(case_id)
        for name in opened.meta(case_id).boxes:
            view = opened.read(case_id, name)
            fractions = b"" if view.fractions_czyx is None else view.fractions_czyx.tobytes()
            found[f"{case_id}/{name}"] = (view.image_zyx.tobytes(), fractions)
    return found


def test_metadata_that_still_parses_is_refused_on_opening(filled: Path) -> None:
    path = filled / "liver_0/zarr.json"
    content = path.read_bytes()
    with (
        damaged(path, content.replace(b"a note", b"b note")),
        pytest.raises(CacheError, match=r"metadata has changed since it was written \(liver_0\)"),
    ):
        CacheStore.open(filled)
