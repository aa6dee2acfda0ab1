"""Builds a store from a data set: one task per case; finished cases are skipped, failures are reported."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import loky

from data_cache.errors import CacheError
from data_cache.reader import is_marked, read_meta
from data_cache.schema import PreprocessSpec, SourceFile
from data_cache.writer import open_or_create, remove_leftovers, write_case
from pipeline.decathlon import CaseFiles, RawDataSet
from pipeline.memory import affordable_jobs, free_bytes, worker_bytes
from pipeline.prepare import prepare_case
from pipeline.workers import DEFAULT_OPTIONS, Failure, WorkerOptions, run_parallel

Outcome = Literal["done", "skipped", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """The outcome of one case.

    Attributes:
        message: Why it failed, in one line; empty otherwise.
        details: The traceback of a failure that is not the input's fault.
        notes: What was assumed or replaced while reading.
    """

    case_id: str
    outcome: Outcome
    message: str = ""
    details: str = ""
    notes: tuple[str, ...] = ()


def physical_cores() -> int:
    """Number of cores that this process may use, without hyper-threads."""
    return max(1, int(loky.cpu_count(only_physical_cores=True)))


def build(
    data_set: RawDataSet,
    store: Path,
    spec: PreprocessSpec,
    *,
    jobs: int,
    report: Callable[[CaseResult], None],
    options: WorkerOptions = DEFAULT_OPTIONS,
    verify_sources: bool = False,
    force: bool = False,
) -> list[CaseResult]:
    """Bring ``store`` up to date with ``data_set``.

    Args:
        data_set: Its cases are built one by one; a case that the store already holds, built from the same files
            with the same spec, is skipped.
        store: Created if it does not exist.
        spec: The preprocessing settings.
        jobs: Number of worker processes; reduced if the memory is too small for that many.
        report: Called with each result as it arrives.
        options: Limits on the workers, and who is told about them.
        verify_sources: A case is up to date only if the sha256 of its files matches, too.
        force: Build cases whose image is not a CT in HU on a believable grid, too.

    Raises:
        CacheError: ``store`` is not a cache, or was built with another spec. A case that fails does not raise.
    """
    open_or_create(store, spec, data_set.info)
    remove_leftovers(store)
    pending, results = [], []
    for files in data_set.cases:
        if is_current(store, files, spec, verify_sources=verify_sources):
            results.append(CaseResult(case_id=files.case_id, outcome="skipped"))
            report(results[-1])
        else:
            pending.append(files)
    if options.scheduler is None:
        jobs = _bounded_jobs(pending, jobs=min(jobs, len(pending)), warn=options.warn)
    # Where workers fill all cores, there is none to spare for a second thread in each.
    prefetch = options.scheduler is None and jobs < physical_cores()
    task = partial(build_case, store=store, spec=spec, root=data_set.root, prefetch=prefetch, force=force)
    fresh = run_parallel(task, pending, jobs=jobs, options=options)
    try:
        with contextlib.closing(fresh):  # stops the workers first, so that their leftovers count as such
            for outcome in fresh:
                results.append(_failed(outcome) if isinstance(outcome, Failure) else outcome)
                report(results[-1])
    finally:
        remove_leftovers(store)
    return results


def _bounded_jobs(pending: Sequence[CaseFiles], *, jobs: int, warn: Callable[[str], None]) -> int:
    if jobs <= 1:
        return 1
    paths = (path for files in pending for path in (files.image, files.label))
    needed, free = worker_bytes(paths), free_bytes()
    bounded = affordable_jobs(jobs, needed_bytes=needed, free_bytes=free)
    if bounded < jobs and free is not None:
        warn(
            f"using {bounded} of {jobs} workers: the largest case needs {needed >> 20} MiB, and "
            f"{free >> 20} MiB of memory are free"
        )
    return bounded


def is_current(store: Path, files: CaseFiles, spec: PreprocessSpec, *, verify_sources: bool = False) -> bool:
    """Whether the store holds this case, built with ``spec`` from the files as they are now.

    Files are compared by size and modification time, and also by sha256 where ``verify_sources`` is set. A case
    that ``verify`` has marked as damaged is not current.
    """
    try:
        meta = read_meta(store, files.case_id)
    except CacheError:
        return False
    return (
        meta.spec_fingerprint == spec.fingerprint()
        and not is_marked(store, files.case_id)
        and meta.label is not None
        and _is_unchanged(files.image, meta.image, verify=verify_sources)
        and _is_unchanged(files.label, meta.label, verify=verify_sources)
    )


def _is_unchanged(path: Path, source: SourceFile, *, verify: bool) -> bool:
    return source.fault(path, by_content=False) is None and (
        not verify or source.fault(path, by_content=True) is None
    )


def build_case(
    files: CaseFiles,
    *,
    store: Path,
    spec: PreprocessSpec,
    root: Path,
    prefetch: bool = False,
    force: bool = False,
) -> CaseResult:
    """Build one case.

    Args:
        files: The case's image and label.
        store: An existing store.
        spec: The preprocessing settings.
        root: Folder of the data set; the store records the files' paths relative to it.
        prefetch: Inflate in a second thread, for when a core would otherwise be idle.
        force: As for ``prepare_case``.

    Raises:
        LiversegError: The files cannot be read or do not fit together, or the store cannot be written.
    """
    case = prepare_case(
        files.case_id, files.image, files.label, spec, root=root, prefetch=prefetch, force=force
    )
    write_case(store, case, spec)
    return CaseResult(case_id=files.case_id, outcome="done", notes=case.meta.notes)


def _failed(failure: Failure[CaseFiles]) -> CaseResult:
    return CaseResult(
        case_id=failure.item.case_id, outcome="failed", message=failure.reason, details=failure.traceback
    )
