"""Fixtures of a small world, built once a session: a phantom data set, its cache, and a run trained on it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_cache.reader import CacheStore
from data_cache.schema import PreprocessSpec
from liverseg.model.losses import LossConfig
from liverseg.model.network import NetworkConfig
from liverseg.training.callbacks import Callbacks
from liverseg.training.checkpoint import BEST, load_checkpoint, write_checkpoint
from liverseg.training.config import DataConfig, OptimConfig, TrainConfig
from liverseg.training.split import Split, save_split
from liverseg.training.train import train
from pipeline.build import build
from pipeline.decathlon import read_data_set
from pipeline.phantom import write_phantoms

SPEC = PreprocessSpec(shape_zyx=(16, 32, 32))
SILENT = Callbacks(started=lambda _: None, stepped=lambda *_: None, finished_epoch=lambda _: None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyWorld:
    """Where it is."""

    raw: Path
    cache: Path

    @property
    def store(self) -> CacheStore:
        """Freshly opened."""
        return CacheStore.open(self.cache)


def tiny_config(*, epochs: int = 2, steps: int = 3, learning_rate: float = 1e-2) -> TrainConfig:
    """A network of seconds."""
    return TrainConfig(
        device="cpu",
        precision="fp32",
        data=DataConfig(folds=3),
        # Steps to an overflow or to a threshold were counted with these two.
        model=NetworkConfig(base_channels=2, norm="batch", depth=3, dropout=0.1),
        loss=LossConfig(cross_entropy=3.0),
        optim=OptimConfig(
            epochs=epochs,
            steps_per_epoch=steps,
            learning_rate=learning_rate,
            warmup_steps=2,
            ema_decay=0.9,
        ),
    )


def copy_folds(world: TinyWorld, run: Path, folder: Path) -> tuple[Path, Path]:
    """Copies ``one`` and ``two`` of a run, as if trained on all cases but liver_0, and on all but liver_1."""
    sha256 = {i: world.store.meta(i).image.sha256 for i in world.store.case_ids}
    for name, left in (("one", "liver_0"), ("two", "liver_1")):
        shutil.copytree(run, folder / name)
        train_cases = tuple(i for i in sha256 if i != left)
        hashes = tuple(sha256[i] for i in train_cases)
        save_split(Split(train=train_cases, val=(left,), train_sha256=hashes), folder / name)
    return folder / "one", folder / "two"


def change_weights(run: Path) -> None:
    """Make the network of a run another one."""
    content = load_checkpoint(run / BEST)
    next(iter(content["average"].values())).mul_(1.01)
    write_checkpoint(run / BEST, content)


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """Six phantoms of 40×40×40, cached at 16×32×32."""
    folder = tmp_path_factory.mktemp("tiny")
    write_phantoms(folder / "raw", cases=6, tests=1, shape_xyz=(40, 40, 40), seed=3, jobs=1)
    results = build(read_data_set(folder / "raw"), folder / "cache.zarr", SPEC, jobs=1, report=lambda _: None)
    assert [result.outcome for result in results] == ["done"] * 6
    return TinyWorld(raw=folder / "raw", cache=folder / "cache.zarr")


@pytest.fixture(scope="session")
def tiny_run(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of some seconds: its network knows where the liver is, roughly."""
    run = tmp_path_factory.mktemp("tiny_run") / "run"
    train(tiny_world.store, run, tiny_config(epochs=6, steps=20), resume=False, watcher=SILENT)
    return run
