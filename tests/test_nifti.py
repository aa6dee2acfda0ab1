"""NIfTI: every kind of file gives nibabel's voxels, every damaged one a VolumeError, every written one its grid."""

from __future__ import annotations

import gzip
import hashlib
import os
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import (
    DTYPES,
    ORIENTATIONS,
    ByteOrder,
    Edit,
    canonical_zyx,
    oriented_affine,
    tree_bytes,
    write_nifti,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_cache.errors import VolumeError
from data_cache.geometry import Grid
from pipeline.nifti import (
    CorruptStreamError,
    VolumeHeader,
    VolumeStream,
    read_canonical,
    to_canonical,
    write_labels,
    write_slices,
    write_volume,
)

SHAPE = (5, 4, 6)
ON_DISK = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
suffixes = pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])


def stored(dtype: str = "int16", shape: tuple[int, ...] = SHAPE, *, seed: int = 0) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.normal(0, 500, shape).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(max(info.min, -3024), min(info.max, 3000), shape).astype(dtype)


def read(path: Path, *, use_stdlib: bool = False) -> tuple[NDArray[np.float64], VolumeHeader]:
    """All blocks, scaled, in canonical orientation."""
    with VolumeStream.open(path, use_stdlib=use_stdlib) as stream:
        header = stream.header
        blocks = [(first, block.astype(np.float64)) for first, block in stream.blocks()]
    assert [first for first, _ in blocks] == list(np.cumsum([0, *(len(b) for _, b in blocks)])[:-1])
    with np.errstate(over="ignore", invalid="ignore"):  # a header may claim a slope of 1e308
        values = np.concatenate([block for _, block in blocks]) * header.slope + header.intercept
    return to_canonical(values, header.axes_kji), header


def assert_as_nibabel(path: Path) -> VolumeHeader:
    values, header = read(path)
    expected, affine = canonical_zyx(path)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_allclose(header.grid.affine, affine, atol=1e-5)
    assert header.grid.shape_zyx == expected.shape
    return header


# --- any real file


@given(
    dtype=st.sampled_from(DTYPES),
    byte_order=st.sampled_from("<>"),
    version=st.sampled_from((1, 2)),
    suffix=st.sampled_from((".nii", ".nii.gz")),
    file_axes=st.sampled_from(ORIENTATIONS),
    shape=st.tuples(*[st.integers(1, 7)] * 3),
    oblique=st.floats(-0.2, 0.2),
)
@ON_DISK
def test_every_kind_of_file_is_what_nibabel_says(
    tmp_path: Path,
    dtype: str,
    byte_order: ByteOrder,
    version: int,
    suffix: str,
    file_axes: str,
    shape: tuple[int, int, int],
    oblique: float,
) -> None:
    turn = nib.eulerangles.euler2mat(oblique, oblique / 2, -oblique)
    affine = oriented_affine(file_axes)
    affine[:3, :3] = turn @ affine[:3, :3]
    path = write_nifti(
        tmp_path / f"a{suffix}", stored(dtype, shape), affine, byte_order=byte_order, version=version
    )
    header = assert_as_nibabel(path)
    assert header.file_axes == file_axes
    assert header.notes == ()


@pytest.mark.parametrize("file_axes", ORIENTATIONS)
def test_each_orientation_comes_back_to_ras(tmp_path: Path, file_axes: str) -> None:
    path = write_nifti(tmp_path / "a.nii", stored(), oriented_affine(file_axes))
    header = assert_as_nibabel(path)
    assert header.file_axes == file_axes
    assert nib.aff2axcodes(header.grid.affine) == ("R", "A", "S")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("slope", "intercept", "expected"),
    [
        (1.0, -1024.0, (1.0, -1024.0)),
        (-0.5, 3.25, (-0.5, 3.25)),
        (0.0, 7.0, (1.0, 0.0)),  # NIfTI-1: a slope of 0 says that there is no scaling
        (float("nan"), float("nan"), (1.0, 0.0)),
    ],
)
def test_scaling(
    tmp_path: Path, dtype: str, slope: float, intercept: float, expected: tuple[float, float]
) -> None:
    values = stored(dtype)
    result, header = read(write_nifti(tmp_path / "a.nii", values, scaling=(slope, intercept)))
    assert (header.slope, header.intercept) == expected
    np.testing.assert_array_equal(
        result, values.transpose(2, 1, 0).astype(np.float64) * expected[0] + expected[1]
    )


