"""The voxels of a CT series, in HU, slice by slice into one NIfTI file."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_cache.errors import VolumeError
from pipeline.dicom.header import Slice, parse
from pipeline.dicom.series import read_series, series_affine
from pipeline.dicom.source import DicomSource
from pipeline.nifti import write_slices

HU_RANGE = (-32767, 32767)
AIR_HU = -1024.0
BRIGHTEST_HU = 3071.0  # of 12 bits: padding above it is not part of the patient


def convert_series(
    source: Path, target: Path, *, uid: str | None = None, force: bool = False
) -> tuple[str, ...]:
    """Write one CT series of a folder or zip as an uncompressed NIfTI file, slice by slice.

    Args:
        source: Folder (with its subfolders) or zip.
        target: ``.nii`` file to write.
        uid: SeriesInstanceUID of the series to take; needed where there are several.
        force: Take what is not CT, and values without a rescale slope, as if they were HU.

    Returns:
        What was passed over, and what is doubtful.

    Raises:
        VolumeError: As ``read_series`` does, or pixels cannot be decoded. The message names the files.
    """
    with DicomSource.open(source) as opened:
        series = read_series(opened, uid=uid, force=force)
        shape_kji = (len(series.slices), *series.slices[0].shape_ji)
        write_slices(target, _hu_slices(opened, series.slices), shape_kji, series_affine(series.slices))
    return series.notes


def _hu_slices(source: DicomSource, slices: Sequence[Slice]) -> Iterator[NDArray[np.int16]]:
    for s in slices:
        content = source.read(s.file)
        try:
            hu_ji = _hu(content, s)
        except (
            Exception
        ) as failure:  # whatever the decoder of its compression runs into, or that there is none
            reason = (str(failure).splitlines() or [type(failure).__name__])[0]
            raise VolumeError(
                f"{source.path}: {s.file.name}: its pixels cannot be decoded ({reason.rstrip('.')}): export the "
                "series again, uncompressed if possible"
            ) from failure
        yield np.clip(np.rint(hu_ji), *HU_RANGE).astype(np.int16)[None]


def _hu(content: bytes, s: Slice) -> NDArray[np.floating[Any]]:
    """HU of one slice; a padding that comes out bright, such as -2000 in pixels that were made unsigned, is air."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = parse(io.BytesIO(content), pixels=True)
        _check_length(dataset, s)
        stored_ji: NDArray[Any] = dataset.pixel_array
    if stored_ji.shape != s.shape_ji or stored_ji.dtype.kind not in "iuf":
        raise ValueError(f"expected {s.shape_ji} gray values, found {stored_ji.shape} of {stored_ji.dtype}")
    if stored_ji.dtype.kind == "f" and not np.isfinite(stored_ji).all():
        raise ValueError("expected finite values")
    hu_ji: NDArray[np.floating[Any]] = stored_ji * s.slope + s.intercept
    padding = _padding(dataset, stored_ji.dtype)
    if padding is not None:
        hu_ji[(stored_ji == padding) & (hu_ji > BRIGHTEST_HU)] = AIR_HU
    return hu_ji


def _padding(dataset: Any, dtype: np.dtype[Any]) -> int | None:
    """PixelPaddingValue as the pixels hold it, whichever sign the attribute was written with; None without a number."""
    value = dataset.get("PixelPaddingValue")
    if dtype.kind == "f" or not isinstance(value, int):
        return None
    unsigned = np.array(value % 2 ** (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}")
    return int(unsigned.view(f"{dtype.kind}{dtype.itemsize}"))


def _check_length(dataset: Any, s: Slice) -> None:
    """Sizes in a header are claims: compare uncompressed pixels with them before anything is allocated."""
    if "PixelData" in dataset and not dataset.file_meta.get("TransferSyntaxUID", _implicit()).is_compressed:
        needed = s.shape_ji[0] * s.shape_ji[1] * (int(dataset.BitsAllocated) // 8)
        if len(dataset.PixelData) < needed:
            raise ValueError(f"expected {needed} bytes, found {len(dataset.PixelData)}")


def _implicit() -> Any:
    from pydicom.uid import ImplicitVRLittleEndian

    return ImplicitVRLittleEndian
