"""Types of arguments that several commands take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)

DRAWN = "drawn: {} of {} samples asked for: all networks draw the same number, and one each where none of them is stochastic"


class Shard(click.ParamType[tuple[int, int]]):
    """``2/4``: the second of four parts."""

    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        match = re.fullmatch(r"(\d+)/(\d+)", str(value))
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            self.fail(f"{value!r} is no part such as 1/4 to 4/4", param, ctx)
        return int(match[1]), int(match[2])


class Shape(click.ParamType[tuple[int, int, int]]):
    """``192x192x96``: voxels along x, y and z."""

    name = "XxYxZ"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", str(value))
        if match is None:
            self.fail(f"{value!r} is no shape such as 192x192x96", param, ctx)
        return tuple(map(int, match.groups()))
