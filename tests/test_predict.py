"""``predict``, ``export`` and the Python API: every kind of input, every option, the same label each way."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import slab
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from tiny import SPEC, TinyWorld

import liverseg
from data_cache.errors import ImplausibleScanError, RunError, VolumeError
from data_cache.records import to_json
from liverseg.cli import main
from liverseg.inference.inputs import find_scans
from liverseg.inference.model_file import describe, export_model, load_trained
from liverseg.inference.segment import Predictor, ScanSegmentation, load_predictor, resample_to_box, segment
from liverseg.training.checkpoint import content_checksum, load_checkpoint, write_checkpoint
from pipeline.nifti import write_slices
from pipeline.prepare import read_scan

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    return lambda *arguments: CliRunner().invoke(main, [str(a) for a in arguments])


def voxels(path: Path) -> NDArray[Any]:
    return np.asarray(nib.Nifti1Image.from_filename(path).dataobj)


@pytest.fixture
def image(tiny_world: TinyWorld) -> Path:
    return tiny_world.raw / "imagesTr" / "liver_0.nii.gz"


def test_a_folder_of_files_and_what_is_written_beside_them(
    run: Run, tiny_run: Path, image: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in ("a.nii.gz", "b.nii.gz"):
        shutil.copy(image, folder / name)
    (folder / "notes.txt").write_text("no scan")
    out = tmp_path / "out"
    result = run("predict", tiny_run, folder, "--out", out, "--preview", "--statistics")
    assert result.exit_code == 0, result.output
    assert {p.name for p in out.iterdir()} == {
        "statistics.csv",
        *(f"{n}.{kind}" for n in "ab" for kind in ("nii.gz", "png", "json")),
    }
    assert (out / "a.png").read_bytes().startswith(b"\x89PNG")
    statistics = json.loads((out / "a.json").read_text())
    label = voxels(out / "a.nii.gz")
    voxel_ml = abs(np.linalg.det(nib.Nifti1Image.from_filename(image).affine)) / 1000
    assert statistics["liver_ml"] == pytest.approx(np.count_nonzero(label) * voxel_ml)
    assert (statistics["image"], statistics["label"]) == ("a.nii.gz", "a.nii.gz")  # no paths


def test_lesions_are_counted_in_the_label_that_is_written(
    run: Run, tiny_run: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two lesions that share a corner on the network's grid are apart on the scan's finer one."""
    foreground_czyx = np.zeros((2, *SPEC.shape_zyx), dtype=np.float32)
    foreground_czyx[0, 2:14, 4:28, 4:28] = 1
    foreground_czyx[1, 4:7, 8:14, 8:14] = foreground_czyx[1, 7:10, 14:20, 14:20] = 1
    foreground_czyx[0] -= foreground_czyx[1]

    def found(held: Any, _: Any) -> ScanSegmentation:
        return ScanSegmentation(
            foreground_czyx=foreground_czyx,
            box=held.scan_box,
            coarse_czyx=foreground_czyx,
            samples_nczyx=None,
        )

    monkeypatch.setattr("liverseg.inference.predict.segment", found)
    assert run("predict", tiny_run, image, "--out", tmp_path, "--statistics").exit_code == 0
    _, n_written = ndimage.label(voxels(tmp_path / "liver_0.nii.gz") == 2, structure=np.ones((3, 3, 3)))
    _, n_of_the_network = ndimage.label(foreground_czyx[1] > 0.5, structure=np.ones((3, 3, 3)))
    statistics = json.loads((tmp_path / "liver_0.json").read_text())
    assert (statistics["n_lesions"], n_written, n_of_the_network) == (2, 2, 1)


