"""Maps on a scan's own grid: interpolated, written as bytes with a slope, in the file's orientation."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ORIENTATIONS, oriented_affine, write_nifti
from numpy.typing import NDArray
from test_restore import header_of, interpolated

from data_cache.geometry import Box
from pipeline.nifti import from_canonical, to_canonical, write_map
from pipeline.restore import native_labels, native_values

SHAPE = (12, 13, 20)
CUT = ((0.1, 0.8), (0.0, 1.0), (0.2, 0.9))  # of a file's canonical axes


def random_view(seed: int = 0) -> NDArray[np.float32]:
    values: NDArray[np.float32] = np.random.default_rng(seed).random((5, 6, 7), dtype=np.float32)
    values[:, :2] = 0
    return values


@pytest.mark.parametrize("file_axes", ORIENTATIONS)
def test_from_canonical_is_the_way_back(tmp_path: Path, file_axes: str) -> None:
    header = header_of(write_nifti(tmp_path / "a.nii", np.zeros(SHAPE, np.uint8), oriented_affine(file_axes)))
    values_kji = np.random.default_rng(0).integers(0, 99, header.shape_kji)
    back = from_canonical(to_canonical(values_kji, header.axes_kji), header.axes_kji)
    np.testing.assert_array_equal(back, values_kji)


@pytest.mark.parametrize("file_axes", ["RAS", "LPI", "SAR"])
@pytest.mark.parametrize("per_block", [1, 7, 1000])
def test_values_are_interpolated_linearly_and_zero_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_axes: str, per_block: int
) -> None:
    header = header_of(write_nifti(tmp_path / "a.nii", np.zeros(SHAPE, np.uint8), oriented_affine(file_axes)))
    box = Box.from_slices(
        [slice(int(a * n), int(b * n)) for (a, b), n in zip(CUT, header.grid.shape_zyx, strict=True)]
    )
    expected = np.zeros(header.grid.shape_zyx)
    expected[box.slices_zyx] = interpolated(random_view(), header, box)[box.slices_zyx]
    monkeypatch.setattr("pipeline.restore.BLOCK_VOXELS", per_block * SHAPE[0] * SHAPE[1])
    blocks = list(native_values(random_view(), box, header))
    found = to_canonical(np.concatenate(blocks), header.axes_kji)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    labels = native_labels(np.stack([random_view()] * 2), box, header)
    assert [len(block) for block in blocks] == [len(block) for block in labels]


def test_nothing_is_zero_everywhere(tmp_path: Path) -> None:
    header = header_of(write_nifti(tmp_path / "a.nii", np.zeros(SHAPE, np.uint8)))
    (block,) = native_values(np.zeros((5, 6, 7), np.float32), Box.whole(header.grid.shape_zyx), header)
    assert block.shape == header.shape_kji
    assert not block.any()


@pytest.mark.parametrize("name", ["map.nii", "map.nii.gz"])
def test_a_map_is_read_back_by_nibabel(tmp_path: Path, name: str) -> None:
    image = write_nifti(
        tmp_path / "a.nii", np.zeros(SHAPE, np.int16), oriented_affine("LPI"), scaling=(2.0, 5.0)
    )
    header = header_of(image)
    values = np.random.default_rng(0).uniform(-0.5, 3.0, header.shape_kji).astype(np.float32)
    values[0] = 0
    blocks = (values[k : k + 3] for k in range(0, len(values), 3))
    write_map(tmp_path / name, header, blocks, maximum=2.0, description="entropy, nats")
    read = nib.Nifti1Image.from_filename(tmp_path / name)
    found = np.asarray(read.dataobj).transpose(2, 1, 0)
    # Half a step of 2/255, and out of range to its ends.
    np.testing.assert_allclose(found, values.clip(0, 2), atol=1.0 / 255 + 1e-6)
    assert not found[0].any()
    assert read.header["cal_max"] == 2.0
    assert read.header["descrip"].item() == b"entropy, nats"
    np.testing.assert_array_equal(read.affine, nib.Nifti1Image.from_filename(image).affine)
    assert read.get_data_dtype() == np.uint8


def test_a_map_that_is_too_short_is_not_written(tmp_path: Path) -> None:
    header = header_of(write_nifti(tmp_path / "a.nii", np.zeros(SHAPE, np.uint8)))
    with pytest.raises(ValueError, match=r"expected the voxels of a volume of \(12, 13, 20\), got 156"):
        write_map(
            tmp_path / "map.nii.gz", header, [np.zeros((1, 13, 12), np.float32)], maximum=1.0, description=""
        )
    assert not (tmp_path / "map.nii.gz").exists()
