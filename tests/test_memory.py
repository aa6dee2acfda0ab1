"""What a training step takes of a GPU: the estimate against counted storages, what it advises, and the table by card."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from tiny import TinyWorld, tiny_config

from data_cache.schema import PreprocessSpec
from liverseg.training import train as train_module
from liverseg.training.callbacks import Callbacks
from liverseg.training.config import TrainConfig, load_config
from liverseg.training.memory import GIB, room_bytes, shortage, step_memory
from liverseg.training.train import train

SHAPE_ZYX = PreprocessSpec().shape_zyx
BF16 = torch.bfloat16
DTYPES = {"bf16": BF16, "fp32": None}


def real(*overrides: str) -> TrainConfig:
    return load_config(REPOSITORY / "configs" / "liver.toml", overrides)


def total_gib(config: TrainConfig, dtype: torch.dtype | None, *, devices: int = 1) -> float:
    return step_memory(config, SHAPE_ZYX, dtype, devices=devices).total / GIB


# Counted by tests/fake_cuda.py, which tests/test_cuda_guard.py does again for the first three; GiB without the volumes.
COUNTED = [
    ("bf16", [], 6.81),
    ("fp32", [], 11.70),
    ("bf16", ["model.base_channels=32"], 3.19),
    ("bf16", ["model.base_channels=16"], 1.69),
    ("bf16", ["model.base_channels=96"], 11.30),
    ("bf16", ["model.dropout=0"], 5.72),
    ("fp32", ["model.dropout=0"], 9.51),
    ("bf16", ["model.dropout=0", "model.deep_supervision=false"], 5.64),
    ("bf16", ["model.depth=3"], 5.63),
    ("bf16", ["optim.batch_size=1"], 4.16),
    ("bf16", ["optim.batch_size=1", "optim.accumulate=2"], 4.50),
    ("bf16", ["optim.batch_size=4"], 12.11),
    ("bf16", ["recompute=true"], 4.57),
    ("fp32", ["recompute=true"], 7.52),
    ("bf16", ["model.norm=batch"], 6.81),
    ("bf16", ["model.stochastic=ssn"], 9.44),
]


@pytest.mark.parametrize(("precision", "overrides", "counted_gib"), COUNTED)
def test_the_estimate_is_near_what_was_counted(
    precision: str, overrides: list[str], counted_gib: float
) -> None:
    assert total_gib(real(*overrides), DTYPES[precision]) == pytest.approx(counted_gib, rel=0.05)


def test_the_weights_by_hand() -> None:
    # Weights, two moments and the average in 4 bytes each, bf16 copies in 2; with the coarse heads of test_network.py.
    config = real()
    parameters = 90_298_691 + 3 * 896 + 9
    assert step_memory(config, SHAPE_ZYX, BF16).weights == parameters * (4 * 4 + 2)
    assert step_memory(config, SHAPE_ZYX, None).weights == parameters * 4 * 4
    # Gradients that are there before the backward pass: of the batch before, or in the buckets that devices share.
    several = step_memory(config, SHAPE_ZYX, BF16, devices=2)
    assert several.weights == parameters * (5 * 4 + 2)
    assert several.features == step_memory(config, SHAPE_ZYX, BF16).features


def test_a_batch_of_two_is_twice_a_batch_of_one() -> None:
    one, two = (step_memory(real(f"optim.batch_size={n}"), SHAPE_ZYX, BF16) for n in (1, 2))
    assert (two.features, two.logits) == (2 * one.features, 2 * one.logits)


def short(room_gib: float, *overrides: str, dtype: torch.dtype | None = BF16) -> str | None:
    half = torch.float16 if dtype is None else None
    return shortage(real(*overrides), SHAPE_ZYX, dtype, devices=1, room=round(room_gib * GIB), half=half)


def test_what_does_not_fit_is_told_with_what_would() -> None:
    assert short(7.0) is None
    words = short(4.7)
    assert words is not None
    assert words.startswith("a step needs some 6.9 GiB, and 4.7 GiB of the GPU are free: would fit: ")
    assert "optim.batch_size = 1 with optim.accumulate = 2 (4.5 GiB)" in words
    assert "recompute = true (4.7 GiB)" in words
    assert "precision" not in words  # it computes in half precision already
    assert "(4.5 GiB)" not in (short(4.3) or "")  # what would not fit, either, is not advised
    assert "fewer model.base_channels" in (short(1.0) or "")


def test_half_precision_is_advised_where_the_device_has_it() -> None:
    words = short(7.0, dtype=None)
    assert words is not None
    assert "would fit: precision = fp16 (6.9 GiB)" in words


def test_what_is_advised_is_a_configuration() -> None:
    config = real("compile=true")
    words = shortage(config, SHAPE_ZYX, BF16, devices=1, room=round(3.9 * GIB), half=None)
    assert (
        words is not None
    )  # compile = true and recompute exclude each other: the advice must not fail for it
    assert "and recompute = true" in words


# ---- in the trainer


def told(world: TinyWorld, run: Path) -> list[str]:
    lines: list[str] = []
    watcher = Callbacks(started=lines.append, stepped=lambda *_: None, finished_epoch=lambda _: None)
    train(world.store, run, tiny_config(epochs=1, steps=4), resume=False, watcher=watcher)
    return lines


def test_the_trainer_says_what_a_step_takes(tiny_world: TinyWorld, tmp_path: Path) -> None:
    (line,) = told(tiny_world, tmp_path / "run")
    config = tiny_config(epochs=1, steps=4)
    gib = step_memory(config, tiny_world.store.schema.spec.shape_zyx, None).total / GIB
    assert f"; tensors of a step {gib:.2f} GiB" in line
    assert "free" not in line  # on a CPU nobody asks


def test_the_trainer_warns_before_the_first_step(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "room_bytes", lambda _: 1000)
    line, warning = told(tiny_world, tmp_path / "run")
    assert line.endswith(", 0.0 GiB are free")
    assert warning.startswith("warning: a step needs some ")


def test_a_gpu_s_room_is_what_is_free_and_what_torch_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 700)
    assert room_bytes(torch.device("cuda")) == 5700
    assert room_bytes(torch.device("cpu")) is None


# ---- by card

CARDS_GB = (16, 24, 40, 80)
LEFT_GIB = 1.0  # for CUDA itself, workspaces and fragments, as the page says


def largest_batch(card_gb: int, config: TrainConfig, dtype: torch.dtype | None) -> int:
    def gib(batch: int) -> float:
        return total_gib(replace(config, optim=replace(config.optim, batch_size=batch)), dtype)

    room_gib = card_gb * 1e9 / GIB - LEFT_GIB
    per_sample = gib(3) - gib(2)
    return max(0, math.floor((room_gib - gib(1)) / per_sample) + 1)


def card_table() -> str:
    """The rows of docs/several-gpus.md."""
    ways = [(real(f"recompute={again}"), dtype) for dtype in (BF16, None) for again in ("false", "true")]
    rows = [("batch of 2", *(f"{total_gib(config, dtype):.1f} GiB" for config, dtype in ways))]
    rows += [(f"{card} GB", *(str(largest_batch(card, *way)) for way in ways)) for card in CARDS_GB]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def test_the_table_by_card_is_what_the_function_says() -> None:
    page = (REPOSITORY / "docs" / "several-gpus.md").read_text(encoding="utf-8")
    assert card_table() in page, card_table()
