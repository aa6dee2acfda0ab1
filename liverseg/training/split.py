"""Which cases train and which validate: split by a hash, and recorded in the run's folder."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict

from data_cache.errors import ConfigError, RunError
from data_cache.files import json_checksum, read_json, write_json
from data_cache.reader import CacheStore
from data_cache.records import STRICT, parse, to_json
from data_cache.text import pluralise
from liverseg.training.config import DataConfig

SPLIT = "split.json"
CHECKSUM = "checksum"
_RESTORE = "restore it from a backup, or train again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Case IDs of a run, and what identifies its training images in any other cache.

    Attributes:
        train_sha256: Of each training image's file.
        train_voxels: SHA-256 of its voxels as they are cached: the same scan unzipped, or compressed anew, is another
            file. Empty in runs of earlier versions.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    train: tuple[str, ...]
    val: tuple[str, ...]
    train_sha256: tuple[str, ...]
    train_voxels: tuple[str, ...] = ()

    @property
    def trained_on(self) -> frozenset[str]:
        """Everything that identifies a training image; see ``image_identity``."""
        return frozenset((*self.train_sha256, *self.train_voxels))


def image_identity(store: CacheStore, case_id: str) -> frozenset[str]:
    """SHA-256 of a case's image file and of its voxels; two images with either in common are one scan."""
    return frozenset((store.meta(case_id).image.sha256, _voxels_sha256(store, case_id)))


def _voxels_sha256(store: CacheStore, case_id: str) -> str:
    return hashlib.sha256(store.read(case_id, "scan").image_zyx.tobytes()).hexdigest()


def same_images(store: CacheStore, split: Split) -> list[tuple[str, str]]:
    """Validation cases whose scan is trained on under another name, each with that name."""
    by_identity = {part: case_id for case_id in split.train for part in image_identity(store, case_id)}
    found = [(case_id, image_identity(store, case_id)) for case_id in split.val if case_id not in split.train]
    return [
        (i, by_identity[min(parts & by_identity.keys())]) for i, parts in found if parts & by_identity.keys()
    ]


def make_split(store: CacheStore, config: DataConfig, *, seed: int) -> Split:
    """Split the labelled cases of a store, or take those that the configuration names or lists in a file.

    Raises:
        ConfigError: The file cannot be read, a named case is not in the store, or there are too few cases to train
            and validate.
    """
    labelled = [case_id for case_id in store.case_ids if store.meta(case_id).label is not None]
    named = _named(config)
    if named is not None:
        train, val = named.train, named.val
        unknown = sorted({*train, *val} - set(labelled))
        if unknown:
            raise ConfigError(f"{store.path}: has no labelled case {', '.join(unknown)}")
        overlap = _overlap_faults(train, val)
        if overlap:
            raise ConfigError(
                f"data.split: {overlap[0]}: list it once, or its validation score means nothing"
            )
    else:
        train, val = map(tuple, k_fold_split(labelled, folds=config.folds, fold=config.fold, seed=seed))
    if named is not None and not (train and val):
        raise ConfigError(
            f"data.split: {config.split}: lists no case to {'validate' if train else 'train'} on"
        )
    if not train or not val:
        raise ConfigError(_too_few(store, labelled, config))
    return Split(
        train=tuple(train),
        val=tuple(val),
        train_sha256=tuple(store.meta(case_id).image.sha256 for case_id in train),
        train_voxels=tuple(_voxels_sha256(store, case_id) for case_id in train),
    )


