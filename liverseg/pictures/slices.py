"""A case small enough for a page: pictures of all slices of two volumes, what is drawn over them, and its lesions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_cache.geometry import Box, Grid
from data_cache.schema import View
from liverseg.measure.lesion_list import Lesion, list_lesions
from liverseg.measure.overlap import union_box
from liverseg.measure.uncertainty import MAX_ENTROPY, entropy
from liverseg.pictures.data_uri import jpeg_uri, png_uri, tiled
from liverseg.pictures.palette import LIVER_PRED, LIVER_TRUTH, TUMOUR_PRED, TUMOUR_TRUTH
from pipeline.resample import average_plane, box_weights, linear_weights

SHOWN_HU = (-350, 450)  # 256 steps of 3 HU: every soft-tissue window is inside
CLOSE_VOXELS, AROUND_VOXELS = 4_000_000, 1_000_000  # of the two volumes of a case at most
CLOSE_MM, AROUND_MM = 12.0, 40.0  # shown around what is labelled
CLOSE_BYTES, AROUND_BYTES = 1_000_000, 350_000  # on a page, of each volume
UNCERTAIN = "#ffffff"
CLASSES = ("liver", "tumour")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One thing drawn over the image: some bits of a byte per voxel.

    Attributes:
        kind: ``classes``: a class per value from 1 up. ``share``: from 0 to all bits set, drawn as a tint of that
            strength.
        shift, bits: Where in the byte.
        names, colours: Of each class from 1 up, or of the share.
        contours: Whether edges are drawn: of each class, or where the share is a half.
        nested: Whether a class includes the classes after it, as the liver does its tumours.
        dashed: Thin and dashed, to be seen on top of another layer's line.
        shown: When the page opens.
    """

    name: str
    kind: Literal["classes", "share"]
    shift: int
    bits: int
    names: tuple[str, ...]
    colours: tuple[str, ...]
    contours: bool = True
    nested: bool = True
    dashed: bool = False
    shown: bool = True


TRUTH = Layer(
    name="truth", kind="classes", shift=0, bits=2, names=CLASSES, colours=(LIVER_TRUTH, TUMOUR_TRUTH)
)
PREDICTION = Layer(
    name="prediction",
    kind="classes",
    shift=2,
    bits=2,
    names=CLASSES,
    colours=(LIVER_PRED, TUMOUR_PRED),
    dashed=True,
)
UNCERTAINTY = Layer(
    name="uncertainty",
    kind="share",
    shift=4,
    bits=4,
    names=("uncertainty",),
    colours=(UNCERTAIN,),
    contours=False,
    shown=False,
)
LIVER_SHARE = Layer(
    name="liver with tumour", kind="share", shift=4, bits=4, names=("liver",), colours=(LIVER_TRUTH,)
)
TUMOUR_SHARE = Layer(name="tumour", kind="share", shift=0, bits=4, names=("tumour",), colours=(TUMOUR_PRED,))


def evaluation_volume(
    image_zyx: NDArray[np.int16],
    truth_zyx: NDArray[np.uint8],
    predicted_zyx: NDArray[np.uint8],
    grid: Grid,
    *,
    foreground_czyx: NDArray[np.float32],
    box: Box,
) -> dict[str, Any]:
    """A scored case for a page: image, truth, prediction, uncertainty and lesions.

    Args:
        image_zyx: HU on the native grid.
        truth_zyx: Labels 0, 1, 2 on the native grid.
        predicted_zyx: The same.
        grid: The native grid, canonical.
        foreground_czyx: Probabilities of liver and tumour on the view of ``box``.
        box: The native voxels of that view.
    """
    uncertainty_zyx = entropy(foreground_czyx) / MAX_ENTROPY

    def overlay(shown: Box, shape_zyx: tuple[int, int, int]) -> NDArray[np.uint8]:
        shown_zyx = _to_shown(uncertainty_zyx, box, shown, shape_zyx)
        return _packed(
            (TRUTH, _shrunk_label(truth_zyx[shown.slices_zyx], shape_zyx)),
            (PREDICTION, _shrunk_label(predicted_zyx[shown.slices_zyx], shape_zyx)),
            (UNCERTAINTY, np.rint(shown_zyx * 15).astype(np.uint8)),
        )

    lesions = list_lesions(predicted_zyx == 2, truth_zyx == 2, grid.spacing_zyx_mm)
    return _case(
        image_zyx,
        grid,
        union_box(truth_zyx, predicted_zyx),
        overlay,
        layers=(TRUTH, PREDICTION, UNCERTAINTY),
        lesions=lesions,
    )


