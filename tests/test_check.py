"""``liverseg check``: every planted fault is named, alone and all at once, and a sound data set has none."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conftest
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import oriented_affine, random_scan, write_listing
from numpy.typing import NDArray

from liverseg.cli import main
from pipeline.check import check_data_set
from pipeline.listing import Finding
from pipeline.workers import Failure, run_parallel

CASES = ("liver_0", "liver_1", "liver_2")
LABELS = {"0": "background", "1": "liver", "2": "cancer"}
COUNTS = {"numTraining": 3, "numTest": 0, "labels": LABELS}
SHAPE = (10, 9, 12)
SPACING_IJK_MM = (11.0, 12.0, 4.0)  # of so few voxels, as wide as a body


def write_nifti(
    path: Path, values: NDArray[Any], affine: NDArray[np.float64] | None = None, **options: Any
) -> None:
    conftest.write_nifti(
        path, values, oriented_affine("RAS", SPACING_IJK_MM) if affine is None else affine, **options
    )


def scan(seed: int) -> NDArray[np.int16]:
    """Fat and soft tissue in air, and some bone."""
    rng = np.random.default_rng(seed)
    image = rng.normal(-1000, 15, SHAPE)
    image[2:-2, 2:-2] = rng.normal(60, 20, (6, 5, 12))
    image[2, 2:-2] = rng.normal(-100, 10, (5, 12))
    image[4, 4] = 900
    return image.astype(np.int16)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for seed, case_id in enumerate(CASES):
        write_nifti(tmp_path / "imagesTr" / f"{case_id}.nii.gz", scan(seed))
        write_nifti(tmp_path / "labelsTr" / f"{case_id}.nii.gz", random_scan(SHAPE)[1])
    write_listing(tmp_path, CASES, **COUNTS)
    return tmp_path


def findings(raw: Path, *, jobs: int = 1) -> list[Finding]:
    return check_data_set(raw, jobs=jobs, report=lambda *_: None)


def told(raw: Path) -> list[tuple[str, str]]:
    return [(finding.case, finding.severity) for finding in findings(raw)]


def only(raw: Path) -> Finding:
    (finding,) = findings(raw)
    return finding


def image(raw: Path, number: int = 1) -> Path:
    return raw / "imagesTr" / f"liver_{number}.nii.gz"


def label(raw: Path, number: int = 1) -> Path:
    return raw / "labelsTr" / f"liver_{number}.nii.gz"


def test_a_sound_data_set_has_no_finding(raw: Path) -> None:
    assert findings(raw) == []


def test_phantoms_have_no_finding(phantoms: Path) -> None:
    assert findings(phantoms) == []


def test_the_real_cts_have_no_fault(real_data: Path) -> None:
    assert [finding for finding in findings(real_data) if finding.severity == "fault"] == []


# --- Files


@pytest.mark.parametrize("which", [image, label])
def test_missing_file(raw: Path, which: Callable[[Path], Path]) -> None:
    which(raw).unlink()
    found = only(raw)
    assert (found.case, found.severity) == ("liver_1", "fault")
    folder = "its folder holds liver_0.nii.gz, liver_2.nii.gz"
    assert found.what == f"{which(raw).relative_to(raw)} is missing; {folder}"


def test_extra_files_are_warnings_and_litter_is_none(raw: Path) -> None:
    shutil.copy(label(raw), raw / "labelsTr" / "liver_9.nii.gz")
    (raw / "imagesTr" / "liver_3.nii.gz.part").write_bytes(b"half")
    (raw / "imagesTr" / "._liver_1.nii.gz").write_bytes(b"litter")
    assert told(raw) == [
        ("imagesTr/liver_3.nii.gz.part", "warning"),
        ("labelsTr/liver_9.nii.gz", "warning"),
    ]


@pytest.mark.parametrize("which", [image, label])
def test_truncated_file(raw: Path, which: Callable[[Path], Path]) -> None:
    which(raw).write_bytes(which(raw).read_bytes()[:-40])
    found = only(raw)
    assert (found.case, found.severity) == ("liver_1", "fault")
    assert which(raw).name in found.what


def test_flipped_bit_in_the_checksum(raw: Path) -> None:
    damaged = bytearray(image(raw).read_bytes())
    damaged[-6] ^= 1
    image(raw).write_bytes(damaged)
    assert "damaged gzip data" in only(raw).what


def test_no_nifti_at_all(raw: Path) -> None:
    image(raw).write_bytes(gzip.compress(b"nothing of the kind" * 100))
    assert "is not a NIfTI file" in only(raw).what


def test_two_dimensional_image(raw: Path) -> None:
    write_nifti(image(raw), scan(1)[:, :, 0])
    assert "not that of one 3-D volume" in only(raw).what


# --- Grids


def test_label_of_another_shape(raw: Path) -> None:
    write_nifti(label(raw), random_scan((10, 9, 11))[1])
    found = only(raw)
    assert found.severity == "fault"
    assert "(10, 9, 11)" in found.what
    assert "find the label of this scan" in found.remedy


@pytest.mark.parametrize(("shift_mm", "n_faults"), [(0.3, 0), (0.5, 1)])
def test_affine_within_and_beyond_a_tenth_of_a_voxel(raw: Path, shift_mm: float, n_faults: int) -> None:
    # The smallest spacing is 4 mm: 0.4 mm are allowed.
    affine = oriented_affine("RAS", SPACING_IJK_MM)
    affine[0, 3] += shift_mm
    write_nifti(label(raw), random_scan(SHAPE)[1], affine)
    assert told(raw) == [("liver_1", "fault")] * n_faults


def test_notes_of_a_header_are_warnings(raw: Path) -> None:
    def edit(header: Any) -> None:
        header["pixdim"][1:4] = 7

    write_nifti(image(raw), scan(1), codes=(1, 0), edit=edit)
    found = only(raw)
    assert found.severity == "warning"
    assert "pixdim 7×7×7 mm disagrees" in found.what


# --- Values


def test_label_values(raw: Path) -> None:
    values = random_scan(SHAPE)[1]
    values[0, 0, 0], values[1, 1, 11] = 3, 7
    write_nifti(label(raw), values)
    assert "holds 3 (1 from 2), 7 (5 from 2)" in only(raw).what


def test_a_label_of_half_a_voxel_is_not_rounded_away(raw: Path) -> None:
    values = random_scan(SHAPE)[1].astype(np.float32)
    values[0, 0, 0] = 0.5
    write_nifti(label(raw), values)
    assert "holds 0.5 (0.5 from 0)" in only(raw).what


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (np.zeros(SHAPE, np.uint8), "no liver and no tumour"),
        (2 * (random_scan(SHAPE)[1] > 0).astype(np.uint8), "tumour (2) but no liver"),
    ],
)
def test_empty_labels_are_warnings(raw: Path, values: NDArray[np.uint8], text: str) -> None:
    write_nifti(label(raw), values)
    found = only(raw)
    assert found.severity == "warning"
    assert text in found.what


def scaled(seed: int, low: float, high: float) -> NDArray[np.float32]:
    hu = scan(seed).astype(np.float32)
    return np.interp(hu, (hu.min(), hu.max()), (low, high)).astype(np.float32)


@pytest.mark.parametrize(
    ("values", "severity", "text"),
    [
        (scaled(1, 0, 1), "fault", "normalised to 0..1?"),
        (scaled(1, 0, 255), "fault", "gray values"),
        (scaled(1, -2, 3), "fault", "normalised?"),
        (np.clip(scan(1) + 1024, 0, None).astype(np.int16), "fault", "HU + 1024"),
        (np.full(SHAPE, -1000, np.int16), "fault", "all voxels of the image are -1000"),
        ((scan(1) // 50 - 1000).astype(np.int16), "fault", "nothing but air"),
        (np.full(SHAPE, np.nan, np.float32), "warning", "1080 NaN or infinite"),
        (np.clip(scan(1), -200, 300), "warning", "no air"),
        (scan(1) * 4, "warning", "too bright"),
        (np.where(scan(1) > 800, 40_000, scan(1).astype(np.int32)), "warning", "beyond int16"),
    ],
)
def test_intensities_that_are_no_hu(raw: Path, values: NDArray[Any], severity: str, text: str) -> None:
    write_nifti(image(raw), values)
    assert any(f.severity == severity and text in f.what for f in findings(raw)), findings(raw)


@pytest.mark.parametrize(
    ("values", "options"),
    [
        (np.where(scan(1) < -900, -3024, scan(1)).astype(np.int16), {}),  # padding
        ((np.maximum(scan(1), -1024) + 1024).astype(np.uint16), {"scaling": (1.0, -1024.0)}),
        ((-scan(1)).astype(np.int16), {"scaling": (-1.0, 0.0)}),
        (scan(1).astype(np.float32), {"byte_order": ">"}),
    ],
)
def test_intensities_that_are_hu_however_stored(
    raw: Path, values: NDArray[Any], options: dict[str, Any]
) -> None:
    write_nifti(image(raw), values, **options)
    assert findings(raw) == []


def test_some_nan_are_counted(raw: Path) -> None:
    values = scan(1).astype(np.float32)
    values[0, 0, :2] = np.nan, np.inf
    write_nifti(image(raw), values)
    assert only(raw).what == "the image has 2 NaN or infinite voxels"


# --- Duplicates


def test_the_same_image_compressed_otherwise(raw: Path) -> None:
    voxels = gzip.decompress(image(raw, 0).read_bytes())
    image(raw, 2).write_bytes(gzip.compress(voxels, compresslevel=1))
    found = only(raw)
    assert (found.case, found.severity) == ("liver_2", "fault")
    assert found.what == "has the same voxels as liver_0"


def test_a_copy_among_the_unlabelled_is_a_warning(raw: Path) -> None:
    (raw / "imagesTs").mkdir()
    shutil.copy(image(raw), raw / "imagesTs" / "liver_7.nii.gz")
    write_listing(raw, CASES, **{**COUNTS, "test": ["./imagesTs/liver_7.nii.gz"], "numTest": 1})
    assert told(raw) == [("imagesTs/liver_7.nii.gz", "warning")]


# --- dataset.json


@pytest.mark.parametrize(
    ("changes", "severity", "text"),
    [
        ({"numTraining": 131}, "fault", "numTraining is 131, but 3 are listed"),
        ({"numTest": 70}, "fault", "numTest is 70, but 0 are listed"),
        ({"labels": {"0": "background", "1": "cancer", "2": "liver"}}, "fault", "swapped"),
        ({"labels": {"0": "background", "1": "liver"}}, "warning", "expected 0 background, 1 liver"),
        ({"labels": None}, "warning", "no label names"),
    ],
)
def test_dataset_json_against_what_it_lists(
    raw: Path, changes: dict[str, Any], severity: str, text: str
) -> None:
    write_listing(raw, CASES, **{**COUNTS, **changes})
    found = only(raw)
    assert (found.case, found.severity) == ("dataset.json", severity)
    assert text in found.what


def test_liver_tumour_is_a_tumour(raw: Path) -> None:
    labels = {"0": "background", "1": "liver", "2": "liver tumor"}
    write_listing(raw, CASES, **{**COUNTS, "labels": labels})
    assert findings(raw) == []


def test_a_label_of_another_name_and_one_used_twice(raw: Path) -> None:
    content = json.loads((raw / "dataset.json").read_text())
    content["training"][2]["label"] = "./labelsTr/liver_1.nii.gz"
    (raw / "dataset.json").write_text(json.dumps(content))
    assert told(raw) == [
        ("labelsTr/liver_2.nii.gz", "warning"),
        ("liver_2", "fault"),
        ("liver_2", "warning"),
    ]


@pytest.mark.parametrize("text", ["{", "[]", '{"training": [{"image": 3}]}'])
def test_a_broken_dataset_json_does_not_hide_the_files(raw: Path, text: str) -> None:
    (raw / "dataset.json").write_text(text)
    image(raw).write_bytes(b"")
    assert told(raw) == [("dataset.json", "fault"), ("liver_1", "fault")]


# --- All at once


def plant_many(raw: Path) -> None:
    image(raw, 0).write_bytes(image(raw, 0).read_bytes()[:100])
    write_nifti(label(raw, 1), np.full(SHAPE, 5, np.uint8))
    label(raw, 2).unlink()
    write_nifti(image(raw, 2), scaled(2, 0, 1))
    write_listing(raw, CASES, **{**COUNTS, "numTraining": 4})


def test_all_faults_come_together_whatever_the_number_of_workers(raw: Path) -> None:
    plant_many(raw)
    assert told(raw) == [
        ("dataset.json", "fault"),
        ("liver_0", "fault"),
        ("liver_1", "fault"),
        ("liver_2", "fault"),
        ("liver_2", "fault"),
    ]
    assert findings(raw, jobs=2) == findings(raw)


def test_command(raw: Path, tmp_path: Path) -> None:
    sound = CliRunner().invoke(main, ["check", str(raw), "--jobs", "1"])
    assert (sound.exit_code, "0 faults, 0 warnings" in sound.output) == (0, True)
    (raw / "imagesTr" / "notes.txt").write_text("")
    assert CliRunner().invoke(main, ["check", str(raw), "--jobs", "1"]).exit_code == 0
    plant_many(raw)
    faulty = CliRunner().invoke(main, ["check", str(raw), "--jobs", "1"])
    assert faulty.exit_code == 1
    for text in ("holds 5 (3 from 2)", "labelsTr/liver_2.nii.gz is missing", "numTraining", "notes.txt"):
        assert text in faulty.output
    assert "5 faults, 1 warning" in faulty.output
    nothing = CliRunner().invoke(main, ["check", str(tmp_path / "nowhere")])
    assert nothing.exit_code == 1


# --- Workers


def _square_or_die(number: int) -> int:
    if number == 3:
        os._exit(9)
    return number**2


def test_a_worker_that_dies_costs_its_own_item_only() -> None:
    outcomes = run_parallel(_square_or_die, [1, 2, 3, 4], jobs=2)
    assert sorted(-o.item if isinstance(o, Failure) else o for o in outcomes) == [-3, 1, 4, 16]
