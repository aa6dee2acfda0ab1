"""Augmentation: doing nothing is exact, a batch is its samples, and each number does what it says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.contour import ContourSet
from tiny import TinyWorld
from torch import Tensor

from data_cache.errors import ConfigError
from data_cache.records import parse, to_json
from liverseg.cli import main
from liverseg.training.augment import (
    AugmentConfig,
    BlurParams,
    Context,
    ContrastParams,
    GammaParams,
    SpatialParams,
    _read,
    apply,
    apply_blur,
    apply_contrast,
    apply_gamma,
    apply_noise,
    apply_spatial,
    augment,
    draw,
    draw_blur,
    draw_contrast,
    draw_gamma,
    draw_noise,
    draw_spatial,
    sampling_grid,
)
from liverseg.training.augment_figure import augment_figure

CPU = torch.device("cpu")
SHAPE = (8, 12, 12)
STRONG = AugmentConfig(
    elastic_probability=0.5,
    num_controlpoints=5,
    sigma=3,
    rotation_degrees=30,
    flip=True,
    gamma_random_level=0.5,
    blur_level=1.5,
)
OFF = AugmentConfig(
    sigma=0,
    rotation_degrees=0,
    scale=0,
    noise_level=0,
    contrast_random_level=0,
    brightness_random_level=0,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(size: int = 3, shape_zyx: tuple[int, int, int] = SHAPE) -> tuple[Tensor, Tensor]:
    image = torch.randn(size, 1, *shape_zyx, generator=seeded(1))
    fractions = torch.randn(size, 3, *shape_zyx, generator=seeded(2)).softmax(dim=1)
    return image, fractions


def still(batch_size: int = 1) -> SpatialParams:
    return draw_spatial(batch_size, OFF, generator=seeded())


def moved(volume_zyx: Tensor, params: SpatialParams) -> Tensor:
    """The volume after the transform; its negative goes the fractions' way and must come out as the negative."""
    image, fractions = apply_spatial(volume_zyx[None, None], -volume_zyx[None, None], params)
    torch.testing.assert_close(fractions, -image)
    return image[0, 0]


def ramp(axis: int, shape_zyx: tuple[int, int, int] = SHAPE) -> Tensor:
    view = [1, 1, 1]
    view[axis] = -1
    return torch.arange(shape_zyx[axis], dtype=torch.float32).view(view).expand(shape_zyx).clone()


def parts_of(*ends: tuple[float, float], axis: int = 0) -> Tensor:
    """Parts (B, 3, 2) that are whole but along one axis."""
    parts_b32 = torch.tensor([0.0, 1.0]).repeat(len(ends), 3, 1)
    parts_b32[:, axis] = torch.tensor(ends)
    return parts_b32


# --- laws


def test_zero_strength_is_the_identity_bit_for_bit() -> None:
    image, fractions = batch()
    result = augment(image, fractions, OFF, generator=seeded())
    assert torch.equal(result[0], image)
    assert torch.equal(result[1], fractions)


def test_samples_left_in_place_are_exact_beside_samples_that_move() -> None:
    image, fractions = batch()
    parts = parts_of((0.0, 1.0), (0.1, 0.9), (0.0, 1.0))
    params = draw_spatial(3, OFF, parts_b32=parts, generator=seeded())
    new_image, new_fractions = apply_spatial(image, fractions, params)
    for i in (0, 2):
        assert torch.equal(new_image[i], image[i])
        assert torch.equal(new_fractions[i], fractions[i])
    assert not torch.equal(new_image[1], image[1])


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), size=st.integers(1, 4))
def test_a_batch_is_its_samples_one_by_one(seed: int, size: int) -> None:
    image, fractions = batch(size, (4, 6, 5))
    params = draw(size, STRONG, generator=seeded(seed))
    together = apply(image, fractions, params)
    for i in range(size):
        alone = apply(image[i, None], fractions[i, None], params.select(i))
        assert torch.equal(together[0][i], alone[0][0])
        assert torch.equal(together[1][i], alone[1][0])


def test_the_same_seed_gives_the_same_and_another_does_not() -> None:
    first, again, other = (augment(*batch(), STRONG, generator=seeded(s)) for s in (3, 3, 4))
    for i in (0, 1):
        assert torch.equal(first[i], again[i])
        assert not torch.equal(first[i], other[i])


