"""A campaign against preprocess: killed at random moments, and fed with damaged files. Longer with ``-m slow``."""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import DTYPES, brute_average, canonical_zyx, tree_bytes, write_listing
from numpy.typing import NDArray

from data_cache.errors import CacheError
from data_cache.geometry import Box
from data_cache.reader import CacheStore
from data_cache.schema import PreprocessSpec, View
from pipeline.build import build
from pipeline.decathlon import read_data_set

SPEC = PreprocessSpec()


def preprocess(raw: Path, store: Path) -> subprocess.Popen[str]:
    """The command, in a session of its own, so that it can be killed with all its workers."""
    return subprocess.Popen(
        [sys.executable, "-m", "liverseg", "preprocess", str(raw), str(store), "--jobs", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):  # it may be over, workers included
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


# --- kill -9


@dataclass(frozen=True, slots=True, kw_only=True)
class Undisturbed:
    """What a run gives that nobody kills, and how long it takes."""

    files: dict[str, bytes]
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    store = tmp_path_factory.mktemp("undisturbed") / "cache.zarr"
    start = time.perf_counter()
    code, _, err = finish(preprocess(phantoms, store))
    assert (code, err) == (0, "")
    return Undisturbed(files=tree_bytes(store), seconds=time.perf_counter() - start)


def survives_a_kill(raw: Path, store: Path, *, after_s: float, expected: dict[str, bytes]) -> None:
    process = preprocess(raw, store)
    time.sleep(after_s)
    with contextlib.suppress(ProcessLookupError):  # already over
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    if (store / "zarr.json").exists():
        opened = CacheStore.open(store)
        for case_id in opened.case_ids:  # every case that is visible is whole
            for view in opened.meta(case_id).boxes:
                opened.read(case_id, view)
    done = {path: path.stat().st_mtime_ns for path in store.glob("liver_*/zarr.json")}
    results = build(read_data_set(raw), store, SPEC, jobs=1, report=lambda _: None)
    assert {result.outcome for result in results} <= {"done", "skipped"}
    assert sum(result.outcome == "skipped" for result in results) == len(done)
    assert {path: path.stat().st_mtime_ns for path in done} == done  # and was left alone
    assert tree_bytes(store) == expected


def test_a_killed_preprocess_resumes(phantoms: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    for number, share in enumerate((0.35, 0.55, 0.7, 0.85)):
        store = tmp_path / f"{number}.zarr"
        survives_a_kill(phantoms, store, after_s=share * undisturbed.seconds, expected=undisturbed.files)


@pytest.mark.slow
def test_a_preprocess_killed_at_thirty_random_moments_resumes(
    phantoms: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    rng = np.random.default_rng(time.time_ns())
    for share in rng.uniform(0.05, 1.0, 30):
        store = tmp_path / f"{share}.zarr"
        survives_a_kill(phantoms, store, after_s=share * undisturbed.seconds, expected=undisturbed.files)
        shutil.rmtree(store)


def test_two_preprocesses_on_one_store_at_once_agree(
    phantoms: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    store = tmp_path / "cache.zarr"
    processes = [preprocess(phantoms, store) for _ in range(2)]
    assert [(code, err) for code, _, err in map(finish, processes)] == [(0, "")] * 2
    assert tree_bytes(store) == undisturbed.files


# --- damaged input

Rng = np.random.Generator
Mutation = Callable[[Path, Rng], None]


def flip_a_bit(path: Path, rng: Rng) -> None:
    content = bytearray(path.read_bytes())
    bit = int(rng.integers(8 * len(content)))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def truncate(path: Path, rng: Rng) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(rng.integers(len(content)))])


def zero_a_sector(path: Path, rng: Rng) -> None:
    content = bytearray(path.read_bytes())
    start = int(rng.integers(max(1, len(content) - 512)))
    content[start : start + 512] = bytes(len(content[start : start + 512]))
    path.write_bytes(content)


@contextlib.contextmanager
def header_of(path: Path) -> Iterator[nib.Nifti1Header]:
    """The header of a file that is written back, whatever it says, with the same voxels."""
    content = gzip.decompress(path.read_bytes())
    header = nib.Nifti1Header(content[:348], check=False)
    yield header
    path.write_bytes(gzip.compress(header.binaryblock + content[348:], compresslevel=1, mtime=0))


def lie_about_shape(path: Path, rng: Rng) -> None:
    with header_of(path) as header:
        axis = int(rng.integers(1, 4))
        n = int(header["dim"][axis])
        header["dim"][axis] = rng.choice([0, -1, 1, n - 1, n + 1, 2 * n, n // 2, 32767])


def lie_about_everything(path: Path, rng: Rng) -> None:  # noqa: ARG001 (a Mutation)
    with header_of(path) as header:
        header["dim"][1:4] = 32767


def swap_sizes(path: Path, rng: Rng) -> None:  # noqa: ARG001
    with header_of(path) as header:
        header["dim"][1:3] = header["dim"][1] // 2, header["dim"][2] * 2  # as many voxels, elsewhere


def lie_about_type(path: Path, rng: Rng) -> None:
    with header_of(path) as header:
        if rng.random() < 0.7:
            header.set_data_dtype(rng.choice([d for d in DTYPES if d != header.get_data_dtype().name]))
        else:
            header["datatype"] = rng.integers(0, 2000)


def lie_about_offset(path: Path, rng: Rng) -> None:
    with header_of(path) as header:
        header["vox_offset"] = rng.choice([1, 348, 353, 368, 1000, 1e9, -16, np.nan, np.inf])


def lie_about_scale(path: Path, rng: Rng) -> None:
    with header_of(path) as header:
        header["scl_slope"] = rng.choice([2, -1, 0.5, 0, np.nan, np.inf, 1e5, 3e38])
        header["scl_inter"] = rng.choice([0, 100])


def lie_about_place(path: Path, rng: Rng) -> None:
    with header_of(path) as header:
        header[rng.choice(["srow_x", "srow_y", "srow_z"])] = rng.choice([0, np.nan, 1e30, 5])


def scramble_header(path: Path, rng: Rng) -> None:
    content = bytearray(gzip.decompress(path.read_bytes()))
    for place in rng.integers(0, 352, int(rng.integers(1, 40))):
        content[place] = int(rng.integers(256))
    path.write_bytes(gzip.compress(bytes(content), compresslevel=1, mtime=0))


def swap_label(path: Path, rng: Rng) -> None:
    others = [other for other in path.parent.iterdir() if other != path]
    path.write_bytes(others[int(rng.integers(len(others)))].read_bytes())


def put_nan(path: Path, rng: Rng) -> None:
    image: Any = nib.load(path)
    values = np.asarray(image.dataobj).astype(np.float32)
    places = tuple(rng.integers(0, n, 50) for n in values.shape)
    values[places] = rng.choice([np.nan, np.inf, -np.inf], 50)
    path.write_bytes(
        gzip.compress(nib.Nifti1Image(values, image.affine).to_bytes(), compresslevel=1, mtime=0)
    )


# Damage to bytes must be noticed, or be of no consequence; a header that says something else is another file.
DAMAGES: tuple[Mutation, ...] = (flip_a_bit, flip_a_bit, flip_a_bit, truncate, zero_a_sector)
OTHER_FILES: tuple[Mutation, ...] = (
    lie_about_shape,
    lie_about_everything,
    swap_sizes,
    lie_about_type,
    lie_about_offset,
    lie_about_scale,
    lie_about_place,
    scramble_header,
    swap_label,
    put_nan,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A case one of whose two files was changed."""

    case_id: str
    origin: str
    mutation: Mutation

    def __str__(self) -> str:
        return f"{self.case_id} ({self.mutation.__name__} of {self.origin})"


def make_mutants(phantoms: Path, raw: Path, *, count: int, seed: int) -> list[Mutant]:
    mutations = (*DAMAGES, *OTHER_FILES)
    origins = [case.case_id for case in read_data_set(phantoms).cases]
    mutants = [
        Mutant(case_id=f"m{i}", origin=origins[i % len(origins)], mutation=mutations[i % len(mutations)])
        for i in range(count)
    ]
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True)
        for mutant in mutants:
            shutil.copy(
                phantoms / folder / f"{mutant.origin}.nii.gz", raw / folder / f"{mutant.case_id}.nii.gz"
            )
    for i, mutant in enumerate(mutants):
        rng = np.random.default_rng((seed, i))
        folder = "labelsTr" if mutant.mutation is swap_label or rng.random() < 0.4 else "imagesTr"
        mutant.mutation(raw / folder / f"{mutant.case_id}.nii.gz", rng)
    write_listing(raw, [mutant.case_id for mutant in mutants])
    return mutants


def views_of(store: CacheStore, case_id: str) -> dict[str, View]:
    return {name: store.read(case_id, name) for name in store.meta(case_id).boxes}


def assert_equal(found: dict[str, View], expected: dict[str, View], what: str) -> None:
    assert found.keys() == expected.keys(), what
    for name, view in found.items():
        np.testing.assert_array_equal(view.image_zyx, expected[name].image_zyx, what)
        np.testing.assert_array_equal(view.fractions_czyx, expected[name].fractions_czyx, what)


def assert_as_nibabel(found: dict[str, View], boxes: dict[str, Box], raw: Path, case_id: str) -> None:
    with np.errstate(over="ignore"):
        image, label = (canonical_zyx(raw / f / f"{case_id}.nii.gz")[0] for f in ("imagesTr", "labelsTr"))
    image = np.where(np.isfinite(image), image, SPEC.air_hu)
    for name, view in found.items():

        def averaged(volume: NDArray[Any], box: Box = boxes[name]) -> NDArray[np.float64]:
            return brute_average(volume, SPEC.shape_zyx, box)

        # Voxels out of range are clipped before they are averaged, or, where integers are, after it.
        expected = averaged(np.clip(image, -32767, 32767)), np.clip(averaged(image), -32767, 32767)
        assert min(np.abs(view.image_zyx - e).max() for e in expected) < 0.52, case_id
        assert view.fractions_czyx is not None
        whole = view.fractions_czyx.astype(int).sum(axis=0)
        assert np.abs(whole - 255 * averaged(np.rint(label) >= 1)).max() < 0.51, case_id
        assert np.abs(view.fractions_czyx[1] - 255 * averaged(np.rint(label) == 2)).max() < 0.51, case_id


def assert_right_or_refused(phantoms: Path, tmp_path: Path, *, count: int, seed: int) -> None:
    raw, store_path = tmp_path / "raw", tmp_path / "cache.zarr"
    mutants = make_mutants(phantoms, raw, count=count, seed=seed)
    build(read_data_set(phantoms), tmp_path / "whole.zarr", SPEC, jobs=1, report=lambda _: None)
    whole = CacheStore.open(tmp_path / "whole.zarr")
    code, out, err = finish(preprocess(raw, store_path))
    store = CacheStore.open(store_path)
    refused = [mutant for mutant in mutants if mutant.case_id not in store.case_ids]
    assert "Traceback" not in err + out
    errors = [line for line in err.splitlines() if not line.startswith("warning: ")]
    for mutant in refused:
        line = next(line for line in errors if line.startswith(f"error: {mutant.case_id}: "))
        assert f"Tr/{mutant.case_id}.nii.gz: " in line, mutant
        assert "Error: " not in line, mutant  # a name of an exception: a fault of ours
    assert len(errors) == len(refused)
    assert code == (1 if refused else 0)
    for mutant in set(mutants) - set(refused):
        found = views_of(store, mutant.case_id)
        if mutant.mutation in (*DAMAGES, lie_about_place):
            # An sform that is no affine, where nibabel gives up, leaves the qform, which has not changed.
            assert_equal(found, views_of(whole, mutant.origin), str(mutant))
        else:
            assert_as_nibabel(found, store.meta(mutant.case_id).boxes, raw, mutant.case_id)
    assert count / 3 < len(refused) < count  # the campaign does reach both ends


def test_mutated_input_is_cached_right_or_refused_by_name(phantoms: Path, tmp_path: Path) -> None:
    assert_right_or_refused(phantoms, tmp_path, count=45, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_much_mutated_input_is_cached_right_or_refused_by_name(
    phantoms: Path, tmp_path: Path, seed: int
) -> None:
    assert_right_or_refused(phantoms, tmp_path, count=210, seed=seed)


# --- a full disk


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a file system")
@pytest.mark.slow
def test_a_disk_that_is_full_is_said_and_the_store_stays_valid(phantoms: Path, tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("may not mount")
    try:
        code, _, err = finish(preprocess(phantoms, mount / "cache.zarr"))
        assert code == 1
        assert "No space left on device" in err
        assert "Traceback" not in err
        with contextlib.suppress(CacheError):
            store = CacheStore.open(mount / "cache.zarr")
            for case_id in store.case_ids:
                views_of(store, case_id)
        subprocess.run(["mount", "-o", "remount,size=1g", str(mount)], check=True)
        assert finish(preprocess(phantoms, mount / "cache.zarr"))[0] == 0
    finally:
        subprocess.run(["umount", str(mount)], check=True)
