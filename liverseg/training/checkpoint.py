"""The one thing that changes during training, written aside and renamed, read without running code."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_cache.errors import RunError
from data_cache.files import replacing
from data_cache.records import to_json
from data_cache.schema import PreprocessSpec
from liverseg.model.network import UNet
from liverseg.training.config import TrainConfig, config_from_json

LAST, BEST = "last.pt", "best.pt"
VERSION = 1


@dataclass(slots=True, kw_only=True, eq=False)
class TrainState:
    """Everything that a run has learnt so far; what a checkpoint holds besides the configuration.

    Attributes:
        network: Being trained.
        average: Exponential moving average of its weights and buffers; what validates and is applied.
        epoch: Finished epochs. Order of samples, augmentation and learning rate follow from it and the
            seed, so that no generator's state needs to be stored.
        history: One row an epoch, plain numbers.
        best_score: Highest validation score so far.
    """

    network: UNet
    average: UNet
    optimizer: torch.optim.Optimizer
    epoch: int = 0
    step: int = 0
    best_score: float = -1.0
    history: list[dict[str, float | None]] = field(default_factory=list)


def save_checkpoint(path: Path, state: TrainState, config: TrainConfig, spec: PreprocessSpec) -> None:
    """Write a checkpoint so that ``path`` always is a whole one, whenever the process is killed."""
    content = {
        "version": VERSION,
        "config": to_json(config),
        "spec": to_json(spec),
        "network": state.network.state_dict(),
        "average": state.average.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "epoch": state.epoch,
        "step": state.step,
        "best_score": state.best_score,
        "history": state.history,
    }
    with replacing(path) as file:
        torch.save(content, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint's content onto the CPU.

    Raises:
        RunError: There is none, it is damaged, of another version, or holds more than plain data.
    """
    if not path.exists():
        raise RunError(f"{path}: no such checkpoint: train first, or name the folder of a run")
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as failure:  # whatever unpickling runs into: damage, or a pickle that wants to run code
        reason = (str(failure).splitlines() or [""])[0]
        raise RunError(f"{path}: is no readable checkpoint ({type(failure).__name__}: {reason})") from failure
    if not isinstance(content, dict) or content.get("version") != VERSION:
        found = content.get("version") if isinstance(content, dict) else type(content).__name__
        raise RunError(f"{path}: checkpoint version {found!r}, this software reads {VERSION}")
    return content


def restore(state: TrainState, content: dict[str, Any], config: TrainConfig, *, path: Path) -> None:
    """Put a checkpoint's content into ``state``, in place: the only function that does.

    Raises:
        RunError: The checkpoint is of another architecture; says which settings differ.
    """
    saved = config_from_json(content["config"], source=str(path))
    check_same_model(saved, config, path=path)
    state.network.load_state_dict(content["network"])
    state.average.load_state_dict(content["average"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.epoch, state.step = content["epoch"], content["step"]
    state.best_score, state.history = content["best_score"], list(content["history"])


def check_same_model(saved: TrainConfig, config: TrainConfig, *, path: Path) -> None:
    """Raises RunError where two configurations do not share weights."""
    old, new = to_json(saved.model), to_json(config.model)
    differences = [f"model.{k} {old[k]!r} there, {new[k]!r} here" for k in old if old[k] != new[k]]
    if differences:
        raise RunError(f"{path}: a checkpoint of another network ({'; '.join(differences)})")


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, *, decay: float, step: int) -> None:
    """average ← decay · average + (1 - decay) · network, for weights and buffers.

    Early on the decay is (1 + step) / (10 + step), so that the first, random weights are soon forgotten.
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    new = network.state_dict(keep_vars=True)
    for name, value in average.state_dict(keep_vars=True).items():
        if value.is_floating_point():
            value.lerp_(new[name], weight)
        else:
            value.copy_(new[name])
