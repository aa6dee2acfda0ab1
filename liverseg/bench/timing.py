"""How long something takes, with the device waited for; the fastest repeat counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from liverseg.device import synchronise


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One contender.

    Attributes:
        name: Its own, or its library's.
        seconds: Of the fastest repeat.
        note: What it does otherwise than the others.
    """

    name: str
    seconds: float
    note: str = ""


def fastest(run: Callable[[], object], device: torch.device, *, seconds: float, least: int = 2) -> float:
    """Seconds of the fastest run, after one that does not count; repeats for a while, and at least so often.

    The fastest, since on a shared machine everything else only measures the neighbours.
    """
    _timed(run, device)
    found: list[float] = []
    while len(found) < least or sum(found) < seconds:
        found.append(_timed(run, device))
    return min(found)


def _timed(run: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start
