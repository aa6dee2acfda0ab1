"""Volumes small enough for a page: pictures of all slices, and what is drawn over them, as data URIs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_cache.geometry import Box, Grid, resampled_grid
from data_cache.schema import View
from liverseg.measure.overlap import union_box
from liverseg.measure.uncertainty import MAX_ENTROPY, entropy
from liverseg.pictures.data_uri import jpeg_uri, png_uri, tiled
from liverseg.pictures.palette import LIVER_PRED, LIVER_TRUTH, TUMOUR_PRED, TUMOUR_TRUTH
from pipeline.resample import average_plane, box_weights, linear_weights

SHOWN_HU = (-350, 450)  # 256 steps of 3 HU: every soft-tissue window is inside
MAX_VOXELS = 1_500_000  # of one volume on a page
CONTEXT_MM = 40.0  # shown above and below what is labelled
MAX_CASE_BYTES = 400_000  # on a page, all volumes of a case together
UNCERTAIN = "#ffffff"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One thing drawn over the image: some bits of a byte a voxel.

    Attributes:
        kind: ``classes``: 1 liver, 2 tumour, drawn as outlines and a tint. ``share``: from 0 to all bits set,
            drawn as a tint of that strength.
        shift, bits: Where in the byte.
        colours: Of each class from 1 up, or of the share.
        shown: When the page opens.
    """

    name: str
    kind: Literal["classes", "share"]
    shift: int
    bits: int
    colours: tuple[str, ...]
    shown: bool


TRUTH = Layer(name="truth", kind="classes", shift=0, bits=2, colours=(LIVER_TRUTH, TUMOUR_TRUTH), shown=True)
PREDICTION = Layer(
    name="prediction", kind="classes", shift=2, bits=2, colours=(LIVER_PRED, TUMOUR_PRED), shown=True
)
UNCERTAINTY = Layer(name="uncertainty", kind="share", shift=4, bits=4, colours=(UNCERTAIN,), shown=False)
LIVER_SHARE = Layer(name="liver share", kind="share", shift=4, bits=4, colours=(LIVER_TRUTH,), shown=True)
TUMOUR_SHARE = Layer(name="tumour share", kind="share", shift=0, bits=4, colours=(TUMOUR_PRED,), shown=True)


def evaluation_volume(
    image_zyx: NDArray[np.int16],
    truth_zyx: NDArray[np.uint8],
    predicted_zyx: NDArray[np.uint8],
    grid: Grid,
    *,
    foreground_czyx: NDArray[np.float32],
    box: Box,
) -> dict[str, Any]:
    """A scored case for a page: image, truth, prediction and uncertainty around what is labelled.

    Args:
        image_zyx: HU on the native grid.
        truth_zyx: Labels 0, 1, 2 on the native grid.
        predicted_zyx: The same.
        grid: The native grid, canonical.
        foreground_czyx: Probabilities of liver and tumour on the view of ``box``.
        box: The native voxels of that view.
    """
    shown = _shown_box(truth_zyx, predicted_zyx, grid)
    shape_zyx = _shown_shape(grid, shown)
    uncertainty_zyx = _to_shown(entropy(foreground_czyx) / MAX_ENTROPY, box, grid, shown, shape_zyx)
    parts = (
        (TRUTH, _shrunk_label(truth_zyx, shown, shape_zyx)),
        (PREDICTION, _shrunk_label(predicted_zyx, shown, shape_zyx)),
        (UNCERTAINTY, np.rint(uncertainty_zyx * 15).astype(np.uint8)),
    )
    overlay_zyx = np.zeros(shape_zyx, dtype=np.uint8)
    for layer, values_zyx in parts:
        overlay_zyx |= np.left_shift(values_zyx, layer.shift, dtype=np.uint8)
    return encoded(
        "around the liver",
        _shrunk(image_zyx, shown, shape_zyx),
        overlay_zyx,
        resampled_grid(grid, shown, shape_zyx),
        layers=(TRUTH, PREDICTION, UNCERTAINTY),
        native=shown,
        max_bytes=MAX_CASE_BYTES,
    )


def cached_volume(name: str, view: View, native: Box) -> dict[str, Any]:
    """A view of a cache for a page, its fractions in steps of a fifteenth; the image alone without a label.

    Args:
        name: Of the view; a case has two, so that each takes half of what a case may.
        view: As the store gives it.
        native: The voxels of the file that it covers.
    """
    overlay_zyx: NDArray[np.uint8] | None = None
    if view.fractions_czyx is not None:
        liver_zyx, tumour_zyx = np.rint(view.fractions_czyx / np.float32(17)).astype(np.uint8)
        overlay_zyx = (liver_zyx << LIVER_SHARE.shift) | (tumour_zyx << TUMOUR_SHARE.shift)
    return encoded(
        name,
        view.image_zyx,
        overlay_zyx,
        view.grid,
        layers=() if overlay_zyx is None else (LIVER_SHARE, TUMOUR_SHARE),
        native=native,
        max_bytes=MAX_CASE_BYTES // 2,
    )


