"""NIfTI files, the only package that knows nibabel: headers, streams of slices, writing."""

from pipeline.nifti.header import (
    NO_UNIT,
    CorruptStreamError,
    FileAxis,
    VolumeHeader,
    from_canonical,
    to_canonical,
)
from pipeline.nifti.objects import NiftiImage, label_image, temporary_nifti
from pipeline.nifti.planes import read_planes
from pipeline.nifti.stream import VolumeStream, read_canonical
from pipeline.nifti.write import write_labels, write_map, write_slices, write_volume

__all__ = [
    "NO_UNIT",
    "CorruptStreamError",
    "FileAxis",
    "NiftiImage",
    "VolumeHeader",
    "VolumeStream",
    "from_canonical",
    "label_image",
    "read_canonical",
    "read_planes",
    "temporary_nifti",
    "to_canonical",
    "write_labels",
    "write_map",
    "write_slices",
    "write_volume",
]
