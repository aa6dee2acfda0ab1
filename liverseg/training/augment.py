"""Augmentation of a batch on its device: everything is drawn first, then applied, and each volume is sampled once.

Draws are small and come from a CPU generator, so that they are the same on every device; params are sliceable, and a
batch is exactly its samples one by one. Images are the network's input, (HU - 50) / 200.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from pydantic import ConfigDict
from torch import Tensor

from data_cache.errors import ConfigError
from data_cache.records import STRICT


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentConfig:
    """How strongly to augment; a strength of 0 turns a part off.

    Attributes:
        elastic_probability: Share of the samples that are deformed elastically.
        num_controlpoints: Control points of the cubic B-spline along each axis (one number, or z, y, x), at least 4:
            n points make n - 3 cells, so that 4 points bend the volume as one piece.
        sigma: Standard deviation in voxels of each component of a control point's displacement. The spline averages
            its neighbours: the dense field has 0.31 to 0.35 of it.
        rotation_degrees: Largest turn in the axial plane. There is none about the other axes: a patient lies flat.
        scale: Largest relative change of size, along all axes: from 1 / (1 + scale) to 1 + scale.
        flip: Mirror half the samples left to right. Off, since the liver is on the right.
        noise_level: Largest standard deviation of the Gaussian noise, in units of 200 HU.
        central_value: The image value that a change of contrast leaves alone.
        contrast_random_level: Largest relative change of contrast, at most 1.
        brightness_random_level: Largest shift, in units of 200 HU.
        gamma_random_level: Largest change of the exponent that bends the image's own range of values: from
            1 / (1 + level) to 1 + level.
        blur_level: Largest standard deviation in voxels of a Gaussian blur of the image.

    Raises:
        ConfigError: On construction, listing every fault.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    elastic_probability: float = 0.8
    num_controlpoints: int | tuple[int, int, int] = 7
    sigma: float = 6.0
    rotation_degrees: float = 10.0
    scale: float = 0.1
    flip: bool = False
    noise_level: float = 0.05
    central_value: float = 0.0
    contrast_random_level: float = 0.25
    brightness_random_level: float = 0.1
    gamma_random_level: float = 0.0
    blur_level: float = 0.0

    def __post_init__(self) -> None:
        faults = list(_faults(self))
        if faults:
            raise ConfigError("augmentation: " + "; ".join(faults))

    @property
    def controlpoints_zyx(self) -> tuple[int, int, int]:
        """Number of control points along each axis."""
        n = self.num_controlpoints
        return (n, n, n) if isinstance(n, int) else n


_UNBOUNDED = ("sigma", "scale", "noise_level", "brightness_random_level", "gamma_random_level", "blur_level")
# Upper ends of the ranges that have one.
_MOST = {"elastic_probability": 1.0, "rotation_degrees": 180.0, "contrast_random_level": 1.0}


