"""One page on a data set: intensities, grids, volumes, tumours, and what the augmentation levels come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from data_cache.schema import LABEL_NAMES
from liverseg.pictures.chart import DASHED, draw_keys, name_chart, say_empty, style_chart
from liverseg.pictures.palette import BACKGROUND, LIVER_TRUTH, MUTED, TEXT, TUMOUR_PRED
from liverseg.pictures.sheet import new_figure
from pipeline.fingerprint import (
    HU_FIRST,
    CaseFingerprint,
    Moments,
    total_histogram,
)
from pipeline.lesions import equivalent_diameters_mm

CLASS_COLOURS = {"background": MUTED, "liver": LIVER_TRUTH, "tumour": TUMOUR_PRED}
SHOWN_HU = (-200, 300)  # where liver, tumour and the fat around them are
BIN_HU = 4
DRAWN = "#f0e442"  # images that the levels come from


def fingerprint_figure(cases: Sequence[CaseFingerprint], content: dict[str, Any], *, name: str) -> Figure:
    """Six panels: HU by class; slices, volumes, tumour sizes; tumour counts; brightness against contrast.

    Args:
        cases: What was measured, at least one case.
        content: What ``pipeline.fingerprint.fingerprint`` made of it.
        name: Of the data set, for the title.
    """
    figure = new_figure(f"{name}\n{_summary(content)}", width_in=15.0, height_in=8.6)
    axes = figure.subplots(2, 3)
    figure.subplots_adjust(left=0.05, right=0.985, top=0.855, bottom=0.075, wspace=0.2, hspace=0.42)
    for axis in axes.flat:
        style_chart(axis)
    _draw_intensities(axes[0, 0], cases)
    _draw_grids(axes[0, 1], cases)
    _draw_levels(axes[0, 2], cases, content["augmentation"])
    _draw_volumes(axes[1, 0], cases)
    _draw_tumour_sizes(axes[1, 1], cases)
    _draw_tumour_counts(axes[1, 2], cases)
    return figure


def _summary(content: dict[str, Any]) -> str:
    ratio = content["voxel_ratio"]["native"]
    parts = [f"{content['n_cases']} cases", f"{content['tumours']['n']} tumours"]
    if ratio is not None:
        parts.append(
            f"background : liver : tumour = {' : '.join(f'{part:.4g}' for part in ratio)} native voxels"
        )
    return " · ".join(parts)


def _draw_intensities(axis: Axes, cases: Sequence[CaseFingerprint]) -> None:
    """Share of each class per HU, of the cached voxels, weighted by class fractions."""
    first, last = (hu - HU_FIRST for hu in SHOWN_HU)
    edges = np.arange(SHOWN_HU[0], SHOWN_HU[1] + 1, BIN_HU)
    for name, weights in zip(LABEL_NAMES, total_histogram(cases), strict=True):
        if not weights.any():
            continue
        binned = weights[first:last].reshape(-1, BIN_HU).sum(axis=1) * (100 / weights.sum() / BIN_HU)
        axis.stairs(binned, edges, color=CLASS_COLOURS[name], lw=1.8, label=name)
        axis.stairs(binned, edges, color=CLASS_COLOURS[name], alpha=0.15, fill=True)
    axis.set_xlim(*SHOWN_HU)
    axis.set_ylim(bottom=0)
    name_chart(axis, "intensity of each class", x="HU of cached voxels", y="% of the class per HU")
    draw_keys(axis)


def _draw_grids(axis: Axes, cases: Sequence[CaseFingerprint]) -> None:
    """Slices over slice spacing; the dot is as large as a pixel."""
    spacing_mm = np.array([case.grid.spacing_zyx_mm for case in cases])
    slices = np.array([case.grid.shape_zyx[0] for case in cases])
    for pixel_mm in _some(spacing_mm[:, 2]):
        axis.scatter(
            [],
            [],
            s=_dot(pixel_mm),
            color=LIVER_TRUTH,
            alpha=0.6,
            ec=BACKGROUND,
            label=f"{pixel_mm:.2f} mm pixels",
        )
    axis.scatter(
        spacing_mm[:, 0], slices, s=_dot(spacing_mm[:, 2]), color=LIVER_TRUTH, alpha=0.6, ec=BACKGROUND
    )
    axis.set_xlim(0, 1.08 * spacing_mm[:, 0].max())
    axis.set_ylim(0, 1.4 * slices.max())  # room for the legend
    name_chart(axis, "native grids", x="slice spacing, mm", y="slices")
    draw_keys(axis, loc="upper left")


def _dot(pixel_mm: Any) -> Any:
    return 45.0 * pixel_mm


def _some(values: NDArray[np.float64]) -> list[float]:
    """The smallest, the median and the largest, without repetitions at two digits."""
    return sorted({round(float(v), 2) for v in np.percentile(values, [0, 50, 100])})


def _draw_levels(axis: Axes, cases: Sequence[CaseFingerprint], levels: dict[str, Any]) -> None:
    """Mean and standard deviation of each image as the network gets it, and of those that were drawn."""
    drawn = [case for case in cases if case.case_id in set(levels["images"])]
    others = [case.image for case in cases if case.case_id not in set(levels["images"])]
    if others:
        _scatter(axis, others, color=MUTED, alpha=0.5, label=f"{len(others)} images not drawn")
    found = _written(levels)
    _scatter(
        axis, [case.image for case in drawn], color=DRAWN, alpha=0.85, label=f"{len(drawn)} drawn: {found}"
    )
    if levels["without_padding"]["brightness"] != levels["brightness"]:
        label = f"padding as air: {_written(levels['without_padding'])}"
        moments = [case.image_no_padding for case in drawn]
        _scatter(axis, moments, facecolors="none", edgecolors=DRAWN, label=label)
    axis.margins(x=0.12, y=0.1)
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.3 * (high - low))  # room for the legend
    name_chart(
        axis, "images, and the augmentation levels", x="mean of (HU − 50) / 200", y="standard deviation"
    )
    draw_keys(axis, loc="upper right")


def _scatter(axis: Axes, images: Sequence[Moments], **style: Any) -> None:
    axis.scatter(
        [image.mean for image in images], [image.sd for image in images], s=34, **{"lw": 0.9, **style}
    )


def _written(levels: dict[str, Any]) -> str:
    brightness, contrast = (
        "–" if levels[key] is None else f"{levels[key]:.3f}" for key in ("brightness", "contrast")
    )
    return f"brightness {brightness}, contrast {contrast}"


def _draw_volumes(axis: Axes, cases: Sequence[CaseFingerprint]) -> None:
    """Liver volumes, tumours within."""
    volumes = [v for case in cases if (v := case.volume_ml(1))]
    _draw_histogram(axis, np.array(volumes), colour=LIVER_TRUTH, log=False)
    name_chart(axis, "liver volume, tumours within", x="mL", y="cases")


def _draw_tumour_sizes(axis: Axes, cases: Sequence[CaseFingerprint]) -> None:
    """Diameters of the spheres with the tumours' volumes."""
    volumes_ml = np.array([v for case in cases for v in case.tumour_volumes_ml], dtype=np.float64)
    diameters = equivalent_diameters_mm(volumes_ml)
    _draw_histogram(axis, diameters, colour=TUMOUR_PRED, log=True)
    name_chart(axis, "tumour size", x="diameter of the sphere of equal volume, mm", y="tumours")


