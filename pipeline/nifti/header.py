"""What a NIfTI header says, checked before anything is allocated."""

from __future__ import annotations

import io
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel import orientations
from numpy.typing import NDArray

from data_cache.errors import VolumeError
from data_cache.geometry import Grid

SUPPORTED_DTYPES = (
    "uint8",
    "int8",
    "uint16",
    "int16",
    "uint32",
    "int32",
    "uint64",
    "int64",
    "float32",
    "float64",
)
MAX_SLICE_BYTES = 256 << 20  # bounds what a header can make us allocate
LARGEST = 1e38  # of an affine and of pixdim: what NIfTI-1 can hold, and float64 can square
MAX_AXIS_VOXELS = 32767  # NIfTI-1's own limit; weights for a longer axis of NIfTI-2 could take gigabytes
MAX_DEFLATE_RATIO = 1032  # what deflate can reach at most, so what a header can claim for a .gz of some size
HEAD_BYTES = 256
OTHER_FORMATS = {
    "NRRD": (b"NRRD",),
    "MetaImage": (b"ObjectType", b"NDims", b"Comment"),
}  # what they start with
NO_UNIT = "the header does not state its unit of length: mm was assumed"
UNITS = {1: ("meters", 1000.0), 2: ("mm", 1.0), 3: ("micrometers", 0.001)}  # NIfTI-1's codes, and mm in one
SAME_PLACE_VOXELS = 1.0  # sform and qform are stored in float32, and rounded by many tools
SKEWED = 0.02  # cosine between two axes that are not at right angles
# nibabel's own logger goes to the terminal, beside the error that is raised.
_SILENT = logging.Logger("nibabel", level=logging.CRITICAL + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileAxis:
    """What one axis of a file is in the canonical volume: ``canonical`` 0 = z, 1 = y, 2 = x."""

    canonical: int
    flipped: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VolumeHeader:
    """What a NIfTI header says, checked.

    Attributes:
        shape_kji: Voxels along the file's axes, slowest (third) first.
        axes_kji: What each of these axes is in canonical orientation.
        grid: The canonical (RAS+) volume; flips and permutations of the file's axes, no interpolation.
        dtype: Of the stored values, byte order included.
        slope, intercept: value = stored * slope + intercept.
        data_offset: Bytes before the first voxel.
        notes: What was assumed, such as which of qform and sform was used.
        nifti: nibabel's header, for writing a file on the same grid.
    """

    path: Path
    shape_kji: tuple[int, int, int]
    axes_kji: tuple[FileAxis, FileAxis, FileAxis]
    file_axes: str
    grid: Grid
    dtype: np.dtype[Any]
    slope: float
    intercept: float
    data_offset: int
    notes: tuple[str, ...]
    nifti: nib.Nifti1Header

    @property
    def slice_bytes(self) -> int:
        """Bytes of one slice along the file's slowest axis."""
        return self.shape_kji[1] * self.shape_kji[2] * self.dtype.itemsize

    @property
    def data_bytes(self) -> int:
        """Bytes of all voxels."""
        return self.shape_kji[0] * self.slice_bytes


class CorruptStreamError(VolumeError):
    """Compressed bytes that do not inflate, or fail their checksum."""


def read_header(path: Path, stream: io.BufferedIOBase) -> VolumeHeader:
    nifti, pixdim = _parse_nifti(path, stream)
    shape_ijk = _shape_ijk(path, nifti)
    dtype = _dtype(path, nifti)
    slope, intercept = _scaling(path, nifti)
    affine, notes = _affine(path, nifti, pixdim)
    ornt = orientations.io_orientation(affine)
    axes_ijk = [FileAxis(canonical=2 - int(axis), flipped=flip < 0) for axis, flip in ornt]
    header = VolumeHeader(
        path=path,
        shape_kji=(shape_ijk[2], shape_ijk[1], shape_ijk[0]),
        axes_kji=(axes_ijk[2], axes_ijk[1], axes_ijk[0]),
        file_axes="".join(orientations.ornt2axcodes(ornt)),
        grid=_canonical_grid(shape_ijk, affine, ornt),
        dtype=dtype,
        slope=slope,
        intercept=intercept,
        data_offset=int(nifti["vox_offset"]) or nifti.single_vox_offset,
        notes=tuple(notes),
        nifti=nifti,
    )
    _check_size(header)
    _skip(stream, header.data_offset - nifti.sizeof_hdr)
    return header


def _parse_nifti(path: Path, stream: io.BufferedIOBase) -> tuple[nib.Nifti1Header, NDArray[np.float64]]:
    """The header, and the spacing that it claims: nibabel repairs a zero to 1 mm without a word."""
    start = stream.read(4)
    kinds: dict[int, Any] = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
    size = next((n for n in kinds if start in (n.to_bytes(4, "little"), n.to_bytes(4, "big"))), None)
    if size is None:
        raise VolumeError(f"{path}: {_other_format(path, start + stream.read(HEAD_BYTES))}")
    raw = start + stream.read(size - 4)
    if len(raw) < size:
        raise CorruptStreamError(f"{path}: ends inside its header ({len(raw)} of {size} bytes)")
    try:
        header: nib.Nifti1Header = kinds[size](raw, check=False)
        pixdim = np.array(header["pixdim"][1:4], dtype=np.float64)
        header.check_fix(logger=_SILENT)
    except Exception as failure:  # nibabel raises HeaderDataError, ValueError and what its checks run into
        raise VolumeError(f"{path}: its NIfTI header is broken: {failure}") from failure
    if header["magic"].item() != header.single_magic:
        raise VolumeError(f"{path}: is one half of an .hdr/.img pair: convert the pair to one .nii.gz file")
    if not math.isfinite(header["vox_offset"]):
        raise VolumeError(f"{path}: its NIfTI header is broken: vox_offset {header['vox_offset']}")
    return header, pixdim


def _other_format(path: Path, head: bytes) -> str:
    """What a file is that is not NIfTI, and how to make one of it."""
    if head[128:132] == b"DICM":
        return "is a DICOM file: name the folder of its series instead"
    target = f"{path.name.partition('.')[0]}.nii.gz"
    for name, start in OTHER_FORMATS.items():
        if head.startswith(start):
            return (
                f"is a {name} file, not NIfTI: convert it with SimpleITK in Python: "
                f"sitk.WriteImage(sitk.ReadImage({path.name!r}), {target!r})"
            )
    return f"is not a NIfTI file (it starts with {head[:4]!r}): expected .nii or .nii.gz, such as dcm2niix writes"


def _shape_ijk(path: Path, nifti: nib.Nifti1Header) -> tuple[int, int, int]:
    n_axes = int(nifti["dim"][0])
    dims = [int(n) for n in nifti["dim"][1 : n_axes + 1]]
    if not 1 <= n_axes <= 7 or any(n < 1 for n in dims):
        raise VolumeError(f"{path}: its header claims the dimensions {nifti['dim'].tolist()}")
    if n_axes < 3 or any(n != 1 for n in dims[3:]):
        raise VolumeError(f"{path}: has the shape {tuple(dims)}, not that of one 3-D volume")
    return dims[0], dims[1], dims[2]


def _dtype(path: Path, nifti: nib.Nifti1Header) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = nifti.get_data_dtype()
    except Exception as failure:  # an unknown code is a KeyError in some nibabel versions
        raise VolumeError(f"{path}: its header names an unknown data type: {failure}") from failure
    if dtype.newbyteorder("=").name not in SUPPORTED_DTYPES:
        raise VolumeError(f"{path}: holds {dtype} voxels; supported are {', '.join(SUPPORTED_DTYPES)}")
    return dtype


def _scaling(path: Path, nifti: nib.Nifti1Header) -> tuple[float, float]:
    slope, intercept = float(nifti["scl_slope"]), float(nifti["scl_inter"])
    # NIfTI-1: a slope of 0 means that there is no scaling; many tools write NaN.
    if slope == 0 or math.isnan(slope):
        return 1.0, 0.0
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise VolumeError(
            f"{path}: its header has the slope {slope:g} and the intercept {intercept:g}: expected finite numbers, or a "
            "slope of 0 for no scaling"
        )
    return slope, intercept


def _affine(
    path: Path, nifti: nib.Nifti1Header, pixdim: NDArray[np.float64]
) -> tuple[NDArray[np.float64], list[str]]:
    """The voxel-to-RAS+ matrix in mm: sform before qform before pixdim alone, as nibabel and ITK-SNAP choose."""
    mm_per_unit, notes = _unit(nifti)
    to_mm = np.diag([mm_per_unit] * 3 + [1.0])
    with np.errstate(over="ignore"):  # NIfTI-2 has float64
        pixdim_mm = pixdim * mm_per_unit
    has_spacing = bool(((pixdim > 0) & (pixdim < LARGEST)).all())
    stated, faults = _stated_affines(nifti, has_spacing=has_spacing)
    notes += faults
    if stated:
        name, affine = next(iter(stated.items()))
        notes += _spacing_notes(pixdim_mm, to_mm @ affine, name)
        if len(stated) == 2:
            notes += _disagreement(nifti, *(to_mm @ each for each in stated.values()))
        return to_mm @ affine, notes
    if not has_spacing:
        faults.append(f"pixdim {_mm(pixdim_mm)} mm is not a spacing")
        raise VolumeError(f"{path}: has no usable affine ({'; '.join(faults)})")
    affine = to_mm @ np.asarray(nifti.get_base_affine(), dtype=np.float64)
    return affine, [*notes, "neither sform nor qform: orientation assumed LAS, spacing from pixdim"]


def _unit(nifti: nib.Nifti1Header) -> tuple[float, list[str]]:
    """Millimeters per unit of length of the header, and what to say of it."""
    code = int(nifti["xyzt_units"]) & 7
    if code not in UNITS:
        return 1.0, [NO_UNIT]
    name, mm_per_unit = UNITS[code]
    return mm_per_unit, [] if name == "mm" else [f"lengths are in {name} in the header: converted to mm"]


def _stated_affines(
    nifti: nib.Nifti1Header, *, has_spacing: bool
) -> tuple[dict[str, NDArray[np.float64]], list[str]]:
    """The usable ones of sform and qform, in that order and in the header's unit, and why another is not.

    A qform takes its spacing from pixdim: without one it is not usable.
    """
    candidates: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("sform", nifti.get_sform),
        ("qform", nifti.get_qform),
    )
    stated, faults = dict[str, NDArray[np.float64]](), []
    for name, get in candidates:
        if int(nifti[f"{name}_code"]) <= 0:
            continue
        if name == "qform" and not has_spacing:
            faults.append("qform has no spacing")
            continue
        try:
            affine = np.asarray(get(), dtype=np.float64)
        except Exception as failure:  # a quaternion that is not one, a negative pixdim
            faults.append(f"{name} is invalid ({failure})")
            continue
        if _is_usable(affine):
            stated[name] = affine
        else:
            faults.append(f"{name} is {_unusable(affine)}")
    return stated, faults


