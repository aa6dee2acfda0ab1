"""A file of ours that is nested too deeply is one line that names it, whoever reads it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import TinyWorld

from data_cache.errors import LiversegError
from data_cache.reader import CacheStore, read_meta, read_schema
from liverseg.evaluation.report import _read_scores, _training_facts
from liverseg.inference.model_file import _evaluation
from liverseg.laboratory.experiment import EXPERIMENT
from liverseg.laboratory.experiment import _read as read_experiment
from liverseg.laboratory.halving import Setting
from liverseg.laboratory.overfit import _read_result
from liverseg.laboratory.tune import _record, read_attempt
from liverseg.training.config import DataConfig, load_config
from liverseg.training.split import SPLIT, load_split, make_split
from pipeline.dialects import load_content

DEEP = {
    "lists": "[" * 100_000,
    "objects": '{"a":' * 100_000,
    "closed": "[" * 100_000 + "]" * 100_000,
    "nearly parsed": "[" * 900 + "]" * 900,
}
Reader = tuple[str, Callable[[Path], Any]]
SETTING = Setting(learning_rate=1e-3, gamma=1.0, alpha=0.5)

READERS: dict[str, Reader] = {
    "split": (SPLIT, load_split),
    "scores": ("summary.json", _read_scores),
    "exported summary": ("evaluation/summary.json", lambda run: _evaluation(run, {})),
    "run": ("run.json", _training_facts),
    "store": ("zarr.json", read_schema),
    "case": ("liver_0/zarr.json", lambda store: read_meta(store, "liver_0")),
    "attempt": (str(_record(Path(), SETTING)), lambda run: read_attempt(run, SETTING)),
    "loss": ("dice.json", lambda folder: _read_result(folder / "dice.json")),
    "experiment": (EXPERIMENT, lambda folder: read_experiment(folder / EXPERIMENT)),
    "data set": ("dataset.json", load_content),
}


@pytest.mark.parametrize("text", DEEP.values(), ids=list(DEEP))
@pytest.mark.parametrize(("name", "read"), READERS.values(), ids=list(READERS))
def test_json_that_is_nested_too_deeply(
    tmp_path: Path, name: str, read: Callable[[Path], Any], text: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    try:
        read(tmp_path)
    except LiversegError as failure:
        assert str(tmp_path) in str(failure)  # noqa: PT017 (a file that parses may also mean nothing)
        assert len(str(failure)) < 500 + len(str(tmp_path))  # noqa: PT017
        assert "\n" not in str(failure)  # noqa: PT017
    else:
        assert text == DEEP["nearly parsed"]
        assert name == "evaluation/summary.json"


@pytest.mark.parametrize("text", DEEP.values(), ids=list(DEEP))
def test_a_split_that_data_split_names(tiny_world: TinyWorld, tmp_path: Path, text: str) -> None:
    path = tmp_path / "named.json"
    path.write_text(text)
    with pytest.raises(LiversegError, match=r"^data\.split: .*named\.json[^\n]{,400}$"):
        make_split(tiny_world.store, DataConfig(split=str(path)), seed=0)


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 100_000, ".".join("a" * 3000) + " = 1", "[" + ".".join("a" * 3000) + "]"]
)
def test_a_configuration(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(LiversegError, match=r"config\.toml[^\n]{,400}$"):
        load_config(path, [])


@pytest.mark.parametrize("override", ["optim.epochs=" + "[" * 5000, ".".join("a" * 3000) + "=1"])
def test_a_setting_of_the_command_line(override: str) -> None:
    with pytest.raises(LiversegError, match=r"^[^\n]+$"):
        load_config(None, [override])


def test_metadata_of_an_array(tiny_world: TinyWorld, tmp_path: Path) -> None:
    """Which Zarr itself parses."""
    shutil.copytree(tiny_world.cache, tmp_path / "cache.zarr")
    store = CacheStore.open(tmp_path / "cache.zarr")
    (tmp_path / "cache.zarr" / "liver_0" / "scan" / "image" / "zarr.json").write_text(DEEP["lists"])
    with pytest.raises(LiversegError, match="liver_0/scan/image: damaged"):
        store.read("liver_0", "scan")
