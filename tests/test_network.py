"""The U-Net: its size, its shapes, its start and its cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from data_cache.errors import ConfigError
from data_cache.records import parse, to_json
from liverseg.model.network import NetworkConfig, Norm, UNet, forward_flops

TINY = NetworkConfig(base_channels=4, depth=2)


def tiny_image(shape_zyx: tuple[int, int, int] = (8, 12, 16), *, batch: int = 2) -> Tensor:
    return torch.randn(batch, 1, *shape_zyx, generator=torch.Generator().manual_seed(0))


def parameters(config: NetworkConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(config).parameters())


@pytest.mark.parametrize(("base", "expected"), [(64, 90_298_691), (32, 22_578_339)])
def test_number_of_parameters(base: int, expected: int) -> None:
    assert parameters(NetworkConfig(base_channels=base)) == expected


def test_number_of_parameters_by_hand() -> None:
    # base 1, depth 1, one class pair: level 0: 27·1·1 + 2 + 27·1·1 + 2 = 58; bottom: 27·1·2 + 4 + 27·2·2 + 4 = 170;
    # up: 2·1·8 + 1 = 17; decoder: 27·2·1 + 2 + 27·1·1 + 2 = 85; head: 1·2 + 2 = 4.
    assert parameters(NetworkConfig(base_channels=1, depth=1, classes=2)) == 58 + 170 + 17 + 85 + 4


def test_deep_supervision_adds_only_heads() -> None:
    config = NetworkConfig(base_channels=64)
    # Heads on 128, 256 and 512 channels: 3·(128 + 256 + 512) + 3·3.
    assert parameters(replace(config, deep_supervision=True)) - parameters(config) == 3 * 896 + 9


def test_weights_load_into_a_network_with_other_dropout() -> None:
    UNet(replace(TINY, dropout=0.3)).load_state_dict(UNet(TINY).state_dict())


@pytest.mark.parametrize("norm", get_args(Norm))
def test_logits_have_the_image_s_shape(norm: Norm) -> None:
    network = UNet(replace(TINY, norm=norm, classes=5, dropout=0.1))
    logits_bczyx = network(tiny_image())
    assert logits_bczyx.shape == (2, 5, 8, 12, 16)
    assert torch.isfinite(logits_bczyx).all()


def test_deep_supervision_returns_levels_in_training_only() -> None:
    network = UNet(replace(TINY, depth=3, deep_supervision=True))
    levels = network(tiny_image((8, 16, 24)))
    assert [tuple(x.shape[2:]) for x in levels] == [(8, 16, 24), (4, 8, 12), (2, 4, 6)]
    network.eval()
    logits_bczyx = network(tiny_image((8, 16, 24)))
    assert torch.equal(logits_bczyx, network.forward_levels(tiny_image((8, 16, 24)))[0])


def test_without_deep_supervision_there_is_one_level() -> None:
    network = UNet(TINY)
    assert isinstance(network(tiny_image()), Tensor)
    assert len(network.forward_levels(tiny_image())) == 1


def test_every_parameter_gets_a_gradient() -> None:
    network = UNet(replace(TINY, deep_supervision=True))
    total = torch.stack([level.square().sum() for level in network(tiny_image())]).sum()
    total.backward()  # type: ignore[no-untyped-call]
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_batch_is_its_samples_one_by_one() -> None:
    network = UNet(TINY).eval()
    image = tiny_image(batch=3)
    together = network(image)
    apart = torch.cat([network(image[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


def test_shifting_the_image_by_one_pooling_cell_shifts_the_logits() -> None:
    # Skip connections and transposed convolutions must line up: a network of whole strides commutes with a shift
    # by 2**depth voxels, away from the borders (receptive field of depth 1: 3·1·2 + 2·2 + slack = 12 voxels).
    network = UNet(NetworkConfig(base_channels=2, depth=1, norm="batch")).eval()
    image = tiny_image((40, 4, 4), batch=1)
    shifted = network(torch.roll(image, 2, dims=2))[:, :, 14:-14]
    torch.testing.assert_close(shifted, torch.roll(network(image), 2, dims=2)[:, :, 14:-14])


def test_skips_reach_the_logits_without_the_bottom() -> None:
    network = UNet(NetworkConfig(base_channels=4, depth=1)).eval()
    for parameter in network.up.parameters():
        nn.init.zeros_(parameter)
    assert network(tiny_image((4, 4, 4))).std() > 0.1


@pytest.mark.parametrize("norm", get_args(Norm))
def test_channels_last_gives_the_same(norm: Norm) -> None:
    network = UNet(replace(TINY, norm=norm)).eval()
    expected = network(tiny_image())
    network = network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    image = tiny_image().to(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(network(image), expected, rtol=1e-4, atol=1e-4)


def test_bf16_autocast_stays_close() -> None:
    network = UNet(TINY).eval()
    expected = network(tiny_image())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(tiny_image())
    assert logits.dtype == torch.bfloat16
    # bf16 keeps 8 bits: 0.4 % a rounding, through 11 layers.
    assert (logits.float() - expected).abs().mean() < 0.03 * expected.abs().mean()


def layer_output_stds(network: UNet, kind: type[nn.Module]) -> list[float]:
    stds: list[float] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        stds.append(float(output.detach().std()))

    for module in network.modules():
        if isinstance(module, kind):
            module.register_forward_hook(keep)
    network(tiny_image((16, 16, 16)))
    return stds


@pytest.mark.parametrize("kind", [nn.Conv3d, nn.ConvTranspose3d])
def test_kaiming_start_keeps_the_variance(kind: type[nn.Module]) -> None:
    torch.manual_seed(1)
    network = UNet(NetworkConfig(base_channels=16, depth=2))
    stds = layer_output_stds(network, kind)
    # Norms make each input of unit variance before its ReLU; He's 2 / fan-in keeps that. Zero padding takes some
    # off on small grids, and the transposed convolution's half of a concatenation has no ReLU and adds some.
    assert all(0.5 < std < 2.2 for std in stds), stds


def test_kaiming_start_of_the_transposed_convolution() -> None:
    weight = UNet(NetworkConfig(base_channels=16, depth=2)).up[0].weight
    assert isinstance(weight, Tensor)
    assert float(weight.detach().std()) == pytest.approx(math.sqrt(2 / 64), rel=0.05)  # 64 input channels


@pytest.mark.parametrize("shape_zyx", [(8, 12, 10), (2, 4, 4), (0, 4, 4)])
def test_a_shape_that_does_not_fit_is_named(shape_zyx: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"divisible by 4, got \(\d+, \d+, \d+\); pad or resample to"):
        UNet(TINY)(torch.zeros(1, 1, *shape_zyx))


def test_the_shape_error_says_what_would_fit() -> None:
    with pytest.raises(ValueError, match=r"\(8, 12, 12\)"):
        UNet(TINY)(torch.zeros(1, 1, 8, 12, 10))


@pytest.mark.parametrize("shape", [(1, 2, 4, 4, 4), (1, 4, 4, 4)])
def test_wrong_channels_or_axes_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes \(batch, 1, z, y, x\), got shape"):
        UNet(TINY)(torch.zeros(shape))


def test_a_bad_configuration_lists_every_fault() -> None:
    with pytest.raises(ConfigError) as caught:
        NetworkConfig(base_channels=0, depth=-1, norm="layer", dropout=float("nan"), classes=1)  # type: ignore[arg-type]
    for name in ("base_channels", "depth", "norm", "dropout", "classes"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: NetworkConfig(dropout=1.0),
        lambda: NetworkConfig(dropout=-0.1),
        lambda: NetworkConfig(in_channels=0),
    ],
)
def test_each_fault_alone_is_found(make: Callable[[], NetworkConfig]) -> None:
    with pytest.raises(ConfigError, match=r"^network: \w+ must be"):
        make()


@pytest.mark.parametrize("config", [TINY, replace(TINY, base_channels=3, depth=3, in_channels=2, classes=4)])
def test_flops_agree_with_torch_s_counter(config: NetworkConfig) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        UNet(config).eval()(torch.empty(1, config.in_channels, 8, 16, 24))
    assert forward_flops(config, (8, 16, 24)) == counter.get_total_flops()


def test_flops_of_the_full_network() -> None:
    assert forward_flops(NetworkConfig(), (64, 128, 128)) == pytest.approx(1.9e12, rel=0.03)


def test_dropout_drops_in_training_only() -> None:
    network = UNet(replace(TINY, dropout=0.5, norm="instance"))
    assert not torch.equal(network(tiny_image()), network(tiny_image()))
    network.eval()
    assert torch.equal(network(tiny_image()), network(tiny_image()))


def test_a_configuration_survives_its_file_and_an_unknown_key_does_not() -> None:
    config = NetworkConfig(norm="group", dropout=0.2, deep_supervision=True)
    assert parse(NetworkConfig, to_json(config), source="run.toml", error=ConfigError) == config
    with pytest.raises(ConfigError, match="typo: unknown key"):
        parse(NetworkConfig, {"typo": 1}, source="run.toml", error=ConfigError)
