"""Resampling: exact box averages down, linear interpolation up, the same however the volume is cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import brute_average, brute_weights
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from data_cache.geometry import Box
from pipeline.resample import average_plane, box_weights, linear_weights

sizes = st.integers(1, 40)


@st.composite
def axes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    n_source, n_target = draw(sizes), draw(sizes)
    start = draw(st.integers(0, n_source - 1))
    return n_source, n_target, start, draw(st.integers(start + 1, n_source))


# --- weights


@given(axis=axes())
def test_box_weights_are_the_shares_of_each_footprint(axis: tuple[int, int, int, int]) -> None:
    weights = box_weights(*axis)
    np.testing.assert_allclose(weights, brute_weights(*axis), atol=1e-12)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-12)


def test_box_weights_by_hand() -> None:
    # 3 voxels to 2: each covers one and a half, so 2/3 of the first is voxel 0 and 1/3 is half of voxel 1.
    np.testing.assert_allclose(box_weights(3, 2), [[2 / 3, 1 / 3, 0.0], [0.0, 1 / 3, 2 / 3]])
    # 2 voxels to 3: the middle one has half of each.
    np.testing.assert_allclose(box_weights(2, 3), [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], atol=1e-15)
    # Only slices 1 and 2 of 4, to one.
    np.testing.assert_allclose(box_weights(4, 1, 1, 3), [[0.0, 0.5, 0.5, 0.0]])


@given(n=sizes)
def test_weights_to_the_same_size_change_nothing(n: int) -> None:
    np.testing.assert_allclose(box_weights(n, n), np.eye(n), atol=1e-12)
    np.testing.assert_allclose(linear_weights(n, n), np.eye(n), atol=1e-12)


@given(n_source=sizes, n_target=sizes)
def test_linear_weights_interpolate_between_centres(n_source: int, n_target: int) -> None:
    values = np.random.default_rng(n_source).normal(size=n_source)
    position = (np.arange(n_target) + 0.5) * n_source / n_target - 0.5
    result = linear_weights(n_source, n_target) @ values
    np.testing.assert_allclose(result, np.interp(position, np.arange(n_source), values), atol=1e-9)
    scipy_result = ndimage.map_coordinates(values, [position], order=1, mode="nearest")
    np.testing.assert_allclose(result, scipy_result, atol=1e-9)


@pytest.mark.parametrize("weights", [box_weights, linear_weights])
def test_cached_weights_cannot_be_edited(weights: Any) -> None:
    with pytest.raises(ValueError, match="read-only"):
        weights(4, 3)[0, 0] = 1


# --- planes


def random_block(dtype: str, shape: tuple[int, int, int], *, seed: int = 0) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.uniform(-32000, 32000, shape).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)


@given(
    dtype=st.sampled_from(["int8", "uint8", "int16", "uint16", ">i2", ">u2", "float32"]),
    shape=st.tuples(st.integers(1, 3), sizes, sizes),
    targets=st.tuples(st.none() | sizes, st.none() | sizes),
    seed=st.integers(0, 9),
)
def test_planes_are_averaged_exactly(
    dtype: str, shape: tuple[int, int, int], targets: tuple[int | None, int | None], seed: int
) -> None:
    block = random_block(np.dtype(dtype).newbyteorder("=").name, shape, seed=seed).astype(dtype)
    n_j, n_i = targets
    result = average_plane(block, n_j=n_j, n_i=n_i)
    target = (shape[0], n_j or shape[1], n_i or shape[2])
    expected = brute_average(block, target, Box.whole(shape))
    assert result.dtype == np.float32
    # Four roundings to float32, relative to the largest value that is summed.
    np.testing.assert_allclose(
        result, expected, atol=4 * 2.0**-23 * max(1.0, np.abs(block.astype(float)).max())
    )


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
@pytest.mark.parametrize("end", ["min", "max"])
def test_extreme_integers_do_not_overflow(dtype: str, end: str) -> None:
    value = getattr(np.iinfo(dtype), end)
    block = np.full((1, 512, 512), value, dtype=dtype)
    assert (average_plane(block, n_j=4, n_i=4) == value).all()  # 128 · 128 · 65535 = 1.07e9, below 2^31


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [("int8", 1), ("int8", 7), ("int8", 8), ("int16", 2047), ("int16", 2048), ("uint16", 2047), ("uint8", 8)],
)
def test_sums_are_exact_on_both_sides_of_what_a_narrower_type_can_hold(dtype: str, largest: int) -> None:
    # 4 · 4 of 7 are 112 and fit 8 bits, of 8 are 128 and do not; of 2047 fit 16 bits, of 2048 do not.
    for value in (largest, -largest) if dtype.startswith("i") else (largest,):
        block = np.full((2, 8, 12), value, dtype=dtype)
        assert (average_plane(block, n_j=2, n_i=3, largest=largest) == value).all()


def test_a_plane_by_hand() -> None:
    # Rows in pairs, columns kept: (1 + 3) / 2 and (2 + 5) / 2; then all four: 11 / 4.
    block = np.array([[[1, 2], [3, 5]]], dtype=np.int16)
    np.testing.assert_array_equal(average_plane(block, n_j=1, n_i=None), [[[2, 3.5]]])
    np.testing.assert_array_equal(average_plane(block, n_j=1, n_i=1), [[[2.75]]])
    np.testing.assert_array_equal(average_plane(block, n_j=None, n_i=None), block)


@given(
    shape=st.tuples(st.integers(1, 3), sizes, sizes),
    n_j=sizes,
    n_i=sizes,
    dtype=st.sampled_from(["int16", "float32"]),
)
def test_averaging_edits_nothing_and_keeps_a_constant(
    shape: tuple[int, int, int], n_j: int, n_i: int, dtype: str
) -> None:
    block = np.full(shape, -1000, dtype=dtype)
    block.flags.writeable = False
    np.testing.assert_allclose(average_plane(block, n_j=n_j, n_i=n_i), -1000, rtol=1e-6)


# --- depth
