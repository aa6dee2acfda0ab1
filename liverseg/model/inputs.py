"""What the network sees: cached int16 HU and uint8 fractions as floating-point tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import ConfigDict
from torch import Tensor

from data_cache.errors import ConfigError
from data_cache.records import STRICT
from data_cache.schema import FRACTION_ONE


@dataclass(frozen=True, slots=True, kw_only=True)
class InputConfig:
    """(HU - centre) / scale, after clipping to a window; the window is a training-time choice.

    Attributes:
        window_hu: Lowest and highest HU that are told apart. The default is the window in which the abdomen is read, 400 HU
            around 50: all soft tissue, with and without contrast medium; lung is as dark as air, and bone as bright as metal.
        centre_hu, scale_hu: 50 and 200 put unenhanced liver at about 0 and fat at about -0.7.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    window_hu: tuple[float, float] = (-150.0, 250.0)
    centre_hu: float = 50.0
    scale_hu: float = 200.0

    def __post_init__(self) -> None:
        if not self.window_hu[0] < self.window_hu[1] or not self.scale_hu > 0:
            raise ConfigError(f"input: needs window_hu[0] < window_hu[1] and scale_hu > 0, got {self}")


def network_input(image_hu: Tensor, config: InputConfig) -> Tensor:
    """Integer HU of any shape to the network's float32 input."""
    clipped = image_hu.float().clamp(*config.window_hu)
    return (clipped - config.centre_hu) / config.scale_hu


def class_fractions(fractions_bczyx: Tensor) -> Tensor:
    """Cached uint8 shares of liver and tumour as float32 shares of background, liver and tumour (sum 1)."""
    return add_background(foreground_fractions(fractions_bczyx))


def foreground_fractions(fractions_bczyx: Tensor) -> Tensor:
    """Cached uint8 shares of liver and tumour as float32 shares in [0, 1]."""
    return fractions_bczyx.float() / FRACTION_ONE


def add_background(foreground_bczyx: Tensor) -> Tensor:
    """Shares of liver and tumour (B, 2, …) to shares of background, liver and tumour, which sum to 1."""
    background = 1 - foreground_bczyx.sum(dim=1, keepdim=True)
    return torch.cat((background, foreground_bczyx), dim=1)


def decide(foreground_bczyx: Tensor) -> Tensor:
    """Label ids from probabilities or fractions of liver and tumour (B, 2, …): ``pipeline.labels.decide`` on tensors."""
    liver, tumour = foreground_bczyx.unbind(dim=1)
    both = liver + tumour
    return (both >= 0.5).to(torch.uint8) * (1 + (2 * tumour > both).to(torch.uint8))
