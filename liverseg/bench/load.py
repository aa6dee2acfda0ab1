"""``liverseg bench load``: samples per second from the cache to the device, beside the libraries that are installed."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_cache.reader import CacheStore
from data_cache.schema import PreprocessSpec
from liverseg.bench.timing import Timing, fastest
from liverseg.training.config import Resident
from liverseg.training.stream import WHOLE, Prefetch, SampleSpec, Volumes
from pipeline.build import build
from pipeline.decathlon import read_data_set
from pipeline.nifti import write_volume
from pipeline.phantom import write_phantoms

CASES, BATCH, BATCHES = 4, 2, 12
PLACES: tuple[Resident, ...] = ("device", "memory", "stream")

Run = Callable[[], object]


def make_store(folder: Path) -> CacheStore:
    """A cache of phantoms, built as a user's is: voxels that compress as real ones do."""
    write_phantoms(folder / "raw", cases=CASES, tests=0, shape_xyz=(128, 128, 64), seed=0, jobs=1)
    build(
        read_data_set(folder / "raw"), folder / "cache.zarr", PreprocessSpec(), jobs=1, report=lambda _: None
    )
    return CacheStore.open(folder / "cache.zarr")


def measure(store: CacheStore, folder: Path, device: torch.device, *, seconds: float) -> list[Timing]:
    """Seconds per sample, image and label, in batches of 2 on ``device``; one thread everywhere.

    Peers keep what they preprocessed on disk in their usual way: MONAI's PersistentDataset a pickle per case,
    TorchIO two compressed NIfTI files.
    """
    runs = {f"liverseg, {place}": _own(store, place, device) for place in PLACES}
    for name, make in PEERS.items():
        if importlib.util.find_spec(name) is not None:
            runs[name] = make(store, folder, device)
    samples = BATCH * BATCHES
    return [
        Timing(name=name, seconds=fastest(run, device, seconds=seconds) / samples)
        for name, run in runs.items()
    ]


def _own(store: CacheStore, place: Resident, device: torch.device) -> Run:
    volumes = Volumes(store, store.case_ids, resident=place, device=device)
    draws = [SampleSpec(case_id=i, view="liver", part_zyx=WHOLE) for i in _ids(store)]
    batches = [draws[i : i + BATCH] for i in range(0, len(draws), BATCH)]
    return lambda: [None for _ in Prefetch(batches, volumes.fetch)]


def _ids(store: CacheStore) -> Iterator[str]:
    return itertools.islice(itertools.cycle(store.case_ids), BATCH * BATCHES)


def _voxels(store: CacheStore, case_id: str) -> tuple[Any, Any]:
    view = store.read(case_id, "liver")
    assert view.fractions_czyx is not None
    return view.image_zyx, view.fractions_czyx


def _monai(store: CacheStore, folder: Path, device: torch.device) -> Run:
    from monai.data import DataLoader, PersistentDataset

    def prepare(item: dict[str, str]) -> dict[str, Any]:
        image, fractions = _voxels(store, item["case"])
        return {"image": torch.from_numpy(image)[None], "label": torch.from_numpy(fractions)}

    items = [{"case": case_id} for case_id in _ids(store)]
    loader = DataLoader(
        PersistentDataset(items, transform=prepare, cache_dir=folder / "monai"), batch_size=BATCH
    )
    return lambda: [(b["image"].to(device), b["label"].to(device)) for b in loader]


def _torchio(store: CacheStore, folder: Path, device: torch.device) -> Run:
    import torchio as tio

    for case_id in store.case_ids:
        image, fractions = _voxels(store, case_id)
        grid = store.read(case_id, "liver").grid
        write_volume(folder / f"{case_id}_image.nii.gz", image, grid)
        # Ids, as it keeps labels: one byte per voxel and easier to inflate than fractions.
        ids = (fractions.sum(axis=0) >= 128).astype(np.uint8)
        write_volume(folder / f"{case_id}_label.nii.gz", ids, grid)
    subjects = [
        tio.Subject(
            image=tio.ScalarImage(folder / f"{case_id}_image.nii.gz"),
            label=tio.LabelMap(folder / f"{case_id}_label.nii.gz"),
        )
        for case_id in _ids(store)
    ]
    # A subject keeps what it has loaded: each run must begin anew.
    return lambda: [
        (s.image.data.to(device), s.label.data.to(device))
        for s in tio.SubjectsDataset(subjects, load_getitem=True)
    ]


PEERS: dict[str, Callable[[CacheStore, Path, torch.device], Run]] = {"monai": _monai, "torchio": _torchio}
