"""All faults of a raw data set at once, before anything is built.

A *fault* would stop ``preprocess`` or make it cache something wrong; a *warning* is worth a look.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_cache.errors import LabelError, VolumeError
from data_cache.reader import natural_order
from pipeline.dialects import FILE
from pipeline.labels import (
    EXCHANGE,
    RULE,
    describe_values,
    exchanged,
    foreground_and_tumour,
    look_swapped,
    wrong_values,
)
from pipeline.listing import Finding, Scan, check_listing
from pipeline.names import nearby
from pipeline.nifti import CorruptStreamError, VolumeHeader, VolumeStream
from pipeline.nifti.stream import retry_with_stdlib_gzip
from pipeline.prepare import check_same_grid
from pipeline.sanity import Doubt, Intensities, VoxelSample, liver_doubts, scan_doubts
from pipeline.workers import Failure, run_parallel

AGAIN = "copy or download it again"
CONVERT = "convert it again from DICOM, such as with dcm2niix"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanCheck:
    """Findings in the files of one scan.

    Attributes:
        voxels_sha256: Hash of the image's shape, data type and stored voxels; None if it could not be read.
    """

    scan: Scan
    findings: tuple[Finding, ...]
    voxels_sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageFacts:
    """What is learnt of an image while it streams by.

    Attributes:
        intensities: Those of its finite voxels.
        sample_hu: The sampled voxels, those that are not finite among them.
        n_not_finite: NaN and infinite voxels.
    """

    header: VolumeHeader
    voxels_sha256: str
    intensities: Intensities
    sample_hu: NDArray[np.float64]
    n_not_finite: int


def check_data_set(root: Path, *, jobs: int, report: Callable[[ScanCheck, int], None]) -> list[Finding]:
    """Read every file of a data set once, up to its checksum, and list what is wrong.

    Args:
        root: Folder of dataset.json. If that is broken, the files in the folder are still checked.
        jobs: Worker processes; each needs memory for a few blocks of slices, however large the volume.
        report: Called with each scan's result when it is done, and the number of scans.

    Returns:
        Findings: first those of the data set, then by case in natural order, faults before warnings.

    Raises:
        DataSetError: There is no such folder, or nothing in it to check.
    """
    scans, findings = check_listing(root)
    checks = []
    for outcome in run_parallel(partial(check_scan, root=root), scans, jobs=jobs):
        checks.append(_failed(outcome) if isinstance(outcome, Failure) else outcome)
        report(checks[-1], len(scans))
    findings += [finding for check in checks for finding in check.findings]
    findings += find_duplicates(sorted(checks, key=_labelled_first))
    return sorted(findings, key=lambda f: (f.case != FILE, natural_order(f.case), f.severity))


def check_scan(scan: Scan, *, root: Path) -> ScanCheck:
    """Check one scan and its label; whatever is wrong with them is a finding."""
    faults: list[Finding] = []
    image = _attempt(scan, root, scan.image, read_image, faults)
    findings = [] if image is None else [*image_findings(scan.name, image), *_notes(scan, image.header)]
    if scan.label is not None:
        label = _attempt(scan, root, scan.label, _read_label, faults)
        if label is not None:
            findings += _label_findings(scan, root, label, image)
    return ScanCheck(
        scan=scan,
        findings=(*faults, *findings),
        voxels_sha256=None if image is None else image.voxels_sha256,
    )


def _attempt(
    scan: Scan, root: Path, path: Path, read: Callable[[Path, bool], Any], faults: list[Finding]
) -> Any:
    """The result of ``read``, or None and a fault."""
    if not os.path.exists(path):
        faults.append(_fault(scan, f"{_short(path, root)} is missing{_relative(nearby(path), root)}", AGAIN))
        return None
    try:
        return retry_with_stdlib_gzip(lambda use_stdlib: read(path, use_stdlib))
    except VolumeError as failure:
        remedy = AGAIN if isinstance(failure, CorruptStreamError) else CONVERT
        faults.append(_fault(scan, _relative(str(failure), root).removesuffix(f": {remedy}"), remedy))
        return None


# ---- image


def read_image(path: Path, use_stdlib: bool = False) -> ImageFacts:
    """Stream an image once; raises VolumeError where it cannot be read to its end."""
    with VolumeStream.open(path, use_stdlib=use_stdlib) as stream:
        header = stream.header
        digest = hashlib.sha256(f"{header.shape_kji} {header.dtype.str}".encode())
        sample, not_finite, low, high = VoxelSample(header.shape_kji), 0, np.inf, -np.inf
        for _, block in stream.blocks():
            digest.update(block.data)
            sample.add(block)
            stored, n_bad = _finite(block)
            not_finite += n_bad
            if stored.size:
                low, high = min(low, float(stored.min())), max(high, float(stored.max()))
        return ImageFacts(
            header=header,
            voxels_sha256=digest.hexdigest(),
            intensities=sample.intensities((low, high), slope=header.slope, intercept=header.intercept),
            sample_hu=sample.values_hu(header.slope, header.intercept),
            n_not_finite=not_finite,
        )


def _finite(block_kji: NDArray[Any]) -> tuple[NDArray[Any], int]:
    flat = block_kji.reshape(-1)
    if flat.dtype.kind != "f":
        return flat, 0
    finite = np.isfinite(flat)
    n_bad = flat.size - int(np.count_nonzero(finite))
    return (flat[finite] if n_bad else flat), n_bad


def image_findings(case: str, image: ImageFacts) -> list[Finding]:
    """What ``preprocess`` and ``predict`` would say of the image, or refuse it for."""
    found = []
    if image.n_not_finite:
        what = f"the image has {image.n_not_finite} NaN or infinite voxels"
        found.append(_finding("warning", case, what, "preprocess makes them air: see that they are outside"))
    return found + _doubted(case, scan_doubts(image.header, image.intensities))


def _doubted(case: str, doubts: Iterable[Doubt]) -> list[Finding]:
    return [_finding(doubt.severity, case, doubt.what, doubt.remedy) for doubt in doubts]


def _notes(scan: Scan, header: VolumeHeader) -> list[Finding]:
    return [
        _finding("warning", scan.name, note, "correct the header if that is wrong") for note in header.notes
    ]


# ---- label


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _LabelFacts:
    header: VolumeHeader
    n_foreground: int
    n_tumour: int
    wrong_values: tuple[float, ...]
    liver_sample: NDArray[np.bool_]


def _read_label(path: Path, use_stdlib: bool) -> _LabelFacts:
    with VolumeStream.open(path, use_stdlib=use_stdlib) as stream:
        header, wrong = stream.header, set[float]()
        counts, sample = np.zeros(2, dtype=np.int64), VoxelSample(header.shape_kji)
        for _, block in stream.blocks():
            try:
                parts = foreground_and_tumour(block, header)
            except LabelError:
                wrong |= wrong_values(block, header)
                continue
            if parts is not None:
                counts += [np.count_nonzero(part) for part in parts]
            sample.add(np.zeros(block.shape, np.bool_) if parts is None else parts[0] > parts[1])
    return _LabelFacts(
        header=header,
        n_foreground=int(counts[0]),
        n_tumour=int(counts[1]),
        wrong_values=tuple(sorted(wrong)),
        liver_sample=sample.values(),
    )


def _label_findings(scan: Scan, root: Path, label: _LabelFacts, image: ImageFacts | None) -> list[Finding]:
    found = []
    if label.wrong_values and look_swapped(scan.image, label.header.path):
        found.append(_fault(scan, _relative(exchanged(scan.image, label.header.path), root), EXCHANGE))
    elif label.wrong_values:
        what = f"{_short(label.header.path, root)} holds {describe_values(set(label.wrong_values))}"
        found.append(_fault(scan, what, f"{RULE}: threshold or map it first"))
    elif not label.n_foreground:
        what = f"{_short(label.header.path, root)} has no liver and no tumour"
        found.append(_finding("warning", scan.name, what, "label it, or leave the case out"))
    elif label.n_foreground == label.n_tumour:
        what = f"{_short(label.header.path, root)} has tumour (2) but no liver (1)"
        found.append(_finding("warning", scan.name, what, "check whether the labels are swapped"))
    if image is not None:
        grid_faults = _grid_faults(scan, root, label.header, image.header)
        if not grid_faults and not label.wrong_values:
            found += _doubted(scan.name, liver_doubts(_liver_hu(label, image)))
        found += grid_faults
        own = [note for note in label.header.notes if note not in image.header.notes]
        found += [
            _finding("warning", scan.name, f"label: {n}", "correct its header if that is wrong") for n in own
        ]
    return found


def _liver_hu(label: _LabelFacts, image: ImageFacts) -> NDArray[np.float64]:
    """The sampled voxels of the liver; none where the two files have their axes in another order."""
    if label.header.file_axes != image.header.file_axes:
        return np.empty(0)
    liver_hu = image.sample_hu[label.liver_sample]
    return liver_hu[np.isfinite(liver_hu)]


def _grid_faults(scan: Scan, root: Path, label: VolumeHeader, image: VolumeHeader) -> list[Finding]:
    try:
        check_same_grid(label, image)
    except LabelError as failure:
        what, _, remedy = _relative(str(failure), root).rpartition(": ")
        return [_fault(scan, what, remedy.replace("they are not of one scan", "find the label of this scan"))]
    return []


# ---- between scans


def find_duplicates(checks: Sequence[ScanCheck]) -> list[Finding]:
    """Images with the same voxels, however they are compressed: a split could put one on each side.

    A fault between two labelled cases; a warning if one of them is unlabelled.
    """
    alike: dict[str, list[Scan]] = defaultdict(list)
    for check in checks:
        if check.voxels_sha256 is not None:
            alike[check.voxels_sha256].append(check.scan)
    return [
        Finding(
            case=copy.name,
            severity="warning" if original.label is None or copy.label is None else "fault",
            what=f"has the same voxels as {original.name}",
            remedy="remove one of them: a split could train on one and score the other",
        )
        for original, *copies in alike.values()
        for copy in copies
    ]


def _labelled_first(check: ScanCheck) -> tuple[bool, list[tuple[int, str]]]:
    return check.scan.label is None, natural_order(check.scan.name)


def _failed(failure: Failure[Scan]) -> ScanCheck:
    unforeseen = "report this: the check itself failed"
    remedy = unforeseen if failure.traceback else "look at the file's header, or free some memory"
    return ScanCheck(scan=failure.item, findings=(_fault(failure.item, failure.reason, remedy),))


def has_faults(findings: Iterable[Finding]) -> bool:
    """Whether any is more than a warning."""
    return any(finding.severity == "fault" for finding in findings)


def _finding(severity: Literal["fault", "warning"], case: str, what: str, remedy: str) -> Finding:
    return Finding(case=case, severity=severity, what=what, remedy=remedy)


def _fault(scan: Scan, what: str, remedy: str) -> Finding:
    return _finding("fault", scan.name, what, remedy)


def _relative(message: str, root: Path) -> str:
    return message.replace(f"{root}/", "")


def _short(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
