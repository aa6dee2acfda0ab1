"""liverseg from Python, as a user calls it: each step, what it returns, and what it shows of itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import SPEC, TinyWorld, tiny_config

import data_cache.errors
import liverseg
from data_cache.errors import ConfigError, OutputError, RunError, VolumeError
from data_cache.schema import PreprocessSpec
from liverseg.training.config import save_config


def test_import_loads_neither_torch_nor_numpy() -> None:
    code = "import sys, liverseg; print(liverseg.__version__, liverseg.errors.VolumeError.__name__, *sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = set(run.stdout.split())
    assert "VolumeError" in loaded
    assert not loaded & {"torch", "numpy", "zarr", "nibabel", "rich", "matplotlib"}


def test_the_steps_in_a_row(tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_cache.schema.PreprocessSpec", lambda **_: SPEC)
    save_config(tiny_config(epochs=2), tmp_path / "tiny.toml")
    seen: list[liverseg.Progress] = []
    cache = liverseg.preprocess(tiny_world.raw, tmp_path / "c.zarr", jobs=1, progress=seen.append)
    assert [(p.done, p.total) for p in seen] == [(n, 6) for n in range(1, 7)]
    assert len(cache) == len(cache.case_ids) == 6
    assert repr(cache) == f"Cache('{tmp_path}/c.zarr': 6 cases)"
    assert "liver_0" in cache._repr_html_()

    seen.clear()
    run = liverseg.train(
        cache, tmp_path / "run", config=tmp_path / "tiny.toml", set={"optim.epochs": 1}, progress=seen.append
    )
    assert (seen[-1].done, seen[-1].total) == (3, 3)
    assert "Dice liver" in seen[-1].note
    assert run.epochs == 1
    assert run.history["epoch"] == [1]
    assert repr(run).startswith(f"Run('{tmp_path}/run': 1 epoch, best mean validation Dice 0.")
    assert "<svg" in run._repr_html_()
    assert liverseg.train(cache, run, set={"optim.epochs": 2}, resume=True, progress=False).epochs == 2

    seen.clear()
    scores = liverseg.evaluate(cache, run, raw=tiny_world.raw, device="cpu", progress=seen.append)
    assert len(scores.cases) == len(seen) == len(scores.rows()) == 2
    assert repr(scores).startswith("Scores(2 cases, liver Dice 0.")
    assert scores.cases[0].case_id in scores._repr_html_()
    assert scores.liver_dice == scores.summary["liver"]["dice"]["mean"]
    assert not scores.failed
    for each in scores.cases:
        facts = each.plausibility.facts
        assert (0.0 if facts is None else facts.liver_ml) == each.predicted.liver.volume_pred_ml
    with pytest.raises(liverseg.errors.DataSetError, match="has no image that .* was built from"):
        liverseg.evaluate(cache, run, raw=tmp_path, device="cpu")
    raw = Path(shutil.copytree(tiny_world.raw, tmp_path / "raw"))
    shutil.rmtree(raw / "labelsTr")
    wrong = liverseg.evaluate(cache, run, raw=raw, device="cpu", out=tmp_path / "none", progress=False)
    assert set(wrong.failed) == {e.case_id for e in scores.cases}
    assert repr(wrong).startswith("Scores(0 cases, liver Dice –")
    found = liverseg.load(run, device="cpu").segment(tiny_world.raw / "imagesTs" / "liver_6.nii.gz")
    assert found.label.shape == (40, 40, 40)


def test_a_cpu_is_not_given_the_network_of_a_gpu(tiny_world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="90 million parameters.*would train on the CPU"):
        liverseg.train(tiny_world.cache, tmp_path / "run", set={"device": "cpu"}, progress=False)
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_path_and_an_evaluation_without_a_run_are_one_line(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="load needs the folder of a run"):
        liverseg.load()
    (tmp_path / "m.safetensors").touch()
    with pytest.raises(RunError, match=r"m.safetensors: is a file: evaluate needs the folder of a run"):
        liverseg.evaluate(tiny_world.cache, tmp_path / "m.safetensors", raw=tiny_world.raw)


def test_one_case_is_not_a_sequence_of_letters(tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"raw": tiny_world.raw, "device": "cpu", "out": tmp_path, "progress": False}
    scores = liverseg.evaluate(tiny_world.cache, tiny_run, cases="liver_1", **given)
    assert [case.case_id for case in scores.cases] == ["liver_1"]
    with pytest.raises(ConfigError, match="has no labelled case liver_99$"):
        liverseg.evaluate(tiny_world.cache, tiny_run, cases="liver_99", **given)


def test_records_of_relative_paths_outlive_a_change_of_folder(
    tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_world.cache.parent)
    cache = liverseg.Cache(Path("cache.zarr"))
    found = liverseg.load(tiny_run, device="cpu").segment("raw/imagesTs/liver_6.nii.gz")
    monkeypatch.chdir(tiny_run.parent)
    run, shown = liverseg.Run(Path(tiny_run.name)), repr(cache)
    (tmp_path / "scores.csv").write_text("case,liver_dice\na,0.5\n")
    monkeypatch.chdir(tmp_path.parent)
    scores = liverseg.Scores(cases=(), failed={}, summary={}, out=Path(tmp_path.name))
    monkeypatch.chdir(tmp_path)
    assert repr(cache) == shown
    assert len(cache) == 6
    assert run.epochs == 6
    assert os.fspath(run) == str(tiny_run)
    assert scores.rows() == [{"case": "a", "liver_dice": "0.5"}]
    assert 'src="data:image/png;base64,' in found._repr_html_()


def test_scores_become_a_data_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pandas is none of our dependencies: what is called is tested, with a stand-in."""
    scores = liverseg.Scores(cases=(), failed={}, summary={}, out=tmp_path)
    monkeypatch.setitem(
        sys.modules, "pandas", SimpleNamespace(read_csv=lambda path, index_col: (path, index_col))
    )
    assert scores.to_pandas() == (tmp_path / "scores.csv", "case")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError):
        scores.to_pandas()


