"""Is it a CT in HU, on a grid that a scanner could have made? Every way in which it is not, and what only looks so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import oriented_affine, write_listing, write_nifti
from numpy.typing import NDArray

from data_cache.errors import ImplausibleScanError, VolumeError
from data_cache.geometry import Grid
from data_cache.schema import Crop, PreprocessSpec
from pipeline.build import build
from pipeline.check import check_data_set
from pipeline.decathlon import read_data_set
from pipeline.nifti import VolumeHeader, VolumeStream
from pipeline.prepare import prepare_case
from pipeline.sanity import (
    Doubt,
    Intensities,
    VoxelSample,
    grid_doubts,
    intensity_doubts,
    liver_doubts,
    require_plausible,
)

Hu = NDArray[np.float64]
Edit = Callable[[nib.Nifti1Header], None]

# --- values


def body(seed: int = 0, *, air: float = 0.6, fat: float = 0.12, lung: float = 0.05, bone: float = 0.02) -> Hu:
    """HU of 50 000 voxels of a body in air."""
    rng = np.random.default_rng(seed)
    parts = ((air, -1000, 12), (fat, -100, 20), (lung, -820, 60), (bone, 500, 250))
    drawn = [rng.normal(mean, sd, round(share * 50_000)) for share, mean, sd in parts]
    soft = rng.normal(60, 40, 50_000 - sum(map(len, drawn)))
    values: Hu = np.rint(np.maximum(np.concatenate([*drawn, soft]), -1024))
    return values


def doubts(values: Hu) -> list[Doubt]:
    finite = values[np.isfinite(values)]
    ends = (finite.min(), finite.max()) if finite.size else (np.nan, np.nan)
    return intensity_doubts(
        Intensities(minimum_hu=float(ends[0]), maximum_hu=float(ends[1]), sample_hu=finite)
    )


def faults(values: Hu) -> list[str]:
    return [doubt.what for doubt in doubts(values) if doubt.severity == "fault"]


def padded(values: Hu, padding: float, share: float = 0.2) -> Hu:
    """With a field of view cut into the corners."""
    return np.concatenate([values, np.full(round(share * values.size), padding)])


def noisy(values: Hu, sd: float) -> Hu:
    return values + np.random.default_rng(2).normal(0, sd, values.size)


@pytest.mark.parametrize(
    "values",
    [
        body(),
        np.maximum(noisy(body(), 80), -1024),
        padded(body(), -3024.0),
        padded(body(), -2000.0),
        body(air=0.0, lung=0.0),  # a crop inside the body
        body(air=0.05, fat=0.02),
        body(air=0.3, lung=0.3),  # a chest
        body(bone=0.1, air=0.4),  # a head, or a pelvis with metal
        np.clip(body(), -200, 300),  # clipped, but HU
        np.where(body() < -300, -2048.0, body()),  # the air masked out
        np.concatenate([body(), np.linspace(-1600, -1101, 1000)]),  # streaks of metal
    ],
    ids=["plain", "noise", "-3024", "-2000", "crop", "lean", "chest", "head", "clipped", "masked", "streaks"],
)
def test_bodies_in_hu_have_no_fault(values: Hu) -> None:
    assert faults(values) == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (body() + 1024, "no fat and no air"),
        (padded(body() + 1024, -2000.0), "no fat and no air"),  # the padding does not hide the offset
        (padded(body() + 1000, -3024.0), "no fat and no air"),
        (body() - 1024, "thinner than air"),
        (padded(body() - 1024, -3024.0), "thinner than air"),
        (body() * 4, "thinner than air"),
        (np.interp(body(), (-1024, 1500), (0, 1)), "normalised to 0..1?"),
        (np.interp(body(), (-1024, 1500), (0, 255)), "gray values of a picture?"),
        (np.interp(body(), (-1024, 1500), (-1, 1)), "normalised?"),
        ((body() - body().mean()) / body().std(), "normalised?"),
        (np.clip(body(), 0, 300), "no fat and no air"),
        (np.abs(np.random.default_rng(0).normal(0, 300, 50_000)), "MR or PET"),
        (np.random.default_rng(0).exponential(900, 50_000), "MR or PET"),
        (np.random.default_rng(0).uniform(-1024, 1500, 50_000), "no peak of soft tissue"),
        (np.random.default_rng(0).normal(-250, 280, 50_000), "no peak of soft tissue"),
        (np.where(np.arange(50_000) % 1000, -1000.0, 50.0), "0.1 % of the voxels are fat or soft tissue"),
        (np.linspace(-1010, -990, 1000), "nothing but air"),
        (noisy(body() + 1024, 40), "1250, which only dense bone is"),
        (padded(noisy(body() + 1000, 20), -2000.0), "which only dense bone is"),
        (padded(noisy(body() + 1000, 60), -1000.0, share=0.1), "which only dense bone is"),  # taken for air
        (-body(), "HU times -1?"),
        (noisy(-body(fat=0.3, lung=0.0, bone=0.005), 10), "HU times -1?"),
        (np.full(1000, 7.0), "all voxels of the image are 7"),
        (np.full(1000, np.nan), "no finite voxel"),
    ],
)
def test_what_is_not_hu_is_a_fault(values: Hu, words: str) -> None:
    (what,) = faults(values)
    assert words in what


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.clip(body(), -200, 300), "no air"),
        (np.where(np.arange(50_000) % 100, body(), 3500.0), "too bright"),
        (np.concatenate([body(), [40_000.0]]), "beyond int16"),
    ],
)
def test_what_may_be_hu_is_a_warning(values: Hu, words: str) -> None:
    (doubt,) = doubts(values)
    assert (doubt.severity, words in doubt.what) == ("warning", True)


@pytest.mark.parametrize(("hu", "spread"), [(-25, 60), (60, 100), (250, 20), (395, 5)])
def test_a_liver_may_be_fatty_noisy_or_enhanced(hu: float, spread: float) -> None:
    assert liver_doubts(np.random.default_rng(0).normal(hu, spread, 5000)) == []


def test_lipiodol_in_a_third_of_a_liver_is_no_fault() -> None:
    assert liver_doubts(np.repeat([60.0, 2000.0], [2000, 1000])) == []


@pytest.mark.parametrize("hu", [-1000, -454, -60, 450, 1084])
def test_no_liver_is_this_thin_or_this_dense(hu: float) -> None:
    (doubt,) = liver_doubts(np.full(30, hu))
    assert (doubt.severity, f"the labelled liver is at {hu} (median)" in doubt.what) == ("fault", True)
    assert liver_doubts(np.full(29, hu)) == []  # too few to tell


def test_samples_of_an_image_and_its_label_correspond_however_they_are_cut() -> None:
    values = np.arange(3_000_000)
    whole, parts = VoxelSample(values.shape), VoxelSample(values.shape)
    whole.add(values)
    for part in np.split(values, [1, 2, 1000, 700_001, 700_003]):
        parts.add(part)
    np.testing.assert_array_equal(whole.values(), parts.values())


def test_only_force_takes_what_has_faults() -> None:
    fault, warning = doubts(body() + 1024)[0], doubts(np.clip(body(), -200, 300))[0]
    require_plausible("a.nii", [warning], force=False)
    require_plausible("a.nii", [fault], force=True)
    with pytest.raises(ImplausibleScanError, match=r"a\.nii: values are .*: undo the normalisation.*--force"):
        require_plausible("a.nii", [warning, fault], force=False)


# --- grids


def grid(
    spacing_xyz_mm: tuple[float, float, float], shape_zyx: tuple[int, int, int] = (100, 512, 512)
) -> Grid:
    return Grid.from_array(shape_zyx, np.diag([*spacing_xyz_mm, 1.0]))


@pytest.mark.parametrize(
    "found",
    [
        grid((0.75, 0.75, 2.5)),
        grid((0.98, 0.98, 5.0), (3, 512, 512)),
        grid((1.0, 1.0, 1.0), (200, 300, 400)),  # resampled to 1 mm
        grid((0.8, 0.8, 1.0), (1800, 512, 512)),  # the whole body
    ],
)
def test_grids_of_scanners(found: Grid) -> None:
    assert grid_doubts(found) == []


@pytest.mark.parametrize(
    ("found", "severity", "words"),
    [
        (grid((0.00075, 0.00075, 0.0025)), "fault", "no scanner makes voxels of 0.00075"),  # m, taken for mm
        (grid((750.0, 750.0, 2500.0)), "fault", "no scanner makes"),  # µm, taken for mm
        (grid((0.75, 0.75, 60.0)), "fault", "no scanner makes"),
        (grid((0.75, 0.75, 5.0), (600, 512, 512)), "fault", "384×384×3e+03 mm"),
        (grid((0.075, 0.075, 0.25)), "warning", "unusual"),  # cm
        (grid((2.0, 2.0, 2.5)), "warning", "unusual"),
        (grid((0.75, 0.75, 15.0)), "warning", "unusual"),
        (grid((1.0, 1.0, 1.0)), "warning", "the affine is an identity"),
        (grid((-1.0, -1.0, 1.0)), "warning", "the affine is an identity"),
    ],
)
def test_grids_that_no_body_has(found: Grid, severity: str, words: str) -> None:
    (doubt,) = grid_doubts(found)
    assert (doubt.severity, words in doubt.what) == (severity, True), doubt.what


def test_skewed_axes_are_said() -> None:
    affine = np.diag([0.75, 0.75, 2.5, 1.0])
    affine[1, 2] = 2.5 * np.tan(np.radians(15))
    (doubt,) = grid_doubts(Grid.from_array((100, 512, 512), affine))
    assert "skewed by 15°" in doubt.what


# --- headers


def header_of(path: Path, **options: Any) -> VolumeHeader:
    options.setdefault("affine", oriented_affine("LPS"))
    write_nifti(path / "a.nii", np.zeros((4, 5, 6), np.int16), **options)
    with VolumeStream.open(path / "a.nii") as stream:
        return stream.header


def edited(**values: Any) -> Edit:
    def edit(header: nib.Nifti1Header) -> None:
        for name, value in values.items():
            header[name] = value

    return edit


def pixdim(*spacing: float) -> Edit:
    def edit(header: nib.Nifti1Header) -> None:
        header["pixdim"][1:4] = spacing

    return edit


@pytest.mark.parametrize(("code", "name", "mm"), [(1, "meters", 1000.0), (3, "micrometers", 0.001)])
@pytest.mark.parametrize("codes", [(1, 1), (1, 0), (0, 1), (0, 0)])
def test_other_units_are_converted(
    tmp_path: Path, code: int, name: str, mm: float, codes: tuple[int, int]
) -> None:
    in_mm = header_of(tmp_path, codes=codes)
    affine = np.diag([1 / mm] * 3 + [1.0]) @ oriented_affine("LPS")
    # The time's unit (8: seconds) is in the same byte.
    found = header_of(tmp_path, codes=codes, affine=affine, edit=edited(xyzt_units=code + 8))
    np.testing.assert_allclose(found.grid.affine, in_mm.grid.affine, rtol=1e-5, atol=1e-3)
    assert found.notes[0] == f"lengths are in {name} in the header: converted to mm"
    assert found.notes[1:] == in_mm.notes


@pytest.mark.parametrize("code", [0, 4, 7, 255])
def test_a_unit_that_is_not_stated_is_said(tmp_path: Path, code: int) -> None:
    (note,) = header_of(tmp_path, edit=edited(xyzt_units=code)).notes
    assert "does not state its unit" in note


def other_qform(affine: NDArray[np.float64]) -> Edit:
    return lambda header: header.set_qform(affine, code=1)


def test_affines_that_disagree_are_said(tmp_path: Path) -> None:
    right = oriented_affine("LPS")
    mirrored, moved, near, turned = right.copy(), right.copy(), right.copy(), oriented_affine("PLS")
    mirrored[0] *= -1
    moved[2, 3] += 40
    near[2, 3] += 1.5  # of a voxel of 2.5 mm
    assert header_of(tmp_path, edit=other_qform(right)).notes == ()
    assert header_of(tmp_path, edit=other_qform(near)).notes == ()
    (note,) = header_of(tmp_path, edit=other_qform(moved)).notes
    assert "sform and qform disagree (by up to 40 mm)" in note
    (note,) = header_of(tmp_path, edit=other_qform(mirrored)).notes
    assert "sform and qform disagree (axes LPS and RPS: mirrored or turned)" in note
    notes = header_of(tmp_path, edit=other_qform(turned)).notes
    assert any("axes LPS and PLS" in note for note in notes)


def test_a_tilted_gantry_is_no_disagreement(tmp_path: Path) -> None:
    affine = oriented_affine("LPS")
    affine[1, 2] = 0.6

    def as_dcm2niix(header: nib.Nifti1Header) -> None:
        header.set_sform(affine, code=1)
        header.set_qform(affine, code=1, strip_shears=True)

    assert not any("disagree (" in note for note in header_of(tmp_path, edit=as_dcm2niix).notes)


@pytest.mark.parametrize("spacing", [(0, 0.9, 2.5), (-0.8, 0.9, 2.5), (np.nan, 0.9, 2.5), (0.8, np.inf, 2.5)])
def test_a_spacing_that_is_none(tmp_path: Path, spacing: tuple[float, ...]) -> None:
    # The sform has a spacing of its own: that of pixdim is said, and not used.
    notes = header_of(tmp_path, codes=(1, 0), edit=pixdim(*spacing)).notes
    assert any("disagrees with the sform's 0.8×0.9×2.5 mm" in note for note in notes)
    # Without it there is none: nibabel would make 1 mm of the zero, and 0.8 of the -0.8.
    for codes in ((0, 1), (0, 0)):
        with pytest.raises(VolumeError, match="has no usable affine"):
            header_of(tmp_path, codes=codes, edit=pixdim(*spacing))


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_an_affine_with_a_column_that_is_none(tmp_path: Path, value: float) -> None:
    def spoiled(header: nib.Nifti1Header) -> None:
        header["srow_x"], header["srow_y"], header["srow_z"] = ([value, *row[1:]] for row in np.eye(4)[:3])

    # The qform is taken instead, and that is said; without it the file is refused.
    assert header_of(tmp_path, codes=(1, 1), edit=spoiled).notes[0].startswith("sform is ")

    def without_spacing(header: nib.Nifti1Header) -> None:
        spoiled(header)
        header["pixdim"][1:4] = 0

    with pytest.raises(VolumeError, match="has no usable affine"):
        header_of(tmp_path, codes=(1, 1), edit=without_spacing)


# --- who asks


SPEC = PreprocessSpec(shape_zyx=(6, 5, 4))


def raw_of(root: Path, values: NDArray[Any], **options: Any) -> Path:
    label = np.zeros(values.shape, np.uint8)
    label[3:6, 3:6, 3:6] = 1
    write_nifti(root / "imagesTr" / "liver_0.nii.gz", values, **options)
    write_nifti(root / "labelsTr" / "liver_0.nii.gz", label, affine=options.get("affine"))
    write_listing(root, ["liver_0"])
    return root


def small_body() -> NDArray[np.int16]:
    return body()[np.random.default_rng(1).permutation(50_000)[:1200]].reshape(10, 10, 12).astype(np.int16)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
@pytest.mark.parametrize("scaling", [(1.0, 0.0), (2.0, -100.0)])
def test_preprocess_refuses_unless_forced(tmp_path: Path, dtype: Any, scaling: tuple[float, float]) -> None:
    stored = (small_body().astype(np.float64) + 1024 - scaling[1]) / scaling[0]
    raw = read_data_set(raw_of(tmp_path / "raw", stored.astype(dtype), scaling=scaling))
    (result,) = build(raw, tmp_path / "cache.zarr", SPEC, jobs=1, report=lambda _: None)
    assert (result.outcome, "no fat and no air" in result.message) == ("failed", True)
    (result,) = build(raw, tmp_path / "cache.zarr", SPEC, jobs=1, report=lambda _: None, force=True)
    assert result.outcome == "done"
    assert any("no fat and no air" in note for note in result.notes)


@pytest.mark.parametrize("crop", ["box", "depth"])
@pytest.mark.parametrize("axes", ["LPS", "PSR"])
def test_a_liver_that_cannot_be_one_is_refused_by_preprocess_and_check(
    tmp_path: Path, crop: Crop, axes: str
) -> None:
    values = np.random.default_rng(3).permutation(body())[:48_000].reshape(40, 40, 30)
    label = np.zeros(values.shape, np.uint8)
    label[10:30, 10:30, 10:20], values[8:32, 8:32, 8:22] = 1, 60
    label[14:20, 14:20, 12:16], values[14:20, 14:20, 12:16] = 2, 900  # lipiodol in a tumour
    for name, image in (("good", values), ("elsewhere", np.where(label == 1, -820, values))):
        write_nifti(tmp_path / "imagesTr" / f"{name}.nii.gz", image.astype(np.int16), oriented_affine(axes))
        write_nifti(tmp_path / "labelsTr" / f"{name}.nii.gz", label, oriented_affine(axes))
    write_listing(tmp_path, ["good", "elsewhere"])
    raw, spec = read_data_set(tmp_path), PreprocessSpec(shape_zyx=(20, 40, 40), crop=crop)
    results = build(raw, tmp_path / "c.zarr", spec, jobs=1, report=lambda _: None)
    assert {r.case_id: r.outcome for r in results} == {"good": "done", "elsewhere": "failed"}
    (message,) = (r.message for r in results if r.outcome == "failed")
    assert "the labelled liver is at -820 (median), expected -40 to 400 HU" in message
    findings = check_data_set(tmp_path, jobs=1, report=lambda *_: None)
    assert [f.case for f in findings if "the labelled liver is at -820" in f.what] == ["elsewhere"]
    assert [f.case for f in findings if f.severity == "fault"] == ["elsewhere"]
    results = build(raw, tmp_path / "c.zarr", spec, jobs=1, report=lambda _: None, force=True)
    assert any("the labelled liver is at -820" in note for result in results for note in result.notes)


def test_preprocess_refuses_a_grid_that_cannot_be(tmp_path: Path) -> None:
    affine = np.diag([600.0, 600.0, 900.0, 1.0])
    files = raw_of(tmp_path, small_body(), affine=affine)
    image, label = (files / folder / "liver_0.nii.gz" for folder in ("imagesTr", "labelsTr"))
    with pytest.raises(ImplausibleScanError, match="no scanner makes voxels of 600×600×900 mm"):
        prepare_case("liver_0", image, label, SPEC, root=files)
    case = prepare_case("liver_0", image, label, SPEC, root=files, force=True)
    assert any("no scanner makes" in note for note in case.meta.notes)
