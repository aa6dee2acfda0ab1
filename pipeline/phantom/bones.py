"""The skeleton of a phantom: its bones as signed distances, and how they are painted."""

from __future__ import annotations

import numpy as np

from pipeline.phantom.anatomy import Anatomy, trunk_distance
from pipeline.phantom.canvas import Canvas, Shade
from pipeline.phantom.implicit import Points, Volume, ellipsoid, smooth_max


def _bone_shade(canvas: Canvas, *, cortex_mm: float, cortex_hu: float, marrow_hu: float) -> Shade:
    def shade(points: Points, distance: Volume) -> Volume:
        marrow = np.clip((-distance - cortex_mm) / 1.5, 0, 1)
        inner = marrow_hu + 45.0 * canvas.texture(points, 33, 5.0)
        return np.asarray(cortex_hu + marrow * (inner - cortex_hu), dtype=np.float32)

    return shade


def paint_bones(canvas: Canvas) -> None:
    """Spine, ribs with their cartilage, breastbone, wings of the pelvis."""
    anatomy = canvas.anatomy
    everywhere = ((-160.0, -120.0, -460.0), (160.0, 120.0, 400.0))
    rib_shade = _bone_shade(canvas, cortex_mm=1.5, cortex_hu=650.0, marrow_hu=230.0)
    spine_box = ((-45.0, -105.0, -460.0), (45.0, 5.0, 400.0))
    pelvis_box = ((-150.0, -90.0, -460.0), (150.0, 60.0, -215.0))
    canvas.paint(
        _vertebral_arch, _bone_shade(canvas, cortex_mm=1.5, cortex_hu=600.0, marrow_hu=260.0), spine_box
    )
    canvas.paint(_canal, 28.0, spine_box)
    canvas.paint(_vertebral_body, _vertebral_shade(canvas), spine_box)
    canvas.paint(lambda p: _ribs(anatomy, p, cartilage=True), 105.0, everywhere)
    canvas.paint(lambda p: _ribs(anatomy, p, cartilage=False), rib_shade, everywhere)
    sternum_shade = _bone_shade(canvas, cortex_mm=1.5, cortex_hu=420.0, marrow_hu=150.0)
    canvas.paint(lambda p: _sternum(anatomy, p), sternum_shade, ((-30, 60, -30), (30, 120, 400)))
    canvas.paint(_pelvis, rib_shade, pelvis_box)


def _vertebral_shade(canvas: Canvas) -> Shade:
    def shade(points: Points, distance: Volume) -> Volume:
        phase = np.abs(_vertebra_phase(points))
        disc = np.clip((phase - 0.80) * 12.0, 0, 1)
        plate = np.clip(1.0 - np.abs(phase - 0.78) / 0.1, 0, 1)
        rim = np.clip((distance + 2.5) / 1.5, 0, 1)
        bone = 185.0 + 40.0 * canvas.texture(points, 33, 5.0) + 260.0 * np.maximum(rim, plate)
        return np.asarray(bone + disc * (88.0 - bone), dtype=np.float32)

    return shade


_VERTEBRA_MM = 33.0


def _vertebra_phase(points: Points) -> Volume:
    """-1..1 within each vertebra; ±1 in the middle of the discs."""
    turn = (points.z + 7.0) / np.float32(_VERTEBRA_MM)
    return np.asarray(2.0 * (turn - np.round(turn)), dtype=np.float32)


def _vertebral_body(points: Points) -> Volume:
    waist = 1.6 * (1.0 - _vertebra_phase(points) ** 2)
    body = ellipsoid(points, (0.0, -27.0, 0.0), (23.0, 17.0, 1e5)) + waist
    # The back of a vertebral body is hollow, where the canal runs.
    return smooth_max(np.asarray(body, dtype=np.float32), 10.0 - _canal_axis(points), blend_mm=3.0)


def _canal_axis(points: Points) -> Volume:
    return np.asarray(np.hypot(points.x / 1.15, points.y + 51.0), dtype=np.float32)


def _canal(points: Points) -> Volume:
    return _canal_axis(points) - np.float32(9.0)


def _vertebral_arch(points: Points) -> Volume:
    """Ring around the canal, spinous process behind it, transverse processes beside it, once per vertebra."""
    phase = _vertebra_phase(points)
    across = np.abs(points.x)
    ring = np.abs(_canal_axis(points) - 11.5) - 3.0 + 2.5 * np.clip(np.abs(phase) - 0.55, 0, 1)
    level = (np.abs(phase) - 0.5) * np.float32(_VERTEBRA_MM / 2)
    spinous = np.maximum(np.maximum(across - 3.2, np.abs(points.y + 75.0) - 14.0), level - 2.0)
    facets = np.hypot(across - 17.0, points.y + 55.0) - 6.0
    transverse = np.maximum(np.abs(points.y + 54.0 + 0.25 * across) - 3.2, across - 36.0)
    transverse = np.maximum(transverse, level + 2.0)
    arch = np.minimum(np.minimum(ring, spinous), np.minimum(facets, transverse))
    return np.asarray(arch, dtype=np.float32)


_RIB_PITCH_MM = 27.0
# The lowest rib has the number 0; ribs 1-2 float, higher ones reach further round to the front.
_LOWEST_RIB_MM = -125.0


def _ribs(anatomy: Anatomy, points: Points, *, cartilage: bool) -> Volume:
    """Flat hoops inside the wall that slope down from the back to the front."""
    turn = np.arctan2(np.abs(points.x) / 147.0, -points.y / 104.0)  # 0 at the back, pi in front
    number = (points.z - _LOWEST_RIB_MM + 86.0 * turn - 9.0 * turn**2) / np.float32(_RIB_PITCH_MM)
    nearest = np.maximum(np.round(number), 0.0)
    height_mm = (number - nearest) * np.float32(_RIB_PITCH_MM * 0.86)
    depth_mm = trunk_distance(points) + anatomy.wall_mm - 4.5
    section = np.hypot(depth_mm, height_mm * 0.60) - 3.6
    bone_end = np.minimum(1.35 + 0.28 * nearest, 2.35)
    last = bone_end + (np.where(nearest >= 2, 0.55, 0.0) if cartilage else 0.0)
    beyond = np.maximum(turn - last, 0.22 - turn) * 110.0
    return np.asarray(np.maximum(section, beyond), dtype=np.float32)


def _sternum(anatomy: Anatomy, points: Points) -> Volume:
    plate = np.abs(trunk_distance(points) + anatomy.wall_mm - 6.0) - 5.0
    sides = np.abs(points.x) - 17.0
    return smooth_max(smooth_max(plate, sides, blend_mm=4.0), -14.0 - points.z, blend_mm=8.0)


def _pelvis(points: Points) -> Volume:
    """A curved wing on each side, inside the wall, from the crest down."""
    across = np.abs(points.x)
    shell = np.abs(np.hypot((across - 10.0) / 1.0, points.y + 20.0) - 98.0 - 0.12 * (points.z + 300.0)) - 4.0
    crest = points.z + 235.0 + 0.012 * (points.y + 20.0) ** 2
    front = np.maximum(points.y - 35.0, 45.0 - across)
    return np.asarray(np.maximum(np.maximum(shell, crest), front), dtype=np.float32)
