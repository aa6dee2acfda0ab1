"""One scan (and its label) to cached tensors: the one path from a file, for training and inference alike."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from data_cache.errors import LabelError
from data_cache.geometry import Box, Grid, corner_distance_mm, resampled_grid
from data_cache.schema import (
    FRACTION_ONE,
    Case,
    CaseMeta,
    HuStatistics,
    PreprocessSpec,
    SourceFile,
    View,
)
from pipeline.average import BoxAverage, Slices, canonical_box
from pipeline.held import HeldBlock
from pipeline.labels import EXCHANGE, exchanged, foreground_and_tumour, look_swapped
from pipeline.nifti import VolumeHeader, VolumeStream, to_canonical
from pipeline.nifti.stream import as_int16, retry_with_stdlib_gzip
from pipeline.sanity import (
    HU_RANGE,
    LEAST_LIVER_VOXELS,
    Doubt,
    VoxelSample,
    liver_doubts,
    require_plausible,
    scan_doubts,
)

OpenStream = Callable[[Path], VolumeStream]

GRID_TOLERANCE_VOXELS = 0.1  # how far corresponding corners of an image and its label may be apart


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldScan:
    """A scan that was read once and is held in memory: the view of any box can be cut from it.

    Attributes:
        header: Header of the file, for writing a segmentation on the same grid.
        sha256: Checksum of the file's bytes.
        blocks: All voxels as stored if those are small integers, else in HU.
        scan_view: The view of all voxels.
        tally: Range of the native voxels.
        notes: What was assumed or replaced while reading.
        doubts: What speaks against its being a CT in HU on a believable grid.
    """

    header: VolumeHeader
    sha256: str
    blocks: tuple[HeldBlock, ...]
    scan_view: View
    tally: ImageTally
    notes: tuple[str, ...]
    doubts: tuple[Doubt, ...]

    @property
    def scan_box(self) -> Box:
        """All voxels."""
        return Box.whole(self.header.grid.shape_zyx)

    def view(self, box: Box) -> View:
        """The voxels of ``box``, resampled as the cache has them."""
        if box == self.scan_box:
            return self.scan_view
        shape_zyx = self.scan_view.grid.shape_zyx
        average = BoxAverage(self.header, box, shape_zyx)
        for block in self.blocks:
            if average.reaches(block.start_kji, block.shape_kji):
                average.add(block.start_kji, block.values_kji(), largest=self.tally.largest)
        return _view(self.tally.to_hu(average), None, resampled_grid(self.header.grid, box, shape_zyx))

    def volume_zyx(self) -> NDArray[np.int16]:
        """All voxels in HU, canonical: what ``read_canonical`` reads, without reading the file again."""
        volume_kji = np.empty(self.header.shape_kji, dtype=np.int16)
        for block in self.blocks:
            values = block.values_kji()
            part = tuple(slice(s, s + n) for s, n in zip(block.start_kji, block.shape_kji, strict=True))
            volume_kji[part] = as_int16(values, self.header) if self.tally.as_stored else values
        return to_canonical(volume_kji, self.header.axes_kji)


def read_scan(image: Path, spec: PreprocessSpec) -> HeldScan:
    """Read an image once, for inference.

    Raises:
        VolumeError: The file is missing, damaged or not a NIfTI volume.
    """
    return retry_with_stdlib_gzip(lambda use_stdlib: _read_scan(image, spec, use_stdlib=use_stdlib))


def prepare_case(
    case_id: str,
    image: Path,
    label: Path,
    spec: PreprocessSpec,
    *,
    root: Path,
    prefetch: bool = False,
    force: bool = False,
) -> Case:
    """Read a scan and its label once each, into the views of a case.

    The label comes first: it decides the box of the close view before the image streams by.

    Args:
        case_id: Name of the case.
        image: NIfTI file in HU.
        label: NIfTI file on the same grid: 0 background, 1 liver, 2 tumour.
        spec: Shape, crop and margins of the views.
        root: Folder that the paths in the metadata are relative to.
        prefetch: Inflate in a thread of its own, for where a core would be idle.
        force: Take an image that is not a CT in HU on a believable grid; what speaks against it is then a note.

    Returns:
        A case with the view "scan", and "liver" where the label has any liver or tumour.

    Raises:
        VolumeError: A file is missing, damaged or not a NIfTI volume.
        ImplausibleScanError: The image is not a CT in HU, or its grid cannot be a body's.
        LabelError: The label has other values, or lies on another grid than the image.
    """
    try:
        return retry_with_stdlib_gzip(
            lambda use_stdlib: _prepare_case(
                case_id,
                image,
                label,
                spec,
                root=root,
                open_stream=partial(VolumeStream.open, use_stdlib=use_stdlib, prefetch=prefetch),
                force=force,
            )
        )
    except LabelError:
        if look_swapped(image, label):
            raise LabelError(f"{exchanged(image, label)}: {EXCHANGE}") from None
        raise


def _read_scan(image: Path, spec: PreprocessSpec, *, use_stdlib: bool) -> HeldScan:
    # One file: other cores are idle.
    with VolumeStream.open(image, use_stdlib=use_stdlib, prefetch=True) as stream:
        box = Box.whole(stream.header.grid.shape_zyx)
        held: list[HeldBlock] = []
        (view,), tally, doubts = _image_views(stream, [box], spec, hold=held.append)
        return HeldScan(
            header=stream.header,
            sha256=stream.sha256,
            blocks=tuple(held),
            scan_view=view,
            tally=tally,
            notes=(*stream.header.notes, *tally.notes(spec)),
            doubts=doubts,
        )


def _prepare_case(
    case_id: str,
    image: Path,
    label: Path,
    spec: PreprocessSpec,
    *,
    root: Path,
    open_stream: OpenStream,
    force: bool,
) -> Case:
    with open_stream(image) as stream:
        header, grid = stream.header, stream.header.grid
        read = _read_label(label, header, spec, root=root, open_stream=open_stream)
        boxes = {"scan": Box.whole(grid.shape_zyx)}
        if read.labelled is not None:
            boxes["liver"] = spec.close_box(read.labelled, grid)
        images, tally, doubts = _image_views(stream, list(boxes.values()), spec)
        fractions = [
            read.scan_fractions_czyx,
            *(read.fractions(box, spec) for box in list(boxes.values())[1:]),
        ]
        views = {
            name: replace(view, fractions_czyx=part)
            for name, view, part in zip(boxes, images, fractions, strict=True)
        }
        if read.voxel_counts[1] >= LEAST_LIVER_VOXELS:
            doubts += tuple(liver_doubts(_liver_hu(views["liver"])))
        require_plausible(image, doubts, force=force)
        source = _source(stream, root)
    meta = CaseMeta(
        case_id=case_id,
        spec_fingerprint=spec.fingerprint(),
        image=source,
        label=read.source,
        grid=grid,
        file_axes=header.file_axes,
        boxes=boxes,
        voxel_counts=read.voxel_counts,
        hu=_hu_statistics(tally, views["scan"].image_zyx),
        notes=(*header.notes, *read.notes, *tally.notes(spec), *map(str, doubts)),
    )
    return Case(meta=meta, views=views)


# ---- image


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTally:
    """What is learned of an image's native voxels while they pass.

    Attributes:
        as_stored: Whether they are averaged as they are stored, and the means scaled to HU.
        slope, intercept: HU = value * slope + intercept, of the values that are averaged.
        minimum, maximum: Range of those values.
        replaced: Voxels that were NaN or infinite.
    """

    as_stored: bool
    slope: float
    intercept: float
    minimum: float = np.inf
    maximum: float = -np.inf
    replaced: int = 0

    @classmethod
    def of(cls, header: VolumeHeader) -> Self:
        """The tally before the first voxel.

        Averages are linear: 16-bit integers are averaged as they are stored, and the few means are scaled. A header
        that lies about the scale could take these out of float32: then voxels are clipped one by one.
        """
        is_small_integer = header.dtype.kind in "iu" and header.dtype.itemsize <= 2
        if is_small_integer and abs(header.slope) < 1e4 and abs(header.intercept) < 1e6:
            return cls(as_stored=True, slope=header.slope, intercept=header.intercept)
        return cls(as_stored=False, slope=1.0, intercept=0.0)

    def including(self, values: NDArray[Any], *, replaced: int = 0) -> ImageTally:
        """The tally with one more block."""
        return replace(
            self,
            minimum=min(self.minimum, float(values.min())),
            maximum=max(self.maximum, float(values.max())),
            replaced=self.replaced + replaced,
        )

    @property
    def largest(self) -> int:
        """Greatest magnitude of the values that were averaged."""
        return int(max(-self.minimum, self.maximum))

    @property
    def range_hu(self) -> tuple[float, float]:
        """Least and greatest HU; the slope may be negative."""
        low, high = sorted(v * self.slope + self.intercept for v in (self.minimum, self.maximum))
        return low, high

    def to_hu(self, average: BoxAverage) -> NDArray[np.float32]:
        """A view's means in HU."""
        means = average.values_zyx()
        if (self.slope, self.intercept) == (1.0, 0.0):
            return means
        return means * np.float32(self.slope) + np.float32(self.intercept)

    def notes(self, spec: PreprocessSpec) -> tuple[str, ...]:
        """What was replaced."""
        if not self.replaced:
            return ()
        return (f"image: {self.replaced} voxels were NaN or infinite and became {spec.air_hu} HU",)


