"""Can it be a liver? An imagined patient with a liver that can be one, and each way in which an answer cannot."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data_cache.errors import RunError
from data_cache.geometry import Grid
from data_cache.records import parse, to_json
from liverseg.measure.plausibility import (
    AnswerFacts,
    LabelledView,
    Plausibility,
    ReferenceRanges,
    judge,
    measure_facts,
    sphericity,
)

SIDE_MM = 4.0
GRID = Grid.from_array((90, 80, 100), np.diag([SIDE_MM, SIDE_MM, SIDE_MM, 1.0]))
LUNG_FROM_Z = 65


def ball(center_zyx: tuple[float, float, float], radii_zyx: tuple[float, float, float]) -> NDArray[np.bool_]:
    axes = np.ogrid[tuple(map(slice, GRID.shape_zyx))]
    parts = zip(axes, center_zyx, radii_zyx, strict=True)
    return np.asarray(sum(((axis - c) / r) ** 2 for axis, c, r in parts) < 1)


def patient(
    *, liver_zyx: tuple[float, float, float] = (52, 40, 66), radii: tuple[float, float, float] = (18, 17, 18)
) -> LabelledView:
    """A trunk 320 mm wide in air, lungs in its upper part, a liver of 1.47 L on its right with a tumour of 33 mL."""
    y, x = np.ogrid[: GRID.shape_zyx[1], : GRID.shape_zyx[2]]
    trunk = ((x - 50) / 40) ** 2 + ((y - 40) / 30) ** 2 < 1
    inner = ((x - 50) / 34) ** 2 + ((y - 40) / 24) ** 2 < 1
    hu = np.where(trunk, np.int16(40), np.int16(-1000))[None].repeat(GRID.shape_zyx[0], axis=0)
    hu[LUNG_FROM_Z:, inner] = -800
    liver, tumour = ball(liver_zyx, radii), ball(liver_zyx, (5, 5, 5))
    hu[liver], hu[tumour & liver] = 110, 60
    label = liver.astype(np.uint8) + (tumour & liver)
    return LabelledView(
        label_zyx=label, image_zyx=hu, grid=GRID, scan_zyx=hu, scan_grid=GRID, slice_mm=SIDE_MM
    )


def facts_of(view: LabelledView) -> AnswerFacts:
    facts = measure_facts(view)
    assert facts is not None
    return facts


def reasons(view: LabelledView, reference: ReferenceRanges | None = None) -> tuple[str, ...]:
    return judge(measure_facts(view), reference).reasons


def upside_down(view: LabelledView) -> LabelledView:
    flipped = {name: getattr(view, name)[::-1].copy() for name in ("label_zyx", "image_zyx", "scan_zyx")}
    return replace(view, **flipped)


def mirrored(view: LabelledView) -> LabelledView:
    flipped = {
        name: getattr(view, name)[:, :, ::-1].copy() for name in ("label_zyx", "image_zyx", "scan_zyx")
    }
    return replace(view, **flipped)


# --- facts


def test_the_facts_of_a_liver() -> None:
    facts = facts_of(patient())
    assert facts.liver_ml == pytest.approx(4 / 3 * np.pi * 18 * 17 * 18 * SIDE_MM**3 / 1000, rel=0.01)
    assert facts.tumour_share == pytest.approx(5**3 / (18 * 17 * 18), rel=0.1)
    assert (facts.liver_hu, facts.tumour_contrast_hu) == (110, -50)
    assert facts.length_mm == pytest.approx(2 * 18 * SIDE_MM, abs=2 * SIDE_MM)
    assert facts.offset_right == pytest.approx((66 - 50) / 40, abs=0.02)
    assert facts.lung_below_ml == 0
    assert facts.lung_above_ml > 1000
    assert not facts.cut_below
    assert not facts.cut_above
    assert facts.confidence is None


def test_the_close_view_gives_the_facts_of_the_whole() -> None:
    """A crop with its own grid: what the network decides on is measured where it lies."""
    whole = patient()
    z, y, x = slice(30, 75), slice(15, 65), slice(40, 90)
    shifted = GRID.affine
    shifted[:3, 3] = [x.start * SIDE_MM, y.start * SIDE_MM, z.start * SIDE_MM]
    crop = replace(
        whole,
        label_zyx=whole.label_zyx[z, y, x],
        image_zyx=whole.image_zyx[z, y, x],
        grid=Grid.from_array((45, 50, 50), shifted),
    )
    assert to_json(facts_of(crop)) == pytest.approx(to_json(facts_of(whole)))


def test_a_liver_that_the_scan_cuts_off() -> None:
    low, high = facts_of(patient(liver_zyx=(10, 40, 66))), facts_of(patient(liver_zyx=(80, 40, 66)))
    assert (low.cut_below, low.cut_above) == (True, False)
    assert (high.cut_below, high.cut_above) == (False, True)


def test_sphericity_by_hand() -> None:
    # A cube of side a: π^(1/3) (6 a³)^(2/3) / 6 a² = (π/6)^(1/3) = 0.806, whatever the voxels are.
    cube = np.pad(np.ones((4, 8, 8), bool), 2)
    assert sphericity(cube, (2.0, 1.0, 1.0)) == pytest.approx((np.pi / 6) ** (1 / 3))
    # Eight cubes of half the side, apart: the same volume, twice the surface.
    apart = np.zeros((17, 17, 17), bool)
    apart[np.ix_(*[[1, 2, 3, 4, 9, 10, 11, 12]] * 3)] = True
    assert sphericity(apart, (1.0, 1.0, 1.0)) == pytest.approx((np.pi / 6) ** (1 / 3) / 2)


def test_an_empty_label_has_no_facts() -> None:
    view = patient()
    empty = replace(view, label_zyx=np.zeros_like(view.label_zyx))
    assert measure_facts(empty) is None
    assert reasons(empty) == ("no liver was found",)


def test_a_scan_of_nothing_but_air_has_no_trunk() -> None:
    view = patient()
    air = np.full_like(view.scan_zyx, -1000)
    assert facts_of(replace(view, scan_zyx=air, image_zyx=air)).offset_right is None


# --- what no patient has


def test_a_liver_that_can_be_one_is_plausible() -> None:
    verdict = judge(facts_of(patient()), None)
    assert verdict == Plausibility(reasons=(), peculiarities=(), facts=facts_of(patient()))
    assert verdict.plausible


@pytest.mark.parametrize(
    ("view", "words"),
    [
        (patient(radii=(8, 8, 8)), "the liver has 135 mL: expected 300 to 5000"),
        (patient(radii=(44, 29, 30), liver_zyx=(45, 40, 60)), "mL: expected 300 to 5000"),
        (patient(radii=(44.5, 15, 15), liver_zyx=(45, 40, 66)), "mm long: expected 50 to 350"),
        (patient(radii=(5, 26, 20)), "the liver is 36 mm long"),
        (patient(liver_zyx=(52, 40, 50)), "0 % of the way from the middle of the body"),
        (mirrored(patient()), "to its left side: expected 10 to 70 % to the right (is the scan mirrored?)"),
        (upside_down(patient()), "of lung lie below the liver and 0 above: is the scan upside down?"),
    ],
    ids=["small", "large", "long", "flat", "middle", "mirrored", "upside down"],
)
def test_what_no_patient_has(view: LabelledView, words: str) -> None:
    assert any(words in reason for reason in reasons(view)), reasons(view)


def test_intensities_that_no_liver_has() -> None:
    view = patient()
    bone = np.where(view.label_zyx == 1, np.int16(300), view.image_zyx)
    fat = np.where(view.label_zyx == 1, np.int16(-90), view.image_zyx)
    assert "the liver has 300 HU: expected -20 to 220" in reasons(replace(view, image_zyx=bone))
    assert "the liver has -90 HU: expected -20 to 220" in reasons(replace(view, image_zyx=fat))


def test_nothing_but_tumour() -> None:
    view = patient()
    whole = np.where(view.label_zyx > 0, np.uint8(2), np.uint8(0))
    assert "100 % of the liver are tumour" in reasons(replace(view, label_zyx=whole))


def test_a_slab_through_a_liver_may_be_small() -> None:
    """Three slices of a scan: both ends cut, and neither volume nor length speaks against it."""
    view, slab = patient(), slice(51, 54)
    grid = Grid.from_array((3, 80, 100), GRID.affine)
    cut = {name: getattr(view, name)[slab] for name in ("label_zyx", "image_zyx", "scan_zyx")}
    assert reasons(replace(view, **cut, grid=grid, scan_grid=grid)) == ()


def stretched(
    view: LabelledView, first: int, stop: int, *, copies: int, free: tuple[int, int]
) -> LabelledView:
    """Slices of a patient as thick as ``copies`` of a view's, of whose label ``free`` slices at either end are empty."""
    spacing_mm = SIDE_MM * 2 / copies
    affine = np.diag([SIDE_MM, SIDE_MM, spacing_mm, 1.0])
    arrays = {
        name: np.repeat(getattr(view, name)[first:stop], copies, axis=0)
        for name in ("label_zyx", "image_zyx", "scan_zyx")
    }
    n = (stop - first) * copies
    arrays["label_zyx"][: free[0]] = 0
    arrays["label_zyx"][n - free[1] :] = 0
    grid = Grid.from_array((n, 80, 100), affine)
    return replace(view, **arrays, grid=grid, scan_grid=grid, slice_mm=2 * SIDE_MM)