def _too_few(store: CacheStore, labelled: Sequence[str], config: DataConfig) -> str:
    have = f"{store.path}: has {pluralise(len(labelled), 'labelled case')}"
    if not labelled:
        return f"{have}, and training needs at least 2: build them with liverseg preprocess"
    # Every folds-th case validates, starting with the fold-th: that case must exist, and another one to train on.
    needed = max(2, config.fold + 1)
    by_hand = f"--set 'data.train_cases=[\"{labelled[0]}\"]' --set 'data.val_cases=[\"{labelled[-1]}\"]'"
    return (
        f"{have}, and fold {config.fold} of {config.folds} needs at least {needed}: add cases, lower data.fold, "
        f"or name the cases yourself, such as {by_hand} (a case may be in both)"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Named:
    """Case IDs given by a user."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    train: tuple[str, ...]
    val: tuple[str, ...]


def _named(config: DataConfig) -> _Named | None:
    if config.split is not None:
        return _read_named(Path(config.split), fold=config.fold)
    if config.train_cases:
        return _Named(train=config.train_cases, val=config.val_cases or config.train_cases)
    return None


def _read_named(path: Path, *, fold: int) -> _Named:
    """A ``split.json``, or one fold of nnU-Net's ``splits_final.json``, a list of folds."""
    try:
        content = read_json(path)
    except (OSError, ValueError) as failure:
        raise ConfigError(f"data.split: {path}: unreadable: {failure}") from failure
    if isinstance(content, list):
        if fold >= len(content):
            raise ConfigError(
                f"data.split: {path}: has {pluralise(len(content), 'fold')}, counted from 0, and no fold {fold}"
            )
        content = content[fold]
    if isinstance(content, dict):
        # Hashes are taken from the store, so that the file may also be written by hand.
        content = {
            key: value
            for key, value in content.items()
            if key not in ("train_sha256", "train_voxels", CHECKSUM)
        }
    return parse(_Named, content, source=f"data.split: {path}", error=ConfigError)


def k_fold_split(case_ids: Sequence[str], *, folds: int, fold: int, seed: int) -> tuple[list[str], list[str]]:
    """Training and validation IDs: cases are ordered by a hash of seed and ID, and every ``folds``-th validates."""
    shuffled = sorted(case_ids, key=lambda i: hashlib.sha256(f"{seed}/{i}".encode()).digest())
    val = set(shuffled[fold::folds])
    return [i for i in case_ids if i not in val], [i for i in case_ids if i in val]


def save_split(split: Split, run: Path) -> None:
    """Write ``split.json`` with a checksum of its content."""
    content = to_json(split)
    write_json(run / SPLIT, {**content, CHECKSUM: json_checksum(content)})


def load_split(run: Path) -> Split:
    """Read ``split.json``.

    It decides which cases count as never trained on, so that a single flipped bit must not go unnoticed.

    Raises:
        RunError: It is missing or damaged, or contradicts itself.
    """
    path = run / SPLIT
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise RunError(f"{path}: missing: {run} is not the folder of a training run") from None
    except (OSError, ValueError) as failure:
        raise RunError(f"{path}: unreadable ({failure}): {_RESTORE}") from failure
    checksum = content.pop(CHECKSUM, None) if isinstance(content, dict) else None
    split = parse(Split, content, source=str(path), error=RunError)
    if checksum != json_checksum(content):
        raise RunError(f"{path}: its checksum does not match its content: {_RESTORE}")
    faults = [*_hash_faults(split), *_overlap_faults(split.train, split.val)]
    if faults:
        raise RunError(f"{path}: {'; '.join(faults)}: {_RESTORE}")
    return split


def check_trained_on(split: Split, store: CacheStore) -> None:
    """Check that a store, from which a run is to continue, has the very images that the run was started with.

    Raises:
        RunError: A case is missing, or is another image of the same name.
    """
    missing = sorted({*split.train, *split.val} - set(store.case_ids))
    if missing:
        raise RunError(f"{store.path}: lacks {', '.join(missing)}, which the run was started with")
    known = zip(split.train, split.train_sha256, strict=True)
    changed = [case_id for case_id, sha256 in known if store.meta(case_id).image.sha256 != sha256]
    if changed:
        raise RunError(
            f"{store.path}: the image of {', '.join(changed)} is not the one that the run was started with (its sha256 "
            "differs): name the cache that the run was started with, or start a new run"
        )


def _hash_faults(split: Split) -> list[str]:
    if len(split.train_sha256) != len(split.train):
        return [f"expected {len(split.train)} hashes in train_sha256, found {len(split.train_sha256)}"]
    if len(split.train_voxels) not in (0, len(split.train)):
        return [f"expected {len(split.train)} hashes in train_voxels, found {len(split.train_voxels)}"]
    wrong = [sha256 for sha256 in split.trained_on if not re.fullmatch("[0-9a-f]{64}", sha256)]
    return [f"hashes of training images: expected 64 hexadecimal digits, found {wrong[0]!r}"] if wrong else []


def _overlap_faults(train: Sequence[str], val: Sequence[str]) -> list[str]:
    """Equal lists are fine: a network may be made to memorise its cases on purpose."""
    both = [case_id for case_id in val if case_id in set(train)]
    return [f"{', '.join(both)} both trains and validates"] if both and set(train) != set(val) else []


def together(splits: Sequence[Split]) -> Split:
    """The split of an ensemble: trained on is what any member was trained on; the rest is that of the first."""
    files = dict.fromkeys(sha256 for split in splits for sha256 in split.train_sha256)
    voxels = dict.fromkeys(sha256 for split in splits for sha256 in split.train_voxels)
    return replace(splits[0], train_sha256=tuple(files), train_voxels=tuple(voxels))
