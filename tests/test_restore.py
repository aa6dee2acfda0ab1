"""Restore: cached fractions give the label back on its own grid, in any orientation, and nothing outside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import ORIENTATIONS, boxes_in, oriented_affine, random_scan, slab, write_nifti, write_pair
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from data_cache.geometry import Box
from data_cache.schema import FRACTION_ONE, PreprocessSpec, View
from pipeline.labels import decide
from pipeline.lesions import LOWEST_SHARE, lesion_regions, lowest_shares
from pipeline.nifti import VolumeHeader, VolumeStream
from pipeline.prepare import prepare_case
from pipeline.resample import box_weights
from pipeline.restore import native_labels, native_values

ON_DISK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def header_of(path: Path) -> VolumeHeader:
    with VolumeStream.open(path) as stream:
        return stream.header


def probabilities(view: View) -> NDArray[np.float32]:
    assert view.fractions_czyx is not None
    return view.fractions_czyx.astype(np.float32) / np.float32(FRACTION_ONE)


def restored_ijk(foreground_czyx: NDArray[np.float32], box: Box, header: VolumeHeader) -> NDArray[np.uint8]:
    return np.concatenate(list(native_labels(foreground_czyx, box, header))).transpose(2, 1, 0)


def dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


def ellipsoids(shape_xyz: tuple[int, int, int] = (60, 56, 48)) -> NDArray[np.uint8]:
    """A liver that fills half of each axis, and a tumour in it."""
    x, y, z = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in shape_xyz)]
    label = ((x / 0.6) ** 2 + (y / 0.5) ** 2 + (z / 0.55) ** 2 < 1).astype(np.uint8)
    label[((x - 0.15) / 0.25) ** 2 + (y / 0.25) ** 2 + ((z + 0.1) / 0.25) ** 2 < 1] = 2
    return label


# --- crop and paste


@pytest.mark.parametrize("file_axes", ORIENTATIONS)
def test_a_label_comes_back_from_the_cache(tmp_path: Path, file_axes: str) -> None:
    label_ijk = ellipsoids().transpose(["RLAPSI".index(code) // 2 for code in file_axes])
    image, label = write_pair(
        tmp_path, "a", label_ijk.astype(np.int16), label_ijk, affine=oriented_affine(file_axes)
    )
    spec = PreprocessSpec(shape_zyx=(32, 40, 40))
    case = prepare_case("a", image, label, spec, root=tmp_path, force=True)
    header = header_of(image)
    for name, view in case.views.items():
        restored = restored_ijk(probabilities(view), case.meta.boxes[name], header)
        assert restored.shape == label_ijk.shape
        assert dice(restored >= 1, label_ijk >= 1) > 0.99
        assert dice(restored == 2, label_ijk == 2) > 0.96


def test_at_the_native_resolution_it_comes_back_exactly(tmp_path: Path) -> None:
    # Each cached voxel is a native one: nothing is averaged, and linear interpolation falls on the centres.
    image_ijk, label_ijk = random_scan((9, 8, 10))
    image, label = write_pair(tmp_path, "a", image_ijk, label_ijk, affine=oriented_affine("PIR"))
    spec = PreprocessSpec(shape_zyx=header_of(image).grid.shape_zyx)
    case = prepare_case("a", image, label, spec, root=tmp_path, force=True)
    restored = restored_ijk(probabilities(case.views["scan"]), case.meta.boxes["scan"], header_of(image))
    np.testing.assert_array_equal(restored, label_ijk)


def test_a_real_liver_comes_back(tmp_path: Path, real_data: Path) -> None:
    image, label = (real_data / folder / "chaos_ct03.nii.gz" for folder in ("imagesTr", "labelsTr"))
    case = prepare_case("chaos_ct03", image, label, PreprocessSpec(), root=tmp_path)
    restored = native_labels(probabilities(case.views["liver"]), case.meta.boxes["liver"], header_of(image))
    both, sizes, start = 0, 0, 0
    with VolumeStream.open(label) as stream:
        truth = np.concatenate([block.copy() for _, block in stream.blocks()])
    for block in restored:
        expected = truth[start : start + len(block)] >= 1
        both, sizes, start = (
            both + int(np.count_nonzero((block >= 1) & expected)),
            sizes + int(np.count_nonzero(block)) + int(np.count_nonzero(expected)),
            start + len(block),
        )
    assert 2 * both / sizes > 0.99


# --- by hand and by brute force


def column(tmp_path: Path, n: int, file_axes: str = "RAS") -> VolumeHeader:
    """A file of one row of ``n`` slices."""
    return header_of(
        write_nifti(tmp_path / f"{n}.nii", np.zeros((1, 1, n), np.uint8), oriented_affine(file_axes))
    )


def test_a_column_by_hand(tmp_path: Path) -> None:
    # Two cached slices over the native ones 2..5: native centres lie at -0.25, 0.25, 0.75 and 1.25 of them, so that
    # shares of liver 0 and 1 become 0, 0.25, 0.75 and 1.
    foreground = np.zeros((2, 2, 1, 1), dtype=np.float32)
    foreground[0, 1] = 1
    box = slab(2, 6, (8, 1, 1))
    restored = restored_ijk(foreground, box, column(tmp_path, 8))
    assert restored.ravel().tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    # Flipped in the file, the canonical order is the other way around.
    assert restored_ijk(foreground, box, column(tmp_path, 8, "RAI")).ravel().tolist() == [
        0,
        0,
        1,
        1,
        0,
        0,
        0,
        0,
    ]


@pytest.mark.parametrize(
    ("liver", "tumour", "expected"),
    [
        (0.5, 0.0, 1),  # one half is enough
        (0.49, 0.0, 0),
        (0.25, 0.375, 2),  # together more than one half, and tumour the likelier
        (0.375, 0.25, 1),
        (0.375, 0.375, 1),  # a tie is liver
        (0.1, 0.3, 0),  # tumour is the likelier of the two, but background of the three
        (0.0, 1.0, 2),
    ],
)
def test_how_a_voxel_is_decided(tmp_path: Path, liver: float, tumour: float, expected: int) -> None:
    foreground = np.array([liver, tumour], dtype=np.float32).reshape(2, 1, 1, 1)
    assert restored_ijk(foreground, slab(0, 1, (1, 1, 1)), column(tmp_path, 1)).item() == expected


@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    view_shape=st.tuples(*[st.integers(1, 6)] * 3),
    file_axes=st.sampled_from(ORIENTATIONS),
    data=st.data(),
)
@ON_DISK
def test_both_are_interpolated_linearly_and_tumour_keeps_its_volume(
    tmp_path: Path,
    shape: tuple[int, int, int],
    view_shape: tuple[int, int, int],
    file_axes: str,
    data: st.DataObject,
) -> None:
    header = header_of(write_nifti(tmp_path / "a.nii", np.zeros(shape, np.uint8), oriented_affine(file_axes)))
    box = data.draw(boxes_in(header.grid.shape_zyx))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    foreground = rng.dirichlet((1, 1, 1), view_shape).astype(np.float32).transpose(3, 0, 1, 2)[:2]
    foreground[:, rng.random(view_shape) < 0.3] = 0
    restored = canonical(restored_ijk(foreground, box, header).transpose(2, 1, 0), header)
    both = np.zeros(header.grid.shape_zyx)
    both[box.slices_zyx] = interpolated(foreground.sum(axis=0), header, box)[box.slices_zyx]
    clear = abs(both - 0.5) > 1e-5
    np.testing.assert_array_equal(restored[clear] > 0, both[clear] >= 0.5)
    cores, n_lesions = ndimage.label(decide(foreground) == 2, structure=np.ones((3, 3, 3)))
    regions = [ndimage.binary_dilation(cores == 1 + i, np.ones((3, 3, 3))) for i in range(n_lesions)]
    in_any = np.logical_or.reduce(regions) if regions else np.zeros(view_shape, dtype=bool)
    tumour = np.where(in_any, foreground[1], np.float32(0))
    share = interpolated(tumour, header, box) / np.maximum(both, 0.5)
    assert not (restored[~nearest(in_any, header, box)] == 2).any()
    if n_lesions == 1:
        view_voxel = np.prod(box.shape_zyx) / in_any.size
        inside = nearest(in_any, header, box) & (both >= 0.5)
        check_lesion(share[inside], restored[inside] == 2, expected=tumour.sum() * view_voxel)


def check_lesion(share_n: NDArray[np.float64], is_tumour_n: NDArray[np.bool_], *, expected: float) -> None:
    """The largest shares are tumour, as many as no other threshold comes nearer to the expected number with."""
    step = 1 / 4096
    assert is_tumour_n.any() == (share_n >= 0.5).any() or abs(share_n.max() - 0.5) < 1e-5
    if not is_tumour_n.any():
        return
    assert is_tumour_n[share_n > 0.5 + step].all()
    n, lowest = int(is_tumour_n.sum()), share_n[is_tumour_n].min()
    assert lowest > max(share_n[~is_tumour_n].max(initial=0), LOWEST_SHARE) - step
    more, fewer = (int((share_n >= lowest + by).sum()) for by in (-2 * step, 2 * step))
    if n < expected and lowest - 2 * step > LOWEST_SHARE:
        assert more == n or more - expected >= expected - n
    if n > expected and lowest + 2 * step < 0.5:
        assert expected - fewer >= n - expected


def nearest(mask_zyx: NDArray[np.bool_], header: VolumeHeader, box: Box) -> NDArray[np.bool_]:
    """Each native voxel's nearest voxel of a view, the lower one of two; False outside of the box."""
    at = []
    for n_view, n_native in zip(mask_zyx.shape, box.shape_zyx, strict=True):
        position = (np.arange(n_native) + 0.5) * n_view / n_native - 0.5
        at.append(np.clip(np.ceil(position - 0.5), 0, n_view - 1).astype(int))
    values = np.zeros(header.grid.shape_zyx, dtype=bool)
    values[box.slices_zyx] = mask_zyx[np.ix_(*at)]
    return values


