"""What a label is: the one reader of label files, and the one rule that turns probabilities into labels.

Both live here, below ``liverseg``, because preprocessing and restoring need them. ``liverseg.model.inputs.decide`` is the
same rule on tensors, and a test holds the two together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_cache.errors import LabelError, LiversegError
from pipeline.nifti import VolumeHeader, VolumeStream, to_canonical
from pipeline.nifti.stream import retry_with_stdlib_gzip

Probabilities = NDArray[np.float32]

# How far a stored value may be from 0, 1 or 2 and still be it: float32's rounding, 0.9999, and the 2/255 steps that
# nibabel's scaling leaves of a label in uint8 (1 comes back as 0.996). A probability map is not a label.
TOLERANCE = 0.01
RULE = f"a label has 0, 1 (liver) and 2 (tumour), each within {TOLERANCE:g}"
HIGHEST = 65535  # of the labels of other tools
VALUES_RULE = f"a label has whole numbers from 0 to {HIGHEST}, each within {TOLERANCE:g}"
EXCHANGE = "exchange them in dataset.json"
FAT_HU = -100  # a scan has this and less; a label's values are not negative
_LISTED = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelVolume:
    """A label file read whole: uint8 (z, y, x) of 0, 1 and 2, canonical, its header and the file's sha256."""

    label_zyx: NDArray[np.uint8]
    header: VolumeHeader
    sha256: str


def read_label(path: Path) -> LabelVolume:
    """Read a label file.

    Raises:
        VolumeError: The file cannot be read.
        LabelError: It holds other values than 0, 1 and 2.
    """
    return retry_with_stdlib_gzip(lambda use_stdlib: _read_label(path, use_stdlib=use_stdlib))


def _read_label(path: Path, *, use_stdlib: bool) -> LabelVolume:
    with VolumeStream.open(path, use_stdlib=use_stdlib) as stream:
        header = stream.header
        label_kji = np.zeros(header.shape_kji, dtype=np.uint8)
        for first, block_kji in stream.blocks():
            masks = foreground_and_tumour(block_kji, header)
            if masks is not None:
                label_kji[first : first + len(block_kji)] = masks[0] + masks[1]
        label_zyx = to_canonical(label_kji, header.axes_kji)
        return LabelVolume(label_zyx=label_zyx, header=header, sha256=stream.sha256)


def read_values(path: Path) -> tuple[NDArray[np.uint16], VolumeHeader]:
    """Any tool's label, with whatever values: (z, y, x), canonical, and its header.

    Raises:
        VolumeError: The file cannot be read.
        LabelError: It holds other values than whole numbers from 0 to ``HIGHEST``.
    """
    return retry_with_stdlib_gzip(lambda use_stdlib: _read_values(path, use_stdlib=use_stdlib))


def _read_values(path: Path, *, use_stdlib: bool) -> tuple[NDArray[np.uint16], VolumeHeader]:
    with VolumeStream.open(path, use_stdlib=use_stdlib) as stream:
        header = stream.header
        values_kji = np.empty(header.shape_kji, dtype=np.uint16)
        for first, block_kji in stream.blocks():
            values = _values(block_kji, header)
            if not _is_whole(values, HIGHEST):
                wrong = describe_values(wrong_values(block_kji, header, HIGHEST), HIGHEST)
                raise LabelError(f"{path}: holds {wrong}; {VALUES_RULE}: threshold or map it first")
            values_kji[first : first + len(block_kji)] = np.rint(values)
        return to_canonical(values_kji, header.axes_kji), header


def look_swapped(image: Path, label: Path) -> bool:
    """Whether a label was named where its scan belongs, and the scan where the label belongs."""
    return looks_like_label(image) and _has_fat(label)


def exchanged(image: Path, label: Path) -> str:
    """Words for a case whose files ``look_swapped``."""
    return f"{image} and {label} look exchanged: the image has a label's values, and the label has HU"


def _has_fat(path: Path) -> bool:
    try:
        with VolumeStream.open(path) as stream:
            return any((_values(block, stream.header) <= FAT_HU).any() for _, block in stream.blocks())
    except LiversegError:
        return False


def looks_like_label(path: Path) -> bool:
    """Whether the values of a volume are whole numbers from 0 to 255, of whatever label; no CT in HU has only these.

    A file that cannot be read does not look like one. Of a CT, hardly more than the first block is read.
    """
    try:
        with VolumeStream.open(path) as stream:
            return all(_is_whole(_values(block, stream.header), 255) for _, block in stream.blocks())
    except LiversegError:
        return False


