"""One panel of curves or counts: its frame, its names, its keys, its colour bar, alike in all charts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from liverseg.pictures.palette import GRID, MUTED, PANEL, TEXT

DASHED, DOTTED = (0, (5, 3)), (0, (1, 2.5))


def style_chart(axis: Axes) -> None:
    """A panel with a grid behind what is drawn, and no frame."""
    axis.set_facecolor(PANEL)
    axis.spines[:].set_visible(False)
    axis.tick_params(colors=MUTED, which="both", labelsize=9, length=0)
    axis.grid(color=GRID, lw=0.7)
    axis.set_axisbelow(True)


def name_chart(axis: Axes, title: str, *, x: str = "", y: str = "", note: str = "") -> None:
    """Write what is shown above it, a note between, and along its axes what they are, with units."""
    axis.set_title(title, color=TEXT, fontsize=11, loc="left", pad=20 if note else 8)
    if note:
        axis.text(0, 1.025, note, color=MUTED, fontsize=9, transform=axis.transAxes)
    axis.set_xlabel(x, color=MUTED, fontsize=9)
    axis.set_ylabel(y, color=MUTED, fontsize=9)


def say_empty(axis: Axes, words: str) -> None:
    """What stands in a panel instead of ticks and curves."""
    axis.set(xticks=[], yticks=[])
    axis.text(0.5, 0.5, words, color=MUTED, ha="center", va="center", transform=axis.transAxes)


def draw_keys(
    axis: Axes, *, loc: Literal["best", "upper left", "upper right"] = "best", more: Sequence[Artist] = ()
) -> None:
    """All that was drawn with a label, then ``more``; nothing without any."""
    keys = [*axis.get_legend_handles_labels()[0], *more]
    if keys:
        axis.legend(handles=keys, frameon=False, labelcolor=TEXT, fontsize=9.5, loc=loc)


def draw_bar(figure: Figure, axis: Axes, colours: ScalarMappable, *, name: str) -> None:
    """A colour bar that lies in ``axis``, its numbers and its name below."""
    bar = figure.colorbar(colours, cax=axis, orientation="horizontal")
    bar.outline.set_visible(False)
    axis.tick_params(colors=MUTED, labelsize=8, length=2)
    axis.set_xlabel(name, color=TEXT, fontsize=9.5)
