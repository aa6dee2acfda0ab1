"""dataset.json in its dialects, the Decathlon's, nnU-Net's and MONAI's: which files it lists, what its labels mean."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

from data_cache.errors import DataSetError
from data_cache.files import read_json
from data_cache.text import pluralise
from pipeline.names import CHANNEL, SUFFIXES, other_names, volume_stem

FILE = "dataset.json"
WANTED = {0: "background", 1: "liver", 2: "tumour"}
TUMOUR_WORDS = ("cancer", "tumor", "tumour", "lesion", "metasta")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """An image and its label, where they lie; either may be missing on disk.

    Attributes:
        key: The case's name in dataset.json, where cases have one.
    """

    image: Path
    label: Path
    key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What a dataset.json lists.

    Attributes:
        content: The file as it is.
        pairs: Labelled cases.
        tests: Images without labels.
        faults: Entries that cannot be understood.
        notes: What was read otherwise than it is written, and label names that are not liver and tumour.
    """

    content: Mapping[str, Any]
    pairs: tuple[Pair, ...]
    tests: tuple[Path, ...]
    faults: tuple[str, ...]
    notes: tuple[str, ...]


def read_listing(root: Path) -> Listing:
    """Parse ``root/dataset.json``.

    The Decathlon and nnU-Net 1 list pairs under "training"; MONAI also some under "validation", with lists of one image;
    nnU-Net 2 lists nothing, or cases under "dataset": then the folders say what there is.

    Raises:
        DataSetError: There is no such file, or it is not a JSON object.
    """
    content = load_content(root)
    faults: list[str] = []
    if content.get("training") is None and isinstance(content.get("dataset"), dict):
        pairs = list(_keyed_pairs(root, content["dataset"], faults))
    elif content.get("training") is None and _is_nnunet(content):
        pairs = list(_pairs_in_folders(root, content, faults))
    else:
        pairs = list(_listed_pairs(root, content, faults))
    tests = list(_listed_tests(root, content, faults))
    if "test" not in content and _is_nnunet(content):
        tests = [path for path in _volumes(root / "imagesTs") if _is_first_channel(path)]
    moved: list[str] = []
    found = tuple(
        replace(pair, image=_on_disk(root, pair.image, moved), label=_on_disk(root, pair.label, moved))
        for pair in pairs
    )
    notes = list(_unlike_ours(content))
    if moved:
        notes.append(f"{pluralise(len(moved), 'listed file')} read under another name: {moved[0]}")
    return Listing(
        content=content,
        pairs=found,
        tests=tuple(_on_disk(root, path, []) for path in tests),
        faults=tuple(faults),
        notes=tuple(notes),
    )


def load_content(root: Path) -> dict[str, Any]:
    """``root/dataset.json`` as it is, in UTF-8, with a byte order mark or without, or in UTF-16.

    Raises:
        DataSetError: There is no such file, or it is not a JSON object.
    """
    path = root / FILE
    if not root.is_dir():
        raise DataSetError(f"{root}: no such folder: name the folder that holds dataset.json and imagesTr")
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise DataSetError(f"{root}: has no dataset.json{_where_it_is(root)}") from None
    except (OSError, ValueError) as failure:
        raise DataSetError(f"{path}: unreadable: {failure}") from failure
    if not isinstance(content, dict):
        raise DataSetError(f"{path}: holds a {type(content).__name__}, not an object")
    return content


def _where_it_is(root: Path) -> str:
    inside = sorted(folder for folder in root.iterdir() if (folder / FILE).is_file())
    if inside:
        return f": it is in {inside[0]}: name that folder"
    if (root.parent / FILE).is_file():
        return f": it is in {root.parent}: name that folder"
    return ": name the folder of a Decathlon task, such as Task03_Liver, or of an nnU-Net raw data set"


# ---- labels


def _unlike_ours(content: Mapping[str, Any]) -> Iterator[str]:
    """How the label names differ from 0 background, 1 liver, 2 tumour (the Decathlon says cancer)."""
    meanings = label_meanings(content)
    if meanings == WANTED:
        return
    said = "no label names" if meanings is None else _listed(meanings)
    yield (
        f"{FILE} has {said}; expected 0 background, 1 liver, 2 cancer: make sure that 1 is liver and 2 is tumour in the files"
    )


def _listed(meanings: Mapping[int, str]) -> str:
    return "the labels " + ", ".join(f"{value} {name}" for value, name in sorted(meanings.items()))


def label_meanings(content: Mapping[str, Any]) -> dict[int, str] | None:
    """What each value of a label file means: "background", "liver", "tumour" or the listed name; None if unsaid.

    ``{"1": "liver"}`` is the Decathlon's way, ``{"liver": 1}`` nnU-Net's, where a region is ``{"liver": [1, 2]}``; a list
    names 0, 1, 2 and so on.
    """
    labels = content.get("labels")
    if isinstance(labels, list) and all(isinstance(name, str) for name in labels):
        labels = {str(value): name for value, name in enumerate(labels)}
    if not isinstance(labels, dict) or not labels:
        return None
    meanings: dict[int, str] = {}
    # The smallest region first: of "liver" [1, 2] and "tumour" 2, what is left of the liver is 1.
    for key, value in sorted(labels.items(), key=lambda item: _extent(item[1])):
        number = _number(key)
        if number is not None:
            meanings[number] = _meaning(str(value))
            continue
        for number in map(_number, value if isinstance(value, list) else [value]):
            if number is not None:
                meanings.setdefault(number, _meaning(str(key)))
    return meanings