def _faults(config: AugmentConfig) -> Iterator[str]:
    if min(config.controlpoints_zyx) < 4:
        yield f"num_controlpoints must be at least 4 along each axis, got {config.num_controlpoints}"
    if not math.isfinite(config.central_value):
        yield f"central_value must be finite, got {config.central_value}"
    for name in (*_UNBOUNDED, *_MOST):
        value, most = getattr(config, name), _MOST.get(name, math.inf)
        if not (math.isfinite(value) and 0 <= value <= most):
            yield f"{name} must be finite and in [0, {most:g}], got {value}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SpatialParams:
    """One draw of the spatial transform for B samples, on the CPU.

    Attributes:
        control_bzyx3: Displacements (z, y, x) of the control points, in voxels.
        angle_b: Turns in the axial plane, in radians.
        size_b: Factors by which things grow.
        mirror_b: Whether left and right change places.
        part_b32: The part of the input that fills the output: start and stop along z, y and x, in 0..1 and beyond, where
            the context fills in.
        pixel_aspect_b: Height over width of the output's pixels: a turn keeps angles in mm.
    """

    control_bzyx3: Tensor
    angle_b: Tensor
    size_b: Tensor
    mirror_b: Tensor
    part_b32: Tensor
    pixel_aspect_b: Tensor

    def part(self, which: slice) -> SpatialParams:
        """The draw of some of the samples."""
        return _part(self, which)

    @property
    def identity_b(self) -> Tensor:
        """Which samples the transform leaves where they are."""
        still = ~self.control_bzyx3.flatten(1).any(dim=1) & (self.angle_b == 0) & (self.size_b == 1)
        whole = (self.part_b32 == torch.tensor([0.0, 1.0])).flatten(1).all(dim=1)
        return still & whole & ~self.mirror_b


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NoiseParams:
    """Standard deviation of each sample's noise, and the seed of the generator on the device that makes it."""

    std_b: Tensor
    seed_b: Tensor

    def part(self, which: slice) -> NoiseParams:
        """The draw of some of the samples."""
        return _part(self, which)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ContrastParams:
    """The new image is ``gain * image + offset``."""

    gain_b: Tensor
    offset_b: Tensor

    def part(self, which: slice) -> ContrastParams:
        """The draw of some of the samples."""
        return _part(self, which)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GammaParams:
    """Exponents of each sample's values, after they are brought to 0..1."""

    exponent_b: Tensor

    def part(self, which: slice) -> GammaParams:
        """The draw of some of the samples."""
        return _part(self, which)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlurParams:
    """Standard deviation of each sample's blur, in voxels."""

    std_b: Tensor

    def part(self, which: slice) -> BlurParams:
        """The draw of some of the samples."""
        return _part(self, which)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AugmentParams:
    """One draw of everything."""

    spatial: SpatialParams
    noise: NoiseParams
    contrast: ContrastParams
    gamma: GammaParams
    blur: BlurParams

    def part(self, which: slice) -> AugmentParams:
        """The draw of some of the samples: what a device applies of a draw for all devices."""
        return AugmentParams(**{f.name: getattr(self, f.name).part(which) for f in fields(self)})

    def select(self, i: int) -> AugmentParams:
        """The draw of sample ``i`` as a batch of one."""
        return self.part(slice(i, i + 1))


_Params = TypeVar("_Params", SpatialParams, NoiseParams, ContrastParams, GammaParams, BlurParams)


def _part(params: _Params, which: slice) -> _Params:
    return type(params)(**{f.name: getattr(params, f.name)[which] for f in fields(params)})


