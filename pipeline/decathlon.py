"""A raw data set in the layout of the Medical Segmentation Decathlon or of nnU-Net: its cases and their files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_cache.errors import DataSetError
from data_cache.reader import natural_order
from data_cache.schema import DataSetInfo
from pipeline.dialects import FILE, Pair, read_listing, swapped_labels
from pipeline.names import CHANNEL, volume_stem

NO_CASE_ID = "is not a case name: expected letters, digits, . _ - (at most 150) and .nii or .nii.gz"
RENAME = "rename it, also in dataset.json, or remove it"
SYNTHETIC_WORDS = ("phantom", "synthetic")
# At most as long as a folder's name can be, with all that the cache adds to it while a case is being written.
_CASE_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,149}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseFiles:
    """The files of one labelled case; ``image`` and ``label`` may be missing on disk."""

    case_id: str
    image: Path
    label: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class RawDataSet:
    """A folder in the layout of the Decathlon or of nnU-Net.

    Attributes:
        root: Folder of dataset.json.
        info: What dataset.json says of the data set.
        cases: Labelled cases.
        tests: Images without labels.
        unlisted: Images in imagesTr that dataset.json does not name.
        misnamed: Labelled cases whose image's name is not a case id; ``case_id`` is that name.
        notes: What was read otherwise than dataset.json says, and label names that are not liver and tumour.
    """

    root: Path
    info: DataSetInfo
    cases: tuple[CaseFiles, ...]
    tests: tuple[Path, ...]
    unlisted: tuple[Path, ...]
    misnamed: tuple[CaseFiles, ...] = ()
    notes: tuple[str, ...] = ()


def read_data_set(root: Path) -> RawDataSet:
    """Parse ``root/dataset.json``, in any of the dialects that ``pipeline.dialects`` knows.

    Raises:
        DataSetError: There is none, it does not list pairs of images and labels, none of them names a case, or liver and
            tumour are swapped; the message lists every fault. Files that it lists need not exist: a missing one is its
            case's fault, not the data set's.
    """
    listing = read_listing(root)
    listed = [_case(pair) for pair in listing.pairs]
    in_folders = _named_after_folders(listed)
    notes = listing.notes
    if in_folders:
        name = listed[0].image.name
        notes = (
            *notes,
            f"cases are named after their folders, such as {in_folders[0].case_id} for its {name}",
        )
        listed = in_folders
    cases = [case for case in listed if _names_a_case(case)]
    misnamed = [case for case in listed if not _names_a_case(case)]
    swapped = swapped_labels(listing.content)
    faults = [*listing.faults, *_repeated_ids(cases), *([swapped] if swapped else [])]
    if not cases:
        faults += [f"{case.image} {NO_CASE_ID}: {RENAME}" for case in misnamed]
    if not cases and not faults:
        faults.append("lists no training case")
    if faults:
        raise DataSetError(f"{root / FILE}: " + "; ".join(faults))
    return RawDataSet(
        root=root,
        info=_info(listing.content, root),
        cases=tuple(cases),
        tests=listing.tests,
        unlisted=_unlisted(root, listed),
        misnamed=tuple(misnamed),
        notes=notes,
    )


def take_shard(data_set: RawDataSet, number: int, count: int) -> RawDataSet:
    """The ``number``-th of ``count`` parts of the cases: every ``count``-th in natural order, so that none is long.

    All parts together are the data set, whoever computes them, as long as dataset.json lists the same.
    """
    if not 1 <= number <= count:
        raise ValueError(f"a shard needs 1 <= number <= count, got {number}/{count}")
    ordered = sorted(data_set.cases, key=lambda case: natural_order(case.case_id))
    return replace(data_set, cases=tuple(ordered[number - 1 :: count]))


def _info(content: Mapping[str, Any], root: Path) -> DataSetInfo:
    name, description = _stated(content, "name"), _stated(content, "description")
    said = f"{name} {description}".lower()
    return DataSetInfo(
        name=root.name if name is None else name,
        licence=_stated(
            content, "licence", "license"
        ),  # the Decathlon spells it the British way, nnU-Net both
        description=description,
        phantom=any(word in said for word in SYNTHETIC_WORDS),
    )


def _stated(content: Mapping[str, Any], *keys: str) -> str | None:
    """The first of these keys that says anything."""
    said = (str(content[key]).strip() for key in keys if content.get(key) is not None)
    return next(filter(None, said), None)


def _case(pair: Pair) -> CaseFiles:
    """A pair with its case id: its key, or else the image's name, without nnU-Net's channel where the label has none."""
    if pair.key is not None and _CASE_ID.fullmatch(pair.key):
        return CaseFiles(case_id=pair.key, image=pair.image, label=pair.label)
    stem = volume_stem(pair.image) or pair.image.name
    plain = stem.removesuffix(CHANNEL)
    return CaseFiles(
        case_id=plain if plain == volume_stem(pair.label) else stem, image=pair.image, label=pair.label
    )


def _names_a_case(case: CaseFiles) -> bool:
    is_id = _CASE_ID.fullmatch(case.case_id) is not None and case.case_id != "zarr.json"
    return is_id and volume_stem(case.image) is not None


def _named_after_folders(cases: list[CaseFiles]) -> list[CaseFiles]:
    """The cases named after the folders of their files, ``patient/ct.nii.gz``, if the files' names repeat; else none."""
    repeated = len({case.case_id for case in cases}) < len(cases)
    named = [replace(case, case_id=case.image.parent.name) for case in cases]
    are_ids = len({case.case_id for case in named}) == len(named) and all(map(_names_a_case, named))
    alike = all(case.label.parent.name == case.case_id for case in named)  # not imagesTr and labelsTr
    return named if repeated and are_ids and alike else []


def _repeated_ids(cases: list[CaseFiles]) -> list[str]:
    ids = [case.case_id for case in cases]
    return [
        f"lists the case {i!r} {ids.count(i)} times: list each once, and give each image a name of its own"
        for i in sorted(set(ids))
        if ids.count(i) > 1
    ]


def _unlisted(root: Path, cases: list[CaseFiles]) -> tuple[Path, ...]:
    folder = root / "imagesTr"
    if not folder.is_dir():
        return ()
    # Not Path.resolve, which raises on a loop of links.
    listed = {os.path.realpath(case.image) for case in cases}
    images = (path for path in sorted(folder.iterdir()) if volume_stem(path) is not None)
    return tuple(path for path in images if os.path.realpath(path) not in listed)
