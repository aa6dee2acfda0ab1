"""``liverseg bench workers``: how many workers preprocess fastest on this machine, and what stops more from helping."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_cache.errors import DataSetError
from data_cache.schema import PreprocessSpec
from data_cache.text import pluralise
from data_cache.writer import open_or_create
from pipeline.build import build_case
from pipeline.decathlon import CaseFiles, RawDataSet
from pipeline.memory import affordable_jobs, free_bytes, worker_bytes
from pipeline.workers import Failure, WorkerOptions, run_parallel

BUSY = 0.8  # the share of its time that a worker computes, or waits for a core, where the disk does not hold it up
TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseTiming:
    """One case; times of the machine's clock.

    Attributes:
        cpu_s: That its worker computed.
        queued_s: That it could have, but had no core; None where the system does not tell.
    """

    start_s: float
    stop_s: float
    cpu_s: float
    queued_s: float | None
    read_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """All cases with one number of workers."""

    jobs: int
    cases: tuple[CaseTiming, ...]

    @property
    def seconds(self) -> float:
        """From the first case's start to the last one's end: a worker's start counts only in a long run."""
        return max(case.stop_s for case in self.cases) - min(case.start_s for case in self.cases)

    @property
    def cases_per_s(self) -> float:
        return len(self.cases) / self.seconds

    @property
    def read_mib_per_s(self) -> float:
        """Of compressed files."""
        return sum(case.read_bytes for case in self.cases) / self.seconds / 2**20

    @property
    def cpu_s_per_case(self) -> float:
        return sum(case.cpu_s for case in self.cases) / len(self.cases)

    @property
    def cores_used(self) -> float:
        """Of all cores, how many computed on average."""
        return sum(case.cpu_s for case in self.cases) / self.seconds

    def share(self, seconds: float) -> float:
        """Of the workers' time."""
        return seconds / sum(case.stop_s - case.start_s for case in self.cases)

    @property
    def computing(self) -> float:
        """The share of the workers' time that they computed."""
        return self.share(sum(case.cpu_s for case in self.cases))

    @property
    def queued(self) -> float:
        """The share that they waited for a core."""
        return self.share(sum(case.queued_s or 0.0 for case in self.cases))


def try_workers(
    data_set: RawDataSet, numbers: Sequence[int], *, n_cases: int, report: Callable[[Trial], None]
) -> list[Trial]:
    """Preprocess the same cases with each number of workers, into temporary stores.

    Like workers, of one thread each: the second one that ``preprocess`` lets inflate where a core is idle would
    have the trials with few workers borrow the cores that more workers are to be compared with.

    Raises:
        DataSetError: A case failed.
    """
    trials = []
    for jobs in numbers:
        trials.append(_trial(data_set.cases[:n_cases], data_set.root, jobs=jobs))
        report(trials[-1])
    return trials


def numbers_to_try(cores: int, *, most: int) -> list[int]:
    """1, 2, 4, … to the number of cores, and half as many again, but no more than ``most``."""
    numbers = {2**i for i in range(cores.bit_length())} | {cores, cores + (cores + 1) // 2}
    return sorted(number for number in numbers if number <= most) or [1]


def memory_limit(data_set: RawDataSet, *, jobs: int) -> int:
    """How many of ``jobs`` workers the memory allows."""
    paths = (path for case in data_set.cases for path in (case.image, case.label))
    needed = worker_bytes(paths)
    return affordable_jobs(jobs, needed_bytes=needed, free_bytes=free_bytes())


def _trial(cases: Sequence[CaseFiles], root: Path, *, jobs: int) -> Trial:
    with tempfile.TemporaryDirectory() as folder:
        store, spec = Path(folder) / "cache.zarr", PreprocessSpec()
        open_or_create(store, spec)
        for files in cases:
            _forget(files)
        task = partial(_timed_case, store=store, spec=spec, root=root)
        options = WorkerOptions(timeout_s=TIMEOUT_S)  # in processes of their own, also where it is one
        outcomes = list(run_parallel(task, cases, jobs=jobs, options=options))
    for failure in outcomes:
        if isinstance(failure, Failure):
            raise DataSetError(f"bench workers: {failure.item.case_id}: {failure.reason}")
    return Trial(jobs=jobs, cases=tuple(case for case in outcomes if not isinstance(case, Failure)))


def _forget(files: CaseFiles) -> None:
    """Have the system drop its copy of the files, so that each trial reads them from the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in (files.image, files.label):
        if path.exists():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _timed_case(files: CaseFiles, *, store: Path, spec: PreprocessSpec, root: Path) -> CaseTiming:
    start_s, cpu_s, queued_s = time.monotonic(), time.process_time(), _queued_s()
    build_case(files, store=store, spec=spec, root=root)
    waited_s = _queued_s()
    return CaseTiming(
        start_s=start_s,
        stop_s=time.monotonic(),
        cpu_s=time.process_time() - cpu_s,
        queued_s=None if waited_s is None or queued_s is None else waited_s - queued_s,
        read_bytes=sum(path.stat().st_size for path in (files.image, files.label) if path.exists()),
    )


def _queued_s() -> float | None:
    """Seconds that this process ever waited for a core, runnable."""
    try:
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None


def fastest(trials: Sequence[Trial]) -> Trial:
    """The fewest workers that come within 3 % of the most cases per second: more only take memory."""
    best = max(trial.cases_per_s for trial in trials)
    return min((t for t in trials if t.cases_per_s >= 0.97 * best), key=lambda t: t.jobs)


def what_bounds(trials: Sequence[Trial], *, cores: int, memory_jobs: int) -> str:
    """One line: what more workers would run into."""
    return f"{_bound(trials, cores=cores, memory_jobs=memory_jobs)}; all workers of one thread each"


def _bound(trials: Sequence[Trial], *, cores: int, memory_jobs: int) -> str:
    best, alone = fastest(trials), min(trials, key=lambda t: t.jobs)
    waiting = 1 - best.computing - best.queued
    if waiting > 1 - BUSY:
        return f"the disk: workers wait for it {waiting:.0%} of their time, {best.read_mib_per_s:.0f} MiB/s are read"
    if best.jobs == memory_jobs < cores:
        return f"memory: it allows {pluralise(memory_jobs, 'worker')} on {pluralise(cores, 'core')}"
    slower = best.cpu_s_per_case / alone.cpu_s_per_case
    line = f"the CPU: {best.cores_used:.1f} of {cores} cores compute"
    if best.queued > 1 - BUSY:
        line += f", and workers wait for one {best.queued:.0%} of their time: others use this machine too"
    if slower > 1.2:
        line += (
            f"; a case takes {slower:.1f}× the CPU time that it takes alone (shared caches, memory bandwidth)"
        )
    return line
