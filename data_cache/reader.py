"""Reads a store: opens it once, keeps the handles, and checks everything that it reads."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import zarr
from numpy.typing import NDArray

from data_cache.errors import CacheError, SchemaError
from data_cache.files import read_json, write_text
from data_cache.metadata_checksum import METADATA as METADATA
from data_cache.metadata_checksum import has_valid_checksum
from data_cache.schema import CacheSchema, CaseMeta, View

REBUILD_MARK = "rebuild.txt"  # in a case's folder: lists its faults, so that preprocess rebuilds it
REBUILD = "run liverseg verify, which marks the case, and then liverseg preprocess, which rebuilds it"
_OTHER_FOLDER = "name another folder, or, if it is a cache, run liverseg verify"


def read_schema(store: Path) -> CacheSchema:
    """The schema of a store; raises CacheError if there is no store or its metadata is damaged."""
    if not store.exists():
        raise CacheError(f"{store}: no such folder: build the cache with liverseg preprocess")
    return CacheSchema.from_json(_attributes(store, remedy=_OTHER_FOLDER), source=str(store / METADATA))


def read_meta(store: Path, case_id: str) -> CaseMeta:
    """A case's metadata; raises CacheError if there is no such case."""
    if not (store / case_id / METADATA).exists():
        raise CacheError(f"{store}: has no case {case_id!r}: liverseg inspect lists the cases")
    meta = CaseMeta.from_json(
        _attributes(store / case_id, remedy=REBUILD), source=str(store / case_id / METADATA)
    )
    if meta.case_id != case_id:
        raise SchemaError(f"{store / case_id}: contains case {meta.case_id!r}: rename the folder to match")
    return meta


def mark_for_rebuild(store: Path, case_id: str, faults: Sequence[str]) -> None:
    """Have the next ``preprocess`` rebuild a case, which removes the mark; until then the case stays readable.

    The case is neither moved nor deleted: if its source files are damaged, too, it is all that is left.
    """
    write_text(store / case_id / REBUILD_MARK, "\n".join(faults) + "\n")


def is_marked(store: Path, case_id: str) -> bool:
    """Whether a case is marked for a rebuild."""
    return (store / case_id / REBUILD_MARK).exists()


def list_cases(store: Path) -> tuple[str, ...]:
    """IDs of the finished cases, in natural order (liver_2 before liver_10)."""
    found = (p.name for p in store.iterdir() if not p.name.startswith(".") and (p / METADATA).exists())
    return tuple(sorted(found, key=natural_order))


def has_cases(store: Path) -> bool:
    """Whether a folder contains a finished case, even if the metadata of its root is damaged or missing."""
    if not store.is_dir():
        return False
    for case_id in list_cases(store):
        with contextlib.suppress(CacheError):
            read_meta(store, case_id)
            return True
    return False


