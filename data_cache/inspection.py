"""Describe a store: what a person wants to know of its cases, without decoding a voxel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_cache.reader import CacheStore
from data_cache.schema import CaseMeta


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseSummary:
    """One row of the table of a store; volumes are None without a label."""

    meta: CaseMeta
    liver_ml: float | None
    tumour_ml: float | None
    size_bytes: int


def summarise_store(store: CacheStore) -> list[CaseSummary]:
    """A summary of each case, in natural order; the liver's volume includes its tumours."""
    return [summarise_case(store, case_id) for case_id in store.case_ids]


def summarise_case(store: CacheStore, case_id: str) -> CaseSummary:
    """A case's volumes, and what it takes on disk."""
    meta = store.meta(case_id)
    liver, tumour = meta.volume_ml(1), meta.volume_ml(2)
    return CaseSummary(
        meta=meta,
        liver_ml=None if liver is None or tumour is None else liver + tumour,
        tumour_ml=tumour,
        size_bytes=_size_bytes(store.path / case_id),
    )


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
