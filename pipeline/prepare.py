"""One scan (and its label) to cached tensors: the one path from a file, for training and inference alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_cache.errors import LabelError
from data_cache.geometry import (
    DepthWindow,
    Grid,
    corner_distance_mm,
    resampled_grid,
    window_with_margin,
)
from data_cache.schema import (
    FRACTION_ONE,
    MISSING_HU,
    Case,
    CaseMeta,
    HuStatistics,
    PreprocessSpec,
    SourceFile,
    View,
)
from pipeline.average import Channels, average_in_plane
from pipeline.nifti import CorruptStreamError, VolumeHeader, VolumeStream
from pipeline.resample import Slab, resample_depth

T = TypeVar("T")
OpenStream = Callable[[Path], VolumeStream]

GRID_TOLERANCE_VOXELS = 0.1  # how far corresponding corners of an image and its label may be apart
HU_RANGE = (MISSING_HU + 1, 32767)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InPlaneScan:
    """An image averaged in the plane: any depth window can be cut from it without reading the file again.

    Attributes:
        header: Of the file, for writing a segmentation on the same grid.
        slabs: The thin volume, 64 KiB a slice at 128×128.
        notes: What was assumed or replaced while reading.
    """

    header: VolumeHeader
    slabs: tuple[Slab, ...]
    notes: tuple[str, ...]

    @property
    def scan_window(self) -> DepthWindow:
        """All slices."""
        return DepthWindow(start=0, stop=self.header.grid.shape_zyx[0])

    def view(self, window: DepthWindow, spec: PreprocessSpec) -> View:
        """The slices of ``window``, resampled as the cache has them."""
        grid = self.header.grid
        (values,) = resample_depth(self.slabs, [window], spec.shape_zyx, depth=grid.shape_zyx[0])
        return _view(values, None, resampled_grid(grid, window, spec.shape_zyx))


def read_scan(image: Path, spec: PreprocessSpec) -> InPlaneScan:
    """Read an image once, for inference.

    Raises:
        VolumeError: The file is missing, damaged or no NIfTI volume.
    """
    return retry_with_stdlib_gzip(lambda use_stdlib: _read_scan(image, spec, use_stdlib=use_stdlib))


def prepare_case(
    case_id: str, image: Path, label: Path, spec: PreprocessSpec, *, root: Path, prefetch: bool = False
) -> Case:
    """Read a scan and its label once each, into the views of a case.

    Args:
        case_id: Name of the case.
        image: NIfTI file in HU.
        label: NIfTI file on the same grid: 0 background, 1 liver, 2 tumour.
        spec: Shape and margins of the views.
        root: Folder that the paths in the metadata are relative to.
        ahead: Inflate in a thread of its own, for where a core would be idle.

    Returns:
        A case with the view "scan", and "liver" where the label has any liver or tumour.

    Raises:
        VolumeError: A file is missing, damaged or no NIfTI volume.
        LabelError: The label has other values, or lies on another grid than the image.
    """
    return retry_with_stdlib_gzip(
        lambda use_stdlib: _prepare_case(
            case_id,
            image,
            label,
            spec,
            root=root,
            open_stream=partial(VolumeStream.open, use_stdlib=use_stdlib, prefetch=prefetch),
        )
    )


def retry_with_stdlib_gzip(read: Callable[[bool], T]) -> T:
    """Call ``read`` with ISA-L, and once more with the standard library (True) if the stream looks corrupt."""
    try:
        return read(False)
    except CorruptStreamError:
        # ISA-L has an open false alarm (checksums on aarch64): the standard library has the last word.
        return read(True)


def _read_scan(image: Path, spec: PreprocessSpec, *, use_stdlib: bool) -> InPlaneScan:
    with VolumeStream.open(
        image, use_stdlib=use_stdlib, prefetch=True
    ) as stream:  # one file: other cores are idle
        tally = _ImageTally()
        slabs = tuple(_image_slabs(stream, spec, tally))
        return InPlaneScan(
            header=stream.header, slabs=slabs, notes=(*stream.header.notes, *tally.notes(spec))
        )


def _prepare_case(
    case_id: str, image: Path, label: Path, spec: PreprocessSpec, *, root: Path, open_stream: OpenStream
) -> Case:
    with open_stream(image) as stream:
        header, grid = stream.header, stream.header.grid
        thin_label = _read_label(label, header, spec, root=root, open_stream=open_stream)
        windows = _windows(thin_label, depth=grid.shape_zyx[0], spec=spec)
        tally = _ImageTally()
        resample = partial(
            resample_depth, windows=tuple(windows.values()), shape_zyx=spec.shape_zyx, depth=grid.shape_zyx[0]
        )
        images = resample(_image_slabs(stream, spec, tally))
        labels = resample(thin_label.slabs, channels=2)
        source = _source(stream, root)
    views = {
        name: _view(images[i], labels[i], resampled_grid(grid, window, spec.shape_zyx))
        for i, (name, window) in enumerate(windows.items())
    }
    meta = CaseMeta(
        case_id=case_id,
        spec_fingerprint=spec.fingerprint(),
        image=source,
        label=thin_label.source,
        grid=grid,
        file_axes=header.file_axes,
        windows=windows,
        voxel_counts=thin_label.voxel_counts,
        hu=_hu_statistics(tally, views["scan"].image_zyx),
        notes=(*header.notes, *thin_label.notes, *tally.notes(spec)),
    )
    return Case(meta=meta, views=views)


# ---- image


@dataclass(slots=True, kw_only=True)
class _ImageTally:
    """What is learnt of an image's native voxels while they pass."""

    minimum: float = np.inf
    maximum: float = -np.inf
    replaced: int = 0

    def notes(self, spec: PreprocessSpec) -> tuple[str, ...]:
        if not self.replaced:
            return ()
        return (f"image: {self.replaced} voxels were NaN or infinite and became {spec.air_hu} HU",)


