"""torch.compile sees the network and the loss as one graph each: a break would cost the fusion that it is for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.eval_frame import is_dynamo_supported

from liverseg.model.losses import LossConfig, LossName, loss
from liverseg.model.network import NetworkConfig, Norm, Stochastic, UNet
from liverseg.training.train import outputs_loss

SHAPE_ZYX = (8, 8, 16)

pytestmark = pytest.mark.skipif(
    not is_dynamo_supported(), reason="torch.compile does not support this system or Python"
)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def graph_breaks(function: Callable[..., Any], *arguments: Any) -> list[str]:
    """Why dynamo breaks a call into several graphs; nothing is generated, so that it takes tenths of a second."""
    found = torch._dynamo.explain(function)(*arguments)
    assert found.graph_count >= 1
    return [str(reason.reason) for reason in found.break_reasons] + ["?"] * (found.graph_count - 1)


def config(stochastic: Stochastic, norm: Norm) -> NetworkConfig:
    return NetworkConfig(
        base_channels=2, depth=2, norm=norm, dropout=0.1, deep_supervision=True, stochastic=stochastic, rank=2
    )


@pytest.mark.parametrize("norm", get_args(Norm))
@pytest.mark.parametrize("stochastic", get_args(Stochastic))
def test_the_network_is_one_graph(stochastic: Stochastic, norm: Norm) -> None:
    network, image = UNet(config(stochastic, norm), samples=2), torch.randn(1, 1, *SHAPE_ZYX)
    assert graph_breaks(network.train(), image) == []
    torch.compiler.reset()
    assert graph_breaks(network.eval(), image) == []


@pytest.mark.parametrize("stochastic", get_args(Stochastic))
def test_the_loss_is_one_graph(stochastic: Stochastic) -> None:
    network = UNet(config(stochastic, "batch"), samples=2).train()
    # Leaves: dynamo asks its inputs for their gradients.
    outputs = tuple(x.detach().requires_grad_() for x in network(torch.randn(1, 1, *SHAPE_ZYX)))
    fractions = torch.rand(1, 3, *SHAPE_ZYX).softmax(dim=1)

    def call(outputs: Any, fractions: Tensor) -> Tensor:
        return outputs_loss(outputs, fractions, LossConfig(), stochastic=stochastic)

    assert graph_breaks(call, outputs, fractions) == []


@pytest.mark.parametrize("name", get_args(LossName))
def test_each_loss_is_one_graph(name: LossName) -> None:
    logits = torch.randn(2, 3, *SHAPE_ZYX, requires_grad=True)
    fractions = torch.rand(2, 3, *SHAPE_ZYX).softmax(dim=1)
    for sums in ("batch", "sample"):
        torch.compiler.reset()
        config = LossConfig(name=name, sums=sums)
        assert graph_breaks(lambda p, g, config=config: loss(p, g, config), logits, fractions) == []


def test_a_break_is_found() -> None:
    def looks(values: Tensor) -> Tensor:
        return values + values.sum().item() if values.sum() > 0 else values

    assert graph_breaks(looks, torch.ones(2))
