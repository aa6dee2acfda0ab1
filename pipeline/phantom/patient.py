"""Draws a synthetic patient and a scan: ``draw_anatomy``."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pipeline.phantom.anatomy import (
    LIVER_HIGH_MM,
    LIVER_LOW_MM,
    Anatomy,
    Enhancement,
    LiverShape,
    Organs,
    PhantomSpec,
    Tumour,
    Vessel,
    depth_under_liver,
    liver_above_underside,
    liver_distance,
    over_underside,
    patient_points,
)
from pipeline.phantom.domain_shift import with_domain_shift
from pipeline.phantom.implicit import PointMm, Points, Volume

PHASES = ("native", "arterial", "portal", "delayed")
_PHASE_SHARES = (0.12, 0.15, 0.58, 0.15)
_PADDINGS = (None, -1024, -2048, -3024)
_COARSE_MM = 5.0


def draw_anatomy(spec: PhantomSpec, *, rng: np.random.Generator) -> Anatomy:
    """Draw a patient and a scan.

    The liver's underside is moved until its volume is the one drawn, 1.05-2.1 L, on a grid of 5 mm; tumours are placed
    inside that liver, and the scanned range is laid around it.
    """
    anatomy = _draw_patient(spec, rng=rng)
    points = patient_points(anatomy, _coarse_axes())
    anatomy = _with_volume(anatomy, points, _draw_volume_ml(anatomy.scale_xyz, rng=rng))
    liver_mm = liver_distance(anatomy, points)
    tumours = _draw_tumours(points, liver_mm, rng=rng)
    whole = _with_scan(replace(anatomy, tumours=tumours), points, liver_mm, rng=rng)
    # Last, and without drawing: the patient is the same as the ordinary phantom of this generator.
    return whole if spec.domain_shift is None else with_domain_shift(whole, spec.domain_shift)


def _draw_patient(spec: PhantomSpec, *, rng: np.random.Generator) -> Anatomy:
    size = rng.uniform(0.95, 1.08)
    scale = tuple(float(size * rng.uniform(0.96, 1.04)) for _ in range(3))
    phase = str(rng.choice(PHASES, p=_PHASE_SHARES))
    return Anatomy(
        shape_xyz=spec.shape_xyz,
        spacing_xyz_mm=(1.0, 1.0, 1.0),
        origin_xyz_mm=(0.0, 0.0, 0.0),
        world_xyz_mm=(0.0, 0.0, 0.0),
        scale_xyz=(scale[0], scale[1], scale[2]),
        key=int(rng.integers(2**31)),
        fat_mm=float(np.clip(rng.lognormal(math.log(14.0), 0.5), 5.0, 38.0)),
        wall_mm=float(rng.uniform(11.0, 16.0)),
        phase=phase,
        hu=_draw_enhancement(phase, rng=rng),
        liver=_draw_liver_shape(rng=rng),
        organs=_draw_organs(rng=rng),
        portal_tree=_draw_tree(_PORTAL_STEMS, rng=rng),
        hepatic_tree=_draw_tree(_HEPATIC_STEMS, rng=rng),
        tumours=(),
        noise_hu=float(rng.uniform(10.0, 26.0)),
        noise_blur_px=float(rng.uniform(0.35, 0.65)),
        padding_hu=_PADDINGS[int(rng.integers(len(_PADDINGS)))],
        table_mm=float(rng.uniform(2.0, 14.0)),
    )


# Mean HU by phase, from native to delayed.
_PHASE_HU: dict[str, tuple[float, float, float, float]] = {
    "liver": (62.0, 80.0, 116.0, 100.0),
    "spleen": (50.0, 125.0, 128.0, 105.0),
    "aorta": (42.0, 300.0, 165.0, 115.0),
    "portal_vein": (42.0, 125.0, 178.0, 125.0),
    "hepatic_vein": (42.0, 78.0, 168.0, 122.0),
    "cava": (42.0, 95.0, 140.0, 118.0),
    "cortex": (34.0, 185.0, 200.0, 175.0),
    "medulla": (32.0, 85.0, 180.0, 190.0),
    "muscle": (55.0, 60.0, 66.0, 66.0),
    "heart": (42.0, 220.0, 150.0, 112.0),
    "gut": (38.0, 70.0, 85.0, 70.0),
}


def _draw_enhancement(phase: str, *, rng: np.random.Generator) -> Enhancement:
    column = PHASES.index(phase)
    means = {name: by_phase[column] for name, by_phase in _PHASE_HU.items()}
    dose = rng.uniform(0.85, 1.15)
    native = {name: by_phase[0] for name, by_phase in _PHASE_HU.items()}
    drawn = {
        name: native[name] + (mean - native[name]) * dose * rng.uniform(0.92, 1.08)
        for name, mean in means.items()
    }
    # One liver in six is fatty: some tens of HU darker, while its vessels and the spleen stay as bright.
    fat = rng.uniform(15.0, 40.0) if rng.random() < 0.17 else 0.0
    drawn["liver"] = float(np.clip(drawn["liver"] + rng.normal(0.0, 6.0) - fat, 60.0, 140.0))
    return Enhancement(**{name: float(value) for name, value in drawn.items()})


def _draw_liver_shape(*, rng: np.random.Generator) -> LiverShape:
    return LiverShape(
        underside_mm=60.0,
        underside_slope=float(rng.uniform(0.5, 0.8)),
        underside_tilt=float(rng.uniform(-0.35, 0.05)),
        back_mm=float(rng.uniform(18.0, 40.0)),
        left_tip_mm=float(rng.uniform(40.0, 92.0)),
        dent_mm=float(rng.uniform(1.5, 4.0)),
    )


def _draw_organs(*, rng: np.random.Generator) -> Organs:
    def near(*center: float) -> PointMm:
        x, y, z = (float(c + rng.normal(0.0, 3.5)) for c in center)
        return x, y, z

    def about(*radii: float) -> PointMm:
        x, y, z = (float(r * rng.uniform(0.85, 1.15)) for r in radii)
        return x, y, z

    return Organs(
        stomach=near(-58.0, 14.0, -58.0),
        stomach_radii=about(34.0, 38.0, 42.0),
        spleen=near(-100.0, -42.0, -80.0),
        spleen_radii=about(29.0, 47.0, 54.0),
        gallbladder=near(42.0, 50.0, -112.0),
        gallbladder_radii=about(14.0, 17.0, 27.0),
        kidney_right=near(58.0, -32.0, -165.0),
        kidney_left=near(-58.0, -34.0, -145.0),
        kidney_radii=about(27.0, 25.0, 52.0),
        heart=near(-22.0, 38.0, 22.0),
        aorta_radius_mm=float(rng.uniform(9.0, 13.0)),
        cava_radius_mm=float(rng.uniform(9.5, 12.0)),
        stomach_gas_mm=float(rng.uniform(0.0, 35.0)),
    )


_PORTAL_STEMS = (
    ((2.0, 8.0, -112.0), (30.0, 18.0, -88.0), 6.5),
    ((30.0, 18.0, -88.0), (62.0, 8.0, -84.0), 5.5),
    ((62.0, 8.0, -84.0), (84.0, 38.0, -68.0), 4.2),
    ((62.0, 8.0, -84.0), (92.0, -28.0, -88.0), 4.2),
    ((30.0, 18.0, -88.0), (2.0, 42.0, -70.0), 4.5),
    ((2.0, 42.0, -70.0), (-32.0, 52.0, -58.0), 3.4),
)
_HEPATIC_STEMS = (
    ((22.0, 8.0, -26.0), (60.0, 2.0, -40.0), 5.0),
    ((60.0, 2.0, -40.0), (98.0, -10.0, -75.0), 4.0),
    ((22.0, 8.0, -26.0), (44.0, 34.0, -44.0), 4.5),
    ((44.0, 34.0, -44.0), (58.0, 62.0, -78.0), 3.6),
    ((22.0, 8.0, -26.0), (-14.0, 44.0, -46.0), 4.0),
)


def _draw_tree(
    stems: tuple[tuple[PointMm, PointMm, float], ...], *, rng: np.random.Generator
) -> tuple[Vessel, ...]:
    size = rng.uniform(1.0, 1.35)
    vessels: list[Vessel] = []
    for start, end, radius in stems:
        stem = Vessel(start=start, end=end, radii_mm=(radius * size, radius * size * 0.85))
        vessels += [stem, *_draw_twigs(stem, generations=3, rng=rng)]
    return tuple(vessels)


def _draw_twigs(parent: Vessel, *, generations: int, rng: np.random.Generator) -> list[Vessel]:
    """Two twigs at the end and one along the way, each shorter and thinner (Murray's law: radius³ is conserved)."""
    if generations == 0:
        return []
    axis = np.subtract(parent.end, parent.start)
    twigs: list[Vessel] = []
    for share in (1.0, 1.0, 0.55):
        heading = axis / np.linalg.norm(axis) + rng.normal(0.0, 0.55, 3)
        length_mm = rng.uniform(15.0, 27.0) * 0.85 ** (3 - generations)
        start = np.add(parent.start, axis * share)
        end = start + heading / np.linalg.norm(heading) * length_mm
        radius = max(0.8, parent.radii_mm[1] * rng.uniform(0.55, 0.75))
        twig = Vessel(start=_point(start), end=_point(end), radii_mm=(radius, radius * 0.8))
        twigs += [twig, *_draw_twigs(twig, generations=generations - 1, rng=rng)]
    return twigs


def _point(values: NDArray[np.floating]) -> PointMm:
    x, y, z = (float(v) for v in values)
    return x, y, z


def _coarse_axes() -> tuple[Volume, Volume, Volume]:
    x, y, z = (
        np.arange(low, high, _COARSE_MM, dtype=np.float32)
        for low, high in zip(LIVER_LOW_MM, LIVER_HIGH_MM, strict=True)
    )
    return x, y, z


def _draw_volume_ml(scale_xyz: PointMm, *, rng: np.random.Generator) -> float:
    # Larger people have larger livers; clipped so that the coarse grid's error keeps it between 1 L and 2.2 L.
    return float(np.clip(1500.0 * math.prod(scale_xyz) * rng.lognormal(0.0, 0.16), 1080.0, 2100.0))


def _with_volume(anatomy: Anatomy, points: Points, volume_ml: float) -> Anatomy:
    """Move the liver's underside, by bisection, until the volume is ``volume_ml``."""
    above, depth = liver_above_underside(anatomy, points), depth_under_liver(anatomy, points)
    voxel_ml = _COARSE_MM**3 * math.prod(anatomy.scale_xyz) / 1000.0
    low, high = -60.0, 220.0
    shape = anatomy.liver
    for _ in range(14):
        shape = replace(shape, underside_mm=0.5 * (low + high))
        inside = over_underside(shape, depth, above) < 0
        low, high = (
            (shape.underside_mm, high) if inside.sum() * voxel_ml < volume_ml else (low, shape.underside_mm)
        )
    return replace(anatomy, liver=shape)


# --- Tumours -----------------------------------------------------------------------------------------------------


def _draw_tumours(points: Points, liver_mm: Volume, *, rng: np.random.Generator) -> tuple[Tumour, ...]:
    """0-8 lesions; one patient in eight has none (in the Decathlon, 13 of 131)."""
    count = 0 if rng.random() < 0.12 else int(np.clip(1 + rng.geometric(0.33) - 1, 1, 8))
    diameters_mm = np.sort(np.clip(rng.lognormal(math.log(17.0), 0.6, count), 4.0, 60.0))[::-1]
    tumours: list[Tumour] = []
    for diameter_mm in diameters_mm:
        center = _draw_place(points, liver_mm, float(diameter_mm) / 2, tumours, rng=rng)
        if center is not None:
            tumours.append(_draw_tumour(center, float(diameter_mm) / 2, rng=rng))
    return tuple(tumours)


def _draw_place(
    points: Points, liver_mm: Volume, radius_mm: float, others: list[Tumour], *, rng: np.random.Generator
) -> PointMm | None:
    """A place in the liver, clear of the other lesions: a third of them touch the border, the rest lie deeper.

    None if the liver has no such place left.
    """
    depth = -liver_mm
    touching = rng.random() < 0.33
    wanted = (depth > 0.35 * radius_mm) & (depth < 0.9 * radius_mm) if touching else depth > 1.15 * radius_mm
    wanted &= depth > 2.0
    x, y, z = (np.broadcast_to(v, depth.shape)[wanted] for v in (points.x, points.y, points.z))
    clear = np.ones(x.shape, dtype=bool)
    for other in others:
        gap = np.sqrt((x - other.center[0]) ** 2 + (y - other.center[1]) ** 2 + (z - other.center[2]) ** 2)
        clear &= gap > 1.1 * (radius_mm + max(other.radii_mm))
    places = np.flatnonzero(clear)
    if places.size == 0:
        return None
    chosen = int(rng.choice(places))
    return float(x[chosen]), float(y[chosen]), float(z[chosen])


def _draw_tumour(center: PointMm, radius_mm: float, *, rng: np.random.Generator) -> Tumour:
    stretch = rng.lognormal(0.0, 0.13, 3)
    stretch /= np.prod(stretch) ** (1 / 3)
    dark = rng.random() < 0.75
    return Tumour(
        center=center,
        radii_mm=_point(radius_mm * stretch),
        contrast_hu=float(-rng.uniform(40.0, 80.0) if dark else rng.uniform(20.0, 40.0)),
        rim_hu=float(rng.uniform(15.0, 30.0)) if dark and rng.random() < 0.3 else 0.0,
        core_hu=float(-rng.uniform(10.0, 25.0)) if radius_mm > 10.0 and rng.random() < 0.4 else 0.0,
        dent=float(rng.uniform(0.05, 0.14)),
    )


# --- The scan ----------------------------------------------------------------------------------------------------


def _with_scan(anatomy: Anatomy, points: Points, liver_mm: Volume, *, rng: np.random.Generator) -> Anatomy:
    """Lay the field of view around the patient: 300-420 mm wide, 180-420 mm long where 1-5 mm slices allow it."""
    nx, ny, nz = anatomy.shape_xyz
    heights_mm = points.axes_mm[2][(liver_mm < 0).any(axis=(1, 2))] * anatomy.scale_xyz[2]
    length_mm = float(heights_mm.max() - heights_mm.min()) + 24.0
    thickness_mm = _draw_thickness_mm(nz, max(180.0, length_mm), rng=rng)
    spare_mm = nz * thickness_mm - length_mm
    top_mm = float(heights_mm.max()) + 12.0 + (rng.uniform(0.1, 0.6) if spare_mm > 0 else 0.5) * spare_mm
    width_mm = 2.0 * (150.0 * anatomy.scale_xyz[0] + anatomy.fat_mm)
    pixel_mm = float(np.clip(width_mm * rng.uniform(1.0, 1.2), 300.0, 420.0)) / max(nx, ny)
    aside_mm, ahead_mm = rng.normal(0.0, 5.0), rng.normal(-14.0, 6.0)
    return replace(
        anatomy,
        spacing_xyz_mm=(pixel_mm, pixel_mm, thickness_mm),
        origin_xyz_mm=(
            float(aside_mm - pixel_mm * (nx - 1) / 2),
            float(ahead_mm - pixel_mm * (ny - 1) / 2),
            float(top_mm - thickness_mm * (nz - 1)),
        ),
        world_xyz_mm=_point(rng.uniform((-20.0, -200.0, -600.0), (20.0, 200.0, 1600.0))),
    )


def _draw_thickness_mm(slices: int, shortest_mm: float, *, rng: np.random.Generator) -> float:
    low = float(np.clip(shortest_mm / slices, 1.0, 5.0))
    high = float(np.clip(420.0 / slices, low, 5.0))
    # A multiple of a quarter millimetre, as on scanners, if the range contains one.
    drawn = math.exp(rng.uniform(math.log(low), math.log(high)))
    rounded = math.ceil(drawn * 4) / 4
    return rounded if rounded <= high else drawn
