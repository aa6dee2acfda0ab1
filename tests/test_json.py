"""One JSON object of any command, and nothing else on the standard output; how much is printed otherwise."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tiny import TinyWorld, copy_folds, tiny_config

from liverseg.cli import main
from liverseg.cli.outcome import Outcome, as_json, plain
from liverseg.training.config import save_config

Call = Callable[..., Result]
# Each command, one that fails altogether, and a key of the result.
COMMANDS = {
    "download": ("download RAW", "download missing --url nowhere", "labelled"),
    "phantom": (
        "phantom new --cases 1 --tests 0 --shape 16x16x16 --jobs 1",
        "phantom x --shape 1x1x1",
        "seed",
    ),
    "check": ("check RAW --jobs 1", "check missing", "scans"),
    "preprocess": ("preprocess RAW new.zarr --jobs 1", "preprocess missing x.zarr", "cases"),
    "verify": ("verify CACHE", "verify missing", "cases"),
    "inspect": ("inspect CACHE liver_0 --histogram", "inspect missing", "histogram"),
    "fingerprint": ("fingerprint CACHE", "fingerprint missing", "hu"),
    "fidelity": ("fidelity RAW CACHE --jobs 1", "fidelity RAW missing", "by_diameter"),
    "train": ("train CACHE new --config tiny.toml", "train missing new", "history"),
    "config": ("config optim", "config none", "settings"),
    "overfit": (
        "overfit CACHE liver_0 new --losses dice_focal --steps 1 --config tiny.toml",
        "overfit CACHE none new",
        "losses",
    ),
    "tune": (
        "tune CACHE liver_0 new --steps 1 --rungs 1 --gammas 1 --alphas 1 --learning-rates 0.1 --jobs 1 "
        "--config tiny.toml",
        "tune CACHE none new",
        "best",
    ),
    "evaluate": (
        "evaluate CACHE RUN --raw RAW --device cpu --out new",
        "evaluate CACHE missing --raw RAW",
        "cases",
    ),
    "compare": (
        "compare CACHE one two --raw RAW --case liver_0 --device cpu",
        "compare CACHE one missing --raw RAW",
        "differences",
    ),
    "pool": ("pool CACHE one two --raw RAW --device cpu", "pool CACHE one one --raw RAW", "runs"),
    "score": ("score RAW/labelsTr RAW/labelsTr", "score missing missing", "summary"),
    "predict": (
        "predict RUN RAW/imagesTs --out new --device cpu",
        "predict missing RAW/imagesTs --out x",
        "scans",
    ),
    "export": ("export RUN new.safetensors", "export missing new.safetensors", "header"),
    "report": ("report one", "report missing", "page"),
    "view": ("view RAW/imagesTr/liver_0.nii.gz RAW/labelsTr/liver_0.nii.gz", "view missing missing", "page"),
    "bench": (
        "bench preprocess --shape 32x32x32 --repeats 1",
        "bench preprocess --image RAW/imagesTr/liver_0.nii.gz",
        "contenders",
    ),
}


# What must have run before, by command.
BEFORE = {"report": "evaluate CACHE one --raw RAW --case liver_0 --device cpu"}


@pytest.fixture
def call(tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Call a command line in a folder with two folds; its words name the tiny data set, its cache and its run."""
    monkeypatch.chdir(tmp_path)
    save_config(tiny_config(epochs=1, steps=1), tmp_path / "tiny.toml")
    copy_folds(tiny_world, tiny_run, tmp_path)
    places = {"RAW": tiny_world.raw, "CACHE": tiny_world.cache, "RUN": tiny_run}

    def invoke(line: str) -> Result:
        words = [word.partition("/") for word in line.split()]
        arguments = [f"{places.get(first, first)}{slash}{rest}" for first, slash, rest in words]
        return CliRunner().invoke(main, arguments)

    return invoke


