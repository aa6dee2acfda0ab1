"""One task a case over worker processes: results as they come, and a killed worker loses no other case."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import joblib
from joblib.externals.loky.process_executor import TerminatedWorkerError
from threadpoolctl import threadpool_limits

T = TypeVar("T")
R = TypeVar("R")


def fan_out(
    task: Callable[[T], R], items: Sequence[T], *, jobs: int, killed: Callable[[T], R]
) -> Iterator[R]:
    """Results of ``task`` for each item, in no order.

    Args:
        task: Picklable; catches what a bad input raises, and returns it as a result.
        items: Picklable.
        jobs: Worker processes; with 1 everything runs in this one.
        killed: The result of an item that kills its worker twice, the second time alone.
    """
    if jobs == 1 or len(items) <= 1:
        yield from (_numbered(task, pair)[1] for pair in enumerate(items))
        return
    unfinished = dict(enumerate(items))
    try:
        for number, result in _parallel(task, unfinished, jobs=jobs):
            del unfinished[number]
            yield result
    except TerminatedWorkerError:
        for item in list(unfinished.values()):
            yield _alone(task, item, killed=killed)


def _parallel(task: Callable[[T], R], items: dict[int, T], *, jobs: int) -> Iterator[tuple[int, R]]:
    parallel = joblib.Parallel(
        n_jobs=jobs, batch_size=1, pre_dispatch="2*n_jobs", return_as="generator_unordered"
    )
    results: Iterator[tuple[int, R]] = parallel(
        joblib.delayed(partial(_numbered, task))(pair) for pair in list(items.items())
    )
    return results


def _numbered(task: Callable[[Any], R], pair: tuple[int, Any]) -> tuple[int, R]:
    # joblib limits BLAS in its workers, but not with one job.
    with threadpool_limits(1):
        return pair[0], task(pair[1])


def _alone(task: Callable[[T], R], item: T, *, killed: Callable[[T], R]) -> R:
    try:
        return next(_parallel(task, {0: item}, jobs=2))[1]
    except TerminatedWorkerError:
        return killed(item)