def encoded(
    name: str,
    image_zyx: NDArray[Any],
    overlay_zyx: NDArray[np.uint8] | None,
    grid: Grid,
    *,
    layers: Sequence[Layer],
    native: Box,
    max_bytes: int,
) -> dict[str, Any]:
    """What the page's script reads of one volume: plain JSON, slices as tiles of one picture, row by row.

    Args:
        name: Shown where a case has several volumes.
        image_zyx: HU.
        overlay_zyx: A byte a voxel, of the bits that ``layers`` names; None for none.
        grid: Of both.
        layers: What the bits say.
        native: The voxels of the file that the volume covers.
        max_bytes: The image is compressed until it and the overlay fit in here.
    """
    low, high = SHOWN_HU
    grey_zyx = np.rint((np.clip(image_zyx, low, high) - low) * (255 / (high - low))).astype(np.uint8)
    columns = max(1, round(math.sqrt(grey_zyx.shape[0])))
    overlay = None if overlay_zyx is None else png_uri(tiled(overlay_zyx, columns))
    room = max_bytes - 2048 - len(overlay or "")  # two kilobytes for all the rest
    return {
        "name": name,
        "shape": list(grey_zyx.shape),
        "spacing": [round(s, 4) for s in grid.spacing_zyx_mm],
        "hu": list(SHOWN_HU),
        "columns": columns,
        "native": [native.start_zyx[0], native.stop_zyx[0]],
        "image": jpeg_uri(tiled(grey_zyx, columns), max_bytes=room),
        "overlay": overlay,
        "layers": [
            {f: getattr(layer, f) for f in ("name", "kind", "shift", "bits", "colours", "shown")}
            for layer in layers
        ],
    }


# ---- the shown grid


def _shown_box(truth_zyx: NDArray[np.uint8], predicted_zyx: NDArray[np.uint8], grid: Grid) -> Box:
    """What is labelled and ``CONTEXT_MM`` around it, or all of a scan without any label."""
    labelled = union_box(truth_zyx, predicted_zyx)
    if labelled[0].start == labelled[0].stop:
        return Box.whole(grid.shape_zyx)
    margin_zyx = [math.ceil(CONTEXT_MM / spacing) for spacing in grid.spacing_zyx_mm]
    return Box.from_slices(labelled).with_margin(margin_zyx, grid.shape_zyx)


def _shown_shape(grid: Grid, shown: Box) -> tuple[int, int, int]:
    """As many voxels as a page bears, cubes if the scan's own spacing allows, never finer than the scan."""
    native = shown.shape_zyx
    sizes_mm = [n * s for n, s in zip(native, grid.spacing_zyx_mm, strict=True)]
    edge_mm = (math.prod(sizes_mm) / MAX_VOXELS) ** (1 / 3)
    z, y, x = (max(1, min(n, int(size_mm / edge_mm))) for n, size_mm in zip(native, sizes_mm, strict=True))
    return z, y, x


def _shrunk(volume_zyx: NDArray[Any], shown: Box, shape_zyx: tuple[int, int, int]) -> NDArray[np.float32]:
    """Box averages of the voxels in ``shown``, a slice at a time: the volume is never copied whole."""
    in_z, in_y, in_x = shown.slices_zyx
    weights = box_weights(shown.shape_zyx[0], shape_zyx[0]).astype(np.float32)
    total = np.zeros(shape_zyx, dtype=np.float32)
    for z, slice_yx in enumerate(volume_zyx[in_z]):
        (averaged_yx,) = average_plane(slice_yx[None, in_y, in_x], n_j=shape_zyx[1], n_i=shape_zyx[2])
        for target in np.flatnonzero(weights[:, z]):
            total[target] += weights[target, z] * averaged_yx
    return total


def _shrunk_label(
    label_zyx: NDArray[np.uint8], shown: Box, shape_zyx: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """Liver where half of a shown voxel is labelled, tumour where that is then more than liver."""
    labelled = _shrunk((label_zyx > 0).view(np.uint8), shown, shape_zyx)
    tumour = _shrunk((label_zyx == 2).view(np.uint8), shown, shape_zyx)
    inside = labelled >= 0.5
    return inside.astype(np.uint8) + (inside & (tumour > labelled - tumour)).astype(np.uint8)


def _to_shown(
    values_zyx: NDArray[np.float32], box: Box, grid: Grid, shown: Box, shape_zyx: tuple[int, int, int]
) -> NDArray[np.float32]:
    """The values of the view of ``box`` on the shown grid: up to the native one and down again, one product per axis."""
    weights = []
    for axis, n in enumerate(grid.shape_zyx):
        inside, n_view = box.slices_zyx[axis], values_zyx.shape[axis]
        up = np.zeros((n, n_view))
        up[inside] = linear_weights(n_view, inside.stop - inside.start)
        down = box_weights(n, shape_zyx[axis], shown.start_zyx[axis], shown.stop_zyx[axis])
        weights.append((down @ up).astype(np.float32))
    result: NDArray[np.float32] = np.einsum("zyx,Zz,Yy,Xx->ZYX", values_zyx, *weights, optimize=True)
    return result
