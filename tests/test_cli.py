"""The command line as a person meets it: one clear line an error, exit codes, what each command prints."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from tiny import SPEC, TinyWorld, tiny_config

from liverseg.cli import main
from liverseg.training.config import TrainConfig, save_config
from pipeline.build import build
from pipeline.decathlon import read_data_set

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    """Call the command in this process; a traceback in its output fails the test."""

    def call(*arguments: str | Path) -> Result:
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert "Traceback" not in result.output
        return result

    return call


def error_line(result: Result) -> str:
    """The one line that complains."""
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("error:")]
    return line


def broken_raw(world: TinyWorld, folder: Path, *, cases: int = 2) -> Path:
    """A copy of the first cases of the tiny data set, to be broken."""
    content = json.loads((world.raw / "dataset.json").read_text())
    content["training"], content["test"] = content["training"][:cases], []
    content["numTraining"], content["numTest"] = cases, 0
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True)
        for case in range(cases):
            shutil.copy(world.raw / kind / f"liver_{case}.nii.gz", folder / kind)
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_has_help_with_an_example(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    group = main.commands[command]
    names = getattr(group, "commands", {})
    for text in [run(command, name, "--help").output for name in names] or [result.output]:
        assert f"Example: liverseg {command}" in text


def test_a_path_that_does_not_exist(run: Run, tmp_path: Path) -> None:
    assert "none: no such folder" in error_line(run("preprocess", tmp_path / "none", tmp_path / "c"))
    assert "none: no such folder" in error_line(run("inspect", tmp_path / "none"))
    assert "none: no such folder" in error_line(run("train", tmp_path / "none", tmp_path / "run"))
    assert "none: no such file or folder: name a training run" in error_line(
        run("predict", tmp_path / "none", "x.nii.gz", "--out", tmp_path)
    )


def test_a_folder_without_dataset_json(run: Run, tmp_path: Path) -> None:
    assert "has no dataset.json" in error_line(run("preprocess", tmp_path, tmp_path / "c"))


def test_a_folder_that_is_no_cache(run: Run, tmp_path: Path) -> None:
    assert "not a liverseg cache: zarr.json is missing" in error_line(run("inspect", tmp_path))


def test_a_run_folder_without_checkpoint(run: Run, tiny_world: TinyWorld, tmp_path: Path) -> None:
    line = error_line(run("evaluate", tiny_world.cache, tmp_path, "--raw", tiny_world.raw))
    assert "best.pt: no such checkpoint" in line


@pytest.mark.parametrize("fault", ["missing label", "shape", "affine", "values", "truncated", "flipped bit"])
def test_a_bad_case_is_named_and_does_not_stop_the_others(
    run: Run, tiny_world: TinyWorld, tmp_path: Path, fault: str
) -> None:
    raw = broken_raw(tiny_world, tmp_path / "raw")
    image, label = (raw / kind / "liver_0.nii.gz" for kind in ("imagesTr", "labelsTr"))
    nifti = nib.Nifti1Image.from_filename(label)
    voxels = np.asarray(nifti.dataobj)
    expected = {
        "missing label": "labelsTr/liver_0.nii.gz: cannot be opened: No such file",
        "shape": "has the shape (40, 40, 39)",
        "affine": "its affine puts it 7.00 mm away",
        "values": "holds 7 (5 from 2)",
        "truncated": "liver_0.nii.gz",
        "flipped bit": "liver_0.nii.gz: damaged gzip data",
    }[fault]
    if fault == "missing label":
        label.unlink()
    elif fault == "shape":
        nib.save(nifti.slicer[:, :, :39], label)
    elif fault == "affine":
        moved = nifti.affine.copy()
        moved[0, 3] += 7
        nib.save(nib.Nifti1Image(voxels, moved), label)
    elif fault == "values":
        changed = voxels.copy()
        changed[0, 0, 0] = 7
        changed[1, 1, 1:3] = 1, 2
        nib.save(nib.Nifti1Image(changed, nifti.affine), label)
    elif fault == "truncated":
        image.write_bytes(image.read_bytes()[:-2000])
    else:
        content = bytearray(image.read_bytes())
        content[len(content) // 2] ^= 4
        image.write_bytes(content)
    result = run("preprocess", raw, tmp_path / "cache.zarr", "--jobs", "1")
    line = error_line(result)
    assert line.startswith("error: liver_0: ")
    assert expected in line
    assert "1 case built, 0 were up to date, 1 failed" in result.output
    assert sorted(p.name for p in (tmp_path / "cache.zarr").iterdir()) == ["liver_1", "zarr.json"]


@pytest.mark.parametrize("name", ["liver 0.nii.gz", "liver_0 (1).nii.gz"])
def test_a_name_that_is_no_case_id_does_not_stop_the_others(
    run: Run, tiny_world: TinyWorld, tmp_path: Path, name: str
) -> None:
    raw = broken_raw(tiny_world, tmp_path / "raw")
    for kind in ("imagesTr", "labelsTr"):
        (raw / kind / "liver_0.nii.gz").rename(raw / kind / name)
    listing = (raw / "dataset.json").read_text()
    (raw / "dataset.json").write_text(listing.replace("liver_0.nii.gz", name))
    result = run("preprocess", raw, tmp_path / "cache.zarr", "--jobs", "1")
    line = error_line(result)
    assert line.startswith(f"error: {raw / 'imagesTr' / name}: is not a case name: expected letters")
    assert line.endswith("rename it, also in dataset.json, or remove it")
    assert "1 case built, 0 were up to date, 1 failed" in result.output
    assert sorted(p.name for p in (tmp_path / "cache.zarr").iterdir()) == ["liver_1", "zarr.json"]
    checked = run("check", raw, "--jobs", "1")
    assert checked.exit_code == 1
    assert "1 scan read, 1 fault, 0 warnings" in checked.output
    assert name in checked.output


def test_preprocess_skips_what_is_done_and_refuses_another_spec(
    run: Run, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    raw, cache = broken_raw(tiny_world, tmp_path / "raw"), tmp_path / "cache.zarr"
    first = run("preprocess", raw, cache, "--jobs", "1")
    assert "2 cases built, 0 were up to date" in first.output
    before = {p: p.stat().st_mtime_ns for p in cache.rglob("*")}
    assert "0 cases built, 2 were up to date" in run("preprocess", raw, cache).output
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*")} == before
    line = error_line(run("preprocess", raw, tiny_world.cache))
    assert (
        "built with another spec (shape_zyx: the store has [16, 32, 32], this command has [64, 128, 128])"
        in line
    )


def test_inspect_prints_the_table_and_draws_a_case(run: Run, tiny_world: TinyWorld, tmp_path: Path) -> None:
    table = run("inspect", tiny_world.cache).output
    for case_id in tiny_world.store.case_ids:
        assert case_id in table
    png = tmp_path / "pictures" / "case.png"
    result = run("inspect", tiny_world.cache, "liver_1", "--png", png)
    assert result.exit_code == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "imagesTr/liver_1.nii.gz" in result.output
    assert "has no case 'liver_9'" in error_line(run("inspect", tiny_world.cache, "liver_9"))
    assert run("inspect", tiny_world.cache, "--png", png).exit_code == 2


def test_train_evaluate_predict_in_a_row(run: Run, tiny_world: TinyWorld, tmp_path: Path) -> None:
    save_config(tiny_config(epochs=2), tmp_path / "tiny.toml")
    folder = tmp_path / "run"
    arguments = ("train", tiny_world.cache, folder, "--config", tmp_path / "tiny.toml")
    first = run(*arguments, "--set", "optim.epochs=1")
    assert first.exit_code == 0, first.output
    assert "epoch   1/1" in first.output
    assert "holds a run already" in error_line(run(*arguments))
    resumed = run("train", tiny_world.cache, folder, "--resume", "--set", "optim.epochs=2")
    assert "epoch   2/2" in resumed.output
    assert "epoch   1/2" not in resumed.output

    scored = run("evaluate", tiny_world.cache, folder, "--raw", tiny_world.raw, "--device", "cpu")
    assert scored.exit_code == 0, scored.output
    assert "never trained on" in scored.output
    assert (folder / "evaluation" / "scores.csv").exists()
    summary = json.loads((folder / "evaluation" / "summary.json").read_text())
    doubtful = summary["not_plausible"]
    assert doubtful  # after two steps
    assert (
        f"not plausible, {len(doubtful)} of {summary['n_cases']} cases: {', '.join(doubtful)}"
        in scored.output
    )
    seen = run(
        "evaluate", tiny_world.cache, folder, "--raw", tiny_world.raw, "--case",
        json.loads((folder / "split.json").read_text())["train"][0], "--out", tmp_path / "seen",
    )  # fmt: skip
    assert "TRAINED ON" in seen.output
    assert "warning:" in seen.output

    image = tiny_world.raw / "imagesTs" / "liver_6.nii.gz"
    missing = tmp_path / "missing.nii.gz"
    predicted = run("predict", folder, missing, image, "--out", tmp_path / "out")
    assert "missing.nii.gz: cannot be opened" in error_line(predicted)
    assert (tmp_path / "out" / "liver_6.nii.gz").exists()  # one bad file does not stop the rest


def test_too_few_cases_to_train_says_how_many_and_how_to_name_them(
    run: Run, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    line = error_line(
        run(
            "train",
            tiny_world.cache,
            tmp_path / "run",
            "--set",
            "model.base_channels=2",
            "--set",
            "data.folds=9",
            "--set",
            "data.fold=8",
        )
    )
    assert "has 6 labelled cases, and fold 8 of 9 needs at least 9: add cases, lower data.fold, or" in line
    raw = broken_raw(tiny_world, tmp_path / "raw", cases=1)
    build(read_data_set(raw), tmp_path / "one.zarr", SPEC, jobs=1, report=lambda _: None)
    save_config(tiny_config(epochs=1, steps=1), tmp_path / "tiny.toml")
    arguments = ("train", tmp_path / "one.zarr", tmp_path / "run", "--config", tmp_path / "tiny.toml")
    line = error_line(run(*arguments))
    assert "has 1 labelled case, and fold 0 of 3 needs at least 2: " in line
    # What is advised is a command line that works.
    advised = shlex.split(line.partition("yourself, such as ")[2].partition(" (a case may be in both)")[0])
    assert advised == ["--set", 'data.train_cases=["liver_0"]', "--set", 'data.val_cases=["liver_0"]']
    assert run(*arguments, *advised).exit_code == 0


def test_an_evaluation_of_nothing_claims_nothing(
    run: Run, tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path
) -> None:
    raw = Path(shutil.copytree(tiny_world.raw, tmp_path / "raw"))
    for label in (raw / "labelsTr").iterdir():
        label.unlink()
    arguments = (tiny_world.cache, tiny_run, "--raw", raw, "--out", tmp_path / "out")
    result = run("evaluate", *arguments, "--device", "cpu")
    assert result.exit_code == 1
    assert "no case could be scored: nothing was written" in result.output
    assert "wrote scores.csv" not in result.output


@pytest.mark.parametrize("kind", ["missing", "another", "cache"])
def test_a_wrong_data_set_is_one_error(
    run: Run, tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path, kind: str
) -> None:
    raw, found = tmp_path / "raw", "no such file"
    if kind == "another":  # of the same names
        shutil.copytree(tiny_world.raw, raw)
        for path in (raw / "imagesTr").iterdir():
            path.write_bytes(path.read_bytes() + b"\0")
        found = " bytes, expected "
    elif kind == "cache":
        raw = tiny_world.cache
    line = error_line(run("evaluate", tiny_world.cache, tiny_run, "--raw", raw, "--out", tmp_path / "out"))
    assert line.startswith(
        f"error: {raw}: has no image that {tiny_world.cache} was built from ({raw}/imagesTr"
    )
    assert found in line
    assert (f"({tiny_world.cache} is a cache, not a --raw)" in line) == (kind == "cache")
    assert not (tmp_path / "out").exists()


def test_one_line_per_epoch_where_nobody_watches(run: Run, tiny_world: TinyWorld, tmp_path: Path) -> None:
    save_config(tiny_config(epochs=2, steps=2), tmp_path / "tiny.toml")
    result = run("train", tiny_world.cache, tmp_path / "run", "--config", tmp_path / "tiny.toml")
    lines = result.output.splitlines()
    assert len(lines) == 4
    assert "training and 2 validation cases" in lines[0]
    assert [line[:11] for line in lines[1:3]] == ["epoch   1/2", "epoch   2/2"]
    assert lines[3].startswith(f"{tmp_path / 'run'}: 2 epochs")


def test_a_cpu_is_not_given_the_network_of_a_gpu_unless_asked(
    run: Run, tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("liverseg.training.train.train", lambda *given, **_: asked.append(given[2]))
    arguments = ("train", tiny_world.cache, tmp_path / "run")
    refused = run(*arguments, "--set", "device=cpu")
    words = " ".join(refused.output.split())
    assert refused.exit_code == 1
    assert "has 90 million parameters, which are meant for a GPU" in words
    for choice in ("configs/demo.toml", "set model.base_channels=8", "device=cuda"):
        assert choice in words
    assert not asked
    save_config(TrainConfig(device="cpu"), tmp_path / "large.toml")
    run(*arguments, "--config", tmp_path / "large.toml")
    run(*arguments, "--set", "device=cpu", "--set", "model.base_channels=64")
    assert [config.model.base_channels for config in asked] == [64, 64]
    monkeypatch.setattr("liverseg.training.run_config.choose_device", lambda _: torch.device("cuda"))
    run(*arguments)
    assert len(asked) == 3


@pytest.mark.parametrize("command", ["phantom", "fingerprint"])
def test_a_negative_seed_is_wrong_usage(run: Run, tmp_path: Path, command: str) -> None:
    result = run(command, tmp_path / "data", "--seed", -1)
    assert result.exit_code == 2
    assert "--seed" in result.output
    assert not (tmp_path / "data").exists()


def test_a_shape_too_small_is_wrong_usage(run: Run, tmp_path: Path) -> None:
    result = run("phantom", tmp_path / "raw", "--shape", "1x1x1")
    assert result.exit_code == 2
    assert "--shape" in result.output
    assert not (tmp_path / "raw").exists()


def test_a_wrong_configuration_is_one_line(run: Run, tiny_world: TinyWorld, tmp_path: Path) -> None:
    line = error_line(run("train", tiny_world.cache, tmp_path / "run", "--set", "optim.epoch=3"))
    assert "optim.epoch: unknown key" in line
    line = error_line(run("train", tiny_world.cache, tmp_path / "run", "--config", tmp_path / "no.toml"))
    assert "no such file" in line
    assert not (tmp_path / "run").exists()


def test_an_internal_fault_is_one_line_and_debug_shows_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> None:
        raise KeyError("oops")

    monkeypatch.setattr("pipeline.decathlon.read_data_set", fail)
    line = error_line(run("preprocess", "raw", "cache"))
    assert "internal: KeyError: 'oops' (liverseg --debug" in line
    with pytest.raises(KeyError, match="oops"):
        CliRunner().invoke(main, ["--debug", "preprocess", "raw", "cache"], catch_exceptions=False)


def test_interruption_is_said_and_has_its_own_code(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.decathlon.read_data_set", interrupt)
    result = run("preprocess", "raw", "cache")
    assert result.exit_code == 130
    assert "finished work is kept; run the same command again to continue" in result.output