def test_a_failed_case_is_named_and_does_not_stop_the_others(tiny_world: TinyWorld, tmp_path: Path) -> None:
    import shutil

    raw = shutil.copytree(tiny_world.raw, tmp_path / "raw")
    (raw / "labelsTr" / "liver_0.nii.gz").unlink()
    cache = liverseg.preprocess(raw, tmp_path / "c.zarr", jobs=1, progress=False)
    assert list(cache.failed) == ["liver_0"]
    assert "cannot be opened" in cache.failed["liver_0"]
    assert repr(cache).endswith("5 cases, 1 failed)")
    assert cache.store.schema.spec == PreprocessSpec()


@pytest.mark.parametrize("crop", ["bx", "", None, "Box"])
def test_a_crop_that_is_none_writes_nothing(tiny_world: TinyWorld, tmp_path: Path, crop: Any) -> None:
    with pytest.raises(ConfigError, match=f"crop: expected 'box' or 'depth', found {crop!r}"):
        liverseg.preprocess(tiny_world.raw, tmp_path / "c.zarr", crop=crop, progress=False)
    assert not (tmp_path / "c.zarr").exists()


@pytest.mark.parametrize("file_axes", ["RAS", "LPS", "SAL"])
def test_a_label_lies_on_the_scans_own_axes(
    tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path, file_axes: str
) -> None:
    original = nib.Nifti1Image.from_filename(tiny_world.raw / "imagesTs" / "liver_6.nii.gz")
    wanted = nib.orientations.axcodes2ornt(file_axes)
    turned = original.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(original.affine), wanted)
    )
    nib.save(turned, tmp_path / "turned.nii.gz")
    model = liverseg.load(tiny_run, device="cpu")
    found = model.segment(tmp_path / "turned.nii.gz")
    assert found.label.shape == turned.shape
    np.testing.assert_array_equal(
        found.label.affine, nib.Nifti1Image.from_filename(tmp_path / "turned.nii.gz").affine
    )
    np.testing.assert_array_equal(
        np.asarray(found.label.dataobj),
        np.asarray(nib.Nifti1Image.from_filename(found.save(tmp_path / "saved.nii.gz")).dataobj),
    )
    canonical = nib.as_closest_canonical(found.label)
    np.testing.assert_array_equal(np.asarray(canonical.dataobj).transpose(2, 1, 0), found.label_zyx)
    # An image in memory, and an array with its affine, are the same scan.
    for other in (model.segment(turned), model.segment(np.asarray(turned.dataobj), affine=turned.affine)):
        np.testing.assert_array_equal(np.asarray(other.label.dataobj), np.asarray(found.label.dataobj))


