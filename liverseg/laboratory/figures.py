"""Pictures of experiments on one case: curves by loss, scores over a grid of settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from liverseg.laboratory.hypotheses import steps_to
from liverseg.laboratory.one_case import Point
from liverseg.pictures.chart import DASHED, draw_bar, name_chart, style_chart
from liverseg.pictures.palette import BACKGROUND, LIVER_TRUTH, MUTED, TEXT, TUMOUR_PRED
from liverseg.pictures.sheet import TITLE_IN, add_panel, draw_legend, new_figure

SCORE = "cividis"
_LIVER, _TUMOUR = LIVER_TRUTH, TUMOUR_PRED
_COLUMNS = 4


# ---- curves


def curves_figure(curves: Mapping[str, Sequence[Point]], *, steps: int, learnt: float, title: str) -> Figure:
    """Dice of both classes against steps, a panel for each loss; the tumour of the other losses is grey behind it.

    Args:
        curves: By the name of the loss, at least one.
        steps: As far as the axes go.
        learnt: The tumour Dice at which a loss has learnt it: a line, and a dot where it is first reached.
        title: First line bold, the others smaller below it.
    """
    columns = min(_COLUMNS, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = new_figure(title, width_in=max(3.5 * columns, 7.0), height_in=2.75 * rows + TITLE_IN + 0.82)
    width, height = figure.get_size_inches()
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    figure.subplots_adjust(left=0.055 * _COLUMNS / columns, right=1 - 0.25 / width, wspace=0.1)
    figure.subplots_adjust(bottom=1.05 / height, top=1 - (TITLE_IN + 0.42) / height, hspace=0.32)
    for place, (axis, (name, curve)) in enumerate(zip(axes.flat, curves.items(), strict=False)):
        others = [other for key, other in curves.items() if key != name]
        _draw_curves(axis, curve, others, learnt=learnt)
        _style_curves(axis, steps=steps)
        # Where the last row is short, the panel above it has the numbers of its steps.
        last = place + columns >= len(curves)
        axis.tick_params(labelbottom=last)
        x, y = "step" if last else "", "Dice on the case" if place % columns == 0 else ""
        name_chart(axis, name, x=x, y=y, note=_ends(curve, steps=steps))
    for axis in axes.flat[len(curves) :]:
        axis.set_visible(False)
    keys = _curve_keys(learnt, several=len(curves) > 1)
    draw_legend(figure, keys, rows=1 if columns == _COLUMNS else 2)
    return figure


def _draw_curves(
    axis: Axes, curve: Sequence[Point], others: Sequence[Sequence[Point]], *, learnt: float
) -> None:
    for other in others:
        axis.plot(*_line(other, "tumour"), color=MUTED, lw=0.8, alpha=0.45)
    axis.axhline(learnt, color=MUTED, lw=0.8, ls=DASHED)
    # A line through one point is invisible.
    marker = "o" if len(curve) < 3 else ""
    axis.plot(*_line(curve, "liver"), color=_LIVER, lw=1.8, marker=marker, ms=4)
    axis.plot(*_line(curve, "tumour"), color=_TUMOUR, lw=1.8, marker=marker, ms=4)
    step = steps_to(curve, "tumour", learnt)
    if step is not None:
        _mark(
            axis,
            step,
            next(p.tumour or 0.0 for p in curve if p.step == step),
            leftwards=step > curve[-1].step / 2,
        )


def _mark(axis: Axes, step: int, dice: float, *, leftwards: bool) -> None:
    axis.plot(step, dice, marker="o", ms=7, color=_TUMOUR, mec=TEXT, mew=1.0, clip_on=False, zorder=5)
    axis.annotate(
        f"step {step}",
        (step, dice),
        xytext=(-9 if leftwards else 8, 3 if leftwards else -9),
        textcoords="offset points",
        color=TEXT,
        fontsize=8.5,
        ha="right" if leftwards else "left",
    )


def _line(curve: Sequence[Point], of: str) -> tuple[list[int], list[float]]:
    """Steps and Dice; NaN, which is not drawn, for a class that the case does not have."""
    dice = [getattr(point, of) for point in curve]
    return [point.step for point in curve], [math.nan if value is None else value for value in dice]


def _style_curves(axis: Axes, *, steps: int) -> None:
    style_chart(axis)
    axis.set(xlim=(0, steps), ylim=(0.0, 1.03))
    axis.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, steps=[1, 2, 5, 10]))


def _ends(curve: Sequence[Point], *, steps: int) -> str:
    if not curve:
        return "diverged before its first score"
    if curve[-1].step < steps:
        return f"diverged after step {curve[-1].step}"
    dice = (("liver", curve[-1].liver), ("tumour", curve[-1].tumour))
    return "at the end: " + ", ".join(f"{of} {value:.2f}" for of, value in dice if value is not None)


def _curve_keys(learnt: float, *, several: bool) -> list[Line2D]:
    keys = [
        Line2D([], [], color=_LIVER, lw=2, label="liver (with its tumours)"),
        Line2D([], [], color=_TUMOUR, lw=2, label="tumour"),
        Line2D([], [], color=MUTED, lw=1, ls=DASHED, label=f"tumour counts as learnt: {learnt:g}"),
    ]
    if several:
        keys.append(Line2D([], [], color=MUTED, lw=1, alpha=0.6, label="tumour with the other losses"))
    return keys


# ---- scores over a grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A setting in a heat map.

    Attributes:
        steps: How far it came.
        note: What is to be said instead of that, such as "diverged".
    """

    learning_rate: float
    gamma: float
    alpha: float
    score: float
    steps: int
    note: str = ""