def swapped_labels(content: Mapping[str, Any]) -> str | None:
    """The fault of a data set whose liver is 2 or whose tumour is 1; None for any other."""
    meanings = label_meanings(content) or {}
    if meanings.get(1) != "tumour" and meanings.get(2) != "liver":
        return None
    listed = ", ".join(f"{value} {name}" for value, name in sorted(meanings.items()))
    return (
        f"liver and tumour are swapped: labels are {listed}; expected 1 liver and 2 tumour: swap the values in every "
        "label file, or correct the names"
    )


def _number(value: object) -> int | None:
    """A label's value, however it is spelled: 2, 2.0, "2", " 2 "; None for anything else, such as "²" or 1000 digits."""
    number = re.fullmatch(r"\s*([-+]?[0-9]{1,18})(\.0*)?\s*", str(value))
    return None if number is None else int(number[1])


def _extent(value: object) -> int:
    return len(value) if isinstance(value, list) else 1


def _meaning(name: str) -> str:
    name = name.lower()
    if any(word in name for word in TUMOUR_WORDS):  # before the liver: "liver tumour"
        return "tumour"
    return next((known for known in ("background", "liver") if known in name), name)


# ---- files


def _is_nnunet(content: Mapping[str, Any]) -> bool:
    return any(key in content for key in ("file_ending", "channel_names", "numTraining"))


def _listed_pairs(root: Path, content: Mapping[str, Any], faults: list[str]) -> Iterator[Pair]:
    for entry in _entries(content, "training", faults, required=True):
        yield from _pair(root, entry, entry, faults)
    for entry in _entries(content, "validation", faults):
        yield from _pair(root, entry, entry, faults)


def _keyed_pairs(root: Path, cases: Mapping[str, Any], faults: list[str]) -> Iterator[Pair]:
    for case_id, entry in cases.items():
        named = (
            {"image": entry.get("images"), "label": entry.get("label")} if isinstance(entry, dict) else entry
        )
        for pair in _pair(root, named, {case_id: entry}, faults):
            yield replace(pair, key=case_id.strip())


def _pairs_in_folders(root: Path, content: Mapping[str, Any], faults: list[str]) -> Iterator[Pair]:
    ending = str(content.get("file_ending", SUFFIXES[0])).strip()
    ending = ending if ending.startswith(".") else f".{ending}"
    if ending.lower() not in SUFFIXES:
        faults.append(f"file_ending is {ending!r}: expected .nii.gz or .nii: convert the files")
        return
    channels = content.get("channel_names", content.get("modality", {}))
    if isinstance(channels, dict) and len(channels) > 1:
        faults.append(f"lists {len(channels)} channels: expected one, CT")
    for label in _volumes(root / "labelsTr"):
        image = root / "imagesTr" / f"{volume_stem(label)}{CHANNEL}{ending}"
        yield Pair(image=image, label=label)


def _listed_tests(root: Path, content: Mapping[str, Any], faults: list[str]) -> Iterator[Path]:
    for entry in _entries(content, "test", faults):
        name = _single(entry.get("image") if isinstance(entry, dict) else entry)
        if name is None:
            faults.append(f"{entry!r} under 'test' does not name an image")
        else:
            yield root / name


def _entries(content: Mapping[str, Any], key: str, faults: list[str], *, required: bool = False) -> list[Any]:
    entries = content.get(key)
    if isinstance(entries, list):
        return entries
    if required or entries is not None:
        faults.append(f"{key!r} is not a list of cases")
    return []


def _pair(root: Path, entry: Any, shown: Any, faults: list[str]) -> Iterator[Pair]:
    names = [_single(entry.get(key)) for key in ("image", "label")] if isinstance(entry, dict) else []
    if len(names) != 2 or None in names:
        faults.append(f"{shown!r} does not name one image and one label")
        return
    image, label = (root / str(name) for name in names)
    yield Pair(image=image, label=label)


def _single(value: Any) -> str | None:
    """A file's name, or the one name in a list; None for anything else, such as a name with a NUL, which no file has."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) and value.strip() and "\0" not in value else None


def _on_disk(root: Path, path: Path, moved: list[str]) -> Path:
    """The listed file, or the one that lies there in its place; ``moved`` gets a line about the latter."""
    if os.path.exists(path):  # not Path.exists, which raises on a name that is too long
        return path
    meant = list(_meant(root, path))
    there = next((p for m in meant for p in (m, *other_names(m)) if os.path.exists(p)), None)
    if there is None:
        return next((m for m in meant if os.path.isdir(m.parent)), next(iter(meant), path))
    moved.append(f"{_below(root, path)} is {_below(root, there)}")
    return there


def _meant(root: Path, path: Path) -> Iterator[Path]:
    """What a listed path may mean: itself, one of Windows, one with spaces around it, or, of another machine, its end."""
    listed = PureWindowsPath(_below(root, path).strip())  # which takes both separators
    if not path.is_relative_to(root):
        yield path
    parts = listed.parts[1:] if listed.anchor else listed.parts
    # The folder and the name at least: a name alone may be both the image's and the label's.
    for first in range(max(1, len(parts) - 1)):
        end = parts[first:]
        if end and (".." not in end or (first == 0 and not listed.anchor)):
            yield root.joinpath(*end)


def _below(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _volumes(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if volume_stem(p) is not None) if folder.is_dir() else []


def _is_first_channel(path: Path) -> bool:
    return str(volume_stem(path)).endswith(CHANNEL)
