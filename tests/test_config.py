"""Configurations: TOML round trip, every fault listed, overrides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_cache.errors import ConfigError
from liverseg.model.network import NetworkConfig
from liverseg.training.config import (
    DataConfig,
    OptimConfig,
    TrainConfig,
    as_override,
    load_config,
    save_config,
)

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))


def test_toml_round_trip_is_exact(tmp_path: Path) -> None:
    config = TrainConfig(
        seed=7,
        data=DataConfig(train_cases=("a", "b"), val_cases=("c",), scan_share=0.1),
        model=NetworkConfig(base_channels=3, norm="group"),
        optim=OptimConfig(learning_rate=1 / 3),
    )
    save_config(config, tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml") == config
    assert config != TrainConfig()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_example_configuration_loads(path: Path) -> None:
    assert load_config(path) != TrainConfig()


def test_overrides_take_toml_values_and_bare_words() -> None:
    config = load_config(
        None, ["optim.epochs=3", "model.norm=instance", 'data.train_cases=["x"]', "seed=9", "loss.gamma=1"]
    )
    assert config.optim == replace(OptimConfig(), epochs=3)
    assert (config.model.norm, config.data.train_cases, config.seed) == ("instance", ("x",), 9)
    assert config.loss.gamma == 1


@pytest.mark.parametrize("raw", ["/data/📁 患者", '/a"b\\c', "/tab\there\x7f", "plain"])
def test_a_value_from_python_comes_through_as_it_is(raw: str) -> None:
    assert load_config(None, [as_override("watch.raw", raw)]).watch.raw == raw
    assert load_config(None, [as_override("data.train_cases", [raw])]).data.train_cases == (raw,)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("watch.raw", Path("/data/📁"), "/data/📁"),
        ("optim.epochs", np.int64(7), 7),
        ("optim.learning_rate", np.float32(0.5), 0.5),
        ("optim.learning_rate", torch.tensor(0.5), 0.5),
        ("augment.flip", np.True_, True),
        ("data.val_cases", ("a", np.str_("b")), ("a", "b")),
        ("loss.class_weights", np.array([0.25, 0.25, 0.5]), (0.25, 0.25, 0.5)),
        ("augment.num_controlpoints", (np.int32(4), 5, 6), (4, 5, 6)),
        ("optim.patience", None, None),
        ("data.split", None, None),
    ],
)  # fmt: skip
def test_values_that_python_users_have_come_through(
    tmp_path: Path, key: str, value: object, expected: object
) -> None:
    (tmp_path / "a.toml").write_text('[data]\ntrain_cases = ["x"]\n[optim]\npatience = 3\n')
    section, _, name = key.partition(".")
    config = load_config(tmp_path / "a.toml", [as_override(key, value)])
    assert getattr(getattr(config, section), name) == expected


@pytest.mark.parametrize(
    "value", [{"epochs": 3}, {3}, b"x", 1j, np.complex64(1), object(), [Path("a"), len], np.array([{1: 2}])]
)
def test_a_value_that_no_setting_can_have_is_named(value: object) -> None:
    with pytest.raises(ConfigError, match="^optim.epochs: expected text, a number, .* found "):
        as_override("optim.epochs", value)


def test_a_setting_that_has_a_default_cannot_be_unset() -> None:
    with pytest.raises(ConfigError, match="^optim.epochs: .* found None"):
        load_config(None, [as_override("optim.epochs", None)])
    assert load_config(None, [as_override("watch.raw", "null")]).watch.raw == "null"


def test_the_fault_comes_first_and_values_that_are_right_are_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["optim.batch_size=7", "optim.epochs=0"])
    assert str(caught.value) == "optim: epochs must be at least 1, got 0"
    (tmp_path / "a.toml").write_text("seed = 1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "a.toml", ["optim.batch_size=7", "optim.epochs=0"])
    assert str(caught.value) == (
        f"optim: epochs must be at least 1, got 0 ({tmp_path}/a.toml, with optim.batch_size, optim.epochs replaced)"
    )


def test_all_faults_are_listed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('seed = "x"\n[optim]\nepochs = 0\nlearning_rat = 1\n[data]\nfold = 9\n')
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert "bad.toml" in message
    for part in ("seed", "'x'", "learning_rat: unknown key", "fold 9 of 5"):
        assert part in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.epochs", "section.key=value"),
        ("optim.epochs=-1", "epochs must be at least 1"),
        ("optim.clip_norm=0", "clip_norm must be above 0"),
        ("optim.ema_decay=1", "ema_decay"),
        ("seed.x=1", "seed"),
        ("data.scan_share=0.9", "more than 1"),
        ('data.val_cases=["a"]', "needs train_cases"),
        ("loss.class_weights=[1.0, 1.0]", "2 numbers for 3 classes"),
        ("input.window_hu=[5, 1]", "window_hu"),
        ("model.base_channels=0", "base_channels"),
        ("model.base_channels=100000", "base_channels must be at most 1024, got 100000"),
        ("model.depth=40", "depth must be at most 10, got 40"),
        ("model.in_channels=2", "model.in_channels must be 1 in a training run, got 2"),
        ("model.classes=4", "model.classes must be 3 in a training run, got 4"),
        ("seed=-1", "seed must be at least 0 and below 2\\*\\*63, got -1"),
        ("seed=9223372036854775808", "seed must be at least 0"),
        ("data.resident=disk", "resident"),
        ("data.box_jitter=-0.1", "box_jitter must be at least 0 and below 0.5, got -0.1"),
        ("data.scan_widening_zyx=[0.1, 0.1, 2.0]", "scan_widening_zyx must be at least 0 and below 2"),
        ("data.scan_widening_zyx=[0.1, 0.1]", "scan_widening_zyx"),
    ],
)
def test_wrong_overrides_are_named(override: str, words: str) -> None:
    overrides = ["data.between_share=0.2", override] if "scan_share" in override else [override]
    with pytest.raises(ConfigError, match=words):
        load_config(None, overrides)


def test_seeds_end_where_torch_ends() -> None:
    assert load_config(None, [f"seed={2**63 - 1}"]).seed == 2**63 - 1
    assert load_config(None, ["seed=0"]).seed == 0


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none.toml: no such file"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("seed = = 1")
    with pytest.raises(ConfigError, match="broken.toml: unreadable"):
        load_config(tmp_path / "broken.toml")