def test_doubtful_tumours_are_left_out_and_counted(
    run: Run, tiny_run: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network is sure of one tumour and unsure of two others."""
    foreground_czyx = np.zeros((2, *SPEC.shape_zyx), dtype=np.float32)
    foreground_czyx[0, 2:14, 4:28, 4:28] = 1
    for at, tumour in ((5, 0.6), (13, 0.9), (21, 0.65)):
        foreground_czyx[:, 5:9, at : at + 5, 8:14] = np.array([1 - tumour, tumour])[:, None, None, None]
    monkeypatch.setattr(Predictor, "foreground", lambda *_: foreground_czyx)
    result = run("predict", tiny_run, image, "--out", tmp_path, "--statistics", "--fast")
    assert result.exit_code == 0, result.output
    assert "2 doubtful left out" in " ".join(result.output.split())
    statistics = json.loads((tmp_path / "liver_0.json").read_text())
    assert (statistics["n_lesions"], statistics["n_doubtful"]) == (1, 2)
    (row,) = csv.DictReader((tmp_path / "statistics.csv").read_text().splitlines())
    assert (row["lesions"], row["doubtful"]) == ("1", "2")


def test_a_dicom_series_gives_the_label_of_its_nifti(
    run: Run, tiny_run: Path, image: Path, tmp_path: Path
) -> None:
    pytest.importorskip("pydicom")
    from test_dicom import write_series

    nifti = nib.Nifti1Image.from_filename(image)
    write_series(
        tmp_path / "CT_7",
        np.asarray(nifti.dataobj).astype(np.int16).transpose(2, 1, 0),
        np.asarray(nifti.affine),
    )
    result = run("predict", tiny_run, tmp_path / "CT_7", image, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(
        voxels(tmp_path / "out" / "CT_7.nii.gz"), voxels(tmp_path / "out" / "liver_0.nii.gz")
    )


def test_without_pydicom_it_says_what_to_install(
    run: Run, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    (tmp_path / "series").mkdir()
    (tmp_path / "series" / "a.dcm").write_bytes(b"x")
    result = run("predict", tiny_run, tmp_path / "series", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "pip install 'liverseg[dicom]'" in result.output


def test_two_scans_of_one_name_are_refused(image: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    shutil.copy(image, tmp_path / "other")
    with pytest.raises(VolumeError, match=r"both write liver_0.nii.gz"):
        find_scans([image, tmp_path / "other"])
    assert [scan.name for scan in find_scans([tmp_path / "missing.nii"])] == ["missing"]


@pytest.mark.slow
def test_a_long_scan_takes_little_memory(tiny_run: Path, tmp_path: Path) -> None:
    """512×512×1000, in a process of its own; half a gigabyte of voxels, and at most 1.2 GB in all."""
    path = tmp_path / "long.nii"
    rng = np.random.default_rng(0)
    slices = (rng.integers(-100, 100, (1, 512, 512)).astype(np.int16) for _ in range(1000))
    write_slices(path, slices, (1000, 512, 512), np.diag([0.7, 0.7, 0.7, 1.0]))
    code = (
        "import resource, sys; from liverseg.cli import main; main(sys.argv[1:], standalone_mode=False);"
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, "predict", tiny_run, path, "--out", tmp_path / "out", "--preview"]
    output = subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout
    peak_kib = int(output.split("peak")[1])
    assert peak_kib < 1.2e9 / 1024


# ---- scans that are none


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda hu: hu + 1024,
            "HU + 1024, the rescale intercept lost? or MR or PET?: undo the normalisation or apply",
        ),
        (lambda hu: np.full_like(hu, 7), "all voxels of the image are 7: convert it again from DICOM"),
        (lambda hu: hu // 100 - 950, "nothing but air: convert it again from DICOM"),
        (lambda hu: np.clip(hu, 0, 255), "gray values of a picture?: undo"),
    ],
    ids=["intercept", "constant", "air", "grey"],
)
def test_values_that_cannot_be_hu_are_refused_unless_forced(
    run: Run, tiny_run: Path, image: Path, tmp_path: Path, change: Any, words: str
) -> None:
    original = nib.Nifti1Image.from_filename(image)
    hu = np.maximum(np.asarray(original.dataobj), -1024).astype(np.int16)
    nib.save(nib.Nifti1Image(change(hu).astype(np.int16), original.affine), tmp_path / "odd.nii.gz")
    odd = tmp_path / "odd.nii.gz"
    refused = run("predict", tiny_run, odd, "--out", tmp_path / "out")
    assert refused.exit_code == 1
    assert f"error: {odd}: " in refused.output
    assert words in refused.output
    assert not (tmp_path / "out").exists()
    with pytest.raises(ImplausibleScanError, match="--force"):
        liverseg.load(tiny_run).segment(odd)
    forced = run("predict", tiny_run, odd, "--out", tmp_path / "out", "--force")
    assert forced.exit_code == 0, forced.output
    assert any(line.startswith(f"warning: {odd}: ") and words in line for line in forced.output.splitlines())
    assert any(words in note for note in liverseg.load(tiny_run).segment(odd, force=True).notes)


def test_a_scan_in_hu_has_no_warning(run: Run, tiny_run: Path, image: Path, tmp_path: Path) -> None:
    output = run("predict", tiny_run, image, "--out", tmp_path / "out").output
    assert not [line for line in output.splitlines() if "warning:" in line and "HU" in line], output


# ---- options


def test_an_ensemble_of_equals_is_each_of_them_and_of_two_their_mean(
    tiny_run: Path, image: Path, tmp_path: Path
) -> None:
    view = read_scan(image, SPEC).scan_view
    one = load_predictor(tiny_run, device="cpu")
    twice = load_predictor(tiny_run, tiny_run, device="cpu")
    np.testing.assert_allclose(twice.foreground(view.image_zyx), one.foreground(view.image_zyx), atol=1e-6)
    other = shutil.copytree(tiny_run, tmp_path / "other")
    content = load_checkpoint(other / "best.pt")
    content["average"] = {k: v * 0.5 if v.is_floating_point() else v for k, v in content["average"].items()}
    write_checkpoint(other / "best.pt", content)
    second, both = load_predictor(other, device="cpu"), load_predictor(tiny_run, other, device="cpu")
    mean = (one.foreground(view.image_zyx) + second.foreground(view.image_zyx)) / 2
    np.testing.assert_allclose(both.foreground(view.image_zyx), mean, atol=1e-6)
    content["spec"]["margin_fraction"] = 0.5
    write_checkpoint(other / "best.pt", content)
    with pytest.raises(RunError, match="another preprocessing spec"):
        load_predictor(tiny_run, other, device="cpu")


def test_fast_looks_once_and_tta_looks_more(
    tiny_run: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = read_scan(image, SPEC)
    usual = load_predictor(tiny_run, device="cpu")
    looks: list[int] = []
    original = type(usual).foreground

    def counting(self: Any, image_zyx: NDArray[np.int16]) -> NDArray[np.float32]:
        looks.append(1)
        return original(self, image_zyx)

    monkeypatch.setattr(type(usual), "foreground", counting)
    counts, found = {}, {}
    for name, predictor in (
        ("usual", usual),
        ("fast", replace(usual, fast=True)),
        ("tta", replace(usual, tta=True)),
    ):
        looks.clear()
        found[name] = segment(scan, predictor)
        counts[name] = len(looks)
    assert counts["fast"] == 1
    assert counts["tta"] == counts["usual"] + 3
    assert found["fast"].box == scan.scan_box
    assert found["tta"].box == found["usual"].box
    difference = np.abs(found["tta"].foreground_czyx - found["usual"].foreground_czyx)
    assert 0 < difference.mean() < 0.2


def test_moving_between_windows_keeps_what_is_smooth() -> None:
    ramp = np.broadcast_to(np.linspace(0, 1, 16, dtype=np.float32)[None, :, None, None], (2, 16, 2, 2))
    source, target = slab(0, 64, (64, 2, 2)), slab(16, 48, (64, 2, 2))
    np.testing.assert_allclose(resample_to_box(ramp, source, source), ramp, atol=0.02)
    inner = resample_to_box(ramp, source, target)
    # Target voxels are 2 slices wide from 16 on: centres 17, 19, …; the ramp is (z - 2) / 60 at slice edges z.
    np.testing.assert_allclose(inner[0, :, 0, 0], (np.arange(17, 48, 2) - 2) / 60, atol=1e-5)


# ---- a model as a file


def test_an_exported_file_gives_the_same_label(run: Run, tiny_run: Path, image: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "model.safetensors"
    result = run("export", tiny_run, file, "--licence", "CC0")
    assert result.exit_code == 0, result.output
    about = describe(file)
    assert about["labels"] == ["background", "liver", "tumour"]
    assert about["licence"] == "CC0"
    assert about["evaluation"] is None
    for name, model in (("run", tiny_run), ("file", file)):
        assert run("predict", model, image, "--out", tmp_path / name).exit_code == 0
    np.testing.assert_array_equal(
        voxels(tmp_path / "run" / "liver_0.nii.gz"), voxels(tmp_path / "file" / "liver_0.nii.gz")
    )
    assert load_trained(file).config == load_trained(tiny_run).config


def test_what_a_network_was_trained_on_goes_along(
    run: Run, tiny_run: Path, image: Path, tmp_path: Path
) -> None:
    stated = load_trained(tiny_run).training
    assert stated is not None
    assert stated.data_set is not None
    assert (stated.data_set.name, stated.data_set.licence, stated.phantom) == ("LIVER", "CC0 1.0", True)
    assert (stated.n_cases, stated.ranges.n_cases) == (4, 4)
    start = json.loads((tiny_run / "run.json").read_text())[-1]
    assert start["training"] == to_json(stated)
    file = tmp_path / "model.safetensors"
    assert run("export", tiny_run, file).exit_code == 0
    assert load_trained(file).training == stated
    assert "4 phantoms of LIVER; licence as stated there: CC0 1.0" in describe(file)["licence"]
    for model in (tiny_run, file):
        result = run("predict", model, image, "--out", tmp_path / "out", "--statistics")
        assert f"{model}: trained on 4 phantoms of LIVER, not on patients" in result.output.replace("\n", " ")
    statistics = json.loads((tmp_path / "out" / "liver_0.json").read_text())
    assert statistics["trained_on"] == ["4 phantoms of LIVER"]


def test_what_is_not_recorded_is_not_claimed(run: Run, tiny_run: Path, image: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_run, tmp_path / "other")
    content = load_checkpoint(other / "best.pt")
    content["training"]["data_set"] = None
    write_checkpoint(other / "best.pt", content)
    assert (
        "its licence is not recorded" in describe(export_model(other, tmp_path / "a.safetensors"))["licence"]
    )
    del content["training"]  # a run of an earlier version
    write_checkpoint(other / "best.pt", content)
    file = export_model(other, tmp_path / "b.safetensors")
    assert describe(file)["licence"] == "Training data not recorded. Not a medical device."
    result = run("predict", file, image, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "trained on" not in result.output


def test_an_answer_that_is_not_plausible_is_said_everywhere(
    run: Run, tiny_run: Path, image: Path, tmp_path: Path
) -> None:
    """Upside down: the network may well find the liver, but the lungs lie below it."""
    original = nib.Nifti1Image.from_filename(image)
    odd = tmp_path / "odd.nii.gz"
    nib.save(nib.Nifti1Image(np.asarray(original.dataobj)[:, :, ::-1], original.affine), odd)
    result = run("predict", tiny_run, odd, "--out", tmp_path / "out", "--statistics", "--preview")
    assert result.exit_code == 0, result.output
    words = result.output.replace("\n", " ")
    statistics = json.loads((tmp_path / "out" / "odd.json").read_text())
    assert statistics["plausible"] is False
    facts = statistics["plausibility"]["facts"]
    assert facts["liver_ml"] == statistics["liver_ml"]
    assert facts["tumour_share"] == statistics["tumour_ml"] / statistics["liver_ml"]
    for reason in statistics["plausibility"]["reasons"]:
        assert f"{odd}: not plausible: {reason}" in words
    assert "not plausible, 1 of 1 scan: odd" in words
    with Image.open(tmp_path / "out" / "odd.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert (pixels == [0xFF, 0x7B, 0x72]).all(axis=1).any()  # in a colour that is not overlooked
    found = liverseg.load(tiny_run).segment(odd)
    assert list(found.plausibility.reasons) == statistics["plausibility"]["reasons"]


def test_files_that_are_no_models(tiny_run: Path, image: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="ends in .safetensors"):
        export_model(tiny_run, tmp_path / "model.pt")
    with pytest.raises(RunError, match="not a readable"):
        load_trained(image)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(RunError, match="not written by liverseg export"):
        load_trained(tmp_path / "other.safetensors")


def with_summary(run: Path, content: object) -> Path:
    """A run whose evaluation has this summary."""
    (run / "evaluation").mkdir(exist_ok=True)
    (run / "evaluation" / "summary.json").write_text(
        content if isinstance(content, str) else json.dumps(content)
    )
    return run


def test_the_scores_of_an_evaluation_go_along(tiny_run: Path, tmp_path: Path) -> None:
    own = content_checksum(load_checkpoint(tiny_run / "best.pt")["average"])
    content = {"models": ["/home/jane/run"], "weights_sha256": [own], "n_cases": 3}
    copy = with_summary(shutil.copytree(tiny_run, tmp_path / "run"), content)
    assert describe(export_model(copy, tmp_path / "m.safetensors"))["evaluation"] == {"n_cases": 3}


@pytest.mark.parametrize("weights", [None, ["0" * 64], "both"], ids=["not said", "trained since", "ensemble"])
def test_the_scores_of_other_weights_do_not_go_along(
    run: Run, tiny_run: Path, tmp_path: Path, weights: Any
) -> None:
    own = content_checksum(load_checkpoint(tiny_run / "best.pt")["average"])
    content = {"n_cases": 3, "weights_sha256": [own, own] if weights == "both" else weights}
    copy, file = (
        with_summary(shutil.copytree(tiny_run, tmp_path / "run"), content),
        tmp_path / "m.safetensors",
    )
    result = run("export", copy, file)
    assert result.exit_code == 0
    assert "not of these weights alone, so left out" in result.output.replace("\n", " ")
    assert describe(file)["evaluation"] is None


@pytest.mark.parametrize("text", ['{"n_cases": ', "\udcff"], ids=["cut short", "not UTF-8"])
def test_a_damaged_summary_is_one_line(run: Run, tiny_run: Path, tmp_path: Path, text: str) -> None:
    copy = with_summary(shutil.copytree(tiny_run, tmp_path / "run"), {})
    (copy / "evaluation" / "summary.json").write_bytes(text.encode(errors="surrogateescape"))
    result = run("export", copy, tmp_path / "m.safetensors")
    assert result.exit_code == 1
    assert "summary.json: unreadable" in result.output.replace("\n", "")
    assert not (tmp_path / "m.safetensors").exists()


def test_an_exported_file_names_no_folder_of_this_machine(tiny_run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_run, tmp_path / "run")
    content = load_checkpoint(copy / "best.pt")
    content["config"]["watch"]["raw"] = "/home/jane/raw"
    content["config"]["data"]["split"] = "/home/jane/split.json"
    write_checkpoint(copy / "best.pt", content)
    file = export_model(copy, tmp_path / "m.safetensors")
    assert b"jane" not in file.read_bytes()
    assert load_trained(file).config.watch.raw is None


# ---- Python


def test_the_api_gives_what_the_command_writes(run: Run, tiny_run: Path, image: Path, tmp_path: Path) -> None:
    assert run("predict", tiny_run, image, "--out", tmp_path / "out").exit_code == 0
    found = liverseg.load(tiny_run, device="cpu").segment(image)
    written = nib.Nifti1Image.from_filename(tmp_path / "out" / "liver_0.nii.gz")
    canonical = np.asarray(nib.as_closest_canonical(written).dataobj).transpose(2, 1, 0)
    np.testing.assert_array_equal(found.label_zyx, canonical)
    np.testing.assert_allclose(found.grid.affine, nib.as_closest_canonical(written).affine, atol=1e-4)
    assert found.liver_ml == pytest.approx(np.count_nonzero(canonical) * found.grid.voxel_volume_ml)
    model = repr(liverseg.load(tiny_run, device="cpu"))
    assert model == f"Model({tiny_run} trained on 4 phantoms of LIVER, on cpu)"
    again = found.save(tmp_path / "again.nii.gz")
    np.testing.assert_array_equal(voxels(again), np.asarray(written.dataobj))


def test_a_folder_of_several_scans_is_not_one(tiny_world: TinyWorld, tiny_run: Path) -> None:
    with pytest.raises(VolumeError, match="holds 6 scans"):
        liverseg.load(tiny_run, device="cpu").segment(tiny_world.raw / "imagesTr")


def test_importing_liverseg_loads_no_torch() -> None:
    code = "import liverseg, sys; assert liverseg.load; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