def augment(
    image_bczyx: Tensor,
    fractions_bczyx: Tensor,
    config: AugmentConfig,
    *,
    parts_b32: Tensor | None = None,
    pixel_aspect_b: Tensor | None = None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Draw and apply everything; see ``draw`` and ``apply``."""
    params = draw(
        image_bczyx.shape[0], config, parts_b32=parts_b32, pixel_aspect_b=pixel_aspect_b, generator=generator
    )
    return apply(image_bczyx, fractions_bczyx, params)


def draw(
    batch_size: int,
    config: AugmentConfig,
    *,
    parts_b32: Tensor | None = None,
    pixel_aspect_b: Tensor | None = None,
    generator: torch.Generator,
) -> AugmentParams:
    """Draw the spatial transform and what happens to the intensities of a batch from a CPU generator."""
    return AugmentParams(
        spatial=draw_spatial(
            batch_size, config, parts_b32=parts_b32, pixel_aspect_b=pixel_aspect_b, generator=generator
        ),
        noise=draw_noise(batch_size, config, generator=generator),
        contrast=draw_contrast(batch_size, config, generator=generator),
        gamma=draw_gamma(batch_size, config, generator=generator),
        blur=draw_blur(batch_size, config, generator=generator),
    )


@torch.no_grad()
def apply(
    image_bczyx: Tensor, fractions_bczyx: Tensor, params: AugmentParams, *, context: Context | None = None
) -> tuple[Tensor, Tensor]:
    """Move image and fractions together; then blur the image, add noise, change its contrast and its gamma.

    In this order, since noise arises after whatever blurs an image, and display settings come last.
    """
    image_bczyx, fractions_bczyx = apply_spatial(
        image_bczyx, fractions_bczyx, params.spatial, context=context
    )
    image_bczyx = apply_noise(apply_blur(image_bczyx, params.blur), params.noise)
    return apply_gamma(apply_contrast(image_bczyx, params.contrast), params.gamma), fractions_bczyx


def draw_spatial(
    batch_size: int,
    config: AugmentConfig,
    *,
    parts_b32: Tensor | None = None,
    pixel_aspect_b: Tensor | None = None,
    generator: torch.Generator,
) -> SpatialParams:
    """Draw displacements, turns, sizes and mirrorings.

    Args:
        batch_size: B.
        config: Strengths.
        parts_b32: Parts of the inputs, (B, 3, 2): start < stop along z, y and x in 0..1 of the input's size, or beyond.
            The whole inputs if not given.
        pixel_aspect_b: Height over width of the pixels that come out; squares if not given.
        generator: On the CPU.

    Raises:
        ValueError: A part is empty, or there are not B of them.
    """

    def uniform() -> Tensor:
        return 2 * torch.rand(batch_size, generator=generator) - 1

    shape = (batch_size, *config.controlpoints_zyx, 3)
    control_bzyx3 = config.sigma * torch.randn(shape, generator=generator)
    elastic_b = torch.rand(batch_size, generator=generator) < config.elastic_probability
    mirrored_b = torch.rand(batch_size, generator=generator) < 0.5
    return SpatialParams(
        control_bzyx3=torch.where(elastic_b[:, None, None, None, None], control_bzyx3, 0.0),
        angle_b=math.radians(config.rotation_degrees) * uniform(),
        size_b=torch.exp(math.log1p(config.scale) * uniform()),
        mirror_b=mirrored_b & config.flip,
        part_b32=_checked_parts(batch_size, parts_b32),
        pixel_aspect_b=torch.ones(batch_size) if pixel_aspect_b is None else pixel_aspect_b.float().cpu(),
    )


def _checked_parts(batch_size: int, parts_b32: Tensor | None) -> Tensor:
    if parts_b32 is None:
        return torch.tensor([0.0, 1.0]).repeat(batch_size, 3, 1)
    parts_b32 = parts_b32.to("cpu", torch.float32)
    if parts_b32.shape != (batch_size, 3, 2) or not (parts_b32[..., 0] < parts_b32[..., 1]).all():
        raise ValueError(
            f"parts must be {batch_size} times three pairs of start < stop, got {parts_b32.tolist()}"
        )
    return parts_b32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Context:
    """What lies around the inputs of a batch: coarser volumes of the same size that contain them.

    Attributes:
        image_bczyx, fractions_bczyx: As the inputs.
        inner_b32: Where the inputs lie in them: start and stop along z, y and x, in 0..1, on the CPU. A sample whose input is
            all of its context (0 and 1) has none.
    """

    image_bczyx: Tensor
    fractions_bczyx: Tensor
    inner_b32: Tensor

    def of(self, i: int) -> Tensor | None:
        """Image and fractions around sample ``i``, (1, C, Z, Y, X), or None."""
        if (self.inner_b32[i] == torch.tensor([0.0, 1.0])).all():
            return None
        return torch.cat((self.image_bczyx[i, None], self.fractions_bczyx[i, None]), dim=1)


@torch.no_grad()
def apply_spatial(
    image_bczyx: Tensor, fractions_bczyx: Tensor, params: SpatialParams, *, context: Context | None = None
) -> tuple[Tensor, Tensor]:
    """Sample image and fractions trilinearly at the same places.

    Beyond the border of the inputs their context is sampled; without one, and beyond its border, the border repeats.
    Samples that the transform leaves in place come back bit for bit, and the inputs themselves if all are.

    Args:
        image_bczyx: (B, C, Z, Y, X) float32.
        fractions_bczyx: (B, any, Z, Y, X) float32.
        params: A draw for B samples.
        context: What lies around the inputs.
    """
    moved = (~params.identity_b).tolist()
    if not any(moved):
        return image_bczyx, fractions_bczyx
    sampled = []
    for i, is_moved in enumerate(moved):
        both = torch.cat((image_bczyx[i, None], fractions_bczyx[i, None]), dim=1)
        sampled.append(_sample(both, i, params, context) if is_moved else both)
    both_bczyx = torch.cat(sampled)
    channels = image_bczyx.shape[1]
    return both_bczyx[:, :channels], both_bczyx[:, channels:]


def _sample(both_1czyx: Tensor, i: int, params: SpatialParams, context: Context | None) -> Tensor:
    z, y, x = both_1czyx.shape[2:]
    grid_1zyx3 = sampling_grid((z, y, x), params.part(slice(i, i + 1)), device=both_1czyx.device)
    inside = _read(both_1czyx, grid_1zyx3)
    around_1czyx = None if context is None else context.of(i)
    if context is None or around_1czyx is None:
        return inside
    inner_xyz2 = context.inner_b32[i].flip(0)  # in the order of grid_sample's coordinates
    start, stop = inner_xyz2.T.to(grid_1zyx3.device, non_blocking=True)
    around_1zyx3 = torch.addcmul(start + stop - 1, grid_1zyx3, stop - start)
    is_inside_1zyx = (grid_1zyx3.abs() <= 1).all(dim=-1)
    if both_1czyx.device.type == "cpu":
        return _read_outside(inside, around_1czyx, around_1zyx3, is_inside_1zyx)
    # Here the host must not wait to learn how many voxels lie outside, and to sample them all costs nothing.
    return torch.where(is_inside_1zyx[:, None], inside, _read(around_1czyx, around_1zyx3))


def _read_outside(
    inside: Tensor, around_1czyx: Tensor, around_1zyx3: Tensor, is_inside_1zyx: Tensor
) -> Tensor:
    """``inside`` with the voxels outside sampled from the context: a tenth of them, which a CPU feels."""
    outside = (~is_inside_1zyx).flatten().nonzero()[:, 0]
    if not len(outside):
        return inside
    values = _read(around_1czyx, around_1zyx3.view(-1, 3)[outside].view(1, 1, 1, -1, 3))
    return inside.flatten(2).index_copy(2, outside, values.flatten(2)).view_as(inside)


def _read(volume_1czyx: Tensor, grid_1zyx3: Tensor) -> Tensor:
    """The volume at the places of a grid; on a CPU in one slab per thread, since ``grid_sample`` shares out no less."""
    n_z = grid_1zyx3.shape[1]
    slabs = math.gcd(n_z, torch.get_num_threads()) if volume_1czyx.device.type == "cpu" else 1
    sampled_sczyx = F.grid_sample(
        volume_1czyx.expand(slabs, -1, -1, -1, -1),
        grid_1zyx3.reshape(slabs, n_z // slabs, *grid_1zyx3.shape[2:]),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    return sampled_sczyx.transpose(0, 1).flatten(1, 2)[None]


def sampling_grid(shape_zyx: tuple[int, int, int], params: SpatialParams, *, device: torch.device) -> Tensor:
    """Where each output voxel of one sample is read from: part ∘ size ∘ turn ∘ (identity + displacement).

    A cubic B-spline reproduces linear functions exactly, so the affine part is applied to the few control points
    instead of the dense grid: three small matrix products then give the whole transform at once.

    Args:
        shape_zyx: Size of the volume.
        params: A draw for one sample.
        device: Where the grid is wanted.

    Returns:
        (1, Z, Y, X, 3) in ``grid_sample``'s coordinates: (x, y, z), -1 and 1 at the volume's outer faces.
    """
    lattice = _lattice(shape_zyx, params.control_bzyx3.shape[1:4])
    control_zyx3 = _affine(lattice + params.control_bzyx3[0], shape_zyx, params).to(device, non_blocking=True)
    z, y, x = (
        _spline_weights(voxels, points, device)
        for voxels, points in zip(shape_zyx, control_zyx3.shape[:3], strict=True)
    )
    with torch.autocast(device.type, enabled=False):  # bf16 coordinates would be off by half a voxel
        rows = torch.einsum("ya,xb,kabc->kyxc", y, x, control_zyx3)
        return (z @ rows.flatten(1)).view(1, *shape_zyx, 3)


def _lattice(shape_zyx: tuple[int, int, int], points_zyx: tuple[int, ...]) -> Tensor:
    """Places of the control points, (points z, y, x, 3): voxels from the centre. One lies outside at each end."""
    axes = [
        (torch.arange(points) - 1) * (voxels / (points - 3)) - voxels / 2
        for voxels, points in zip(shape_zyx, points_zyx, strict=True)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def _affine(places_zyx3: Tensor, shape_zyx: tuple[int, int, int], params: SpatialParams) -> Tensor:
    """Turn, size, mirror and part, from voxels off the centre (z, y, x) to ``grid_sample``'s (x, y, z)."""
    z, y, x = (places_zyx3 / params.size_b).unbind(-1)
    cos, sin = torch.cos(params.angle_b), torch.sin(params.angle_b)
    y = y * params.pixel_aspect_b  # in widths of a pixel, so that a turn is one in mm
    y, x = (cos * y - sin * x) / params.pixel_aspect_b, sin * y + cos * x
    x = torch.where(params.mirror_b, -x, x)
    half_z, half_y, half_x = (voxels / 2 for voxels in shape_zyx)
    start, stop = params.part_b32[0].flip(0).T
    places = torch.stack((x / half_x, y / half_y, z / half_z), dim=-1)
    inside: Tensor = places * (stop - start) + (start + stop - 1)
    return inside


@cache
def _spline_weights(voxels: int, points: int, device: torch.device) -> Tensor:
    """Cubic B-spline weights, (voxels, points): what each control point has of the field at each voxel's centre.

    Rows sum to 1. Rueckert et al. 1999, doi:10.1109/42.796284, equation 3.
    """
    place = (torch.arange(voxels, dtype=torch.float64) + 0.5) * (points - 3) / voxels
    cell = place.floor()
    u = place - cell
    pieces = ((1 - u) ** 3, 3 * u**3 - 6 * u**2 + 4, -3 * u**3 + 3 * u**2 + 3 * u + 1, u**3)
    weights = torch.zeros(voxels, points, dtype=torch.float64)
    for offset, piece in enumerate(pieces):
        weights[torch.arange(voxels), cell.long() + offset] = piece / 6
    return weights.float().to(device)


def draw_noise(batch_size: int, config: AugmentConfig, *, generator: torch.Generator) -> NoiseParams:
    """A standard deviation from 0 to ``noise_level`` and a seed for each sample."""
    return NoiseParams(
        std_b=config.noise_level * torch.rand(batch_size, generator=generator),
        seed_b=torch.randint(2**62, (batch_size,), generator=generator),
    )


@torch.no_grad()
def apply_noise(image_bczyx: Tensor, params: NoiseParams) -> Tensor:
    """Add Gaussian noise. The same on every run of a device, but CPU and GPU make other numbers of one seed."""
    if not params.std_b.any():
        return image_bczyx
    pairs = zip(image_bczyx, params.std_b.tolist(), params.seed_b.tolist(), strict=True)
    return torch.stack([image.add(_noise_like(image, seed=seed), alpha=std) for image, std, seed in pairs])


def _noise_like(image_czyx: Tensor, *, seed: int) -> Tensor:
    generator = torch.Generator(image_czyx.device).manual_seed(seed)
    return torch.randn(
        image_czyx.shape, generator=generator, device=image_czyx.device, dtype=image_czyx.dtype
    )


def draw_contrast(batch_size: int, config: AugmentConfig, *, generator: torch.Generator) -> ContrastParams:
    """Draw (v - central_value) c + b + central_value, c = 1 + U(±contrast level), b = U(±brightness level)."""
    contrast, brightness = (2 * torch.rand(batch_size, generator=generator) - 1 for _ in range(2))
    gain = 1 + config.contrast_random_level * contrast
    shift = config.brightness_random_level * brightness
    return ContrastParams(gain_b=gain, offset_b=shift + config.central_value * (1 - gain))


@torch.no_grad()
def apply_contrast(image_bczyx: Tensor, params: ContrastParams) -> Tensor:
    """``gain * image + offset``, one of each per sample."""
    if bool((params.gain_b == 1).all()) and not params.offset_b.any():
        return image_bczyx
    gain, offset = (_beside(v, image_bczyx) for v in (params.gain_b, params.offset_b))
    return torch.addcmul(offset, image_bczyx, gain)


def _beside(value_b: Tensor, image_bczyx: Tensor) -> Tensor:
    """One number per sample, ready to be multiplied with an image; the host does not wait for the device."""
    return value_b.to(image_bczyx.device, image_bczyx.dtype, non_blocking=True).view(-1, 1, 1, 1, 1)


def draw_gamma(batch_size: int, config: AugmentConfig, *, generator: torch.Generator) -> GammaParams:
    """Draw exponents whose logarithm is uniform, so that brighter and darker are equally likely."""
    level = math.log1p(config.gamma_random_level)
    return GammaParams(exponent_b=torch.exp(_levels(batch_size, -level, level, generator=generator)))


@torch.no_grad()
def apply_gamma(image_bczyx: Tensor, params: GammaParams) -> Tensor:
    """(v - lowest)/range to the power of γ, and back: the lowest and the highest value of a sample stay."""
    if bool((params.exponent_b == 1).all()):
        return image_bczyx
    dims = tuple(range(1, image_bczyx.dim()))
    lowest, highest = image_bczyx.amin(dims, keepdim=True), image_bczyx.amax(dims, keepdim=True)
    span = (highest - lowest).clamp(min=torch.finfo(image_bczyx.dtype).tiny)
    bent = ((image_bczyx - lowest) / span) ** _beside(params.exponent_b, image_bczyx) * span + lowest
    return torch.where(_beside(params.exponent_b, image_bczyx) == 1, image_bczyx, bent)


def draw_blur(batch_size: int, config: AugmentConfig, *, generator: torch.Generator) -> BlurParams:
    """A standard deviation from 0 to ``blur_level`` for each sample."""
    return BlurParams(std_b=_levels(batch_size, 0.0, config.blur_level, generator=generator))


@torch.no_grad()
def apply_blur(image_bczyx: Tensor, params: BlurParams) -> Tensor:
    """Blur by three small matrix products; a weight that would fall outside goes to those inside."""
    if not params.std_b.any():
        return image_bczyx
    return torch.cat(
        [_blurred(image[None], std) for image, std in zip(image_bczyx, params.std_b, strict=True)]
    )


def _blurred(image_1czyx: Tensor, std: Tensor) -> Tensor:
    if std == 0:
        return image_1czyx
    z, y, x = (
        _blur_weights(voxels, std).to(image_1czyx.device, image_1czyx.dtype, non_blocking=True)
        for voxels in image_1czyx.shape[2:]
    )
    with torch.autocast(image_1czyx.device.type, enabled=False):
        rows = torch.einsum("pz,nczyx->ncpyx", z, image_1czyx)
        return y @ rows @ x.T


def _blur_weights(voxels: int, std: Tensor) -> Tensor:
    """Gaussian weights, (voxels, voxels), on the CPU; rows sum to 1."""
    place = torch.arange(voxels, dtype=torch.float32)
    return torch.softmax(-((place[:, None] - place) ** 2) / (2 * std**2), dim=1)


def _levels(batch_size: int, low: float, high: float, *, generator: torch.Generator) -> Tensor:
    """Uniform numbers. A part that is off takes none, so that the others' do not depend on its being there."""
    if low == high:
        return torch.full((batch_size,), low)
    return low + (high - low) * torch.rand(batch_size, generator=generator)
