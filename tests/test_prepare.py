"""Prepare: what is cached is what brute force finds in nibabel's canonical volume, whatever the file looks like."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import (
    DTYPES,
    ORIENTATIONS,
    ByteOrder,
    brute_average,
    canonical_zyx,
    oriented_affine,
    random_scan,
    slab,
    write_nifti,
    write_pair,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import pipeline.prepare
from data_cache.errors import LabelError, VolumeError
from data_cache.geometry import Box
from data_cache.schema import Case, PreprocessSpec, View
from pipeline.prepare import prepare_case, read_scan

ON_DISK = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SPEC = PreprocessSpec(shape_zyx=(6, 5, 4))
AIR = SPEC.air_hu


def prepared(root: Path, spec: PreprocessSpec = SPEC, case_id: str = "liver_0") -> Case:
    image, label = (root / folder / f"{case_id}.nii.gz" for folder in ("imagesTr", "labelsTr"))
    # Whatever is in it: what may be cached is tested elsewhere.
    return prepare_case(case_id, image, label, spec, root=root, force=True)


def fractions_of(view: View) -> NDArray[np.uint8]:
    assert view.fractions_czyx is not None
    return view.fractions_czyx


def hu_zyx(image: Path) -> NDArray[np.float64]:
    """nibabel's volume; what is no number is air, and the rest in the range of the cache."""
    values, _ = canonical_zyx(image)
    return np.where(np.isfinite(values), np.clip(values, -32767, 32767), AIR)


def assert_near(cached: NDArray[Any], exact: NDArray[np.float64], *, slack: float = 1e-3) -> None:
    """Rounded to the next whole number; where that is a tie, either will do."""
    assert np.abs(cached - exact).max() <= 0.5 + slack


# --- the oracle


@given(
    dtype=st.sampled_from(DTYPES),
    file_axes=st.sampled_from(ORIENTATIONS),
    shape=st.tuples(*[st.integers(1, 19)] * 3),
    spec_shape=st.tuples(*[st.integers(1, 8)] * 3),
    byte_order=st.sampled_from("<>"),
    scaling=st.sampled_from([(1.0, 0.0), (0.5, -1024.0), (-2.0, 10.0)]),
    block_bytes=st.sampled_from([1, 2000, 1 << 22]),
    seed=st.integers(0, 99),
)
@example("int16", "SAR", (19, 18, 17), (8, 8, 8), "<", (1.0, 0.0), 2000, 0)
@example("int16", "RAI", (16, 16, 12), (6, 8, 4), "<", (1.0, 0.0), 2000, 0)
@ON_DISK
def test_cached_voxels_are_the_means_over_their_footprints(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    file_axes: str,
    shape: tuple[int, int, int],
    spec_shape: tuple[int, int, int],
    byte_order: ByteOrder,
    scaling: tuple[float, float],
    block_bytes: int,
    seed: int,
) -> None:
    monkeypatch.setattr("pipeline.nifti.stream.BLOCK_BYTES", block_bytes)  # one slice, several, all of them
    spec = PreprocessSpec(shape_zyx=spec_shape)
    rng = np.random.default_rng(seed)
    low, high = (0, 256) if dtype == "uint8" else (-128, 128) if dtype == "int8" else (0, 3000)
    stored = rng.integers(low, high, shape).astype(dtype)
    label = rng.choice(np.array([0, 0, 0, 1, 2], dtype=np.uint8), shape)
    affine = oriented_affine(file_axes)
    image_path = write_nifti(
        tmp_path / "imagesTr/liver_0.nii.gz", stored, affine, byte_order=byte_order, scaling=scaling
    )
    label_path = write_nifti(tmp_path / "labelsTr/liver_0.nii.gz", label, affine)
    case = prepared(tmp_path, spec)
    label_zyx, _ = canonical_zyx(label_path)
    volumes = (hu_zyx(image_path), label_zyx >= 1, label_zyx == 2)
    assert set(case.views) == ({"scan", "liver"} if label.any() else {"scan"})
    for name, box in case.meta.boxes.items():
        image, foreground, tumour = (brute_average(volume, spec_shape, box) for volume in volumes)
        view = case.views[name]
        fractions = fractions_of(view).astype(int)
        assert view.grid == case.meta.view_grid(name, spec_shape)
        assert_near(view.image_zyx, image)
        assert_near(fractions.sum(axis=0), 255 * foreground)
        assert_near(fractions[1], 255 * tumour)
        assert fractions.sum(axis=0).max() <= 255
        assert fractions.min() >= 0
    assert case.meta.voxel_counts == tuple(np.bincount(label.ravel(), minlength=3).tolist())
    assert case.meta.hu.minimum == hu_zyx(image_path).min()
    assert case.meta.hu.maximum == hu_zyx(image_path).max()