def _is_whole(values: NDArray[Any], highest: int) -> bool:
    low, high = values.min(), values.max()
    return bool(low >= -TOLERANCE and high <= highest + TOLERANCE and _is_near(values, np.rint(values)))


def foreground_and_tumour(
    block_kji: NDArray[Any], header: VolumeHeader
) -> tuple[NDArray[np.int8], NDArray[np.int8]] | None:
    """Masks of label ≥ 1 and of label 2 of a block of stored values, or None where both are empty.

    Raises:
        LabelError: The block holds other values than 0, 1 and 2.
    """
    if block_kji.dtype == np.uint8 and not _is_scaled(
        header
    ):  # the usual label: three passes over its bytes, not six
        largest = int(block_kji.max())
        if largest == 0:
            return None
        if largest <= 2:
            return (block_kji != 0).view(np.int8), (block_kji == 2).view(np.int8)
    values = _values(block_kji, header)
    ids = np.rint(values) if values.dtype.kind == "f" else values
    foreground, tumour = ids != 0, ids == 2
    if not np.array_equal(foreground, tumour | (ids == 1)) or not _is_near(values, ids):
        wrong = wrong_values(block_kji, header)
        raise LabelError(f"{header.path}: holds {describe_values(wrong)}; {RULE}: threshold or map it first")
    return (foreground.view(np.int8), tumour.view(np.int8)) if foreground.any() else None


def wrong_values(block_kji: NDArray[Any], header: VolumeHeader, highest: int = 2) -> set[float]:
    """The values of a block that are not labels up to ``highest``, each once; of very many different ones only some."""
    values = np.unique(_values(block_kji, header))
    with np.errstate(invalid="ignore"):
        is_label = np.abs(values - np.clip(np.rint(values), 0, highest)) <= TOLERANCE
    return {float(value) for value in values[~is_label][:1000]}


def describe_values(values: set[float], highest: int = 2) -> str:
    """Values in words, each with its distance from the nearest label: "0.55 (0.45 from 1), 7 (5 from 2)"."""
    ordered = sorted(values, key=lambda value: (value != value, value))
    words = [_described(value, highest) for value in ordered[:_LISTED]]
    rest = f" and {len(ordered) - _LISTED} other values" if len(ordered) > _LISTED else ""
    return ", ".join(words) + rest


def _described(value: float, highest: int) -> str:
    if not np.isfinite(value):
        return f"{value:g}"
    nearest = min(max(math.ceil(value - 0.5), 0), highest)
    digits, of_distance = (4, 3) if abs(value) < 1000 else (6, 6)
    return f"{value:.{digits}g} ({abs(value - nearest):.{of_distance}g} from {nearest})"


def _is_scaled(header: VolumeHeader) -> bool:
    return (header.slope, header.intercept) != (1.0, 0.0)


def _values(block_kji: NDArray[Any], header: VolumeHeader) -> NDArray[Any]:
    if not _is_scaled(header):
        return block_kji
    with np.errstate(over="ignore", invalid="ignore"):
        values: NDArray[Any] = block_kji * header.slope + header.intercept
    return values


def _is_near(values: NDArray[Any], ids: NDArray[Any]) -> bool:
    if values is ids:
        return True
    with np.errstate(invalid="ignore"):
        return bool((np.abs(values - ids) <= TOLERANCE).all())


# ---- from probabilities


def is_foreground(both: Probabilities) -> NDArray[np.bool_]:
    """Whether a voxel is liver or tumour: their probabilities together reach one half."""
    return both >= 0.5


def is_tumour(both: Probabilities, tumour: Probabilities) -> NDArray[np.bool_]:
    """Whether a voxel is tumour: it is foreground, and more than half of its foreground probability is tumour's."""
    return is_foreground(both) & (2 * tumour > both)


def decide(foreground_czyx: Probabilities) -> NDArray[np.uint8]:
    """Labels 0, 1 and 2 from the probabilities, or fractions, of liver and tumour (2, ...)."""
    both, tumour = foreground_czyx.sum(axis=0), foreground_czyx[1]
    return is_foreground(both).astype(np.uint8) + is_tumour(both, tumour)
