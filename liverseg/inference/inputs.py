"""What ``predict`` is given, as NIfTI files: files, folders of files, DICOM series in folders and zips."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_cache.errors import VolumeError
from pipeline.check import SAMPLED_VOXELS, ImageFacts, intensity_findings
from pipeline.decathlon import volume_stem
from pipeline.dicom import convert_series, is_dicom_source
from pipeline.prepare import HeldScan


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanInput:
    """One scan to segment; ``name`` is its output's without .nii.gz."""

    name: str
    path: Path
    is_dicom: bool

    @contextlib.contextmanager
    def as_nifti(self) -> Iterator[Path]:
        """The scan as a NIfTI file; a converted one is gone when the block ends.

        Raises:
            VolumeError: The DICOM files are no series that can be put together.
        """
        if not self.is_dicom:
            yield self.path
            return
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / f"{self.name}.nii"
            convert_series(self.path, target)
            yield target


def find_scans(paths: Sequence[Path]) -> list[ScanInput]:
    """The scans that ``paths`` name: each NIfTI file of a folder, or else the folder as one DICOM series.

    A path that does not exist is kept, and fails when it is read, so that it does not stop the others.

    Raises:
        VolumeError: Two scans would write the same output.
    """
    scans = [scan for path in paths for scan in _scans(path)]
    first: dict[str, ScanInput] = {}
    for scan in scans:
        other = first.setdefault(scan.name, scan)
        if other is not scan:
            raise VolumeError(
                f"{other.path} and {scan.path} would both write {scan.name}.nii.gz: segment them apart"
            )
    return scans


def scan_notes(scan: HeldScan) -> tuple[str, ...]:
    """What was assumed while reading a scan, and whether its values can be HU at all: as ``liverseg check`` says it.

    The distribution is that of the view of the whole scan. Without the rescale intercept a liver is at 1100, and nothing
    is found in it.
    """
    values = scan.scan_view.image_zyx.ravel()
    low, high = scan.tally.range_hu
    step = max(1, values.size // SAMPLED_VOXELS) | 1
    facts = ImageFacts(
        header=scan.header,
        voxels_sha256="",
        minimum_hu=low,
        maximum_hu=high,
        sample_hu=values[::step].astype(np.float64),
        n_not_finite=0,
    )
    faults = [f for f in intensity_findings(scan.header.path.name, facts) if f.severity == "fault"]
    return (*scan.notes, *(f"{fault.what}: {fault.remedy}" for fault in faults))


def _scans(path: Path) -> Iterator[ScanInput]:
    volumes = sorted(p for p in path.iterdir() if volume_stem(p) is not None) if path.is_dir() else []
    if volumes:
        yield from (ScanInput(name=volume_stem(p) or p.name, path=p, is_dicom=False) for p in volumes)
    elif is_dicom_source(path):
        name = path.resolve().name
        yield ScanInput(name=name.removesuffix(".zip"), path=path, is_dicom=True)
    else:
        yield ScanInput(name=volume_stem(path) or path.name, path=path, is_dicom=False)
