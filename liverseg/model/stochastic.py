"""Several segmentations of one scan: what a network would say if it were asked again.

Three ways, chosen by ``model.stochastic``, behind one function: the dropout of training kept on (Gal & Ghahramani 2016,
arXiv:1506.02142), the normal distribution over logits of a stochastic segmentation network (``logit_normal``), and
several networks trained apart (Lakshminarayanan et al. 2017, arXiv:1612.01474), each of which may be any of the former.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from liverseg.model.network import UNet


@torch.no_grad()
def sample(network: UNet, image_bczyx: Tensor, n: int, *, generator: torch.Generator) -> Iterator[Tensor]:
    """Draw n segmentations, one at a time: logits (B, C, Z, Y, X), float32.

    All are the same where the network is not stochastic.

    Args:
        network: In eval mode; its weights, statistics and mode are left as they are.
        image_bczyx: As for ``UNet.forward``.
        n: At least 1.
        generator: On the device of the image. Equal states give equal samples.
    """
    match network.config.stochastic:
        case "dropout":
            for _ in range(n):
                yield _with_dropout(network, image_bczyx, generator)
        case "ssn":
            distribution = network.distribution(image_bczyx)
            for _ in range(n):
                yield distribution.sample(1, generator=generator)[0]
        case "none":
            logits = network(image_bczyx).float()
            for _ in range(n):
                yield logits


def shares(networks: Sequence[UNet], n: int) -> tuple[int, ...]:
    """How many samples each network of an ensemble draws: the same from all, so that their mean weighs all alike.

    Together n or a few more. Where none is stochastic, one each: more would be copies, and count as agreement. Beside
    a stochastic one, what is not is repeated, since it has its say as often.
    """
    if all(network.config.stochastic == "none" for network in networks):
        return (1,) * len(networks)
    return (math.ceil(n / len(networks)),) * len(networks)


def _with_dropout(network: UNet, image_bczyx: Tensor, generator: torch.Generator) -> Tensor:
    device = image_bczyx.device
    seed = int(torch.randint(2**62, (), generator=generator, device=device))
    # Dropout has no generator of its own: it draws from torch's, which is put back as it was.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _dropping(network):
        torch.manual_seed(seed)
        logits: Tensor = network(image_bczyx).float()
    return logits


@contextmanager
def _dropping(network: UNet) -> Iterator[None]:
    """Dropout as in training, everything else as it is."""
    layers = [module for module in network.modules() if isinstance(module, nn.Dropout3d)]
    modes = [layer.training for layer in layers]
    for layer in layers:
        layer.train()
    try:
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.train(mode)
