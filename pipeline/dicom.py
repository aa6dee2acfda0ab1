"""A CT series in DICOM to one NIfTI file: geometry from where the slices say they are, faults named by file."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_cache.errors import VolumeError
from data_cache.text import pluralise
from pipeline.nifti import write_slices

SAME_MM = 0.01  # closer slices are one and the same position
UNEVEN = 0.1  # of the spacing: more than that off is a missing slice, or none of an even series
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
HU_RANGE = (-32767, 32767)
NOT_INSTALLED = "needs pydicom to read DICOM: pip install 'liverseg[dicom]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class DicomFile:
    """A file of a folder or of a zip; ``member`` is its name in the zip."""

    path: Path
    member: str | None = None

    @property
    def name(self) -> str:
        """As it is called in messages."""
        return self.member or self.path.name

    def open(self) -> io.BytesIO:
        """Its bytes; a slice is half a megabyte."""
        if self.member is None:
            return io.BytesIO(self.path.read_bytes())
        with zipfile.ZipFile(self.path) as archive:
            return io.BytesIO(archive.read(self.member))


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """What one file says of its slice.

    Attributes:
        orientation: Direction of the rows, then of the columns, in LPS+.
        position_mm: Of the first pixel's centre, in LPS+.
        pixel_mm: Distance of rows, then of columns.
        shape_ji: Rows and columns.
    """

    file: DicomFile
    series: str
    description: str
    orientation: tuple[float, ...]
    position_mm: tuple[float, ...]
    pixel_mm: tuple[float, ...]
    shape_ji: tuple[int, int]

    @property
    def height_mm(self) -> float:
        """Along the normal of the slice."""
        row, column = np.reshape(self.orientation, (2, 3))
        return float(np.cross(row, column) @ np.array(self.position_mm))


def convert_series(source: Path, target: Path) -> None:
    """Write the one CT series of a folder or zip as an uncompressed NIfTI file, slice by slice.

    Args:
        source: Folder (with its subfolders) or zip. Files that are no DICOM images, and localizers, are passed over.
        target: ``.nii`` to write.

    Raises:
        VolumeError: There is no series or more than one; slices are missing, double, of different sizes or
            orientations; or pixels are compressed in a way that cannot be read here. The message names the files.
    """
    slices = read_series(source)
    shape_kji = (len(slices), *slices[0].shape_ji)
    write_slices(target, _hu_slices(source, slices), shape_kji, series_affine(slices))


def read_series(source: Path) -> list[Slice]:
    """The slices of the one CT series of a folder or zip, along their normal: the order of the NIfTI file's.

    Raises:
        VolumeError: As ``convert_series``, but for the pixels, which are not read.
    """
    slices = sorted(_read_headers(source), key=lambda s: s.height_mm)
    if not slices:
        raise VolumeError(
            f"{source}: holds no DICOM images with a position: name the folder of one CT series"
        )
    _check_one_series(source, slices)
    _check_geometry(source, slices)
    return slices


def is_dicom_source(path: Path) -> bool:
    """Whether a path can be asked for a series: a folder or a zip file."""
    return path.is_dir() or path.suffix.lower() == ".zip"


def series_affine(slices: Sequence[Slice]) -> NDArray[np.float64]:
    """Voxel centres (i, j, k) to RAS+ mm, from the first and last slice's positions (DICOM PS3.3 C.7.6.2.1.1).

    The third column is the real step between slices: with a tilted gantry it is not normal to them.
    """
    first, last = slices[0], slices[-1]
    row, column = np.reshape(first.orientation, (2, 3))
    affine = np.eye(4)
    affine[:3, 0] = row * first.pixel_mm[1]
    affine[:3, 1] = column * first.pixel_mm[0]
    affine[:3, 2] = (np.array(last.position_mm) - np.array(first.position_mm)) / (len(slices) - 1)
    affine[:3, 3] = first.position_mm
    return LPS_TO_RAS @ affine


# ---- headers


def _pydicom(source: Path) -> Any:
    try:
        import pydicom
    except ImportError:
        raise VolumeError(f"{source}: {NOT_INSTALLED}") from None
    return pydicom


def _files(source: Path) -> Iterator[DicomFile]:
    if source.is_dir():
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            yield DicomFile(path=path)
        return
    try:
        with zipfile.ZipFile(source) as archive:
            names = sorted(info.filename for info in archive.infolist() if not info.is_dir())
    except (OSError, zipfile.BadZipFile) as failure:
        raise VolumeError(f"{source}: cannot be opened as a zip: {failure}") from None
    for name in names:
        yield DicomFile(path=source, member=name)


def _read_headers(source: Path) -> Iterator[Slice]:
    pydicom = _pydicom(source)
    for file in _files(source):
        try:
            header = pydicom.dcmread(file.open(), stop_before_pixels=True)
        except pydicom.errors.InvalidDicomError:
            continue  # DICOMDIR's neighbours, notes, pictures
        if "ImagePositionPatient" in header and "LOCALIZER" not in header.get("ImageType", ()):
            yield _slice(file, header)
        elif "NumberOfFrames" in header:
            raise VolumeError(
                f"{source}: {file.name} holds several frames (enhanced CT): convert it with dcm2niix"
            )


def _slice(file: DicomFile, header: Any) -> Slice:
    try:
        return Slice(
            file=file,
            series=str(header.SeriesInstanceUID),
            description=str(header.get("SeriesDescription", "no description")),
            orientation=tuple(map(float, header.ImageOrientationPatient)),
            position_mm=tuple(map(float, header.ImagePositionPatient)),
            pixel_mm=tuple(map(float, header.PixelSpacing)),
            shape_ji=(int(header.Rows), int(header.Columns)),
        )
    except (AttributeError, TypeError, ValueError) as failure:
        raise VolumeError(f"{file.path}: {file.name} lacks part of its geometry: {failure}") from None


# ---- checks


def _check_one_series(source: Path, slices: Sequence[Slice]) -> None:
    found = {s.series: s.description for s in slices}
    if len(found) > 1:
        counts = [
            f"{name!r} ({pluralise(sum(s.series == uid for s in slices), 'image')})"
            for uid, name in found.items()
        ]
        raise VolumeError(
            f"{source}: holds {len(found)} series: {', '.join(counts)}: name a folder of one of them"
        )
    if len(slices) < 2:
        raise VolumeError(f"{source}: {slices[0].file.name} is the only slice: no volume")


def _check_geometry(source: Path, slices: Sequence[Slice]) -> None:
    first = slices[0]
    for s in slices:
        if s.shape_ji != first.shape_ji or not np.allclose(s.pixel_mm, first.pixel_mm, rtol=1e-3):
            raise VolumeError(f"{source}: {s.file.name} has another size or spacing than {first.file.name}")
        if not np.allclose(s.orientation, first.orientation, atol=1e-3):
            raise VolumeError(f"{source}: {s.file.name} lies in another plane than {first.file.name}")
    steps_mm = np.diff([s.height_mm for s in slices])
    faults = list(_spacing_faults(slices, steps_mm))
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise VolumeError(f"{source}: {'; '.join(faults[:3])}{more}")


def _spacing_faults(slices: Sequence[Slice], steps_mm: NDArray[np.float64]) -> Iterator[str]:
    usual_mm = float(np.median(steps_mm[steps_mm > SAME_MM])) if (steps_mm > SAME_MM).any() else 0.0
    for below, above, step_mm in zip(slices, slices[1:], steps_mm, strict=False):
        names = f"{below.file.name} and {above.file.name}"
        if step_mm <= SAME_MM:
            yield f"{names} are at the same position: delete one of them"
        elif abs(step_mm - usual_mm) > UNEVEN * usual_mm:
            missing = round(float(step_mm) / usual_mm) - 1
            missed = f"{pluralise(missing, 'slice')} {'is' if missing == 1 else 'are'} missing"
            what = missed if missing > 0 else "the slices are not evenly spaced"
            yield f"{what} between {names}: {step_mm:.2f} mm apart, the others {usual_mm:.2f} mm"


# ---- pixels


def _hu_slices(source: Path, slices: Iterable[Slice]) -> Iterator[NDArray[np.int16]]:
    pydicom = _pydicom(source)
    for s in slices:
        dataset = pydicom.dcmread(s.file.open())
        try:
            stored_ji = dataset.pixel_array
        except (
            Exception
        ) as failure:  # whatever the decoder of its compression runs into, or that there is none
            reason = (str(failure).splitlines() or [""])[0]
            raise VolumeError(f"{source}: {s.file.name}: its pixels cannot be decoded: {reason}") from failure
        slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
        hu_ji = np.rint(stored_ji * slope + intercept)
        yield np.clip(hu_ji, *HU_RANGE).astype(np.int16)[None]
