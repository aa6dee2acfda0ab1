"""Training curves as inline SVG, in the colours of the page that holds them, light or dark."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_cache.errors import RunError
from data_cache.files import read_csv

WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 44, 30

History = Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A column of ``history.csv``, its name in the legend, and a colour of ``page.css``."""

    key: str
    name: str
    colour: str


LOSS = (
    Curve(key="train_loss", name="train", colour="liver"),
    Curve(key="val_loss", name="validation", colour="validation"),
)
DICE = (
    Curve(key="val_dice_liver", name="liver", colour="liver"),
    Curve(key="val_dice_tumour", name="tumour", colour="tumour"),
)


def read_history(path: Path) -> dict[str, list[float]]:
    """The columns of a run's ``history.csv``; an empty field is NaN, and without the file there are no columns.

    Raises:
        RunError: The file is damaged.
    """
    if not path.exists():
        return {}
    try:
        rows = read_csv(path)
        return {key: [float(row[key] or "nan") for row in rows] for key in (rows[0] if rows else ())}
    except (OSError, ValueError) as failure:
        remedy = "liverseg train --resume writes it again from the checkpoint"
        raise RunError(
            f"{path}: damaged ({failure}): {remedy}, or delete it to go without curves"
        ) from failure


def training_charts(history: History) -> str:
    """Loss and validation Dice over epochs, side by side; nothing without a history."""
    if not history.get("epoch"):
        return ""
    loss = chart("Loss", history, LOSS, top=None)
    return (
        f'<h2>Training</h2><div class="charts">{loss}{chart("Validation Dice", history, DICE, top=1.0)}</div>'
    )


def standalone_charts(history: History) -> str:
    """The same with its own colours, for a notebook; nothing without a history."""
    colours = (
        "--panel:#f4f6f8;--line:#d0d7de;--text:#1f2328;--muted:#59636e;--liver:#0b7fc0;--validation:#8a6d00;"
    )
    style = (
        ".liverseg svg{width:46%;min-width:18rem;background:var(--panel)}"
        ".liverseg text{fill:var(--muted);font:11px sans-serif}.liverseg .grid{stroke:var(--line)}"
        ".liverseg .curve{fill:none;stroke-width:2}"
    )
    charts = training_charts(history)
    return (
        charts
        and f'<div class="liverseg" style="{colours}--tumour:#c2361f"><style>{style}</style>{charts}</div>'
    )


def chart(
    title: str, history: History, curves: Sequence[Curve], *, top: float | None, x_name: str = "epoch {}"
) -> str:
    """One panel from 0 up to ``top``; for None, up to a number that a few outliers do not decide.

    Values that are NaN are left out; those above ``top`` are drawn at the upper edge, and counted in a note. ``x_name``
    says what the last number of the axis is.
    """
    drawn = {curve: _points(history, curve.key) for curve in curves}
    values = [value for points in drawn.values() for _, value in points]
    top = _robust_top(values) if top is None else top
    last_epoch = max((epoch for points in drawn.values() for epoch, _ in points), default=1.0)
    above = sum(value > top for value in values)
    note = f" (▲ {above} above {top:.3g}, up to {max(values):.3g})" if above else ""
    parts = [
        f'<text class="name" x="{LEFT}" y="18">{html.escape(title)}{note}</text>',
        *_grid(top, last_epoch, x_name),
    ]
    for number, (curve, points) in enumerate(drawn.items()):
        parts += _curve(curve, points, top=top, last_epoch=last_epoch, number=number)
    content = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{content}</svg>'


def _points(history: History, key: str) -> list[tuple[float, float]]:
    pairs = zip(history["epoch"], history.get(key, ()), strict=False)
    return [(epoch, value) for epoch, value in pairs if math.isfinite(value)]


def _robust_top(values: Sequence[float]) -> float:
    """The largest value, unless it would flatten the rest: then twice the value that nine tenths stay below."""
    ordered = sorted(values)
    if not ordered:
        return 1.0
    usual = 2 * ordered[int(0.9 * (len(ordered) - 1))]
    return _round_up(ordered[-1] if ordered[-1] <= usual else usual)


def _round_up(value: float) -> float:
    """To a number whose quarters are short; 1 for nothing."""
    if value <= 0:
        return 1.0
    decade = 10.0 ** math.floor(math.log10(value))
    return next(step * decade for step in (1, 1.2, 1.6, 2, 3, 4, 5, 6, 8, 10) if step * decade >= value)


def _x(epoch: float, last_epoch: float) -> float:
    share = (epoch - 1) / (last_epoch - 1) if last_epoch > 1 else 0.5
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _y(value: float, top: float) -> float:
    return HEIGHT - BOTTOM - min(max(value / top, 0), 1) * (HEIGHT - TOP - BOTTOM)


def _grid(top: float, last_epoch: float, x_name: str) -> Iterator[str]:
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _y(share * top, top)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{share * top:.3g}</text>'
    epochs = sorted({1, round((1 + last_epoch) / 2), round(last_epoch)})
    for epoch in epochs:
        word = x_name.format(epoch) if epoch == epochs[-1] else str(epoch)
        anchor = "end" if epoch == epochs[-1] and epoch > 1 else "middle"
        x = _x(epoch, last_epoch)
        yield f'<text x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}">{word}</text>'


def _curve(
    curve: Curve, points: Sequence[tuple[float, float]], *, top: float, last_epoch: float, number: int
) -> Iterator[str]:
    at = " ".join(f"{_x(epoch, last_epoch):.1f},{_y(value, top):.1f}" for epoch, value in points)
    colour, key_x = f"var(--{curve.colour})", LEFT + number * 130
    yield f'<polyline class="curve" style="stroke:{colour}" points="{at}"/>'
    for epoch, value in points:
        if value > top:
            left = _x(epoch, last_epoch) - 5
            yield f'<path d="M{left:.1f},{TOP + 8} h10 l-5,-8 z" style="fill:{colour}"/>'
    for place in at.split() if len(points) < 3 else ():  # a line through one point is invisible
        x, y = place.split(",")
        yield f'<circle cx="{x}" cy="{y}" r="3" style="fill:{colour}"/>'
    last = f" {points[-1][1]:.3f}" if points else " –"
    yield f'<rect x="{key_x}" y="27" width="14" height="3" style="fill:{colour}"/>'
    yield f'<text x="{key_x + 19}" y="32">{html.escape(curve.name)}{last}</text>'
