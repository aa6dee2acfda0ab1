"""DICOM series: written here slice by slice, read as the NIfTI file of the same scan; faults named by file."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import SPEC, TinyWorld

from data_cache.errors import VolumeError
from pipeline.dicom import convert_series
from pipeline.prepare import read_scan

pydicom = pytest.importorskip("pydicom")
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def write_series(
    folder: Path,
    volume_kji: NDArray[np.int16],
    affine_ras: NDArray[np.float64],
    *,
    slope: float = 1.0,
    intercept: float = -1024.0,
    names: Sequence[str] | None = None,
) -> list[Path]:
    """A file a slice, in an order of names that is not the order in space."""
    folder.mkdir(parents=True)
    lps = LPS_TO_RAS @ affine_ras
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    directions = lps[:3, :3] / spacing
    uid, study, frame = (pydicom.uid.generate_uid() for _ in range(3))
    paths = []
    for k, slice_ji in enumerate(volume_kji):
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        dataset.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        dataset.SOPClassUID = pydicom.uid.CTImageStorage
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID
        dataset.Modality, dataset.SeriesInstanceUID, dataset.SeriesDescription = "CT", uid, "abdomen"
        dataset.StudyInstanceUID, dataset.FrameOfReferenceUID = study, frame
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.ImagePositionPatient = [f"{v:.6f}" for v in (lps @ [0, 0, k, 1])[:3]]
        dataset.ImageOrientationPatient = [f"{v:.8f}" for v in directions[:, :2].T.ravel()]
        dataset.PixelSpacing = [f"{spacing[1]:.8f}", f"{spacing[0]:.8f}"]
        dataset.SliceThickness = "99"  # a lie that scanners tell: it is not the distance of slices
        dataset.Rows, dataset.Columns = slice_ji.shape
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = (
            16,
            16,
            15,
            1,
        )
        dataset.RescaleSlope, dataset.RescaleIntercept = str(slope), str(intercept)
        dataset.PixelData = np.rint((slice_ji - intercept) / slope).astype("<i2").tobytes()
        path = folder / (names[k] if names else f"IM{(k * 7) % len(volume_kji):04d}.dcm")
        dataset.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


@pytest.fixture
def scan(tiny_world: TinyWorld) -> tuple[Path, NDArray[np.int16], NDArray[np.float64]]:
    """A phantom's file, its slices as they lie in the file, and its affine."""
    path = tiny_world.raw / "imagesTr" / "liver_0.nii.gz"
    image = nib.Nifti1Image.from_filename(path)
    volume = np.asarray(image.dataobj).astype(np.int16).transpose(2, 1, 0)
    return path, volume, np.asarray(image.affine)


def converted(source: Path, tmp_path: Path) -> nib.Nifti1Image:
    convert_series(source, tmp_path / "out.nii")
    return nib.Nifti1Image.from_filename(tmp_path / "out.nii")


def test_a_series_is_the_scan_it_was_written_from(scan: Any, tmp_path: Path) -> None:
    path, volume, affine = scan
    write_series(tmp_path / "series", volume, affine)
    (tmp_path / "series" / "notes.txt").write_text("not an image")
    image = converted(tmp_path / "series", tmp_path)
    np.testing.assert_allclose(image.affine, affine, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(image.dataobj).transpose(2, 1, 0), volume)
    ours, expected = (read_scan(p, SPEC) for p in (tmp_path / "out.nii", path))
    assert ours.header.file_axes == expected.header.file_axes
    box = expected.scan_box
    same, other = (s.view(box).image_zyx for s in (ours, expected))
    np.testing.assert_array_equal(same, other)


def test_slices_from_head_to_feet_and_in_a_zip(scan: Any, tmp_path: Path) -> None:
    _, volume, affine = scan
    turned = affine.copy()
    turned[:3, 2] *= -1
    turned[:3, 3] = (affine @ [0, 0, len(volume) - 1, 1])[:3]
    write_series(tmp_path / "series", volume[::-1], turned)
    with zipfile.ZipFile(tmp_path / "series.zip", "w") as archive:
        for path in (tmp_path / "series").iterdir():
            archive.write(path, f"inner/{path.name}")
    image = converted(tmp_path / "series.zip", tmp_path)
    np.testing.assert_array_equal(
        nib.as_closest_canonical(image).affine, nib.as_closest_canonical(image).affine
    )
    np.testing.assert_allclose(image.affine, affine, atol=1e-4)  # sorted by where they are
    np.testing.assert_array_equal(np.asarray(image.dataobj).transpose(2, 1, 0), volume)


def test_scaling_and_an_oblique_plane(scan: Any, tmp_path: Path) -> None:
    _, volume, affine = scan
    affine = affine @ np.diag([1.3, 1, 1, 1])  # pixels that are not square
    turn = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.2, 0.1, 0.15))
    write_series(tmp_path / "series", volume, turn @ affine, slope=2.0, intercept=-1000.0)
    image = converted(tmp_path / "series", tmp_path)
    np.testing.assert_allclose(image.affine, turn @ affine, atol=1e-3)
    assert np.abs(np.asarray(image.dataobj).transpose(2, 1, 0) - volume).max() <= 1


def test_a_tilted_gantry_keeps_its_shear(scan: Any, tmp_path: Path) -> None:
    _, volume, affine = scan
    sheared = affine.copy()
    sheared[1, 2] += 0.8
    write_series(tmp_path / "series", volume, sheared)
    np.testing.assert_allclose(converted(tmp_path / "series", tmp_path).affine, sheared, atol=1e-3)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", r"1 slice is missing between s010.dcm and s012.dcm: \d+\.\d\d mm apart, the others"),
        ("double", "s010.dcm and twin.dcm are at the same position|twin.dcm and s010.dcm are at"),
        ("two series", "holds 2 series: 'abdomen' .40 images., 'abdomen' .40 images."),
        ("one slice", "s000.dcm is the only slice"),
        ("no dicom", "holds no DICOM images"),
        ("size", "has another size or spacing than"),
        ("pixels", "s010.dcm: its pixels cannot be decoded"),
    ],
)
def test_a_series_with_a_fault_is_refused_by_name(
    scan: Any, tmp_path: Path, fault: str, message: str
) -> None:
    _, volume, affine = scan
    source, names = tmp_path / "series", [f"s{k:03d}.dcm" for k in range(len(volume))]
    paths = write_series(source, volume, affine, names=names)
    if fault == "missing":
        paths[11].unlink()
    elif fault == "double":
        shutil.copy(paths[10], source / "twin.dcm")
    elif fault == "two series":
        write_series(source / "more", volume, affine)
    elif fault == "one slice":
        for path in paths[1:]:
            path.unlink()
    elif fault == "no dicom":
        for path in paths:
            path.write_text("nothing")
    elif fault == "size":
        write_series(tmp_path / "small", volume[:, :20], affine, names=names)
        dataset = pydicom.dcmread(tmp_path / "small" / "s005.dcm")
        dataset.SeriesInstanceUID = pydicom.dcmread(paths[0]).SeriesInstanceUID
        dataset.save_as(paths[5])
    else:
        dataset = pydicom.dcmread(paths[10])
        dataset.PixelData = dataset.PixelData[:100]
        dataset.save_as(paths[10])
    with pytest.raises(VolumeError, match=message):
        convert_series(source, tmp_path / "out.nii")
    assert not (tmp_path / "out.nii").exists()


def test_a_broken_zip(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"PK rubbish")
    with pytest.raises(VolumeError, match="cannot be opened as a zip"):
        convert_series(tmp_path / "x.zip", tmp_path / "out.nii")