def test_samples_of_a_batch_differ() -> None:
    image, fractions = (x[:1].repeat(2, 1, 1, 1, 1) for x in batch())
    config = replace(STRONG, elastic_probability=1)
    params = draw(2, config, generator=seeded())
    noise = replace(params.noise, std_b=torch.ones(2))
    for new in (*apply_spatial(image, fractions, params.spatial), apply_noise(image, noise)):
        assert not torch.equal(new[0], new[1])


def test_arguments_are_never_edited() -> None:
    image, fractions = batch()
    parts = parts_of(*[(-0.1, 0.8)] * 3)
    kept = [x.clone() for x in (image, fractions, parts)]
    augment(image, fractions, STRONG, parts_b32=parts, generator=seeded())
    assert all(torch.equal(a, b) for a, b in zip((image, fractions, parts), kept, strict=True))


def test_fractions_still_sum_to_one() -> None:
    _, fractions = augment(*batch(), replace(STRONG, elastic_probability=1), generator=seeded())
    torch.testing.assert_close(fractions.sum(dim=1), torch.ones(3, *SHAPE))
    assert fractions.min() >= 0


def test_a_volume_of_a_constant_stays_it_whatever_the_transform() -> None:
    params = draw_spatial(1, replace(STRONG, elastic_probability=1, sigma=30), generator=seeded())
    torch.testing.assert_close(moved(torch.full(SHAPE, 0.7), params), torch.full(SHAPE, 0.7))


# --- where voxels are read from


def offsets_voxels(params: SpatialParams, shape_zyx: tuple[int, int, int]) -> Tensor:
    """(Z, Y, X, 3): how far from itself, in voxels (z, y, x), each output voxel of one sample is read."""
    size = torch.tensor(shape_zyx, dtype=torch.float32)
    voxel = (sampling_grid(shape_zyx, params, device=CPU)[0].flip(-1) + 1) * size / 2 - 0.5
    own = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape_zyx), indexing="ij"), dim=-1)
    return voxel - own


def test_without_displacement_the_grid_is_the_identity() -> None:
    # The affine part goes through the spline: only if its weights reproduce linear functions does this hold.
    assert offsets_voxels(still(), (7, 12, 16)).abs().max() < 1e-5


def test_displacement_of_one_controlpoint_by_hand() -> None:
    # 4 points on 3 voxels make one cell, whose centre voxel has u = 0.5 along each axis and weights
    # (1/48, 23/48, 23/48, 1/48). Point (1, 2, 0) moved by (6, -12, 0) moves it by 23²/48³ of that.
    control = torch.zeros(1, 4, 4, 4, 3)
    control[0, 1, 2, 0] = torch.tensor([6.0, -12.0, 0.0])
    centre = offsets_voxels(replace(still(), control_bzyx3=control), (3, 3, 3))[1, 1, 1]
    share = 23**2 / 48**3
    torch.testing.assert_close(centre, torch.tensor([6 * share, -12 * share, 0.0]), rtol=1e-4, atol=1e-6)


def test_all_controlpoints_moved_alike_shift_the_volume() -> None:
    control = torch.tensor([0.0, 2.0, -1.0]).expand(1, 5, 5, 5, 3)
    volume = torch.randn(SHAPE, generator=seeded())
    shifted = moved(volume, replace(still(), control_bzyx3=control))
    # Read 2 voxels further in y and 1 back in x; outside, the border repeats.
    y, x = (torch.arange(12) + 2).clamp(max=11), (torch.arange(12) - 1).clamp(min=0)
    torch.testing.assert_close(shifted, volume[:, y][:, :, x], rtol=1e-3, atol=1e-4)


