"""The memory of a GPU that a training step takes, from its configuration alone, and what would fit into less."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from liverseg.device import DTYPE_NAMES
from liverseg.model.network import NetworkConfig, parameter_count
from liverseg.training.config import TrainConfig

FLOAT_BYTES = 4
INDEX_BYTES = 8  # of max pooling
# Weights, two moments and the average; gradients come beside them.
WEIGHT_COPIES = 4
# Tensors of the logits' size, float32, that the loss and its gradient hold, with the images; measured as all of these by
# tests/test_memory.py, on storages (tests/fake_cuda.py).
LOSS_COPIES = 10
SAMPLE_COPIES = 5.5  # the same of each sample of ssn's likelihood
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMemory:
    """Most bytes of tensors that are alive at once in a step.

    Attributes:
        weights: Weights, moments, the average, half-precision copies and gradients that are kept.
        features: What the convolutions, norms and poolings keep for the gradient.
        logits: Logits, images and what the loss keeps.
    """

    weights: int
    features: int
    logits: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.features + self.logits


def step_memory(
    config: TrainConfig, shape_zyx: Sequence[int], dtype: torch.dtype | None, *, devices: int = 1
) -> StepMemory:
    """What a step takes on each device, without ``torch.compile``, workspaces and the cached volumes.

    It is most where the backward pass begins, when all features are there and hardly any gradient.

    Args:
        config: The run's.
        shape_zyx: Voxels of a sample.
        dtype: What autocast computes in; None for float32.
        devices: That train together.
    """
    batch, model = config.optim.batch_size, config.model
    parameters, voxels = parameter_count(model), batch * math.prod(shape_zyx)
    item = FLOAT_BYTES if dtype is None else dtype.itemsize
    # Where batches are accumulated or devices share buckets, gradients are there before the backward pass.
    kept = config.optim.accumulate > 1 or devices > 1
    halves = 0 if dtype is None or config.recompute else item
    features = item * _features(model, voxels, recompute=config.recompute)
    features += INDEX_BYTES * sum(_level_elements(model, voxels, i) >> 3 for i in range(model.depth))
    levels = model.depth if model.deep_supervision else 1
    drawn = config.loss.likelihood_samples if model.stochastic == "ssn" else 0
    logits = LOSS_COPIES * sum(voxels >> 3 * level for level in range(levels))
    logits += round(SAMPLE_COPIES * drawn * voxels)
    return StepMemory(
        weights=parameters * (FLOAT_BYTES * (WEIGHT_COPIES + kept) + halves),
        features=features,
        logits=FLOAT_BYTES * model.classes * logits,
    )


def _features(model: NetworkConfig, voxels: int, *, recompute: bool) -> int:
    """Elements that are alive where the backward pass begins."""
    drops = model.dropout > 0
    # Of each convolution: its output, which the norm keeps, the ReLU's, and the dropout's.
    per_convolution = 2 + drops
    convolutions = 2 * per_convolution
    finest = _level_elements(model, voxels, 0)
    elements = sum(_level_elements(model, voxels, i) >> 3 for i in range(model.depth))  # pooled
    for level in range(model.depth + 1):
        encoded = 1 if recompute else convolutions
        decoded = (
            0 if level == model.depth else 2 + (1 if recompute else convolutions)
        )  # of two concatenated inputs
        elements += (encoded + decoded) * _level_elements(model, voxels, level)
    if recompute:  # of the last block again, whose output is in both counts
        elements += (convolutions - 1) * finest
    # Gradients of the last block: without dropout the ReLU holds its output until its own gradient is there.
    return elements + (2 - drops) * finest


def _level_elements(model: NetworkConfig, voxels: int, level: int) -> int:
    return model.channels[level] * (voxels >> 3 * level)


# ---- what a card has


def room_bytes(device: torch.device) -> int | None:
    """What this process can have of a GPU's memory, with what it has already; None on the CPU."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)


def shortage(
    config: TrainConfig,
    shape_zyx: Sequence[int],
    dtype: torch.dtype | None,
    *,
    devices: int,
    room: int,
    half: torch.dtype | None,
) -> str | None:
    """What to say of a step that does not fit, and which changes would; None where it fits.

    Args:
        config: The run's.
        shape_zyx: Voxels of a sample.
        dtype: What the step computes in; None for float32.
        devices: That train together.
        room: Bytes that a device has for tensors.
        half: What the device could compute in instead of float32; None for nothing faster.
    """
    needed = step_memory(config, shape_zyx, dtype, devices=devices).total
    if needed <= room:
        return None
    fits = [
        f"{words} ({total / GIB:.1f} GiB)"
        for words, changed, kind in _alternatives(config, dtype, half)
        if (total := step_memory(changed, shape_zyx, kind, devices=devices).total) <= room
    ]
    would = f"would fit: {'; '.join(fits)}" if fits else "a network with fewer model.base_channels would fit"
    return f"a step needs some {needed / GIB:.1f} GiB, and {room / GIB:.1f} GiB of the GPU are free: {would}"


def _alternatives(
    config: TrainConfig, dtype: torch.dtype | None, half: torch.dtype | None
) -> Iterator[tuple[str, TrainConfig, torch.dtype | None]]:
    """Ways to need less for the same step, the least costly first."""
    optim, batch = config.optim, config.optim.batch_size
    one = replace(optim, batch_size=1, accumulate=optim.accumulate * batch)
    small = replace(config, optim=one)
    small_words = f"optim.batch_size = 1 with optim.accumulate = {one.accumulate}"
    if dtype is None and half is not None:
        yield f"precision = {DTYPE_NAMES[half]}", config, half
    if batch > 1:
        yield small_words, small, dtype
    if not config.recompute:
        yield "recompute = true", _recomputing(config), dtype
    if batch > 1 and not config.recompute:
        yield f"{small_words} and recompute = true", _recomputing(small), dtype


def _recomputing(config: TrainConfig) -> TrainConfig:
    return replace(config, recompute=True, compile="auto" if config.compile is True else config.compile)
