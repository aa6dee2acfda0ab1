"""Which cases train and which validate: split by a hash, and recorded in the run's folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict

from data_cache.errors import ConfigError, RunError
from data_cache.files import write_json
from data_cache.reader import CacheStore
from data_cache.records import STRICT, parse, to_json
from data_cache.text import pluralise
from liverseg.training.config import DataConfig

SPLIT = "split.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Case IDs of a run, and the sha256 of each training image, which identifies it in any other cache."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    train: tuple[str, ...]
    val: tuple[str, ...]
    train_sha256: tuple[str, ...]


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
    else:
        train, val = map(tuple, k_fold_split(labelled, folds=config.folds, fold=config.fold, seed=seed))
    if named is not None and not (train and val):
        raise ConfigError(
            f"data.split: {config.split}: lists no case to {'validate' if train else 'train'} on"
        )
    if not train or not val:
        raise ConfigError(_too_few(store, labelled, config))
    sha256 = tuple(store.meta(case_id).image.sha256 for case_id in train)
    return Split(train=tuple(train), val=tuple(val), train_sha256=sha256)


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
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as failure:
        raise ConfigError(f"data.split: {path}: unreadable: {failure}") from failure
    if isinstance(content, list):
        if fold >= len(content):
            raise ConfigError(
                f"data.split: {path}: has {pluralise(len(content), 'fold')}, counted from 0, and no fold {fold}"
            )
        content = content[fold]
    if isinstance(content, dict):
        # Checksums are taken from the store, so that the file may also be written by hand.
        content.pop("train_sha256", None)
    return parse(_Named, content, source=f"data.split: {path}", error=ConfigError)


def k_fold_split(case_ids: Sequence[str], *, folds: int, fold: int, seed: int) -> tuple[list[str], list[str]]:
    """Training and validation IDs: cases are ordered by a hash of seed and ID, and every ``folds``-th validates."""
    shuffled = sorted(case_ids, key=lambda i: hashlib.sha256(f"{seed}/{i}".encode()).digest())
    val = set(shuffled[fold::folds])
    return [i for i in case_ids if i not in val], [i for i in case_ids if i in val]


def save_split(split: Split, run: Path) -> None:
    """Write ``split.json``."""
    write_json(run / SPLIT, to_json(split))


def load_split(run: Path) -> Split:
    """Read ``split.json``; raises RunError if it is missing or damaged."""
    path = run / SPLIT
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(f"{path}: missing: {run} is not the folder of a training run") from None
    except (OSError, ValueError) as failure:
        raise RunError(f"{path}: unreadable: {failure}") from failure
    return parse(Split, content, source=str(path), error=RunError)


def together(splits: Sequence[Split]) -> Split:
    """The split of an ensemble: trained on is what any member was trained on; the rest is that of the first."""
    hashes = dict.fromkeys(sha256 for split in splits for sha256 in split.train_sha256)
    return replace(splits[0], train_sha256=tuple(hashes))