def test_displacements_have_the_standard_deviation_asked_for() -> None:
    config = replace(OFF, sigma=4.0, elastic_probability=1, num_controlpoints=(5, 6, 7))
    params = draw_spatial(200, config, generator=seeded())
    assert params.control_bzyx3.shape == (200, 5, 6, 7, 3)
    # 126,000 draws: the standard deviation is known to 0.2 %.
    assert float(params.control_bzyx3.std()) == pytest.approx(4.0, rel=0.01)
    centre = torch.stack(
        [offsets_voxels(params.part(slice(i, i + 1)), (4, 6, 8))[2, 3, 4] for i in range(200)]
    )
    # z: 2 cells on 4 voxels, voxel 2 at 2.5/2 = 1.25; y: 3 cells on 6, voxel 3 at 1.75; x: 4 cells on 8, voxel 4
    # at 2.25. At u = 1/4 (or 3/4) the weights are (27, 235, 121, 1)/384, whose squares sum to 0.4788.
    expected = 4.0 * math.sqrt(((27**2 + 235**2 + 121**2 + 1) / 384**2) ** 3)
    # 600 draws: known to 3 %.
    assert float(centre.std()) == pytest.approx(expected, rel=0.1)
    assert abs(float(centre.mean())) < 0.2


def test_elastic_probability_is_the_share_of_deformed_samples() -> None:
    config = replace(OFF, sigma=1.0, elastic_probability=0.25)
    share = 1 - draw_spatial(2000, config, generator=seeded()).identity_b.float().mean()
    assert float(share) == pytest.approx(0.25, abs=0.04)  # four standard deviations


def test_a_quarter_turn_is_exact() -> None:
    volume = torch.randn(SHAPE, generator=seeded())
    turned = moved(volume, replace(still(), angle_b=torch.tensor([math.pi / 2])))
    torch.testing.assert_close(turned, torch.rot90(volume, -1, dims=(1, 2)), rtol=1e-3, atol=1e-4)


def test_a_turn_keeps_distances_when_y_and_x_differ() -> None:
    params = replace(still(), angle_b=torch.tensor([0.3]))
    grid = sampling_grid((4, 8, 20), params, device=CPU)[0]
    y, x = grid[..., 1] * 4, grid[..., 0] * 10
    step = torch.hypot(y.diff(dim=1), x.diff(dim=1))
    torch.testing.assert_close(step, torch.ones(4, 7, 20), rtol=1e-4, atol=1e-4)


def test_size_two_halves_the_steps() -> None:
    grown = moved(ramp(2), replace(still(), size_b=torch.tensor([2.0])))
    # Centre at 5.5; voxel i is read at 5.5 + (i - 5.5)/2.
    torch.testing.assert_close(grown[0, 0], 5.5 + (torch.arange(12) - 5.5) / 2)


def test_drawn_angles_and_sizes_stay_within_their_levels() -> None:
    config = replace(OFF, rotation_degrees=20, scale=0.25)
    params = draw_spatial(500, config, generator=seeded())
    assert math.radians(19) < params.angle_b.abs().max() <= math.radians(20)
    assert 0.8 <= params.size_b.min() < 0.81
    assert 1.24 < params.size_b.max() <= 1.25


def test_flip_mirrors_x_of_half_the_samples() -> None:
    params = draw_spatial(400, replace(OFF, flip=True), generator=seeded())
    assert 160 < int(params.mirror_b.sum()) < 240
    volume = torch.randn(SHAPE, generator=seeded())
    torch.testing.assert_close(
        moved(volume, replace(still(), mirror_b=torch.tensor([True]))), volume.flip(2), rtol=1e-3, atol=1e-4
    )
    assert not draw_spatial(100, OFF, generator=seeded()).mirror_b.any()


def test_volume_is_preserved_on_average() -> None:
    z, y, x = torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in (24, 32, 32)), indexing="ij")
    ball = (8.5 - torch.sqrt(z**2 + y**2 + x**2)).clamp(0, 1)[None, None]
    config = replace(OFF, sigma=2.5, elastic_probability=1)
    params = draw_spatial(150, config, generator=seeded())
    volumes = torch.stack(
        [apply_spatial(ball, ball, params.part(slice(i, i + 1)))[1].sum() for i in range(150)]
    )
    assert float(volumes.mean() / ball.sum()) == pytest.approx(1, abs=0.02)
    assert volumes.std() > 0.02 * ball.sum()  # and they do vary


# --- parts and their context


