"""Every setting of a run: its key, default and meaning, from the records and their docstrings."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from data_cache.records import to_json
from liverseg.training.config import TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One key of a configuration.

    Attributes:
        section: Empty for the keys at the top.
        default: As TOML; ``not set`` for None.
        meaning: From the docstring of the section's record, and the values that it can have where these are few.
    """

    section: str
    name: str
    default: str
    meaning: str

    @property
    def key(self) -> str:
        """What ``--set`` takes."""
        return f"{self.section}.{self.name}" if self.section else self.name


def list_settings() -> tuple[Setting, ...]:
    """All settings, the top level first, then the sections in their order."""
    top = TrainConfig()
    sections = [f.name for f in dataclasses.fields(top) if dataclasses.is_dataclass(getattr(top, f.name))]
    own = [s for s in _settings("", top) if s.name not in sections]
    return (*own, *(s for name in sections for s in _settings(name, getattr(top, name))))


def section_summary(section: str) -> str:
    """The first sentence about a section; raises KeyError for one that does not exist."""
    record = TrainConfig() if not section else getattr(TrainConfig(), section, None)
    if not dataclasses.is_dataclass(record):
        raise KeyError(section)
    return (inspect.getdoc(type(record)) or "").split("\n\n")[0].replace("\n", " ")


def nearest_key(key: str) -> str | None:
    """The setting that a misspelt key may have meant, or None."""
    known = {setting.key: setting for setting in list_settings()}
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    if near:
        return near[0]
    # A right name in a wrong section, or without its section.
    by_name = [setting.key for setting in known.values() if setting.name == key.rpartition(".")[2]]
    return by_name[0] if len(by_name) == 1 else None


def settings_markdown() -> str:
    """The page ``docs/configuration.md``."""
    parts = [_HEAD]
    settings = list_settings()
    for section in dict.fromkeys(setting.section for setting in settings):
        title = f"`[{section}]`" if section else "Top level"
        rows = "\n".join(
            f"| `{s.name}` | `{s.default}` | {s.meaning} |" for s in settings if s.section == section
        )
        parts.append(
            f"## {title}\n\n{section_summary(section)}\n\n| key | default | meaning |\n|---|---|---|\n{rows}\n"
        )
    return "\n".join(parts)


_HEAD = """# Configuration

<!-- Written by `liverseg config --markdown > docs/configuration.md`; a test compares. Edit the records' docstrings. -->

A run is configured by a TOML file (`--config`, examples in `configs/`), single values by `--set section.key=value`;
`--set section.key=null` unsets a value that a file has set.
What a run used is in its `config.toml`. `liverseg config` prints this page as tables, `liverseg config optim` one section.
"""


def _settings(section: str, record: Any) -> Iterator[Setting]:
    meanings = dict(_meanings(inspect.getdoc(type(record)) or ""))
    values, kinds = to_json(record), get_type_hints(type(record))
    for field in dataclasses.fields(record):
        yield Setting(
            section=section,
            name=field.name,
            default=_toml(values[field.name]),
            meaning=meanings.get(field.name, "") + _one_of(kinds[field.name]),
        )


def _one_of(kind: Any) -> str:
    """A sentence that lists the values of a type that has but a few; empty for others."""
    kinds = [k for k in get_args(kind) or (kind,) if k is not NoneType]
    kinds = [kind] if get_origin(kind) is Literal else kinds
    if not any(get_origin(k) is Literal for k in kinds):
        return ""
    values = [value for k in kinds for value in ((True, False) if k is bool else get_args(k))]
    return f" One of {', '.join(f'`{_toml(value).strip(chr(34))}`' for value in values)}."


def _toml(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return (
        f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)
    )


def _meanings(docstring: str) -> Iterator[tuple[str, str]]:
    """Names and descriptions of the section ``Attributes``; a description of two names is of both."""
    _, _, attributes = docstring.partition("Attributes:\n")
    attributes = attributes.partition("\n\n")[0]
    for entry in re.split(r"\n(?=    \w)", attributes.strip("\n")):
        names, _, meaning = entry.strip().partition(": ")
        for name in names.split(", "):
            yield name, re.sub(r"\s+", " ", meaning).replace("``", "`").replace("|", "\\|")