def _is_usable(affine: NDArray[np.float64]) -> bool:
    if not (np.abs(affine) < LARGEST).all():  # neither is NaN
        return False
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    volume = abs(float(np.linalg.det(affine[:3, :3])))
    # Axes nearly in one plane have no closest canonical orientation.
    return bool((spacing > 0).all()) and volume > 1e-3 * float(spacing.prod())


def _unusable(affine: NDArray[np.float64]) -> str:
    if not np.isfinite(affine).all():
        return "not finite"
    return "singular" if (np.abs(affine) < LARGEST).all() else "beyond any length"


def _spacing_notes(pixdim_mm: NDArray[np.float64], affine: NDArray[np.float64], name: str) -> list[str]:
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    if np.allclose(spacing_mm, pixdim_mm, rtol=1e-2):
        return []
    return [
        f"pixdim {_mm(pixdim_mm)} mm disagrees with the {name}'s {_mm(spacing_mm)} mm: the {name} was used"
    ]


def _disagreement(
    nifti: nib.Nifti1Header, sform: NDArray[np.float64], qform: NDArray[np.float64]
) -> list[str]:
    """What two usable affines in mm disagree on: other tools may take the other one."""
    axes = ["".join(orientations.aff2axcodes(affine)) for affine in (sform, qform)]
    if axes[0] != axes[1]:
        return [
            f"sform and qform disagree (axes {axes[0]} and {axes[1]}: mirrored or turned): the sform was used"
        ]
    directions = sform[:3, :3] / np.linalg.norm(sform[:3, :3], axis=0)
    if not np.allclose(directions.T @ directions, np.eye(3), atol=SKEWED):
        return []  # a qform cannot hold the skewed axes of a tilted gantry
    last_ijk = np.maximum(np.asarray(nifti["dim"][1:4], dtype=np.float64), 1) - 1
    corners = np.array([[*(np.array(corner) * last_ijk), 1.0] for corner in np.ndindex(2, 2, 2)])
    apart_mm = float(np.linalg.norm((corners @ (sform - qform).T)[:, :3], axis=1).max())
    if apart_mm <= SAME_PLACE_VOXELS * float(np.linalg.norm(sform[:3, :3], axis=0).max()):
        return []
    return [f"sform and qform disagree (by up to {apart_mm:.3g} mm): the sform was used"]


