"""What users name instead of a scan: each gets its own line, and one bad scan never ends a batch."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import write_nifti
from tiny import TinyWorld

from data_cache.files import write_csv, write_json
from data_cache.text import visible
from liverseg.cli import main
from liverseg.inference.inputs import find_scans
from liverseg.training.config import load_config
from pipeline.labels import looks_like_label

Run = Callable[..., Result]
NOT_UTF8 = os.fsdecode(b"L\xe9ber.nii.gz")
HOSTILE = "a\x1b[31m\nerror: b\u202e.nii.gz"


@pytest.fixture
def run() -> Run:
    return lambda *arguments: CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def image(tiny_world: TinyWorld) -> Path:
    return tiny_world.raw / "imagesTr" / "liver_0.nii.gz"


def errors(result: Result) -> list[str]:
    return [line for line in result.output.splitlines() if line.startswith("error:")]


# ---- one bad scan never ends a batch


def broken_scans(folder: Path) -> list[Path]:
    """Paths that fail each in its own way, none of them in liverseg's."""
    folder.mkdir()
    (folder / "loop.nii").symlink_to(folder / "loop.nii")
    (folder / "folder.nii").mkdir()
    (folder / "noise.zip").write_bytes(os.urandom(1000))
    (folder / "text.nii.gz").write_text("no scan")
    return [
        *sorted(folder.iterdir()),
        folder / ("x" * 300 + ".nii"),
        folder / "none" / "scan.nii",
        Path("/dev/null"),
    ]


def test_each_bad_scan_is_one_line_and_the_good_ones_are_written(
    run: Run, tiny_run: Path, image: Path, tmp_path: Path
) -> None:
    bad, out = broken_scans(tmp_path / "bad"), tmp_path / "out"
    (out / "taken.nii.gz").mkdir(parents=True)  # a folder at an output's name
    long = "n" * 240  # with its number and its ending, a temporary file's name would be too long
    for name in ("taken", "good", long):
        shutil.copy(image, tmp_path / f"{name}.nii.gz")
    scans = [*bad, tmp_path / "taken.nii.gz", tmp_path / f"{long}.nii.gz", tmp_path / "good.nii.gz"]
    result = run("predict", tiny_run, *scans, "--out", out)
    assert result.exit_code == 1
    lines = errors(result)
    assert len(lines) == len(scans) - 2, result.output
    assert "internal" not in result.output
    assert "Traceback" not in result.output
    assert (out / "good.nii.gz").is_file()
    assert (out / f"{long}.nii.gz").is_file()
    for scan in scans[:-2]:
        assert any(scan.name[:200] in line for line in lines), scan


