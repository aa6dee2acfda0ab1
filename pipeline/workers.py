"""One task an item over worker processes: results as they come, and a worker that dies loses no other item.

joblib's own pool is broken as a whole by one dead worker, and can stop no single task; so each worker here is a process
of its own behind a pipe. joblib's part is what it does well: starting processes that import nothing of the caller's
main module, and the way to a dask cluster.
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

from joblib.externals.loky.backend import get_context
from joblib.externals.loky.backend import resource_tracker as loky_tracker
from threadpoolctl import threadpool_limits

from data_cache.errors import ConfigError

T = TypeVar("T")
R = TypeVar("R")

TICK_S = 0.5  # how often workers are looked at while none has a result


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningTask:
    """An item that a worker is at, and for how long."""

    item: Any
    seconds: float


def _nothing(_: object) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """How workers are looked after.

    Attributes:
        timeout_s: A worker that takes longer for an item is stopped. None: it may take forever.
        scheduler: Address of a dask cluster, whose workers then do the tasks, and which looks after them itself.
        watch: Called twice a second with the items in flight.
        warn: Called with a line that a person should read.
    """

    timeout_s: float | None = None
    scheduler: str | None = None
    watch: Callable[[Sequence[RunningTask]], None] = _nothing
    warn: Callable[[str], None] = _nothing


DEFAULT_OPTIONS = WorkerOptions()


def run_parallel(
    task: Callable[[T], R],
    items: Sequence[T],
    *,
    jobs: int,
    killed: Callable[[T, str], R],
    options: WorkerOptions = DEFAULT_OPTIONS,
) -> Generator[R, None, None]:
    """Results of ``task`` for each item, in no order. Closing the iterator stops the workers.

    Args:
        task: Picklable; catches what a bad input raises, and returns it as a result.
        items: Picklable.
        jobs: Worker processes; with 1 and no timeout, everything runs in this process.
        killed: The result of an item that ran out of time, or killed its worker twice, the second time alone;
            it is told which.
        supervision: How workers are looked after.
    """
    if options.scheduler is not None:
        yield from _on_dask(task, items, scheduler=options.scheduler, killed=killed)
    elif options.timeout_s is None and (jobs == 1 or len(items) <= 1):
        yield from map(partial(_on_one_thread, task), items)
    else:
        yield from _in_workers(task, items, jobs=jobs, killed=killed, options=options)


def _on_one_thread(task: Callable[[T], R], item: T) -> R:
    # A second BLAS thread a worker costs a factor of two on a busy machine.
    with threadpool_limits(1):
        return task(item)


# ---- worker processes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lost:
    """What became of an item without a result."""

    reason: str
    out_of_time: bool = False


def _in_workers(
    task: Callable[[T], R],
    items: Sequence[T],
    *,
    jobs: int,
    killed: Callable[[T, str], R],
    options: WorkerOptions,
) -> Iterator[R]:
    run = partial(_run, partial(_on_one_thread, task), options=options)
    suspects = []
    with contextlib.closing(run(items, jobs=min(jobs, len(items)))) as outcomes:
        for item, outcome in outcomes:
            if not isinstance(outcome, _Lost):
                yield outcome
            elif outcome.out_of_time:
                yield killed(item, outcome.reason)
            else:
                suspects.append(item)
    # Again with the whole machine to itself: it may have died of what the others needed.
    for suspect in suspects:
        with contextlib.closing(run([suspect], jobs=1)) as outcomes:
            for item, outcome in outcomes:
                if isinstance(outcome, _Lost):
                    twice = "" if outcome.out_of_time else ", the second time alone"
                    yield killed(item, f"its worker was killed twice{twice}: {outcome.reason}")
                else:
                    yield outcome


def _run(
    task: Callable[[T], R], items: Sequence[T], *, jobs: int, options: WorkerOptions
) -> Generator[tuple[T, R | _Lost], None, None]:
    """Each item once, with its result or what became of it."""
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
    """A process that does one item after another."""

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
        with contextlib.suppress(OSError):  # it died while it was idle: its outcome says so
            self.pipe.send(item)

    @property
    def running_task(self) -> RunningTask:
        return RunningTask(item=self.item, seconds=time.monotonic() - self._since)

    def outcome(self, timeout_s: float | None) -> tuple[R | _Lost] | None:
        """What there is by now of its item, in a tuple since a result may be None."""
        if self.pipe.poll():
            return (self._receive(),)
        if timeout_s is not None and self.running_task.seconds > timeout_s:
            self.stop()
            return (_Lost(reason=f"took longer than {timeout_s:g} s (--timeout)", out_of_time=True),)
        self._peak_mib = _peak_mib(self._process.pid) or self._peak_mib
        return None

    def _receive(self) -> R | _Lost:
        result: R
        try:
            result, failure = self.pipe.recv()
        except (EOFError, OSError):
            self.stop()
            held = f", it held {self._peak_mib} MiB or more" if self._peak_mib else ""
            return _Lost(reason=f"{_cause(self._process.exitcode)}{held}")
        if failure is not None:
            raise failure
        return result

    def stop(self) -> None:
        self._process.terminate()  # loky's has no kill(); nothing in a worker handles SIGTERM
        # One that hangs in the kernel, on a dead network disk, cannot be stopped, and is left behind.
        self._process.join(timeout=10)
        self.pipe.close()


def _serve(pickled_task: bytes, pipe: connection.Connection) -> None:
    if "fork" in multiprocessing.get_all_start_methods():
        # numcodecs makes a lock when it is imported: one of this kind leaves nothing where its process is killed.
        multiprocessing.set_start_method("fork", force=True)
    task = pickle.loads(pickled_task)
    with contextlib.suppress(EOFError, OSError):  # whom it works for is gone
        while True:
            item = pipe.recv()
            try:
                pipe.send((task(item), None))
            except Exception as failure:
                failure.add_note(traceback.format_exc())  # the traceback itself does not travel
                pipe.send((None, failure))


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A process started here never sees Ctrl-C, which a terminal sends to all: whoever started it stops it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    for tracker in (resource_tracker, loky_tracker):
        tracker.ensure_running()  # it would start with the first worker, and allow interrupts when it has
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _cause(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    return f"{name}, out of memory?" if name == "SIGKILL" else name


def _peak_mib(pid: int | None) -> int | None:
    """The most memory that a process ever held; None where the system does not tell."""
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return None
    return int(found[1]) // 1024 if found else None


# ---- dask


def _on_dask(
    task: Callable[[T], R], items: Sequence[T], *, scheduler: str, killed: Callable[[T, str], R]
) -> Iterator[R]:
    # Not through joblib: its dask backend waits for ever for a task that killed its workers (joblib 1.6).
    try:
        from distributed import Client, KilledWorker, as_completed  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ConfigError("dask is not installed: pip install 'liverseg[dask]'") from None
    on_one_thread, suspects = partial(_on_one_thread, task), []
    # Closing the client gives up what is not done. Not pure: the same items in another run are to be done again.
    with Client(scheduler, set_as_default=False) as client:
        futures = {client.submit(on_one_thread, item, pure=False): item for item in items}
        for future in as_completed(list(futures), loop=client.loop):
            item = futures.pop(future)
            if isinstance(future.exception(), KilledWorker):
                suspects.append(item)  # dask blames all that its workers had in hand or in line
            else:
                yield future.result()
        for item in suspects:
            future = client.submit(on_one_thread, item, pure=False)
            if isinstance(future.exception(), KilledWorker):
                yield killed(item, f"its workers were killed, also alone: {future.exception()}")
            else:
                yield future.result()
