"""Which samples come, in which order, and that every place that voxels can wait in feeds the same ones."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import TinyWorld

from data_cache.geometry import Box
from data_cache.schema import CaseMeta
from liverseg.model.inputs import InputConfig, class_fractions, decide, network_input
from liverseg.training.augment import AugmentConfig, augment
from liverseg.training.config import DataConfig, Resident
from liverseg.training.stream import (
    WHOLE,
    Batch,
    Prefetch,
    SampleSpec,
    Volumes,
    choose_place,
    epoch_draws,
    liver_part,
)

CPU = torch.device("cpu")


def metas_of(world: TinyWorld) -> list[CaseMeta]:
    store = world.store
    return [store.meta(case_id) for case_id in store.case_ids]


def test_draws_follow_from_the_generator_alone(tiny_world: TinyWorld) -> None:
    metas, config = metas_of(tiny_world), DataConfig()
    first, again, other = (
        epoch_draws(metas, config, count=20, rng=np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_every_case_comes_up_before_any_comes_twice(tiny_world: TinyWorld) -> None:
    metas = metas_of(tiny_world)
    config = DataConfig(tumour_share=0.0)
    draws = epoch_draws(metas, config, count=3 * len(metas), rng=np.random.default_rng(0))
    for start in range(0, len(draws), len(metas)):
        assert {d.case_id for d in draws[start : start + len(metas)]} == {m.case_id for m in metas}


def test_tumour_share_draws_from_cases_with_a_tumour(tiny_world: TinyWorld) -> None:
    metas = metas_of(tiny_world)
    bare = [replace(meta, voxel_counts=(10, 5, 0)) for meta in metas[1:]]
    with_tumour = replace(metas[0], voxel_counts=(10, 5, 1))
    config = DataConfig(tumour_share=1.0)
    draws = epoch_draws([with_tumour, *bare], config, count=12, rng=np.random.default_rng(0))
    assert {d.case_id for d in draws} == {with_tumour.case_id}
    without = epoch_draws(bare, config, count=12, rng=np.random.default_rng(0))
    assert len({d.case_id for d in without}) == len(bare)  # no tumour anywhere: all cases serve


def in_scan(meta: CaseMeta, draw: SampleSpec) -> list[tuple[float, float]]:
    """What a draw shows, in shares of the scan."""
    if draw.view == "scan":
        return list(draw.part_zyx)
    return [
        (a + start * (b - a), a + stop * (b - a))
        for (start, stop), (a, b) in zip(draw.part_zyx, liver_part(meta), strict=True)
    ]


def test_views_come_in_their_shares_and_boxes_hold_the_liver(tiny_world: TinyWorld) -> None:
    metas = {meta.case_id: meta for meta in metas_of(tiny_world)}
    config = DataConfig(scan_share=0.2, scan_widening_zyx=(0, 0, 0), between_share=0.3, box_jitter=0.1)
    draws = epoch_draws(list(metas.values()), config, count=2000, rng=np.random.default_rng(0))
    # Three standard deviations of a share of 0.2 in 2000 draws are 0.027.
    assert sum(d.view == "scan" for d in draws) / 2000 == pytest.approx(0.2, abs=0.03)
    wide = 0
    for draw in draws:
        liver, shown = liver_part(metas[draw.case_id]), in_scan(metas[draw.case_id], draw)
        for (a, b), (start, stop) in zip(liver, shown, strict=True):
            slack = 0.1 * (b - a) + 1e-9
            assert -1e-9 <= start <= a + slack
            assert b - slack <= stop <= 1 + 1e-9
        wide += any(b - a > 1.2 * (d - c) + 1e-9 for (a, b), (c, d) in zip(shown, liver, strict=True))
    # All whole scans, and most of the boxes between, are more than the jitter wider than the liver's.
    assert 0.35 < wide / 2000 < 0.53


def test_the_whole_scan_is_shown_with_a_border_of_every_width(tiny_world: TinyWorld) -> None:
    meta = metas_of(tiny_world)[0]
    config = DataConfig(scan_share=1, between_share=0, scan_widening_zyx=(0.5, 0, 0.1))
    draws = epoch_draws([meta], config, count=300, rng=np.random.default_rng(0))
    parts = np.array([draw.part_zyx for draw in draws])
    starts, stops = parts[..., 0], parts[..., 1]
    assert {draw.view for draw in draws} == {"scan"}
    np.testing.assert_array_equal(parts[:, 1], [[0, 1]] * 300)
    for axis, most in ((0, 0.5), (2, 0.1)):
        for beyond in (-starts[:, axis], stops[:, axis] - 1):
            assert 0 <= beyond.min() < 0.05 * most
            assert 0.95 * most < beyond.max() <= most
    # Independent at both ends, so that the liver is not always in the middle.
    assert abs(np.corrcoef(starts[:, 0], stops[:, 0])[0, 1]) < 0.2
    # 0.1 beyond each side of x at most: the part is up to 1.2 times as wide as high, in its own mm.
    _, y, x = meta.grid.shape_zyx
    _, y_mm, x_mm = meta.grid.spacing_zyx_mm
    for draw, (start, stop) in zip(draws, parts[:, 2], strict=True):
        assert draw.height_over_width == pytest.approx(y * y_mm / (x * x_mm * (stop - start)))


def test_a_batch_of_a_wider_scan_repeats_its_border(tiny_world: TinyWorld) -> None:
    store = tiny_world.store
    (meta,) = metas_of(tiny_world)[:1]
    volumes = Volumes(store, [meta.case_id], resident="memory", device=torch.device("cpu"))
    part = ((-0.5, 1.5), (0.0, 1.0), (0.0, 1.0))
    batch = volumes.fetch([SampleSpec(case_id=meta.case_id, view="scan", part_zyx=part)])
    assert batch.context_image_bczyx is batch.image_bczyx  # nothing lies around a scan
    off = AugmentConfig(
        elastic_probability=0, rotation_degrees=0, scale=0, noise_level=0, contrast_random_level=0,
        brightness_random_level=0,
    )  # fmt: skip
    image, fractions = augment(
        batch.image_bczyx.float(),
        batch.fractions_bczyx.float(),
        off,
        parts_b32=torch.tensor([part]),
        generator=torch.Generator().manual_seed(0),
    )
    quarter = image.shape[2] // 4
    for beyond in range(quarter):
        torch.testing.assert_close(
            image[:, :, beyond], batch.image_bczyx[:, :, 0].float(), rtol=1e-3, atol=0.01
        )
        torch.testing.assert_close(
            image[:, :, -1 - beyond], batch.image_bczyx[:, :, -1].float(), rtol=1e-3, atol=0.01
        )
    # Half as many voxels along z hold the liver that the scan has.
    torch.testing.assert_close(2 * fractions.sum(), batch.fractions_bczyx.float().sum(), rtol=0.02, atol=0)


def test_without_jitter_the_liver_is_shown_as_it_is_cached(tiny_world: TinyWorld) -> None:
    config = DataConfig(scan_share=0, between_share=0, box_jitter=0)
    draws = epoch_draws(metas_of(tiny_world), config, count=20, rng=np.random.default_rng(0))
    for draw in draws:
        np.testing.assert_allclose(draw.part_zyx, WHOLE, atol=1e-12)


def test_an_axis_that_the_liver_fills_stays_whole(tiny_world: TinyWorld) -> None:
    meta = metas_of(tiny_world)[0]
    z, y, x = meta.grid.shape_zyx
    box = Box(start_zyx=(2, 0, 0), stop_zyx=(z - 2, y, x))  # as with crop = "depth"
    meta = replace(meta, boxes={"scan": meta.boxes["scan"], "liver": box})
    for config in (DataConfig(scan_share=0, between_share=1), DataConfig(scan_share=0, between_share=0)):
        for draw in epoch_draws([meta], config, count=20, rng=np.random.default_rng(0)):
            assert draw.part_zyx[1:] == WHOLE[1:]
            assert draw.part_zyx[0] != WHOLE[0]


def test_a_turn_knows_the_pixels(tiny_world: TinyWorld) -> None:
    meta = metas_of(tiny_world)[0]
    _, height_mm, width_mm = (
        n * mm for n, mm in zip(meta.boxes["liver"].shape_zyx, meta.grid.spacing_zyx_mm, strict=True)
    )
    config = DataConfig(scan_share=0, between_share=0, box_jitter=0)
    (draw,) = epoch_draws([meta], config, count=1, rng=np.random.default_rng(0))
    assert draw.height_over_width == pytest.approx(height_mm / width_mm)


def test_a_case_without_liver_shows_its_scan(tiny_world: TinyWorld) -> None:
    meta = metas_of(tiny_world)[0]
    bare = replace(meta, boxes={"scan": meta.boxes["scan"]})
    draws = epoch_draws(
        [bare],
        DataConfig(scan_share=0, between_share=1, scan_widening_zyx=(0, 0, 0)),
        count=5,
        rng=np.random.default_rng(0),
    )
    assert {(d.view, d.part_zyx) for d in draws} == {("scan", WHOLE)}


@pytest.mark.parametrize("resident", ["device", "memory", "stream"])
def test_every_place_gives_the_voxels_of_the_store(tiny_world: TinyWorld, resident: Resident) -> None:
    store = tiny_world.store
    draws = [
        SampleSpec(case_id=i, view=v, part_zyx=((0.1, 0.9),) * 3)
        for i in store.case_ids[:2]
        for v in ("liver", "scan")
    ]
    volumes = Volumes(store, store.case_ids[:2], resident=resident, device=CPU)
    assert volumes.place == resident
    batch = volumes.fetch(draws)
    for i, draw in enumerate(draws):
        view = store.read(draw.case_id, draw.view)
        assert view.fractions_czyx is not None
        np.testing.assert_array_equal(batch.image_bczyx[i, 0].numpy(), view.image_zyx)
        np.testing.assert_array_equal(batch.fractions_bczyx[i].numpy(), view.fractions_czyx)
        scan = store.read(draw.case_id, "scan")
        np.testing.assert_array_equal(batch.context_image_bczyx[i, 0].numpy(), scan.image_zyx)
        inner = liver_part(store.meta(draw.case_id)) if draw.view == "liver" else WHOLE
        np.testing.assert_allclose(batch.inner_b32[i].numpy(), inner, rtol=1e-6)


def test_auto_falls_back_as_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cuda": 1000, "cpu": 10_000}
    monkeypatch.setattr("liverseg.training.stream._free_bytes", lambda device: free[device.type])
    cuda = torch.device("cuda")
    assert [choose_place("auto", n, cuda) for n in (499, 501, 4999, 5001)] == [
        "device",
        "memory",
        "memory",
        "stream",
    ]
    assert choose_place("device", 10**12, cuda) == "device"


def a_batch(i: int) -> Batch:
    nothing = torch.zeros(0)
    return Batch(
        image_bczyx=torch.tensor(i),
        fractions_bczyx=nothing,
        context_image_bczyx=nothing,
        context_fractions_bczyx=nothing,
        inner_b32=nothing,
    )


def test_prefetch_keeps_the_order_and_measures_its_wait() -> None:
    prefetch = Prefetch(range(20), a_batch)
    assert [int(batch.image_bczyx) for batch in prefetch] == list(range(20))
    assert prefetch.waited_s > 0


def test_prefetch_never_runs_further_ahead_than_it_may() -> None:
    fetched: list[int] = []

    def fetch(i: int) -> Batch:
        fetched.append(i)
        return a_batch(i)

    taken = 0
    for _ in Prefetch(range(30), fetch, prefetch=2):
        taken += 1
        # Two in the queue, one in the thread's hands, one that it may have begun since.
        assert len(fetched) <= taken + 4
    assert taken == 30


def test_prefetch_raises_what_its_thread_met() -> None:
    def fetch(i: int) -> Batch:
        if i == 3:
            raise OSError("disk gone")
        return a_batch(i)

    seen = []
    with pytest.raises(OSError, match="disk gone"):
        for batch in Prefetch(range(9), fetch):
            seen.append(int(batch.image_bczyx))
    assert seen == [0, 1, 2]


def test_prefetch_ends_its_thread_when_the_consumer_leaves() -> None:
    before = threading.active_count()
    for _ in Prefetch(range(1000), a_batch):
        break
    assert threading.active_count() == before


def test_network_input_on_a_hand_example() -> None:
    # (50-50)/200, (150-50)/200, below the window: (-150-50)/200, above it: (250-50)/200
    hu = torch.tensor([50, 150, -3024, 3000], dtype=torch.int16)
    torch.testing.assert_close(network_input(hu, InputConfig()), torch.tensor([0.0, 0.5, -1.0, 1.0]))


def test_class_fractions_sum_to_one_and_background_comes_first() -> None:
    cached = torch.tensor([[[255, 0, 51]], [[0, 0, 204]]], dtype=torch.uint8)[None, :, None, None]
    fractions = class_fractions(cached)[0, :, 0, 0, 0]
    torch.testing.assert_close(fractions, torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.2], [0.0, 0.0, 0.8]]))


def test_decide_takes_foreground_first_then_the_likelier_class() -> None:
    # Sum 0.4 < 0.5: background, though liver leads; 0.3 + 0.3: foreground, a tie goes to liver; 0.1 + 0.5: tumour.
    liver, tumour = torch.tensor([[0.4, 0.3, 0.1, 0.9]]), torch.tensor([[0.0, 0.3, 0.5, 0.0]])
    assert decide(torch.stack((liver, tumour), dim=1)).tolist() == [[0, 1, 2, 1]]