def test_an_internal_fault_of_one_scan_leaves_the_others(
    run: Run, tiny_run: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(image, tmp_path / "first.nii.gz")
    from liverseg.inference.segment import segment

    def fail_once(thin: Any, predictor: Any) -> Any:
        if thin.header.path.name == "first.nii.gz":
            raise KeyError("oops")
        return segment(thin, predictor)

    monkeypatch.setattr("liverseg.inference.predict.segment", fail_once)
    result = run("predict", tiny_run, tmp_path / "first.nii.gz", image, "--out", tmp_path / "out")
    assert result.exit_code == 1
    (line,) = errors(result)
    assert line.startswith(f"error: {tmp_path / 'first.nii.gz'}: internal: KeyError: 'oops'")
    assert (tmp_path / "out" / "liver_0.nii.gz").exists()


# ---- names


def test_names_that_are_not_text(run: Run, tiny_run: Path, image: Path, tmp_path: Path) -> None:
    names = [NOT_UTF8, HOSTILE, "a$b$_{c.nii.gz", "[bold]x[red].nii.gz", "B.NII.GZ"]
    for name in names:
        shutil.copy(image, tmp_path / name)
    out = tmp_path / "out"
    scans = [tmp_path / name for name in names]
    result = run("predict", tiny_run, *scans, "--out", out, "--preview", "--statistics")
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    assert errors(result) == []
    labels = {p.name for p in out.iterdir() if p.name.endswith(".nii.gz")}
    assert labels == {*names[:-1], "B.nii.gz"}
    for path in out.glob("*.json"):
        assert json.loads(path.read_text())["image"] in {visible(name) for name in names}


def test_hostile_names_in_errors_and_usage(run: Run, tiny_run: Path, tmp_path: Path) -> None:
    for arguments in (
        ("predict", tiny_run, tmp_path / HOSTILE, "--out", tmp_path / "out"),
        ("predict", tmp_path / HOSTILE, "x.nii", "--out", tmp_path / "out"),
        ("check", tmp_path / HOSTILE),
        ("inspect", tmp_path / HOSTILE),
        ("preprocess", tmp_path, tmp_path / "c", "--shard", HOSTILE),
    ):
        result = run(*arguments)
        assert result.exit_code != 0
        assert "\x1b" not in result.output
        assert "\u202e" not in result.output
        assert not any(line.startswith("error: b") for line in result.output.splitlines())


def test_visible() -> None:
    assert visible("Leber µ ≥ 5 … 肝.nii") == "Leber µ ≥ 5 … 肝.nii"
    assert visible(NOT_UTF8) == "L\\udce9ber.nii.gz"
    assert visible("a\tb\x7f\u2028") == "a\\tb\\x7f\\u2028"
    assert visible(visible(HOSTILE)) == visible(HOSTILE)


def test_tables_and_json_take_names_that_are_not_utf8(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"image": NOT_UTF8})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"image": NOT_UTF8}
    write_csv(tmp_path / "a.csv", [{"case": NOT_UTF8}])
    (row,) = csv.DictReader((tmp_path / "a.csv").read_text().splitlines())
    assert row["case"] == "L\\udce9ber.nii.gz"


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii", "utf-8"])
@pytest.mark.parametrize(
    "arguments", [["--help"], ["tune", "--help"], ["predict", "--help"], ["check", "RAW"]]
)
def test_streams_that_are_not_utf8(tiny_world: TinyWorld, encoding: str, arguments: list[str]) -> None:
    command = [str(tiny_world.raw) if a == "RAW" else a for a in arguments]
    environment = dict(os.environ, PYTHONIOENCODING=encoding)
    done = subprocess.run(
        [sys.executable, "-m", "liverseg", *command], capture_output=True, env=environment, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    # click takes ASCII for a mistake and writes UTF-8.
    assert done.stdout.decode("utf-8" if encoding == "ascii" else encoding)


def test_a_configuration_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbf[optim]\nepochs = 3\n")
    assert load_config(tmp_path / "a.toml").optim.epochs == 3


# ---- privacy


@pytest.mark.parametrize("version", [1, 2])
def test_no_text_of_the_scan_reaches_the_label(
    run: Run, tiny_run: Path, tmp_path: Path, version: int
) -> None:
    def name(header: Any) -> None:
        fields = ["aux_file", "intent_name", "descrip", *(["db_name"] if version == 1 else [])]
        for field in fields:
            header[field] = b"DOE^JOHN"

    hu = np.random.default_rng(0).normal(0, 300, (20, 20, 20)).astype(np.int16)
    write_nifti(
        tmp_path / "s.nii",
        hu,
        version=version,
        edit=name,
        extension=b"\x20\0\0\0\x06\0\0\0DOE^JOHN".ljust(32, b"\0"),
    )
    result = run(
        "predict", tiny_run, tmp_path / "s.nii", "--out", tmp_path / "out", "--statistics", "--force"
    )
    assert result.exit_code == 0, result.output
    label: Any = nib.load(tmp_path / "out" / "s.nii.gz")
    scan: Any = nib.load(tmp_path / "s.nii")
    assert b"DOE" not in label.header.binaryblock
    assert label.header.get_zooms() == scan.header.get_zooms()
    assert str(tmp_path) not in (tmp_path / "out" / "s.json").read_text()


# ---- messages that help


def refusals(*paths: Path) -> list[str]:
    return [scan.refusal for scan in find_scans(paths)]


def test_what_is_named_instead_of_a_scan(tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "IM1.dcm").write_bytes(bytes(128) + b"DICM" + bytes(200))
    shutil.copytree(tiny_world.raw / "imagesTs", tmp_path / "patient" / "ct")
    found = refusals(
        tiny_world.raw,
        tiny_run,
        tiny_world.cache,
        tmp_path / "empty",
        tmp_path / "IM1.dcm",
        tmp_path / "patient",
    )
    for words, refusal in zip(
        (
            f"is the folder of a data set: name its images, such as {tiny_world.raw / 'imagesTs'}",
            "is a training run, not a scan: expected RUN first, then SCANS",
            "is a cache, not a scan",
            "is an empty folder",
            f"is one file of a DICOM series: name its folder, {tmp_path}",
            f"holds no scan itself, but ct does (liver_6.nii.gz): name {tmp_path / 'patient' / 'ct'}",
        ),
        found,
        strict=True,
    ):
        assert words in refusal


@pytest.fixture
def patient(image: Path, tmp_path: Path) -> Path:
    """A folder with a DICOM series two folders further down."""
    pytest.importorskip("pydicom")
    from test_batch import write_dicom

    write_dicom(image, tmp_path / "patient" / "study" / "ct")
    return tmp_path / "patient"


def label_of(image: Path) -> Path:
    return image.parent.parent / "labelsTr" / image.name


@pytest.mark.parametrize("place", [".", "study/ct"])
def test_a_label_beside_a_dicom_series_does_not_hide_it(patient: Path, image: Path, place: str) -> None:
    folder = patient / "study/ct" if place == "." else patient
    shutil.copy(label_of(image), folder / "a_label.nii.gz")
    write_nifti(folder / "organs.nii", np.full((3, 4, 5), 117, np.int16))
    (scan,) = find_scans([folder])
    assert (scan.is_dicom, scan.name) == (True, folder.name)
    with scan.as_nifti() as nifti:
        converted: Any = nib.load(nifti.path)
    assert converted.shape == nib.load(image).shape  # type: ignore[attr-defined]
    assert nifti.notes == (
        "passed over beside the series: 1 × .gz file (a_label.nii.gz), 1 × .nii file (organs.nii)",
    )


def test_scans_are_taken_as_they_are_and_dicom_below_them_is_named(patient: Path, image: Path) -> None:
    shutil.copy(image, patient / "b.nii.gz")
    shutil.copy(label_of(image), patient / "c_label.nii.gz")
    first, second = find_scans([patient])
    assert (first.name, second.name) == ("b", "c_label")
    assert first.notes == (f"passed over: DICOM files in {patient / 'study/ct'}: name it to segment them",)
    assert second.notes == ()
    with first.as_nifti() as nifti:
        assert nifti.notes == first.notes


def test_labels_without_dicom_below_them_are_taken_for_scans(image: Path, tmp_path: Path) -> None:
    shutil.copy(label_of(image), tmp_path / "label.nii.gz")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "dicom.txt").write_bytes(bytes(128) + b"DICM")
    (scan,) = find_scans([tmp_path])
    assert (scan.is_dicom, scan.name, scan.notes) == (False, "label", ())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0, 1), True),
        ((0, 255), True),
        ((0, 256), False),
        ((-1, 1), False),
        ((0, 0.5), False),
        ((0, 2.999), True),
    ],
)
def test_what_looks_like_a_label(tmp_path: Path, values: tuple[float, float], expected: bool) -> None:
    voxels = np.full((3, 4, 5), values[0], np.float32)
    voxels[-1, -1, -1] = values[1]
    assert looks_like_label(write_nifti(tmp_path / "a.nii.gz", voxels)) == expected


