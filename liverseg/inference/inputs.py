"""The scans that ``predict`` is given, as NIfTI files: files, folders of files, DICOM series in folders and zips."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_cache.errors import VolumeError
from data_cache.files import scratch_folder
from pipeline.dicom import convert_series, first_dicom_below, is_dicom_source, looks_like_dicom
from pipeline.labels import looks_like_label
from pipeline.names import volume_stem


@dataclass(frozen=True, slots=True, kw_only=True)
class NiftiScan:
    """A scan as a NIfTI file, and what was passed over on the way to it."""

    path: Path
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanInput:
    """One scan to segment.

    Attributes:
        name: The name of its output without .nii.gz.
        is_dicom: ``path`` is a folder or zip of DICOM files.
        refusal: Why ``path`` is not a scan; empty where it may be one.
        notes: What was passed over beside it.
    """

    name: str
    path: Path
    is_dicom: bool
    refusal: str = ""
    notes: tuple[str, ...] = ()

    @contextlib.contextmanager
    def as_nifti(
        self, *, series: str | None = None, force: bool = False, scratch: Path | None = None
    ) -> Iterator[NiftiScan]:
        """The scan as a NIfTI file; a converted one is gone when the block ends.

        Args:
            series: SeriesInstanceUID to take, where the DICOM files are of several series.
            force: Take DICOM files that are not CT, or have no rescale slope, as if their values were HU.
            scratch: Folder for the converted file; the system's temporary one if None. Should the process be killed,
                the next one that writes there deletes what is left of the patient's scan.

        Raises:
            VolumeError: The path is not a scan, or the DICOM files do not make a series.
        """
        if self.refusal:
            raise VolumeError(f"{self.path}: {self.refusal}")
        if not self.is_dicom:
            yield NiftiScan(path=self.path, notes=self.notes)
            return
        with scratch_folder(Path(tempfile.gettempdir()) if scratch is None else scratch) as folder:
            target = folder / "scan.nii"
            notes = convert_series(self.path, target, uid=series, force=force)
            try:
                yield NiftiScan(path=target, notes=notes)
            except VolumeError as failure:  # nobody knows the converted file
                raise type(failure)(str(failure).replace(str(target), str(self.path))) from failure


def find_scans(paths: Sequence[Path]) -> list[ScanInput]:
    """The scans that ``paths`` name: a folder's DICOM series, or else each of its NIfTI files.

    DICOM files in subfolders count where the NIfTI files in the folder itself are labels or missing.

    A path that is missing or cannot be a scan is kept, and fails when it is read, so that it does not stop the others.

    Raises:
        VolumeError: Two scans would write the same output.
    """
    scans = [scan for path in paths for scan in _scans(path)]
    first: dict[str, ScanInput] = {}
    for scan in scans:
        other = first.setdefault(scan.name, scan)
        if other is not scan:
            raise VolumeError(
                f"{other.path} and {scan.path} would both write {scan.name}.nii.gz: segment them in two calls, each "
                "with its own --out"
            )
    return scans


# ---- what a path is


def _scans(path: Path) -> list[ScanInput]:
    try:
        return _folder(path) if path.is_dir() else [_file(path)]
    except OSError as failure:  # a name that is too long, a folder that may not be listed
        return [_refused(path, f"cannot be opened: {failure.strerror or failure}")]


def _folder(path: Path) -> list[ScanInput]:
    entries = sorted(path.iterdir())
    volumes = [p for p in entries if volume_stem(p) is not None and not p.is_dir()]
    # A label or a converted copy must not hide the series that it lies beside; what reads the series says what it left.
    if any(looks_like_dicom(p) for p in entries):
        return [_series(path)]
    if volumes:
        below = first_dicom_below(path)
        if below is not None and all(looks_like_label(p) for p in volumes):
            return [_series(path)]
        beside = (
            () if below is None else (f"passed over: DICOM files in {below.parent}: name it to segment them",)
        )
        return [replace(_nifti(volumes[0]), notes=beside), *map(_nifti, volumes[1:])]
    refusal = _known_folder(path) or _not_a_scan_folder(entries)
    return [_refused(path, refusal)] if refusal else [_series(path)]


def _file(path: Path) -> ScanInput:
    if is_dicom_source(path):
        return _series(path)
    if path.suffix == ".safetensors":
        return _refused(path, "is an exported model, not a scan: expected RUN first, then SCANS")
    if looks_like_dicom(path):
        return _refused(path, f"is one file of a DICOM series: name its folder, {path.parent}")
    return _nifti(path)


def _nifti(path: Path) -> ScanInput:
    return ScanInput(name=volume_stem(path) or path.name, path=path, is_dicom=False)


def _series(path: Path) -> ScanInput:
    name = path.absolute().name if path.name not in ("", "..") else path.resolve().name
    stem = name[: -len(".zip")] if name.lower().endswith(".zip") else name
    return ScanInput(name=stem, path=path, is_dicom=True)


def _refused(path: Path, refusal: str) -> ScanInput:
    return ScanInput(name=volume_stem(path) or path.name, path=path, is_dicom=False, refusal=refusal)


def _known_folder(path: Path) -> str:
    """What to name instead of a training run, a cache or the folder of a whole data set."""
    if any((path / name).is_file() for name in ("best.pt", "last.pt")):
        return "is a training run, not a scan: expected RUN first, then SCANS"
    if (path / "zarr.json").is_file():
        return "is a cache, not a scan: name NIfTI files or DICOM folders"
    images = [name for name in ("imagesTs", "imagesTr") if (path / name).is_dir()]
    if not images:
        return ""
    return f"is the folder of a data set: name its images, such as {path / images[0]}"


def _not_a_scan_folder(entries: Sequence[Path]) -> str:
    """What to name instead of a folder whose subfolders hold NIfTI files."""
    for folder in (p for p in entries if p.is_dir()):
        inside = sorted(p for p in folder.iterdir() if volume_stem(p) is not None)
        if inside:
            return f"holds no scan itself, but {folder.name} does ({inside[0].name}): name {folder}"
    return "" if entries else "is an empty folder: name a NIfTI file, or the folder of a DICOM series"
