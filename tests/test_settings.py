"""Every setting is explained where it is defined, and the page and the command that list them are these words."""

from __future__ import annotations

from typing import get_args

import pytest
from click.testing import CliRunner
from conftest import REPOSITORY

from data_cache.errors import ConfigError
from liverseg.cli import main
from liverseg.cli.main import GROUPS
from liverseg.device import Precision
from liverseg.model.losses import LossConfig, LossName, Overlap, Sums
from liverseg.model.network import Norm, Stochastic
from liverseg.training.config import Resident, TrainConfig, load_config
from liverseg.training.settings import list_settings, settings_markdown


def test_every_setting_has_a_meaning_and_its_default_can_be_set() -> None:
    settings = {setting.key: setting for setting in list_settings()}
    assert len(settings) > 40
    for setting in settings.values():
        assert setting.meaning.endswith("."), setting.key
    overrides = [f"{s.key}={s.default}" for s in settings.values() if s.default != "not set"]
    assert load_config(None, overrides) == TrainConfig()


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("precision", Precision),
        ("data.resident", Resident),
        ("model.norm", Norm),
        ("model.stochastic", Stochastic),
        ("loss.name", LossName),
        ("loss.overlap", Overlap),
        ("loss.sums", Sums),
    ],
)
def test_a_setting_of_few_values_lists_them(key: str, kind: object) -> None:
    meaning = {setting.key: setting.meaning for setting in list_settings()}[key]
    listed = meaning.rpartition("One of ")[2]
    assert listed == ", ".join(f"`{value}`" for value in get_args(kind)) + "."
    for value in get_args(kind):
        load_config(None, [f"{key}={value}", "model.dropout=0.1"])


def test_the_values_of_compile_are_listed_and_a_free_setting_has_no_list() -> None:
    meanings = {setting.key: setting.meaning for setting in list_settings()}
    assert meanings["compile"].endswith("One of `true`, `false`, `auto`.")
    for key in ("recompute", "optim.patience", "augment.num_controlpoints", "loss.cross_entropy", "device"):
        assert "One of" not in meanings[key], key


def test_what_the_page_says_of_a_loss_without_numbers_is_what_it_gets() -> None:
    meanings = {setting.key: setting.meaning for setting in list_settings()}
    assert "`semimetric` for `dice_focal` and `squared` for the others" in meanings["loss.overlap"]
    assert (
        "8 for `dice_focal`, 1 for `dice_cross_entropy` and 0 for the others"
        in meanings["loss.cross_entropy"]
    )
    for name in get_args(LossName):
        loss = LossConfig(name=name)
        assert loss.used_overlap == ("semimetric" if name == "dice_focal" else "squared")
        assert loss.used_cross_entropy == {"dice_focal": 8, "dice_cross_entropy": 1}.get(name, 0)


def test_the_page_is_what_the_docstrings_say() -> None:
    page = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == settings_markdown(), "run: liverseg config --markdown > docs/configuration.md"


def test_config_lists_a_section() -> None:
    result = CliRunner().invoke(main, ["config", "optim"])
    assert result.exit_code == 0
    assert "optim.learning_rate" in result.output
    assert "model.depth" not in result.output
    assert "choose one of data, input, model" in CliRunner().invoke(main, ["config", "nothing"]).output


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("optim.epoch", "optim.epoch: unknown key; did you mean optim.epochs?"),
        ("model.batch_size", "did you mean optim.batch_size?"),
        ("loss.qqq", "loss.qqq: unknown key; liverseg config lists the keys"),
    ],
)
def test_a_misspelt_key_is_followed_by_the_right_one(key: str, words: str) -> None:
    with pytest.raises(ConfigError) as info:
        load_config(None, [f"{key}=1"])
    assert words in str(info.value)


def test_help_has_every_command_in_one_group_with_its_whole_sentence() -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(main.commands)
    text = CliRunner().invoke(main, ["--help"]).output
    assert "..." not in text.partition("Options:")[2]
    for title in GROUPS:
        assert f"{title}:" in text
