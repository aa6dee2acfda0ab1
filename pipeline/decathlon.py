"""A raw data set in the layout of the Medical Segmentation Decathlon: dataset.json and its pairs of files."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_cache.errors import DataSetError
from data_cache.reader import natural_order
from data_cache.schema import DataSetInfo

SUFFIXES = (".nii.gz", ".nii")
NO_CASE_ID = "does not name a case (letters, digits, . _ - and .nii or .nii.gz)"
RENAME = "rename it, in dataset.json too, or take it out"
SYNTHETIC_WORDS = ("phantom", "synthetic")
_CASE_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseFiles:
    """The files of one labelled case; ``image`` and ``label`` may be missing on disk."""

    case_id: str
    image: Path
    label: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class RawDataSet:
    """A Decathlon folder.

    Attributes:
        root: Folder of dataset.json.
        info: What dataset.json says of the data set.
        cases: What dataset.json lists under "training".
        tests: Images without labels, listed under "test".
        unlisted: Images in imagesTr that dataset.json does not name.
        misnamed: What it lists under "training" by an image whose name is no case id; ``case_id`` is that name.
    """

    root: Path
    info: DataSetInfo
    cases: tuple[CaseFiles, ...]
    tests: tuple[Path, ...]
    unlisted: tuple[Path, ...]
    misnamed: tuple[CaseFiles, ...] = ()


def read_data_set(root: Path) -> RawDataSet:
    """Parse ``root/dataset.json``.

    Raises:
        DataSetError: There is none, it does not list pairs of images and labels, or none of them names a case;
            lists every fault. Files that it lists need not exist: a missing one is its case's fault, not the
            data set's.
    """
    path = root / "dataset.json"
    content = _load(root, path)
    faults: list[str] = []
    listed = [case for entry in _entries(content, "training", faults) for case in _case(root, entry, faults)]
    cases = [case for case in listed if _names_a_case(case.image)]
    misnamed = [case for case in listed if not _names_a_case(case.image)]
    tests = [root / str(entry) for entry in _entries(content, "test", faults, required=False)]
    faults += _repeated_ids(cases)
    if not cases:
        faults += [f"{case.image} {NO_CASE_ID}: {RENAME}" for case in misnamed]
    if not cases and not faults:
        faults.append("lists no training case")
    if faults:
        raise DataSetError(f"{path}: " + "; ".join(faults))
    return RawDataSet(
        root=root,
        info=_info(content, root),
        cases=tuple(cases),
        tests=tuple(tests),
        unlisted=_unlisted(root, listed),
        misnamed=tuple(misnamed),
    )


def take_shard(data_set: RawDataSet, number: int, count: int) -> RawDataSet:
    """The ``number``-th of ``count`` parts of the cases: every ``count``-th in natural order, so that none is long.

    All parts together are the data set, whoever computes them, as long as dataset.json lists the same.
    """
    if not 1 <= number <= count:
        raise ValueError(f"a shard needs 1 <= number <= count, got {number}/{count}")
    ordered = sorted(data_set.cases, key=lambda case: natural_order(case.case_id))
    return replace(data_set, cases=tuple(ordered[number - 1 :: count]))


def volume_stem(path: Path) -> str | None:
    """The file's name without .nii or .nii.gz; None for other files and for AppleDouble litter (``._x``)."""
    if path.name.startswith("."):
        return None
    return next((path.name.removesuffix(s) for s in SUFFIXES if path.name.endswith(s)), None)


def _info(content: dict[str, Any], root: Path) -> DataSetInfo:
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


def _stated(content: dict[str, Any], *keys: str) -> str | None:
    """The first of these keys that says anything."""
    said = (str(content[key]).strip() for key in keys if content.get(key) is not None)
    return next(filter(None, said), None)


def _load(root: Path, path: Path) -> dict[str, Any]:
    if not root.is_dir():
        raise DataSetError(f"{root}: no such folder: name the folder that holds dataset.json and imagesTr")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataSetError(
            f"{root}: has no dataset.json: name the folder of a Decathlon task, such as Task03_Liver"
        ) from None
    except (OSError, ValueError) as failure:
        raise DataSetError(f"{path}: unreadable: {failure}") from failure
    if not isinstance(content, dict):
        raise DataSetError(f"{path}: holds a {type(content).__name__}, not an object")
    return content


def _entries(content: dict[str, Any], key: str, faults: list[str], *, required: bool = True) -> list[Any]:
    entries = content.get(key)
    if isinstance(entries, list):
        return entries
    if required or entries is not None:
        faults.append(f"{key!r} is no list of cases")
    return []


def _case(root: Path, entry: Any, faults: list[str]) -> list[CaseFiles]:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) for k in ("image", "label")):
        faults.append(f"{entry!r} has no image and label")
        return []
    image, label = root / entry["image"], root / entry["label"]
    return [CaseFiles(case_id=volume_stem(image) or image.name, image=image, label=label)]


def _names_a_case(image: Path) -> bool:
    stem = volume_stem(image)
    return stem is not None and _CASE_ID.fullmatch(stem) is not None and stem != "zarr.json"


def _repeated_ids(cases: list[CaseFiles]) -> list[str]:
    ids = [case.case_id for case in cases]
    return [f"lists the case {i!r} {ids.count(i)} times" for i in sorted(set(ids)) if ids.count(i) > 1]


def _unlisted(root: Path, cases: list[CaseFiles]) -> tuple[Path, ...]:
    folder = root / "imagesTr"
    if not folder.is_dir():
        return ()
    listed = {case.image.resolve() for case in cases}
    images = (path for path in sorted(folder.iterdir()) if volume_stem(path) is not None)
    return tuple(path for path in images if path.resolve() not in listed)
