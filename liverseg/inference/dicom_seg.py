"""A label as a DICOM Segmentation object that refers to its CT series, for a PACS to keep beside it."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_cache.errors import LabelError, VolumeError
from data_cache.files import replacing
from data_cache.geometry import Grid, corner_distance_mm
from liverseg.pictures.palette import LIVER_PRED, TUMOUR_PRED
from pipeline.dicom import DicomSource, Slice, read_series, series_affine
from pipeline.dicom.header import parse
from pipeline.labels import foreground_and_tumour
from pipeline.nifti import VolumeHeader, VolumeStream

SUFFIX = "_seg.dcm"
# A Segmentation object, by the SOP class (0002,0002), whose manufacturer (0008,0070) is liverseg.
SEG_MARK = re.compile(
    rb"(?s).{128}DICM.*?\x02\x00\x02\x00UI\x1c\x001\.2\.840\.10008\.5\.1\.4\.1\.1\.66\.4\x02\x00"
    rb".*?\x08\x00\x70\x00LO\x08\x00liverseg"
)
NOT_INSTALLED = "--dicom-seg needs highdicom: pip install 'liverseg[dicom]'"
SERIES_NUMBER = 900  # scanners do not give it: viewers sort by it
REFERRED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
GEOMETRY = ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient")
# Attributes of patient and study that every DICOM object must have but may leave empty (PS3.3, type 2): they make the
# segmentation appear under its patient in a PACS. Nothing else of the series is copied.
COPIED = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "ReferringPhysicianName",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "PositionReferenceIndicator",
)
# How to read the names, and that the pixels were compressed with losses (type 1C).
COPIED_IF_THERE = (
    "SpecificCharacterSet",
    "LossyImageCompression",
    "LossyImageCompressionRatio",
    "LossyImageCompressionMethod",
)
# Linear sRGB to XYZ, adapted to the white of CIELAB in DICOM (D50, by Bradford), and that white: B. Lindbloom,
# http://www.brucelindbloom.com/Eqn_RGB_XYZ_Matrix.html
_XYZ_OF_SRGB = np.array(
    [
        [0.4360747, 0.3850649, 0.1430804],
        [0.2225045, 0.7168786, 0.0606169],
        [0.0139322, 0.0971045, 0.7141733],
    ]
)
_WHITE_XYZ = np.array([0.96422, 1.0, 0.82521])
REMEDY = "take the series as the scanner or the PACS gives it, or leave out --dicom-seg"
SAME_POSITION_MM = 0.1  # a NIfTI affine is float32


def require_referable(series: Path, *, uid: str | None = None, force: bool = False) -> None:
    """Refuse a series that ``write_dicom_seg`` could not refer to, before anything is computed for it.

    Raises:
        VolumeError: The series cannot be read, or its files lack what a segmentation refers to, or share a UID.
    """
    with DicomSource.open(series) as source:
        _source_headers(source, read_series(source, uid=uid, force=force).slices)


def write_dicom_seg(
    path: Path, *, series: Path, label: Path, uid: str | None = None, force: bool = False
) -> None:
    """Write the label of a series as two binary segments, 1 liver and 2 tumour, that do not overlap.

    Frames without a voxel of their segment are left out, except for a label without any voxel, which keeps all of
    them: a segmentation must have a frame.

    Of the series, the segmentation carries only what DICOM requires of it: ``COPIED``, and the UIDs that it refers to.

    Args:
        path: ``.dcm`` file; appears when it is whole.
        series: Folder or zip of one CT series.
        label: NIfTI file on the grid of that series as ``pipeline.dicom.convert_series`` gives it.
        uid: SeriesInstanceUID of the series; needed where there are several.
        force: Take what is not CT, and values without a rescale slope, as ``convert_series`` did for the label.

    Raises:
        VolumeError: highdicom is not installed, or the series or the label cannot be read, or the series lacks
            what a segmentation refers to, or its slices share a UID.
        LabelError: The label is of another series, or holds other values than 0, 1 and 2.
    """
    hd = require_highdicom()
    with DicomSource.open(series) as source:
        slices = read_series(source, uid=uid, force=force).slices
        label_kji = _read_label(label, slices)
        sources = _source_headers(source, slices)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # such as of a value that is longer than DICOM allows: it is copied as it is
        segmentation = _segmentation(hd, sources, label_kji)
        with replacing(path) as file:
            segmentation.save_as(file)


def require_highdicom() -> Any:
    """The library that writes segmentations; raises VolumeError where it is not installed."""
    try:
        import highdicom
    except ImportError:
        raise VolumeError(NOT_INSTALLED) from None
    # It would log a patient's name that has no caret, and that all frames of an empty segmentation are kept.
    logging.getLogger("highdicom").setLevel(logging.ERROR)
    return highdicom


def _segmentation(hd: Any, sources: Sequence[Any], label_kji: NDArray[np.uint8]) -> Any:
    return hd.seg.Segmentation(
        source_images=sources,
        pixel_array=label_kji,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=_segments(hd),
        series_instance_uid=hd.UID(),
        series_number=SERIES_NUMBER,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="liverseg",
        manufacturer_model_name="liverseg",
        software_versions=version("liverseg"),
        device_serial_number="1",
        content_description="Liver and liver tumours",
        series_description="liverseg: liver and liver tumours",
    )


def _segments(hd: Any) -> list[Any]:
    from pydicom.sr.codedict import codes

    sct = codes.SCT
    altered = hd.sr.CodedConcept("49755003", "SCT", "Morphologically Altered Structure")
    return [
        _segment(
            hd,
            1,
            "liver",
            (sct.AnatomicalStructure, sct.Liver),
            description="The liver without its tumours",
            colour=LIVER_PRED,
        ),
        _segment(
            hd,
            2,
            "liver tumour",
            (altered, sct.Neoplasm),
            description="Tumours within the liver",
            colour=TUMOUR_PRED,
            region=sct.Liver,
        ),
    ]


def _segment(
    hd: Any,
    number: int,
    label: str,
    property_codes: tuple[Any, Any],
    *,
    description: str,
    colour: str,
    region: Any = None,
) -> Any:
    """A segment whose property has a category and a type, shown in a colour such as "#f0e442"."""
    from pydicom.sr.codedict import codes

    algorithm = hd.AlgorithmIdentificationSequence(
        name="liverseg", version=version("liverseg"), family=codes.DCM.ArtificialIntelligence
    )
    segment = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=label,
        segmented_property_category=property_codes[0],
        segmented_property_type=property_codes[1],
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
        anatomic_regions=None if region is None else [region],
        display_color=hd.color.CIELabColor(*cielab(colour)),
    )
    segment.SegmentDescription = description
    return segment


def cielab(colour: str) -> tuple[float, float, float]:
    """L*, a* and b* under D50 of a colour of sRGB such as "#f0e442" (IEC 61966-2-1; CIE 15)."""
    srgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    ratios = _XYZ_OF_SRGB @ linear / _WHITE_XYZ
    x, y, z = np.where(ratios > (6 / 29) ** 3, np.cbrt(ratios), ratios * (29 / 6) ** 2 / 3 + 4 / 29).tolist()
    return min(100.0, max(0.0, 116 * y - 16)), 500 * (x - y), 200 * (y - z)


def _source_headers(source: DicomSource, slices: Sequence[Slice]) -> list[Any]:
    """The slices' headers, reduced to what a segmentation needs, with the real distance between slices.

    highdicom takes the voxel size and the patient's attributes from here, whatever else it is given; and the distance
    in the files themselves need not be true.
    """
    step_mm = (slices[-1].height_mm - slices[0].height_mm) / (len(slices) - 1)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # such as of a value that is longer than DICOM allows: it is copied as it is
        headers = [_source_header(source, s, step_mm=step_mm) for s in slices]
    first: dict[str, Slice] = {}
    for s, header in zip(slices, headers, strict=True):
        other = first.setdefault(str(header.SOPInstanceUID), s)
        if other is not s:
            raise VolumeError(
                f"{source.path}: {other.file.name} and {s.file.name} have the same SOPInstanceUID, so that a "
                f"segmentation cannot refer to one of them: {REMEDY}"
            )
    for name in COPIED:  # highdicom copies from the first alone, where a value may be blank
        headers[0][name] = next((h[name] for h in headers if h[name].value), headers[0][name])
    return headers


def _source_header(source: DicomSource, s: Slice, *, step_mm: float) -> Any:
    import pydicom

    with source.opened(s.file) as stream:
        header = parse(stream, pixels=False)
    missing = [name for name in REFERRED if not header.get(name)]
    if missing:
        raise VolumeError(
            f"{source.path}: {s.file.name} lacks {', '.join(missing)}, which a segmentation refers to: {REMEDY}"
        )
    reduced = pydicom.Dataset()
    reduced.file_meta = header.file_meta
    reduced.Modality = "CT"
    for name in (*REFERRED, *GEOMETRY, *COPIED, *COPIED_IF_THERE):
        if name in header:
            reduced[name] = header[name]
    for name in COPIED:
        if name not in reduced or not _is_readable(reduced, name):
            setattr(reduced, name, None)
    reduced.SpacingBetweenSlices = reduced.SliceThickness = f"{step_mm:.10g}"
    return reduced


def _is_readable(header: Any, name: str) -> bool:
    """Whether a value can be copied: highdicom stops at a date, a time or a sex that is none in DICOM."""
    from pydicom.valuerep import DA, TM

    try:
        value = header[name].value or ""
        {"DA": DA, "TM": TM}.get(header[name].VR, str)(value)
        return name != "PatientSex" or value in ("", "M", "F", "O")
    except Exception:  # pydicom converts a value when it is asked for, and raises what its parser runs into
        return False


def _read_label(label: Path, slices: Sequence[Slice]) -> NDArray[np.uint8]:
    with VolumeStream.open(label) as stream:
        _check_same_grid(stream.header, slices)
        label_kji = np.zeros(stream.header.shape_kji, dtype=np.uint8)
        for first, block_kji in stream.blocks():
            parts = foreground_and_tumour(block_kji, stream.header)
            if parts is not None:
                label_kji[first : first + len(block_kji)] = parts[0] + parts[1]
    return label_kji


def _check_same_grid(header: VolumeHeader, slices: Sequence[Slice]) -> None:
    # In the file's own order of axes: a label that another tool has turned would be written turned.
    found = Grid.from_array(header.shape_kji, header.nifti.get_best_affine())
    wanted = Grid.from_array((len(slices), *slices[0].shape_ji), series_affine(slices))
    if found.shape_zyx != wanted.shape_zyx or corner_distance_mm(found, wanted) > SAME_POSITION_MM:
        raise LabelError(
            f"{header.path}: its voxels are not those of the series of {slices[0].file.name}: name the label that "
            "predict wrote for this series"
        )
