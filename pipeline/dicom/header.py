"""What one DICOM file says of itself: a CT slice, recognizably something else, or a fault."""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from data_cache.errors import VolumeError
from pipeline.dicom.source import BROKEN_LINK, HEAD_BYTES, DicomFile, DicomSource, has_preamble, other_kind
from pipeline.nifti.header import MAX_AXIS_VOXELS, MAX_SLICE_BYTES

NOT_INSTALLED = "needs pydicom to read DICOM: pip install 'liverseg[dicom]'"
CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
STANDARD_UIDS = "1.2.840.10008."
LOCALIZER = "localizer"
# US is what scanners write that do not know the attribute; others name maps of density, iodine or atomic number.
HU_TYPES = ("", "HU", "HU_MOD", "US")
DIRECTION_TOLERANCE = 0.02  # of a unit vector's length and of a right angle's cosine: more is not rounding
ROUNDED = 1e-3  # more than that is said
MAX_POSITION_MM = 1e5
# Slices of one pass over the patient agree in all of these.
PASS_KEYWORDS = (
    "AcquisitionNumber",
    "TemporalPositionIdentifier",
    "NominalPercentageOfCardiacPhase",
    "ConvolutionKernel",
    "KVP",
    "ImageType",
)
# Slices of one series agree in all of these, where they have them.
SUBJECT_KEYWORDS = ("PatientID", "PatientName", "StudyInstanceUID")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """What one file says of its slice.

    Attributes:
        orientation: Unit vectors along the rows, then the columns, in LPS+.
        position_mm: Center of the first pixel, in LPS+.
        pixel_mm: Distance between rows, then between columns.
        shape_ji: Rows and columns.
        slope, intercept: HU = stored value * slope + intercept.
        acquisition: Values of ``PASS_KEYWORDS``, in one spelling, empty where the file has none.
        subject: Values of ``SUBJECT_KEYWORDS``, likewise.
        instance: Number of the image in its series, None where the file has none.
        time: When the acquisition of its data started, as the number HHMMSS, None where the file has none.
        rounding: How far the file's direction vectors are from orthogonal unit vectors.
    """

    file: DicomFile
    series: str
    description: str
    frame_of_reference: str
    orientation: tuple[float, ...]
    position_mm: tuple[float, ...]
    pixel_mm: tuple[float, ...]
    shape_ji: tuple[int, int]
    slope: float
    intercept: float
    acquisition: tuple[str, ...]
    subject: tuple[str, ...]
    instance: int | None
    time: float | None
    rounding: float

    @property
    def normal(self) -> tuple[float, float, float]:
        """Unit vector across the slice, in LPS+."""
        a, b, c, d, e, f = self.orientation
        return b * f - c * e, c * d - a * f, a * e - b * d

    @property
    def height_mm(self) -> float:
        """Position along the normal of the slice."""
        return sum(n * x for n, x in zip(self.normal, self.position_mm, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherFile:
    """A file that is recognizably not a CT slice; ``series`` is empty where it is not DICOM."""

    file: DicomFile
    what: str
    series: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultyFile:
    """A file that should be a CT slice, or cannot be recognized; ``series`` is empty where it is unknown."""

    file: DicomFile
    fault: str
    series: str = ""


def require_pydicom(source: object) -> Any:
    """The library that parses DICOM; raises VolumeError where it is not installed."""
    try:
        import pydicom
    except ImportError:
        raise VolumeError(f"{source}: {NOT_INSTALLED}") from None
    return pydicom


def parse(stream: BinaryIO, *, pixels: bool) -> Any:
    """pydicom's dataset of a file with or without a preamble; raises whatever its parser runs into."""
    import pydicom

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # values are checked below, each with its file's name
        return pydicom.dcmread(stream, stop_before_pixels=not pixels, force=True)


def read_file(source: DicomSource, file: DicomFile, *, force: bool = False) -> Slice | OtherFile | FaultyFile:
    """What a file is; nothing that is wrong with it raises.

    Args:
        source: Where the file lies.
        file: The file.
        force: Take what is not CT, and values without a rescale slope, as if they were HU.
    """
    if file.irregular:
        return _irregular(file)
    try:
        with source.opened(file) as stream:
            head = stream.read(HEAD_BYTES)
            what = None if has_preamble(head) else other_kind(file.name, head)
            if what is not None:
                return OtherFile(file=file, what=what)
            stream.seek(0)
            header = parse(stream, pixels=False)
    except VolumeError as failure:
        return FaultyFile(file=file, fault=str(failure).removeprefix(f"{source.path}: {file.name} "))
    except Exception as failure:  # whatever pydicom's parser runs into in bytes that are not DICOM
        return FaultyFile(file=file, fault=f"cannot be read as DICOM ({_first_line(failure)})")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _classified(file, header, force=force)


def _irregular(file: DicomFile) -> OtherFile | FaultyFile:
    if file.irregular == BROKEN_LINK and not file.name.rpartition("/")[2].startswith("."):
        return FaultyFile(file=file, fault=f"is a {BROKEN_LINK}")
    return OtherFile(file=file, what=file.irregular)


def _classified(file: DicomFile, header: Any, *, force: bool) -> Slice | OtherFile | FaultyFile:
    sop_class = _text(header, "SOPClassUID") or _text(
        getattr(header, "file_meta", {}), "MediaStorageSOPClassUID"
    )
    series, modality = _text(header, "SeriesInstanceUID"), _text(header, "Modality")
    if not sop_class:
        return FaultyFile(
            file=file, series=series, fault=f"is not readable as DICOM ({file.size_bytes} bytes)"
        )
    if sop_class != CT_IMAGE and not (force and "ImagePositionPatient" in header):
        return _not_ct(file, sop_class, series)
    if modality not in ("", "CT") and not force:
        return OtherFile(file=file, series=series, what=f"{modality} image")
    if "LOCALIZER" in _text(header, "ImageType").upper():
        return OtherFile(file=file, series=series, what=LOCALIZER)
    try:
        return _slice(file, header, series, force=force)
    except _AttributeFault as fault:
        return FaultyFile(file=file, series=series, fault=str(fault))


def _not_ct(file: DicomFile, sop_class: str, series: str) -> OtherFile | FaultyFile:
    from pydicom.uid import UID

    name = str(UID(sop_class).name)
    if sop_class in ENHANCED_CT:
        return OtherFile(file=file, series=series, what="enhanced multi-frame CT")
    if name != sop_class:
        return OtherFile(file=file, series=series, what=name.removesuffix(" Storage"))
    # A file that is cut short may end within its class: private classes are believed of whole headers alone.
    if series and not sop_class.startswith(STANDARD_UIDS) and sop_class.replace(".", "").isdigit():
        return OtherFile(file=file, series=series, what="vendor's private object")
    return FaultyFile(file=file, series=series, fault=f"has the unknown SOP class {sop_class!r}")


# ---- attributes of a CT slice


class _AttributeFault(Exception):
    """A value that a CT slice cannot have."""


def _slice(file: DicomFile, header: Any, series: str, *, force: bool) -> Slice:
    if not series:
        raise _AttributeFault("lacks SeriesInstanceUID")
    orientation = _numbers(header, "ImageOrientationPatient", 6)
    unit, rounding = _unit_vectors(orientation)
    slope, intercept = _rescale(header, force=force)
    _check_gray(header)
    return Slice(
        file=file,
        series=series,
        description=_text(header, "SeriesDescription") or "no description",
        frame_of_reference=_text(header, "FrameOfReferenceUID"),
        orientation=unit,
        position_mm=_position(header),
        pixel_mm=_pixel_mm(header),
        shape_ji=_shape(header),
        slope=slope,
        intercept=intercept,
        acquisition=tuple(_comparable(header, keyword) for keyword in PASS_KEYWORDS),
        subject=tuple(_comparable(header, keyword) for keyword in SUBJECT_KEYWORDS),
        instance=_instance(header),
        time=_time(header),
        rounding=rounding,
    )


def _unit_vectors(orientation: Sequence[float]) -> tuple[tuple[float, ...], float]:
    row, column = np.reshape(orientation, (2, 3))
    lengths = float(np.linalg.norm(row)), float(np.linalg.norm(column))
    rounding = max(abs(lengths[0] - 1), abs(lengths[1] - 1), abs(float(row @ column)))
    if not rounding <= DIRECTION_TOLERANCE:
        raise _AttributeFault(
            f"has ImageOrientationPatient {_listed(orientation)}: expected two unit vectors at a right angle"
        )
    row = row / lengths[0]
    column = column - (column @ row) * row
    return tuple(map(float, (*row, *(column / np.linalg.norm(column))))), float(rounding)


def _position(header: Any) -> tuple[float, ...]:
    position = _numbers(header, "ImagePositionPatient", 3)
    if max(map(abs, position)) > MAX_POSITION_MM:
        raise _AttributeFault(
            f"has ImagePositionPatient {_listed(position)}: expected mm from a scanner's center"
        )
    return position


def _pixel_mm(header: Any) -> tuple[float, ...]:
    spacing = _numbers(header, "PixelSpacing", 2)
    if min(spacing) <= 0:
        raise _AttributeFault(f"has PixelSpacing {_listed(spacing)}: expected two positive numbers of mm")
    return spacing


def _shape(header: Any) -> tuple[int, int]:
    rows, columns = (int(_numbers(header, keyword, 1)[0]) for keyword in ("Rows", "Columns"))
    if min(rows, columns) < 1 or max(rows, columns) > MAX_AXIS_VOXELS or 2 * rows * columns > MAX_SLICE_BYTES:
        raise _AttributeFault(
            f"has {rows} rows and {columns} columns: expected 1 to {MAX_AXIS_VOXELS}, of at most "
            f"{MAX_SLICE_BYTES} bytes together"
        )
    return rows, columns


def _rescale(header: Any, *, force: bool) -> tuple[float, float]:
    if force and not any(_text(header, keyword) for keyword in ("RescaleSlope", "RescaleIntercept")):
        return 1.0, 0.0
    ((slope,), (intercept,)) = (_numbers(header, name, 1) for name in ("RescaleSlope", "RescaleIntercept"))
    if slope == 0 or abs(slope) > 1e4 or abs(intercept) > 1e6:
        raise _AttributeFault(
            f"has RescaleSlope {slope:g} and RescaleIntercept {intercept:g}: these give no HU"
        )
    unit = _text(header, "RescaleType")
    if unit.upper() not in HU_TYPES and not force:
        raise _AttributeFault(f"has values in the unit {unit!r} (RescaleType): expected HU")
    return slope, intercept


def _check_gray(header: Any) -> None:
    samples = _text(header, "SamplesPerPixel") or "1"
    kind = _text(header, "PhotometricInterpretation").upper()
    if samples != "1" or kind not in ("", "MONOCHROME1", "MONOCHROME2"):
        raise _AttributeFault(
            f"is a color image ({samples} samples per pixel, {kind}): expected one gray value"
        )
    frames = _text(header, "NumberOfFrames") or "1"
    if frames != "1":
        raise _AttributeFault(f"holds {frames} frames: expected one slice per file")


def _instance(header: Any) -> int | None:
    text = _text(header, "InstanceNumber")
    return int(text) if text.lstrip("-").isascii() and text.lstrip("-").isdigit() else None


def _time(header: Any) -> float | None:
    clock = _text(header, "AcquisitionTime") or _text(header, "AcquisitionDateTime")[8:]
    digits = re.match(r"\d{6}(\.\d+)?", clock.replace(":", ""))  # colons: ACR-NEMA; a zone may follow
    return float(digits.group()) if digits else None


def _comparable(header: Any, keyword: str) -> str:
    """A value in one of the spellings that DICOM calls equal: of numbers, and of names with empty parts at their end."""
    import pydicom.datadict

    text = _whole_text(header, keyword)
    kind = pydicom.datadict.dictionary_VR(keyword)
    if kind == "PN":
        groups = ("^".join(map(str.strip, group.split("^"))).rstrip("^") for group in text.split("="))
        return "=".join(groups).rstrip("=")
    if kind in ("DS", "IS"):
        with contextlib.suppress(ValueError):  # what is not a number is compared as it reads
            return str(float(text))
    return text


def _numbers(header: Any, keyword: str, n: int) -> tuple[float, ...]:
    """Exactly ``n`` finite numbers."""
    if keyword not in header:
        raise _AttributeFault(f"lacks {keyword}")
    try:
        value = header[keyword].value
        values = [value] if n == 1 and not _is_several(value) else list(value)
        numbers = tuple(float(v) for v in values)
    except Exception:  # pydicom converts a value when it is asked for, and raises what its parser runs into
        numbers = ()
    if len(numbers) != n or not all(map(math.isfinite, numbers)):
        found = _text(header, keyword) or "nothing"
        raise _AttributeFault(f"has {keyword} {found}: expected {n} finite number{'s' * (n > 1)}")
    return numbers


def _is_several(value: object) -> bool:
    return not isinstance(value, str | bytes) and hasattr(value, "__len__")


def _text(header: Any, keyword: str) -> str:
    """A value as it reads, short; empty where there is none, or none that can be decoded."""
    return _whole_text(header, keyword)[:80]


def _whole_text(header: Any, keyword: str) -> str:
    try:
        value = header[keyword].value if keyword in header else None
        return "" if value is None else str(value).strip().strip("\0")
    except Exception:  # as above: pydicom's parsers raise what they run into, and this only words a message
        return ""


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{v:g}" for v in values)


def _first_line(failure: Exception) -> str:
    return (str(failure).splitlines() or [""])[0][:120] or type(failure).__name__