def test_every_command_is_tried() -> None:
    assert set(COMMANDS) == set(main.commands)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_result_is_one_json_object(call: Call, command: str) -> None:
    line, _, key = COMMANDS[command]
    if command in BEFORE:
        assert call(BEFORE[command]).exit_code == 0
    result = call(f"--json {line}")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert (content["command"], content["complete"]) == (command, True)
    assert content[key] not in (None, [], {})
    assert not [text for text in result.stderr.splitlines() if not text.startswith("warning:")]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_failure_is_an_error_and_no_json(call: Call, command: str) -> None:
    result = call(f"--json {COMMANDS[command][1]}")
    assert result.exit_code in (1, 2)
    assert result.stdout == ""
    assert "error: " in result.stderr.lower()


def test_what_failed_is_in_the_json_of_the_others(call: Call) -> None:
    result = call("--json predict RUN none.nii.gz RAW/imagesTs --out new --device cpu")
    content = json.loads(result.stdout)
    assert (result.exit_code, content["complete"]) == (1, False)
    assert [scan["label"] for scan in content["scans"]] == ["new/liver_6.nii.gz"]
    assert list(content["failed"]) == ["none.nii.gz"]
    assert "error: none.nii.gz: cannot be opened" in result.stderr


def test_scores_are_numbers_as_in_the_files(call: Call, tmp_path: Path) -> None:
    content = json.loads(call("--json score RAW/labelsTr RAW/labelsTr --out scores").stdout)
    written = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert {key: written[key] for key in content["summary"]} == content["summary"]
    assert content["summary"]["liver"]["dice"]["mean"] == 1.0


def test_tables_are_back_after_json(call: Call) -> None:
    assert json.loads(call("--json config optim").stdout)
    assert "optim.epochs" in call("config optim").stdout


def test_how_much_is_printed(call: Call) -> None:
    line = "score RAW/labelsTr RAW/labelsTr"
    assert "score: 2 of 6: liver_1\n" in call(f"--verbose {line}").stdout
    assert "score: 2 of 6" not in call(line).output
    assert call(f"--quiet {line}").output == ""
    told = call(f"--verbose --json {line}")
    assert "score: 2 of 6: liver_1\n" in told.stderr
    assert json.loads(told.stdout)["complete"]
    assert json.loads(call(f"--quiet --json {line}").stdout)["complete"]
    both = call(f"--quiet --verbose {line}")
    assert (both.exit_code, "exclude each other" in both.stderr) == (2, True)


def test_the_line_of_a_finished_scan_names_it_and_not_the_next(call: Call) -> None:
    images = "RAW/imagesTr/liver_0.nii.gz RAW/imagesTr/liver_1.nii.gz"
    told = call(f"--verbose predict RUN {images} --out new --device cpu").stdout
    assert "predict: 1 of 2: liver_0\n" in told
    assert "predict: 2 of 2: liver_1\n" in told


def test_an_option_of_all_commands_behind_one_is_explained(call: Call) -> None:
    late = call("score RAW/labelsTr RAW/labelsTr --json")
    assert late.exit_code == 2
    assert "it goes before the command: liverseg --json score …" in " ".join(late.stderr.split())
    assert "before the command" not in call("score RAW/labelsTr RAW/labelsTr --jsn").stderr


@dataclass(frozen=True, kw_only=True)
class Record:
    """As results are."""

    path: Path
    values: tuple[Any, ...]


def test_records_become_plain_values() -> None:
    record = Record(path=Path("a/b"), values=(np.float32(0.5), np.arange(2), math.inf, None, True))
    assert plain({1: record}) == {"1": {"path": "a/b", "values": [0.5, [0, 1], None, None, True]}}
    assert as_json(Outcome(result={"name": "Jörg"}), command="x") == (
        '{"command": "x", "complete": true, "name": "J\\u00f6rg"}'
    )
    with pytest.raises(TypeError, match="set has no form in JSON"):
        plain({1, 2})
