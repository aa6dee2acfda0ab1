"""Several scans at once: a table for people, a CSV for spreadsheets, and silence where it is asked for."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny import TinyWorld

from liverseg.cli import main


def test_a_table_and_a_csv_of_all_scans(tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path) -> None:
    scans = []
    for name in ("a", "b"):
        scans.append(tmp_path / f"{name}.nii.gz")
        shutil.copy(tiny_world.raw / "imagesTs" / "liver_6.nii.gz", scans[-1])
    out = tmp_path / "out"
    arguments = [tiny_run, *scans, "--out", out, "--statistics", "--device", "cpu"]
    result = CliRunner().invoke(main, ["predict", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader((out / "statistics.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["scan"] for row in rows] == ["a.nii.gz", "b.nii.gz"]
    assert rows[0]["liver_ml"] == rows[1]["liver_ml"]
    assert set(rows[0]) == {
        "scan",
        "liver_ml",
        "tumour_ml",
        "lesions",
        "doubtful",
        "plausible",
        "reasons",
        "seconds",
    }
    (line,) = [line for line in result.output.splitlines() if "b.nii.gz" in line and "│" in line]
    assert f"{float(rows[1]['liver_ml']):.0f}" in line
    quiet = CliRunner().invoke(main, ["--quiet", "predict", *map(str, arguments)])
    assert quiet.exit_code == 0
    assert quiet.stdout == ""
    assert "wrote" in CliRunner().invoke(main, ["predict", *map(str, arguments)]).output  # and not for ever


def test_an_interrupted_training_names_resume(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("liverseg.training.train.train", interrupt)
    result = CliRunner().invoke(
        main, ["train", str(tiny_world.cache), str(tmp_path / "run"), "--set", "model.base_channels=2"]
    )
    assert result.exit_code == 130
    assert "add --resume to the same command" in result.output