def labelled_volume(
    image_zyx: NDArray[np.int16], label_zyx: NDArray[np.uint8], grid: Grid, *, layer: Layer
) -> dict[str, Any]:
    """A scan with any tool's label for a page; tumours are listed where the label has liver and tumour.

    Args:
        image_zyx: HU on the native grid.
        label_zyx: Values from 0 to as many as ``layer`` has names.
        grid: The native grid, canonical.
        layer: What the values mean.
    """

    def overlay(box: Box, shape_zyx: tuple[int, int, int]) -> NDArray[np.uint8]:
        part_zyx = label_zyx[box.slices_zyx]
        shrunk = _shrunk_label(part_zyx, shape_zyx) if layer.nested else _nearest(part_zyx, shape_zyx)
        return _packed((layer, shrunk))

    lesions = list_lesions(label_zyx == 2, None, grid.spacing_zyx_mm) if layer.nested else ()
    labelled = union_box(label_zyx, label_zyx)
    return _case(image_zyx, grid, labelled, overlay, layers=(layer,), lesions=lesions)


def cached_case(grid: Grid, views: Sequence[tuple[str, View, Box]]) -> dict[str, Any]:
    """The views of a cached case for a page, their fractions in steps of a fifteenth; images alone without a label.

    Args:
        grid: The native grid, canonical.
        views: Of each its name, what the store gives, and the part of the native grid that it covers.
    """
    return {**_scan(grid), "lesions": [], "volumes": [_cached(*view) for view in views]}


def _cached(name: str, view: View, box: Box) -> dict[str, Any]:
    overlay_zyx: NDArray[np.uint8] | None = None
    if view.fractions_czyx is not None:
        liver_zyx, tumour_zyx = view.fractions_czyx.astype(np.float32)
        both_zyx = np.minimum(liver_zyx + tumour_zyx, 255)
        steps = [np.rint(share_zyx / 17).astype(np.uint8) for share_zyx in (both_zyx, tumour_zyx)]
        overlay_zyx = _packed((LIVER_SHARE, steps[0]), (TUMOUR_SHARE, steps[1]))
    layers = () if overlay_zyx is None else (LIVER_SHARE, TUMOUR_SHARE)
    return encoded(name, view.image_zyx, overlay_zyx, box, layers=layers, max_bytes=AROUND_BYTES)


def encoded(
    name: str,
    image_zyx: NDArray[Any],
    overlay_zyx: NDArray[np.uint8] | None,
    box: Box,
    *,
    layers: Sequence[Layer],
    max_bytes: int,
) -> dict[str, Any]:
    """What the page's script reads of one volume: plain JSON, slices as tiles of one picture, row by row.

    Args:
        name: Shown where a case has several volumes.
        image_zyx: HU.
        overlay_zyx: A byte per voxel, of the bits that ``layers`` names; None for none.
        box: The voxels of the scan that the volume covers.
        layers: What the bits say.
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
        "box": [list(ends) for ends in zip(box.start_zyx, box.stop_zyx, strict=True)],
        "hu": list(SHOWN_HU),
        "columns": columns,
        "image": jpeg_uri(tiled(grey_zyx, columns), max_bytes=room),
        "overlay": overlay,
        "layers": [asdict(layer) for layer in layers],
    }


def _scan(grid: Grid) -> dict[str, Any]:
    return {"shape": list(grid.shape_zyx), "spacing": [round(s, 4) for s in grid.spacing_zyx_mm]}


def _case(
    image_zyx: NDArray[np.int16],
    grid: Grid,
    labelled: tuple[slice, slice, slice],
    overlay: Callable[[Box, tuple[int, int, int]], NDArray[np.uint8]],
    *,
    layers: Sequence[Layer],
    lesions: Sequence[Lesion],
) -> dict[str, Any]:
    """The labelled box as finely as a page bears, and what lies around it; without a label, the whole scan."""
    volumes = []
    for name, box, most, max_bytes in (
        ("close", _widened(labelled, grid, (CLOSE_MM,) * 3), CLOSE_VOXELS, CLOSE_BYTES),
        ("around", _widened(labelled, grid, (AROUND_MM, math.inf, math.inf)), AROUND_VOXELS, AROUND_BYTES),
    ):
        shape_zyx = _shown_shape(box, grid, most)
        shown = _shrunk(image_zyx[box.slices_zyx], shape_zyx)
        volumes.append(encoded(name, shown, overlay(box, shape_zyx), box, layers=layers, max_bytes=max_bytes))
    if volumes[0]["box"] == volumes[1]["box"]:
        volumes.pop()
    return {**_scan(grid), "lesions": [_lesion(lesion) for lesion in lesions], "volumes": volumes}


def _lesion(lesion: Lesion) -> dict[str, Any]:
    return {
        "status": lesion.status,
        # Rounded down: a lesion that is counted below 10 mm must not be shown with 10 mm.
        "mm": math.floor(lesion.diameter_mm * 10) / 10,
        "ml": round(lesion.volume_ml, 2),
        "at": list(lesion.at_zyx),
    }


def _packed(*parts: tuple[Layer, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    packed_zyx = np.zeros_like(parts[0][1])
    for layer, values_zyx in parts:
        packed_zyx |= np.left_shift(values_zyx, layer.shift, dtype=np.uint8)
    return packed_zyx


# ---- the shown grid


def _widened(labelled: tuple[slice, slice, slice], grid: Grid, margins_mm: Sequence[float]) -> Box:
    """What is labelled and so much more on each side, inside the scan; without any label, the scan."""
    if labelled[0].start == labelled[0].stop:
        return Box.whole(grid.shape_zyx)
    margin_zyx = [
        n if math.isinf(mm) else math.ceil(mm / spacing_mm)
        for n, mm, spacing_mm in zip(grid.shape_zyx, margins_mm, grid.spacing_zyx_mm, strict=True)
    ]
    return Box.from_slices(labelled).with_margin(margin_zyx, grid.shape_zyx)


def _shown_shape(box: Box, grid: Grid, max_voxels: int) -> tuple[int, int, int]:
    """As many voxels as a page bears, cubes if the scan's own spacing allows, never finer than the scan."""
    native = box.shape_zyx
    if math.prod(native) <= max_voxels:
        return native
    sizes_mm = [n * s for n, s in zip(native, grid.spacing_zyx_mm, strict=True)]
    edge_mm = _edge_mm(sizes_mm, grid.spacing_zyx_mm, max_voxels)
    z, y, x = (max(1, min(n, int(size_mm / edge_mm))) for n, size_mm in zip(native, sizes_mm, strict=True))
    return z, y, x


