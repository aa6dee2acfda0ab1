"""Writes NIfTI files: predicted labels on their image's grid, and new volumes."""

from __future__ import annotations

import contextlib
import gzip
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from data_cache.files import replacing
from data_cache.geometry import Grid
from pipeline.nifti.header import VolumeHeader

try:
    from isal import igzip
except ImportError:  # no wheel for this platform: the standard library inflates at half the speed
    igzip = None  # type: ignore[assignment]

LARGEST_BYTE = 255
# In the header of each predicted label; it also tells one from any other file.
LABEL_DESCRIPTION = "liverseg: 1 liver, 2 tumour"
GEOMETRY_FIELDS = (
    *("dim", "pixdim", "xyzt_units", "qform_code", "sform_code"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z", "magic"),
)


def write_labels(path: Path, header: VolumeHeader, blocks: Iterable[NDArray[np.uint8]]) -> None:
    """Write a label file on the grid of ``header``: same shape, same affines and codes, uint8, NIfTI-1 or -2.

    Args:
        path: ``.nii`` or ``.nii.gz``; appears once it is complete.
        header: Header of the image that was segmented.
        blocks: Consecutive slices (n, j, i) along the file's slowest axis, all of them.

    Raises:
        ValueError: The blocks do not add up to the volume; ``path`` is left as it was.
    """
    _write_bytes(path, header, blocks, label_header(header))


def label_header(header: VolumeHeader) -> bytes:
    """The bytes before the voxels of a label on the grid of ``header``."""
    return _byte_header(header, LABEL_DESCRIPTION.encode())


def write_map(
    path: Path,
    header: VolumeHeader,
    blocks: Iterable[NDArray[np.float32]],
    *,
    maximum: float,
    description: str,
) -> None:
    """Write values from 0 to ``maximum`` on the grid of ``header``, as bytes with a slope: 255 steps, 0 exactly.

    Args:
        path: ``.nii`` or ``.nii.gz``; appears once it is complete.
        header: Header of the image that the values belong to.
        blocks: Consecutive slices (n, j, i) along the file's slowest axis, all of them; values out of range are clipped.
        maximum: The value that viewers show as white.
        description: Up to 79 ASCII characters, such as the unit.

    Raises:
        ValueError: The blocks do not add up to the volume; ``path`` is left as it was.
    """
    scale = np.float32(LARGEST_BYTE / maximum)
    steps = (np.rint((block * scale).clip(0, LARGEST_BYTE)).astype(np.uint8) for block in blocks)
    about = _byte_header(header, description.encode("ascii"), slope=maximum / LARGEST_BYTE, shown_to=maximum)
    _write_bytes(path, header, steps, about)


def _write_bytes(path: Path, header: VolumeHeader, blocks: Iterable[NDArray[np.uint8]], nifti: bytes) -> None:
    with replacing(path) as file, _deflating(file, compress=path.name.endswith(".gz")) as stream:
        stream.write(nifti)
        written = sum(stream.write(np.ascontiguousarray(block).data.cast("B")) for block in blocks)
        _check_voxels(path, written, header.shape_kji)


def _byte_header(
    header: VolumeHeader, description: bytes, *, slope: float = 1.0, shown_to: float = 0.0
) -> bytes:
    """Header of uint8 voxels on the grid of ``header``; ``shown_to`` 0 leaves the display range to the viewer."""
    nifti = _geometry(header.nifti)
    nifti.set_data_dtype(np.uint8)
    nifti.set_slope_inter(slope, 0.0)
    nifti["vox_offset"] = nifti.single_vox_offset
    nifti["cal_min"], nifti["cal_max"] = 0, shown_to
    nifti["descrip"] = description
    block: bytes = nifti.binaryblock
    # The four bytes in between mean that there are no extensions.
    return block.ljust(nifti.single_vox_offset, b"\0")


def _geometry(nifti: nib.Nifti1Header) -> nib.Nifti1Header:
    """A header with the grid of another and nothing else of it: its free texts often hold a patient's name."""
    kept = type(nifti)(endianness=nifti.endianness)
    for field in GEOMETRY_FIELDS:
        kept[field] = nifti[field]
    return kept


def _deflating(file: BinaryIO, *, compress: bool) -> Any:
    if not compress:
        return contextlib.nullcontext(file)
    # Labels are runs of equal bytes: ISA-L's level 2 makes them as small as zlib's 6, ten times faster. No time
    # stamp, so that equal labels are equal files.
    if igzip is None:
        return gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=6, mtime=0)
    return igzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=2, mtime=0)


def write_slices(
    path: Path,
    blocks: Iterable[NDArray[np.int16]],
    shape_kji: tuple[int, int, int],
    affine: NDArray[np.float64],
) -> None:
    """Write a new, uncompressed int16 ``.nii`` slice by slice, so that the whole volume is never in memory.

    Args:
        path: Appears once it is complete.
        blocks: Consecutive slices (n, j, i), all of them.
        shape_kji: Shape of the volume.
        affine: Maps voxel centres (i, j, k) to RAS+ mm; need not be axis-aligned.

    Raises:
        ValueError: The blocks do not add up to the volume; ``path`` is left as it was.
    """
    nifti = nib.Nifti1Header()
    nifti.set_data_dtype(np.int16)
    nifti.set_data_shape(shape_kji[::-1])
    nifti.set_xyzt_units("mm")
    nifti.set_sform(affine, code=1)
    nifti.set_qform(affine, code=1, strip_shears=True)  # a tilted gantry's shear is in the sform alone
    nifti["magic"], nifti["vox_offset"] = nifti.single_magic, nifti.single_vox_offset
    with replacing(path) as file:
        file.write(nifti.binaryblock.ljust(nifti.single_vox_offset, b"\0"))
        written = sum(file.write(np.ascontiguousarray(b, dtype="<i2").data.cast("B")) for b in blocks)
        _check_voxels(path, written // 2, shape_kji)


def _check_voxels(path: Path, written: int, shape_kji: tuple[int, ...]) -> None:
    # Inside of ``replacing``, so that a wrong file never takes the place of an earlier one.
    if written != math.prod(shape_kji):
        raise ValueError(f"{path}: expected the voxels of a volume of {shape_kji[::-1]}, got {written}")


def write_volume(
    path: Path, volume_zyx: NDArray[Any], grid: Grid, *, file_axes: str = "RAS", description: str = ""
) -> None:
    """Write a new ``.nii.gz`` with sform and qform.

    Args:
        path: Appears once it is complete; equal volumes give equal bytes.
        volume_zyx: The voxels, in the orientation of ``grid``.
        grid: The canonical (RAS+) grid.
        file_axes: Orientation in which the file stores its axes, such as "LPS".
        description: Up to 79 ASCII characters.
    """
    image = nib.Nifti1Image(volume_zyx.transpose(2, 1, 0), grid.affine)
    wanted = nib.orientations.axcodes2ornt(file_axes)
    image = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(grid.affine), wanted))
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description.encode("ascii")
    image.set_sform(image.affine, code=1)
    image.set_qform(image.affine, code=1)
    with replacing(path) as file:
        # zlib's level 6, as published data has it: ISA-L's weaker one would flatter readers in a benchmark.
        file.write(gzip.compress(image.to_bytes(), compresslevel=6, mtime=0))
