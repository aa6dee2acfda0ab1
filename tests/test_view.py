"""Any tool's label on any scan as one page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import oriented_affine, write_nifti

from liverseg.cli import main
from liverseg.evaluation.view_label import MAX_VALUES


def view(
    tmp_path: Path, label: np.ndarray[Any, Any], *, axes: str = "LPS", label_axes: str = "LPS"
) -> Result:
    image = np.zeros((12, 14, 16), np.int16)
    write_nifti(tmp_path / "ct.nii.gz", image, oriented_affine(axes))
    write_nifti(tmp_path / "seg.nii.gz", label, oriented_affine(label_axes))
    arguments = ["view", tmp_path / "ct.nii.gz", tmp_path / "seg.nii.gz", "--out", tmp_path / "v.html"]
    return CliRunner().invoke(main, list(map(str, arguments)))


def case_of(page: Path) -> Any:
    match = re.search(
        r'<script type="application/json" id="case-0">(.*?)</script>', page.read_text(), re.DOTALL
    )
    assert match is not None
    return json.loads(match[1])


def test_liver_and_tumour_are_named_and_lesions_listed(tmp_path: Path) -> None:
    label = np.zeros((12, 14, 16), np.uint8)
    label[2:8, 2:9, 3:10] = 1
    label[4:6, 4:6, 5:7] = 2
    result = view(tmp_path, label)
    assert result.exit_code == 0, result.output
    assert "MB)" in result.output
    case = case_of(tmp_path / "v.html")
    (layer,) = case["volumes"][0]["layers"]
    assert layer["names"] == ["liver", "tumour"]
    (lesion,) = case["lesions"]
    assert lesion["status"] == "lesion"  # of a truth as of a prediction
    # LPS: canonical x and y count from the other end.
    assert lesion["at"][0] in (5, 6)
    assert lesion["at"][1] in (14 - 1 - 4, 14 - 1 - 5)
    assert lesion["at"][2] in (12 - 1 - 4, 12 - 1 - 5)


def test_other_values_are_shown_by_number_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    label = np.zeros((12, 14, 16), np.int16)
    for n in range(MAX_VALUES + 1):
        label.reshape(-1)[10 * n : 10 * n + 2 + n // 4] = 10 * (n + 1)
    label[-1, -1, -1] = 1000  # the smallest of all
    result = view(tmp_path, label)
    assert result.exit_code == 0, result.output
    assert "2 smaller values not shown" in result.output
    (layer,) = case_of(tmp_path / "v.html")["volumes"][0]["layers"]
    assert len(layer["names"]) == len(layer["colours"]) == MAX_VALUES
    assert "1000" not in layer["names"]


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        (0.55, np.float32, "holds 0.55 (0.45 from 1)"),
        (2.4, np.float64, "holds 2.4 (0.4 from 2)"),
        (70_000, np.int32, "holds 70000 (4465 from 65535)"),
        (np.nan, np.float32, "holds nan"),
        (np.inf, np.float32, "holds inf"),
    ],
)
def test_what_is_no_label_is_refused_with_its_deviation(
    tmp_path: Path, value: float, dtype: Any, said: str
) -> None:
    label = np.zeros((12, 14, 16), dtype)
    label[2:8, 2:9, 3:10] = value
    result = view(tmp_path, label)
    assert result.exit_code == 1
    output = " ".join(result.output.split())
    assert said in output
    assert "a label has whole numbers from 0 to 65535, each within 0.01" in output
    assert not (tmp_path / "v.html").exists()


@pytest.mark.parametrize(
    ("value", "dtype", "name"),
    [(40_000, np.uint16, "40000"), (65_535, np.int32, "65535"), (24.004, np.float32, "24")],
)
def test_large_labels_and_floats_that_are_whole_are_shown(
    tmp_path: Path, value: float, dtype: Any, name: str
) -> None:
    label = np.zeros((12, 14, 16), dtype)
    label[2:8, 2:9, 3:10] = value
    result = view(tmp_path, label)
    assert result.exit_code == 0, result.output
    (layer,) = case_of(tmp_path / "v.html")["volumes"][0]["layers"]
    assert layer["names"] == [name]


def test_the_title_names_both_files_alike(tmp_path: Path) -> None:
    assert view(tmp_path, np.ones((12, 14, 16), np.uint8)).exit_code == 0
    assert "<title>label seg.nii.gz on scan ct.nii.gz" in (tmp_path / "v.html").read_text()


def test_a_page_is_written_again_and_another_file_is_left_alone(tmp_path: Path) -> None:
    label = np.ones((12, 14, 16), np.uint8)
    assert view(tmp_path, label).exit_code == 0
    assert view(tmp_path, label).exit_code == 0
    (tmp_path / "v.html").write_text("my thesis")
    assert view(tmp_path, label).exit_code == 1
    assert (tmp_path / "v.html").read_text() == "my thesis"


def test_a_label_named_where_the_scan_belongs_is_recognized(tmp_path: Path) -> None:
    label = np.zeros((12, 14, 16), np.uint8)
    label[2:8, 2:9, 3:10] = 1
    write_nifti(tmp_path / "seg.nii.gz", label, oriented_affine("LPS"))
    write_nifti(tmp_path / "ct.nii.gz", np.full(label.shape, -1000, np.int16), oriented_affine("LPS"))
    names = [str(tmp_path / name) for name in ("seg.nii.gz", "ct.nii.gz")]
    result = CliRunner().invoke(main, ["view", *names, "--out", str(tmp_path / "v.html")])
    assert result.exit_code == 1
    assert "look swapped: expected SCAN first, then LABEL" in " ".join(result.output.split())
    assert not (tmp_path / "v.html").exists()


def test_an_empty_label_shows_the_whole_scan(tmp_path: Path) -> None:
    result = view(tmp_path, np.zeros((12, 14, 16), np.uint8))
    assert result.exit_code == 0, result.output
    assert "the label is empty" in result.output
    case = case_of(tmp_path / "v.html")
    assert [volume["box"] for volume in case["volumes"]] == [[[0, 16], [0, 14], [0, 12]]]
    assert case["lesions"] == []


@pytest.mark.parametrize(
    ("values", "label_axes", "words"),
    [((-1, 2), "LPS", "holds -1 (1 from 0)"), ((0, 1), "RAS", "mm away")],
)
def test_what_is_no_label_of_the_scan_is_one_line(
    tmp_path: Path, values: tuple[int, int], label_axes: str, words: str
) -> None:
    label = np.full((12, 14, 16), values[0], np.int16)
    label[3:5, 3:5, 3:5] = values[1]
    result = view(tmp_path, label, label_axes=label_axes)
    assert result.exit_code == 1
    assert words in result.output
    assert not (tmp_path / "v.html").exists()