def heat_figure(cells: Sequence[Cell], *, steps: int, best: Cell | None, title: str) -> Figure:
    """Scores over learning rate and γ, a map for each α; what was stopped early is dimmed and says at which step.

    Args:
        cells: At least one; a place of the grid without a cell is left empty.
        steps: Of a setting that was never stopped.
        best: Gets a frame.
        title: First line bold, the others smaller below it.
    """
    alphas, rates, gammas = (
        sorted({getattr(c, axis) for c in cells}) for axis in ("alpha", "learning_rate", "gamma")
    )
    panel_in = (max(1.15 * len(gammas), 2.2), max(0.8 * len(rates), 1.6))
    width_in = max(
        1.2 + len(alphas) * (panel_in[0] + 0.25), 7.8
    )  # the words beside the colour bar end at 7.6
    figure = new_figure(title, width_in=width_in, height_in=panel_in[1] + TITLE_IN + 1.75)
    for i, alpha in enumerate(alphas):
        axis = add_panel(figure, (0.95 + i * (panel_in[0] + 0.25), 1.25, *panel_in))
        here = [c for c in cells if c.alpha == alpha]
        _draw_map(axis, here, (rates[::-1], gammas), steps=steps, best=best)
        _name_map(axis, f"α = {alpha:g}", rates[::-1], gammas, first=i == 0)
    scale = ScalarMappable(Normalize(0.0, 1.0), cmap=SCORE)
    draw_bar(figure, add_panel(figure, (0.95, 0.5, 2.6, 0.12)), scale, name="mean Dice")
    key = "framed: best · dimmed: stopped early, at the step named"
    figure.text(3.9 / width_in, 0.56 / figure.get_figheight(), key, color=MUTED, fontsize=9, va="center")
    return figure


def _draw_map(
    axis: Axes,
    cells: Sequence[Cell],
    places: tuple[Sequence[float], Sequence[float]],
    *,
    steps: int,
    best: Cell | None,
) -> None:
    rates, gammas = places
    scores = np.full((len(rates), len(gammas)), math.nan)
    alphas = np.ones_like(scores)
    for cell in cells:
        at = rates.index(cell.learning_rate), gammas.index(cell.gamma)
        scores[at], alphas[at] = cell.score, 1.0 if cell.steps >= steps else 0.45
        below = cell.note or ("" if cell.steps >= steps else f"step {cell.steps}")
        dark = cell.score > 0.6 and cell.steps >= steps
        colour = BACKGROUND if dark else TEXT
        y = at[0] - 0.12 if below else at[0]
        axis.text(at[1], y, f"{cell.score:.2f}", ha="center", va="center", color=colour, fontsize=11)
        axis.text(at[1], at[0] + 0.22, below, ha="center", va="center", color=colour, fontsize=7.5)
        if cell == best:
            axis.add_patch(
                Rectangle((at[1] - 0.48, at[0] - 0.48), 0.96, 0.96, fill=False, ec=TUMOUR_PRED, lw=2.5)
            )
    axis.imshow(scores, cmap=SCORE, vmin=0.0, vmax=1.0, alpha=alphas, aspect="auto")


def _name_map(axis: Axes, name: str, rates: Sequence[float], gammas: Sequence[float], *, first: bool) -> None:
    axis.set_facecolor(BACKGROUND)
    axis.set_title(name, color=TEXT, fontsize=10.5)
    axis.spines[:].set_visible(False)
    axis.tick_params(colors=MUTED, labelsize=9, length=0)
    axis.set_xticks(range(len(gammas)), [f"{gamma:g}" for gamma in gammas])
    axis.set_yticks(range(len(rates)), [f"{rate:g}" for rate in rates] if first else [""] * len(rates))
    axis.set_xlabel("γ", color=MUTED, fontsize=10)
    if first:
        axis.set_ylabel("learning rate", color=MUTED, fontsize=9)
