"""Many machines: shards are a partition, and together give the bytes of one run; so does a dask cluster."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import SMALL_SPEC, random_scan, tree_bytes, write_listing, write_pair
from hypothesis import given
from hypothesis import strategies as st

from data_cache.reader import list_cases, natural_order
from data_cache.schema import DataSetInfo
from liverseg.cli import main
from pipeline.build import build
from pipeline.decathlon import CaseFiles, RawDataSet, read_data_set, take_shard
from pipeline.workers import Failure, WorkerOptions, run_parallel

CASES = tuple(f"liver_{i}" for i in (0, 1, 2, 10, 11))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for seed, case_id in enumerate(CASES):
        write_pair(tmp_path / "raw", case_id, *random_scan(seed=seed))
    write_listing(tmp_path / "raw", CASES)
    return tmp_path / "raw"


def data_set_of(case_ids: list[str]) -> RawDataSet:
    cases = tuple(CaseFiles(case_id=c, image=Path(c), label=Path(c)) for c in case_ids)
    info = DataSetInfo(name="LIVER", licence=None, description=None, phantom=False)
    return RawDataSet(root=Path("raw"), info=info, cases=cases, tests=(), unlisted=())


def ids(data_set: RawDataSet) -> list[str]:
    return [case.case_id for case in data_set.cases]


# --- shards


@given(case_ids=st.lists(st.sampled_from([f"liver_{i}" for i in range(40)]), unique=True), data=st.data())
def test_shards_are_a_partition_whatever_the_order(case_ids: list[str], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 8))
    shuffled = data.draw(st.permutations(case_ids))
    shards = [ids(take_shard(data_set_of(shuffled), i, count)) for i in range(1, count + 1)]
    assert sorted(itertools.chain(*shards), key=natural_order) == sorted(case_ids, key=natural_order)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert shards == [ids(take_shard(data_set_of(case_ids), i, count)) for i in range(1, count + 1)]


def test_a_shard_by_hand(raw: Path) -> None:
    data_set = read_data_set(raw)
    assert ids(take_shard(data_set, 1, 2)) == ["liver_0", "liver_2", "liver_11"]
    assert ids(take_shard(data_set, 2, 2)) == ["liver_1", "liver_10"]
    with pytest.raises(ValueError, match="3/2"):
        take_shard(data_set, 3, 2)


def test_shards_at_once_give_the_bytes_of_one_run(raw: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "liverseg", "preprocess", str(raw), str(tmp_path / "parts.zarr")]
    running = [
        subprocess.Popen([*command, "--jobs", "1", "--shard", f"{i}/3"], stderr=subprocess.PIPE, text=True)
        for i in (1, 2, 3)
    ]
    whole = CliRunner().invoke(main, ["preprocess", str(raw), str(tmp_path / "whole.zarr"), "--jobs", "1"])
    assert whole.exit_code == 0
    told = [(process.communicate()[1], process.returncode) for process in running]
    assert [code for _, code in told] == [0] * 3
    # Scans of 8 mm are unusual for a body, and nothing else is said of them.
    assert all(
        line.startswith("warning: ") and "unusual" in line for err, _ in told for line in err.splitlines()
    )
    assert tree_bytes(tmp_path / "parts.zarr") == tree_bytes(tmp_path / "whole.zarr")
    assert list_cases(tmp_path / "parts.zarr") == CASES


@pytest.mark.parametrize("wrong", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_a_wrong_shard_is_refused(raw: Path, tmp_path: Path, wrong: str) -> None:
    result = CliRunner().invoke(main, ["preprocess", str(raw), str(tmp_path / "c"), "--shard", wrong])
    assert result.exit_code == 2
    assert "is not a part such as 1/4" in result.output
    assert not (tmp_path / "c").exists()


# --- dask


@pytest.mark.parametrize(
    "options",
    [
        ("--backend", "dask"),
        ("--scheduler", "tcp://x:1"),
        ("--backend", "dask", "--scheduler", "tcp://x:1", "--jobs", "2"),
        ("--backend", "dask", "--scheduler", "tcp://x:1", "--timeout", "9"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    raw: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    result = CliRunner().invoke(main, ["preprocess", str(raw), str(tmp_path / "c"), *options])
    assert result.exit_code == 2
    assert not (tmp_path / "c").exists()


def test_a_missing_dask_is_said(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    arguments = ["preprocess", str(raw), str(tmp_path / "c"), "--backend", "dask", "--scheduler", "tcp://x:1"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "error: --backend dask needs dask: pip install 'liverseg[dask]'" in result.output


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """A local cluster of two worker processes."""
    distributed = pytest.importorskip("distributed")
    # Workers must find this test's module too.
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", paths)
        with distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50
        ) as cluster:
            yield cluster.scheduler_address


def test_a_dask_cluster_gives_the_bytes_of_one_run(scheduler: str, raw: Path, tmp_path: Path) -> None:
    dask, local = tmp_path / "dask.zarr", tmp_path / "local.zarr"
    options = ["--backend", "dask", "--scheduler", scheduler]
    result = CliRunner().invoke(main, ["preprocess", str(raw), str(dask), *options])
    assert result.exit_code == 0
    # That cases of 8×8×30 mm are unusual is said, and nothing else.
    assert all("unusual for a body" in line for line in result.stderr.splitlines())
    assert "5 cases built" in result.output
    assert (
        "5 were up to date" in CliRunner().invoke(main, ["preprocess", str(raw), str(dask), *options]).output
    )
    assert CliRunner().invoke(main, ["preprocess", str(raw), str(local), "--jobs", "1"]).exit_code == 0
    assert tree_bytes(dask) == tree_bytes(local)


def test_a_bad_case_stops_no_other_on_a_cluster(scheduler: str, raw: Path, tmp_path: Path) -> None:
    image = raw / "imagesTr/liver_2.nii.gz"
    image.write_bytes(image.read_bytes()[:-100])
    results = build(
        read_data_set(raw),
        tmp_path / "cache.zarr",
        SMALL_SPEC,
        jobs=1,
        report=lambda _: None,
        options=WorkerOptions(scheduler=scheduler),
    )
    assert {r.case_id: r.outcome for r in results} == {
        c: "failed" if c == "liver_2" else "done" for c in CASES
    }


def square_or_die(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number**2


def test_a_task_that_kills_dask_workers_is_named_and_stops_no_other(scheduler: str) -> None:
    options = WorkerOptions(scheduler=scheduler)
    outcomes = list(run_parallel(square_or_die, [1, 2, 3, 4], jobs=1, options=options))
    (failure,) = (outcome for outcome in outcomes if isinstance(outcome, Failure))
    assert sorted(outcome for outcome in outcomes if not isinstance(outcome, Failure)) == [1, 4, 16]
    assert failure.item == 3
    assert failure.reason.startswith("its workers died, also while running it alone: ")