def _image_views(
    stream: VolumeStream,
    boxes: list[Box],
    spec: PreprocessSpec,
    *,
    hold: Callable[[HeldBlock], None] | None = None,
) -> tuple[list[View], ImageTally, tuple[Doubt, ...]]:
    """The view of each box, and what speaks against the scan, in one pass; ``hold`` is given each block as well."""
    header, tally = stream.header, ImageTally.of(stream.header)
    sample = VoxelSample(header.shape_kji)
    averages = [BoxAverage(header, box, spec.shape_zyx) for box in boxes]
    for first, block_kji in stream.blocks():
        values, n_replaced = (block_kji, 0) if tally.as_stored else _finite_hu(block_kji, header, spec)
        block = ImageTally.including(ImageTally.of(header), values)
        tally = tally.including(values, replaced=n_replaced)
        sample.add(values)
        for average in averages:
            average.add((first, 0, 0), values, largest=block.largest)
        if hold is not None:
            small = values if tally.as_stored else np.rint(values).astype(np.int16)
            hold(HeldBlock.of((first, 0, 0), small))
    ends = (tally.minimum, tally.maximum)
    intensities = sample.intensities(ends, slope=tally.slope, intercept=tally.intercept)
    views = [
        _view(tally.to_hu(average), None, resampled_grid(header.grid, box, spec.shape_zyx))
        for average, box in zip(averages, boxes, strict=True)
    ]
    return views, tally, tuple(scan_doubts(header, intensities))


