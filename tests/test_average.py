"""Averages of streams: a view is the mean over each voxel's footprint, whatever blocks it came in."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from conftest import ORIENTATIONS, boxes_in, brute_average, oriented_affine, slab, write_nifti
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_cache.geometry import Box
from pipeline.average import BoxAverage, canonical_box, file_slices
from pipeline.held import HeldBlock
from pipeline.nifti import VolumeHeader, VolumeStream, from_canonical

ON_DISK = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def header_of(tmp_path: Path, shape_ijk: tuple[int, int, int], file_axes: str) -> VolumeHeader:
    path = write_nifti(tmp_path / "a.nii", np.zeros(shape_ijk, np.int16), oriented_affine(file_axes))
    with VolumeStream.open(path) as stream:
        return stream.header


@st.composite
def partitions(draw: st.DrawFn, n: int) -> list[slice]:
    cuts = draw(st.sets(st.integers(1, n - 1), max_size=4)) if n > 1 else set()
    return [slice(a, b) for a, b in itertools.pairwise([0, *sorted(cuts), n])]


@given(
    shape=st.tuples(*[st.integers(1, 12)] * 3),
    view_shape=st.tuples(*[st.integers(1, 7)] * 3),
    file_axes=st.sampled_from(ORIENTATIONS),
    dtype=st.sampled_from(["int16", "uint8", "float32"]),
    data=st.data(),
)
@ON_DISK
def test_blocks_in_any_order_and_size_give_the_mean_over_each_footprint(
    tmp_path: Path,
    shape: tuple[int, int, int],
    view_shape: tuple[int, int, int],
    file_axes: str,
    dtype: str,
    data: st.DataObject,
) -> None:
    header = header_of(tmp_path, shape, file_axes)
    volume_zyx = np.random.default_rng(0).integers(0, 250, header.grid.shape_zyx).astype(dtype)
    stored_kji = from_canonical(volume_zyx, header.axes_kji)
    box = data.draw(boxes_in(header.grid.shape_zyx))
    average = BoxAverage(header, box, view_shape)
    parts = [data.draw(partitions(n)) for n in header.shape_kji]
    for k, j, i in data.draw(st.permutations(list(itertools.product(*parts)))):
        start = (k.start, j.start, i.start)
        block = stored_kji[k, j, i]
        before = average.values_zyx()
        average.add(start, block, largest=250 if dtype != "float32" else None)
        if not average.reaches(start, block.shape):
            np.testing.assert_array_equal(average.values_zyx(), before)
    expected = brute_average(volume_zyx, view_shape, box)
    np.testing.assert_allclose(average.values_zyx(), expected, atol=2e-4, rtol=1e-6)


def test_whole_groups_of_integers_are_exact(tmp_path: Path) -> None:
    header = header_of(tmp_path, (16, 8, 6), "LPS")
    volume_zyx = np.full((6, 8, 16), 32767, dtype=np.int16)
    average = BoxAverage(header, slab(0, 6, (6, 8, 16)), (6, 2, 4))
    average.add((0, 0, 0), volume_zyx)
    assert (average.values_zyx() == 32767).all()


def test_no_blocks_are_zeros(tmp_path: Path) -> None:
    average = BoxAverage(header_of(tmp_path, (3, 4, 5), "RAS"), Box.whole((5, 4, 3)), (2, 2, 2))
    assert average.values_zyx().shape == (2, 2, 2)
    assert not average.values_zyx().any()


@given(shape=st.tuples(*[st.integers(1, 9)] * 3), file_axes=st.sampled_from(ORIENTATIONS), data=st.data())
@ON_DISK
def test_a_box_in_the_file_and_back(
    tmp_path: Path, shape: tuple[int, int, int], file_axes: str, data: st.DataObject
) -> None:
    header = header_of(tmp_path, shape, file_axes)
    box = data.draw(boxes_in(header.grid.shape_zyx))
    volume_zyx = np.arange(np.prod(shape)).reshape(header.grid.shape_zyx)
    inside = from_canonical(volume_zyx, header.axes_kji)[file_slices(box, header)]
    assert set(inside.ravel().tolist()) == set(volume_zyx[box.slices_zyx].ravel().tolist())
    assert canonical_box(file_slices(box, header), header) == box


@pytest.mark.parametrize("dtype", ["int16", ">i2", "uint8", "int8", "uint16"])
def test_held_blocks_come_back_bit_for_bit(dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 120, (3, 40, 50)).astype(dtype)[:, 2:, ::-1]
    block = HeldBlock.of((4, 0, 7), values)
    assert (block.start_kji, block.shape_kji) == ((4, 0, 7), values.shape)
    np.testing.assert_array_equal(block.values_kji(), values)
