"""A case from its raw files, and its segmentation on their grid: what scoring and calibrating share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_cache.errors import CacheError, DataSetError
from data_cache.geometry import Box
from data_cache.reader import CacheStore
from data_cache.schema import PreprocessSpec
from liverseg.evaluation.uncertainty import NativeCase
from liverseg.inference.segment import ScanSegmentation
from pipeline.labels import read_label
from pipeline.nifti import VolumeHeader, to_canonical
from pipeline.prepare import HeldScan, read_scan
from pipeline.restore import native_labels, one_thread


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RawCase:
    """The two raw files of a case, each read once and checked to be what the cache was built from."""

    scan: HeldScan
    truth_zyx: NDArray[np.uint8]
    label_header: VolumeHeader


def require_raw(store: CacheStore, case_ids: Sequence[str], raw: Path) -> None:
    """Check that a folder can be the data set that a cache was built from, by the sizes of its images.

    A single case that differs is left to ``read_raw_case``.

    Raises:
        DataSetError: Not one of the cases has its image there.
    """
    images = [store.meta(case_id).image for case_id in case_ids]
    sizes = [_size_bytes(raw / image.path) for image in images]
    if not images or any(size == image.size_bytes for size, image in zip(sizes, images, strict=True)):
        return
    path, size = raw / images[0].path, sizes[0]
    found = "no such file" if size is None else f"{size} bytes, expected {images[0].size_bytes}"
    raise DataSetError(
        f"{raw}: has no image that {store.path} was built from ({path}: {found}): name the data set of the cache"
    )


def _size_bytes(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def read_raw_case(case_id: str, store: CacheStore, raw: Path, spec: PreprocessSpec) -> RawCase:
    """Read the image and the label of a case.

    Raises:
        CacheError: The case has no label, or a file is not the one that the cache was built from.
        VolumeError: A file cannot be read.
    """
    meta = store.meta(case_id)
    if meta.label is None:
        raise CacheError(f"{store.path}: case {case_id} has no label")
    truth = read_label(raw / meta.label.path)
    meta.label.require_content(raw / meta.label.path, truth.sha256)
    scan = read_scan(raw / meta.image.path, spec)
    meta.image.require_content(raw / meta.image.path, scan.sha256)
    return RawCase(scan=scan, truth_zyx=truth.label_zyx, label_header=truth.header)


def native_label(foreground_czyx: NDArray[np.float32], box: Box, header: VolumeHeader) -> NDArray[np.uint8]:
    """The labels (0, 1, 2) of a view of ``box`` on the whole native grid, canonical."""
    with one_thread():
        labels_kji = np.concatenate(list(native_labels(foreground_czyx, box, header)))
    return to_canonical(labels_kji, header.axes_kji)


def native_case(found: ScanSegmentation, predicted_zyx: NDArray[np.uint8], case: RawCase) -> NativeCase:
    """The samples of a segmentation beside its label and the true one."""
    assert found.samples_nczyx is not None
    return NativeCase(
        samples_nczyx=found.samples_nczyx,
        box=found.box or case.scan.scan_box,
        header=case.label_header,
        predicted_zyx=predicted_zyx,
        truth_zyx=case.truth_zyx,
    )