def _finite_hu(
    block_kji: NDArray[Any], header: VolumeHeader, spec: PreprocessSpec
) -> tuple[NDArray[np.float32], int]:
    """HU of a block, and how many voxels had none."""
    with np.errstate(over="ignore", invalid="ignore"):  # to infinity, and NaN of the signalling kind
        hu = block_kji.astype(np.float64) * header.slope + header.intercept
    finite = np.isfinite(hu)
    # Clipped before they are averaged: one absurd voxel must not decide the mean of its neighbourhood.
    values = np.where(finite, np.clip(hu, *HU_RANGE), spec.air_hu).astype(np.float32)
    return values, hu.size - int(np.count_nonzero(finite))


def _hu_statistics(tally: ImageTally, scan_zyx: NDArray[np.int16]) -> HuStatistics:
    minimum, maximum = tally.range_hu
    return HuStatistics(
        minimum=minimum,
        maximum=maximum,
        mean=round(float(scan_zyx.mean()), 3),
        standard_deviation=round(float(scan_zyx.std()), 3),
    )


def _liver_hu(view: View) -> NDArray[np.int16]:
    """The voxels of a view that are liver throughout."""
    if view.fractions_czyx is None:
        return view.image_zyx[:0].reshape(-1)
    liver_hu: NDArray[np.int16] = view.image_zyx[view.fractions_czyx[0] == FRACTION_ONE]
    return liver_hu


def _view(image_zyx: NDArray[np.float32], fractions_czyx: NDArray[np.uint8] | None, grid: Grid) -> View:
    image = np.clip(np.rint(image_zyx), *HU_RANGE).astype(np.int16)
    return View(image_zyx=image, fractions_czyx=fractions_czyx, grid=grid)


