"""Build: what is done is skipped, what fails is named, and neither a failure nor a killed worker touches the others."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL_SPEC, random_scan, tree_bytes, write_listing, write_nifti, write_pair

import pipeline.build
from data_cache.errors import SpecMismatchError
from data_cache.reader import CacheStore, list_cases
from data_cache.schema import PreprocessSpec
from pipeline.build import CaseResult, build, build_case, is_current, physical_cores
from pipeline.decathlon import CaseFiles, read_data_set

CASES = ("liver_0", "liver_1", "liver_2", "liver_3")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    root = tmp_path / "raw"
    for number, case_id in enumerate(CASES):
        write_pair(root, case_id, *random_scan(seed=number))
    write_listing(root, CASES)
    return root


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "cache.zarr"


def run(raw: Path, store: Path, *, jobs: int = 1, spec: PreprocessSpec = SMALL_SPEC) -> dict[str, CaseResult]:
    reported: list[CaseResult] = []
    results = build(read_data_set(raw), store, spec, jobs=jobs, report=reported.append)
    assert sorted(r.case_id for r in reported) == sorted(r.case_id for r in results) == sorted(CASES)
    return {result.case_id: result for result in results}


def outcomes(results: dict[str, CaseResult]) -> list[str]:
    return [results[case_id].outcome for case_id in CASES]


# --- one result however it is run


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_data_set_is_cached(raw: Path, store: Path, jobs: int) -> None:
    assert outcomes(run(raw, store, jobs=jobs)) == ["done"] * 4
    opened = CacheStore.open(store)
    assert opened.case_ids == CASES
    for case_id in CASES:
        for view in ("scan", "liver"):
            assert opened.read(case_id, view).image_zyx.shape == SMALL_SPEC.shape_zyx
    assert opened.meta("liver_1").image.path == "imagesTr/liver_1.nii.gz"
    assert [path.name for path in store.iterdir() if path.name.startswith(".")] == []


def test_the_number_of_workers_changes_no_byte(raw: Path, tmp_path: Path) -> None:
    for jobs in (1, 2):
        run(raw, tmp_path / f"{jobs}.zarr", jobs=jobs)
    assert tree_bytes(tmp_path / "1.zarr") == tree_bytes(tmp_path / "2.zarr")


# --- what is done already


def changed_time(raw: Path) -> None:
    os.utime(raw / "imagesTr/liver_1.nii.gz", ns=(1, 1))


def changed_size(raw: Path) -> None:
    path = raw / "labelsTr/liver_1.nii.gz"
    before = path.stat()
    write_nifti(path, np.zeros((10, 9, 12), dtype=np.uint8))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_second_run_does_nothing(raw: Path, store: Path) -> None:
    run(raw, store)
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    assert outcomes(run(raw, store, jobs=2)) == ["skipped"] * 4
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before


@pytest.mark.parametrize("change", [changed_time, changed_size])
def test_only_a_case_whose_files_changed_is_built_again(
    raw: Path, store: Path, change: Callable[[Path], None]
) -> None:
    run(raw, store)
    change(raw)
    assert outcomes(run(raw, store)) == ["skipped", "done", "skipped", "skipped"]
    assert outcomes(run(raw, store)) == ["skipped"] * 4


def test_a_case_that_vanished_or_lost_its_attributes_is_built_again(raw: Path, store: Path) -> None:
    run(raw, store)
    whole = tree_bytes(store)
    shutil.rmtree(store / "liver_0")
    (store / "liver_2/zarr.json").write_text('{"attributes": {}}')
    assert outcomes(run(raw, store)) == ["done", "skipped", "done", "skipped"]
    assert tree_bytes(store) == whole


def test_a_case_of_another_spec_is_not_current(raw: Path, store: Path) -> None:
    run(raw, store)
    path = store / "liver_0/zarr.json"
    node = json.loads(path.read_text())
    files = read_data_set(raw).cases[0]
    assert is_current(store, files, SMALL_SPEC)
    node["attributes"]["liverseg"]["spec_fingerprint"] = "0" * 16
    path.write_text(json.dumps(node))
    assert not is_current(store, files, SMALL_SPEC)


def test_a_case_whose_sources_are_gone_is_not_current(raw: Path, store: Path) -> None:
    run(raw, store)
    (raw / "labelsTr/liver_3.nii.gz").unlink()
    results = run(raw, store)
    assert outcomes(results) == ["skipped", "skipped", "skipped", "failed"]
    assert "labelsTr/liver_3.nii.gz: cannot be opened" in results["liver_3"].message
    assert "liver_3" in list_cases(store)  # what was built stays


def test_a_store_of_another_spec_is_refused_untouched(raw: Path, store: Path) -> None:
    run(raw, store)
    before = tree_bytes(store)
    with pytest.raises(SpecMismatchError, match="shape_zyx"):
        run(raw, store, spec=PreprocessSpec())
    assert tree_bytes(store) == before


# --- failures


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_case_that_fails_is_named_and_stops_no_other(raw: Path, store: Path, jobs: int) -> None:
    image = raw / "imagesTr/liver_1.nii.gz"
    image.write_bytes(image.read_bytes()[:-200])
    write_nifti(raw / "labelsTr/liver_2.nii.gz", np.full((10, 9, 12), 7, dtype=np.uint8))
    results = run(raw, store, jobs=jobs)
    assert outcomes(results) == ["done", "failed", "failed", "done"]
    assert results["liver_1"].message.startswith(f"{image}: ")
    assert "holds 7 (5 from 2)" in results["liver_2"].message
    assert results["liver_1"].details == ""  # the input's fault: no traceback
    assert list_cases(store) == ("liver_0", "liver_3")
    assert sorted(path.name for path in store.iterdir()) == ["liver_0", "liver_3", "zarr.json"]


def test_a_failing_case_leaves_its_older_version_alone(raw: Path, store: Path) -> None:
    run(raw, store)
    before = tree_bytes(store)
    (raw / "imagesTr/liver_1.nii.gz").write_bytes(b"damaged by a copy")
    assert outcomes(run(raw, store)) == ["skipped", "failed", "skipped", "skipped"]
    assert tree_bytes(store) == before


def test_a_fault_of_ours_comes_with_its_traceback(
    raw: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(pipeline.build, "prepare_case", broken)
    result = run(raw, store)["liver_0"]
    assert result.outcome == "failed"
    assert result.message == "ZeroDivisionError: a bug"
    assert "in broken" in result.details


def test_notes_are_passed_on(raw: Path, store: Path) -> None:
    write_nifti(raw / "labelsTr/liver_2.nii.gz", np.zeros((10, 9, 12), dtype=np.uint8))
    assert "label: has no liver and no tumour" in run(raw, store)["liver_2"].notes


# --- killed workers


def killed_by_its_image(
    files: CaseFiles, *, store: Path, spec: PreprocessSpec, root: Path, **options: bool
) -> CaseResult:
    """In place of ``build_case``: a worker that is killed as the kernel does when memory runs out."""
    image = files.image.read_bytes()
    if image.startswith(b"KILL ONCE"):
        files.image.write_bytes(image.removeprefix(b"KILL ONCE"))
    if image.startswith(b"KILL"):
        os.kill(os.getpid(), signal.SIGKILL)
    return build_case(files, store=store, spec=spec, root=root, **options)


def test_a_killed_worker_is_named_and_the_others_survive(
    raw: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.build, "build_case", killed_by_its_image)
    image = raw / "imagesTr/liver_1.nii.gz"
    image.write_bytes(b"KILL")
    results = run(raw, store, jobs=2)
    assert outcomes(results) == ["done", "failed", "done", "done"]
    assert results["liver_1"].message.startswith("its worker process died twice")
    assert list_cases(store) == ("liver_0", "liver_2", "liver_3")
    assert [path.name for path in store.iterdir() if path.name.startswith(".")] == []


def test_a_worker_that_is_killed_once_loses_nothing(
    raw: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.build, "build_case", killed_by_its_image)
    image = raw / "imagesTr/liver_2.nii.gz"
    image.write_bytes(b"KILL ONCE" + image.read_bytes())
    assert outcomes(run(raw, store, jobs=2)) == ["done"] * 4
    assert list_cases(store) == CASES


@pytest.mark.parametrize(("cores", "prefetch"), [(1, False), (2, True)])
def test_a_second_thread_reads_ahead_only_where_a_core_is_idle(
    raw: Path, store: Path, monkeypatch: pytest.MonkeyPatch, cores: int, prefetch: bool
) -> None:
    asked = []

    def noted(files: CaseFiles, **options: Any) -> CaseResult:
        asked.append(options["prefetch"])
        return build_case(files, **options)

    monkeypatch.setattr(pipeline.build, "physical_cores", lambda: cores)
    monkeypatch.setattr(pipeline.build, "build_case", noted)
    assert outcomes(run(raw, store, jobs=1)) == ["done"] * 4
    assert asked == [prefetch] * 4


def test_there_is_a_core() -> None:
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)