def part_of_a_ramp(start: float, stop: float, *, axis: int) -> Tensor:
    """What a part of a ramp along an axis shows, along that axis."""
    parts = parts_of((start, stop), axis=axis)
    params = draw_spatial(1, OFF, parts_b32=parts, generator=seeded())
    shown = moved(ramp(axis), params)
    return shown.movedim(axis, 0)[:, 0, 0]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_middle_half_of_a_ramp(axis: int) -> None:
    # Output voxel i of n has its centre at 0.25 + 0.5 (i + 0.5)/n, which is input voxel n · place - 0.5.
    n = SHAPE[axis]
    expected = n * (0.25 + 0.5 * (torch.arange(n) + 0.5) / n) - 0.5
    torch.testing.assert_close(part_of_a_ramp(0.25, 0.75, axis=axis), expected)


def test_a_part_reaching_outside_repeats_the_border() -> None:
    # Twice the depth, from -0.5: slice 2 i - 3.5, kept within 0..7.
    expected = torch.tensor([0.0, 0.0, 0.5, 2.5, 4.5, 6.5, 7.0, 7.0])
    torch.testing.assert_close(part_of_a_ramp(-0.5, 1.5, axis=0), expected)


@pytest.mark.parametrize(
    "parts", [parts_of((0, 1)), parts_of((0, 1), (0.5, 0.5)), parts_of((0, 1), (math.nan, 1))]
)
def test_parts_that_are_empty_or_too_few_are_refused(parts: Tensor) -> None:
    with pytest.raises(ValueError, match="parts must be 2 times three pairs of start < stop"):
        draw_spatial(2, OFF, parts_b32=parts, generator=seeded())


def whole_and_inner(inner: tuple[tuple[float, float], ...]) -> tuple[Tensor, Tensor]:
    """A smooth function of the place in a scan, on the scan's grid and on that of a box in it, (1, 1, *SHAPE)."""

    def sampled(ends: tuple[tuple[float, float], ...]) -> Tensor:
        axes = [a + (b - a) * (torch.arange(n) + 0.5) / n for (a, b), n in zip(ends, SHAPE, strict=True)]
        z, y, x = torch.meshgrid(*axes, indexing="ij")
        return (10 * z + 3 * y - 5 * x)[None, None]

    return sampled(((0.0, 1.0),) * 3), sampled(inner)


def test_beyond_a_box_its_context_goes_on() -> None:
    inner = ((0.25, 0.75), (0.2, 0.6), (0.3, 0.9))
    scan, box = whole_and_inner(inner)
    context = Context(image_bczyx=scan, fractions_bczyx=scan, inner_b32=torch.tensor([inner]))
    params = draw_spatial(
        1, OFF, parts_b32=torch.tensor([[(-0.3, 1.3), (-0.2, 1.4), (0.1, 1.1)]]), generator=seeded()
    )
    image, fractions = apply_spatial(box, box, params, context=context)
    shown = tuple(
        (a + start * (b - a), a + stop * (b - a))
        for (a, b), (start, stop) in zip(inner, params.part_b32[0].tolist(), strict=True)
    )
    _, expected = whole_and_inner(shown)
    # A linear function is interpolated exactly wherever neither volume's border repeats, half a voxel of it.
    torch.testing.assert_close(image, expected, atol=0.5, rtol=0)
    assert (image - expected).abs().mean() < 0.05
    assert torch.equal(image, fractions)
    without, _ = apply_spatial(box, box, params)
    assert (without - expected).abs().max() > 1


def test_the_context_is_the_same_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a GPU all of the context is sampled, on a CPU only what lies outside of the box.
    inner = ((0.25, 0.75), (0.2, 0.6), (0.3, 0.9))
    scan, box = whole_and_inner(inner)
    context = Context(image_bczyx=scan, fractions_bczyx=scan, inner_b32=torch.tensor([inner]))
    params = draw_spatial(1, STRONG, parts_b32=parts_of((-0.2, 1.2)), generator=seeded())
    sparse = apply_spatial(box, box, params, context=context)[0]

    def dense(inside: Tensor, around: Tensor, around_1zyx3: Tensor, is_inside_1zyx: Tensor) -> Tensor:
        return torch.where(is_inside_1zyx[:, None], inside, _read(around, around_1zyx3))

    monkeypatch.setattr("liverseg.training.augment._read_outside", dense)
    torch.testing.assert_close(sparse, apply_spatial(box, box, params, context=context)[0])


