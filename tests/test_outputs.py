"""Files that a command may replace: its own earlier output, recognised by a mark in each format, and nothing else."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import oriented_affine, tree_bytes, write_nifti
from tiny import TinyWorld, change_weights, copy_folds, tiny_config

from data_cache.errors import DataSetError, OutputError
from data_cache.files import write_csv, write_json
from data_cache.geometry import Grid
from data_cache.outputs import (
    Mark,
    csv_mark,
    html_mark,
    json_mark,
    nifti_mark,
    png_mark,
    require_replaceable,
    write_signed_json,
)
from liverseg.cli import main
from liverseg.pictures.page import Page, PageCase, case_folder, write_page
from liverseg.pictures.sheet import new_figure, save
from liverseg.training.config import save_config
from pipeline.nifti import write_volume
from pipeline.phantom import write_phantoms

PAGE = Page(title="a", subtitle="b", sections=(), order="", columns=(), digits=(), cases=())


def json_file(path: Path, command: str) -> None:
    write_signed_json(path, {"n": 1}, command=command)


def png_file(path: Path, command: str) -> None:
    save(new_figure("a title", width_in=4, height_in=4), path, command=command)


def html_file(path: Path, command: str) -> None:
    write_page(PAGE, path, command=command)


def nifti_file(path: Path, command: str) -> None:
    grid = Grid.from_array((3, 4, 5), oriented_affine("RAS"))
    write_volume(path, np.zeros((3, 4, 5), dtype=np.uint8), grid, description=f"liverseg {command}")


def nifti_mark_of(command: str) -> Mark:
    return nifti_mark(f"liverseg {command}")


def csv_file(path: Path, command: str) -> None:
    write_csv(path, [{"case": "a", command: 2, "more": 1}])


def csv_mark_of(command: str) -> Mark:
    return csv_mark("case", command)


FORMATS = pytest.mark.parametrize(
    ("write", "mark"),
    [
        (json_file, json_mark),
        (png_file, png_mark),
        (html_file, html_mark),
        (nifti_file, nifti_mark_of),
        (csv_file, csv_mark_of),
    ],
)


@FORMATS
def test_a_command_replaces_its_own_output_and_no_other(
    tmp_path: Path, write: Callable[[Path, str], None], mark: Callable[[str], Mark]
) -> None:
    path = tmp_path / "file"
    require_replaceable(path, mark("inspect"), command="inspect")
    write(path, "inspect")
    require_replaceable(path, mark("inspect"), command="inspect")
    with pytest.raises(
        OutputError, match="exists and was not written by liverseg report: name another place"
    ):
        require_replaceable(path, mark("report"), command="report")


@FORMATS
@pytest.mark.parametrize(
    "content", [b"", b"\x1f\x8b broken", b"liverseg inspect", gzip.compress(b"liverseg inspect")]
)
def test_anything_else_stays(
    tmp_path: Path, write: Callable[[Path, str], None], mark: Callable[[str], Mark], content: bytes
) -> None:
    assert write is not None
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(OutputError, match=re.escape(str(path))):
        require_replaceable(path, mark("inspect"), command="inspect")


def a_folder(path: Path) -> None:
    path.mkdir()


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_broken_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [a_folder, a_fifo, a_broken_link])
def test_what_is_not_a_file_stays(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x")
    with pytest.raises(OutputError):
        require_replaceable(tmp_path / "x", json_mark("fidelity"), command="fidelity")


def test_the_mark_is_that_of_nifti_2_too(tmp_path: Path) -> None:
    def described(header: object) -> None:
        header["descrip"] = b"liverseg: 1 liver, 2 tumour"  # type: ignore[index]

    voxels = np.zeros((3, 4, 5), dtype=np.uint8)
    for version in (1, 2):
        path = write_nifti(tmp_path / f"{version}.nii.gz", voxels, version=version, edit=described)
        require_replaceable(path, nifti_mark("liverseg: 1 liver"), command="predict")


# --- the commands


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


# Each is told one file to write, at the end.
ONE_FILE = (
    ("fidelity RAW CACHE --json", "dataset.json"),
    ("fingerprint CACHE --json", "dataset.json"),
    ("fingerprint CACHE --png", "photo.png"),
    ("inspect CACHE liver_0 --png", "photo.png"),
    ("inspect CACHE --html", "page.html"),
    ("export RUN", "other.safetensors"),
    ("report RUN --scores SCORES --out", "page.html"),
    ("view RAW/imagesTr/liver_0.nii.gz RAW/labelsTr/liver_0.nii.gz --out", "page.html"),
)
# Each writes several files.
FOLDERS = (
    "evaluate CACHE one --raw RAW --case liver_0 --device cpu",
    "evaluate CACHE RUN --with other --samples 2 --raw RAW --case VAL --calibrate CACHE RAW --device cpu --out x",
    "compare CACHE one two --raw RAW --case liver_0 --device cpu --out both",
    "pool CACHE one two --raw RAW --device cpu --out folds",
    "score RAW/labelsTr RAW/labelsTr --out scores",
    "predict RUN RAW/imagesTr/liver_0.nii.gz --out labels --preview --statistics --device cpu",
    "predict RUN dicom --with other --out labels --preview --dicom-seg --samples 2 --device cpu",
    "train CACHE new --config tiny.toml --set watch.pictures_every=1",
    "overfit CACHE liver_2 new --config tiny.toml --losses dice_focal --steps 1",
    "tune CACHE liver_2 new --config tiny.toml --steps 1 --rungs 1 --gammas 1 --alphas 1 --learning-rates 0.1 --jobs 1",
    "preprocess RAW new.zarr --jobs 1",
)
REFUSAL = r"already|exists and was not written by liverseg \w+: name another|holds something else: name|name a(nother| new or empty) folder"
OWN_TESTS = {"download", "phantom"}  # which refuse a foreign file: in test_download.py, and below
NO_OUTPUT = {"check", "verify", "config", "bench"}


def test_every_command_that_writes_is_tried() -> None:
    tried = {command.split()[0] for command in (*FOLDERS, *(command for command, _ in ONE_FILE))}
    assert tried | OWN_TESTS == main.commands.keys() - NO_OUTPUT


@pytest.mark.parametrize(("command", "name"), ONE_FILE)
def test_a_command_leaves_a_foreign_file_and_replaces_its_own(
    tiny_world: TinyWorld, tiny_run: Path, evaluation: Path, tmp_path: Path, command: str, name: str
) -> None:
    places = {"RAW": tiny_world.raw, "CACHE": tiny_world.cache, "RUN": tiny_run, "SCORES": evaluation}
    arguments = _in_places(command, places)
    path = tmp_path / name
    path.write_bytes(b"mine")
    refused = run(*arguments, path)
    assert refused.exit_code == 1
    assert f"{path}: exists and was not written by liverseg {command.split()[0]}" in refused.output
    assert tree_bytes(tmp_path) == {name: b"mine"}
    path.unlink()
    for _ in range(2):
        written = run(*arguments, path)
        assert written.exit_code == 0, written.output


def _in_places(command: str, places: dict[str, Path]) -> list[str]:
    """The words of a command, with folders for those that begin with a name in capitals."""
    words = [word.partition("/") for word in command.split()]
    return [f"{places.get(first, first)}{slash}{rest}" for first, slash, rest in words]


@pytest.fixture(scope="module")
def evaluation(tiny_world: TinyWorld, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation of the tiny run."""
    out = tmp_path_factory.mktemp("evaluation") / "evaluation"
    result = run("evaluate", tiny_world.cache, tiny_run, "--raw", tiny_world.raw, "--out", out)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize(
    ("command", "page"),
    [
        ("report other", "other/evaluation/report.html"),
        ("view RAW/imagesTr/liver_0.nii.gz RAW/labelsTr/liver_0.nii.gz", "liver_0_view.html"),
    ],
)
def test_a_page_of_no_given_name_replaces_no_page_of_another_command(
    home: Path, tiny_world: TinyWorld, evaluation: Path, command: str, page: str
) -> None:
    shutil.copytree(evaluation, home / "other/evaluation")
    arguments = _in_places(command, {"RAW": tiny_world.raw})
    html_file(home / page, "inspect")
    before = tree_bytes(home)
    refused = run(*arguments)
    assert refused.exit_code == 1
    assert f"{page}: exists and was not written by liverseg {arguments[0]}: name another" in refused.output
    assert tree_bytes(home) == before
    (home / page).unlink()
    for _ in range(2):
        assert run(*arguments).exit_code == 0
    assert tree_bytes(home).keys() == before.keys()


