"""What several commands share: types of arguments, and whether --debug was given."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)

DRAWN = (
    "{} of the {} samples asked for were drawn: all networks draw the same number, and one each where none of them is "
    "stochastic"
)


def in_debug() -> bool:
    """Whether the user asked for tracebacks."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.find_root().params.get("debug"))


class Shard(click.ParamType[tuple[int, int]]):
    """``2/4``: the second of four parts."""

    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        match = re.fullmatch(r"(\d+)/(\d+)", str(value))
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            self.fail(f"{value!r} is not a part such as 1/4", param, ctx)
        return int(match[1]), int(match[2])


class Shape(click.ParamType[tuple[int, int, int]]):
    """``192x192x96``: voxels along x, y and z."""

    name = "XxYxZ"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", str(value))
        if match is None:
            self.fail(f"{value!r} is not a shape such as 192x192x96", param, ctx)
        return tuple(map(int, match.groups()))
