"""Scans as hospitals send them, with a network that knows the answer: cut, long, turned, thick, thin, narrow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from oracle import oracle
from tiny import SPEC, TinyWorld

from liverseg.inference.inputs import ScanInput
from liverseg.inference.predict import Prediction, PredictOptions, predict_scan
from liverseg.inference.segment import Predictor, segment
from pipeline.nifti import read_canonical
from pipeline.prepare import read_scan

Array = NDArray[Any]


@pytest.fixture(params=["liver_0", "liver_1"], ids=["LPS", "RAS"])
def phantom(request: pytest.FixtureRequest, tiny_world: TinyWorld) -> tuple[Array, Array, Array]:
    """Image and label (x, y, z) as the file stores them, and the affine."""
    paths = [tiny_world.raw / kind / f"{request.param}.nii.gz" for kind in ("imagesTr", "labelsTr")]
    image, label = (nib.Nifti1Image.from_filename(path) for path in paths)
    return np.asarray(image.dataobj), np.asarray(label.dataobj), np.asarray(image.affine)


def predict(
    image: Array, truth: Array, affine: Array, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Prediction, Array]:
    """What is written for a scan whose truth the network knows, in the file's own axes."""
    path = folder / "scan.nii.gz"
    nib.save(nib.Nifti1Image(image.astype(np.int16), affine), path)
    turned = nib.as_closest_canonical(nib.Nifti1Image(truth, affine))
    with monkeypatch.context() as patch:
        predictor = oracle(np.asarray(turned.dataobj).transpose(2, 1, 0), patch)
        scan = ScanInput(name="scan", path=path, is_dicom=False)
        # By force: a slice that is repeated a hundred times is not what a body looks like.
        prediction = predict_scan(scan, folder / "out", predictor, PredictOptions(force=True))
    written = nib.Nifti1Image.from_filename(prediction.label)
    np.testing.assert_allclose(written.affine, affine, atol=1e-5)
    return prediction, np.asarray(written.dataobj)


def dice(a: Array, b: Array) -> float:
    return float(2 * np.sum((a > 0) & (b > 0)) / (np.sum(a > 0) + np.sum(b > 0)))


def liver_slices(label: Array) -> tuple[int, int]:
    found = np.flatnonzero((label > 0).any(axis=(0, 1)))
    return int(found[0]), int(found[-1]) + 1


def moved_up(affine: Array, slices: int) -> Array:
    """The affine of a file whose first slice was slice ``slices``."""
    result = affine.copy()
    result[:3, 3] += slices * affine[:3, 2]
    return result


