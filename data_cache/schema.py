"""The records of the cache format: what a store, a case and a view are."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from data_cache.errors import CacheError, SchemaError
from data_cache.files import sha256_of
from data_cache.geometry import Box, Grid, resampled_grid
from data_cache.records import STRICT, parse, to_json

FORMAT_VERSION = 2
Crop = Literal["box", "depth"]
ViewName = Literal["liver", "scan"]
VIEW_NAMES: tuple[ViewName, ...] = ("liver", "scan")
LABEL_NAMES = ("background", "liver", "tumour")
FRACTION_ONE = 255  # a cached fraction of 255 says that all of the voxel's footprint is of that class
MISSING_HU = -32768  # fill_value of images: no stored voxel has it, so a missing chunk cannot pass for data


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessSpec:
    """Everything that decides the cached voxels besides the source files.

    Attributes:
        shape_zyx: Voxels of every view.
        crop: What the view "liver" shows. ``box``: the label's bounding box. ``depth``: the labelled slices at
            full width, as the original project did.
        margin_mm: Context left on each side of the label with ``box``, rounded up to whole voxels.
        margin_fraction: The same with ``depth``, along z alone, as a share of the scan's depth.
        air_hu: What replaces NaN and infinite voxels.
        resampling: Name of the algorithm; changes whenever the same input would give other voxels.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    shape_zyx: tuple[int, int, int] = (64, 128, 128)
    crop: Crop = "box"
    margin_mm: float = 10.0
    margin_fraction: float = 0.02
    air_hu: int = -1024
    resampling: str = "box-average-2"

    def close_box(self, labelled: Box, grid: Grid) -> Box:
        """What the view "liver" shows of a scan whose liver fills the box ``labelled``: for training and inference alike."""
        depth, height, width = grid.shape_zyx
        if self.crop == "depth":
            margin = math.ceil(depth * self.margin_fraction)
            return labelled.with_margin((margin, height, width), grid.shape_zyx)
        margin_zyx = [math.ceil(self.margin_mm / spacing) for spacing in grid.spacing_zyx_mm]
        return labelled.with_margin(margin_zyx, grid.shape_zyx)

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that are equal exactly when two specs are."""
        text = json.dumps(to_json(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSetInfo:
    """What a data set's ``dataset.json`` says of itself; None where it says nothing.

    Attributes:
        phantom: Whether it says that its scans are synthetic.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    name: str
    licence: str | None
    description: str | None
    phantom: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSchema:
    """The attributes of a store's root group.

    Attributes:
        data_set: What the store was built from; None where that was not recorded.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    format_version: int
    spec: PreprocessSpec
    fingerprint: str
    label_names: tuple[str, ...]
    software: str
    data_set: DataSetInfo | None = None

    @classmethod
    def of(cls, spec: PreprocessSpec, data_set: DataSetInfo | None = None) -> Self:
        """The schema of a store that this version of the software builds with ``spec`` from ``data_set``."""
        return cls(
            format_version=FORMAT_VERSION,
            spec=spec,
            fingerprint=spec.fingerprint(),
            label_names=LABEL_NAMES,
            software=f"liverseg {version('liverseg')}",
            data_set=data_set,
        )

    @classmethod
    def from_json(cls, data: object, *, source: str) -> Self:
        """Parse a root group's attributes; raises SchemaError with every fault."""
        found = data.get("format_version") if isinstance(data, dict) else None
        if (
            isinstance(found, int) and found != FORMAT_VERSION
        ):  # before the keys, which other formats name otherwise
            raise SchemaError(
                f"{source}: expected cache format {FORMAT_VERSION}, found {found}: "
                "build a new cache with liverseg preprocess RAW NEW_CACHE"
            )
        schema = parse(cls, data, source=source, error=SchemaError)
        if schema.fingerprint != schema.spec.fingerprint():
            raise SchemaError(
                f"{source}: the fingerprint {schema.fingerprint} is not the one of the spec beside it"
            )
        return schema


