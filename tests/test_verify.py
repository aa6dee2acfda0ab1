"""``liverseg verify``: no flipped bit and no missing byte passes, and preprocess then builds again what is bad only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import SMALL_SPEC, random_case, random_scan, tree_bytes, write_listing, write_pair
from hypothesis import given, settings
from hypothesis import strategies as st

from data_cache.errors import CacheError
from data_cache.inspection import cases_to_verify, verify_case, verify_root
from data_cache.metadata_checksum import has_valid_checksum
from data_cache.reader import REBUILD_MARK, CacheStore, is_marked, mark_for_rebuild, read_schema
from data_cache.schema import PreprocessSpec
from data_cache.writer import open_or_create, write_case
from liverseg.cli import main
from pipeline.build import build, is_current
from pipeline.decathlon import read_data_set

CASES = ("liver_0", "liver_1", "liver_2")


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three cases, the last without a label; every test leaves it as it was."""
    store = tmp_path_factory.mktemp("verify") / "cache.zarr"
    open_or_create(store, SMALL_SPEC)
    for seed, case_id in enumerate(CASES):
        write_case(store, random_case(case_id, seed=seed, labelled=seed < 2), SMALL_SPEC)
    return store


def bad(store: Path, *, raw: Path | None = None) -> dict[str, tuple[str, ...]]:
    """What verify finds, by case; "" is the store itself."""
    root = verify_root(store)
    schema = read_schema(store)
    found = {c: verify_case(store, c, schema=schema, raw=raw) for c in cases_to_verify(store)}
    return {name: faults for name, faults in {"": root, **found}.items() if faults}


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def owner(store: Path, path: Path) -> str:
    return path.relative_to(store).parts[0]


# --- what is found


def test_a_whole_store_has_no_fault(filled: Path) -> None:
    assert cases_to_verify(filled) == list(CASES)
    assert bad(filled) == {}


def test_a_flipped_bit_in_any_chunk_is_found(filled: Path) -> None:
    rng = np.random.default_rng(0)
    chunks = [path for path in sorted(filled.rglob("c/**/*")) if path.is_file()]
    assert len(chunks) == 2 * 4 + 1
    for number in range(50):
        path = chunks[number % len(chunks)]
        bit = int(rng.integers(8 * path.stat().st_size))
        flip(path, bit)
        assert list(bad(filled)) == [owner(filled, path)], (path, bit)
        flip(path, bit)
    assert bad(filled) == {}


@given(where=st.floats(0, 1, exclude_max=True), which=st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_a_flipped_bit_in_any_metadata_of_a_case_is_found(filled: Path, where: float, which: int) -> None:
    paths = sorted(filled.rglob("*/zarr.json"))
    assert len(paths) == 2 * 7 + 3
    path = paths[which % len(paths)]
    bit = int(where * 8 * path.stat().st_size)
    flip(path, bit)
    try:
        assert list(bad(filled)) == [owner(filled, path)], (path, bit)
    finally:
        flip(path, bit)


def test_a_flipped_bit_in_the_root_is_found(filled: Path) -> None:
    path = filled / "zarr.json"
    for bit in range(0, 8 * path.stat().st_size, 37):
        flip(path, bit)
        try:
            assert verify_root(filled), bit
        finally:
            flip(path, bit)


def remove_chunk(case: Path) -> None:
    (case / "scan/image/c/0/0/0").unlink()


def remove_array(case: Path) -> None:
    shutil.rmtree(case / "liver/fractions")


def remove_view(case: Path) -> None:
    shutil.rmtree(case / "liver")


def remove_attributes(case: Path) -> None:
    (case / "zarr.json").unlink()


def empty_chunk(case: Path) -> None:
    (case / "liver/image/c/0/0/0").write_bytes(b"")


def swap_views(case: Path) -> None:
    # Both are whole by themselves, and the seal covers metadata only: the two arrays must be where they were made.
    (case / "liver/image").rename(case / "x")
    (case / "liver/fractions").rename(case / "liver/image")
    (case / "x").rename(case / "liver/fractions")


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (remove_chunk, "scan/image: a chunk is missing"),
        (remove_array, "liver/fractions"),
        (remove_view, "liver/image"),
        (remove_attributes, "liver_1"),
        (empty_chunk, "liver/image: damaged"),
        (swap_views, "liver/image: expected int16 (6, 5, 4), found uint8"),
    ],
)
def test_what_is_missing_is_found(
    filled: Path, tmp_path: Path, damage: Callable[[Path], None], what: str
) -> None:
    store = tmp_path / "copy.zarr"
    shutil.copytree(filled, store)
    damage(store / "liver_1")
    found = bad(store)
    assert list(found) == ["liver_1"]
    assert any(what in fault for fault in found["liver_1"])


def test_a_case_of_another_spec_or_under_another_name_is_found(filled: Path, tmp_path: Path) -> None:
    store = tmp_path / "copy.zarr"
    shutil.copytree(filled, store)
    other = PreprocessSpec(shape_zyx=SMALL_SPEC.shape_zyx, margin_fraction=0.1)
    write_case(store, random_case("liver_1", spec=other), other)
    (store / "liver_2").rename(store / "liver_7")
    found = bad(store)
    assert list(found) == ["liver_1", "liver_7"]
    assert "built with spec" in found["liver_1"][0]


def test_a_folder_that_is_no_cache_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_text("{}")
    result = CliRunner().invoke(main, ["verify", str(tmp_path)])
    assert result.exit_code == 1
    assert tree_bytes(tmp_path) == {"zarr.json": b"{}"}
    with pytest.raises(CacheError, match="no such folder"):
        verify_root(tmp_path / "none")


