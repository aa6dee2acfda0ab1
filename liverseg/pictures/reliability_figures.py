"""Charts of doubt: whether probabilities are frequencies, and whether doubt finds the bad cases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from liverseg.measure.calibration import ReliabilityCounts
from liverseg.measure.selective import RiskCoverage
from liverseg.pictures.chart import DASHED, DOTTED, draw_keys, name_chart, style_chart
from liverseg.pictures.palette import LIVER_PRED, LIVER_TRUTH, MUTED, TEXT, TUMOUR_PRED, TUMOUR_TRUTH
from liverseg.pictures.sheet import new_figure

CLASS_COLOURS = {"liver": LIVER_TRUTH, "tumour": TUMOUR_PRED}
CURVE_COLOURS = (LIVER_TRUTH, LIVER_PRED, TUMOUR_PRED, TUMOUR_TRUTH)


def reliability_figure(
    before: Mapping[str, ReliabilityCounts], after: Mapping[str, ReliabilityCounts] | None, *, title: str
) -> Figure:
    """Share of voxels that are of a class against the probability given, a column a class; below, how many voxels.

    Args:
        before: By class name, at least one; a class without a voxel has an empty panel.
        after: The same classes after temperature scaling, or None.
        title: First line bold, the others smaller below it.
    """
    figure = new_figure(title, width_in=0.4 + 5.0 * len(before), height_in=7.4)
    axes = figure.subplots(2, len(before), squeeze=False, height_ratios=(3.2, 1), sharex=True)
    margin = 0.72 / float(figure.get_size_inches()[0])
    figure.subplots_adjust(left=margin, right=0.98, top=0.85, bottom=0.085, wspace=0.24, hspace=0.1)
    for (upper, lower), (name, counts) in zip(axes.T, before.items(), strict=True):
        for axis in (upper, lower):
            style_chart(axis)
        upper.plot([0, 1], [0, 1], color=MUTED, lw=1.0, ls=DASHED, label="calibrated")
        _draw_reliability((upper, lower), counts, "as predicted", colour=CLASS_COLOURS.get(name, TEXT))
        if after is not None:
            label = "after temperature"
            _draw_reliability((upper, lower), after[name], label, colour=LIVER_PRED, style=DASHED)
        upper.set(xlim=(0, 1), ylim=(0, 1))
        lower.set_yscale("log")
        lower.set_ylim(bottom=0.7)
        name_chart(upper, name, y="share of voxels of the class")
        name_chart(lower, "", x=f"probability of {name}", y="voxels")
        draw_keys(upper, loc="upper left")
    return figure


def _draw_reliability(
    axes: tuple[Axes, Axes], counts: ReliabilityCounts, label: str, *, colour: str, style: Any = "solid"
) -> None:
    upper, lower = axes
    filled = counts.n_voxels > 0
    ece = "no voxel" if counts.ece is None else f"ECE {counts.ece:.4f}"
    line = {"color": colour, "ls": style, "marker": "o", "ms": 4.5, "label": f"{label}: {ece}"}
    upper.plot(counts.confidence[filled], counts.frequency[filled], lw=1.8, **line)
    # A tenth of a voxel is below the axis: an empty bin would otherwise break the logarithmic line.
    edges = np.linspace(0, 1, filled.size + 1)
    lower.stairs(np.maximum(counts.n_voxels, 0.1), edges, color=colour, lw=1.6, ls=style)


def risk_coverage_figure(curves: Mapping[str, RiskCoverage], *, title: str, risk: str = "1 - Dice") -> Figure:
    """Mean risk of the most certain cases against how many are kept; dashed the best order, dotted any order.

    Args:
        curves: By name, at most four; one alone has its excess over the optimum shaded.
        title: First line bold, the others smaller below it.
        risk: What it is the mean of.
    """
    figure = new_figure(title, width_in=7.6, height_in=5.6)
    axis = figure.add_axes((0.1, 0.11, 0.87, 0.7))
    style_chart(axis)
    for (name, curve), colour in zip(curves.items(), CURVE_COLOURS, strict=False):
        if curve.aurc is None or curve.excess_aurc is None:
            continue
        label = f"{name}: AURC {curve.aurc:.4f}, excess {curve.excess_aurc:.4f}, {curve.coverage.size} cases"
        axis.plot(curve.coverage, curve.selective_risk, color=colour, lw=1.9, marker="o", ms=3.2, label=label)
        axis.plot(curve.coverage, curve.optimum, color=colour, lw=1.2, ls=DASHED)
        axis.axhline(curve.selective_risk[-1], color=colour, lw=1.0, ls=DOTTED)
        if len(curves) == 1:
            axis.fill_between(curve.coverage, curve.optimum, curve.selective_risk, color=colour, alpha=0.12)
    axis.set_xlim(0, 1.02)
    room = 1.2 + 0.1 * len(curves)  # for the legend
    axis.set_ylim(0, room * axis.dataLim.y1 if axis.lines else 1.0)
    name_chart(
        axis, "", x="coverage: share of cases kept, most certain first", y=f"mean {risk} of the cases kept"
    )
    orders = [
        Line2D([], [], color=MUTED, ls=DASHED, lw=1.2, label="best order"),
        Line2D([], [], color=MUTED, ls=DOTTED, lw=1.0, label="random order"),
    ]
    draw_keys(axis, loc="upper left", more=orders)
    return figure
