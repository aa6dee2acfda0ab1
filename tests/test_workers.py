"""Workers: one that dies or hangs loses only its own item, with the reason; memory bounds their number."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import SMALL_SPEC, random_scan, tree_bytes, write_listing, write_nifti, write_pair

import liverseg.cli.caching
import pipeline.build
from data_cache.errors import VolumeError
from data_cache.processes import own_name
from data_cache.reader import CacheStore, list_cases
from data_cache.schema import PreprocessSpec
from liverseg.cli import main
from pipeline.build import CaseResult, build
from pipeline.decathlon import CaseFiles, read_data_set
from pipeline.memory import WORKER_BYTES, affordable_jobs, free_bytes, worker_bytes
from pipeline.prepare import prepare_case, read_scan
from pipeline.workers import Failure, RunningTask, WorkerOptions, run_parallel

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a worker is to do: it notes each time that it starts."""

    name: str
    folder: Path
    does: str = "square"

    @property
    def starts(self) -> int:
        return len(list(self.folder.glob(f"{self.name}-*")))


def do(job: Job) -> str:
    (job.folder / f"{job.name}-{time.time_ns()}").touch()
    if job.does == "die" or (job.does == "die once" and job.starts == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    elif job.does == "exit":
        os._exit(3)
    elif job.does == "hang":
        time.sleep(1000)
    elif job.does == "take a while":
        time.sleep(2)
    elif job.does == "grow and die":
        ballast = np.ones(200 * MIB, dtype=np.uint8)
        time.sleep(1.5)
        os.kill(os.getpid(), int(ballast[-1]) * signal.SIGKILL)
    elif job.does == "raise":
        raise ZeroDivisionError("a bug")
    elif job.does == "refuse":
        raise VolumeError(f"{job.name}.nii: truncated")
    return job.name


def words(outcome: str | Failure[Job]) -> str:
    return f"{outcome.item.name}: {outcome.reason}" if isinstance(outcome, Failure) else outcome


def jobs_of(folder: Path, **does: str) -> list[Job]:
    return [Job(name=name, folder=folder, does=what) for name, what in does.items()]


# --- what becomes of an item


def test_a_worker_that_dies_or_hangs_costs_its_own_item_alone(tmp_path: Path) -> None:
    jobs = jobs_of(
        tmp_path, a="take a while", b="die", c="hang", d="square", e="die once", f="exit", g="square"
    )
    seen: list[Sequence[RunningTask]] = []
    options = WorkerOptions(timeout_s=20, watch=seen.append)
    start = time.monotonic()
    results = sorted(map(words, run_parallel(do, jobs, jobs=3, options=options)))
    assert time.monotonic() - start < 120
    assert [results[i] for i in (0, 3, 4, 6)] == ["a", "d", "e", "g"]
    died = "its worker process died twice, the second time while running alone"
    assert results[1].startswith(f"b: {died}: SIGKILL (out of memory?)")
    assert results[2] == "c: took longer than 20 s: raise --timeout"
    assert results[5].startswith(f"f: {died}: exit code 3")
    # One that worked beside those that died was not disturbed; what hung is not tried again.
    assert [job.starts for job in jobs] == [1, 2, 1, 1, 2, 2, 1]
    assert {flight.item.name for flights in seen for flight in flights} == set("abcdefg")
    assert max(len(flights) for flights in seen) == 3
    assert 19 < max(flight.seconds for flights in seen for flight in flights) < 40


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
def test_the_peak_memory_of_a_killed_worker_is_told(tmp_path: Path) -> None:
    (job,) = jobs_of(tmp_path, a="grow and die")
    (outcome,) = run_parallel(do, [job], jobs=1, options=WorkerOptions(timeout_s=60))
    held_mib = int(words(outcome).rpartition("peaked at ")[2].removesuffix(" MiB or more"))
    assert 200 < held_mib < 800


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_of_a_task_is_a_failure_with_its_traceback(tmp_path: Path, workers: int) -> None:
    jobs = jobs_of(tmp_path, a="square", b="raise", c="refuse")
    found = {words(outcome).partition(":")[0]: outcome for outcome in run_parallel(do, jobs, jobs=workers)}
    bug, refused = found["b"], found["c"]
    assert found["a"] == "a"
    assert isinstance(bug, Failure)
    assert (bug.item, bug.reason) == (jobs[1], "ZeroDivisionError: a bug")
    assert "in do" in bug.traceback
    # What liverseg itself refuses is the input's fault: no traceback.
    assert refused == Failure(item=jobs[2], reason="c.nii: truncated")


def test_a_result_that_cannot_be_pickled_loses_its_own_item_only() -> None:
    outcomes = list(run_parallel(closure_or_number, [1, 2, 3], jobs=2))
    assert sorted(outcome for outcome in outcomes if not isinstance(outcome, Failure)) == [1, 3]
    (failure,) = (outcome for outcome in outcomes if isinstance(outcome, Failure))
    assert (failure.item, "pickle" in failure.reason) == (2, True)


def closure_or_number(number: int) -> Any:
    return number if number != 2 else lambda: number


def test_closing_stops_the_workers_at_once(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, a="square", b="hang", c="hang")
    pids: set[int] = set()
    others = children()

    def watch(_: object) -> None:
        pids.update(children() - others)

    start = time.monotonic()
    options = WorkerOptions(timeout_s=500, watch=watch)
    with closing(run_parallel(do, jobs, jobs=2, options=options)) as results:
        assert next(results) == "a"
    assert time.monotonic() - start < 30
    assert pids
    assert not pids & children()


def children() -> set[int]:
    return {pid for pid, parent, _ in workers() if parent == os.getpid()}


def workers() -> list[tuple[int, int, int]]:
    """Living worker processes: id, parent, group. Others, such as loky's resource tracker, may stay."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, parent, group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if state not in "ZX" and b"popen_loky" in (folder / "cmdline").read_bytes():
                found.append((int(folder.name), int(parent), int(group)))
    return found


# --- a data set


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    cases = [f"liver_{i}" for i in range(4)]
    for number, case_id in enumerate(cases):
        write_pair(tmp_path / "raw", case_id, *random_scan(seed=number))
    write_listing(tmp_path / "raw", cases)
    return tmp_path / "raw"


def slow_case(
    files: CaseFiles, *, store: Path, spec: PreprocessSpec, root: Path, prefetch: bool, force: bool
) -> CaseResult:
    """In place of ``build_case``: one that never ends, while it writes."""
    if files.case_id == "liver_2":
        (store / ".partial" / f"{own_name()}@0@liver_2").mkdir(parents=True)
        time.sleep(1000)
    return BUILD_CASE(files, store=store, spec=spec, root=root, prefetch=prefetch, force=force)


BUILD_CASE = pipeline.build.build_case


def test_a_case_out_of_time_is_named_and_tried_again_by_the_next_run(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "cache.zarr"

    def run() -> dict[str, str]:
        results = build(
            read_data_set(raw),
            store,
            SMALL_SPEC,
            jobs=2,
            report=lambda _: None,
            options=WorkerOptions(timeout_s=30),
        )
        return {result.case_id: f"{result.outcome} {result.message}" for result in results}

    monkeypatch.setattr(pipeline.build, "build_case", slow_case)
    assert run()["liver_2"] == "failed took longer than 30 s: raise --timeout"
    assert list_cases(store) == ("liver_0", "liver_1", "liver_3")
    assert not (store / ".partial").exists()
    monkeypatch.setattr(pipeline.build, "build_case", BUILD_CASE)
    assert run() == {f"liver_{i}": "done " if i == 2 else "skipped " for i in range(4)}


def test_the_cases_in_flight_are_named_in_a_line_now_and_then(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liverseg.cli.caching, "HEARTBEAT_S", 0.0)
    result = CliRunner().invoke(main, ["preprocess", str(raw), str(tmp_path / "c"), "--jobs", "1"])
    assert result.exit_code == 0
    lines = [line for line in result.output.splitlines() if " cases; running: " in line]
    assert re.fullmatch(r"0 of 4 cases; running: liver_0 \d+ s", lines[0])
    assert any("running: liver_3" in line for line in lines)


# --- Ctrl-C


def test_an_interrupted_preprocess_stops_at_once_and_leaves_a_valid_store(
    phantoms: Path, tmp_path: Path
) -> None:
    raw, store = tmp_path / "raw", tmp_path / "cache.zarr"
    copies = [f"liver_{i}" for i in range(60)]
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True)
        for i, case_id in enumerate(copies):
            shutil.copy(phantoms / folder / f"liver_{i % 6}.nii.gz", raw / folder / f"{case_id}.nii.gz")
    write_listing(raw, copies)
    command = [sys.executable, "-m", "liverseg", "preprocess", str(raw), str(store), "--jobs", "2"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        while process.poll() is None and not list(store.glob("liver_*")):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    message = "error: interrupted: finished work is kept; run the same command again to continue\n"
    assert (process.returncode, out.strip(), err) == (130, "", message)
    assert [worker for worker in workers() if worker[2] == process.pid] == []
    finished = list_cases(store)
    assert 0 < len(finished) < 60
    assert sorted(path.name for path in store.iterdir()) == sorted([*finished, "zarr.json"])
    opened = CacheStore.open(store)
    for case_id in finished:
        opened.read(case_id, "scan")
    before = tree_bytes(store)
    assert before.items() <= resumed(raw, store).items()


def resumed(raw: Path, store: Path) -> dict[str, bytes]:
    build(read_data_set(raw), store, PreprocessSpec(), jobs=1, report=lambda _: None)
    assert len(list_cases(store)) == 60
    return tree_bytes(store)


# --- memory


def test_as_many_workers_as_memory_allows() -> None:
    assert affordable_jobs(8, needed_bytes=100, free_bytes=350) == 3
    assert affordable_jobs(2, needed_bytes=100, free_bytes=350) == 2
    assert affordable_jobs(8, needed_bytes=100, free_bytes=99) == 1  # one is tried
    assert affordable_jobs(8, needed_bytes=100, free_bytes=None) == 8


def big_slices(raw: Path) -> None:
    write_nifti(raw / "imagesTr/liver_1.nii.gz", np.zeros((2000, 2000, 3), dtype=np.float64))


def many_slices(raw: Path) -> None:
    write_nifti(raw / "imagesTr/liver_1.nii.gz", np.zeros((2, 2, 3000), dtype=np.uint8))


@pytest.mark.parametrize(
    ("change", "more_mib"),
    [
        (big_slices, 4e6 * 8 * 8 / MIB),  # a slice is a block: 4e6 voxels of 8 bytes
        (many_slices, 3000 * 4 * 8 / MIB),  # all in one block: 4 voxels per slice
    ],
)
def test_what_a_case_needs_is_told_by_its_header(
    raw: Path, change: Callable[[Path], None], more_mib: float
) -> None:
    paths = sorted((raw / "imagesTr").iterdir())
    usual = worker_bytes(paths)
    assert WORKER_BYTES < usual < WORKER_BYTES + MIB
    change(raw)
    assert (worker_bytes(paths) - WORKER_BYTES) / MIB == pytest.approx(more_mib, rel=0.1)


def test_a_tiny_file_of_very_many_slices_takes_little_memory(tmp_path: Path) -> None:
    image = write_nifti(tmp_path / "scan.nii.gz", np.zeros((1, 1, 32767), dtype=np.int16))
    label = write_nifti(tmp_path / "label.nii.gz", np.ones((1, 1, 32767), dtype=np.uint8))
    assert image.stat().st_size < 300
    tracemalloc.start()
    try:
        prepare_case("a", image, label, PreprocessSpec(), root=tmp_path, force=True)  # nothing of a body
        read_scan(image, PreprocessSpec())
        assert tracemalloc.get_traced_memory()[1] < 100 * MIB  # with all slices averaged to 128×128: 4.4 GB
    finally:
        tracemalloc.stop()


def test_files_that_cannot_be_read_are_no_reason_to_fail(raw: Path) -> None:
    path = raw / "imagesTr/liver_1.nii.gz"
    path.write_bytes(b"nothing")
    assert worker_bytes([path, raw / "none.nii"]) == WORKER_BYTES


def test_a_build_says_that_memory_limits_its_workers(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def record(*arguments: Any, jobs: int, **options: Any) -> Any:
        asked.append(jobs)
        return run_parallel(*arguments, jobs=1, **options)

    monkeypatch.setattr(pipeline.build, "run_parallel", record)
    said: list[str] = []
    for number, free in enumerate((3 * WORKER_BYTES, None, 100 * WORKER_BYTES)):
        monkeypatch.setattr(pipeline.build, "free_bytes", lambda free=free: free)
        build(
            read_data_set(raw),
            tmp_path / f"{number}.zarr",
            SMALL_SPEC,
            jobs=8,
            report=lambda _: None,
            options=WorkerOptions(warn=said.append),
        )
    assert asked == [2, 4, 4]  # four cases need no more than four workers
    (line,) = said
    assert line == "using 2 of 4 workers: the largest case needs 140 MiB, and 420 MiB of memory are free"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_free_memory_is_some_of_what_the_machine_has() -> None:
    free = free_bytes()
    assert free is not None
    assert 0 < free < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
