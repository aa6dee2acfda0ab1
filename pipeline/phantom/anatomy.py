"""A synthetic patient: randomly drawn numbers that define where the organs are and how bright they are.

Distances are in a *reference frame*: millimetres of a patient of average size, x to the patient's right, y to the
front, z upwards, the origin in the middle of the trunk at the height of the right dome of the diaphragm. The patient's
own millimetres are the reference times ``scale_xyz``. The proportions were measured on ``chaos_ct03``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_cache.geometry import Grid
from pipeline.phantom.implicit import (
    PointMm,
    Points,
    Volume,
    ellipsoid,
    random_field,
    smooth_max,
    smooth_min,
    tube,
)

LIVER_LOW_MM: PointMm = (-130.0, -105.0, -235.0)
LIVER_HIGH_MM: PointMm = (150.0, 115.0, 15.0)


DomainShift = Literal["noise", "contrast", "tumour"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhantomSpec:
    """The requested properties of a phantom.

    Attributes:
        shape_xyz: Number of voxels along x, y and z, as a NIfTI header counts them.
        domain_shift: How its scan differs from ordinary ones; see ``phantom.domain_shift``.
    """

    shape_xyz: tuple[int, int, int] = (192, 192, 96)
    domain_shift: DomainShift | None = None

    def __post_init__(self) -> None:
        if min(self.shape_xyz) < 8:
            raise ValueError(f"a phantom needs at least 8 voxels along each axis, got shape {self.shape_xyz}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Enhancement:
    """Mean HU of the tissues in one contrast phase."""

    liver: float
    spleen: float
    aorta: float
    portal_vein: float
    hepatic_vein: float
    cava: float
    cortex: float
    medulla: float
    muscle: float
    heart: float
    gut: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Vessel:
    """A straight piece of vessel in the reference frame."""

    start: PointMm
    end: PointMm
    radii_mm: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tumour:
    """A lesion: a dented ellipsoid.

    Attributes:
        center: Reference frame.
        radii_mm: Semi-axes along x, y and z.
        contrast_hu: Brightness relative to the liver.
        rim_hu: Brightness of its rim, a fifth of the radius, relative to its inside; 0 for no rim.
        core_hu: Brightness of its necrotic centre relative to the rest (negative); 0 for no core.
        dent: Amplitude of its dents as a fraction of the radius.
    """

    center: PointMm
    radii_mm: PointMm
    contrast_hu: float
    rim_hu: float
    core_hu: float
    dent: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LiverShape:
    """The planes that shape a liver; see ``liver_distance``."""

    underside_mm: float
    underside_slope: float
    underside_tilt: float
    back_mm: float
    left_tip_mm: float
    dent_mm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Organs:
    """Centres and sizes of the organs beside the liver, reference frame, mm."""

    stomach: PointMm
    stomach_radii: PointMm
    spleen: PointMm
    spleen_radii: PointMm
    gallbladder: PointMm
    gallbladder_radii: PointMm
    kidney_right: PointMm
    kidney_left: PointMm
    kidney_radii: PointMm
    heart: PointMm
    aorta_radius_mm: float
    cava_radius_mm: float
    stomach_gas_mm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """Everything that ``render`` needs; equal records give equal voxels.

    Attributes:
        shape_xyz: Number of voxels.
        spacing_xyz_mm: Voxel size.
        origin_xyz_mm: Centre of the first voxel in the patient's own millimetres.
        world_xyz_mm: Offset of the scanner's coordinates from the patient's.
        scale_xyz: Patient's millimetres per reference millimetre.
        key: Seed of the random fields and the noise.
        fat_mm: Thickness of the fat under the skin.
        wall_mm: Thickness of the trunk's muscle.
        noise_hu: Standard deviation of the noise in the middle of the body.
        noise_blur_px: Width of the Gaussian that correlates the noise.
        padding_hu: Value that the scanner writes outside its circular field of view; None for no such padding.
        table_mm: Gap between the back and the table.
    """

    shape_xyz: tuple[int, int, int]
    spacing_xyz_mm: PointMm
    origin_xyz_mm: PointMm
    world_xyz_mm: PointMm
    scale_xyz: PointMm
    key: int
    fat_mm: float
    wall_mm: float
    phase: str
    hu: Enhancement
    liver: LiverShape
    organs: Organs
    portal_tree: tuple[Vessel, ...]
    hepatic_tree: tuple[Vessel, ...]
    tumours: tuple[Tumour, ...]
    noise_hu: float
    noise_blur_px: float
    padding_hu: int | None
    table_mm: float

    @property
    def grid(self) -> Grid:
        """The canonical (RAS+) grid of the rendered arrays."""
        affine = np.diag([*self.spacing_xyz_mm, 1.0])
        affine[:3, 3] = np.add(self.origin_xyz_mm, self.world_xyz_mm)
        return Grid.from_array(self.shape_xyz[::-1], affine)


# --- Surfaces that several organs share -------------------------------------------------------------------------


def trunk_distance(points: Points) -> Volume:
    """Distance to the outer face of the trunk's muscle: a superellipse, the distance taken along the ray.

    Flatter at the back than in front, narrower towards the chest.
    """
    widen = 1.0 + 0.0003 * np.clip(points.z, -150.0, 120.0)
    x, y = points.x * np.float32(1 / 147.0) / widen, points.y * np.float32(1 / 104.0)
    level = (np.abs(x) ** 2.25 + np.abs(y) ** np.float32(2.2)) ** np.float32(1 / 2.22) + np.float32(1e-4)
    reach = np.sqrt(points.x**2 + points.y**2)
    return np.asarray(reach * (1 - 1 / level), dtype=np.float32)


def spine_bulge(points: Points) -> Volume:
    """Distance to the mass of spine and back muscles that pushes into the cavity; the same at every height."""
    x, y = points.x / np.float32(46.0), (points.y + np.float32(76.0)) / np.float32(34.0)
    return np.asarray((np.sqrt(x * x + y * y) - 1) * 34.0, dtype=np.float32)


def cavity_distance(anatomy: Anatomy, points: Points) -> Volume:
    """Distance to chest and belly cavity together: the trunk less its wall and the bulge of the spine."""
    inner = trunk_distance(points) + np.float32(anatomy.wall_mm)
    return smooth_max(inner, -spine_bulge(points), blend_mm=12.0)


def diaphragm_distance(points: Points) -> Volume:
    """Negative below the diaphragm: a right dome at height 0, a lower left one, the heart's seat between."""
    right = _dome(points, (68.0, 6.0, 0.0), (82.0, 86.0))
    left = _dome(points, (-76.0, -4.0, -14.0), (70.0, 84.0))
    middle = _dome(points, (-8.0, 32.0, -24.0), (80.0, 70.0))
    height = smooth_min(smooth_min(-right, -left, blend_mm=16.0), -middle, blend_mm=16.0)
    return np.asarray((points.z + height) * 0.7, dtype=np.float32)


