"""Five steps of a tiny network, beside what they were when this was written: whatever changes learning is seen here.

If it is meant to, ``python tests/test_golden.py`` writes the new numbers; say why in the commit.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import random_case
from tiny import SILENT, SPEC, tiny_config

from data_cache.reader import CacheStore
from data_cache.writer import open_or_create, write_case
from liverseg.model.inputs import InputConfig
from liverseg.model.losses import LossConfig
from liverseg.training.train import train

GOLDEN = Path(__file__).parent / "golden" / "tiny_losses.json"


def losses(folder: Path) -> dict[str, list[float]]:
    """Training and validation loss of each of five epochs of one step; the voxels are noise that a seed gives."""
    open_or_create(folder / "cache.zarr", SPEC)
    for i in range(4):
        write_case(folder / "cache.zarr", random_case(f"liver_{i}", seed=i, spec=SPEC), SPEC)
    # At the usual rate, Adam makes 1e-3 of what the order of a sum changes.
    config = tiny_config(epochs=5, steps=1, learning_rate=1e-3)
    # Not the defaults: these numbers are to outlive a change of them.
    config = replace(
        config,
        loss=LossConfig(name="dice_focal", overlap="squared", cross_entropy=0.0, alpha=0.99, gamma=0.3),
        model=replace(config.model, norm="batch"),
        input=InputConfig(window_hu=(-350.0, 450.0)),
        data=replace(config.data, scan_widening_zyx=(0.0, 0.0, 0.0)),
        augment=replace(config.augment, noise_level=0.1, brightness_random_level=0.2),
    )
    store = CacheStore.open(folder / "cache.zarr")
    history = train(store, folder / "run", config, resume=False, watcher=SILENT).history
    return {name: [float(row[name] or 0) for row in history] for name in ("train_loss", "val_loss")}


def test_five_steps_give_the_losses_they_always_gave(tmp_path: Path) -> None:
    found = losses(tmp_path)
    expected = json.loads(GOLDEN.read_text())
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        # Loose enough for another CPU's order of summation, tight enough for any other change.
        assert found[name] == pytest.approx(values, rel=1e-3)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps(losses(Path(folder)), indent=1) + "\n")
