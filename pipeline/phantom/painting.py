"""Paints a whole patient: the other organs, then the liver with its vessels and tumours, and its label."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.phantom.anatomy import (
    LIVER_HIGH_MM,
    LIVER_LOW_MM,
    Anatomy,
    Tumour,
    Vessel,
    cava_distance,
    gallbladder_distance,
    liver_distance,
    patient_points,
)
from pipeline.phantom.bones import paint_bones
from pipeline.phantom.canvas import WARP_MARGIN_MM, Canvas, box_around
from pipeline.phantom.implicit import PointMm, Points, Volume, ellipsoid, tube
from pipeline.phantom.organs import (
    paint_chest,
    paint_great_vessels,
    paint_gut,
    paint_retroperitoneum,
    paint_table,
    paint_trunk,
)


def paint_slab(anatomy: Anatomy, axes_mm: tuple[Volume, Volume, Volume]) -> tuple[Volume, NDArray[np.uint8]]:
    """Paint a patient without noise.

    Args:
        anatomy: The patient.
        axes_mm: Reference-frame coordinates x (nx,), y (ny,), z (nz,) of the voxel centres, ascending.

    Returns:
        HU (nz, ny, nx) and label (nz, ny, nx): 0 background, 1 liver, 2 cancer.
    """
    x_mm, y_mm, z_mm = axes_mm
    points = patient_points(anatomy, axes_mm)
    pixel_mm, _, thickness_mm = anatomy.spacing_xyz_mm
    # The detector and the reconstruction blur about a pixel; thick slices blur slanting borders more.
    edge_mm = float(np.hypot(1.1 * max(0.9, pixel_mm), 0.3 * thickness_mm))
    hu = np.empty((z_mm.size, y_mm.size, x_mm.size), dtype=np.float32)
    canvas = Canvas(anatomy=anatomy, points=points, hu=hu, edge_mm=edge_mm)
    for paint in (paint_table, paint_trunk, paint_gut, paint_retroperitoneum, paint_chest):
        paint(canvas)
    label = paint_liver(canvas)
    paint_great_vessels(canvas)
    paint_bones(canvas)
    return canvas.hu, label


def paint_liver(canvas: Canvas) -> NDArray[np.uint8]:
    """Gallbladder, liver, its vessels and tumours; returns the label of the slab, 0, 1 or 2."""
    anatomy = canvas.anatomy
    label = np.zeros(canvas.hu.shape, dtype=np.uint8)
    canvas.paint(
        lambda p: gallbladder_distance(anatomy, p),
        lambda p, d: np.where(d > -1.5, np.float32(55.0), np.float32(9.0) + 2 * canvas.texture(p, 24, 6.5)),
        box_around(anatomy.organs.gallbladder, anatomy.organs.gallbladder_radii, slack=2.0),
    )
    window = canvas.points.window(LIVER_LOW_MM, LIVER_HIGH_MM)
    if label[window].size == 0:
        return label
    points = canvas.points.crop(window)
    inside_mm = liver_distance(anatomy, points)
    liver = Canvas(anatomy=anatomy, points=points, hu=_parenchyma(canvas, points), edge_mm=canvas.edge_mm)
    _paint_trees(liver)
    tumour_mm = _paint_tumours(liver)
    # Under the vena cava, which is painted later, so that no fat shows through where the two borders meet.
    painted_mm = np.where(
        inside_mm < 3.0, np.minimum(inside_mm, cava_distance(anatomy, points) - 2.0), inside_mm
    )
    canvas.paint(
        lambda _: painted_mm, lambda _, __: liver.hu, (_shrunk(LIVER_LOW_MM, 1), _shrunk(LIVER_HIGH_MM, -1))
    )
    label[window] = np.where(inside_mm < 0, np.where(tumour_mm < 0, 2, 1), 0)
    return label


def _shrunk(corner: PointMm, sign: int) -> PointMm:
    """``paint`` widens its box by the warp's margin; the liver's box holds that margin already."""
    x, y, z = (v + sign * WARP_MARGIN_MM for v in corner)
    return x, y, z


def _parenchyma(canvas: Canvas, points: Points) -> Volume:
    mottle = 3.0 * canvas.texture(points, 34, 6.0) + 4.0 * canvas.texture(points, 35, 55.0)
    return np.asarray(canvas.anatomy.hu.liver + mottle, dtype=np.float32)


def _paint_trees(liver: Canvas) -> None:
    anatomy = liver.anatomy
    for tree, hu in (
        (anatomy.hepatic_tree, anatomy.hu.hepatic_vein),
        (anatomy.portal_tree, anatomy.hu.portal_vein),
    ):
        for vessel in tree:
            liver.paint(lambda p, v=vessel: _vessel(p, v), hu, _vessel_box(vessel))  # type: ignore[misc]


def _vessel(points: Points, vessel: Vessel) -> Volume:
    return tube(points, vessel.start, vessel.end, radii_mm=vessel.radii_mm)


def _vessel_box(vessel: Vessel) -> tuple[PointMm, PointMm]:
    low = np.minimum(vessel.start, vessel.end) - vessel.radii_mm[0]
    high = np.maximum(vessel.start, vessel.end) + vessel.radii_mm[0]
    return (low[0], low[1], low[2]), (high[0], high[1], high[2])


def _paint_tumours(liver: Canvas) -> Volume:
    """Paint every lesion; returns the distance to the nearest one, +inf far away."""
    nearest_mm = np.full(liver.hu.shape, np.inf, dtype=np.float32)
    for number, tumour in enumerate(liver.anatomy.tumours):
        low, high = box_around(tumour.center, tumour.radii_mm, slack=1.5)
        window = liver.points.window(_shrunk(low, -1), _shrunk(high, 1))
        if nearest_mm[window].size == 0:
            continue
        points = liver.points.crop(window)
        distance = _tumour_distance(liver, points, tumour, number)
        nearest_mm[window] = np.minimum(nearest_mm[window], distance)
        hu = _tumour_hu(liver, points, tumour, distance)
        liver.paint(lambda _, d=distance: d, lambda _, __, h=hu: h, (low, high))  # type: ignore[misc]
    return nearest_mm


def _tumour_distance(liver: Canvas, points: Points, tumour: Tumour, number: int) -> Volume:
    radius_mm = float(np.mean(tumour.radii_mm))
    dents = liver.texture(points, 100 + number, max(4.0, 0.7 * radius_mm))
    return ellipsoid(points, tumour.center, tumour.radii_mm) + np.float32(tumour.dent * radius_mm) * dents


def _tumour_hu(liver: Canvas, points: Points, tumour: Tumour, distance: Volume) -> Volume:
    radius_mm = float(np.mean(tumour.radii_mm))
    rim = np.clip(1.0 + distance / (0.2 * radius_mm), 0, 1)
    core = np.clip((-distance - 0.45 * radius_mm) / (0.15 * radius_mm), 0, 1)
    inside = liver.anatomy.hu.liver + tumour.contrast_hu + 5.0 * liver.texture(points, 34, 6.0)
    return np.asarray(inside + tumour.rim_hu * rim + tumour.core_hu * core, dtype=np.float32)
