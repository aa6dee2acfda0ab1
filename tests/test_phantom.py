"""The phantom: an exact Decathlon folder, the same bytes every time, and a liver that could be one."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from data_cache.errors import DataSetError
from pipeline.phantom import PhantomSpec, draw_anatomy, render, write_phantoms
from pipeline.phantom.anatomy import Anatomy, DomainShift
from pipeline.phantom.dataset import _noise_slice
from pipeline.phantom.implicit import Points, ellipsoid, random_field, tube

SMALL = PhantomSpec(shape_xyz=(48, 48, 48))
Rendered = tuple[Anatomy, NDArray[np.int16], NDArray[np.uint8]]


def drawn(seed: int, spec: PhantomSpec = SMALL) -> Anatomy:
    return draw_anatomy(spec, rng=np.random.default_rng(seed))


@pytest.fixture(scope="module")
def rendered() -> list[Rendered]:
    patients = [drawn(seed) for seed in range(8)]
    return [(patient, *render(patient)[:2]) for patient in patients]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = tmp_path_factory.mktemp("raw")
    write_phantoms(raw, cases=4, tests=2, shape_xyz=(48, 48, 32), seed=5, jobs=1)
    return raw


def axes_of(path: Path) -> str:
    return "".join(nib.aff2axcodes(nib.Nifti1Image.from_filename(path).affine))


def center_mm(mask_xyz: NDArray[np.bool_], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    center: NDArray[np.float64] = affine[:3, :3] @ np.argwhere(mask_xyz).mean(axis=0) + affine[:3, 3]
    return center


# --- The folder --------------------------------------------------------------------------------------------------


def test_dataset_json_lists_exactly_the_files_of_the_folder(folder: Path) -> None:
    listing = json.loads((folder / "dataset.json").read_text())
    named = [entry[kind] for entry in listing["training"] for kind in ("image", "label")] + listing["test"]
    on_disk = {f"./{path.relative_to(folder).as_posix()}" for path in folder.rglob("*") if path.is_file()}
    assert sorted(named) == sorted(on_disk - {"./dataset.json"})
    assert (listing["numTraining"], listing["numTest"]) == (4, 2)
    assert listing["labels"] == {"0": "background", "1": "liver", "2": "cancer"}
    assert listing["training"][3] == {
        "image": "./imagesTr/liver_3.nii.gz",
        "label": "./labelsTr/liver_3.nii.gz",
    }
    assert listing["test"] == ["./imagesTs/liver_4.nii.gz", "./imagesTs/liver_5.nii.gz"]


def test_nothing_is_left_aside(folder: Path) -> None:
    assert [path for path in folder.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"] == []


def test_bytes_depend_neither_on_the_number_of_cases_nor_of_jobs(folder: Path, tmp_path: Path) -> None:
    told: list[str] = []
    written = write_phantoms(
        tmp_path, cases=2, tests=1, shape_xyz=(48, 48, 32), seed=5, jobs=2, progress=told.append
    )
    assert sorted(told) == ["liver_0", "liver_1", "liver_2"]
    assert written == [
        tmp_path / f"images{part}/liver_{n}.nii.gz" for n, part in enumerate(("Tr", "Tr", "Ts"))
    ]
    for name in ("imagesTr/liver_0", "labelsTr/liver_0", "imagesTr/liver_1", "labelsTr/liver_1"):
        assert (tmp_path / f"{name}.nii.gz").read_bytes() == (folder / f"{name}.nii.gz").read_bytes()
    # Case 2 is a test here and a training case there: the image is the same.
    in_tests, in_training = tmp_path / "imagesTs/liver_2.nii.gz", folder / "imagesTr/liver_2.nii.gz"
    assert in_tests.read_bytes() == in_training.read_bytes()


def test_another_seed_gives_another_patient() -> None:
    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_headers_say_where_and_in_what_unit(folder: Path) -> None:
    for kind, dtype in (("imagesTr", np.int16), ("labelsTr", np.uint8)):
        nifti = nib.Nifti1Image.from_filename(folder / kind / "liver_1.nii.gz")
        assert nifti.get_data_dtype() == dtype
        assert nifti.header.get_xyzt_units()[0] == "mm"
        assert (int(nifti.header["sform_code"]), int(nifti.header["qform_code"])) == (1, 1)
        np.testing.assert_allclose(nifti.get_qform(), nifti.get_sform(), atol=1e-3)
        np.testing.assert_allclose(nifti.header.get_zooms(), np.abs(np.diag(nifti.affine))[:3], rtol=1e-6)


def test_half_of_the_files_are_lps_and_half_ras(folder: Path) -> None:
    for kind in ("imagesTr", "labelsTr"):
        assert [axes_of(folder / kind / f"liver_{n}.nii.gz") for n in range(4)] == [
            "LPS",
            "RAS",
            "LPS",
            "RAS",
        ]


def test_gzip_header_holds_no_time(folder: Path) -> None:
    content = (folder / "imagesTr/liver_0.nii.gz").read_bytes()
    assert content[4:8] == b"\0\0\0\0"
    assert len(gzip.decompress(content)) == 352 + 48 * 48 * 32 * 2


@pytest.mark.parametrize("number", [0, 1])
def test_liver_is_on_the_patients_right_in_either_orientation(folder: Path, number: int) -> None:
    image = nib.Nifti1Image.from_filename(folder / f"imagesTr/liver_{number}.nii.gz")
    label = nib.Nifti1Image.from_filename(folder / f"labelsTr/liver_{number}.nii.gz")
    np.testing.assert_array_equal(image.affine, label.affine)
    liver = center_mm(np.asarray(label.dataobj) > 0, image.affine)
    hu = np.asarray(image.dataobj)
    body = center_mm((hu > -200) & (hu < 300), image.affine)
    # +x of RAS+ is the right; the spine's bone lies behind the liver, which is then in front (+y).
    assert liver[0] - body[0] > 20.0
    assert liver[1] - center_mm(hu > 400, image.affine)[1] > 5.0


def test_lps_file_holds_the_rendered_arrays_turned(folder: Path) -> None:
    image, _, grid = render(
        draw_anatomy(PhantomSpec(shape_xyz=(48, 48, 32)), rng=np.random.default_rng((5, 0)))
    )
    canonical = nib.as_closest_canonical(nib.Nifti1Image.from_filename(folder / "imagesTr/liver_0.nii.gz"))
    np.testing.assert_array_equal(np.asarray(canonical.dataobj).transpose(2, 1, 0), image)
    np.testing.assert_allclose(canonical.affine, grid.affine, atol=1e-3)


def test_impossible_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"negative, got -1"):
        write_phantoms(tmp_path, cases=-1, tests=0)
    with pytest.raises(ValueError, match=r"at least 8 voxels .* \(48, 48, 1\)"):
        PhantomSpec(shape_xyz=(48, 48, 1))


# --- The patient -------------------------------------------------------------------------------------------------


def test_livers_have_a_livers_volume(rendered: list[Rendered]) -> None:
    volumes_ml = [float((label > 0).sum()) * patient.grid.voxel_volume_ml for patient, _, label in rendered]
    assert min(volumes_ml) > 1000.0
    assert max(volumes_ml) < 2200.0
    assert np.ptp(volumes_ml) > 200.0


def test_liver_is_one_piece_within_the_scan(rendered: list[Rendered]) -> None:
    for _, _, label in rendered:
        liver = label > 0
        pieces, count = ndimage.label(liver)
        largest = np.bincount(pieces.ravel())[1:].max()
        assert count >= 1
        assert largest > 0.98 * liver.sum()
        assert not liver[[0, -1]].any()


def test_liver_reaches_across_the_midline(rendered: list[Rendered]) -> None:
    for patient, _, label in rendered:
        x_mm = patient.origin_xyz_mm[0] + patient.spacing_xyz_mm[0] * np.flatnonzero(
            (label > 0).any(axis=(0, 1))
        )
        assert x_mm.min() < -28.0
        assert x_mm.max() > 90.0


def test_hu_inside_the_liver_is_that_of_its_phase(rendered: list[Rendered]) -> None:
    for patient, image, label in rendered:
        inside = ndimage.binary_erosion(label == 1, iterations=2)
        median_hu = float(np.median(image[inside]))
        assert 60.0 <= patient.hu.liver <= 140.0
        assert abs(median_hu - patient.hu.liver) < 12.0
        assert 8.0 < float(image[inside].std()) < 45.0


def test_tumours_differ_from_the_liver_as_drawn(rendered: list[Rendered]) -> None:
    checked = 0
    for patient, image, label in rendered:
        liver_hu = float(np.median(image[label == 1]))
        contrasts = {np.sign(tumour.contrast_hu) for tumour in patient.tumours}
        if (label == 2).sum() < 30 or len(contrasts) != 1:
            continue
        core = float(np.median(image[label == 2]))
        assert (core - liver_hu) * contrasts.pop() > 15.0
        checked += 1
    assert checked >= 2


def test_labels_are_0_1_2(rendered: list[Rendered]) -> None:
    assert [set(np.unique(label)) <= {0, 1, 2} for _, _, label in rendered] == [True] * len(rendered)
    assert any((label == 2).any() for _, _, label in rendered)


def test_tumours_replace_liver_and_nothing_else(rendered: list[Rendered]) -> None:
    with_tumours = [(patient, label) for patient, _, label in rendered if (label == 2).any()][:3]
    assert with_tumours
    for patient, label in with_tumours:
        _, healthy, _ = render(replace(patient, tumours=()))
        assert not (healthy == 2).any()
        np.testing.assert_array_equal(label > 0, healthy > 0)


def test_some_tumours_touch_the_border_and_some_do_not(rendered: list[Rendered]) -> None:
    touching, count = 0, 0
    for _, _, label in rendered:
        lesions, found = ndimage.label(label == 2)
        touching += np.unique(lesions[(label == 2) & ndimage.binary_dilation(label == 0)]).size
        count += found
    assert 0.2 * count < touching < 0.8 * count


def test_number_and_size_of_tumours_follow_the_decathlon() -> None:
    patients = [drawn(seed) for seed in range(80)]
    counts = np.array([len(patient.tumours) for patient in patients])
    diameters_mm = np.array([2 * np.prod(t.radii_mm) ** (1 / 3) for p in patients for t in p.tumours])
    dark = np.mean([t.contrast_hu < 0 for p in patients for t in p.tumours])
    assert counts.max() <= 8
    assert 0.04 < np.mean(counts == 0) < 0.25
    assert diameters_mm.min() > 3.99
    assert diameters_mm.max() < 60.01
    assert 13.0 < np.median(diameters_mm) < 20.0
    assert 0.6 < dark < 0.9


def test_scans_vary_within_what_scanners_do() -> None:
    patients = [drawn(seed, PhantomSpec(shape_xyz=(64, 64, 96))) for seed in range(40)]
    fields_mm = np.array([p.spacing_xyz_mm[0] * 64 for p in patients])
    thickness_mm = np.array([p.spacing_xyz_mm[2] for p in patients])
    assert fields_mm.min() >= 299.9
    assert fields_mm.max() <= 420.1
    assert thickness_mm.min() >= 1.0
    assert thickness_mm.max() <= 5.0
    assert np.unique(thickness_mm).size > 3
    assert {p.padding_hu for p in patients} == {None, -1024, -2048, -3024}
    assert {p.phase for p in patients} == {"native", "arterial", "portal", "delayed"}


def test_padding_fills_the_corners_and_nothing_else(rendered: list[Rendered]) -> None:
    padded = [(p.padding_hu, image) for p, image, _ in rendered if p.padding_hu in (-2048, -3024)]
    assert padded
    for padding_hu, image in padded:
        assert (image[:, 0, 0] == padding_hu).all()
        assert image[image != padding_hu].min() >= -1024


def test_slabs_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    patient = drawn(3, PhantomSpec(shape_xyz=(40, 36, 24)))
    at_once = render(patient)
    monkeypatch.setattr("pipeline.phantom.dataset._SLAB_VOXELS", 5 * 40 * 36)
    in_slabs = render(patient)
    np.testing.assert_array_equal(at_once[0], in_slabs[0])
    np.testing.assert_array_equal(at_once[1], in_slabs[1])
    assert at_once[0].shape == (24, 36, 40) == at_once[2].shape_zyx


def test_noise_is_as_strong_as_drawn_and_correlated() -> None:
    patient = drawn(0, PhantomSpec(shape_xyz=(128, 128, 8)))
    here, above = _noise_slice(patient, 3), _noise_slice(patient, 4)
    assert float(here.std()) == pytest.approx(1.0, abs=0.05)
    assert float((here[:, 1:] * here[:, :-1]).mean()) > 0.01
    # Weights (s, 1, s) share 2s of 1 + 2s² with the next slice: 0.7 / 1.245 = 0.56.
    assert float((here * above).mean()) == pytest.approx(0.56, abs=0.06)


# --- Solids and fields -------------------------------------------------------------------------------------------


def lattice(*axes_mm: list[float]) -> Points:
    x, y, z = (np.array(axis, dtype=np.float32) for axis in axes_mm)
    return Points.lattice((x, y, z))


def test_distances_of_a_sphere_and_a_tube_by_hand() -> None:
    points = lattice([0.0, 3.0, 10.0], [4.0], [0.0])
    # A sphere of radius 5: at (3, 4) on its surface; at (10, 4) sqrt(116) - 5 = 5.77 outside.
    np.testing.assert_allclose(ellipsoid(points, (0, 0, 0), (5, 5, 5)).ravel(), [-1.0, 0.0, 5.770], atol=2e-3)
    # A tube along x from 0 to 6, radius 1: 4 - 1 above it, then beyond its end (4, 4) away: 5.657 - 1.
    distance = tube(points, (0, 0, 0), (6, 0, 0), radii_mm=(1, 1))
    np.testing.assert_allclose(distance.ravel(), [3.0, 3.0, 4.657], atol=2e-3)


def test_random_field_is_standard_smooth_and_fixed_in_space() -> None:
    axis = np.arange(-100.0, 100.0, 4.0, dtype=np.float32)
    field = random_field(Points.lattice((axis, axis, axis)), (7, 1), spacing_mm=12.0)
    assert abs(float(field.mean())) < 0.15
    assert float(field.std()) == pytest.approx(1.0, abs=0.15)
    assert float(np.abs(np.diff(field, axis=0)).mean()) < 0.5
    part = random_field(Points.lattice((axis[10:20], axis[:30], axis[5:6])), (7, 1), spacing_mm=12.0)
    np.testing.assert_array_equal(part, field[5:6, :30, 10:20])


def test_nothing_but_the_same_phantoms_is_overwritten(tmp_path: Path) -> None:
    write = partial(write_phantoms, tmp_path, tests=0, shape_xyz=(16, 16, 16), jobs=1)
    write(cases=1, seed=0)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    write(cases=1, seed=0)  # the same again: as an interrupted run is finished
    for cases, seed in ((2, 0), (1, 1)):
        with pytest.raises(DataSetError, match="holds another data set, or phantoms with other settings"):
            write(cases=cases, seed=seed)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "dataset.json").write_text('{"name": "patients"}')
    with pytest.raises(DataSetError, match="name another folder"):
        write(cases=1, seed=0)


@pytest.mark.parametrize("kind", get_args(DomainShift))
def test_a_phantom_with_a_domain_shift_is_the_same_patient(kind: DomainShift) -> None:
    seed = max(range(9), key=lambda seed: max((t.radii_mm[0] for t in drawn(seed).tumours), default=0.0))
    usual, unusual = drawn(seed), drawn(seed, replace(SMALL, domain_shift=kind))
    (image, label, grid), (other, same, other_grid) = render(usual), render(unusual)
    assert np.array_equal(label, same)
    assert grid == other_grid
    tumour, liver = label == 2, label == 1
    assert np.count_nonzero(tumour) > 50
    if kind == "noise":
        # Noise of the same voxels, twice: what is added once more is as large as what was there.
        added = (other.astype(np.float64) - image)[liver].std()
        assert added == pytest.approx(usual.noise_hu * 0.8, rel=0.35)
    elif kind == "contrast":
        assert abs(other[tumour].mean() - other[liver].mean()) == pytest.approx(
            abs(image[tumour].mean() - image[liver].mean()), abs=15
        )
        assert abs(unusual.hu.aorta - 55) == pytest.approx(abs(usual.hu.aorta - 55) / 4)
    else:
        assert other[tumour].mean() - image[liver].mean() > 60
        assert np.array_equal(
            other[~ndimage.binary_dilation(tumour, iterations=3)],
            image[~ndimage.binary_dilation(tumour, iterations=3)],
        )


def test_phantoms_that_are_unlike_others_say_so(tmp_path: Path) -> None:
    write_phantoms(tmp_path, cases=1, tests=0, shape_xyz=(16, 16, 16), domain_shift="noise", jobs=1)
    assert "domain shift in noise" in json.loads((tmp_path / "dataset.json").read_text())["description"]
