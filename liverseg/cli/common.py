"""What several commands share: types of arguments, and whether --debug was given."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from data_cache.reader import CacheStore

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


def report_damaged(store: CacheStore, cases: Collection[str] = ()) -> dict[str, str]:
    """Say which of these cases, or of all, are damaged, each in a line, and return what is wrong with them."""
    from liverseg.console import complain

    bad = {case: str(failure) for case, failure in store.damaged.items() if not cases or case in cases}
    for case, words in bad.items():
        complain(f"{case}: {words}")
    return bad


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