# ---- label


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _ReadLabel:
    """A label that was read once.

    Attributes:
        header: Header of its file.
        blocks: Its voxels (0, 1, 2), only where there are any.
        labelled: The box of these; None without any.
        scan_fractions_czyx: Class fractions of the whole scan's view.
    """

    header: VolumeHeader
    blocks: tuple[HeldBlock, ...]
    labelled: Box | None
    scan_fractions_czyx: NDArray[np.uint8]
    voxel_counts: tuple[int, int, int]
    source: SourceFile
    notes: tuple[str, ...]

    def fractions(self, box: Box, spec: PreprocessSpec) -> NDArray[np.uint8]:
        """Class fractions of the view of ``box``."""
        average = _LabelAverage(self.header, box, spec)
        for block in self.blocks:
            labels = block.values_kji()
            average.add(block.start_kji, (labels != 0).view(np.int8), (labels == 2).view(np.int8))
        return average.fractions_czyx()


class _LabelAverage:
    """Shares of liver-or-tumour and of tumour in the voxels of one view."""

    def __init__(self, header: VolumeHeader, box: Box, spec: PreprocessSpec) -> None:
        self._foreground, self._tumour = (BoxAverage(header, box, spec.shape_zyx) for _ in range(2))

    def add(
        self, start_kji: tuple[int, int, int], foreground: NDArray[np.int8], tumour: NDArray[np.int8]
    ) -> None:
        self._foreground.add(start_kji, foreground, largest=1)
        if tumour.any():
            self._tumour.add(start_kji, tumour, largest=1)

    def fractions_czyx(self) -> NDArray[np.uint8]:
        return _fractions(self._foreground.values_zyx(), self._tumour.values_zyx())


def _read_label(
    label: Path, image: VolumeHeader, spec: PreprocessSpec, *, root: Path, open_stream: OpenStream
) -> _ReadLabel:
    with open_stream(label) as stream:
        header = stream.header
        check_same_grid(header, image)
        foreground = tumour = 0
        held: list[HeldBlock] = []
        scan = _LabelAverage(header, Box.whole(header.grid.shape_zyx), spec)
        for first, block_kji in stream.blocks():
            masks = foreground_and_tumour(block_kji, header)
            if masks is None:
                continue
            scan.add((first, 0, 0), *masks)
            held.append(_held_label(first, *masks))
            foreground, tumour = (
                n + int(np.count_nonzero(m)) for n, m in zip((foreground, tumour), masks, strict=True)
            )
        background = int(np.prod(header.shape_kji)) - foreground
        return _ReadLabel(
            header=header,
            blocks=tuple(held),
            labelled=_labelled_box(held, header),
            scan_fractions_czyx=scan.fractions_czyx(),
            voxel_counts=(background, foreground - tumour, tumour),
            source=_source(stream, root),
            notes=() if foreground else ("label: has no liver and no tumour",),
        )


def _held_label(first: int, foreground_kji: NDArray[np.int8], tumour_kji: NDArray[np.int8]) -> HeldBlock:
    """The labels of a block, cut to the voxels that have one."""
    plane = np.bitwise_or.reduce(foreground_kji, axis=0)
    k, j, i = (
        slice(int(filled[0]), int(filled[-1]) + 1)
        for filled in map(
            np.flatnonzero, (foreground_kji.any(axis=(1, 2)), plane.any(axis=1), plane.any(axis=0))
        )
    )
    labels = (foreground_kji[k, j, i] + tumour_kji[k, j, i]).view(np.uint8)
    return HeldBlock.of((first + k.start, j.start, i.start), labels)


def _labelled_box(blocks: list[HeldBlock], header: VolumeHeader) -> Box | None:
    if not blocks:
        return None
    starts = np.array([block.start_kji for block in blocks])
    stops = starts + [block.shape_kji for block in blocks]
    k, j, i = (slice(int(a), int(b)) for a, b in zip(starts.min(axis=0), stops.max(axis=0), strict=True))
    slices: Slices = (k, j, i)
    return canonical_box(slices, header)


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


def _fractions(foreground_zyx: NDArray[np.float32], tumour_zyx: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Shares of liver-or-tumour and tumour to shares of liver and tumour, 255 = all.

    The sum is rounded, then the tumour, and liver is what is left: so they never add up to more than 255.
    """
    scaled = np.stack([foreground_zyx, tumour_zyx]) * np.float32(FRACTION_ONE)
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