def test_a_box_without_context_beside_one_with_it() -> None:
    inner = ((0.25, 0.75), (0.2, 0.6), (0.3, 0.9))
    scan, box = whole_and_inner(inner)
    both, around = torch.cat((box, scan)), torch.cat((scan, scan))
    whole = ((0.0, 1.0),) * 3
    context = Context(image_bczyx=around, fractions_bczyx=around, inner_b32=torch.tensor([inner, whole]))
    params = draw_spatial(2, OFF, parts_b32=parts_of((-0.2, 1.2), (-0.2, 1.2)), generator=seeded())
    image, _ = apply_spatial(both, both, params, context=context)
    alone, _ = apply_spatial(scan, scan, params.part(slice(1, 2)))
    assert torch.equal(image[1], alone[0])


def test_a_turn_keeps_angles_where_pixels_are_not_square() -> None:
    # Pixels twice as high as wide: a quarter turn takes 1.5 rows to 3 columns.
    params = replace(
        draw_spatial(1, OFF, generator=seeded()),
        angle_b=torch.tensor([math.pi / 2]),
        pixel_aspect_b=torch.tensor([2.0]),
    )
    _, y, x = SHAPE
    spot = torch.zeros(1, 1, *SHAPE)
    spot[..., y // 2 + 1 : y // 2 + 2, x // 2 - 1 : x // 2 + 1] = 1  # 1.5 rows below the centre
    turned = apply_spatial(spot, spot, params)[0][0, 0, SHAPE[0] // 2]
    columns = torch.arange(x) + 0.5 - x / 2
    assert abs(float((turned.sum(dim=0) * columns).sum() / turned.sum())) == pytest.approx(2 * 1.5, abs=0.3)


# --- noise and contrast


def test_noise_has_the_drawn_standard_deviation() -> None:
    params = draw_noise(2, replace(OFF, noise_level=0.5), generator=seeded())
    noisy = apply_noise(torch.full((2, 1, 32, 32, 32), 3.0), params)
    torch.testing.assert_close(noisy.std(dim=(1, 2, 3, 4)), params.std_b, rtol=0.02, atol=0)
    torch.testing.assert_close(noisy.mean(dim=(1, 2, 3, 4)), torch.full((2,), 3.0), rtol=0, atol=0.02)


def test_noise_levels_are_uniform_up_to_the_level() -> None:
    std_b = draw_noise(1000, replace(OFF, noise_level=0.5), generator=seeded()).std_b
    assert 0 <= std_b.min() < 0.01
    assert 0.49 < std_b.max() <= 0.5
    assert float(std_b.mean()) == pytest.approx(0.25, abs=0.02)


def test_contrast_by_hand() -> None:
    params = ContrastParams(gain_b=torch.tensor([2.0, 1.0]), offset_b=torch.tensor([-0.5, 0.25]))
    image = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1, 1)
    assert apply_contrast(image, params).flatten().tolist() == [1.5, 3.25]  # 2·1 - 0.5; 1·3 + 0.25


def test_contrast_leaves_the_central_value_but_for_the_brightness() -> None:
    config = replace(OFF, contrast_random_level=0.5, central_value=0.4)
    params = draw_contrast(200, config, generator=seeded())
    image = torch.full((200, 1, 1, 1, 1), 0.4)
    torch.testing.assert_close(apply_contrast(image, params), image)
    shifted = draw_contrast(200, replace(config, brightness_random_level=0.3), generator=seeded())
    b = apply_contrast(image, shifted).flatten() - 0.4
    assert -0.3 <= b.min() < -0.28
    assert 0.28 < b.max() <= 0.3
    assert 0.5 <= params.gain_b.min() < 0.52
    assert 1.48 < params.gain_b.max() <= 1.5


def test_contrast_and_noise_leave_fractions_alone() -> None:
    image, fractions = batch()
    config = replace(OFF, noise_level=1, contrast_random_level=0.5, brightness_random_level=0.5)
    new_image, new_fractions = augment(image, fractions, config, generator=seeded())
    assert torch.equal(new_fractions, fractions)
    assert not torch.equal(new_image, image)


# --- gamma and blur


def test_gamma_by_hand() -> None:
    # Lowest 1, range 4: (3-1)/4 = 0.5, squared 0.25, back 4·0.25 + 1 = 2. The second sample's exponent is 1.
    image = torch.tensor([[1.0, 3.0, 5.0], [0.0, 0.3, 1.0]]).view(2, 1, 1, 1, 3)
    bent = apply_gamma(image, GammaParams(exponent_b=torch.tensor([2.0, 1.0])))
    torch.testing.assert_close(bent[0].flatten(), torch.tensor([1.0, 2.0, 5.0]))
    assert torch.equal(bent[1], image[1])


def test_gamma_of_a_constant_image_is_itself() -> None:
    image = torch.full((1, 1, 2, 2, 2), 0.7)
    assert torch.equal(apply_gamma(image, GammaParams(exponent_b=torch.tensor([0.5]))), image)


def test_exponents_brighten_as_often_as_they_darken() -> None:
    config = replace(OFF, gamma_random_level=1.0)
    exponents = draw_gamma(2000, config, generator=seeded()).exponent_b
    assert 0.5 <= exponents.min() < 0.51
    assert 1.98 < exponents.max() <= 2.0
    assert float((exponents < 1).float().mean()) == pytest.approx(0.5, abs=0.05)


def test_blur_of_one_voxel_is_a_gaussian_of_the_drawn_width() -> None:
    point = torch.zeros(2, 1, 17, 17, 17)
    point[:, :, 8, 8, 8] = 1
    blurred = apply_blur(point, BlurParams(std_b=torch.tensor([1.5, 0.0])))
    assert torch.equal(blurred[1], point[1])
    place = torch.arange(17.0) - 8
    for axis in (0, 1, 2):
        others = tuple(i for i in range(3) if i != axis)
        spread = blurred[0, 0].sum(others)
        assert float(spread.sum()) == pytest.approx(1, abs=1e-3)
        # Variance 2.25, less what the border cuts off beyond 8 voxels, five standard deviations.
        assert float((spread * place**2).sum()) == pytest.approx(1.5**2, rel=0.01)


def test_blur_keeps_a_constant_up_to_the_border() -> None:
    image = torch.full((1, 1, 5, 6, 7), -0.4)
    torch.testing.assert_close(apply_blur(image, BlurParams(std_b=torch.tensor([2.0]))), image)


def test_blur_levels_are_uniform_up_to_the_level() -> None:
    std_b = draw_blur(1000, replace(OFF, blur_level=2.0), generator=seeded()).std_b
    assert 0 <= std_b.min() < 0.05
    assert 1.95 < std_b.max() <= 2.0


def test_what_is_off_draws_nothing() -> None:
    # So that the other draws, of this step and of all later ones, are the same with and without it.
    generator, other = seeded(), seeded()
    draw_gamma(2, OFF, generator=generator)
    draw_blur(2, OFF, generator=generator)
    assert torch.equal(torch.rand(1, generator=generator), torch.rand(1, generator=other))


@settings(deadline=None, max_examples=20)
@given(batches=st.integers(1, 3), devices=st.integers(1, 3))
def test_parts_of_a_draw_are_the_draw(batches: int, devices: int) -> None:
    size = 2 * batches * devices
    image, fractions = batch(size, (4, 6, 5))
    params = draw(size, STRONG, generator=seeded())
    together = apply(image, fractions, params)
    for start in range(devices):
        part = slice(start, None, devices)
        found = apply(image[part], fractions[part], params.part(part))
        assert torch.equal(found[0], together[0][part])
        assert torch.equal(found[1], together[1][part])


# --- configuration


def test_one_number_of_controlpoints_counts_for_every_axis() -> None:
    assert AugmentConfig(num_controlpoints=5).controlpoints_zyx == (5, 5, 5)
    assert AugmentConfig(num_controlpoints=(4, 5, 6)).controlpoints_zyx == (4, 5, 6)


def test_a_bad_configuration_lists_every_fault() -> None:
    with pytest.raises(ConfigError) as caught:
        AugmentConfig(
            elastic_probability=1.1, num_controlpoints=3, sigma=-1, contrast_random_level=1.5, scale=-1
        )
    for name in ("elastic_probability", "num_controlpoints", "sigma", "contrast_random_level", "scale"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: AugmentConfig(num_controlpoints=(4, 4, 3)),
        lambda: AugmentConfig(rotation_degrees=181),
        lambda: AugmentConfig(central_value=float("inf")),
        lambda: AugmentConfig(noise_level=-0.1),
        lambda: AugmentConfig(sigma=float("nan")),
    ],
)
def test_each_fault_alone_is_found(make: Callable[[], AugmentConfig]) -> None:
    with pytest.raises(ConfigError, match=r"^augmentation: \w+ must be"):
        make()


