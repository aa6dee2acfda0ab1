"""From the cache to batches: which samples in which order, and where their voxels wait."""

from __future__ import annotations

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
from pipeline.memory import free_bytes

T = TypeVar("T")

Place = Literal["device", "memory", "stream"]
UNKNOWN_FREE_BYTES = 4 << 30  # what is taken for free where the system does not tell
LEAVE_FREE = 0.5  # of a device's free memory; the network needs the rest
EDGE_JITTER = 0.05  # of the liver's size: boxes between the liver and the scan sometimes cut it a little

Ends = tuple[float, float]  # start and stop along an axis, in 0..1
Part = tuple[Ends, Ends, Ends]  # along z, y and x
WHOLE: Part = ((0.0, 1.0), (0.0, 1.0), (0.0, 1.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSpec:
    """One sample to come: a view of a case, and the part of it to show.

    Attributes:
        part_zyx: In shares of the view's own size. Where it reaches beyond the view ``liver``, the view ``scan`` fills in;
            beyond that, its border repeats.
        height_over_width: Size of that part along y over its size along x, in mm: what a turn must know.
    """

    case_id: str
    view: str
    part_zyx: Part
    height_over_width: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Cached voxels of some draws, as they are stored, on the device.

    Attributes:
        image_bczyx, context_image_bczyx: int16 HU of the view, and of the scan around it.
        fractions_bczyx, context_fractions_bczyx: uint8.
        inner_b32: Where the view lies in its context, start and stop along z, y and x in 0..1, on the CPU.
    """

    image_bczyx: Tensor
    fractions_bczyx: Tensor
    context_image_bczyx: Tensor
    context_fractions_bczyx: Tensor
    inner_b32: Tensor


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
    kind, ends = rng.random(), rng.random((3, 2))
    if kind < config.scan_share or "liver" not in meta.boxes:
        z, y, x = (
            (-wider * start, 1 + wider * stop)
            for wider, (start, stop) in zip(config.scan_widening_zyx, ends.tolist(), strict=True)
        )
        return SampleSpec(
            case_id=meta.case_id,
            view="scan",
            part_zyx=(z, y, x),
            height_over_width=_height_over_width(meta, (z, y, x)),
        )
    if kind < config.scan_share + config.between_share:
        box = [_between(*pair) for pair in zip(liver_part(meta), ends.tolist(), strict=True)]
    else:
        jitter = (config.box_jitter * (2 * ends - 1)).tolist()
        box = [_jittered(*pair) for pair in zip(liver_part(meta), jitter, strict=True)]
    z, y, x = (_within(*pair) for pair in zip(box, liver_part(meta), strict=True))
    return SampleSpec(
        case_id=meta.case_id,
        view="liver",
        part_zyx=(z, y, x),
        height_over_width=_height_over_width(meta, box),
    )


def _height_over_width(meta: CaseMeta, part_zyx: Sequence[Ends]) -> float:
    """Height over width of a part of the scan, in mm."""
    _, height_mm, width_mm = (
        n * mm * (stop - start)
        for n, mm, (start, stop) in zip(meta.grid.shape_zyx, meta.grid.spacing_zyx_mm, part_zyx, strict=True)
    )
    return height_mm / width_mm


def liver_part(meta: CaseMeta) -> Part:
    """Where the view ``liver`` lies in the view ``scan``."""
    box = meta.boxes["liver"]
    z, y, x = (
        (start / n, stop / n)
        for start, stop, n in zip(box.start_zyx, box.stop_zyx, meta.grid.shape_zyx, strict=True)
    )
    return z, y, x


def _between(liver: Ends, ends: Sequence[float]) -> Ends:
    """A random part between the liver's and all of an axis; an axis that the liver fills stays whole."""
    if liver == (0.0, 1.0):
        return liver
    jitter = EDGE_JITTER * (liver[1] - liver[0])
    return max(0.0, ends[0] * (liver[0] + jitter)), min(1.0, 1 - ends[1] * (1 - liver[1] + jitter))


def _jittered(liver: Ends, jitter: Sequence[float]) -> Ends:
    """The liver's part with its ends moved, inside the scan; an axis that the liver fills stays whole."""
    if liver == (0.0, 1.0):
        return liver
    size = liver[1] - liver[0]
    return max(0.0, liver[0] + jitter[0] * size), min(1.0, liver[1] + jitter[1] * size)


def _within(part: Ends, outer: Ends) -> Ends:
    """A part of the scan in shares of another part."""
    size = outer[1] - outer[0]
    return (part[0] - outer[0]) / size, (part[1] - outer[0]) / size


class Volumes:
    """The cached volumes of some cases: on the device, in memory, or left in the store until they are drawn."""

    def __init__(
        self, store: CacheStore, case_ids: Sequence[str], *, resident: Resident, device: torch.device
    ) -> None:
        self._store = store
        self._device = device
        metas = [store.meta(case_id) for case_id in case_ids]
        self._inner = {m.case_id: liver_part(m) for m in metas if "liver" in m.boxes}
        keys = [(meta.case_id, view) for meta in metas for view in meta.boxes]
        self.size_bytes = len(keys) * 4 * int(np.prod(store.schema.spec.shape_zyx))
        self.place = choose_place(resident, self.size_bytes, device)
        self._held = {} if self.place == "stream" else {key: self._load(*key) for key in keys}

    def fetch(self, draws: Sequence[SampleSpec]) -> Batch:
        """The voxels of some draws, stacked on the device."""
        image, fractions = self._stack([(d.case_id, d.view) for d in draws])
        if all(d.part_zyx == WHOLE or d.view == "scan" for d in draws):
            context_image, context_fractions = image, fractions
            inner: list[Part] = [WHOLE] * len(draws)
        else:
            context_image, context_fractions = self._stack([(d.case_id, "scan") for d in draws])
            inner = [self._inner[d.case_id] if d.view == "liver" else WHOLE for d in draws]
        return Batch(
            image_bczyx=image,
            fractions_bczyx=fractions,
            context_image_bczyx=context_image,
            context_fractions_bczyx=context_fractions,
            inner_b32=torch.tensor(inner),
        )

    def _stack(self, keys: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
        images, fractions = zip(*(self._held.get(key) or self._load(*key) for key in keys), strict=True)
        return self._to_device(torch.stack(images)[:, None]), self._to_device(torch.stack(fractions))

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
    known = free_bytes()  # a container may have less than the machine
    return UNKNOWN_FREE_BYTES if known is None else known


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