_ANOTHER_FILE = "not the file that the case was built from"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A raw file as it was when its case was built; ``path`` is relative to the data set's folder."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    path: str
    size_bytes: int
    mtime_ns: int
    sha256: str

    def fault(self, path: Path, *, by_content: bool) -> str | None:
        """Why ``path`` is not the file that the case was built from; None where it is.

        Args:
            path: Where the file should be now.
            by_content: Compare size and sha256, which reads the file; otherwise size and modification time.
        """
        try:
            status = path.stat()
            if status.st_size != self.size_bytes:
                found = f"{status.st_size} bytes instead of {self.size_bytes}"
            elif by_content:
                return self.content_fault(sha256_of(path))
            elif status.st_mtime_ns != self.mtime_ns:
                found = "modified since"
            else:
                return None
        except OSError as failure:
            return f"cannot be read: {failure.strerror}"
        return f"{_ANOTHER_FILE} ({found})"

    def content_fault(self, sha256: str) -> str | None:
        """The same for a file that has just been read, by the sha256 that reading it has computed."""
        return None if sha256 == self.sha256 else f"{_ANOTHER_FILE} (another sha256)"

    def require_content(self, path: Path, sha256: str) -> None:
        """Raise CacheError unless ``path``, which has just been read with this sha256, is this file."""
        fault = self.content_fault(sha256)
        if fault is not None:
            raise CacheError(
                f"{path}: {fault}: name the data set that the cache was built from, or run liverseg preprocess "
                "again"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class HuStatistics:
    """Intensities in HU: range over the native voxels, mean and standard deviation over the scan view."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    minimum: float
    maximum: float
    mean: float
    standard_deviation: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseMeta:
    """What is known of a cached case besides its voxels.

    Attributes:
        grid: The native volume with its axes flipped and permuted to the closest canonical (RAS+) ones.
        file_axes: Orientation of the image file's own axes, such as "LPS".
        boxes: The voxels of ``grid`` that each view covers; "liver" is absent without a labelled liver.
        voxel_counts: Native voxels of each label, or None without a label.
        notes: What a reader should know, such as replaced NaN voxels or an affine taken from the qform.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    case_id: str
    spec_fingerprint: str
    image: SourceFile
    label: SourceFile | None
    grid: Grid
    file_axes: str
    boxes: dict[str, Box]
    voxel_counts: tuple[int, int, int] | None
    hu: HuStatistics
    notes: tuple[str, ...]

    @classmethod
    def from_json(cls, data: object, *, source: str) -> Self:
        """Parse a case group's attributes; raises SchemaError with every fault."""
        return parse(cls, data, source=source, error=SchemaError)

    def view_grid(self, view: str, shape_zyx: tuple[int, int, int]) -> Grid:
        """Where the voxels of a view of this case are."""
        return resampled_grid(self.grid, self.boxes[view], shape_zyx)

    def volume_ml(self, label: int) -> float | None:
        """Native volume of a label (0 background, 1 liver, 2 tumour), or None without a label file."""
        return None if self.voxel_counts is None else self.voxel_counts[label] * self.grid.voxel_volume_ml


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class View:
    """One resampled volume of a case.

    Attributes:
        image_zyx: int16 HU.
        fractions_czyx: uint8, two channels: the share of each voxel's footprint that is liver (without
            its tumours) and tumour, 255 for all of it; None without a label.
        grid: Where the voxels are.
    """

    image_zyx: NDArray[np.int16]
    fractions_czyx: NDArray[np.uint8] | None
    grid: Grid


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """A case as it is written: its metadata and its views by name."""

    meta: CaseMeta
    views: Mapping[str, View]


def multiscales(meta: CaseMeta, spec: PreprocessSpec) -> list[dict[str, Any]]:
    """OME-Zarr 0.5 ``multiscales`` of a case group, so that other viewers open it.

    OME-Zarr has scale and translation but no flips or rotations, so that these are along the canonical
    axes in mm; the true affine is ``CaseMeta.view_grid``.
    """
    found = [(view, array) for view in meta.boxes for array in ("image", "fractions")]
    return [
        _multiscale(meta.view_grid(view, spec.shape_zyx), view=view, array=array)
        for view, array in found
        if array == "image" or meta.label is not None
    ]


def _multiscale(grid: Grid, *, view: str, array: str) -> dict[str, Any]:
    scale = list(grid.spacing_zyx_mm)
    translation = [row[3] for row in grid.affine_xyz[2::-1]]
    axes: list[dict[str, str]] = [{"name": a, "type": "space", "unit": "millimeter"} for a in "zyx"]
    if array == "fractions":
        axes.insert(0, {"name": "c", "type": "channel"})
        scale, translation = [1.0, *scale], [0.0, *translation]
    transforms = [
        {"type": "scale", "scale": scale},
        {"type": "translation", "translation": translation},
    ]
    path = f"{view}/{array}"
    datasets = [{"path": path, "coordinateTransformations": transforms}]
    return {"name": path, "axes": axes, "datasets": datasets}