@pytest.mark.parametrize("part", ["lower half", "upper half"])
def test_a_scan_that_cuts_the_liver(
    phantom: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    image, label, affine = phantom
    start, stop = liver_slices(label)
    middle = (start + stop) // 2
    kept = slice(0, middle) if part == "lower half" else slice(middle, image.shape[2])
    affine = moved_up(affine, kept.start)
    found, written = predict(image[..., kept], label[..., kept], affine, tmp_path, monkeypatch)
    assert found.found
    assert dice(written, label[..., kept]) > 0.96


@pytest.mark.parametrize("ends", [(60, 100), (0, 150), (150, 0)], ids=["middle", "top", "bottom"])
def test_a_scan_from_chest_to_pelvis(
    phantom: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: tuple[int, int]
) -> None:
    image, label, affine = phantom
    padding = ((0, 0), (0, 0), ends)
    long_image, long_label = np.pad(image, padding, mode="edge"), np.pad(label, padding)
    affine = moved_up(affine, -ends[0])
    found, written = predict(long_image, long_label, affine, tmp_path, monkeypatch)
    assert dice(written, long_label) > 0.95
    assert found.liver_box is not None
    assert (
        found.liver_box.shape_zyx[0] < 0.6 * long_image.shape[2]
    )  # looked at closely, and not at the whole scan again


def test_head_first_and_feet_first_are_one_scan(
    phantom: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, label, affine = phantom
    feet = affine.copy()
    feet[:3, 2] *= -1
    feet[:3, 3] = (affine @ [0, 0, image.shape[2] - 1, 1])[:3]
    for folder in ("head", "feet"):
        (tmp_path / folder).mkdir()
    one, straight = predict(image, label, affine, tmp_path / "head", monkeypatch)
    other, turned = predict(image[..., ::-1], label[..., ::-1], feet, tmp_path / "feet", monkeypatch)
    assert np.mean(turned[..., ::-1] != straight) < 1e-4
    assert other.liver_box == one.liver_box


@pytest.mark.parametrize(("thick", "thin"), [(5, 1), (1, 6)], ids=["thick", "thin"])
def test_thick_and_thin_slices(
    phantom: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thick: int, thin: int
) -> None:
    image, label, affine = phantom
    image, label = (np.repeat(a[..., ::thick], thin, axis=2) for a in (image, label))
    affine = affine.copy()
    affine[:3, 2] *= thick / thin
    _, written = predict(image, label, affine, tmp_path, monkeypatch)
    assert dice(written, label) > (0.96 if thick == 1 else 0.9)  # 40 slices become 8


def test_a_small_field_of_view_cuts_the_liver_in_the_plane(
    phantom: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, label, affine = phantom
    x = np.flatnonzero((label > 0).any(axis=(1, 2)))
    kept = slice(int(x[0] + x[-1]) // 2, image.shape[0])
    shifted = affine.copy()
    shifted[:3, 3] += kept.start * affine[:3, 0]
    found, written = predict(image[kept], label[kept], shifted, tmp_path, monkeypatch)
    assert found.found
    assert dice(written, label[kept]) > 0.96


def test_a_scan_without_a_liver_gets_an_empty_label(
    phantom: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, label, affine = phantom
    found, written = predict(image, np.zeros_like(label), affine, tmp_path, monkeypatch)
    assert not found.found
    assert not written.any()


def test_a_liver_that_fills_the_scan(phantom: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, label, affine = phantom
    everything = np.ones_like(label)
    _, written = predict(image, everything, affine, tmp_path, monkeypatch)
    assert (written == 1).all()


def test_what_the_coarse_pass_missed_is_found_by_looking_further(
    tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth_zyx, _ = read_canonical(tiny_world.raw / "labelsTr" / "liver_0.nii.gz")
    predictor = oracle(truth_zyx, monkeypatch)
    knowing, looks = Predictor.foreground, []

    def short_sighted(self: Predictor, image_zyx: NDArray[np.int16]) -> NDArray[np.float32]:
        seen = knowing(self, image_zyx)
        looks.append(seen)
        if len(looks) == 1:
            top = np.flatnonzero(seen.any(axis=(0, 2, 3)))[-1]
            seen[:, top - 2 :] = 0  # the three highest of its slices
        return seen

    monkeypatch.setattr(Predictor, "foreground", short_sighted)
    found = segment(read_scan(tiny_world.raw / "imagesTr" / "liver_0.nii.gz", SPEC), predictor)
    slices = np.flatnonzero(truth_zyx.any(axis=(1, 2)))
    assert len(looks) > 2
    assert found.box is not None
    assert found.box.start_zyx[0] <= slices[0]
    assert found.box.stop_zyx[0] > slices[-1]


def test_several_looks_at_the_truth_agree(tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    truth_zyx, _ = read_canonical(tiny_world.raw / "labelsTr" / "liver_0.nii.gz")
    predictor = oracle(truth_zyx, monkeypatch)
    scan = read_scan(tiny_world.raw / "imagesTr" / "liver_0.nii.gz", SPEC)
    once, often = (segment(scan, replace(predictor, tta=tta)).foreground_czyx for tta in (False, True))
    inside = once.sum(axis=0) > 0
    assert np.abs(often - once).sum(axis=0)[inside].mean() < 0.08