def test_an_empty_path_is_not_the_working_directory(tiny_run: Path) -> None:
    with pytest.raises(VolumeError, match="the image is an empty path: name a NIfTI file"):
        liverseg.load(tiny_run, device="cpu").segment("")


def test_every_error_can_be_caught_by_its_public_name() -> None:
    raised = {
        n for n, e in vars(data_cache.errors).items() if isinstance(e, type) and issubclass(e, Exception)
    }
    assert raised == set(liverseg.errors.__all__)


@pytest.mark.parametrize(
    "affine",
    [np.eye(3), np.eye(4)[:3], np.full((4, 4), np.nan), np.zeros((4, 4)), np.ones((4, 4)), "RAS", np.eye(4)[::-1]],
    ids=["3×3", "3×4", "NaN", "zeros", "ones", "text", "rows turned"],
)  # fmt: skip
def test_an_affine_that_is_none_is_one_line(tiny_run: Path, affine: object) -> None:
    with pytest.raises(VolumeError, match="affine: expected a finite 4×4 matrix"):
        liverseg.load(tiny_run, device="cpu").segment(np.zeros((8, 8, 8), np.int16), affine=affine)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values", [np.zeros((8, 8, 8), complex), np.zeros((8, 8)), np.zeros((8, 8, 8), object), np.zeros((0, 8, 8))]
)  # fmt: skip
def test_an_array_that_is_no_scan_is_named_as_an_image_and_not_by_a_file(
    tiny_run: Path, values: NDArray[Any]
) -> None:
    with pytest.raises(VolumeError, match="^image: ") as caught:
        liverseg.load(tiny_run, device="cpu").segment(values, affine=np.eye(4))
    assert ".partial" not in str(caught.value)


def test_a_label_is_saved_under_a_name_of_its_kind_into_any_folder(
    tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path
) -> None:
    found = liverseg.load(tiny_run, device="cpu").segment(tiny_world.raw / "imagesTs" / "liver_6.nii.gz")
    with pytest.raises(OutputError, match="ends in .nii.gz or .nii"):
        found.save(tmp_path / "label.nrrd")
    assert found.save(tmp_path / "new" / "folder" / "label.nii.gz").is_file()


def test_a_segmentation_shows_itself(tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path) -> None:
    scan = tmp_path / "scan.nii.gz"
    scan.write_bytes((tiny_world.raw / "imagesTs" / "liver_6.nii.gz").read_bytes())
    found = liverseg.load(tiny_run, device="cpu").segment(scan)
    assert (
        repr(found).replace("NOT PLAUSIBLE: ", "")
        == f"Segmentation(40×40×40, liver {found.liver_ml:.0f} mL, tumour {found.tumour_ml:.1f} mL)"
    )
    assert ("NOT PLAUSIBLE" in repr(found)) is not found.plausible
    assert found.plausible is found.plausibility.plausible
    facts = found.plausibility.facts
    assert (0.0 if facts is None else facts.liver_ml) == found.liver_ml
    assert 'src="data:image/png;base64,' in found._repr_html_()
    scan.unlink()
    assert "cannot be opened" in found._repr_html_()
    with pytest.raises(liverseg.errors.VolumeError, match="an array needs affine"):
        liverseg.load(tiny_run, device="cpu").segment(np.zeros((3, 3, 3), np.int16))
