"""Summarises a store without decoding voxels, and verifies it down to the last byte."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from data_cache.errors import CacheError
from data_cache.metadata_checksum import has_valid_checksum
from data_cache.reader import (
    METADATA,
    REBUILD,
    CacheStore,
    has_cases,
    natural_order,
    read_meta,
    read_schema,
)
from data_cache.schema import CacheSchema, CaseMeta, SourceFile


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseSummary:
    """One row in the table of a store; volumes are None without a label."""

    meta: CaseMeta
    liver_ml: float | None
    tumour_ml: float | None
    size_bytes: int


def summarise_store(store: CacheStore) -> list[CaseSummary]:
    """A summary of each case, in natural order; the liver's volume includes its tumours."""
    return [summarise_case(store, case_id) for case_id in store.case_ids]


def summarise_case(store: CacheStore, case_id: str) -> CaseSummary:
    """A case's volumes and its size on disk."""
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


# ---- verify


def verify_root(store: Path) -> tuple[str, ...]:
    """Faults of a store's own ``zarr.json``; raises CacheError if there is no cache at all."""
    try:
        read_schema(store)
    except CacheError as failure:
        if not has_cases(store):
            raise
        return (str(failure).removeprefix(f"{store / METADATA}: "),)
    return () if has_valid_checksum(store, alone=True) else (_CHANGED,)


def set_root_aside(store: Path) -> None:
    """Rename a damaged ``zarr.json`` of a store that has cases; ``preprocess`` then writes a new one."""
    with contextlib.suppress(FileNotFoundError):
        os.replace(store / METADATA, store / f".{METADATA}.damaged")


def cases_to_verify(store: Path, *, expected: Iterable[str] = ()) -> list[str]:
    """The folders of a store, whether or not they hold finished cases, and the cases that it should have."""
    folders = (path.name for path in store.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted({*folders, *expected}, key=natural_order)


def verify_case(
    store: Path, case_id: str, *, schema: CacheSchema, raw: Path | None = None
) -> tuple[str, ...]:
    """Faults of a case: each chunk is checked against its CRC, and all metadata against its checksum.

    Args:
        store: Folder of the store.
        case_id: One of ``cases_to_verify``.
        schema: Schema of the store, or the one that it will have.
        raw: Folder of the data set, to check the sha256 of the source files, too.
    """
    folder = store / case_id
    if not folder.exists():
        return ("missing from the cache",)
    meta, unreadable = _attempt(store, case_id)
    if meta is None:
        return (unreadable.removeprefix(f"{folder / METADATA}: ").removeprefix(f"{store}: "),)
    faults = [] if has_valid_checksum(folder) else [_CHANGED]
    if meta.spec_fingerprint != schema.fingerprint:
        faults.append(f"built with spec {meta.spec_fingerprint}, but the store has spec {schema.fingerprint}")
    faults += _view_faults(CacheStore(store, schema, {case_id: meta}), meta)
    if raw is not None:
        faults += [what for source in (meta.image, meta.label) for what in _source_faults(source, raw)]
    return tuple(faults)


_CHANGED = "metadata has changed since it was written: its checksum does not match"


def _attempt(store: Path, case_id: str) -> tuple[CaseMeta | None, str]:
    try:
        return read_meta(store, case_id), ""
    except CacheError as failure:
        return None, str(failure)


def _view_faults(store: CacheStore, meta: CaseMeta) -> list[str]:
    has_liver = meta.voxel_counts is not None and any(meta.voxel_counts[1:])
    faults = [f"the {v} view is missing" for v in ("scan", *["liver"] * has_liver) if v not in meta.boxes]
    for view in meta.boxes:
        try:
            store.read(meta.case_id, view)
        except CacheError as failure:
            what = str(failure).removeprefix(f"{store.path / meta.case_id}{os.sep}")
            faults.append(what.removesuffix(f": {REBUILD}"))
    return faults


def _source_faults(source: SourceFile | None, raw: Path) -> list[str]:
    if source is None:
        return []
    fault = source.fault(raw / source.path, by_content=True)
    return [] if fault is None else [f"{source.path}: {fault}"]
