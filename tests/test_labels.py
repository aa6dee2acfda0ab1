"""The one reader of labels: float noise is a label, a probability map is not; and what is not one is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import random_scan, write_listing, write_nifti, write_pair
from numpy.typing import NDArray

from data_cache.errors import LabelError
from data_cache.schema import PreprocessSpec
from liverseg.cli import main
from pipeline.check import check_data_set
from pipeline.labels import describe_values, foreground_and_tumour, read_label
from pipeline.nifti import read_canonical
from pipeline.prepare import prepare_case

CLEAN = random_scan()[1]
NOISY = {
    "one unit in the last place": np.nextafter(CLEAN.astype(np.float32), np.float32(0)),
    "four nines": CLEAN * np.float32(0.9999),
    "a hundredth, less": CLEAN.astype(np.float64) * 0.996,
}


@pytest.mark.parametrize("noise", NOISY)
def test_float_noise_is_the_label_it_is_near(tmp_path: Path, noise: str) -> None:
    path = write_nifti(tmp_path / "noisy.nii.gz", NOISY[noise])
    clean = write_nifti(tmp_path / "clean.nii.gz", CLEAN)
    expected, _ = read_canonical(clean)
    got = read_label(path)
    np.testing.assert_array_equal(got.label_zyx, expected)
    assert got.label_zyx.dtype == np.uint8
    # Every command asks the same reader: check, preprocess and score as well.
    image = write_nifti(tmp_path / "image.nii.gz", random_scan()[0])
    spec = PreprocessSpec(shape_zyx=(6, 5, 4))
    first, second = (prepare_case("a", image, label, spec, root=tmp_path) for label in (path, clean))
    assert first.meta.voxel_counts == second.meta.voxel_counts
    assert CliRunner().invoke(main, ["score", str(path), str(clean)]).exit_code == 0


def test_a_label_that_nibabel_has_scaled_is_read(tmp_path: Path) -> None:
    # Saved as uint8 with a slope of 2/255: a liver of 1 comes back as 128 · 2/255 = 1.004, or as 0.996.
    image = nib.Nifti1Image(CLEAN.astype(np.float32), np.eye(4))
    image.set_data_dtype(np.uint8)
    nib.save(image, tmp_path / "scaled.nii.gz")
    stored = nib.Nifti1Image.from_filename(tmp_path / "scaled.nii.gz").get_fdata()
    got = read_label(tmp_path / "scaled.nii.gz").label_zyx.transpose(2, 1, 0)
    np.testing.assert_array_equal(got, np.rint(stored))
    assert set(np.unique(got)) == {0, 1, 2}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.55, "0.55 (0.45 from 1)"),
        (1.49, "1.49 (0.49 from 1)"),
        (1.02, "1.02 (0.02 from 1)"),
        (7, "7 (5 from 2)"),
        (-1, "-1 (1 from 0)"),
        (np.nan, "nan"),
    ],
)
def test_what_is_not_a_label_is_refused_with_its_deviation(tmp_path: Path, value: float, said: str) -> None:
    values = np.where(CLEAN > 0, value, 0).astype(np.float32)
    path = write_nifti(tmp_path / "soft.nii.gz", values)
    clean = write_nifti(tmp_path / "clean.nii.gz", CLEAN)
    with pytest.raises(LabelError) as caught:
        read_label(path)
    line = f"{path}: holds {said}; a label has 0, 1 (liver) and 2 (tumour), each within 0.01: threshold or map it first"
    assert str(caught.value) == line
    scored = CliRunner().invoke(main, ["score", str(path), str(clean)])
    assert scored.exit_code == 1
    assert said in " ".join(scored.output.split())


def test_check_says_the_same(tmp_path: Path) -> None:
    image, label = random_scan()
    write_pair(tmp_path, "liver_0", image, np.where(label > 0, 0.55, 0).astype(np.float32))
    write_listing(tmp_path, ["liver_0"])
    output = " ".join(CliRunner().invoke(main, ["check", str(tmp_path), "--jobs", "1"]).output.split())
    assert "holds 0.55 (0.45 from 1)" in output


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_an_image_and_a_label_that_are_exchanged_are_called_so(tmp_path: Path, dtype: Any) -> None:
    image, label = random_scan()
    write_pair(tmp_path, "liver_0", label.astype(dtype), image)
    write_listing(tmp_path, ["liver_0"])
    words = (
        "imagesTr/liver_0.nii.gz and labelsTr/liver_0.nii.gz look exchanged: the image has a label's values"
    )
    findings = check_data_set(tmp_path, jobs=1, report=lambda *_: None)
    assert [f.remedy for f in findings if words in f.what] == ["exchange them in dataset.json"]
    assert not any("threshold" in f.remedy for f in findings)
    arguments = ["preprocess", str(tmp_path), str(tmp_path / "c.zarr"), "--jobs", "1"]
    output = " ".join(CliRunner().invoke(main, arguments).output.split())
    assert "look exchanged: the image has a label's values, and the label has HU: exchange them" in output


def test_many_values_are_counted() -> None:
    values = {i + 0.5 for i in range(20)} | {float("nan")}
    words = describe_values(values)
    assert words.startswith("0.5 (0.5 from 0), 1.5 (0.5 from 1)")
    assert words.endswith(" and 13 other values")


def test_an_empty_block_has_no_masks(tmp_path: Path) -> None:
    _, header = read_canonical(write_nifti(tmp_path / "a.nii.gz", CLEAN))
    empty: NDArray[np.float32] = np.zeros((2, 3, 4), dtype=np.float32)
    assert foreground_and_tumour(empty, header) is None