def _dome(points: Points, top: PointMm, widths_mm: tuple[float, float]) -> Volume:
    q = ((points.x - top[0]) / widths_mm[0]) ** 2 + ((points.y - top[1]) / widths_mm[1]) ** 2
    return np.asarray(top[2] - 62.0 * q, dtype=np.float32)


def patient_points(anatomy: Anatomy, axes_mm: tuple[Volume, Volume, Volume]) -> Points:
    """Reference-frame points with this patient's warp of a few mm, which bends every organ alike."""
    points = Points.lattice(axes_mm)
    dx, dy, dz = (3.0 * random_field(points, (anatomy.key, axis), spacing_mm=75.0) for axis in range(3))
    return points.moved((dx, dy, dz))


# --- The liver ---------------------------------------------------------------------------------------------------


def gallbladder_distance(anatomy: Anatomy, points: Points) -> Volume:
    """A pear under the liver, leaning forward."""
    organs = anatomy.organs
    return ellipsoid(points, organs.gallbladder, organs.gallbladder_radii, lean=(-0.25, -0.5))


def kidney_distances(anatomy: Anatomy, points: Points) -> tuple[Volume, Volume]:
    """Right and left kidney, their upper poles leaning to the spine."""
    organs = anatomy.organs
    right = ellipsoid(points, organs.kidney_right, organs.kidney_radii, lean=(-0.25, -0.12))
    left = ellipsoid(points, organs.kidney_left, organs.kidney_radii, lean=(0.25, -0.12))
    return right, left


