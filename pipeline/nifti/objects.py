"""nibabel's images, as Python users hold them: taken as input, given as output."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from data_cache.errors import VolumeError
from data_cache.files import scratch_folder
from pipeline.nifti.header import VolumeHeader
from pipeline.nifti.write import label_header

NiftiImage = nib.Nifti1Image  # the type of what is returned, for those that do not know nibabel


@contextmanager
def temporary_nifti(image: object, affine: NDArray[Any] | None = None) -> Iterator[Path]:
    """A nibabel image, or an array (x, y, z) with its affine, as a file that is gone when the block ends.

    Raises:
        VolumeError: It is neither, or the array has no affine, or one that is not such a matrix; also what is raised in
            the block, with the file's name taken out, which nobody knows.
    """
    with scratch_folder(Path(tempfile.gettempdir())) as folder:
        path = folder / "image.nii"
        try:
            nib.save(_as_nifti(image, affine), path)
            yield path
        except HeaderDataError as failure:
            raise VolumeError(f"image: cannot be made a NIfTI file: {failure}") from None
        except VolumeError as failure:
            raise type(failure)(str(failure).replace(str(path), "image")) from failure


def _as_nifti(image: object, affine: NDArray[Any] | None) -> nib.spatialimages.SpatialImage:
    if isinstance(image, nib.spatialimages.SpatialImage):
        if affine is not None:
            raise VolumeError("an image has an affine of its own: give affine with an array only")
        return image
    if not isinstance(image, np.ndarray):
        raise VolumeError(
            f"expected a path, a nibabel image or an array with its affine, got {type(image).__name__}"
        )
    if affine is None:
        raise VolumeError(
            "an array needs affine: a 4×4 matrix from its voxels (x, y, z) to RAS+ mm, as nibabel has it"
        )
    small = {"int64": np.int32, "uint64": np.uint32, "bool": np.uint8, "float16": np.float32}
    values = image.astype(small.get(image.dtype.name, image.dtype), copy=False)
    made = nib.Nifti1Image(values, _checked_affine(affine))
    made.header.set_xyzt_units("mm")  # what the affine is documented to be in
    return made


def _checked_affine(affine: object) -> NDArray[np.float64]:
    try:
        matrix = np.asarray(affine, dtype=np.float64)
    except (TypeError, ValueError):
        matrix = np.empty(0)
    if (
        matrix.shape != (4, 4)
        or not np.isfinite(matrix).all()
        or not np.array_equal(matrix[3], (0, 0, 0, 1))
        or np.linalg.matrix_rank(matrix[:3, :3]) < 3
    ):
        found = matrix.tolist() if matrix.size else affine
        raise VolumeError(f"affine: expected a finite 4×4 matrix that ends in 0, 0, 0, 1, found {found}")
    return matrix


def label_image(label_kji: NDArray[np.uint8], header: VolumeHeader) -> NiftiImage:
    """A label in the order of its scan's file as nibabel's image: the same axes, affine and codes."""
    kind = nib.Nifti2Image if isinstance(header.nifti, nib.Nifti2Header) else nib.Nifti1Image
    return kind.from_bytes(label_header(header) + np.ascontiguousarray(label_kji).tobytes())
