"""What is doubtful about scans: said once per scan, and once per command where many scans have it in common."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import pytest
from click.testing import CliRunner, Result
from tiny import SPEC, TinyWorld

from data_cache.reader import CacheStore
from liverseg.cli import main
from pipeline.build import build
from pipeline.decathlon import read_data_set
from pipeline.nifti import NO_UNIT

Call = Callable[..., Result]


@pytest.fixture
def call() -> Call:
    return lambda *arguments: CliRunner().invoke(main, [str(a) for a in arguments])


def without_unit(world: TinyWorld, raw: Path, *, cases: int) -> Path:
    """A data set of the first cases, in files as nibabel writes them: without a unit."""
    listing = json.loads((world.raw / "dataset.json").read_text())
    listing["training"], listing["test"] = listing["training"][:cases], []
    listing["numTraining"], listing["numTest"] = cases, 0
    for kind in ("imagesTr", "labelsTr"):
        (raw / kind).mkdir(parents=True)
        for case in range(cases):
            image = nib.Nifti1Image.from_filename(world.raw / kind / f"liver_{case}.nii.gz")
            image.header.set_xyzt_units("unknown")
            nib.save(image, raw / kind / f"liver_{case}.nii.gz")
    (raw / "dataset.json").write_text(json.dumps(listing))
    return raw


def warnings(result: Result) -> list[str]:
    assert result.exit_code == 0, result.output
    return [line for line in result.output.splitlines() if line.startswith("warning:")]


def test_a_missing_unit_is_one_line_per_command(
    call: Call, tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path
) -> None:
    raw, cache = without_unit(tiny_world, tmp_path / "raw", cases=2), tmp_path / "cache.zarr"
    many = "warning: 2 scans do not state a unit of length: mm was assumed"
    build(read_data_set(raw), cache, SPEC, jobs=1, report=lambda _: None)
    predict = ("predict", tiny_run, raw / "imagesTr", "--out", tmp_path / "out", "--device", "cpu")
    evaluate = ("evaluate", cache, tiny_run, "--raw", raw, "--device", "cpu", "--out", tmp_path / "scores")
    both = (*evaluate, "--case", "liver_0", "--case", "liver_1")  # one was trained on, and is known again
    for command in (("preprocess", raw, tmp_path / "new.zarr", "--jobs", "1"), predict, both):
        about = [line for line in warnings(call(*command)) if "not state" in line]
        assert about == [f"{many} (--verbose names them)"], command
    (line,) = [line for line in warnings(call("--verbose", *both)) if "not state" in line]
    assert line == f"{many}: liver_0, liver_1"
    assert f"warning: liver_1: {NO_UNIT}" in warnings(call(*evaluate, "--case", "liver_1"))
    checked = call("check", raw, "--jobs", "1")
    assert checked.output.count("does not state") == 1
    assert "2 scans" in checked.output
    assert "2 scans read, 0 faults, 2 warnings" in checked.output


def test_evaluate_says_of_a_scan_what_predict_says(
    call: Call, tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path
) -> None:
    raw, cache = without_unit(tiny_world, tmp_path / "raw", cases=1), tmp_path / "cache.zarr"
    for path in raw.glob("*/liver_0.nii.gz"):  # of a much smaller body: unusual, and possible
        image = nib.Nifti1Image.from_filename(path)
        affine = image.affine.copy()
        affine[:3] *= 0.15
        nib.save(nib.Nifti1Image(image.dataobj, affine), path)
    build(read_data_set(raw), cache, SPEC, jobs=1, report=lambda _: None)
    assert CacheStore.open(cache).case_ids == ("liver_0",)
    path = raw / "imagesTr" / "liver_0.nii.gz"
    predicted = warnings(call("predict", tiny_run, path, "--out", tmp_path / "out", "--device", "cpu"))
    said = [line.replace(str(path), "liver_0") for line in predicted if "not plausible" not in line]
    assert any("unusual for a body" in line for line in said)
    common = ("--raw", raw, "--device", "cpu", "--case", "liver_0")
    scored = warnings(call("evaluate", cache, tiny_run, *common, "--out", tmp_path / "scores"))
    assert [line for line in scored if line.startswith("warning: liver_0: ")] == [
        line for line in said if line.startswith("warning: liver_0: ")
    ]