def test_a_damaged_file_and_one_of_nan_do_not_look_like_a_label(tmp_path: Path) -> None:
    (tmp_path / "text.nii.gz").write_text("no scan")
    nan = write_nifti(tmp_path / "nan.nii.gz", np.full((3, 4, 5), np.nan, np.float32))
    assert not looks_like_label(tmp_path / "text.nii.gz")
    assert not looks_like_label(nan)


def test_view_says_what_was_passed_over_beside_the_series(
    run: Run, patient: Path, image: Path, tmp_path: Path
) -> None:
    label = shutil.copy(label_of(image), patient / "label.nii.gz")
    result = run("view", patient, label, "--out", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert "passed over beside the series: 1 × .gz file (label.nii.gz)" in result.output


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.nrrd", b"NRRD0004\n# Complete", "is a NRRD file, not NIfTI: convert it with SimpleITK"),
        ("a.mha", b"ObjectType = Image\nNDims = 3", "sitk.WriteImage(sitk.ReadImage('a.mha'), 'a.nii.gz')"),
        ("a.mhd", b"NDims = 3\n", "is a MetaImage file"),
        ("a.nii", bytes(128) + b"DICM" + bytes(300), "is one file of a DICOM series"),
        ("a.nii", b"\x89PNG\r\n", "is not a NIfTI file (it starts with b'\\x89PNG')"),
    ],
)
def test_other_formats_say_how_to_convert(
    run: Run, tiny_run: Path, tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    (line,) = errors(run("predict", tiny_run, tmp_path / name, "--out", tmp_path / "out"))
    assert words in line


def test_swapped_arguments_are_recognized(
    run: Run, tiny_world: TinyWorld, tiny_run: Path, image: Path, tmp_path: Path
) -> None:
    raw, cache, config = tiny_world.raw, tiny_world.cache, tmp_path / "none.toml"
    for arguments, words in (
        (("predict", image, tiny_run, "--out", tmp_path / "o"), "RUN and SCANS look swapped"),
        (("train", tiny_run, cache), "CACHE and RUN look swapped"),
        (("preprocess", cache, raw), "RAW and CACHE look swapped"),
        (("fidelity", cache, raw), "RAW and CACHE look swapped"),
        (("inspect", raw), f"{raw} is a data set, not a CACHE"),
        (("export", cache, tmp_path / "m.safetensors"), f"{cache} is a cache, not a RUN"),
    ):
        result = run(*arguments)
        assert result.exit_code != 0
        assert words in " ".join(result.output.split()), result.output
    plain = run("train", cache, tmp_path / "run", "--config", config)
    assert "look swapped" not in plain.output
    assert ", not a" not in plain.output
    right = run("evaluate", cache, tiny_run, "--raw", raw, "--case", "none")
    assert right.exit_code == 1
    assert ", not a" not in right.output
