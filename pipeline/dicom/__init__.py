"""CT series in DICOM: which files belong to one, where its slices lie, and its voxels as one NIfTI file."""

from pipeline.dicom.convert import convert_series
from pipeline.dicom.header import Slice
from pipeline.dicom.series import Series, read_series, series_affine
from pipeline.dicom.source import DicomFile, DicomSource, first_dicom_below, is_dicom_source, looks_like_dicom

__all__ = [
    "DicomFile",
    "DicomSource",
    "Series",
    "Slice",
    "convert_series",
    "first_dicom_below",
    "is_dicom_source",
    "looks_like_dicom",
    "read_series",
    "series_affine",
]
