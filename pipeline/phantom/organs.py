"""Paints the organs around the liver, each with the texture and enhancement of its tissue."""

from __future__ import annotations

import numpy as np

from pipeline.phantom.anatomy import (
    cava_distance,
    cavity_distance,
    diaphragm_distance,
    kidney_distances,
    stomach_distance,
    trunk_distance,
)
from pipeline.phantom.canvas import Canvas, Shade, box_around
from pipeline.phantom.implicit import Points, Volume, ellipsoid, smooth_max, smooth_min, tube


def paint_table(canvas: Canvas) -> None:
    """Two curved shells with foam between them; drawn on unwarped axes, since it is not part of the patient."""
    anatomy = canvas.anatomy
    x_mm, y_mm, _ = (axis * s for axis, s in zip(canvas.points.axes_mm, anatomy.scale_xyz, strict=True))
    top_mm = -(104.0 * anatomy.scale_xyz[1] + anatomy.fat_mm * 0.8 + anatomy.table_mm)
    radius_mm = 520.0
    depth = np.hypot(x_mm[None, :], (y_mm - top_mm - radius_mm)[:, None]) - radius_mm
    half_wide = np.abs(x_mm)[None, :] < 215.0
    foam = np.where((depth > 0) & (depth < 28.0) & half_wide, np.float32(-940.0), np.float32(-1000.0))
    shell = np.minimum(np.abs(depth), np.abs(depth - 28.0))
    cover = np.clip(0.5 + (1.6 - shell) / canvas.edge_mm, 0, 1) * half_wide
    canvas.hu[...] = (foam + cover * (60.0 - foam)).astype(np.float32)


def paint_trunk(canvas: Canvas) -> None:
    """Skin, fat under it, muscle, and the fat that fills the cavity."""
    anatomy = canvas.anatomy

    def skin(points: Points) -> Volume:
        front = np.clip(points.y / 100.0, -1, 1)
        return np.asarray(trunk_distance(points) - anatomy.fat_mm * (1.0 + 0.25 * front), dtype=np.float32)

    def fat(points: Points, distance: Volume) -> Volume:
        return np.where(distance > -2.0, np.float32(-5.0), -106.0 + 9.0 * canvas.texture(points, 10, 9.0))

    def muscle(points: Points, distance: Volume) -> Volume:
        # Layers and streaks of fat between the muscles, more of them at depth.
        streaks = canvas.threads(points, 11, 20.0) + 0.35 * np.abs(canvas.texture(points, 13, 8.0))
        marbling = np.clip(1.0 - streaks / 0.30, 0, 1) * np.clip(-distance / 6.0, 0, 1)
        # The fat between the outer muscles and the ribs, and beside the muscles of the back.
        outer = np.abs(distance + 0.38 * anatomy.wall_mm + 1.5 * canvas.texture(points, 12, 30.0))
        back = np.abs(np.hypot((np.abs(points.x) - 25.0) / 1.25, points.y + 80.0) - 17.5)
        patchy = np.clip(0.9 + 0.8 * canvas.texture(points, 36, 28.0), 0, 1)
        planes = np.clip(1.6 - np.minimum(outer, back), 0, 1) * patchy
        marbling = np.maximum(marbling, planes)
        return np.asarray(
            anatomy.hu.muscle - 110.0 * marbling + 5.0 * canvas.texture(points, 14, 7.0), dtype=np.float32
        )

    def inside(points: Points, _: Volume) -> Volume:
        vessels = np.clip(1.0 - canvas.threads(points, 15, 22.0) / 0.20, 0, 1)
        fat = (
            -102.0 + 10.0 * canvas.texture(points, 10, 9.0) + 0.7 * (anatomy.hu.portal_vein + 60.0) * vessels
        )
        diaphragm = np.clip((diaphragm_distance(points) + 3.5) / 1.5, 0, 1)
        return np.asarray(fat + diaphragm * (anatomy.hu.muscle - fat), dtype=np.float32)

    canvas.paint(skin, fat)
    canvas.paint(trunk_distance, muscle)
    canvas.paint(
        lambda points: cavity_distance(anatomy, points), inside, ((-160, -110, -420), (160, 115, 300))
    )