def _mm(values: NDArray[np.float64]) -> str:
    return "×".join(f"{v:g}" for v in values)


def _canonical_grid(
    shape_ijk: tuple[int, int, int], affine: NDArray[np.float64], ornt: NDArray[np.float64]
) -> Grid:
    shape_xyz = [0, 0, 0]
    for n, (axis, _) in zip(shape_ijk, ornt, strict=True):
        shape_xyz[int(axis)] = n
    to_file = orientations.inv_ornt_aff(ornt, shape_ijk)
    return Grid.from_array(shape_xyz[::-1], affine @ to_file)


def _check_size(header: VolumeHeader) -> None:
    """Sizes in a header are claims: compare them with the file before anything is allocated."""
    claimed = header.data_offset + header.data_bytes
    size = os.path.getsize(header.path)
    with open(header.path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    if claimed > (size * MAX_DEFLATE_RATIO if compressed else size):
        raise CorruptStreamError(
            f"{header.path}: its header claims {claimed} bytes (shape {header.shape_kji[::-1]}, "
            f"{header.dtype}), more than a file of {size} bytes can hold: the file is truncated, or the header is wrong"
        )
    if max(header.shape_kji) > MAX_AXIS_VOXELS:
        raise VolumeError(
            f"{header.path}: has the shape {header.shape_kji[::-1]}; at most {MAX_AXIS_VOXELS} voxels along an "
            "axis are supported"
        )
    if header.slice_bytes > MAX_SLICE_BYTES:
        raise VolumeError(
            f"{header.path}: one slice has {header.slice_bytes} bytes (shape {header.shape_kji[::-1]}); "
            f"at most {MAX_SLICE_BYTES} are supported"
        )
    if header.data_offset < header.nifti.sizeof_hdr:
        raise VolumeError(
            f"{header.path}: its voxels start inside its header (vox_offset {header.data_offset})"
        )


def _skip(stream: io.BufferedIOBase, n_bytes: int) -> None:
    while n_bytes > 0:
        got = len(stream.read(min(n_bytes, 1 << 20)))
        if not got:
            raise EOFError("the stream ends before its first voxel")
        n_bytes -= got


def to_canonical(values: NDArray[Any], axes_kji: tuple[FileAxis, FileAxis, FileAxis]) -> NDArray[Any]:
    """Flip and permute the last three axes from a file's order to z, y, x; contiguous."""
    first = values.ndim - 3
    flipped = np.flip(values, tuple(first + i for i, axis in enumerate(axes_kji) if axis.flipped))
    order = [first + [axis.canonical for axis in axes_kji].index(canonical) for canonical in range(3)]
    return np.ascontiguousarray(flipped.transpose(*range(first), *order))


def from_canonical(values_zyx: NDArray[Any], axes_kji: tuple[FileAxis, FileAxis, FileAxis]) -> NDArray[Any]:
    """The way back of ``to_canonical``, of the same voxels: a view of z, y, x in a file's order."""
    flipped = tuple(i for i, axis in enumerate(axes_kji) if axis.flipped)
    return np.flip(values_zyx.transpose([axis.canonical for axis in axes_kji]), flipped)
