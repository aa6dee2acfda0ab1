"""NIfTI files, the only package that knows nibabel: headers, streams of slices, writing."""

from pipeline.nifti.header import CorruptStreamError, FileAxis, VolumeHeader, from_canonical, to_canonical
from pipeline.nifti.stream import VolumeStream, read_canonical
from pipeline.nifti.write import write_labels, write_map, write_slices, write_volume

__all__ = [
    "CorruptStreamError",
    "FileAxis",
    "VolumeHeader",
    "VolumeStream",
    "from_canonical",
    "read_canonical",
    "to_canonical",
    "write_labels",
    "write_map",
    "write_slices",
    "write_volume",
]
