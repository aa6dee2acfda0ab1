"""From the cache to batches: which samples in which order, and where their voxels wait."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from data_cache.reader import CacheStore
from data_cache.schema import CaseMeta
from liverseg.training.config import DataConfig, Resident

T = TypeVar("T")

Place = Literal["device", "memory", "stream"]
LEAVE_FREE = 0.5  # of a device's free memory; the network needs the rest
EDGE_JITTER = 0.05  # of the liver's depth: predicted windows sometimes cut a little


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSpec:
    """One sample to come: a view of a case, and the part of its depth (start, stop in 0..1) to show."""

    case_id: str
    view: str
    window: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Cached voxels of some draws, as they are stored, on the device."""

    image_bczyx: Tensor  # int16 HU
    fractions_bczyx: Tensor  # uint8


def epoch_draws(
    metas: Sequence[CaseMeta], config: DataConfig, *, count: int, rng: np.random.Generator
) -> list[SampleSpec]:
    """``count`` draws of one epoch; every case comes up before any comes up twice.

    Args:
        metas: The training cases.
        config: How often each view is shown, and how often a case with a tumour.
        count: Samples in the epoch.
        rng: Decides everything.
    """
    tumours = [meta for meta in metas if meta.voxel_counts is not None and meta.voxel_counts[2]]
    from_all, from_tumours = _deal(metas, rng), _deal(tumours or metas, rng)
    pools = (from_tumours if rng.random() < config.tumour_share else from_all for _ in range(count))
    return [_draw_view(next(pool), config, rng) for pool in pools]


def _deal(metas: Sequence[CaseMeta], rng: np.random.Generator) -> Iterator[CaseMeta]:
    while True:
        for i in rng.permutation(len(metas)):
            yield metas[i]


def _draw_view(meta: CaseMeta, config: DataConfig, rng: np.random.Generator) -> SampleSpec:
    kind, start, stop = rng.random(3)
    if kind < config.scan_share or "liver" not in meta.windows:
        return SampleSpec(case_id=meta.case_id, view="scan", window=(0.0, 1.0))
    if kind < config.scan_share + config.window_share:
        first, last = _liver_depth(meta)
        jitter = EDGE_JITTER * (last - first)
        window = (max(0.0, start * (first + jitter)), min(1.0, 1 - stop * (1 - last + jitter)))
        return SampleSpec(case_id=meta.case_id, view="scan", window=window)
    return SampleSpec(case_id=meta.case_id, view="liver", window=(0.0, 1.0))


def _liver_depth(meta: CaseMeta) -> tuple[float, float]:
    depth, window = meta.grid.shape_zyx[0], meta.windows["liver"]
    return window.start / depth, window.stop / depth


class Volumes:
    """The cached volumes of some cases: on the device, in memory, or left in the store until they are drawn."""

    def __init__(
        self, store: CacheStore, case_ids: Sequence[str], *, resident: Resident, device: torch.device
    ) -> None:
        self._store = store
        self._device = device
        keys = [(case_id, view) for case_id in case_ids for view in store.meta(case_id).windows]
        self.size_bytes = len(keys) * 4 * int(np.prod(store.schema.spec.shape_zyx))
        self.place = choose_place(resident, self.size_bytes, device)
        self._held = {} if self.place == "stream" else {key: self._load(*key) for key in keys}

    def fetch(self, draws: Sequence[SampleSpec]) -> Batch:
        """The voxels of some draws, stacked on the device."""
        pairs = [self._held.get((d.case_id, d.view)) or self._load(d.case_id, d.view) for d in draws]
        images, fractions = zip(*pairs, strict=True)
        return Batch(
            image_bczyx=self._to_device(torch.stack(images)[:, None]),
            fractions_bczyx=self._to_device(torch.stack(fractions)),
        )

    def _load(self, case_id: str, view: str) -> tuple[Tensor, Tensor]:
        voxels = self._store.read(case_id, view)
        if voxels.fractions_czyx is None:
            raise ValueError(f"case {case_id} has no label")
        image, fractions = torch.from_numpy(voxels.image_zyx), torch.from_numpy(voxels.fractions_czyx)
        return (
            (image.to(self._device), fractions.to(self._device))
            if self.place == "device"
            else (image, fractions)
        )

    def _to_device(self, stacked: Tensor) -> Tensor:
        if stacked.device.type == self._device.type:
            return stacked
        return (stacked.pin_memory() if self._device.type == "cuda" else stacked).to(
            self._device, non_blocking=True
        )


def choose_place(resident: Resident, size_bytes: int, device: torch.device) -> Place:
    """Where ``size_bytes`` of volumes are kept: as asked, or the fastest place that has room for them."""
    if resident != "auto":
        return resident
    if size_bytes < LEAVE_FREE * _free_bytes(device):
        return "device"
    return "memory" if size_bytes < LEAVE_FREE * _free_bytes(torch.device("cpu")) else "stream"


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 4 << 30


class Prefetch:
    """Runs ``fetch`` on items ahead of time in one thread, and measures how long its consumer waits.

    Attributes:
        waited_s: Time that the consumer has spent waiting.
    """

    def __init__(self, items: Iterable[T], fetch: Callable[[T], Batch], *, prefetch: int = 2) -> None:
        self.waited_s = 0.0
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(iter(items), fetch), daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        try:
            while True:
                start = time.perf_counter()
                item = self._queue.get()
                self.waited_s += time.perf_counter() - start
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self._stop.set()
            self._thread.join()

    def _run(self, items: Iterator[T], fetch: Callable[[T], Batch]) -> None:
        try:
            for item in items:
                if not self._put(fetch(item)):
                    return
            self._put(None)
        except BaseException as failure:  # raised again in the consumer's thread
            self._put(failure)

    def _put(self, item: Batch | BaseException | None) -> bool:
        """False once the consumer has gone."""
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False