def _edge_mm(sizes_mm: Sequence[float], spacing_mm: Sequence[float], max_voxels: int) -> float:
    """Edge of the cubes: an axis whose own spacing is longer keeps it, and leaves its voxels to the others."""
    coarse: set[int] = set()
    while True:
        fine = [size_mm for axis, size_mm in enumerate(sizes_mm) if axis not in coarse]
        taken = math.prod(sizes_mm[axis] / spacing_mm[axis] for axis in coarse)
        edge_mm = float((math.prod(fine) * taken / max_voxels) ** (1 / len(fine)))
        more = {axis for axis, mm in enumerate(spacing_mm) if mm > edge_mm} - coarse
        if not more:
            return edge_mm
        coarse |= more


def _shrunk(volume_zyx: NDArray[Any], shape_zyx: tuple[int, int, int]) -> NDArray[np.float32]:
    """Box averages, a slice at a time: the volume is never copied whole."""
    weights = box_weights(len(volume_zyx), shape_zyx[0]).astype(np.float32)
    total = np.zeros(shape_zyx, dtype=np.float32)
    for z, slice_yx in enumerate(volume_zyx):
        (thin_yx,) = average_plane(slice_yx[None], n_j=shape_zyx[1], n_i=shape_zyx[2])
        for target in np.flatnonzero(weights[:, z]):
            total[target] += weights[target, z] * thin_yx
    return total


def _shrunk_label(label_zyx: NDArray[np.uint8], shape_zyx: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Liver where half of a shown voxel is labelled, tumour where that is then more than liver."""
    labelled = _shrunk((label_zyx > 0).view(np.uint8), shape_zyx)
    tumour = _shrunk((label_zyx == 2).view(np.uint8), shape_zyx)
    inside = labelled >= 0.5
    return inside.astype(np.uint8) + (inside & (tumour > labelled - tumour)).astype(np.uint8)


def _nearest(label_zyx: NDArray[np.uint8], shape_zyx: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The value at the middle of each shown voxel."""
    z, y, x = (
        ((np.arange(n) + 0.5) * n_source / n).astype(np.int64)
        for n, n_source in zip(shape_zyx, label_zyx.shape, strict=True)
    )
    return label_zyx[np.ix_(z, y, x)]


def _to_shown(
    values_zyx: NDArray[np.float32], box: Box, shown: Box, shape_zyx: tuple[int, int, int]
) -> NDArray[np.float32]:
    """The values of the view of ``box`` on the shown grid: up to the native one and down again, one product per axis."""
    weights = []
    for n_view, n, inside, part in zip(
        values_zyx.shape, shape_zyx, box.slices_zyx, shown.slices_zyx, strict=True
    ):
        n_native = max(inside.stop, part.stop)
        up = np.zeros((n_native, n_view))
        up[inside] = linear_weights(n_view, inside.stop - inside.start)
        weights.append((box_weights(n_native, n, part.start, part.stop) @ up).astype(np.float32))
    result: NDArray[np.float32] = np.einsum("zyx,Zz,Yy,Xx->ZYX", values_zyx, *weights, optimize=True)
    return result
