"""Slices read from a file one by one are those of its canonical volume, in every orientation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import ORIENTATIONS, oriented_affine, write_nifti

from data_cache.errors import VolumeError
from liverseg.pictures.palette import PRED_PENS
from liverseg.pictures.planes import outlines_of, outlines_of_file, overlay_planes
from pipeline.nifti import (
    VolumeStream,
    label_image,
    read_canonical,
    read_planes,
    temporary_nifti,
    write_labels,
)


@pytest.mark.parametrize("file_axes", ORIENTATIONS)
def test_planes_are_those_of_the_canonical_volume(tmp_path: Path, file_axes: str) -> None:
    image = np.random.default_rng(0).integers(-1000, 1000, (5, 6, 7)).astype(np.int16)
    path = write_nifti(tmp_path / "x.nii.gz", image, oriented_affine(file_axes), scaling=(2.0, -24.0))
    volume_zyx, _ = read_canonical(path)
    planes = [(axis, index) for axis in range(3) for index in (0, volume_zyx.shape[axis] - 2)]
    for (axis, index), found in zip(planes, read_planes(path, planes), strict=True):
        np.testing.assert_array_equal(found, volume_zyx.take(index, axis=axis))


@pytest.mark.parametrize("file_axes", ORIENTATIONS)
def test_outlines_of_a_file_are_those_of_its_volume(tmp_path: Path, file_axes: str) -> None:
    label_xyz = np.zeros((9, 11, 13), dtype=np.uint8)
    label_xyz[2:7, 3:9, 4:10] = 1
    label_xyz[3:5, 5:8, 6:9] = 2
    path = write_nifti(tmp_path / "label.nii.gz", label_xyz, oriented_affine(file_axes))
    volume_zyx, _ = read_canonical(path)
    expected = outlines_of(volume_zyx.astype(np.uint8), PRED_PENS)
    found, planes = outlines_of_file(
        path, PRED_PENS, lambda outlines: overlay_planes(outlines, volume_zyx.shape)
    )
    assert planes == overlay_planes(expected, volume_zyx.shape)
    assert [outline.pen for outline in found] == list(PRED_PENS)
    for outline, other in zip(found, expected, strict=True):
        for along, wanted in zip(outline.voxels_along_zyx, other.voxels_along_zyx, strict=True):
            np.testing.assert_array_equal(along, wanted)
        for plane in planes:
            np.testing.assert_array_equal(outline.take(plane), other.take(plane))


@pytest.mark.parametrize("file_axes", ["RAS", "LPS", "SAL"])
def test_a_label_in_memory_is_the_one_in_the_file(tmp_path: Path, file_axes: str) -> None:
    rng = np.random.default_rng(0)
    scan = write_nifti(
        tmp_path / "scan.nii", rng.integers(0, 9, (4, 5, 6)).astype(np.int16), oriented_affine(file_axes)
    )
    with VolumeStream.open(scan) as stream:
        header = stream.header
    label_kji = rng.integers(0, 3, header.shape_kji).astype(np.uint8)
    write_labels(tmp_path / "label.nii.gz", header, [label_kji])
    written, found = nib.Nifti1Image.from_filename(tmp_path / "label.nii.gz"), label_image(label_kji, header)
    np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(written.dataobj))
    np.testing.assert_array_equal(found.affine, nib.Nifti1Image.from_filename(scan).affine)
    assert found.shape == nib.Nifti1Image.from_filename(scan).shape
    assert found.header == written.header


def test_images_and_arrays_become_files_for_a_while() -> None:
    array = np.arange(24, dtype=np.int64).reshape(2, 3, 4)
    affine = oriented_affine("LPS")
    with temporary_nifti(array, affine) as path:
        image = nib.Nifti1Image.from_filename(path)
        np.testing.assert_array_equal(np.asarray(image.dataobj), array)
        assert read_canonical(path)[1].notes == ()  # not that mm was assumed: the affine is in mm
        np.testing.assert_allclose(image.affine, affine, rtol=1e-6)
        with temporary_nifti(image) as again:
            np.testing.assert_array_equal(np.asarray(nib.Nifti1Image.from_filename(again).dataobj), array)
    assert not path.exists()
    refused: list[tuple[object, Any, str]] = [
        (array, None, "an array needs affine"),
        ("text", None, "expected a path, a nibabel image or an array with its affine, got str"),
        (nib.Nifti1Image(array.astype(np.int16), affine), affine, "has an affine of its own"),
    ]
    for given, affine_, words in refused:
        with pytest.raises(VolumeError, match=words), temporary_nifti(given, affine_):
            pass