def test_a_volume_of_several_blocks_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.nifti.stream.BLOCK_BYTES", 5 * 4 * 2 * 4)  # four slices: 4 and 2 of 6
    path = write_nifti(tmp_path / "a.nii.gz", stored())
    with VolumeStream.open(path) as stream:
        assert [(first, len(block)) for first, block in stream.blocks()] == [(0, 4), (4, 2)]
    assert_as_nibabel(path)


@pytest.mark.parametrize("trailing", [(1,), (1, 1), (1, 1, 1, 1)])
def test_trailing_axes_of_one_are_no_axes(tmp_path: Path, trailing: tuple[int, ...]) -> None:
    assert_as_nibabel(write_nifti(tmp_path / "a.nii.gz", stored(), trailing_axes=trailing))


@suffixes
@pytest.mark.parametrize("version", [1, 2])
def test_extensions_are_skipped(tmp_path: Path, suffix: str, version: int) -> None:
    size = 64
    extension = size.to_bytes(4, "little") + (6).to_bytes(4, "little") + b"a comment".ljust(size - 8, b"\0")
    assert_as_nibabel(write_nifti(tmp_path / f"a{suffix}", stored(), extension=extension, version=version))


def test_a_vox_offset_of_zero_means_right_after_the_header(tmp_path: Path) -> None:
    def unset(header: nib.Nifti1Header) -> None:
        header["vox_offset"] = 0

    values, _ = read(write_nifti(tmp_path / "a.nii", stored(), edit=unset))
    np.testing.assert_array_equal(values, stored().transpose(2, 1, 0))


@pytest.mark.parametrize("gunzip", ["isal", "standard library"])
def test_both_ways_to_inflate_agree_and_hash_the_file(tmp_path: Path, gunzip: str) -> None:
    path = write_nifti(tmp_path / "a.nii.gz", stored())
    with VolumeStream.open(path, use_stdlib=gunzip != "isal") as stream:
        for _ in stream.blocks():
            pass
        assert stream.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


# --- reading ahead