def stomach_distance(anatomy: Anatomy, points: Points) -> Volume:
    """Fundus and body of the stomach, with an arm across to the right, kept under the diaphragm."""
    organs = anatomy.organs
    x, y, z = organs.stomach
    fundus = ellipsoid(points, organs.stomach, organs.stomach_radii, lean=(-0.3, -0.35))
    antrum = tube(points, (x + 12, y + 25, z - 42), (x + 75, y + 28, z - 58), radii_mm=(22.0, 13.0))
    whole = smooth_min(fundus, antrum, blend_mm=25.0) + 4.5 * random_field(
        points, (anatomy.key, 6), spacing_mm=34.0
    )
    return smooth_max(whole, diaphragm_distance(points) + 4.0, blend_mm=6.0)


def cava_distance(anatomy: Anatomy, points: Points) -> Volume:
    """The inferior vena cava, from the pelvis through the back of the liver to the heart."""
    r = anatomy.organs.cava_radius_mm
    low = tube(points, (20.0, 2.0, -420.0), (23.0, 2.0, -110.0), radii_mm=(r, r))
    high = tube(points, (23.0, 2.0, -110.0), (20.0, 8.0, 4.0), radii_mm=(r, r * 1.15))
    return smooth_min(low, high, blend_mm=3.0)


def liver_distance(anatomy: Anatomy, points: Points) -> Volume:
    """Distance to the liver, which fills what its neighbours leave it, as the real one does.

    It lies against the wall and the diaphragm, ends below at a slanting underside, behind at a plane from the spine to
    the right, on the left at its tip; gallbladder, vena cava, kidney, stomach and the ligament's cleft press into it.
    """
    depth = depth_under_liver(anatomy, points)
    return over_underside(anatomy.liver, depth, liver_above_underside(anatomy, points))


def depth_under_liver(anatomy: Anatomy, points: Points) -> Volume:
    """Depth in mm under the liver's slanting, wavy underside before that is moved to its height."""
    shape = anatomy.liver
    lateral = points.x + np.float32(28.0)
    rise = 0.5 * (lateral + np.sqrt(lateral * lateral + 45.0**2))
    waves = 5.0 * random_field(points, (anatomy.key, 5), spacing_mm=45.0)
    depth = waves - shape.underside_slope * rise + shape.underside_tilt * points.y - points.z
    return np.asarray(depth, dtype=np.float32)


def over_underside(shape: LiverShape, depth: Volume, above: Volume) -> Volume:
    below = (depth - np.float32(shape.underside_mm)) * np.float32(0.8)
    return smooth_max(above, below, blend_mm=16.0)


def liver_above_underside(anatomy: Anatomy, points: Points) -> Volume:
    shape = anatomy.liver
    bed = smooth_max(cavity_distance(anatomy, points), diaphragm_distance(points), blend_mm=14.0)
    back = -(points.x + points.y + np.float32(shape.back_mm)) * np.float32(0.7)
    tip = -(points.x + np.float32(shape.left_tip_mm)) + 0.2 * (points.z + 45.0)
    body = smooth_max(bed + 1.5, back, blend_mm=22.0)
    body = smooth_max(body, np.asarray(tip, dtype=np.float32), blend_mm=30.0)
    dents = random_field(points, (anatomy.key, 3), spacing_mm=38.0)
    body = body + np.float32(shape.dent_mm) * dents
    return _pressed(anatomy, points, body)


def _pressed(anatomy: Anatomy, points: Points, body: Volume) -> Volume:
    cleft = tube(points, (2.0, 30.0, -88.0), (-10.0, 100.0, -96.0), radii_mm=(4.5, 6.5))
    hilum = tube(points, (0.0, 8.0, -108.0), (30.0, 20.0, -88.0), radii_mm=(12.0, 5.0))
    right_kidney, _ = kidney_distances(anatomy, points)
    for solid, gap_mm, blend_mm in (
        (cleft, 0.0, 6.0),
        (hilum, 0.0, 8.0),
        (gallbladder_distance(anatomy, points), 1.2, 4.0),
        (cava_distance(anatomy, points), 0.0, 3.0),
        (right_kidney, 4.0, 8.0),
        (stomach_distance(anatomy, points), 1.5, 8.0),
    ):
        body = smooth_max(body, gap_mm - solid, blend_mm=blend_mm)
    return body
