"""The course of a training run as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from liverseg.pictures.chart import draw_keys, name_chart, say_empty, style_chart
from liverseg.pictures.palette import LIVER_PRED, LIVER_TRUTH, TEXT, TUMOUR_PRED
from liverseg.pictures.sheet import grid, new_figure


def progress_figure(history: Mapping[str, Sequence[float]]) -> Figure:
    """The course of a training run: losses, Dice, learning rate and speed over epochs.

    Args:
        history: Sequences under "epoch", "train_loss", "val_loss", "val_dice_liver", "val_dice_tumour",
            "learning_rate" and "samples_per_second". A missing or empty one is not drawn; NaN is left out
            (validation need not run each epoch) and its neighbours are joined; without "epoch", epochs
            count from 1.
    """
    figure = new_figure("Training progress", width_in=12.6, height_in=7.6)
    panels = grid(figure, 2, 2, left_in=0.65, right_in=12.4, bottom_in=0.6, gap_in=(0.85, 0.65))
    loss, dice, rate, speed = panels
    _draw_curves(
        loss, history, {"train_loss": ("train", LIVER_TRUTH), "val_loss": ("validation", LIVER_PRED)}
    )
    classes = {"val_dice_liver": ("liver", LIVER_TRUTH), "val_dice_tumour": ("tumour", TUMOUR_PRED)}
    _draw_curves(dice, history, classes, mark_best=True)
    _draw_curves(rate, history, {"learning_rate": ("_", LIVER_TRUTH)}, log=True)
    _draw_curves(speed, history, {"samples_per_second": ("_", LIVER_TRUTH)})
    dice.set_ylim(0.0, 1.03)
    speed.set_ylim(0.0, 1.1 * speed.dataLim.y1 if speed.lines else 1.0)
    for axis, name in zip(
        panels, ("Loss", "Validation Dice", "Learning rate", "Samples per second"), strict=True
    ):
        _style_curves(axis, name)
    return figure


def _draw_curves(
    axis: Axes,
    history: Mapping[str, Sequence[float]],
    curves: Mapping[str, tuple[str, str]],
    *,
    log: bool = False,
    mark_best: bool = False,
) -> None:
    """One line a key of ``curves`` (name in the legend, "_" for none, and colour) that has values."""
    for key, (name, colour) in curves.items():
        epoch, value = _points(history, key, positive=log)
        if value.size == 0:
            continue
        best = int(value.argmax())
        label = f"{name}, best {value[best]:.3f} at epoch {epoch[best]:.0f}" if mark_best else name
        # A line through one point is invisible.
        axis.plot(epoch, value, color=colour, lw=1.8, marker="o" if value.size < 3 else "", ms=4, label=label)
        if mark_best:
            axis.plot(epoch[best], value[best], marker="o", ms=6, color=colour, mec=TEXT, mew=0.9)
    if log and axis.lines:
        axis.set_yscale("log")


def _points(
    history: Mapping[str, Sequence[float]], key: str, *, positive: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Epochs and values of one curve, without what cannot be drawn."""
    value = np.asarray(history.get(key, ()), dtype=np.float64)
    epoch = np.asarray(history.get("epoch", range(1, value.size + 1)), dtype=np.float64)
    # A run stopped in the middle of an epoch may have one list longer than the other.
    n = min(value.size, epoch.size)
    value, epoch = value[:n], epoch[:n]
    drawn = np.isfinite(value) & np.isfinite(epoch)
    if positive:
        drawn &= value > 0
    return epoch[drawn], value[drawn]


def _style_curves(axis: Axes, name: str) -> None:
    style_chart(axis)
    name_chart(axis, name, x="epoch" if axis.lines else "")
    if not axis.lines:
        say_empty(axis, "no values yet")
        return
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    draw_keys(axis)
