"""Build a store from a data set: a case a task, done ones skipped, failing ones reported."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import joblib
from joblib.externals.loky.process_executor import TerminatedWorkerError
from threadpoolctl import threadpool_limits

from data_cache.errors import CacheError, LiversegError
from data_cache.reader import read_meta
from data_cache.schema import PreprocessSpec, SourceFile
from data_cache.writer import open_or_create, remove_leftovers, write_case
from pipeline.decathlon import CaseFiles, RawDataSet
from pipeline.prepare import prepare_case

Outcome = Literal["done", "skipped", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """What became of one case.

    Attributes:
        message: Why it failed, in one line; empty otherwise.
        details: The traceback of a failure that is no fault of the input.
        notes: What was assumed or replaced while reading.
        seconds: Wall-clock time of its task.
    """

    case_id: str
    outcome: Outcome
    message: str = ""
    details: str = ""
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads not counted."""
    return max(1, int(joblib.cpu_count(only_physical_cores=True)))


def build(
    data_set: RawDataSet,
    store: Path,
    spec: PreprocessSpec,
    *,
    jobs: int,
    report: Callable[[CaseResult], None],
) -> list[CaseResult]:
    """Bring ``store`` up to date with ``data_set``.

    Args:
        data_set: Its cases are built one by one; those that are in the store already, from the same files
            and the same spec, are skipped.
        store: Created where there is none.
        spec: What decides the voxels.
        jobs: Worker processes.
        report: Called with each result as it comes.

    Raises:
        CacheError: ``store`` is no cache, or one of another spec. A case that fails raises nothing.
    """
    open_or_create(store, spec)
    remove_leftovers(store)
    pending, results = [], []
    for files in data_set.cases:
        if is_current(store, files, spec):
            results.append(CaseResult(case_id=files.case_id, outcome="skipped"))
            report(results[-1])
        else:
            pending.append(files)
    task = partial(build_case, store=store, spec=spec, root=data_set.root)
    for result in _run(task, pending, jobs=jobs):
        results.append(result)
        report(result)
    remove_leftovers(store)
    return results


def is_current(store: Path, files: CaseFiles, spec: PreprocessSpec) -> bool:
    """Whether the store holds this case, built with ``spec`` from the files as they are now."""
    try:
        meta = read_meta(store, files.case_id)
    except CacheError:
        return False
    return (
        meta.spec_fingerprint == spec.fingerprint()
        and _is_same(files.image, meta.image)
        and meta.label is not None
        and _is_same(files.label, meta.label)
    )


def _is_same(path: Path, source: SourceFile) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (source.size_bytes, source.mtime_ns)


def build_case(files: CaseFiles, *, store: Path, spec: PreprocessSpec, root: Path) -> CaseResult:
    """Build one case; a failure comes back as a result, so that the others go on."""
    start = time.perf_counter()
    result = partial(CaseResult, case_id=files.case_id)
    try:
        # joblib limits BLAS in its workers, but not with one job; two threads a worker cost a factor of two.
        with threadpool_limits(1):
            case = prepare_case(files.case_id, files.image, files.label, spec, root=root)
            write_case(store, case, spec)
    except LiversegError as failure:
        return result(outcome="failed", message=str(failure), seconds=time.perf_counter() - start)
    except Exception as failure:
        return result(
            outcome="failed",
            message=f"{files.image}: {type(failure).__name__}: {failure}",
            details=traceback.format_exc(),
            seconds=time.perf_counter() - start,
        )
    return result(outcome="done", notes=case.meta.notes, seconds=time.perf_counter() - start)


def _run(
    task: Callable[[CaseFiles], CaseResult], pending: Sequence[CaseFiles], *, jobs: int
) -> Iterator[CaseResult]:
    """Results as they come. A worker that is killed takes its unfinished cases along: they run again alone."""
    if jobs == 1 or len(pending) <= 1:
        yield from map(task, pending)
        return
    unfinished = {files.case_id: files for files in pending}
    try:
        for result in _parallel(task, pending, jobs=min(jobs, len(pending))):
            del unfinished[result.case_id]
            yield result
    except TerminatedWorkerError:
        for files in unfinished.values():
            yield _run_alone(task, files)


def _parallel(
    task: Callable[[CaseFiles], CaseResult], pending: Sequence[CaseFiles], *, jobs: int
) -> Iterator[CaseResult]:
    parallel = joblib.Parallel(
        n_jobs=jobs, batch_size=1, pre_dispatch="2*n_jobs", return_as="generator_unordered"
    )
    results: Iterator[CaseResult] = parallel(joblib.delayed(task)(files) for files in pending)
    return results


def _run_alone(task: Callable[[CaseFiles], CaseResult], files: CaseFiles) -> CaseResult:
    """In a process of its own, so that the case that kills it is named and takes no other along."""
    try:
        return next(_parallel(task, [files], jobs=2))
    except TerminatedWorkerError:
        message = f"{files.image}: its worker was killed twice (out of memory?): run with fewer --jobs"
        return CaseResult(case_id=files.case_id, outcome="failed", message=message)