def test_a_negative_central_value_is_fine() -> None:
    assert AugmentConfig(central_value=-0.25).central_value == -0.25


def test_a_configuration_survives_its_file_and_an_unknown_key_does_not() -> None:
    config = AugmentConfig(num_controlpoints=(4, 5, 6), flip=True)
    assert parse(AugmentConfig, to_json(config), source="run.toml", error=ConfigError) == config
    with pytest.raises(ConfigError, match="typo: unknown key"):
        parse(AugmentConfig, {"typo": 1}, source="run.toml", error=ConfigError)


# --- the picture of strengths


def test_the_picture_shows_every_strength_with_a_mesh_and_the_outlines(tiny_world: TinyWorld) -> None:
    store = tiny_world.store
    figure = augment_figure(store.read("liver_1", "liver"), title="liver_1\nstrengths")
    titles = [axis.get_title() for axis in figure.axes]
    assert len(titles) == 25
    assert titles[0] == "5 points, sigma 3"
    assert {"16 points, sigma 12", "noise 0.1", "contrast +25%", "contrast -50%"} <= set(titles)
    # Two sets of mesh lines and the liver's edge, on what is deformed; the edge alone on what is not.
    lines = [sum(isinstance(artist, ContourSet) for artist in axis.get_children()) for axis in figure.axes]
    assert min(lines[:15]) >= 3
    assert min(lines[15:]) >= 1
    assert max(lines[15:]) <= 2


