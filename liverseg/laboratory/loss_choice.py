"""Which losses an experiment compares, and with which numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from data_cache.errors import ConfigError
from liverseg.model.losses import LossConfig, LossName
from liverseg.training.config import load_config

ALL: tuple[LossName, ...] = get_args(LossName)
# The numbers of LossConfig that a loss looks at.
NUMBERS: Mapping[LossName, tuple[str, ...]] = {
    "dice_focal": ("alpha", "gamma", "overlap", "cross_entropy", "class_weights", "sums"),
    "dice": ("overlap", "cross_entropy", "class_weights", "sums"),
    "generalised_dice": ("overlap", "cross_entropy", "class_weights", "sums"),
    "tp_tn_dice": ("alpha", "overlap", "cross_entropy", "class_weights", "sums"),
    "focal": ("gamma", "cross_entropy", "class_weights"),
    "thresholded_dice": ("overlap", "cross_entropy", "class_weights", "sums"),
    "dice_cross_entropy": ("overlap", "cross_entropy", "class_weights", "sums"),
}
# Where the defaults of LossConfig, which are those of dice_focal, would make another loss than its name says:
# Lin et al. give focal a γ of 2, and with α = 0.99 TP/TN dice is dice.
OWN_NUMBERS: Mapping[LossName, tuple[str, ...]] = {
    "focal": ("loss.gamma=2.0",),
    "tp_tn_dice": ("loss.alpha=0.5",),
}


def choose_losses(names: str) -> tuple[LossName, ...]:
    """``all``, or some of them between commas; raises ConfigError for a name that is none."""
    if names.strip() == "all":
        return ALL
    asked = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in asked if name not in ALL]
    if unknown or not asked:
        raise ConfigError(f"--losses {names!r}: write all, or some of {', '.join(ALL)}, with commas between")
    return tuple(name for name in ALL if name in asked)


def choose_loss(name: str) -> LossName:
    """One of them; raises ConfigError for a name that is none."""
    chosen = next((known for known in ALL if known == name), None)
    if chosen is None:
        raise ConfigError(f"--loss {name!r}: write one of {', '.join(ALL)}")
    return chosen


def loss_configs(
    names: Sequence[LossName], file: Path | None, overrides: Sequence[str]
) -> tuple[LossConfig, ...]:
    """Each loss with its own numbers.

    ``--set loss.…`` holds for all of them. The [loss] section of ``file`` holds for the loss that it names; the others
    have their defaults.

    Raises:
        ConfigError: A number is out of range, or none of the losses looks at it.
    """
    given = [
        o.partition("=")[0].strip().removeprefix("loss.") for o in overrides if o.strip().startswith("loss.")
    ]
    looked_at = {key for name in names for key in NUMBERS[name]}
    for key in given:
        if key in NUMBERS["dice_focal"] and key not in looked_at:
            raise ConfigError(f"--set loss.{key}: none of {', '.join(names)} has it")
    return tuple(_loss_config(name, file, overrides) for name in names)


def _loss_config(name: LossName, file: Path | None, overrides: Sequence[str]) -> LossConfig:
    if file is not None:
        of_file = load_config(file, overrides).loss
        if of_file.name == name:
            return of_file
    return load_config(None, (f"loss.name={name}", *OWN_NUMBERS.get(name, ()), *overrides)).loss


def numbers_of(loss: LossConfig) -> dict[str, Any]:
    """What this loss looks at in its configuration."""
    used = {"overlap": loss.used_overlap, "cross_entropy": loss.used_cross_entropy}
    return {key: used.get(key, getattr(loss, key)) for key in NUMBERS[loss.name]}


def numbers_text(loss: LossConfig) -> str:
    """The numbers of a loss for a reader."""
    names = {"alpha": "α", "gamma": "γ", "class_weights": "weights", "sums": "sums over the"}
    names |= {"overlap": "overlap", "cross_entropy": "cross-entropy"}
    values = {key: v if isinstance(v, tuple) else (v,) for key, v in numbers_of(loss).items()}
    return ", ".join(f"{names[key]} {' '.join(map(str, value))}" for key, value in values.items())