def paint_chest(canvas: Canvas) -> None:
    """Lungs over the diaphragm, the middle between them, the heart."""
    anatomy = canvas.anatomy
    x, y, z = anatomy.organs.heart

    def heart_sac(points: Points) -> Volume:
        ventricles = ellipsoid(points, (x, y, z), (56.0, 42.0, 44.0), lean=(0.25, 0.0))
        return smooth_min(
            ventricles, tube(points, (4.0, 20.0, z + 20), (4.0, 15.0, 300.0), radii_mm=(34, 30)), blend_mm=15
        )

    def lungs(points: Points) -> Volume:
        column = ellipsoid(points, (-4.0, -30.0, 40.0), (26.0, 48.0, 2000.0))
        middle = smooth_min(column, heart_sac(points) - 5.0, blend_mm=14.0)
        bed = smooth_max(cavity_distance(anatomy, points) + 1.5, -diaphragm_distance(points), blend_mm=6.0)
        return smooth_max(bed, -middle, blend_mm=6.0)

    def air(points: Points, distance: Volume) -> Volume:
        # Vessels thin out towards the pleura; more blood at the back, where the patient lies.
        near_pleura = np.clip(-distance / 30.0, 0.2, 1)
        vessels = np.clip(1.7 - canvas.threads(points, 17, 14.0) / (0.33 * near_pleura), 0, 1)
        haze = -858.0 - 0.35 * points.y + 22.0 * canvas.texture(points, 10, 9.0)
        return np.asarray(haze + 850.0 * vessels, dtype=np.float32)

    def chambers(points: Points, distance: Volume) -> Volume:
        wall = np.clip(1.0 - np.abs(canvas.texture(points, 19, 45.0)) / 0.22, 0, 1)
        wall = np.maximum(wall, np.clip((distance + 9.0) / 5.0, 0, 1))
        flesh = 0.55 * anatomy.hu.heart + 28.0
        return np.asarray(anatomy.hu.heart + wall * (flesh - anatomy.hu.heart), dtype=np.float32)

    def heart(points: Points) -> Volume:
        return smooth_max(heart_sac(points), -diaphragm_distance(points) + 4.0, blend_mm=6.0)

    canvas.paint(lungs, air, ((-160, -110, -130), (160, 115, 400)))
    canvas.paint(heart, chambers, ((-100, -40, -60), (70, 100, 400)))
    canvas.paint(
        lambda p: tube(p, (-6, -2, 400), (-12, 12, -36), radii_mm=(7, 6)),
        45.0,
        ((-25, -15, -45), (10, 25, 400)),
    )


def paint_gut(canvas: Canvas) -> None:
    """Loops of bowel in front of the spine and below liver and stomach; some hold gas, some stool."""
    anatomy = canvas.anatomy

    def room(points: Points) -> Volume:
        bed = cavity_distance(anatomy, points) + 4.0
        below = points.z + 78.0 - 0.22 * points.x + 12.0 * canvas.texture(points, 20, 60.0)
        bed = smooth_max(bed, np.asarray(below, dtype=np.float32), blend_mm=8.0)
        return smooth_max(bed, -10.0 - points.y - 0.12 * np.abs(points.x), blend_mm=8.0)

    # Lean people have more bowel than fat between their organs.
    loop_radius = np.float32(np.interp(anatomy.fat_mm, (5.0, 38.0), (1.25, 0.8)))

    def loops(points: Points) -> Volume:
        tangle = (canvas.threads(points, 21, 28.0) - loop_radius) * np.float32(18.0)
        return smooth_max(room(points), tangle, blend_mm=3.0)

    def filling(points: Points, distance: Volume) -> Volume:
        kind = canvas.texture(points, 23, 42.0)
        lumps = canvas.texture(points, 24, 6.5)
        lumen = np.clip((-distance - 2.5) / 1.5, 0, 1)
        stool = np.where(lumps > 0.6, -720.0, 25.0 + 28.0 * lumps)
        inside = np.where(kind > 0.35, stool, 34.0 + 10.0 * lumps)
        inside = np.where((kind < -0.7) & (points.y > 25.0), -960.0, inside)
        return np.asarray(anatomy.hu.gut + lumen * (inside - anatomy.hu.gut), dtype=np.float32)

    canvas.paint(loops, filling, ((-150, -25, -420), (150, 110, -40)))