def _image_slabs(stream: VolumeStream, spec: PreprocessSpec, tally: _ImageTally) -> Iterator[Slab]:
    header = stream.header
    stored = _averages_as_stored(header)
    slope, intercept = (header.slope, header.intercept) if stored else (1.0, 0.0)

    def split(block_kji: NDArray[Any]) -> Channels:
        values = block_kji if stored else _finite_hu(block_kji, header, spec, tally)
        low, high = float(values.min()), float(values.max())
        ends = (low * slope + intercept, high * slope + intercept)
        tally.minimum, tally.maximum = min(tally.minimum, *ends), max(tally.maximum, *ends)
        return Channels(values=(values,), largest=int(max(-low, high)))

    for slab in average_in_plane(stream, spec.shape_zyx[1:], split=split):
        if (slope, intercept) == (1.0, 0.0):
            yield slab
        else:
            scaled = slab.values_czyx * np.float32(slope) + np.float32(intercept)
            yield Slab(start_zyx=slab.start_zyx, values_czyx=scaled)


def _averages_as_stored(header: VolumeHeader) -> bool:
    """Averages are linear: 16-bit integers are averaged as they are stored, and the few means are scaled.

    A header that lies about the scale could take these out of float32: then voxels are clipped one by one.
    """
    is_small_integer = header.dtype.kind in "iu" and header.dtype.itemsize <= 2
    return is_small_integer and abs(header.slope) < 1e4 and abs(header.intercept) < 1e6


def _finite_hu(
    block_kji: NDArray[Any], header: VolumeHeader, spec: PreprocessSpec, tally: _ImageTally
) -> NDArray[np.float32]:
    with np.errstate(over="ignore", invalid="ignore"):  # to infinity, and NaN of the signalling kind
        hu = block_kji.astype(np.float64) * header.slope + header.intercept
    finite = np.isfinite(hu)
    tally.replaced += hu.size - int(np.count_nonzero(finite))
    # Clipped before they are averaged: one absurd voxel must not decide the mean of its neighbourhood.
    return np.where(finite, np.clip(hu, *HU_RANGE), spec.air_hu).astype(np.float32)


def _hu_statistics(tally: _ImageTally, scan_zyx: NDArray[np.int16]) -> HuStatistics:
    return HuStatistics(
        minimum=tally.minimum,
        maximum=tally.maximum,
        mean=round(float(scan_zyx.mean()), 3),
        standard_deviation=round(float(scan_zyx.std()), 3),
    )


def _view(image_czyx: NDArray[np.float32], foreground_czyx: NDArray[np.float32] | None, grid: Grid) -> View:
    image = np.clip(np.rint(image_czyx[0]), *HU_RANGE).astype(np.int16)
    return View(
        image_zyx=image,
        fractions_czyx=None if foreground_czyx is None else _fractions(foreground_czyx),
        grid=grid,
    )


# ---- label


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _ThinLabel:
    """A label averaged in the plane: shares of liver-or-tumour and of tumour, only where there are any."""

    slabs: tuple[Slab, ...]
    voxel_counts: tuple[int, int, int]
    source: SourceFile
    notes: tuple[str, ...]