def test_no_page_is_written_where_the_file_of_a_case_would_replace_another(tmp_path: Path) -> None:
    cases = [PageCase(name=name, note="", cells=(), content=lambda: "{}") for name in ("a", "b")]
    page = replace(PAGE, cases=cases)
    other = case_folder(tmp_path / "page.html") / "b.html"
    other.parent.mkdir()
    other.write_text("mine")
    before = tree_bytes(tmp_path)
    with pytest.raises(OutputError, match="b.html: exists and was not written by liverseg report"):
        write_page(page, tmp_path / "page.html", max_cases=1)
    assert tree_bytes(tmp_path) == before
    other.unlink()
    for _ in range(2):
        write_page(page, tmp_path / "page.html", max_cases=1)
    assert len(tree_bytes(tmp_path)) == 3


@pytest.fixture
def home(tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a copy of the run, and two folds of a cross-validation that leave out a case each."""
    shutil.copytree(tiny_run, tmp_path / "other")
    change_weights(tmp_path / "other")
    copy_folds(tiny_world, tiny_run, tmp_path)
    save_config(tiny_config(epochs=1, steps=1), tmp_path / "tiny.toml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", FOLDERS)
def test_a_command_refuses_each_file_that_it_would_write_and_did_not(
    home: Path, tiny_world: TinyWorld, tiny_run: Path, command: str
) -> None:
    places = {"RAW": tiny_world.raw, "CACHE": tiny_world.cache, "RUN": tiny_run}
    places["VAL"] = Path(json.loads((tiny_run / "split.json").read_text())["val"][0])
    if "dicom" in command.split():
        pytest.importorskip("highdicom")
        from test_batch import write_dicom

        write_dicom(tiny_world.raw / "imagesTr/liver_0.nii.gz", home / "dicom")
    arguments = _in_places(command, places)
    before = tree_bytes(home)
    for again in ((), ("--resume",) if arguments[0] == "train" else ()):
        result = run(*arguments, *again)
        assert result.exit_code == 0, result.output
    written = tree_bytes(home).keys() - before.keys()
    assert len(written) >= 2
    for name in sorted(written):
        for other in written:
            (home / other).unlink(missing_ok=True)
        (home / name).write_bytes(b"mine")
        refused = run(*arguments)
        assert refused.exit_code == 1, name
        (line,) = [line for line in refused.output.splitlines() if line.startswith("error:")]
        assert re.search(REFUSAL, line), line
        assert tree_bytes(home) == {**before, name: b"mine"}
        (home / name).unlink()


def test_an_evaluation_deletes_its_own_stale_pictures_only(
    home: Path, tiny_world: TinyWorld, tiny_run: Path
) -> None:
    case = json.loads((tiny_run / "split.json").read_text())["val"][0]
    common = ("evaluate", tiny_world.cache, tiny_run, "--raw", tiny_world.raw, "--case", case, "--out", "x")
    assert run(*common, "--with", "other", "--samples", 2).exit_code == 0
    (home / "x/uncertainty/notes.png").write_bytes(b"mine")
    (home / "x/risk_coverage.png").write_bytes(b"mine")
    assert run(*common).exit_code == 0
    left = tree_bytes(home / "x")
    assert (left["uncertainty/notes.png"], left["risk_coverage.png"]) == (b"mine", b"mine")
    assert not {f"uncertainty/{case}.png", "uncertainty.json", "reliability.png"} & left.keys()


def test_predict_leaves_the_scan_and_the_truth(tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path) -> None:
    image = (tiny_world.raw / "imagesTr/liver_0.nii.gz").read_bytes()
    (tmp_path / "scan.nii.gz").write_bytes(image)
    (tmp_path / "scan.nii").write_bytes(gzip.decompress(image))
    (tmp_path / "labelsTr").mkdir()
    (tmp_path / "labelsTr/liver_1.nii.gz").write_bytes(
        (tiny_world.raw / "labelsTr/liver_1.nii.gz").read_bytes()
    )
    before = tree_bytes(tmp_path)
    over_itself = run("predict", tiny_run, tmp_path / "scan.nii", "--out", tmp_path)
    over_truth = run(
        "predict", tiny_run, tiny_world.raw / "imagesTr/liver_1.nii.gz", "--out", tmp_path / "labelsTr"
    )
    for result in (over_itself, over_truth):
        assert (result.exit_code, "was not written by liverseg predict" in result.output) == (1, True)
    assert tree_bytes(tmp_path) == before


@pytest.mark.parametrize("name", ["scan.png", "scan.json"])
def test_predict_checks_each_file_before_it_writes_any(
    tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path, name: str
) -> None:
    scan, out = tmp_path / "scan.nii.gz", tmp_path / "out"
    scan.write_bytes((tiny_world.raw / "imagesTr/liver_0.nii.gz").read_bytes())
    out.mkdir()
    (out / name).write_text("{}")
    arguments = ("predict", tiny_run, scan, "--out", out, "--preview", "--statistics")
    assert run(*arguments).exit_code == 1
    assert tree_bytes(out) == {name: b"{}"}
    (out / name).unlink()
    for _ in range(2):
        assert run(*arguments).exit_code == 0


def test_score_leaves_the_scores_of_another_command(tiny_world: TinyWorld, tmp_path: Path) -> None:
    truth = tiny_world.raw / "labelsTr"
    write_json(tmp_path / "summary.json", {"n_cases": 6})
    refused = run("score", truth, truth, "--out", tmp_path)
    assert (refused.exit_code, json.loads((tmp_path / "summary.json").read_text())) == (1, {"n_cases": 6})
    (tmp_path / "summary.json").unlink()
    for _ in range(2):
        assert run("score", truth, truth, "--out", tmp_path).exit_code == 0


def test_a_phantom_never_replaces_a_patient(tmp_path: Path) -> None:
    def phantoms() -> list[Path]:
        return write_phantoms(tmp_path, cases=1, tests=1, shape_xyz=(16, 16, 16))

    scan = tmp_path / "imagesTs/liver_1.nii.gz"
    write_nifti(scan, np.zeros((3, 4, 5), dtype=np.int16))
    patient = scan.read_bytes()
    with pytest.raises(OutputError, match="liver_1.nii.gz: exists"):
        phantoms()
    assert tree_bytes(tmp_path) == {"imagesTs/liver_1.nii.gz": patient}
    scan.unlink()
    phantoms()
    (tmp_path / "dataset.json").unlink()  # as if killed before the end
    assert phantoms()[1] == scan
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(DataSetError, match="another data set"):
        phantoms()