def test_the_picture_needs_no_label(tiny_world: TinyWorld) -> None:
    view = replace(tiny_world.store.read("liver_1", "scan"), fractions_czyx=None)
    assert len(augment_figure(view, title="x").axes) == 25


def test_inspect_draws_it(tiny_world: TinyWorld, tmp_path: Path) -> None:
    png = tmp_path / "strengths.png"
    arguments = ["inspect", str(tiny_world.cache), "liver_1", "--augment"]
    assert CliRunner().invoke(main, arguments).exit_code == 2  # it has nowhere to go
    result = CliRunner().invoke(main, [*arguments, "--png", str(png)])
    assert result.exit_code == 0, result.output
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_reading_in_slabs_and_only_outside_changes_no_voxel(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    box, scan = torch.rand(1, 3, 8, 12, 10), torch.rand(1, 3, 8, 12, 10)
    inner = torch.tensor([[0.2, 0.7], [0.1, 0.9], [0.3, 0.8]])
    params = draw_spatial(1, AugmentConfig(elastic_probability=1.0, scale=0.3), generator=seeded())
    grid = sampling_grid((8, 12, 10), params, device=torch.device("cpu"))
    start, stop = inner.flip(0).T

    def read(volume: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.grid_sample(volume, places, padding_mode="border", align_corners=False)

    outside = (grid.abs() > 1).any(dim=-1)[:, None]
    expected = torch.where(outside, read(scan, grid * (stop - start) + (start + stop - 1)), read(box, grid))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    context = Context(image_bczyx=scan[:, :1], fractions_bczyx=scan[:, 1:], inner_b32=inner[None])
    image, fractions = apply_spatial(box[:, :1], box[:, 1:], params, context=context)
    assert outside.any()
    torch.testing.assert_close(torch.cat((image, fractions), dim=1), expected)
    # A part that stays inside reads nothing of what lies around it.
    still = replace(params, control_bzyx3=0 * params.control_bzyx3, size_b=params.size_b * 0 + 2.0)
    image, _ = apply_spatial(box[:, :1], box[:, 1:], still, context=context)
    assert torch.isfinite(image).all()
