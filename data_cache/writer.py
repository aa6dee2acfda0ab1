"""Writes a store: its root once, and each case completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BloscShuffle, Crc32cCodec

from data_cache.errors import CacheError, SpecMismatchError
from data_cache.metadata_checksum import write_with_checksum
from data_cache.processes import has_ended, own_name
from data_cache.reader import METADATA, REBUILD_MARK, has_cases, read_schema
from data_cache.records import differences, to_json
from data_cache.schema import (
    MISSING_HU,
    VIEW_NAMES,
    CacheSchema,
    Case,
    CaseMeta,
    DataSetInfo,
    PreprocessSpec,
    View,
    multiscales,
)

SYNC_THREADS = 8  # 27 files and folders of a case: 91 ms one by one, 8 ms with eight threads
PARTIAL = ".partial"  # folder of cases being written; no case ID may start with a dot


def open_or_create(store: Path, spec: PreprocessSpec, data_set: DataSetInfo | None = None) -> CacheSchema:
    """Make ``store`` a cache of ``spec`` and ``data_set``, or check that it is one already.

    Raises:
        CacheError: ``store`` exists and is something else, or was built from another data set.
        SpecMismatchError: It was built with another spec; the message lists the differences.
    """
    if not (store / METADATA).exists():
        _create_root(store, CacheSchema.of(spec, data_set))
    schema = read_schema(store)
    if schema.spec != spec:
        raise SpecMismatchError(_difference(store, schema.spec, spec))
    if data_set is not None and schema.data_set is not None:
        _check_same_data_set(store, schema.data_set, data_set)
    return schema


def _check_same_data_set(store: Path, found: DataSetInfo, wanted: DataSetInfo) -> None:
    """A store of two data sets would tell only one of them, and its licence, to what is trained on it."""
    changes = "; ".join(
        differences(to_json(found), to_json(wanted), found_in="the store", expected_by="dataset.json")
    )
    if changes:
        raise CacheError(
            f"{store}: built from another data set ({changes}): name another folder, or, if only dataset.json "
            f"was corrected, delete {store / METADATA} and run the same command again"
        )


def _create_root(store: Path, schema: CacheSchema) -> None:
    # A store may have cases without a root: verify sets a damaged one aside.
    is_foreign = store.exists() and not _is_empty(store) and not has_cases(store)
    if (store / METADATA).exists():  # by now: another process was faster
        return
    if is_foreign:
        raise CacheError(f"{store}: not a liverseg cache: {METADATA} is missing: name a new or empty folder")
    try:
        with _partial_folder(store, "root") as partial:
            zarr.create_group(partial)
            write_with_checksum(partial, {"liverseg": to_json(schema)})
            _sync_tree(partial)
            # A second process may be doing the same right now: both files are equal, so either may win.
            os.replace(partial / METADATA, store / METADATA)
            _sync(store)
    except OSError as failure:
        raise CacheError(f"{store}: cannot be created: {failure}") from failure


def _is_empty(store: Path) -> bool:
    return store.is_dir() and all(path.name == PARTIAL for path in store.iterdir())


def _difference(store: Path, found: PreprocessSpec, wanted: PreprocessSpec) -> str:
    changes = differences(to_json(found), to_json(wanted), found_in="the store", expected_by="this command")
    return f"{store}: built with another spec ({'; '.join(changes)}): name another folder, or delete this one"


def write_case(store: Path, case: Case, spec: PreprocessSpec) -> None:
    """Write one case, replacing an older one of its name; no reader ever sees a partial case.

    Raises:
        CacheError: The disk is full, the store cannot be written, or the case's folder holds what is not part of a
            case; the store stays as it was.
    """
    _refuse_foreign(store / case.meta.case_id)
    try:
        with _partial_folder(store, case.meta.case_id) as partial:
            _write_arrays(partial, case)
            _write_attributes(partial, case.meta, spec)
            _sync_tree(partial)
            _swap_in(partial, store / case.meta.case_id)
    except OSError as failure:
        raise CacheError(f"{store}: cannot write case {case.meta.case_id}: {failure}") from failure


def _refuse_foreign(folder: Path) -> None:
    """Check that nothing is lost but a case when its folder is replaced."""
    ours = {METADATA, REBUILD_MARK, *VIEW_NAMES}
    with contextlib.suppress(FileNotFoundError):
        foreign = min(
            (p.name for p in folder.iterdir() if p.name not in ours and p.name[0] != "."), default=None
        )
        if foreign is not None:
            raise CacheError(f"{folder / foreign}: was not written by liverseg preprocess: move it away")


def _write_arrays(folder: Path, case: Case) -> None:
    zarr.create_group(folder)
    for name, view in case.views.items():
        zarr.create_group(folder / name)
        for array_name, values, fill_value in _arrays(view):
            _write_array(folder / name / array_name, values, fill_value=fill_value)


def _arrays(view: View) -> list[tuple[str, NDArray[Any], int]]:
    arrays: list[tuple[str, NDArray[Any], int]] = [("image", view.image_zyx, MISSING_HU)]
    if view.fractions_czyx is not None:
        arrays.append(("fractions", view.fractions_czyx, 0))
    return arrays


def _write_array(path: Path, values: NDArray[Any], *, fill_value: int) -> None:
    array = zarr.create_array(
        path,
        shape=values.shape,
        dtype=values.dtype,
        chunks=values.shape,  # always read as a whole: one chunk costs 2.6 ms per sample, finer ones 4.4-10
        compressors=[
            BloscCodec(  # level 5 is 6 % smaller than level 2 and takes three times as long
                cname="zstd", clevel=2, shuffle=BloscShuffle.bitshuffle, typesize=values.dtype.itemsize
            ),
            Crc32cCodec(),  # without it, a flipped bit silently decodes to wrong voxels
        ],
        fill_value=fill_value,
        dimension_names=("c", "z", "y", "x")[-values.ndim :],
        config={"write_empty_chunks": True},  # a missing chunk then always means damage
    )
    array[...] = values


def _write_attributes(folder: Path, meta: CaseMeta, spec: PreprocessSpec) -> None:
    ome = {"version": "0.5", "multiscales": multiscales(meta, spec)}
    write_with_checksum(folder, {"liverseg": to_json(meta), "ome": ome})


@contextlib.contextmanager
def _partial_folder(store: Path, name: str) -> Iterator[Path]:
    """A new folder in the store that no reader sees; it is deleted when the block ends."""
    folder = store / PARTIAL / partial_name(name, process=own_name())
    _make_folder(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def partial_name(name: str, *, process: str) -> str:
    """A unique folder name that tells the leftovers of a killed writer from the folder of a running one."""
    return f"{process}@{uuid.uuid4().hex[:8]}@{name}"


def _make_folder(folder: Path) -> None:
    for _ in range(100):
        try:
            folder.mkdir(parents=True)
        except FileNotFoundError:  # another process removed the empty parent between the two steps
            continue
        return
    raise FileNotFoundError(errno.ENOENT, "cannot be created", str(folder))


def remove_leftovers(store: Path) -> None:
    """Delete what killed writers on this machine left behind; writers that are still running are spared."""
    for folder in (store / PARTIAL).glob("*@*@*@*"):
        machine, pid_and_start, _ = folder.name.split("@", 2)
        if has_ended(f"{machine}@{pid_and_start}"):
            shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # another writer is using it, or it does not exist
        (store / PARTIAL).rmdir()


def _swap_in(partial: Path, target: Path) -> None:
    """Rename ``partial`` to ``target``; an older ``target`` is first moved into the folder of partial cases."""
    replaced = partial.with_name(partial.name + "-replaced")
    try:
        while not _renamed(partial, target):
            # Another writer of the same case may have moved the old one away already.
            with contextlib.suppress(FileNotFoundError):
                os.rename(target, replaced)
            # It may also have put its own case there since: then the next round needs this name again.
            shutil.rmtree(replaced, ignore_errors=True)
        _sync(target.parent)
    finally:
        shutil.rmtree(replaced, ignore_errors=True)


def _renamed(partial: Path, target: Path) -> bool:
    try:
        os.rename(partial, target)
    except OSError as failure:
        if failure.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _sync_tree(folder: Path) -> None:
    # At once: file systems with a journal then write one entry for many of them, and not one each.
    with ThreadPoolExecutor(SYNC_THREADS) as pool:
        list(pool.map(_sync, [*folder.rglob("*"), folder]))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
