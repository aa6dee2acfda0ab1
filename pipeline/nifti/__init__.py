"""NIfTI files, the only package that knows nibabel: headers, streams of slices, writing."""

from pipeline.nifti.header import CorruptStreamError, FileAxis, VolumeHeader, to_canonical
from pipeline.nifti.stream import VolumeStream, read_canonical
from pipeline.nifti.write import write_labels, write_slices, write_volume

__all__ = [
    "CorruptStreamError",
    "FileAxis",
    "VolumeHeader",
    "VolumeStream",
    "read_canonical",
    "to_canonical",
    "write_labels",
    "write_slices",
    "write_volume",
]