def paint_retroperitoneum(canvas: Canvas) -> None:
    """Psoas, kidneys, spleen, pancreas, stomach."""
    anatomy, hu, organs = canvas.anatomy, canvas.anatomy.hu, canvas.anatomy.organs

    def flesh(mean_hu: float, name: int) -> Shade:
        return lambda points, _: np.float32(mean_hu) + np.float32(4.0) * canvas.texture(points, name, 7.0)

    def psoas(points: Points) -> Volume:
        left = tube(points, (-30, -38, -110), (-48, -24, -330), radii_mm=(6, 24))
        right = tube(points, (30, -38, -110), (48, -24, -330), radii_mm=(6, 24))
        return np.minimum(left, right)

    def crura(points: Points) -> Volume:
        left = tube(points, (-24, -10, -40), (-18, -12, -170), radii_mm=(5, 4))
        right = tube(points, (10, 0, -40), (14, -12, -170), radii_mm=(5, 4))
        return np.minimum(left, right)

    def spleen(points: Points) -> Volume:
        whole = ellipsoid(points, organs.spleen, organs.spleen_radii, lean=(0.1, 0.15))
        bed = smooth_max(
            cavity_distance(anatomy, points) + 3.0, diaphragm_distance(points) + 3.0, blend_mm=8.0
        )
        whole = smooth_max(whole + 1.5 * canvas.texture(points, 28, 28.0), bed, blend_mm=8.0)
        whole = smooth_max(whole, 2.0 - stomach_distance(anatomy, points), blend_mm=8.0)
        return smooth_max(whole, 3.0 - kidney_distances(anatomy, points)[1], blend_mm=8.0)

    def spleen_shade(points: Points, _: Volume) -> Volume:
        stripes = 22.0 if anatomy.phase == "arterial" else 3.0
        return np.float32(hu.spleen) + np.float32(stripes) * canvas.texture(points, 29, 12.0)

    def pancreas(points: Points) -> Volume:
        head = tube(points, (24, 20, -128), (0, 28, -108), radii_mm=(13, 9))
        tail = tube(points, (0, 28, -108), (-66, -14, -92), radii_mm=(9, 8))
        return smooth_min(head, tail, blend_mm=6.0) + 2.5 * canvas.texture(points, 25, 9.0)

    def stomach_shade(points: Points, distance: Volume) -> Volume:
        level_mm = organs.stomach[1] + 32.0 - organs.stomach_gas_mm
        food = 28.0 + 16.0 * canvas.texture(points, 30, 8.0)
        inside = np.where(points.y > level_mm, np.float32(-970.0), food)
        wall = np.clip((distance + 4.0 + canvas.texture(points, 31, 12.0)) / 1.5, 0, 1)
        return np.asarray(inside + wall * (hu.gut - inside), dtype=np.float32)

    _paint_kidneys(canvas)
    canvas.paint(psoas, flesh(hu.muscle, 14), ((-80, -70, -420), (80, 10, -95)))
    canvas.paint(crura, flesh(hu.muscle, 14), ((-35, -25, -180), (25, 10, -30)))
    canvas.paint(pancreas, flesh(0.85 * hu.gut + 18.0, 24), ((-85, -35, -150), (45, 50, -75)))
    canvas.paint(lambda p: stomach_distance(anatomy, p), stomach_shade, ((-130, -50, -150), (60, 100, -5)))
    canvas.paint(spleen, spleen_shade, box_around(organs.spleen, organs.spleen_radii, slack=1.3))