def interpolated(channel_zyx: NDArray[np.float32], header: VolumeHeader, box: Box) -> NDArray[np.float64]:
    """Trilinear on the canonical grid, one axis after another with np.interp."""
    values: NDArray[np.float64] = channel_zyx.astype(np.float64)
    for axis, n_native in enumerate(header.grid.shape_zyx):
        first, length = box.start_zyx[axis], box.shape_zyx[axis]
        n_view = channel_zyx.shape[axis]
        position = (np.arange(n_native) - first + 0.5) * n_view / length - 0.5
        rows = np.moveaxis(values, axis, -1).reshape(-1, n_view)
        lines = np.stack([np.interp(position, np.arange(n_view), row) for row in rows])
        shape = (*np.delete(values.shape, axis), n_native)
        values = np.moveaxis(lines.reshape(shape), -1, axis)
    return values


def canonical(label_kji: NDArray[np.uint8], header: VolumeHeader) -> NDArray[np.uint8]:
    flipped = np.flip(label_kji, tuple(i for i, axis in enumerate(header.axes_kji) if axis.flipped))
    return np.moveaxis(flipped, (0, 1, 2), tuple(axis.canonical for axis in header.axes_kji))


@pytest.mark.parametrize("file_axes", ["RAS", "SAR", "ASL"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_what_lies_between_the_files_centres_is_not_seen(tmp_path: Path, axis: int, file_axes: str) -> None:
    # A view of three voxels along an axis on which the file has one, whose centre is the middle one's.
    header = header_of(
        write_nifti(tmp_path / "a.nii", np.zeros((1, 1, 1), np.uint8), oriented_affine(file_axes))
    )
    foreground = np.zeros((2, *(3 if i == axis else 1 for i in range(3))), dtype=np.float32)
    np.moveaxis(foreground, axis + 1, 1)[:, 0] = 0.5
    box = Box.whole((1, 1, 1))
    assert restored_ijk(foreground, box, header).item() == 0
    assert next(native_values(foreground[1], box, header)).item() == 0
    np.moveaxis(foreground, axis + 1, 1)[0, 1] = 0.9
    assert restored_ijk(foreground, box, header).item() == 1


# --- blocks


@pytest.mark.parametrize("file_axes", ["RAS", "LPI", "SAR"])
@pytest.mark.parametrize("per_block", [1, 7, 1000])
def test_blocks_cover_the_volume_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_axes: str, per_block: int
) -> None:
    shape = (12, 13, 20)
    header = header_of(write_nifti(tmp_path / "a.nii", np.zeros(shape, np.uint8), oriented_affine(file_axes)))
    rng = np.random.default_rng(0)
    foreground = (rng.random((2, 5, 6, 7)) / 1.5).astype(np.float32)
    box = Box.from_slices([slice(n // 4, n - 1) for n in header.grid.shape_zyx])
    whole = np.concatenate(list(native_labels(foreground, box, header)))
    monkeypatch.setattr("pipeline.restore.BLOCK_VOXELS", per_block * shape[0] * shape[1])
    blocks = list(native_labels(foreground, box, header))
    assert [len(block) for block in blocks[:-1]] == [per_block] * (len(blocks) - 1)
    assert {block.dtype for block in blocks} == {np.dtype(np.uint8)}
    np.testing.assert_array_equal(np.concatenate(blocks), whole)
    assert whole.any()


def test_no_foreground_is_background_everywhere(tmp_path: Path) -> None:
    header = header_of(write_nifti(tmp_path / "a.nii", np.zeros((4, 5, 6), np.uint8)))
    restored = restored_ijk(np.zeros((2, 3, 3, 3), np.float32), slab(1, 4, header.grid.shape_zyx), header)
    assert restored.shape == (4, 5, 6)
    assert not restored.any()


def test_nothing_is_found_outside_of_the_box(tmp_path: Path) -> None:
    header = header_of(write_nifti(tmp_path / "a.nii", np.zeros((4, 5, 9), np.uint8), oriented_affine("RAI")))
    restored = restored_ijk(np.full((2, 3, 3, 3), 0.5, np.float32), slab(2, 6, header.grid.shape_zyx), header)
    # Canonical slices 2..5 are 3..6 of a file that runs downwards.
    assert [bool(restored[..., k].all()) for k in range(9)] == [False] * 3 + [True] * 4 + [False] * 2
    assert not restored[..., :3].any()
    assert not restored[..., 7:].any()


# --- lesions keep their volume


def test_regions_are_the_lesions_and_their_neighbors() -> None:
    tumour = np.zeros((1, 5, 8), dtype=bool)
    tumour[0, 1, 1] = tumour[0, 2, 2] = tumour[0, 3, 5] = True
    # Corners connect, so the first two are one lesion; its neighbors and the third one's overlap in the third column
    # after them: the later number has these.
    assert lesion_regions(tumour)[0].tolist() == [
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 2, 2, 2, 0],
        [0, 1, 1, 1, 2, 2, 2, 0],
        [0, 0, 0, 0, 2, 2, 2, 0],
    ]


def test_the_share_that_keeps_the_volume_by_hand() -> None:
    counts = np.zeros((6, 512), dtype=np.int64)
    counts[:, [128, 192, 320, 511]] = 10, 5, 5, 30  # at a quarter, 3/8, 5/8 and 1
    counts[2] = counts[3] = counts[4] = 0
    counts[2, [0, 511]] = 7, 9  # all or nothing
    counts[3, 255] = 99  # never one half
    counts[4, [80, 103, 400]] = 70, 7, 1  # less than a fifth, just more, and much more
    lowest = lowest_shares(counts, np.array([99, 41, 9, 99, 50, 3]))
    # 41 is nearest to 40 = 30 + 5 + 5, which any share above a quarter and up to 3/8 gives: 3/8 is the highest.
    assert lowest[1] == 3 / 8
    # Nothing makes less than the nine that one half makes, nor the 35 of the last row: no lesion is narrowed.
    assert lowest[2] == lowest[5] == 0.5
    assert lowest[0] > 1
    assert lowest[3] > 1
    # With all from a fifth on it has 8, and 50 are expected.
    assert lowest[4] == 103 / 512


SPACING_MM = (1.5, 0.8, 0.8)


def lesion_zyx(
    diameter_mm: float, rng: np.random.Generator, *, shape_zyx: tuple[int, int, int]
) -> NDArray[np.bool_]:
    """An ellipsoid of the volume of a sphere, anywhere near the middle, in any direction."""
    axes = np.exp(rng.normal(0, 0.2, 3))
    axes *= diameter_mm / 2 / np.cbrt(axes.prod())
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    at_mm = (
        np.stack(np.meshgrid(*[np.arange(n) - n / 2 for n in shape_zyx], indexing="ij"), axis=-1) * SPACING_MM
    )
    inside: NDArray[np.bool_] = ((((at_mm + rng.uniform(-3, 3, 3)) @ turn / axes) ** 2).sum(axis=-1)) < 1
    return inside


def averaged(values_zyx: NDArray[np.bool_], shape_zyx: tuple[int, ...]) -> NDArray[np.float32]:
    down = [box_weights(n, m) for n, m in zip(values_zyx.shape, shape_zyx, strict=True)]
    means: NDArray[np.float64] = np.einsum("Zz,Yy,Xx,zyx->ZYX", *down, values_zyx, optimize=True)
    return means.astype(np.float32)


@pytest.fixture(scope="module")
def in_a_liver(tmp_path_factory: pytest.TempPathFactory) -> VolumeHeader:
    """A file of 36×36×36 mm, all of it liver."""
    affine = np.diag([*SPACING_MM[::-1], 1])
    return header_of(
        write_nifti(tmp_path_factory.mktemp("liver") / "a.nii", np.zeros((45, 45, 24), np.uint8), affine)
    )


@given(
    diameter_mm=st.floats(6, 20),
    view_mm=st.tuples(*[st.floats(1.6, 3.4)] * 3),
    blur=st.sampled_from([0, 0, 0.4, 0.7]),
    seed=st.integers(0, 9999),
)
@settings(max_examples=80, deadline=None)
def test_what_is_written_has_the_volume_that_the_probabilities_say(
    in_a_liver: VolumeHeader, diameter_mm: float, view_mm: tuple[float, float, float], blur: float, seed: int
) -> None:
    shape = in_a_liver.grid.shape_zyx
    truth = lesion_zyx(diameter_mm, np.random.default_rng(seed), shape_zyx=shape)
    view_shape = tuple(round(36 / mm) for mm in view_mm)
    tumour = ndimage.gaussian_filter(averaged(truth, view_shape), blur)
    region = lesion_regions(tumour > 0.5) > 0
    blocks = native_values(np.where(region, tumour, 0), Box.whole(shape), in_a_liver)
    if next(blocks).max() < 0.5:
        return
    restored = next(native_labels(np.stack([1 - tumour, tumour]), Box.whole(shape), in_a_liver))
    expected = tumour[region].sum() * truth.size / tumour.size
    assert (restored == 2).sum() == pytest.approx(expected, rel=0.02, abs=1)
    if not blur and diameter_mm >= 8:  # a smaller one may reach beyond its neighbors
        assert expected == pytest.approx(truth.sum(), rel=0.03)


@pytest.mark.parametrize(("diameter_mm", "least"), [(6, 0.85), (8, 0.92), (10, 0.94), (15, 0.96), (20, 0.97)])
def test_lesions_of_all_sizes_come_back(in_a_liver: VolumeHeader, diameter_mm: float, least: float) -> None:
    shape, scores = in_a_liver.grid.shape_zyx, []
    for seed in range(12):
        truth = lesion_zyx(diameter_mm, np.random.default_rng(seed), shape_zyx=shape)
        tumour = averaged(truth, (12, 13, 13))  # voxels of 3.0×2.8×2.8 mm
        blocks = native_labels(np.stack([1 - tumour, tumour]), Box.whole(shape), in_a_liver)
        scores.append(dice(next(blocks) == 2, truth))
    assert np.mean(scores) > least


def test_no_lesion_appears_out_of_haze(in_a_liver: VolumeHeader) -> None:
    # Nowhere likelier than liver: however much it adds up to, it is no lesion.
    rng = np.random.default_rng(0)
    tumour = (0.3 + 0.2 * rng.random((12, 13, 13))).astype(np.float32)
    box = Box.whole((24, 45, 45))
    assert not (next(native_labels(np.stack([1 - tumour, tumour]), box, in_a_liver)) == 2).any()
    # One voxel is: its own neighbors' haze may widen it, and nothing farther away.
    tumour[6, 6, 6] = 0.9
    restored = next(native_labels(np.stack([1 - tumour, tumour]), box, in_a_liver)) == 2
    found = np.argwhere(restored)
    assert len(found)
    assert (abs((found + 0.5) * np.array([12, 13, 13]) / restored.shape - 6.5) < 1.5).all()


def test_touching_lesions_keep_their_own_volumes(in_a_liver: VolumeHeader) -> None:
    shape = in_a_liver.grid.shape_zyx
    z, y, x = np.ogrid[
        tuple(slice(-n * mm / 2, n * mm / 2, n * 1j) for n, mm in zip(shape, SPACING_MM, strict=True))
    ]
    small, large = z**2 + y**2 + (x + 8) ** 2 < 3.5**2, z**2 + y**2 + (x - 6) ** 2 < 7**2
    tumour = averaged(small | large, (12, 13, 13))
    restored = next(native_labels(np.stack([1 - tumour, tumour]), Box.whole((24, 45, 45)), in_a_liver)) == 2
    ids, n_lesions = ndimage.label(restored)
    assert n_lesions == 2
    volumes = sorted(np.bincount(ids.ravel())[1:])
    assert volumes == pytest.approx([small.sum(), large.sum()], rel=0.03)
