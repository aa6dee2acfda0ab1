"""What the paths of a command line are, to tell a user which of them look swapped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from data_cache.text import visible

RUN, MODEL, CACHE, DATA, SCAN = "training run", "exported model", "cache", "data set", "scan"
ARTICLES = {RUN: "a", MODEL: "an", CACHE: "a", DATA: "a", SCAN: "a"}
EXPECTED: Mapping[str, tuple[str, ...]] = {
    "run": (RUN, MODEL),
    "runs": (RUN, MODEL),
    "others": (RUN, MODEL),
    "cache": (CACHE,),
    "raw": (DATA,),
    "data": (CACHE, DATA),
    "scans": (SCAN,),
}


def kind_of(path: Path) -> str | None:
    """What a path recognizably is; None where it is missing or something else."""
    try:
        if path.is_dir():
            return _kind_of_folder(path)
        if path.suffix == ".safetensors":
            return MODEL if path.is_file() else None
        return SCAN if path.is_file() and path.name.lower().endswith((".nii", ".nii.gz", ".dcm")) else None
    except OSError:
        return None


def misplaced(command: click.Command, context: click.Context, arguments: list[str]) -> str:
    """A hint where a path is of another kind than its place asks for; empty where there is none."""
    try:
        parser = command.make_parser(context)
        # The context is that of the group, which takes no option after an argument; its commands do.
        parser.allow_interspersed_args = command.allow_interspersed_args
        values, _, _ = parser.parse_args(list(arguments))
    except click.ClickException:
        return ""
    labels = {
        p.name: p.human_readable_name if isinstance(p, click.Argument) else p.opts[0] for p in command.params
    }
    wrong: dict[str, str] = {}
    shown: list[str] = []
    for name, value in values.items():
        for text in _texts(value) if name in EXPECTED else ():
            kind = kind_of(Path(text))
            if kind is not None and kind not in EXPECTED[name] and name not in wrong:
                wrong[name] = kind
                shown.append(f"{visible(text)} is {ARTICLES[kind]} {kind}")
    if not wrong:
        return ""
    names = [labels[name].rstrip(".") for name in wrong]
    swapped = len(wrong) == 2 and all(
        kind in EXPECTED[other] for kind, other in zip(wrong.values(), reversed(list(wrong)), strict=True)
    )
    if swapped:
        return f"{names[0]} and {names[1]} look swapped: {' and '.join(shown)}"
    return "; ".join(f"{text}, not a {name}" for text, name in zip(shown, names, strict=True))


def _kind_of_folder(path: Path) -> str | None:
    if any((path / name).is_file() for name in ("best.pt", "last.pt")):
        return RUN
    if (path / "zarr.json").is_file():
        return CACHE
    if (path / "dataset.json").is_file():
        return DATA
    return None


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    return [v for v in values if isinstance(v, str)]
