"""Geometry: a resampled grid covers the same box, and a window keeps its margin inside the scan."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import ORIENTATIONS, boxes_in, oriented_affine, slab
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_cache.geometry import Box, Grid, corner_distance_mm, resampled_grid
from data_cache.schema import Crop, PreprocessSpec

sizes = st.integers(1, 60)
shapes = st.tuples(sizes, sizes, sizes)


@st.composite
def affines(draw: st.DrawFn) -> NDArray[np.float64]:
    spacings = draw(st.tuples(*[st.floats(0.3, 6)] * 3))
    affine = oriented_affine(draw(st.sampled_from(ORIENTATIONS)), spacings)
    affine[:3, :3] += draw(st.floats(-0.1, 0.1)) * np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]])
    return affine


def point(affine: NDArray[np.float64], x: float, y: float, z: float) -> NDArray[np.float64]:
    mm: NDArray[np.float64] = (affine @ np.array([x, y, z, 1.0]))[:3]
    return mm


@given(affine=affines(), native=shapes, target=shapes, data=st.data())
def test_a_resampled_grid_covers_its_box_face_to_face(
    affine: NDArray[np.float64],
    native: tuple[int, int, int],
    target: tuple[int, int, int],
    data: st.DataObject,
) -> None:
    box = data.draw(boxes_in(native))
    grid = resampled_grid(Grid.from_array(native, affine), box, target)
    assert grid.shape_zyx == target
    for upper_x, upper_y, upper_z in np.ndindex(2, 2, 2):
        z, y, x = (
            (box.start_zyx, box.stop_zyx)[upper][axis]
            for axis, upper in enumerate((upper_z, upper_y, upper_x))
        )
        old = (x, y, z)
        new = (upper_x * target[2], upper_y * target[1], upper_z * target[0])
        old_mm = point(affine, *(v - 0.5 for v in old))  # voxel i reaches from i - 0.5 to i + 0.5
        new_mm = point(grid.affine, *(v - 0.5 for v in new))
        np.testing.assert_allclose(new_mm, old_mm, atol=1e-9 * 60 * 6 * 100)


@given(affine=affines(), native=shapes)
def test_resampling_to_the_same_shape_changes_nothing(
    affine: NDArray[np.float64], native: tuple[int, int, int]
) -> None:
    grid = Grid.from_array(native, affine)
    same = resampled_grid(grid, Box.whole(native), native)
    np.testing.assert_allclose(same.affine, grid.affine, atol=1e-9)


def test_centres_of_a_resampled_grid_by_hand() -> None:
    # 12 columns of 1 mm to 4 of 3 mm: the first covers 0..2, its centre is column 1, at 10 + 1 = 11 mm.
    # Slices 2..5 of 2 mm to 2 of 4 mm: the first covers 2 and 3, its centre is slice 2.5, at 100 + 5 = 105 mm.
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    affine[:3, 3] = (10, 20, 100)
    grid = resampled_grid(Grid.from_array((8, 6, 12), affine), slab(2, 6, (8, 6, 12)), (2, 3, 4))
    np.testing.assert_allclose(point(grid.affine, 0, 0, 0), (11, 20.5, 105))
    np.testing.assert_allclose(point(grid.affine, 3, 2, 1), (20, 24.5, 109))
    assert grid.spacing_zyx_mm == (4, 2, 3)


@pytest.mark.parametrize("shape_zyx", [(12, 10, 8), (1, 1, 1)])
def test_volume_is_kept(shape_zyx: tuple[int, int, int]) -> None:
    native = Grid.from_array((7, 5, 9), oriented_affine("LPI"))
    grid = resampled_grid(native, Box.whole((7, 5, 9)), shape_zyx)
    total_ml = 7 * 5 * 9 * 0.8 * 0.9 * 2.5 / 1000
    assert np.prod(shape_zyx) * grid.voxel_volume_ml == pytest.approx(total_ml)


def test_a_sheared_voxel_counts_by_its_determinant() -> None:
    affine = np.diag([2.0, 3.0, 5.0, 1.0])
    affine[0, 1] = 4.0  # slides the rows along x: the volume stays 2 · 3 · 5 = 30 mm³
    grid = Grid.from_array((1, 1, 1), affine)
    assert grid.voxel_volume_ml == pytest.approx(0.03)
    assert grid.spacing_zyx_mm == (5, 5, 2)  # and the row axis is √(4² + 3²) long


@pytest.mark.parametrize(
    ("first", "last", "depth", "expected"),
    [
        (20, 60, 78, (18, 63)),  # chaos_ct03: 78 / 50 = 1.56, rounded up to 2 slices each side
        (0, 77, 78, (0, 78)),  # never outside of the scan
        (1, 1, 3, (0, 3)),  # 3 / 50 rounds up to 1
        (30, 40, 50, (29, 42)),  # 50 / 50 = 1 exactly
        (100, 200, 1000, (80, 221)),
    ],
)
def test_depth_margin_by_hand(first: int, last: int, depth: int, expected: tuple[int, int]) -> None:
    grid = Grid.from_array((depth, 9, 8), np.eye(4))
    labelled = Box(start_zyx=(first, 4, 4), stop_zyx=(last + 1, 5, 5))
    box = PreprocessSpec(crop="depth").close_box(labelled, grid)
    assert box == slab(*expected, grid.shape_zyx)


@pytest.mark.parametrize("depth", range(50, 2001, 50))
def test_a_margin_that_is_a_whole_number_is_not_rounded_up(depth: int) -> None:
    # In floating point 350 · 0.02 could be 7.000000000000001.
    labelled = slab(depth // 2, depth // 2 + 1, (depth, 1, 1))
    box = PreprocessSpec(crop="depth").close_box(labelled, Grid.from_array((depth, 1, 1), np.eye(4)))
    assert box.shape_zyx[0] == 1 + 2 * depth // 50


def test_box_margin_by_hand() -> None:
    # 10 mm are 2 slices of 5 mm, 10 rows of 1 mm and 12.5, so 13, columns of 0.8 mm; the scan ends 3 rows behind.
    grid = Grid.from_array((20, 43, 100), np.diag([0.8, 1.0, 5.0, 1.0]))
    labelled = Box(start_zyx=(4, 30, 50), stop_zyx=(10, 40, 60))
    expected = Box(start_zyx=(2, 20, 37), stop_zyx=(12, 43, 73))
    assert PreprocessSpec(margin_mm=10.0).close_box(labelled, grid) == expected


@given(native=shapes, margin=st.floats(0, 60), data=st.data())
def test_a_close_box_holds_what_is_labelled_and_stays_inside(
    native: tuple[int, int, int], margin: float, data: st.DataObject
) -> None:
    labelled = data.draw(boxes_in(native))
    crops: tuple[Crop, ...] = ("box", "depth")
    crop = data.draw(st.sampled_from(crops))
    spec = PreprocessSpec(crop=crop, margin_mm=margin, margin_fraction=margin / 60)
    box = spec.close_box(labelled, Grid.from_array(native, np.diag([0.7, 0.8, 2.5, 1.0])))
    for axis, n in enumerate(native):
        assert 0 <= box.start_zyx[axis] <= labelled.start_zyx[axis]
        assert labelled.stop_zyx[axis] <= box.stop_zyx[axis] <= n
    assert np.zeros(native)[box.slices_zyx].shape == box.shape_zyx


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 3), (4, 3)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_box_without_voxels_is_refused(start: int, stop: int, axis: int) -> None:
    ends = [slice(0, 9)] * 3
    ends[axis] = slice(start, stop)
    with pytest.raises(ValueError, match=f"got .*{start}:{stop}"):
        Box.from_slices(ends)


def test_corner_distance_by_hand() -> None:
    # Rows of 101 voxels, 1.00 against 1.01 mm: the ends are 100 · 0.01 = 1 mm apart, and 2 mm more by the origin.
    a = Grid.from_array((2, 2, 101), np.diag([1.0, 1.0, 1.0, 1.0]))
    affine = np.diag([1.01, 1.0, 1.0, 1.0])
    affine[0, 3] = 2.0
    b = Grid.from_array((2, 2, 101), affine)
    assert corner_distance_mm(a, b) == pytest.approx(3.0)
    assert corner_distance_mm(a, b) == corner_distance_mm(b, a)
    assert corner_distance_mm(a, a) == 0


def test_grids_compare_hash_and_hold_plain_numbers() -> None:
    affine = oriented_affine("LPS").astype(np.float32)
    a, b = (Grid.from_array(list(np.array((3, 4, 5))), affine) for _ in range(2))
    assert a == b
    assert len({a, b}) == 1
    assert {type(n) for n in a.shape_zyx} == {int}
    assert {type(v) for row in a.affine_xyz for v in row} == {float}
    a.affine[0, 0] = 99  # a fresh array: the grid stays
    assert a == b