@pytest.mark.parametrize(
    ("free", "cut"),
    [
        ((0, 0), (True, True)),
        ((8, 3), (True, True)),
        ((20, 20), (True, True)),
        ((21, 0), (False, True)),
        ((0, 21), (True, False)),
        ((21, 21), (False, False)),
    ],
)
def test_a_liver_that_leaves_less_than_one_slice_free_is_cut_off(
    free: tuple[int, int], cut: tuple[bool, bool]
) -> None:
    """A view has 63 slices for the three of a scan: a label may end anywhere within the last of these."""
    view = stretched(patient(), 51, 54, copies=21, free=free)
    facts = facts_of(view)
    assert (facts.cut_below, facts.cut_above) == cut
    about_size = [reason for reason in reasons(view) if "mL" in reason or "mm long" in reason]
    assert (about_size == []) is (cut == (True, True))


def test_volumes_are_those_of_the_scans_own_grid() -> None:
    facts = facts_of(patient(radii=(8, 8, 8)))
    told = facts.with_volumes(liver_ml=310.0, tumour_ml=31.0)
    assert (told.liver_ml, told.tumour_share) == (310, 0.1)
    assert judge(facts, None).reasons != ()
    assert judge(told, None).reasons == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"in_one_piece": 0.6}, "only 60 % of what was taken for liver hangs together"),
        ({"agreement": 0.5}, "coarse and fine pass disagree (Dice 0.50)"),
        ({"confidence": 0.7}, "the network is unsure of the liver (mean probability 0.70)"),
    ],
)
def test_a_network_that_contradicts_itself(change: dict[str, Any], words: str) -> None:
    sure = replace(facts_of(patient()), in_one_piece=1.0, agreement=0.95, confidence=0.93)
    assert judge(sure, None).plausible
    assert judge(replace(sure, **change), None).reasons == (words,)