@pytest.fixture
def long_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of 40 blocks, none of which compresses well, so that inflating needs several reads."""
    monkeypatch.setattr("pipeline.nifti.stream.BLOCK_BYTES", 1 << 15)
    values = np.random.default_rng(0).integers(-1000, 1000, (128, 128, 40), dtype=np.int16)
    return write_nifti(tmp_path / "long.nii.gz", values)


def inflating_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("inflate")]


@pytest.mark.parametrize("use_stdlib", [False, True])
def test_reading_ahead_gives_the_same_blocks_and_hash(long_path: Path, use_stdlib: bool) -> None:
    # Zeros may follow a gzip stream: bytes that are read, and hashed, after the last block.
    long_path.write_bytes(long_path.read_bytes() + bytes(1 << 20))
    found = []
    for prefetch in (False, True):
        with VolumeStream.open(long_path, use_stdlib=use_stdlib, prefetch=prefetch) as stream:
            blocks = [(first, block.tobytes()) for first, block in stream.blocks()]
            assert len(inflating_threads()) == prefetch
        found.append((blocks, stream.sha256))
    assert found[0] == found[1]
    assert len(found[0][0]) == 40
    assert found[0][1] == hashlib.sha256(long_path.read_bytes()).hexdigest()
    assert inflating_threads() == []


def test_reading_ahead_stays_one_block_ahead(long_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    block_of = VolumeStream._block

    def counted(self: VolumeStream, first: int, n_slices: int) -> NDArray[Any]:
        asked.append(first)
        return block_of(self, first, n_slices)

    monkeypatch.setattr(VolumeStream, "_block", counted)
    with VolumeStream.open(long_path, prefetch=True) as stream:
        for first, _ in stream.blocks():
            time.sleep(0.01)  # time enough for the thread to run away
            assert len(asked) <= first + 2
            if first == 5:
                break


@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_what_fails_in_the_thread_fails_as_it_does_without(long_path: Path, kept: float) -> None:
    content = long_path.read_bytes()
    damaged = bytearray(content[: int(len(content) * kept)] if kept < 0.9 else content)
    if kept > 0.9:
        damaged[-6] ^= 1  # the checksum
    long_path.write_bytes(damaged)
    failures = []
    for prefetch in (False, True):
        with (
            pytest.raises(CorruptStreamError, match="long.nii.gz: ") as failure,
            VolumeStream.open(long_path, prefetch=prefetch) as stream,
        ):
            for _ in stream.blocks():
                pass
        failures.append(str(failure.value))
        assert inflating_threads() == []
    assert failures[0] == failures[1]


def test_the_thread_ends_where_reading_is_given_up(long_path: Path) -> None:
    with VolumeStream.open(long_path, prefetch=True) as stream:
        blocks = stream.blocks()
        next(blocks)
        assert len(inflating_threads()) == 1
    assert inflating_threads() == []

    def use(stream: VolumeStream) -> None:
        for _ in stream.blocks():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), VolumeStream.open(long_path, prefetch=True) as stream:
        use(stream)
    assert inflating_threads() == []


def test_a_gzip_of_several_members_is_one_stream(tmp_path: Path) -> None:
    whole = write_nifti(tmp_path / "a.nii", stored()).read_bytes()
    path = tmp_path / "b.nii.gz"
    path.write_bytes(gzip.compress(whole[:400], mtime=0) + gzip.compress(whole[400:], mtime=0))
    assert_as_nibabel(path)


def test_the_content_decides_what_is_compressed_not_the_name(tmp_path: Path) -> None:
    plain = write_nifti(tmp_path / "a.nii", stored())
    values, _ = read(plain.rename(tmp_path / "b.nii.gz"))
    np.testing.assert_array_equal(values, stored().transpose(2, 1, 0))


def test_read_canonical_rounds_and_clips(tmp_path: Path) -> None:
    values = np.zeros(SHAPE, dtype=np.float32)
    values[0, 0, :] = (1.4, 1.6, np.nan, 1e9, -1e9, np.inf)
    volume, _ = read_canonical(write_nifti(tmp_path / "a.nii", values))
    assert volume[:, 0, 0].tolist() == [1, 2, -1024, 32767, -32767, -1024]  # what prepare makes of them, too
    assert volume.dtype == np.int16
    big_endian, _ = read_canonical(write_nifti(tmp_path / "b.nii", stored(), byte_order=">"))
    np.testing.assert_array_equal(big_endian, stored().transpose(2, 1, 0))


# --- which affine


def test_the_sform_comes_before_the_qform(tmp_path: Path) -> None:
    def other_qform(header: nib.Nifti1Header) -> None:
        header.set_qform(oriented_affine("LPS", origin_xyz_mm=(1, 2, 3)), code=2)

    assert assert_as_nibabel(write_nifti(tmp_path / "a.nii", stored(), edit=other_qform)).file_axes == "RAS"


@pytest.mark.parametrize("file_axes", ["RAS", "LPI", "SAR", "PIR"])
@pytest.mark.parametrize("codes", [(1, 0), (0, 1), (2, 4)], ids=["sform", "qform", "both"])
def test_one_form_is_enough(tmp_path: Path, file_axes: str, codes: tuple[int, int]) -> None:
    header = assert_as_nibabel(
        write_nifti(tmp_path / "a.nii", stored(), oriented_affine(file_axes), codes=codes)
    )
    assert header.file_axes == file_axes
    assert header.notes == ()


def test_neither_form_is_said(tmp_path: Path) -> None:
    header = assert_as_nibabel(write_nifti(tmp_path / "a.nii", stored(), codes=(0, 0)))
    assert header.file_axes == "LAS"
    assert header.notes == ("neither sform nor qform: orientation assumed LAS, spacing from pixdim",)


def test_a_disagreeing_pixdim_is_said_and_the_affine_used(tmp_path: Path) -> None:
    def other_pixdim(header: nib.Nifti1Header) -> None:
        header["pixdim"][3] = 5.0

    header = assert_as_nibabel(write_nifti(tmp_path / "a.nii", stored(), codes=(1, 0), edit=other_pixdim))
    assert header.grid.spacing_zyx_mm[0] == pytest.approx(2.5)
    (note,) = header.notes
    assert note == "pixdim 0.8×0.9×5 mm disagrees with the sform's 0.8×0.9×2.5 mm: the sform was used"


def test_a_singular_sform_falls_back_to_the_qform(tmp_path: Path) -> None:
    def singular(header: nib.Nifti1Header) -> None:
        header["srow_z"] = 0

    _, header = read(write_nifti(tmp_path / "a.nii", stored(), oriented_affine("LPS"), edit=singular))
    assert header.file_axes == "LPS"
    assert header.notes[0] == "sform is singular"


# --- headers that lie


def setting(field: str, value: Any) -> Edit:
    def edit(header: nib.Nifti1Header) -> None:
        header[field] = value

    return edit


def dims(*values: int) -> Edit:
    return setting("dim", [*values, *[1] * (8 - len(values))])


def slope_of_two(header: nib.Nifti1Header) -> None:
    header["scl_slope"], header["scl_inter"] = 2, float("nan")


LIES: dict[str, tuple[Edit, str]] = {
    "32767³ voxels": (dims(3, 32767, 32767, 32767), "more than a file of"),
    "more slices than there are": (dims(3, 5, 4, 7), "truncated|more than a file of"),
    "fewer slices than there are": (dims(3, 5, 4, 5), "after its last voxel"),
    "fewer columns than there are": (dims(3, 4, 4, 6), "after its last voxel"),
    "no slices": (dims(3, 5, 4, 0), "claims the dimensions"),
    "negative dimensions": (dims(3, 5, -4, 6), "claims the dimensions"),
    "two axes": (dims(2, 5, 24), "not that of one 3-D volume"),
    "time": (dims(4, 5, 4, 3, 2), "not that of one 3-D volume"),
    "eight axes": (dims(9, 5, 4, 6), "."),
    "another type, larger": (setting("datatype", 16), "truncated|more than a file of"),
    "another type, smaller": (setting("datatype", 2), "after its last voxel"),
    "unknown type": (setting("datatype", 77), "data type|datatype|data code"),
    "complex": (setting("datatype", 32), "complex64 voxels; supported are"),
    "RGB": (setting("datatype", 128), "voxels; supported are"),
    "long double": (setting("datatype", 1536), "voxels; supported are|data type|data code"),
    "offset in the header": (setting("vox_offset", 100), "."),
    "offset behind the voxels": (setting("vox_offset", 100_000), "."),
    "offset a little late": (setting("vox_offset", 560), "truncated|more than a file of"),
    "an infinite slope": (setting("scl_slope", float("inf")), "slope inf and the intercept"),
    "an intercept that is not a number": (
        slope_of_two,
        "slope 2 and the intercept nan: expected finite numbers",
    ),
    "half of a pair": (setting("magic", b"ni1"), "one half of an .hdr/.img pair|magic"),
    "no magic": (setting("magic", b"abc"), "."),
}
LIES_OF_1 = LIES | {
    "offset is no number": (setting("vox_offset", float("nan")), "vox_offset"),
    "offset is infinite": (setting("vox_offset", float("inf")), "vox_offset"),
}
LIES_OF_2 = {
    "2^40 slices": (dims(3, 1, 1, 2**40), "more than a file of"),
    "2^62 columns": (dims(3, 2**62, 1, 1), "more than a file of"),
    "negative offset": (setting("vox_offset", -(2**40)), "."),
    "offset of 2^60": (setting("vox_offset", 2**60), "more than a file of"),
}


@suffixes
@pytest.mark.parametrize(
    ("version", "lie"), [(v, lie) for v, lies in ((1, LIES_OF_1), (2, LIES | LIES_OF_2)) for lie in lies]
)
def test_a_header_that_lies_is_refused_by_name(tmp_path: Path, suffix: str, version: int, lie: str) -> None:
    edit, reason = (LIES_OF_1 | LIES_OF_2)[lie]
    path = write_nifti(tmp_path / f"a{suffix}", stored(), version=version, edit=edit)
    with pytest.raises(VolumeError, match=reason) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@suffixes
def test_a_header_that_claims_everything_allocates_nothing(tmp_path: Path, suffix: str) -> None:
    path = write_nifti(tmp_path / f"a{suffix}", stored(), edit=dims(3, 32767, 32767, 32767))
    tracemalloc.start()
    with pytest.raises(VolumeError, match="claims 70362301923678"):  # 32767³ · 2 bytes
        read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20


def test_an_axis_of_millions_of_voxels_is_refused(tmp_path: Path) -> None:
    # A megabyte of zeros in a few KB: within what deflate can reach, but weights for such an axis would take gigabytes.
    path = write_nifti(tmp_path / "a.nii.gz", np.zeros((1, 1, 1 << 20), np.uint8), version=2)
    with pytest.raises(VolumeError, match="1048576"):
        read(path)


@pytest.mark.parametrize("fields", [("srow_x", "srow_y", "srow_z"), ("srow_x",)])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_an_sform_that_is_no_affine_falls_back_to_the_next(
    tmp_path: Path, fields: tuple[str, ...], value: float
) -> None:
    def edit(header: nib.Nifti1Header) -> None:
        for field in fields:
            header[field] = value

    _, header = read(write_nifti(tmp_path / "a.nii", stored(), codes=(1, 0), edit=edit))
    assert any(note.startswith("sform is") for note in header.notes)
    assert np.isfinite(header.grid.affine).all()


# --- what is no volume


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not a NIfTI file"),
        (b"\x5c", "is not a NIfTI file"),
        (b"\x1f\x8b", "damaged gzip"),
        (gzip.compress(b""), "is not a NIfTI file"),
        (gzip.compress(b"DICM" * 100), "is a DICOM file: name the folder of its series"),
        (b"hello world, this is no volume" * 30, "is not a NIfTI file"),
        ((348).to_bytes(4, "little"), "ends inside its header"),
        ((348).to_bytes(4, "little") + bytes(344), "."),
        ((540).to_bytes(4, "big") + bytes(536), "."),
    ],
)
def test_what_is_no_nifti_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.nii.gz"
    path.write_bytes(content)
    with pytest.raises(VolumeError, match=reason):
        read(path)


def test_folders_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=f"{tmp_path}: cannot be opened: Is a directory"):
        read(tmp_path)
    with pytest.raises(VolumeError, match="nowhere.nii: cannot be opened: No such file"):
        read(tmp_path / "nowhere.nii")


@given(
    content=st.binary(max_size=800), start=st.sampled_from([(348, "little"), (348, "big"), (540, "little")])
)
@ON_DISK
def test_random_headers_are_refused(tmp_path: Path, content: bytes, start: tuple[int, Any]) -> None:
    path = tmp_path / "a.nii"
    path.write_bytes(start[0].to_bytes(4, start[1]) + content)
    with pytest.raises(VolumeError):
        read(path)


@given(bit=st.integers(0, 8 * 540 - 1), version=st.sampled_from((1, 2)))
@example(bit=1085, version=2)  # a spacing of 3e154 mm, whose square is infinite
@settings(ON_DISK, max_examples=300)
def test_a_flipped_bit_in_a_plain_header_is_another_header_or_a_volume_error(
    tmp_path: Path, bit: int, version: int
) -> None:
    # A plain .nii has no checksum. What may not happen is another error, or a warning.
    path = write_nifti(tmp_path / "a.nii", stored(), version=version)
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    try:
        values, header = read(path)
    except VolumeError as failure:
        assert str(path) in str(failure)  # noqa: PT017 (either outcome is right)
    else:
        assert values.shape == header.grid.shape_zyx
        assert np.isfinite(header.grid.affine).all()


# --- damage


@suffixes
@given(keep=st.floats(0, 1, exclude_max=True))
@settings(ON_DISK, max_examples=60)
def test_a_file_that_ends_early_is_refused(tmp_path: Path, suffix: str, keep: float) -> None:
    path = write_nifti(tmp_path / f"a{suffix}", stored())
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(VolumeError, match=str(path)):
        read(path)


@pytest.mark.parametrize("use_stdlib", [False, True], ids=["isal", "standard library"])
@given(where=st.floats(0, 1, exclude_max=True))
@settings(ON_DISK, max_examples=150)
def test_no_flipped_bit_of_a_gz_gives_wrong_voxels(tmp_path: Path, use_stdlib: bool, where: float) -> None:
    path = write_nifti(tmp_path / "a.nii.gz", stored(shape=(12, 11, 10)) // 100)
    before, header_before = read(path)
    content = bytearray(path.read_bytes())
    bit = int(where * 8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    try:
        after, header = read(path, use_stdlib=use_stdlib)
    except VolumeError as failure:
        assert str(path) in str(failure)  # noqa: PT017
    else:  # such as the time stamp of the gzip header
        np.testing.assert_array_equal(after, before)
        assert header.grid == header_before.grid


@pytest.mark.parametrize("use_stdlib", [False, True], ids=["isal", "standard library"])
def test_every_bit_of_the_checksum_counts(tmp_path: Path, use_stdlib: bool) -> None:
    path = write_nifti(tmp_path / "a.nii.gz", stored())
    content = path.read_bytes()
    for bit in range(8 * (len(content) - 8), 8 * len(content)):  # CRC-32 and length
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(CorruptStreamError, match="damaged gzip data"):
            read(path, use_stdlib=use_stdlib)


@pytest.mark.parametrize("use_stdlib", [False, True], ids=["isal", "standard library"])
def test_bytes_after_the_gzip_are_refused(tmp_path: Path, use_stdlib: bool) -> None:
    path = write_nifti(tmp_path / "a.nii.gz", stored())
    path.write_bytes(path.read_bytes() + b"garbage")
    with pytest.raises(VolumeError, match=str(path)):
        read(path, use_stdlib=use_stdlib)


@suffixes
@pytest.mark.parametrize("surplus", [1, 4096])
def test_voxels_after_the_last_one_are_refused(tmp_path: Path, suffix: str, surplus: int) -> None:
    plain = write_nifti(tmp_path / "plain.nii", stored()).read_bytes() + bytes(surplus)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(plain, mtime=0) if suffix.endswith("gz") else plain)
    with pytest.raises(VolumeError, match=f"{surplus} bytes after its last voxel"):
        read(path)


# --- writing labels


def label_blocks(label_kji: NDArray[np.uint8], n: int = 4) -> list[NDArray[np.uint8]]:
    return [label_kji[first : first + n] for first in range(0, len(label_kji), n)]


def random_label(shape_kji: tuple[int, int, int], *, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 3, shape_kji).astype(np.uint8)


def loaded(path: Path) -> Any:
    """By nibabel, whose own types do not say that an image has a shape."""
    return nib.load(path)


def header_of(path: Path) -> VolumeHeader:
    with VolumeStream.open(path) as stream:
        return stream.header


@suffixes
@pytest.mark.parametrize("file_axes", ["LPS", "RAS", "SAR"])
@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("trailing", [(), (1,)], ids=["3-D", "4-D"])
def test_a_written_label_lies_exactly_on_its_image(
    tmp_path: Path,
    suffix: str,
    file_axes: str,
    byte_order: ByteOrder,
    version: int,
    trailing: tuple[int, ...],
) -> None:
    image_path = write_nifti(
        tmp_path / "image.nii.gz",
        stored("float32"),
        oriented_affine(file_axes),
        byte_order=byte_order,
        version=version,
        scaling=(2.0, -1024.0),
        codes=(4, 2),
        trailing_axes=trailing,
    )
    header = header_of(image_path)
    label = random_label(header.shape_kji)
    path = tmp_path / f"label{suffix}"
    write_labels(path, header, label_blocks(label))
    written, image = loaded(path), loaded(image_path)
    assert written.shape == image.shape
    assert type(written) is type(image)
    np.testing.assert_array_equal(written.affine, image.affine)
    np.testing.assert_array_equal(written.get_qform(), image.get_qform())
    for field in ("sform_code", "qform_code", "xyzt_units"):
        assert written.header[field] == image.header[field]
    np.testing.assert_array_equal(written.header["pixdim"], image.header["pixdim"])
    assert written.header.endianness == image.header.endianness
    assert written.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(written.dataobj).reshape(SHAPE), label.transpose(2, 1, 0))
    assert header_of(path).grid == header.grid


def test_an_image_with_extensions_gives_a_label_without(tmp_path: Path) -> None:
    extension = (16).to_bytes(4, "little") + (6).to_bytes(4, "little") + b"comment!"
    header = header_of(write_nifti(tmp_path / "image.nii", stored(), extension=extension))
    label = random_label(header.shape_kji)
    write_labels(tmp_path / "label.nii", header, [label])
    values, _ = read(tmp_path / "label.nii")
    np.testing.assert_array_equal(values, label)


def test_equal_labels_are_equal_files(tmp_path: Path) -> None:
    header = header_of(write_nifti(tmp_path / "image.nii", stored()))
    label = random_label(header.shape_kji)
    (tmp_path / "x").mkdir()
    write_labels(tmp_path / "a.nii.gz", header, label_blocks(label))
    write_labels(tmp_path / "x" / "b.nii.gz", header, label_blocks(label))
    content = (tmp_path / "a.nii.gz").read_bytes()
    assert content == (tmp_path / "x" / "b.nii.gz").read_bytes()
    assert content[3:8] == bytes(5)  # no flags, so no name, and no time


@suffixes
@pytest.mark.parametrize("n_slices", [0, 5, 7])
def test_labels_that_do_not_add_up_are_refused_and_leave_nothing(
    tmp_path: Path, suffix: str, n_slices: int
) -> None:
    header = header_of(write_nifti(tmp_path / "image.nii", stored()))
    path = tmp_path / f"label{suffix}"
    path.write_bytes(b"an older file")
    before = tree_bytes(tmp_path)
    with pytest.raises(ValueError, match=rf"expected the voxels .* \(5, 4, 6\), got {n_slices * 20}"):
        write_labels(path, header, [random_label((1, 4, 5))] * n_slices)
    assert tree_bytes(tmp_path) == before


@pytest.mark.parametrize("n_slices", [0, 5, 7])
def test_slices_that_do_not_add_up_leave_the_file_as_it_was(tmp_path: Path, n_slices: int) -> None:
    path = tmp_path / "scan.nii"
    path.write_bytes(b"an older file")
    slices = [np.zeros((1, 4, 5), dtype=np.int16)] * n_slices
    with pytest.raises(ValueError, match=rf"expected the voxels .* \(5, 4, 6\), got {n_slices * 20}"):
        write_slices(path, slices, (6, 4, 5), np.eye(4))
    assert tree_bytes(tmp_path) == {"scan.nii": b"an older file"}


def test_a_pipe_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "scan.nii.gz")
    with pytest.raises(VolumeError, match="expected a file, found a pipe"):
        VolumeStream.open(tmp_path / "scan.nii.gz")
    with pytest.raises(VolumeError, match="expected a file, found a pipe"):
        VolumeStream.open(Path("/dev/zero"))


def test_blocks_that_fail_midway_leave_nothing(tmp_path: Path) -> None:
    header = header_of(write_nifti(tmp_path / "image.nii", stored()))
    before = tree_bytes(tmp_path)

    def failing() -> Any:
        yield random_label((1, 4, 5))
        raise RuntimeError("the network exploded")

    with pytest.raises(RuntimeError, match="exploded"):
        write_labels(tmp_path / "label.nii.gz", header, failing())
    assert tree_bytes(tmp_path) == before


# --- writing volumes


@pytest.mark.parametrize("file_axes", ORIENTATIONS)
def test_a_written_volume_is_stored_as_asked(tmp_path: Path, file_axes: str) -> None:
    volume = stored().transpose(2, 1, 0)
    grid = Grid.from_array(volume.shape, oriented_affine("RAS"))
    path = tmp_path / "a.nii.gz"
    write_volume(path, volume, grid, file_axes=file_axes)
    header = assert_as_nibabel(path)
    assert header.file_axes == file_axes
    np.testing.assert_array_equal(read(path)[0], volume)
    np.testing.assert_allclose(header.grid.affine, grid.affine, atol=1e-5)


# --- orientation


@given(file_axes=st.sampled_from(ORIENTATIONS), channels=st.sampled_from([(), (2,)]))
@ON_DISK
def test_to_canonical_flips_and_permutes_the_last_three_axes(
    tmp_path: Path, file_axes: str, channels: tuple[int, ...]
) -> None:
    header = header_of(write_nifti(tmp_path / "a.nii", stored(), oriented_affine(file_axes)))
    values = stored().transpose(2, 1, 0)
    expected, _ = canonical_zyx(tmp_path / "a.nii")
    result = to_canonical(np.broadcast_to(values, (*channels, *values.shape)), header.axes_kji)
    assert result.flags.c_contiguous
    np.testing.assert_array_equal(result, np.broadcast_to(expected, (*channels, *expected.shape)))