def _draw_histogram(axis: Axes, values: NDArray[np.float64], *, colour: str, log: bool) -> None:
    if not values.size:
        say_empty(axis, "none")
        return
    low, high = float(values.min()), float(values.max())
    n_bins = int(np.clip(np.sqrt(values.size) * 2, 8, 40))
    if log:
        edges = np.geomspace(low * 0.9, high * 1.1, n_bins + 1)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(np.inf, np.inf)))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        edges = np.linspace(min(low, 0.95 * low), high * 1.05, n_bins + 1)
    axis.hist(values, bins=list(edges), color=colour, alpha=0.75, rwidth=0.94)
    axis.axvline(
        float(np.median(values)), color=TEXT, lw=1.2, ls=DASHED, label=f"median {np.median(values):.4g}"
    )
    axis.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axis.set_ylim(top=1.18 * axis.get_ylim()[1])  # room for the legend
    draw_keys(axis, loc="upper right")


def _draw_tumour_counts(axis: Axes, cases: Sequence[CaseFingerprint]) -> None:
    """How many cases have so many tumours; none is a count, too."""
    counts = np.array(
        [len(case.tumour_volumes_ml) for case in cases if case.voxel_counts is not None], dtype=int
    )
    if not counts.size:
        _draw_histogram(axis, np.empty(0), colour=TUMOUR_PRED, log=False)
    else:
        per_count = np.bincount(counts)
        axis.bar(np.arange(per_count.size), per_count, color=TUMOUR_PRED, alpha=0.75, width=0.86)
        axis.set_xlim(-0.6, max(per_count.size, 4) - 0.4)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    name_chart(axis, "tumours per case", x="tumours", y="cases")
