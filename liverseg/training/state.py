"""The one thing that changes during training, how it begins, and the average that follows it."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from data_cache.schema import CaseMeta
from liverseg.device import autocast_dtype
from liverseg.model.network import UNet, to_channels_last
from liverseg.training.config import OptimConfig, TrainConfig

Row = dict[str, "float | None"]


@dataclass(slots=True, kw_only=True, eq=False)
class TrainState:
    """Everything that a run has learnt so far; what a checkpoint holds besides the configuration.

    Attributes:
        network: Being trained.
        average: Exponential moving average of its weights and buffers; what validates and is applied.
        epoch: Finished epochs. Order of samples, augmentation and learning rate follow from it and the
            seed, so that no generator's state needs to be stored.
        scaler: Scales the loss where autocast computes in float16, so that small gradients do not vanish; passes
            everything through elsewhere.
        history: One row per epoch, plain numbers.
        best_score: Highest validation score so far.
    """

    network: UNet
    average: UNet
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epoch: int = 0
    step: int = 0
    best_score: float = -1.0
    history: list[Row] = field(default_factory=list)


def new_state(
    config: TrainConfig, device: torch.device, *, class_shares: tuple[float, ...] | None = None
) -> TrainState:
    """A network with the weights that the seed gives, and its optimizer.

    With ``class_shares`` the untrained network answers with them everywhere (Lin et al. 2017,
    arXiv:1708.02002, section 4.1): it need not first unlearn that a third of all voxels are tumour. On
    phantoms the liver's Dice passed 0.8 after 100 steps instead of 190.
    """
    torch.manual_seed(config.seed)
    network = UNet(config.model, recompute=config.recompute, samples=config.loss.likelihood_samples).to(
        device
    )
    to_channels_last(network)
    if class_shares is not None:
        for head in network.heads:
            head.get_parameter("bias").data.copy_(torch.tensor(class_shares).log())
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=config.optim.learning_rate,
        weight_decay=config.optim.weight_decay,
        fused=device.type == "cuda",
    )
    scales = autocast_dtype(config.precision, device) == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=scales)
    return TrainState(network=network, average=average, optimizer=optimizer, scaler=scaler)


def class_shares(metas: Sequence[CaseMeta]) -> tuple[float, float, float]:
    """Shares of background, liver and tumour in the liver views of some cases; none is below 1e-4."""
    counts = np.zeros(3)
    for meta in metas:
        if meta.voxel_counts is None:
            continue
        box = meta.boxes.get("liver", meta.boxes["scan"])
        _, liver, tumour = meta.voxel_counts
        voxels = math.prod(box.shape_zyx)
        counts += (voxels - liver - tumour, liver, tumour)
    background, liver, tumour = np.maximum(counts / max(counts.sum(), 1.0), 1e-4).tolist()
    return background, liver, tumour


def warmup_steps(config: OptimConfig) -> int:
    """Steps of warm-up: as configured, but at most half of the run."""
    return min(config.warmup_steps, config.epochs * config.steps_per_epoch // 2)


def learning_rate(step: int, config: OptimConfig) -> float:
    """The learning rate of a step (counted from 0): linear warm-up, then half a cosine down to zero."""
    total, warmup = config.epochs * config.steps_per_epoch, warmup_steps(config)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, total - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, *, decay: float, step: int) -> None:
    """average ← decay · average + (1 - decay) · network, for weights and buffers, in place.

    Early on the decay is (1 + step) / (10 + step), so that the first, random weights are soon forgotten.
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    olds, news = ([*module.parameters(), *module.buffers()] for module in (average, network))
    pairs = list(zip(olds, news, strict=True))
    floats = [(old, new) for old, new in pairs if old.is_floating_point()]
    # One kernel for many tensors: one by one, a hundred launches a step.
    torch._foreach_lerp_([old for old, _ in floats], [new for _, new in floats], weight)
    for old, new in pairs:
        if not old.is_floating_point():
            old.copy_(new)


def selection_score(row: Row) -> float:
    """What ``best.pt`` is best by: the mean Dice of the classes that the validation cases have."""
    scores = [s for s in (row["val_dice_liver"], row["val_dice_tumour"]) if s is not None]
    return float(np.mean(scores)) if scores else 0.0


def is_validated(row: Row) -> bool:
    """Whether an epoch was validated: with ``watch.validate_every`` above 1, some are not."""
    return row["val_loss"] is not None


def out_of_patience(history: Sequence[Row], patience: int | None) -> bool:
    """Whether the best validated epoch is ``patience`` epochs ago or more."""
    scores = [selection_score(row) if is_validated(row) else -1.0 for row in history]
    if patience is None or not scores or max(scores) < 0:
        return False
    return len(scores) - 1 - int(np.argmax(scores)) >= patience