@pytest.mark.parametrize("file_axes", ["LPS", "RAS", "SLP", "ASL", "PIR"])
def test_orientation_decides_nothing(tmp_path: Path, file_axes: str) -> None:
    image_xyz, label_xyz = random_scan((9, 10, 11))
    # In float32, which a header has, these are exact.
    spacing_xyz = {"R": 0.75, "L": 0.75, "A": 0.875, "P": 0.875, "S": 2.5, "I": 2.5}
    for name, axes in (("ras", "RAS"), ("other", file_axes)):
        order = ["RLAPSI".index(code) // 2 for code in axes]
        flips = tuple(i for i, code in enumerate(axes) if code in "LPI")
        affine = oriented_affine(axes, [spacing_xyz[code] for code in axes], (0, 0, 0))
        for i in flips:  # the same box in space: a flipped axis starts at the other end
            affine[:3, 3] -= affine[:3, i] * ((9, 10, 11)[order[i]] - 1)
        stored = [np.flip(a.transpose(order), flips) for a in (image_xyz, label_xyz)]
        write_pair(tmp_path / name, "liver_0", stored[0], stored[1], affine=affine)
    ras, other = prepared(tmp_path / "ras"), prepared(tmp_path / "other")
    assert (ras.meta.boxes, ras.meta.grid) == (other.meta.boxes, other.meta.grid)
    for name, view in ras.views.items():
        # Sums in another order may differ in the last digit, and a tie then rounds the other way.
        assert np.abs(view.image_zyx.astype(int) - other.views[name].image_zyx).max() <= 1
        assert np.abs(fractions_of(view).astype(int) - fractions_of(other.views[name])).max() <= 1


def test_total_volume_is_kept(tmp_path: Path) -> None:
    z, y, x = np.ogrid[-1:1:45j, -1:1:61j, -1:1:53j]
    label = ((x**2 + y**2 / 0.8 + z**2 / 0.6) < 0.5).astype(np.uint8).transpose(2, 1, 0)
    label[((x - 0.2) ** 2 + y**2 + z**2 < 0.04).transpose(2, 1, 0)] = 2
    image, _ = random_scan(label.shape)
    write_pair(tmp_path, "liver_0", image, label)
    case = prepared(tmp_path, PreprocessSpec(shape_zyx=(16, 24, 24)))
    for name, view in case.views.items():
        cached_ml = fractions_of(view).astype(float).sum(axis=(1, 2, 3)) / 255 * view.grid.voxel_volume_ml
        for channel, label_id in ((0, 1), (1, 2)):
            assert cached_ml[channel] == pytest.approx(case.meta.volume_ml(label_id), rel=5e-3), name


def test_a_case_by_hand(tmp_path: Path) -> None:
    # Four columns, one row, two slices, to two columns, one row, one slice: each voxel is the mean of 2 · 2.
    image = np.array([[0, 4], [8, 12], [100, 101], [102, 103]], dtype=np.int16)[:, None, :]
    label = np.array([[0, 0], [0, 1], [2, 2], [1, 0]], dtype=np.uint8)[:, None, :]
    write_pair(tmp_path, "liver_0", image, label)
    case = prepared(tmp_path, PreprocessSpec(shape_zyx=(1, 1, 2)))
    view = case.views["scan"]
    assert view.image_zyx.tolist() == [[[6, 102]]]  # 24 / 4 and 406 / 4 = 101.5, to even
    # Left: one liver voxel of four, 63.75 of 255. Right: three of four are liver or tumour, 191.25, two tumour, 127.5.
    assert fractions_of(view).tolist() == [[[[64, 63]]], [[[0, 128]]]]
    assert case.meta.voxel_counts == (4, 2, 2)
    assert case.meta.boxes == {"scan": Box.whole((2, 1, 4)), "liver": Box.whole((2, 1, 4))}
    assert (case.meta.hu.minimum, case.meta.hu.maximum) == (0, 103)


def test_the_liver_view_has_its_margin(tmp_path: Path) -> None:
    image, label = random_scan((6, 30, 100))
    label[...] = 0
    label[2, 13, 40] = 1
    label[3, 17, 59] = 2
    write_pair(tmp_path, "liver_0", image, label, affine=oriented_affine("LPS", (20, 5, 2)))
    # Axes L and P are stored right to left and front to back: columns 2 and 3 are 2 and 3 of 6, rows 13..17 are 12..16 of 30.
    # 10 mm are 1 column of 20 mm, 2 rows of 5 mm and 5 slices of 2 mm.
    expected = Box(start_zyx=(35, 10, 1), stop_zyx=(65, 19, 5))
    assert prepared(tmp_path).meta.boxes["liver"] == expected
    # The original project's: 100 / 50 = 2 slices on each side, all of the plane.
    spec = replace(SPEC, crop="depth")
    assert prepared(tmp_path, spec).meta.boxes["liver"] == slab(38, 62, (100, 30, 6))


def test_tumour_never_exceeds_what_is_foreground() -> None:
    # Sums that should be equal may differ in the last digit: 127.49 of liver or tumour, 127.51 of tumour.
    shares = np.array([127.499 / 255, 127.501 / 255], dtype=np.float32).reshape(2, 1, 1, 1)
    assert pipeline.prepare._fractions(*shares).ravel().tolist() == [0, 127]


# --- training and inference share one path


@pytest.mark.parametrize("file_axes", ["LPS", "SAR"])
@pytest.mark.parametrize(
    ("dtype", "scaling"),
    [("int16", (1.0, 0.0)), ("uint8", (4.0, -500.0)), (">f4", (1.0, 0.0)), ("float64", (0.5, 3.0))],
)
def test_inference_sees_what_was_cached(
    tmp_path: Path, file_axes: str, dtype: str, scaling: tuple[float, float]
) -> None:
    image, label = random_scan((21, 23, 25))
    affine = oriented_affine(file_axes)
    image_path = write_nifti(
        tmp_path / "imagesTr/liver_0.nii.gz",
        (image // 8).astype(dtype),
        affine,
        scaling=scaling,
        byte_order=">" if dtype.startswith(">") else "<",
    )
    write_nifti(tmp_path / "labelsTr/liver_0.nii.gz", label, affine)
    case, scan = prepared(tmp_path), read_scan(image_path, SPEC)
    assert scan.scan_box == case.meta.boxes["scan"]
    for name, box in case.meta.boxes.items():
        view = scan.view(box)
        # What is not stored as small integers is held in whole HU.
        slack = 0 if dtype != "float64" or name == "scan" else 1
        difference = np.abs(view.image_zyx.astype(int) - case.views[name].image_zyx)
        assert difference.max() <= slack
        assert view.grid == case.views[name].grid
        assert view.fractions_czyx is None


# --- odd intensities


def test_what_is_no_number_becomes_air_and_is_counted(tmp_path: Path) -> None:
    image, label = random_scan()
    floats = image.astype(np.float32)
    floats[0, 0, :3] = (np.nan, np.inf, -np.inf)
    floats[1, 1, 1] = np.array([0x7FA00000], dtype=np.uint32).view(np.float32)[0]  # a signalling NaN
    write_pair(tmp_path, "liver_0", floats, label)
    case = prepared(tmp_path)
    assert "image: 4 voxels were NaN or infinite and became -1024 HU" in case.meta.notes
    exact = brute_average(
        hu_zyx(tmp_path / "imagesTr/liver_0.nii.gz"), SPEC.shape_zyx, case.meta.boxes["scan"]
    )
    assert_near(case.views["scan"].image_zyx, exact)
    scan = read_scan(tmp_path / "imagesTr/liver_0.nii.gz", SPEC)
    assert (*scan.notes, *map(str, scan.doubts)) == case.meta.notes


def test_an_image_of_nothing_but_nan_is_air(tmp_path: Path) -> None:
    _, label = random_scan()
    write_pair(tmp_path, "liver_0", np.full(label.shape, np.nan, dtype=np.float64), label, scaling=(1.0, 0.0))
    # A label of floats is refused below; here only the image is one.
    write_nifti(tmp_path / "labelsTr/liver_0.nii.gz", label)
    case = prepared(tmp_path)
    assert (case.views["scan"].image_zyx == AIR).all()
    assert (case.meta.hu.minimum, case.meta.hu.maximum) == (AIR, AIR)


@pytest.mark.parametrize(
    ("dtype", "version", "scaling"),
    [
        ("float64", 1, (1.0, 0.0)),
        ("int64", 1, (1.0, 0.0)),
        ("int16", 1, (3e38, 0.0)),
        ("int16", 2, (1e308, 0.0)),
        ("int16", 2, (1.0, 1e300)),
        ("float32", 2, (-1e308, 1e308)),
    ],
)
def test_absurd_intensities_end_at_the_range_of_the_cache(
    tmp_path: Path, dtype: str, version: int, scaling: tuple[float, float]
) -> None:
    _, label = random_scan()
    stored = np.where(label > 0, 30000, 1).astype(dtype)
    if dtype in ("float64", "int64"):
        stored[0] = 9e18
    write_nifti(tmp_path / "imagesTr/liver_0.nii.gz", stored, version=version, scaling=scaling)
    write_nifti(tmp_path / "labelsTr/liver_0.nii.gz", label)
    case = prepared(tmp_path)
    with np.errstate(over="ignore"):
        exact = hu_zyx(tmp_path / "imagesTr/liver_0.nii.gz")
    assert_near(
        case.views["scan"].image_zyx,
        brute_average(exact, SPEC.shape_zyx, case.meta.boxes["scan"]),
        slack=0.02,
    )
    assert (case.meta.hu.minimum, case.meta.hu.maximum) == (exact.min(), exact.max())


# --- labels


def with_voxel(value: float, dtype: str = "float32") -> NDArray[Any]:
    label = random_scan()[1].astype(dtype)
    label[0, 0, 0] = value
    return label


@pytest.mark.parametrize(
    ("label", "scaling", "found"),
    [
        (with_voxel(3, "uint8"), (1.0, 0.0), "3"),
        (with_voxel(255, "uint8"), (1.0, 0.0), "255"),
        (with_voxel(-1, "int16"), (1.0, 0.0), "-1"),
        (with_voxel(0.5), (1.0, 0.0), "0.5"),
        (with_voxel(float("nan")), (1.0, 0.0), "nan"),
        (with_voxel(float("inf")), (1.0, 0.0), "inf"),
        (with_voxel(0, "uint8"), (0.5, 0.0), "0.5"),  # once scaled, 1 is one half
        (with_voxel(0, "uint8"), (1.0, 1.0), "3"),
        (with_voxel(0, "uint8"), (1e38, 0.0), r"1e\+38"),
        (random_scan()[0], (1.0, 0.0), "-1024"),  # an image in place of the label
    ],
)
def test_other_values_than_the_three_are_refused(
    tmp_path: Path, label: NDArray[Any], scaling: tuple[float, float], found: str
) -> None:
    write_nifti(tmp_path / "imagesTr/liver_0.nii.gz", random_scan()[0])
    path = write_nifti(tmp_path / "labelsTr/liver_0.nii.gz", label, scaling=scaling)
    with pytest.raises(LabelError, match=rf"holds {found}.*; a label has 0, 1 \(liver\) and 2") as caught:
        prepared(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("factor", "scaling"), [(255 // 2, (2 / 254, 0.0)), (1, (1.0, 0.0)), (-1, (-1.0, 0.0)), (1, (2.0, 0.0))]
)
@pytest.mark.parametrize("dtype", ["uint8", "int16", ">i4", "float64"])
def test_labels_of_any_type_and_scale_are_read(
    tmp_path: Path, factor: int, scaling: tuple[float, float], dtype: str
) -> None:
    image, label = random_scan()
    write_pair(tmp_path, "liver_0", image, label)
    before = prepared(tmp_path)
    wanted = label.copy()
    if scaling == (2.0, 0.0):
        wanted[label == 1] = 0
        label = wanted // 2
    if dtype == "uint8" and factor < 0:
        pytest.skip("no negative values")
    stored = (label.astype(np.int64) * factor).astype(dtype)
    write_nifti(
        tmp_path / "labelsTr/liver_0.nii.gz", stored, scaling=scaling, byte_order=">" if ">" in dtype else "<"
    )
    case = prepared(tmp_path)
    assert case.meta.voxel_counts == tuple(np.bincount(wanted.ravel(), minlength=3).tolist())
    if (wanted == label).all():
        np.testing.assert_array_equal(fractions_of(case.views["liver"]), fractions_of(before.views["liver"]))


def test_a_label_with_an_offset_and_empty_slices_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Background is stored as 1 there, so that an empty block is not one of zeros.
    monkeypatch.setattr("pipeline.nifti.stream.BLOCK_BYTES", 1)
    image, label = random_scan()
    write_pair(tmp_path, "liver_0", image, label)
    before = prepared(tmp_path)
    write_nifti(tmp_path / "labelsTr/liver_0.nii.gz", label + 1, scaling=(1.0, -1.0))
    after = prepared(tmp_path)
    assert after.meta.voxel_counts == before.meta.voxel_counts
    np.testing.assert_array_equal(fractions_of(after.views["liver"]), fractions_of(before.views["liver"]))


def test_an_empty_label_gives_the_scan_alone_and_a_note(tmp_path: Path) -> None:
    image, label = random_scan()
    write_pair(tmp_path, "liver_0", image, np.zeros_like(label))
    case = prepared(tmp_path)
    assert list(case.views) == ["scan"]
    assert not fractions_of(case.views["scan"]).any()
    assert "label: has no liver and no tumour" in case.meta.notes
    assert case.meta.voxel_counts == (label.size, 0, 0)


def test_a_label_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_nifti(tmp_path / "imagesTr/liver_0.nii.gz", random_scan((10, 9, 12))[0])
    write_nifti(tmp_path / "labelsTr/liver_0.nii.gz", random_scan((10, 9, 13))[1])
    with pytest.raises(
        LabelError, match=r"has the shape \(10, 9, 13\) \(RAS\), its image .* \(10, 9, 12\) \(RAS\)"
    ):
        prepared(tmp_path)


@pytest.mark.parametrize(
    ("change", "accepted"),
    [
        (lambda affine: affine[:3, 3].__iadd__((0, 0, 0.05)), True),  # a sixteenth of a voxel of 0.8 mm
        (lambda affine: affine[:3, 3].__iadd__((0, 0, 0.1)), False),  # an eighth; a tenth is allowed
        (
            lambda affine: affine[:3, :3].__imul__(1.001),
            True,
        ),  # the far corner, 11 · 2.5 mm away, moves 0.03 mm
        (lambda affine: affine[:3, :3].__imul__(1.01), False),
    ],
)
def test_a_label_elsewhere_in_space_is_refused(
    tmp_path: Path, change: Callable[[NDArray[np.float64]], object], accepted: bool
) -> None:
    image, label = random_scan()
    write_nifti(tmp_path / "imagesTr/liver_0.nii.gz", image)
    affine = oriented_affine("RAS")
    change(affine)
    write_nifti(tmp_path / "labelsTr/liver_0.nii.gz", label, affine)
    if accepted:
        assert prepared(tmp_path).meta.voxel_counts is not None
    else:
        with pytest.raises(LabelError, match=r"its affine puts it \d+\.\d\d mm away from its image liver_0"):
            prepared(tmp_path)


def test_a_label_stored_the_other_way_around_in_the_same_space_is_accepted(tmp_path: Path) -> None:
    image, label = random_scan()
    write_pair(tmp_path, "liver_0", image, label)
    before = prepared(tmp_path)
    affine = oriented_affine("RAS")
    affine[:3, 3] += affine[:3, 0] * (label.shape[0] - 1)
    affine[:3, 0] *= -1
    write_nifti(tmp_path / "labelsTr/liver_0.nii.gz", label[::-1], affine)
    after = prepared(tmp_path)
    np.testing.assert_array_equal(fractions_of(after.views["liver"]), fractions_of(before.views["liver"]))


# --- sources


def test_sources_are_described_as_they_were_when_they_were_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file that is replaced while it is read must not pass for the one that was read: it would never be rebuilt.
    image, label = random_scan()
    image_path, label_path = write_pair(tmp_path, "liver_0", image, label)
    before = image_path.stat(), label_path.stat()

    def replaced_meanwhile(*args: Any, **kwargs: Any) -> Any:
        for path in (image_path, label_path):
            path.rename(path.with_name("old"))
            path.write_bytes(b"something else")
        monkeypatch.undo()
        return image_views(*args, **kwargs)

    image_views = pipeline.prepare._image_views
    monkeypatch.setattr(pipeline.prepare, "_image_views", replaced_meanwhile)
    meta = prepared(tmp_path).meta
    assert (meta.image.path, meta.image.size_bytes, meta.image.mtime_ns) == (
        "imagesTr/liver_0.nii.gz",
        before[0].st_size,
        before[0].st_mtime_ns,
    )
    assert meta.label is not None
    assert (meta.label.size_bytes, meta.label.mtime_ns) == (before[1].st_size, before[1].st_mtime_ns)


def test_a_false_alarm_of_isal_is_decided_by_the_standard_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    igzip = pytest.importorskip("isal.igzip")
    image, label = random_scan()
    write_pair(tmp_path, "liver_0", image, label)
    before = prepared(tmp_path)

    def alarm(*_: object) -> bytes:
        raise EOFError("false alarm")

    monkeypatch.setattr(igzip.GzipFile, "readinto", alarm)
    np.testing.assert_array_equal(prepared(tmp_path).views["scan"].image_zyx, before.views["scan"].image_zyx)
    assert len(read_scan(tmp_path / "imagesTr/liver_0.nii.gz", SPEC).blocks) == 1


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
def test_a_missing_file_is_named(tmp_path: Path, folder: str) -> None:
    image, label = random_scan()
    write_pair(tmp_path, "liver_0", image, label)
    (tmp_path / folder / "liver_0.nii.gz").unlink()
    with pytest.raises(VolumeError, match=f"{folder}/liver_0.nii.gz: cannot be opened: No such file"):
        prepared(tmp_path)


# --- reading ahead


@pytest.mark.parametrize("file_axes", ["LPS", "SAL"])
def test_reading_ahead_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_axes: str
) -> None:
    image, label = random_scan()
    write_pair(tmp_path, "liver_0", image, label, affine=oriented_affine(file_axes))
    monkeypatch.setattr("pipeline.nifti.stream.BLOCK_BYTES", 1)
    files = [tmp_path / folder / "liver_0.nii.gz" for folder in ("imagesTr", "labelsTr")]
    before, after = (
        prepared(tmp_path),
        prepare_case("liver_0", files[0], files[1], SPEC, root=tmp_path, prefetch=True),
    )
    assert before.meta == after.meta
    for name, view in before.views.items():
        np.testing.assert_array_equal(view.image_zyx, after.views[name].image_zyx)
        np.testing.assert_array_equal(fractions_of(view), fractions_of(after.views[name]))


# --- memory

PEAK = """
import sys
from pathlib import Path
from data_cache.schema import PreprocessSpec
from pipeline.prepare import prepare_case
root = Path(sys.argv[1])
image, label, prefetch = root / "imagesTr/a.nii.gz", root / "labelsTr/a.nii.gz", sys.argv[2] == "prefetch"
prepare_case("a", image, label, PreprocessSpec(), root=root, prefetch=prefetch, force=True)
# Not ru_maxrss: that one also counts the process that started this one.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak_mb(root: Path, n_slices: int, *, prefetch: bool) -> float:
    image = np.zeros((256, 256, n_slices), dtype=np.int16)
    label = np.zeros(image.shape, dtype=np.uint8)
    label[80:160, 90:190, 20:80] = 1
    write_pair(root, "a", image, label)
    command = [sys.executable, "-c", PEAK, str(root), "prefetch" if prefetch else "not prefetch"]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(run.stdout) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("prefetch", [False, True])
def test_memory_does_not_follow_the_number_of_slices(tmp_path: Path, prefetch: bool) -> None:
    few, many = (peak_mb(tmp_path / str(n), n, prefetch=prefetch) for n in (100, 400))
    assert many - few < 30  # the larger image has 300 · 256 · 256 · 2 bytes = 39 MB more
