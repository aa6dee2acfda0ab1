"""Runs one task per item in worker processes: results arrive as they finish, and a dead worker loses only its own item.

A process pool breaks as a whole when one worker dies, and cannot stop a single task. So each worker here is a process
of its own behind a pipe. loky starts them: its processes do not import the caller's main module.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import re
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import Any, Generic, TypeVar

from loky.backend import get_context
from loky.backend import resource_tracker as loky_tracker
from threadpoolctl import threadpool_limits

from data_cache.errors import ConfigError, LiversegError

T = TypeVar("T")
R = TypeVar("R")

TICK_S = 0.5  # how often the workers are checked while none of them has a result


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningTask:
    """An item that a worker is processing, and for how long."""

    item: Any
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure(Generic[T]):
    """An item without a result.

    Attributes:
        item: What the task was called with.
        reason: One line for the user.
        traceback: Of an exception that nobody foresaw; empty where the input, the memory or a limit is to blame.
    """

    item: T
    reason: str
    traceback: str = ""


def _nothing(_: object) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """Limits on the workers, and who is told about them.

    Attributes:
        timeout_s: A worker that takes longer than this for one item is stopped. None: no limit.
        scheduler: Address of a dask cluster, which then runs the tasks and looks after its own workers.
        watch: Called twice per second with the items in progress.
        warn: Called with a line that the user should read.
    """

    timeout_s: float | None = None
    scheduler: str | None = None
    watch: Callable[[Sequence[RunningTask]], None] = _nothing
    warn: Callable[[str], None] = _nothing


DEFAULT_OPTIONS = WorkerOptions()


def run_parallel(
    task: Callable[[T], R], items: Sequence[T], *, jobs: int, options: WorkerOptions = DEFAULT_OPTIONS
) -> Generator[R | Failure[T], None, None]:
    """Run ``task`` on each item and yield its result, or a ``Failure``, in order of completion.

    An item fails if the task raises, if it runs out of time, or if its worker dies twice, the second time while
    running alone. Closing the generator stops the workers.

    Args:
        task: Picklable.
        items: Picklable.
        jobs: Number of worker processes; with 1 and no timeout, everything runs in this process.
        options: Limits on the workers, and who is told about them.
    """
    attempt: Callable[[T], R | Failure[T]] = partial(_attempt, task)
    if options.scheduler is not None:
        yield from _on_dask(attempt, items, scheduler=options.scheduler)
    elif options.timeout_s is None and (jobs == 1 or len(items) <= 1):
        yield from map(attempt, items)
    else:
        yield from _in_workers(attempt, items, jobs=jobs, options=options)


def _attempt(task: Callable[[T], R], item: T) -> R | Failure[T]:
    try:
        # A second BLAS thread per worker costs a factor of two on a busy machine.
        with threadpool_limits(1):
            return task(item)
    except LiversegError as failure:
        return Failure(item=item, reason=str(failure))
    except Exception as failure:
        return _unforeseen(item, failure)


def _unforeseen(item: T, failure: Exception) -> Failure[T]:
    reason = f"{type(failure).__name__}: {failure}"
    return Failure(item=item, reason=reason, traceback=traceback.format_exc())


# ---- worker processes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lost:
    """Why a worker was lost, and its item with it."""

    reason: str
    out_of_time: bool = False


def _in_workers(
    task: Callable[[T], R], items: Sequence[T], *, jobs: int, options: WorkerOptions
) -> Iterator[R | Failure[T]]:
    run, suspects = partial(_run, task, options=options), []
    with contextlib.closing(run(items, jobs=min(jobs, len(items)))) as outcomes:
        for item, outcome in outcomes:
            if not isinstance(outcome, _Lost):
                yield outcome
            elif outcome.out_of_time:
                yield Failure(item=item, reason=outcome.reason)
            else:
                suspects.append(item)
    # Again with the whole machine to itself: memory that the other workers held may have been what it lacked.
    for suspect in suspects:
        with contextlib.closing(run([suspect], jobs=1)) as outcomes:
            for item, outcome in outcomes:
                yield _died_twice(item, outcome) if isinstance(outcome, _Lost) else outcome


def _died_twice(item: T, second: _Lost) -> Failure[T]:
    if second.out_of_time:
        return Failure(item=item, reason=f"its worker process died, and the second attempt {second.reason}")
    reason = f"its worker process died twice, the second time while running alone: {second.reason}"
    return Failure(item=item, reason=reason)


def _run(
    task: Callable[[T], R], items: Sequence[T], *, jobs: int, options: WorkerOptions
) -> Generator[tuple[T, R | Failure[T] | _Lost], None, None]:
    """Run each item once; yields it with its outcome."""
    waiting, idle, busy = deque(items), list[_Worker[T, R]](), list[_Worker[T, R]]()
    try:
        while waiting or busy:
            while waiting and len(busy) < jobs:
                busy.append(idle.pop() if idle else _Worker(task))
                busy[-1].give(waiting.popleft())
            connection.wait([worker.pipe for worker in busy], timeout=TICK_S)
            options.watch([worker.running_task for worker in busy])
            for worker in list(busy):
                outcome = worker.outcome(options.timeout_s)
                if outcome is not None:
                    busy.remove(worker)
                    if not isinstance(outcome[0], _Lost):
                        idle.append(worker)
                    yield worker.item, outcome[0]
    finally:
        for worker in (*busy, *idle):
            worker.stop()


class _Worker(Generic[T, R]):
    """A process that runs the task on one item after another."""

    item: T

    def __init__(self, task: Callable[[T], R]) -> None:
        context = get_context("loky")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(pickle.dumps(task), theirs), daemon=True)
        with _interrupts_blocked():
            self._process.start()
        theirs.close()  # so that the pipe ends when the worker does
        self._peak_mib = 0

    def give(self, item: T) -> None:
        self.item, self._since = item, time.monotonic()
        with contextlib.suppress(OSError):  # it died while it was idle: ``outcome`` reports that
            self.pipe.send(item)

    @property
    def running_task(self) -> RunningTask:
        return RunningTask(item=self.item, seconds=time.monotonic() - self._since)

    def outcome(self, timeout_s: float | None) -> tuple[R | Failure[T] | _Lost] | None:
        """The outcome of its item in a tuple, since a result may be None; None while it is still running."""
        if self.pipe.poll():
            return (self._receive(),)
        if timeout_s is not None and self.running_task.seconds > timeout_s:
            self.stop()
            return (_Lost(reason=f"took longer than {timeout_s:g} s: raise --timeout", out_of_time=True),)
        self._peak_mib = _peak_mib(self._process.pid) or self._peak_mib
        return None

    def _receive(self) -> R | Failure[T] | _Lost:
        try:
            outcome: R | Failure[T] = self.pipe.recv()
        except (EOFError, OSError):
            self.stop()
            held = f", its memory peaked at {self._peak_mib} MiB or more" if self._peak_mib else ""
            return _Lost(reason=f"{_cause(self._process.exitcode)}{held}")
        return outcome

    def stop(self) -> None:
        self._process.terminate()  # loky's process has no kill(); nothing in a worker handles SIGTERM
        # A process that hangs in the kernel, on a dead network disk, cannot be stopped, and is left behind.
        self._process.join(timeout=10)
        self.pipe.close()


def _serve(pickled_task: bytes, pipe: connection.Connection) -> None:
    if "fork" in multiprocessing.get_all_start_methods():
        # numcodecs makes a lock when it is imported: a lock of this kind leaves nothing behind if its process is killed.
        multiprocessing.set_start_method("fork", force=True)
    task = pickle.loads(pickled_task)
    with contextlib.suppress(EOFError, OSError):  # the parent process is gone
        while True:
            item = pipe.recv()
            outcome = task(item)
            try:
                pipe.send(outcome)
            except Exception as failure:  # the result cannot be pickled
                pipe.send(_unforeseen(item, failure))


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Start a process that never sees Ctrl-C, which a terminal sends to every process: its parent stops it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    for tracker in (resource_tracker, loky_tracker):
        tracker.ensure_running()  # otherwise it starts with the first worker, and unblocks interrupts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _cause(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    return f"{name} (out of memory?)" if name == "SIGKILL" else name


def _peak_mib(pid: int | None) -> int | None:
    """Peak memory of a process so far; None where the system does not report it."""
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return None
    return int(found[1]) // 1024 if found else None


# ---- dask


def _on_dask(task: Callable[[T], R], items: Sequence[T], *, scheduler: str) -> Iterator[R | Failure[T]]:
    # Not through joblib: its dask backend waits forever for a task that killed its workers (joblib 1.6).
    try:
        from distributed import Client, KilledWorker, as_completed  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ConfigError("--backend dask needs dask: pip install 'liverseg[dask]'") from None
    suspects = []
    # Closing the client cancels what is not done. Not pure: the same items in another run must be done again.
    with Client(scheduler, set_as_default=False) as client:
        futures = {client.submit(task, item, pure=False): item for item in items}
        for future in as_completed(list(futures), loop=client.loop):
            item = futures.pop(future)
            if isinstance(future.exception(), KilledWorker):
                suspects.append(item)  # dask blames every item that its workers held or had queued
            else:
                yield future.result()
        for item in suspects:
            future = client.submit(task, item, pure=False)
            if isinstance(future.exception(), KilledWorker):
                reason = f"its workers died, also while running it alone: {future.exception()}"
                yield Failure(item=item, reason=reason)
            else:
                yield future.result()
