"""``liverseg bench workers``: which number of workers it finds, and what it says bounds it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from liverseg.bench.workers import CaseTiming, Trial, fastest, numbers_to_try, try_workers, what_bounds
from liverseg.cli import main
from pipeline.build import CaseResult, build_case
from pipeline.decathlon import CaseFiles, read_data_set


def trial(jobs: int, *, wall_s: float = 1.0, cpu_s: float = 1.0, queued_s: float = 0.0, n: int = 4) -> Trial:
    """``n`` cases, ``jobs`` at once, each of these times and of 1 MiB."""
    cases = tuple(
        CaseTiming(
            start_s=10 + i // jobs * wall_s,
            stop_s=10 + (i // jobs + 1) * wall_s,
            cpu_s=cpu_s,
            queued_s=queued_s,
            read_bytes=1 << 20,
        )
        for i in range(n)
    )
    return Trial(jobs=jobs, cases=cases)


def test_rates_by_hand() -> None:
    # Four cases of 2 s, two at once: 4 s. They compute 1 s each, so one core of two; a quarter of the time in line.
    found = trial(2, wall_s=2, cpu_s=1, queued_s=0.5)
    assert (found.seconds, found.cases_per_s, found.cores_used) == (4, 1, 1)
    assert (found.computing, found.queued, found.cpu_s_per_case, found.read_mib_per_s) == (0.5, 0.25, 1, 1)


def test_the_numbers_that_are_tried() -> None:
    assert numbers_to_try(2, most=99) == [1, 2, 3]
    assert numbers_to_try(1, most=99) == [1, 2]
    assert numbers_to_try(16, most=99) == [1, 2, 4, 8, 16, 24]
    assert numbers_to_try(12, most=9) == [1, 2, 4, 8]
    assert numbers_to_try(8, most=0) == [1]


def test_the_fastest_is_the_smallest_of_equals() -> None:
    assert fastest([trial(1), trial(2), trial(4, wall_s=1.98)]).jobs == 2
    assert fastest([trial(1), trial(2), trial(4)]).jobs == 4


@pytest.mark.parametrize(
    ("trials", "memory_jobs", "expected"),
    [
        ([trial(1), trial(2)], 4, "the CPU: 2.0 of 2 cores compute"),
        (
            [trial(1, wall_s=2), trial(2, wall_s=3)],
            4,
            "the disk: workers wait for it 67% of their time, 1 MiB/s",
        ),
        ([trial(1)], 1, "memory: it allows 1 worker on 2 cores"),
        ([trial(1), trial(2, wall_s=1.6, queued_s=0.6)], 4, "others use this machine too"),
        (
            [trial(1), trial(2, wall_s=1.5, cpu_s=1.5)],
            4,
            "a case takes 1.5× the CPU time that it takes alone",
        ),
    ],
)
def test_what_bounds_is_told_from_the_times(trials: list[Trial], memory_jobs: int, expected: str) -> None:
    line = what_bounds(trials, cores=2, memory_jobs=memory_jobs)
    assert expected in line
    assert line.endswith("; all workers of one thread each")


def test_workers_are_compared_with_their_like(phantoms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set()

    def noted(files: CaseFiles, **options: Any) -> CaseResult:
        threads.add(options.get("prefetch", False))
        return build_case(files, **options)

    def here(
        task: Callable[[CaseFiles], CaseTiming], cases: Sequence[CaseFiles], **_: object
    ) -> Iterator[CaseTiming]:
        return map(task, cases)

    monkeypatch.setattr("liverseg.bench.workers.build_case", noted)
    monkeypatch.setattr("liverseg.bench.workers.run_parallel", here)
    found = try_workers(read_data_set(phantoms), [1, 2], n_cases=2, report=lambda _: None)
    assert [(t.jobs, len(t.cases)) for t in found] == [(1, 2), (2, 2)]
    assert threads == {False}


def test_the_command_prints_a_table_and_a_number(phantoms: Path) -> None:
    result = CliRunner().invoke(main, ["bench", "workers", str(phantoms), "--cases", "2"])
    assert result.exit_code == 0, result.output
    assert "cases/s" in result.output
    assert "fastest: --jobs " in result.output
    assert "bound by " in result.output


def test_a_case_that_fails_ends_it_by_name(phantoms: Path, tmp_path: Path) -> None:
    shutil.copytree(phantoms, tmp_path / "raw")
    (tmp_path / "raw/labelsTr/liver_0.nii.gz").unlink()
    result = CliRunner().invoke(main, ["bench", "workers", str(tmp_path / "raw"), "--cases", "1"])
    assert result.exit_code == 1
    assert "labelsTr/liver_0.nii.gz: cannot be opened" in result.output
