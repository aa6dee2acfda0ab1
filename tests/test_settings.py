"""Every setting is explained where it is defined, and the page and the command that list them are these words."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from conftest import REPOSITORY

from data_cache.errors import ConfigError
from liverseg.cli import main
from liverseg.cli.main import GROUPS
from liverseg.training.config import TrainConfig, load_config
from liverseg.training.settings import list_settings, settings_markdown


def test_every_setting_has_a_meaning_and_its_default_can_be_set() -> None:
    settings = {setting.key: setting for setting in list_settings()}
    assert len(settings) > 40
    for setting in settings.values():
        assert setting.meaning.endswith("."), setting.key
    overrides = [f"{s.key}={s.default}" for s in settings.values() if s.default != "not set"]
    assert load_config(None, overrides) == TrainConfig()


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