# --- training labels


def reference() -> ReferenceRanges:
    base = facts_of(patient())
    others = [replace(base, liver_ml=1000.0, liver_hu=90.0), replace(base, liver_ml=2000.0, liver_hu=130.0)]
    return ReferenceRanges.of([base, *others])


def test_ranges_are_of_the_labels_and_of_whole_livers() -> None:
    ranges = reference()
    assert (ranges.n_cases, ranges.liver_ml, ranges.liver_hu) == (3, (1000, 2000), (90, 130))
    part = replace(facts_of(patient()), liver_ml=100.0, liver_hu=70.0, cut_below=True)
    with_part = ReferenceRanges.of([part, replace(part, cut_below=False, liver_ml=900.0)])
    assert (with_part.liver_ml, with_part.liver_hu) == ((900, 900), (70, 70))
    nothing = ReferenceRanges.of([])
    assert (nothing.n_cases, nothing.liver_ml) == (0, None)
    assert judge(facts_of(patient()), nothing).plausible


def test_one_peculiarity_is_said_and_two_are_too_many() -> None:
    usual = facts_of(patient())
    # A quarter of the width is allowed beyond: 80 to 140 HU, 750 to 2250 mL.
    assert judge(replace(usual, liver_hu=81.0, liver_ml=2240.0), reference()).peculiarities == ()
    one = judge(replace(usual, liver_hu=79.0), reference())
    assert one.plausible
    assert one.peculiarities == ("liver 79 HU (training 90 to 130)",)
    two = judge(replace(usual, liver_hu=79.0, liver_ml=2400.0), reference())
    assert not two.plausible
    assert two.reasons == (
        "unlike the training labels: liver volume 2400 mL (training 1000 to 2000); liver 79 HU (training 90 to 130)",
    )
    # Of a liver that the scan cuts off, the volume says nothing.
    assert judge(replace(usual, liver_hu=79.0, liver_ml=700.0, cut_above=True), reference()).plausible


def test_denser_tumours_than_any_in_training() -> None:
    dense = replace(facts_of(patient()), tumour_contrast_hu=60.0)
    assert judge(dense, reference()).peculiarities == (
        "tumours +60 HU against the liver (training -50 to -50)",
    )


def test_an_ensemble_has_seen_what_any_member_has() -> None:
    first, none = reference(), ReferenceRanges.of([])
    second = replace(first, n_cases=5, liver_ml=(500.0, 1500.0))
    both = ReferenceRanges.together([first, none, second])
    assert (both.n_cases, both.liver_ml, both.liver_hu) == (8, (500, 2000), (90, 130))


def test_ranges_come_back_from_json() -> None:
    assert parse(ReferenceRanges, to_json(reference()), source="test", error=RunError) == reference()