def _paint_kidneys(canvas: Canvas) -> None:
    anatomy, hu, organs = canvas.anatomy, canvas.anatomy.hu, canvas.anatomy.organs

    def kidney_shade(points: Points, distance: Volume) -> Volume:
        pyramids = np.clip(0.5 + canvas.texture(points, 26, 9.0) * 1.5, 0, 1) * np.clip(
            (-distance - 6.0) / 2.0, 0, 1
        )
        hilum = [
            ellipsoid(points, (c[0] - s * 13.0, c[1] + 4.0, c[2]), (15.0, 8.0, 27.0), lean=(-0.25 * s, -0.12))
            for c, s in ((organs.kidney_right, 1), (organs.kidney_left, -1))
        ]
        sinus = np.clip((1.5 * canvas.texture(points, 27, 9.0) - np.minimum(*hilum)) / 2.0, 0, 1)
        tissue = hu.cortex + pyramids * (hu.medulla - hu.cortex)
        return np.asarray(tissue + sinus * (-60.0 - tissue), dtype=np.float32)

    for kidney in (0, 1):
        center = (organs.kidney_right, organs.kidney_left)[kidney]
        box = box_around(center, organs.kidney_radii, slack=1.5)
        canvas.paint(lambda p, k=kidney: kidney_distances(anatomy, p)[k], kidney_shade, box)  # type: ignore[misc]


def paint_great_vessels(canvas: Canvas) -> None:
    """Aorta with some plaque, vena cava, splenic and mesenteric vessels."""
    anatomy, hu, organs = canvas.anatomy, canvas.anatomy.hu, canvas.anatomy.organs
    r = organs.aorta_radius_mm

    def aorta(points: Points) -> Volume:
        chest = tube(points, (-24, -30, 400), (-12, -6, -60), radii_mm=(r * 1.1, r))
        belly = tube(points, (-12, -6, -60), (-8, 2, -420), radii_mm=(r, r * 0.8))
        return smooth_min(chest, belly, blend_mm=4.0)

    def aorta_shade(points: Points, distance: Volume) -> Volume:
        plaque = (distance > -2.5) & (canvas.texture(points, 32, 8.0) > 2.1)
        return np.where(plaque, np.float32(600.0), np.float32(hu.aorta))

    def mesenteric(points: Points) -> Volume:
        splenic = tube(points, (2, 14, -112), (-80, -20, -88), radii_mm=(5.5, 4.0))
        superior = tube(points, (2, 14, -112), (6, 34, -240), radii_mm=(6, 4))
        renal_left = tube(points, (12, 4, -132), (-45, -26, -142), radii_mm=(4.5, 4))
        renal_right = tube(points, (25, 0, -150), (46, -26, -158), radii_mm=(4.5, 4))
        return np.minimum(np.minimum(splenic, superior), np.minimum(renal_left, renal_right))

    def arteries(points: Points) -> Volume:
        trunk = tube(points, (-10, 2, -104), (-6, 26, -112), radii_mm=(4, 3.5))
        superior = tube(points, (-6, 26, -112), (-4, 36, -250), radii_mm=(3.5, 2.5))
        return np.minimum(trunk, superior)

    canvas.paint(mesenteric, hu.portal_vein, ((-90, -35, -250), (50, 45, -80)))
    canvas.paint(arteries, hu.aorta, ((-20, -5, -260), (10, 45, -95)))
    canvas.paint(lambda p: cava_distance(anatomy, p), hu.cava, ((0, -20, -420), (45, 25, 10)))
    canvas.paint(aorta, aorta_shade, ((-45, -50, -420), (10, 20, 400)))
