"""Checks dataset.json against the folder that it describes: missing, extra, miscounted or misnamed files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_cache.errors import DataSetError
from pipeline.decathlon import NO_CASE_ID, RENAME, CaseFiles, RawDataSet, read_data_set
from pipeline.dialects import FILE, load_content
from pipeline.names import SUFFIXES, volume_stem

FOLDERS = ("imagesTr", "labelsTr", "imagesTs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One fault of a data set.

    Attributes:
        case: The case, a file relative to the data set's folder, or dataset.json.
        severity: "fault" if preprocess would fail or would cache something wrong, otherwise "warning".
        remedy: What to do about it.
    """

    case: str
    severity: Literal["fault", "warning"]
    what: str
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """An image to check, with its label; a test image has none."""

    name: str
    image: Path
    label: Path | None


def check_listing(root: Path) -> tuple[list[Scan], list[Finding]]:
    """The scans of a data set, and the faults of its listing.

    If dataset.json cannot be used, that is a fault, and the scans are the pairs found in the folders.

    Raises:
        DataSetError: The folder does not exist, or has neither dataset.json nor imagesTr.
    """
    if not (root / FILE).exists() and not (root / "imagesTr").is_dir():
        read_data_set(root)  # raises, and says what is wrong
    try:
        data_set = read_data_set(root)
    except DataSetError as failure:
        what = str(failure).removeprefix(f"{root / FILE}: ").removeprefix(f"{root}: ")
        return _paired(root), [_fault(what, "correct it: preprocess reads its cases from it")]
    content = load_content(root)
    findings = [*_counts(content, data_set), *_names(data_set), *_extra_files(data_set)]
    findings += [_warning(note, "correct dataset.json") for note in data_set.notes]
    return _listed(data_set), findings


def _paired(root: Path) -> list[Scan]:
    scans = []
    for image in _volumes(root / "imagesTr"):
        stem = volume_stem(image)
        labels = [root / "labelsTr" / f"{stem}{suffix}" for suffix in SUFFIXES]
        scans.append(Scan(name=str(stem), image=image, label=next(filter(Path.exists, labels), labels[0])))
    return scans + [_test(root, image) for image in _volumes(root / "imagesTs")]


def _listed(data_set: RawDataSet) -> list[Scan]:
    cases = [Scan(name=case.case_id, image=case.image, label=case.label) for case in data_set.cases]
    return cases + [_test(data_set.root, image) for image in data_set.tests]


def _test(root: Path, image: Path) -> Scan:
    return Scan(name=_below(root, image), image=image, label=None)


# ---- the file's own statements


def _counts(content: Mapping[str, Any], data_set: RawDataSet) -> list[Finding]:
    listed = {"numTraining": len(data_set.cases) + len(data_set.misnamed), "numTest": len(data_set.tests)}
    return [
        _fault(f"{key} is {content[key]!r}, but {n} are listed", "complete the list or correct the number")
        for key, n in listed.items()
        if key in content and content[key] != n
    ]


def _names(data_set: RawDataSet) -> list[Finding]:
    folders = [case.image.parent.name for case in data_set.cases]
    return (
        [
            Finding(case=_below(data_set.root, case.image), severity="fault", what=NO_CASE_ID, remedy=RENAME)
            for case in data_set.misnamed
        ]
        + [
            Finding(
                case=case.case_id,
                severity="warning",
                what=f"its label is named {case.label.name}",
                remedy="make sure that it is the label of this image",
            )
            for case in data_set.cases
            if volume_stem(case.label) != case.case_id and not _in_own_folder(case, folders)
        ]
        + _shared_labels(data_set)
    )


def _in_own_folder(case: CaseFiles, folders: Sequence[str]) -> bool:
    """Whether image and label are together in a folder of this case alone, whatever their names."""
    return case.label.parent.name == case.image.parent.name and folders.count(case.image.parent.name) == 1


def _shared_labels(data_set: RawDataSet) -> list[Finding]:
    seen: dict[Path, str] = {}
    found = []
    for case in data_set.cases:
        first = seen.setdefault(case.label, case.case_id)
        if first != case.case_id:
            what = f"has the same label file as {first}"
            remedy = "list the label of this case"
            found.append(Finding(case=case.case_id, severity="fault", what=what, remedy=remedy))
    return found


# ---- files that are not listed


def _extra_files(data_set: RawDataSet) -> list[Finding]:
    root = data_set.root
    cases = (*data_set.cases, *data_set.misnamed)
    listed = {os.path.realpath(path) for case in cases for path in (case.image, case.label)}
    listed |= {os.path.realpath(path) for path in data_set.tests}
    # Hidden files, such as the AppleDouble files of macOS, are ignored.
    found = [
        path
        for folder in FOLDERS
        for path in _files(root / folder)
        if not path.name.startswith(".") and os.path.realpath(path) not in listed
    ]
    return [
        Finding(
            case=_below(root, path),
            severity="warning",
            what="not in dataset.json, so preprocess ignores it"
            if volume_stem(path)
            else "not a NIfTI volume: left over from an interrupted copy?",
            remedy="list it, or delete it",
        )
        for path in found
    ]


def _volumes(folder: Path) -> list[Path]:
    return [path for path in _files(folder) if volume_stem(path) is not None]


def _files(folder: Path) -> Iterable[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _below(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _fault(what: str, remedy: str) -> Finding:
    return Finding(case=FILE, severity="fault", what=what, remedy=remedy)


def _warning(what: str, remedy: str) -> Finding:
    return Finding(case=FILE, severity="warning", what=what, remedy=remedy)