def _read_label(
    label: Path, image: VolumeHeader, spec: PreprocessSpec, *, root: Path, open_stream: OpenStream
) -> _ThinLabel:
    with open_stream(label) as stream:
        check_same_grid(stream.header, image)
        counts = [0, 0]

        def split(block_kji: NDArray[Any]) -> Channels | None:
            masks = foreground_and_tumour(block_kji, stream.header)
            if masks is None:
                return None
            for i, mask in enumerate(masks):
                counts[i] += int(np.count_nonzero(mask))
            return Channels(values=masks, largest=1)

        slabs = tuple(map(_cropped, average_in_plane(stream, spec.shape_zyx[1:], split=split)))
        foreground, tumour = counts
        background = int(np.prod(stream.header.shape_kji)) - foreground
        return _ThinLabel(
            slabs=slabs,
            voxel_counts=(background, foreground - tumour, tumour),
            source=_source(stream, root),
            notes=() if foreground else ("label: has no liver and no tumour",),
        )


def check_same_grid(label: VolumeHeader, image: VolumeHeader) -> None:
    """Raise LabelError unless the label has its image's shape and lies within ``GRID_TOLERANCE_VOXELS`` of it."""
    if label.grid.shape_zyx != image.grid.shape_zyx:
        raise LabelError(
            f"{label.path}: has the shape {label.shape_kji[::-1]} ({label.file_axes}), its image "
            f"{image.path.name} {image.shape_kji[::-1]} ({image.file_axes}): they are not of one scan"
        )
    distance_mm = corner_distance_mm(label.grid, image.grid)
    if distance_mm > GRID_TOLERANCE_VOXELS * min(image.grid.spacing_zyx_mm):
        raise LabelError(
            f"{label.path}: its affine puts it {distance_mm:.2f} mm away from its image {image.path.name}: "
            "copy the image's affine if the voxels do correspond"
        )


def foreground_and_tumour(
    block_kji: NDArray[Any], header: VolumeHeader
) -> tuple[NDArray[np.int8], NDArray[np.int8]] | None:
    """Masks of label ≥ 1 and of label 2 of a block of stored values, or None where both are empty.

    Raises:
        LabelError: The block holds other values than 0, 1 and 2.
    """
    scaled = (header.slope, header.intercept) != (1.0, 0.0)
    if block_kji.dtype == np.uint8 and not scaled:  # the usual label: three passes over its bytes, not six
        largest = int(block_kji.max())
        if largest == 0:
            return None
        if largest <= 2:
            return (block_kji != 0).view(np.int8), (block_kji == 2).view(np.int8)
    values = block_kji
    if scaled:
        # A slope such as 1/255 is not exact: 255 of them are 1 but for the last digits.
        with np.errstate(over="ignore", invalid="ignore"):
            values = np.round(block_kji * header.slope + header.intercept, 3)
    foreground, tumour = values != 0, values == 2
    if not np.array_equal(foreground, tumour | (values == 1)):
        found = ", ".join(f"{v:g}" for v in np.unique(values)[:8])
        raise LabelError(f"{header.path}: holds the values {found}; a label has 0, 1 (liver) and 2 (tumour)")
    return (foreground.view(np.int8), tumour.view(np.int8)) if foreground.any() else None


def _cropped(slab: Slab) -> Slab:
    """Only the box that holds something, so that memory follows the liver and not the number of slices."""
    filled = np.asarray(slab.values_czyx.any(axis=0))
    hits = [np.flatnonzero(filled.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
    box = [slice(int(hit[0]), int(hit[-1]) + 1) for hit in hits]
    z, y, x = (start + side.start for start, side in zip(slab.start_zyx, box, strict=True))
    return Slab(start_zyx=(z, y, x), values_czyx=slab.values_czyx[(slice(None), *box)].copy())


def _windows(label: _ThinLabel, *, depth: int, spec: PreprocessSpec) -> dict[str, DepthWindow]:
    windows = {"scan": DepthWindow(start=0, stop=depth)}
    if label.slabs:
        first = min(slab.start_zyx[0] for slab in label.slabs)
        last = max(slab.start_zyx[0] + slab.values_czyx.shape[1] for slab in label.slabs) - 1
        windows["liver"] = window_with_margin(first, last, depth=depth, margin_fraction=spec.margin_fraction)
    return windows


def _fractions(foreground_czyx: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Shares of liver-or-tumour and tumour to shares of liver and tumour, 255 = all.

    The sum is rounded, then the tumour, and liver is what is left: so they never add up to more than 255.
    """
    scaled = foreground_czyx * np.float32(FRACTION_ONE)
    np.rint(scaled, out=scaled)
    whole, tumour = np.clip(scaled, 0, FRACTION_ONE, out=scaled).astype(np.uint8)
    # Equal shares may differ in the last digit, and 127 - 128 is 255.
    tumour = np.minimum(tumour, whole)
    return np.stack([whole - tumour, tumour])


def _source(stream: VolumeStream, root: Path) -> SourceFile:
    return SourceFile(
        path=os.path.relpath(stream.header.path, root),
        size_bytes=stream.status.st_size,
        mtime_ns=stream.status.st_mtime_ns,
        sha256=stream.sha256,
    )