def test_metadata_without_a_seal_is_not_sealed(filled: Path, tmp_path: Path) -> None:
    shutil.copytree(filled / "liver_0", tmp_path / "liver_0")
    path = tmp_path / "liver_0/zarr.json"
    assert has_valid_checksum(tmp_path / "liver_0")
    path.write_text(path.read_text().replace("metadata_sha256", "another_key"))
    assert not has_valid_checksum(tmp_path / "liver_0")
    path.unlink()
    assert not has_valid_checksum(tmp_path / "liver_0")


# --- what preprocess does then


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    root = tmp_path / "raw"
    for seed, case_id in enumerate(CASES):
        write_pair(root, case_id, *random_scan(seed=seed))
    write_listing(root, CASES)
    return root


@pytest.fixture
def store(raw: Path, tmp_path: Path) -> Path:
    path = tmp_path / "cache.zarr"
    assert set(preprocess(raw, path).values()) == {"done"}
    return path


def preprocess(raw: Path, store: Path, *, verify_sources: bool = False) -> dict[str, str]:
    results = build(
        read_data_set(raw),
        store,
        PreprocessSpec(),
        jobs=1,
        report=lambda _: None,
        verify_sources=verify_sources,
    )
    return {result.case_id: result.outcome for result in results}


def verify(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(main, ["verify", *map(str, arguments)])
    assert "Traceback" not in result.output
    return result


def test_only_what_is_bad_is_built_again(raw: Path, store: Path) -> None:
    whole = tree_bytes(store)
    assert verify(store, "--raw", raw).exit_code == 0
    flip(store / "liver_1/scan/fractions/c/0/0/0/0", 999)
    (store / "liver_2/zarr.json").unlink()
    flip(store / "zarr.json", 8 * (whole["zarr.json"].index(b"metadata_sha256") + 2))
    assert set(preprocess(raw, store).values()) == {"done", "skipped"}  # what has no metadata, and no more
    (store / "liver_2/liver/image/c/0/0/0").unlink()
    result = verify(store)
    assert result.exit_code == 1
    assert "3 cases verified, 2 bad and the store itself" in result.output
    assert "scan/fractions: damaged" in result.output
    assert preprocess(raw, store) == {"liver_0": "skipped", "liver_1": "done", "liver_2": "done"}
    (store / ".zarr.json.damaged").unlink()
    assert tree_bytes(store) == whole
    assert verify(store, "--raw", raw).exit_code == 0


def test_a_marked_case_stays_readable_until_it_is_built_again(raw: Path, store: Path) -> None:
    files = read_data_set(raw).cases[1]
    assert is_current(store, files, PreprocessSpec())
    mark_for_rebuild(store, "liver_1", ["a fault", "another"])
    assert (store / "liver_1" / REBUILD_MARK).read_text() == "a fault\nanother\n"
    assert not is_current(store, files, PreprocessSpec())
    CacheStore.open(store).read("liver_1", "scan")
    files.image.unlink()
    assert preprocess(raw, store)["liver_1"] == "failed"
    CacheStore.open(store).read("liver_1", "scan")
    assert is_marked(store, "liver_1")


def change_silently(path: Path) -> None:
    """Other bytes of the same size and time: only the checksum tells. The last four are gzip's own length."""
    status = path.stat()
    flip(path, 8 * (status.st_size - 1))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
def test_sources_are_verified_where_asked_for(raw: Path, store: Path, folder: str) -> None:
    whole = tree_bytes(store / "liver_1")
    change_silently(raw / folder / "liver_1.nii.gz")
    assert preprocess(raw, store) == dict.fromkeys(CASES, "skipped")
    assert verify(store).exit_code == 0
    # It is found, tried, and refused since it is damaged; the cached case stays.
    expected = {"liver_0": "skipped", "liver_1": "failed", "liver_2": "skipped"}
    assert preprocess(raw, store, verify_sources=True) == expected
    assert tree_bytes(store / "liver_1") == whole
    result = verify(store, "--raw", raw)
    assert result.exit_code == 1
    assert f"{folder}/liver_1.nii.gz: not the file that the case was built from" in result.output
    assert preprocess(raw, store) == expected


def test_cases_and_sources_that_are_not_there_are_told(raw: Path, store: Path) -> None:
    shutil.rmtree(store / "liver_0")
    (raw / "imagesTr/liver_2.nii.gz").unlink()
    output = verify(store, "--raw", raw).output
    assert "missing from the cache" in output
    assert "imagesTr/liver_2.nii.gz: cannot be read: No such file" in output
    assert verify(store).exit_code == 0


def test_the_option_reaches_the_build(raw: Path, store: Path) -> None:
    write_pair(raw, "liver_0", *random_scan(seed=9))
    os.utime(raw / "imagesTr/liver_0.nii.gz", ns=(1, 1))
    meta = CacheStore.open(store).meta("liver_0")
    for path, source in (
        (raw / "imagesTr/liver_0.nii.gz", meta.image),
        (raw / "labelsTr/liver_0.nii.gz", meta.label),
    ):
        assert source is not None
        content = path.read_bytes()
        path.write_bytes(content[: source.size_bytes].ljust(source.size_bytes, b"\0"))
        os.utime(path, ns=(source.mtime_ns, source.mtime_ns))

    def run(*options: str) -> str:
        return CliRunner().invoke(main, ["preprocess", str(raw), str(store), "--jobs", "1", *options]).output

    assert "3 were up to date" in run()
    assert "2 were up to date" in run("--verify-sources")