def natural_order(name: str) -> list[tuple[int, str]]:
    """A sort key that puts liver_2 before liver_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def _attributes(folder: Path, *, remedy: str) -> Any:
    path = folder / METADATA
    try:
        node = read_json(path)
        return node["attributes"]["liverseg"]
    except FileNotFoundError:
        raise CacheError(f"{folder}: not a liverseg cache: {METADATA} is missing") from None
    except (OSError, ValueError) as failure:
        raise CacheError(f"{path}: cannot be read ({failure}): {remedy}") from failure
    except (KeyError, TypeError):
        raise CacheError(f"{path}: lacks what liverseg preprocess writes: {remedy}") from None


def _read_unchanged_meta(store: Path, case_id: str) -> CaseMeta:
    """``read_meta``, compared with its checksum: 0.3 ms."""
    meta = read_meta(store, case_id)
    # Twice, since another process may be replacing the case right now.
    if not any(has_valid_checksum(store / case_id) for _ in range(2)):
        raise CacheError(_changed(store, case_id))
    return meta


def _changed(store: Path, what: str) -> str:
    return f"{store}: metadata has changed since it was written ({what}): {REBUILD}"


class CacheStore:
    """An open cache. The metadata of all cases is read once; voxels are read on demand.

    Attributes:
        path: Folder of the store.
        schema: The schema that it was built with.
        case_ids: Finished cases in natural order, without the damaged ones.
        damaged: What is wrong with the metadata of each damaged case, in natural order.
    """

    def __init__(
        self,
        path: Path,
        schema: CacheSchema,
        metas: dict[str, CaseMeta],
        damaged: Mapping[str, CacheError] = MappingProxyType({}),
    ) -> None:
        self.path = path
        self.schema = schema
        self.case_ids = tuple(metas)
        self.damaged = damaged
        self._metas = metas
        self._arrays: dict[str, zarr.Array[Any]] = {}

    @classmethod
    def open(cls, path: Path, *, skip_damaged: bool = False) -> Self:
        """Open a store.

        Args:
            path: Its folder.
            skip_damaged: Open it without the cases whose metadata is damaged, which the caller must report.

        Raises:
            CacheError: There is no store, or metadata cannot be parsed or does not match its checksum.
        """
        schema = read_schema(path)
        if not has_valid_checksum(path, alone=True):
            raise CacheError(_changed(path, METADATA))
        metas, damaged = dict[str, CaseMeta](), dict[str, CacheError]()
        for case_id in list_cases(path):
            try:
                metas[case_id] = _read_unchanged_meta(path, case_id)
            except CacheError as failure:
                damaged[case_id] = failure
        store = cls(path, schema, metas, damaged)
        if not skip_damaged:
            store.require_sound(damaged)
        return store

    def require_sound(self, case_ids: Collection[str]) -> None:
        """Raise CacheError if the metadata of one of these cases is damaged."""
        bad = [case_id for case_id in self.damaged if case_id in case_ids]
        if len(bad) == 1:
            raise self.damaged[bad[0]]
        if bad:
            what = f"{', '.join(bad[:8])}{', …' if len(bad) > 8 else ''}"
            raise CacheError(f"{self.path}: {len(bad)} cases are damaged ({what}): {REBUILD}")

    def meta(self, case_id: str) -> CaseMeta:
        """A case's metadata; raises CacheError if the case is damaged or the store does not have it."""
        self.require_sound((case_id,))
        if case_id not in self._metas:
            known = ", ".join(self.case_ids[:8]) + (", …" if len(self.case_ids) > 8 else "")
            raise CacheError(f"{self.path}: has no case {case_id!r}; it has {known or 'no finished case'}")
        return self._metas[case_id]

    def read(self, case_id: str, view: str) -> View:
        """One view of a case; every chunk is checked against its CRC.

        Raises:
            CacheError: The case or view does not exist, a chunk is missing, or bytes do not match their checksum.
        """
        meta, shape_zyx = self.meta(case_id), self.schema.spec.shape_zyx
        if view not in meta.boxes:
            raise CacheError(
                f"{self.path}: case {case_id} has no {view!r} view; it has {', '.join(meta.boxes)}"
            )
        return View(
            image_zyx=self._read_array(f"{case_id}/{view}/image", np.int16, shape_zyx),
            fractions_czyx=None
            if meta.label is None
            else self._read_array(f"{case_id}/{view}/fractions", np.uint8, (2, *shape_zyx)),
            grid=meta.view_grid(view, shape_zyx),
        )

    def _read_array(self, name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> NDArray[Any]:
        try:
            if name not in self._arrays:
                self._arrays[name] = zarr.open_array(self.path / name, mode="r")
            array = self._arrays[name]
            self._check_shape(name, array, dtype, shape)
            # For a missing chunk, zarr returns fill_value without an error.
            if not (self.path / name / array.metadata.encode_chunk_key((0,) * array.ndim)).exists():
                raise CacheError(f"{self.path / name}: a chunk is missing: {REBUILD}")
            return np.asarray(array[...])
        except CacheError:
            raise
        except Exception as failure:  # zarr and its codecs raise whatever their libraries do
            raise CacheError(
                f"{self.path / name}: damaged ({type(failure).__name__}: {failure}): {REBUILD}"
            ) from failure

    def _check_shape(
        self, name: str, array: zarr.Array[Any], dtype: type[np.generic], shape: tuple[int, ...]
    ) -> None:
        if array.shape != shape or array.dtype != dtype:
            raise CacheError(
                f"{self.path / name}: expected {np.dtype(dtype)} {shape}, found {array.dtype} {array.shape}: {REBUILD}"
            )
