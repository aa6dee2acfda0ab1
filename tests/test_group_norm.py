"""Group norm, beside torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liverseg.model.group_norm import GroupNorm
from liverseg.model.network import NetworkConfig, UNet, to_channels_last


def norm_and_input(
    groups: int, channels: int, shape_zyx: tuple[int, int, int], dtype: torch.dtype
) -> tuple[GroupNorm, Tensor]:
    """Weights and values that are neither centred nor of one scale."""
    torch.manual_seed(channels)
    norm = GroupNorm(groups, channels).to(dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm, 3 * torch.randn(2, channels, *shape_zyx, dtype=dtype) + torch.arange(channels)[
        :, None, None, None
    ]


def value_and_gradients(norm: nn.GroupNorm, x: Tensor, *, own: bool) -> list[Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = norm(x) if own else F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return [y, *torch.autograd.grad((y.sigmoid() * y).sum(), (x, norm.weight, norm.bias))]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(
    ("groups", "channels", "shape_zyx"),
    [(8, 8, (4, 6, 8)), (2, 6, (3, 5, 7)), (1, 5, (2, 2, 2)), (12, 12, (1, 1, 33)), (4, 64, (8, 16, 16))],
)
def test_values_and_gradients_are_those_of_torch(
    groups: int, channels: int, shape_zyx: tuple[int, int, int], layout: torch.memory_format
) -> None:
    norm, x = norm_and_input(groups, channels, shape_zyx, torch.float64)
    x = x.contiguous(memory_format=layout)
    for own, others in zip(
        value_and_gradients(norm, x, own=True), value_and_gradients(norm, x, own=False), strict=True
    ):
        torch.testing.assert_close(own, others, rtol=1e-9, atol=1e-9)


def test_values_far_from_zero_are_normalised_in_float32() -> None:
    norm, x = GroupNorm(2, 4), torch.randn(2, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0)) + 30
    torch.testing.assert_close(norm(x), F.group_norm(x, 2), rtol=2e-3, atol=2e-3)


def test_an_empty_batch_stays_empty() -> None:
    assert GroupNorm(2, 4)(torch.zeros(0, 4, 2, 2, 2)).shape == (0, 4, 2, 2, 2)


def test_a_constant_sample_becomes_the_bias() -> None:
    norm, _ = norm_and_input(2, 4, (2, 3, 4), torch.float32)
    y = norm(torch.full((1, 4, 2, 3, 4), 7.0))
    torch.testing.assert_close(y, norm.bias[None, :, None, None, None].expand_as(y), rtol=0, atol=2e-2)


def test_half_precision_stays_in_its_type_and_layout_under_autocast() -> None:
    norm, x = norm_and_input(4, 8, (4, 8, 8), torch.float32)
    half = x.bfloat16().contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(half)
    (gradient,) = torch.autograd.grad(y.float().square().sum(), half)
    for made in (y, gradient):
        assert made.dtype == torch.bfloat16
        assert made.is_contiguous(memory_format=torch.channels_last_3d)
    expected = F.group_norm(half.float(), 4, norm.weight, norm.bias)
    # Eight bits of a value and of what it was made of.
    assert (y.float() - expected).abs().max() < 2**-6 * expected.abs().max()


@pytest.mark.parametrize("norm", ["group", "instance"])
def test_a_sample_does_not_depend_on_the_others(norm: str) -> None:
    config = NetworkConfig(base_channels=4, depth=2, norm=norm)  # type: ignore[arg-type]
    torch.manual_seed(0)
    network, images = to_channels_last(UNet(config)), torch.randn(3, 1, 8, 8, 8)
    together = network.train()(images)
    alone = torch.cat([network.eval()(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
