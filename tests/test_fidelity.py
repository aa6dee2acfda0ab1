"""``liverseg fidelity``: equal to the same round trip written out in whole volumes, in every orientation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import (
    ORIENTATIONS,
    canonical_zyx,
    oriented_affine,
    random_scan,
    write_listing,
    write_nifti,
    write_pair,
)
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_cache.geometry import Box
from data_cache.reader import CacheStore
from data_cache.schema import CaseMeta, PreprocessSpec
from liverseg.cli import main
from pipeline.build import build
from pipeline.decathlon import read_data_set
from pipeline.fidelity import CaseFidelity, Runs, measure
from pipeline.lesion_fidelity import LesionFidelity, TumourBox, by_diameter, lesion_fidelities
from pipeline.nifti import VolumeStream, to_canonical
from pipeline.restore import native_labels
from pipeline.workers import Failure

SPEC = PreprocessSpec(shape_zyx=(6, 5, 4))


def cached(raw: Path, spec: PreprocessSpec = SPEC) -> CacheStore:
    store = raw / "cache.zarr"
    results = build(read_data_set(raw), store, spec, jobs=1, report=lambda _: None, force=True)
    assert {result.outcome for result in results} == {"done"}
    return CacheStore.open(store)


def one_case(raw: Path, label_ijk: NDArray[np.uint8], file_axes: str = "RAS") -> CacheStore:
    image = random_scan(label_ijk.shape)[0]
    write_pair(raw, "liver_0", image, label_ijk, affine=oriented_affine(file_axes))
    write_listing(raw, ["liver_0"])
    return cached(raw)


def measured(
    raw: Path, store: CacheStore, *, jobs: int = 1
) -> tuple[list[CaseFidelity], list[Failure[CaseMeta]]]:
    told: list[CaseFidelity | Failure[CaseMeta]] = []
    results = measure(raw, store, jobs=jobs, report=told.append)
    return results, [result for result in told if isinstance(result, Failure)]


def dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float | None:
    return float(2 * (a & b).sum() / (a.sum() + b.sum())) if b.any() else None


def nearest_round_trip(
    truth_zyx: NDArray[np.float64], box: Box, shape_zyx: tuple[int, int, int]
) -> NDArray[np.float64]:
    """Down to the grid and up again by index arithmetic in floating point, on the whole canonical volume."""
    down, up = [], []
    spans = zip(box.start_zyx, box.stop_zyx, strict=True)
    for (start, stop), n_target in zip(spans, shape_zyx, strict=True):
        factor = (stop - start) / n_target
        down.append((start + np.floor((np.arange(n_target) + 0.5) * factor + 1e-9)).astype(int))
        up.append(np.floor((np.arange(stop - start) + 0.5) / factor + 1e-9).astype(int))
    restored = np.zeros_like(truth_zyx)
    restored[box.slices_zyx] = truth_zyx[np.ix_(*down)][np.ix_(*up)]
    return restored


@pytest.mark.parametrize("file_axes", ORIENTATIONS)
def test_both_ways_equal_whole_volumes_in_every_orientation(file_axes: str, tmp_path: Path) -> None:
    store = one_case(tmp_path, random_scan((11, 9, 13))[1], file_axes)
    (result,), failed = measured(tmp_path, store)
    truth, _ = canonical_zyx(tmp_path / "labelsTr" / "liver_0.nii.gz")
    box = store.meta("liver_0").boxes["liver"]
    nearest = nearest_round_trip(truth, box, SPEC.shape_zyx)
    fractions = store.read("liver_0", "liver").fractions_czyx
    assert fractions is not None
    with VolumeStream.open(tmp_path / "labelsTr" / "liver_0.nii.gz") as stream:
        header = stream.header
    blocks = native_labels(fractions.astype(np.float32) / np.float32(255), box, header)
    restored = to_canonical(np.concatenate(list(blocks)), header.axes_kji)
    assert failed == []
    assert result == CaseFidelity(
        case="liver_0",
        lesions=result.lesions,
        liver=dice(restored >= 1, truth >= 1),
        tumour=dice(restored == 2, truth == 2),
        nearest_liver=dice(nearest >= 1, truth >= 1),
        nearest_tumour=dice(nearest == 2, truth == 2),
    )


def test_by_hand(tmp_path: Path) -> None:
    # 8 voxels along x, 4 on the grid: 2 a cached voxel; y and z are kept. Liver is x = 1 … 4, that is
    # fractions .5, 1, .5, 0. Centres lie between two voxels and the upper one is taken: x = 1, 3, 5, 7 say
    # liver, liver, none, none, which is x = 0 … 3. So 3 of 4 voxels are shared: 2·3 / (4 + 4).
    label = np.zeros((8, 5, 6), dtype=np.uint8)
    label[1:5] = 1
    (result,), _ = measured(tmp_path, one_case(tmp_path, label))
    assert result.nearest_liver == 0.75
    # Linear between centres (x = 0.5, 2.5, 4.5): one half is reached from x = 0.5 to 4.5, so by 1 … 4, and at x = 0
    # the edge voxel's one half is held, too: 2·4 / (5 + 4). 128/255 is above a half.
    assert result.liver == 8 / 9
    assert result.tumour is result.nearest_tumour is None


def test_a_grid_of_the_native_size_loses_nothing(tmp_path: Path) -> None:
    label = np.zeros((4, 5, 6), dtype=np.uint8)
    label[1:3, 1:4] = 1  # in all slices, so that the window is the whole depth
    label[2, 2, :] = 2
    (result,), _ = measured(tmp_path, one_case(tmp_path, label))
    assert result == CaseFidelity(
        case="liver_0",
        liver=1.0,
        tumour=1.0,
        nearest_liver=1.0,
        nearest_tumour=1.0,
        lesions=(LesionFidelity(diameter_mm=result.lesions[0].diameter_mm, dice=1.0, volume_ratio=1.0),),
    )


def test_classes_that_the_truth_lacks_are_none(tmp_path: Path) -> None:
    (result,), failed = measured(tmp_path, one_case(tmp_path, np.zeros((8, 9, 10), dtype=np.uint8)))
    assert failed == []
    assert result == CaseFidelity(
        case="liver_0", liver=None, tumour=None, nearest_liver=None, nearest_tumour=None, lesions=()
    )


def test_another_label_than_the_cached_one_is_named_and_stops_no_other(
    phantoms: Path, tmp_path: Path
) -> None:
    shutil.copytree(phantoms, tmp_path, dirs_exist_ok=True)
    store = cached(tmp_path)
    label = tmp_path / "labelsTr" / "liver_1.nii.gz"
    write_nifti(label, np.ones((40, 40, 40), dtype=np.uint8))
    (tmp_path / "labelsTr" / "liver_2.nii.gz").unlink()
    write_nifti(tmp_path / "labelsTr" / "liver_4.nii.gz", np.ones((40, 40, 39), dtype=np.uint8))
    results, failed = measured(tmp_path, store)
    assert [result.case for result in results] == ["liver_0", "liver_3", "liver_5"]
    assert [failure.item.case_id for failure in failed] == ["liver_1", "liver_2", "liver_4"]
    assert str(label) in failed[0].reason
    assert "not the file that the case was built from" in failed[0].reason
    assert "not the file that the case was built from" in failed[2].reason
    assert measured(tmp_path, store, jobs=2)[0] == results


def test_command(phantoms: Path, tmp_path: Path) -> None:
    store, spec = tmp_path / "cache.zarr", PreprocessSpec(shape_zyx=(16, 20, 20))
    build(read_data_set(phantoms), store, spec, jobs=1, report=lambda _: None)
    out = tmp_path / "out" / "fidelity.json"
    command = ["fidelity", str(phantoms), str(store), "--json", str(out), "--jobs", "1"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    cases = json.loads(out.read_text())
    assert list(cases) == ["written_by", "cases", "by_diameter"]
    assert [case["case"] for case in cases["cases"]] == [f"liver_{i}" for i in range(6)]
    assert set(cases["cases"][0]) == {
        "case",
        "liver",
        "tumour",
        "nearest_liver",
        "nearest_tumour",
        "lesions",
    }
    assert all(0.5 < case["liver"] <= 1 and case["liver"] > case["nearest_liver"] for case in cases["cases"])
    assert "mean" in result.output
    lesions = [lesion for case in cases["cases"] for lesion in case["lesions"]]
    assert [size["diameter_mm"] for size in cases["by_diameter"]] == ["< 10", "10-20", "> 20"]
    assert sum(size["lesions"] for size in cases["by_diameter"]) == len(lesions) > 0
    assert "what the grid allows at each size" in result.output


def test_command_fails_where_a_case_does(phantoms: Path, tmp_path: Path) -> None:
    store = tmp_path / "cache.zarr"
    build(read_data_set(phantoms), store, SPEC, jobs=1, report=lambda _: None)
    out = tmp_path / "fidelity.json"
    command = ["fidelity", str(tmp_path), str(store), "--json", str(out), "--jobs", "1"]
    assert CliRunner().invoke(main, command).exit_code == 1
    assert json.loads(out.read_text())["cases"] == []
    assert CliRunner().invoke(main, ["fidelity", str(tmp_path / "nowhere"), str(store)]).exit_code == 1


def test_a_real_liver_comes_back(real_data: Path, tmp_path: Path) -> None:
    data_set = read_data_set(real_data)
    chaos = [case for case in data_set.cases if case.case_id == "chaos_ct03"]
    write_listing(tmp_path, ["chaos_ct03"])
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).symlink_to(real_data / folder)
    (result,), _ = measured(tmp_path, cached(tmp_path, PreprocessSpec()))
    assert len(chaos) == 1
    assert result.liver is not None
    assert result.nearest_liver is not None
    assert result.liver >= 0.99
    assert result.nearest_liver < result.liver - 0.005  # the usual way, on the same box


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8), cuts=st.lists(st.integers(1, 7), max_size=20)
)
def test_runs_are_the_blocks_cut_otherwise(sizes: list[int], cuts: list[int]) -> None:
    whole = np.arange(sum(sizes), dtype=np.uint8).reshape(-1, 1, 1)
    runs = Runs(np.split(whole, np.cumsum(sizes)[:-1]))
    taken, left = [], len(whole)
    for cut in [*cuts, left]:
        n = min(cut, left)
        if n:
            taken.append(runs.take(n))
            assert len(taken[-1]) == n
        left -= n
    assert np.array_equal(np.concatenate(taken), whole[: len(whole) - left])


# ---- by lesion


def test_lesions_by_hand() -> None:
    # Two lesions of 4 and 2 voxels in a row of 3 mm³ voxels; 1 voxel of the first is missed, and of three voxels
    # beyond it the last is nearer to the second, of which all is there.
    truth, predicted = np.zeros((1, 1, 12), dtype=bool), np.zeros((1, 1, 12), dtype=bool)
    truth[..., 0:4] = truth[..., 8:10] = True
    predicted[..., 1:6] = predicted[..., 7:10] = True
    first, second = lesion_fidelities(truth, predicted, (1.0, 1.0, 3.0))
    # 3 shared of 4 true and 3 + 2 found; 2 shared of 2 and 2 + 1.
    assert (first.dice, second.dice) == (2 * 3 / (4 + 5), 2 * 2 / (2 + 3))
    assert (first.volume_ratio, second.volume_ratio) == (5 / 4, 3 / 2)
    assert first.diameter_mm == pytest.approx((6 * 12 / np.pi) ** (1 / 3))
    assert lesion_fidelities(predicted & False, predicted, (1.0, 1.0, 3.0)) == ()
    (lost, _) = lesion_fidelities(truth, truth & False, (1.0, 1.0, 3.0))
    assert (lost.dice, lost.volume_ratio) == (0, 0)


def test_what_lies_beyond_counts_for_the_nearest_in_mm() -> None:
    # One voxel between two lesions: two voxels of 1 mm from the one, one of 5 mm from the other.
    truth, predicted = np.zeros((2, 1, 4), dtype=bool), np.zeros((2, 1, 4), dtype=bool)
    truth[0, 0, 0] = truth[1, 0, 3] = True
    predicted[0, 0, 3] = True
    assert [lesion.volume_ratio for lesion in lesion_fidelities(truth, predicted, (5.0, 1.0, 1.0))] == [1, 0]
    assert [lesion.volume_ratio for lesion in lesion_fidelities(truth, predicted, (1.0, 1.0, 1.0))] == [0, 1]


def test_sizes_add_up_to_all_lesions() -> None:
    lesions = [
        LesionFidelity(diameter_mm=diameter_mm, dice=dice, volume_ratio=2 * dice)
        for diameter_mm, dice in ((9.9, 0.0), (10.0, 0.25), (20.0, 0.75), (5.0, 0.5))
    ]
    small, medium, large = by_diameter(lesions)
    assert (small.lesions, small.found, small.dice, small.volume_ratio) == (2, 1, 0.25, 0.5)
    assert (medium.lesions, medium.found, medium.dice, medium.volume_ratio) == (2, 2, 0.5, 1.0)
    assert (large.lesions, large.found, large.dice, large.volume_ratio) == (0, 0, None, None)


@given(seed=st.integers(0, 999), cuts=st.lists(st.integers(1, 11), max_size=3, unique=True))
def test_the_box_of_the_tumours_is_cut_from_the_volume(seed: int, cuts: list[int]) -> None:
    rng = np.random.default_rng(seed)
    truth, predicted = rng.random((2, 12, 5, 6)) < 0.03
    box, first = TumourBox(), 0
    for a, b in zip(np.split(truth, sorted(cuts)), np.split(predicted, sorted(cuts)), strict=True):
        box.add(first, a, b)
        first += len(a)
    filled = np.argwhere(truth | predicted)
    if not len(filled):
        return
    around = tuple(slice(a, b + 1) for a, b in zip(filled.min(axis=0), filled.max(axis=0), strict=True))
    np.testing.assert_array_equal(box.masks(), (truth[around], predicted[around]))


def test_no_tumour_is_an_empty_box() -> None:
    box = TumourBox()
    box.add(0, np.zeros((2, 3, 4), dtype=bool), np.zeros((2, 3, 4), dtype=bool))
    assert [mask.shape for mask in box.masks()] == [(0, 0, 0)] * 2
