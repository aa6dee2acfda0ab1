"""Sampling: the distribution over logits, dropout kept on, ensembles."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import SILENT, TinyWorld, tiny_config
from torch import Tensor

from data_cache.errors import ConfigError
from liverseg.model.logit_normal import (
    FIRST_LOG_DEVIATION,
    LOG_DEVIATION,
    LogitNormal,
    body,
    deviation,
    negative_log_likelihood,
)
from liverseg.model.losses import LossConfig
from liverseg.model.network import NetworkConfig, Stochastic, UNet
from liverseg.model.stochastic import sample as each_sample
from liverseg.model.stochastic import shares
from liverseg.training.train import levels_loss, outputs_loss, train

SSN = NetworkConfig(base_channels=2, depth=2, stochastic="ssn", rank=3)
DROPOUT = NetworkConfig(base_channels=4, depth=2, stochastic="dropout", dropout=0.4)
PLAIN = NetworkConfig(base_channels=2, depth=2)
IMAGE = torch.randn(2, 1, 8, 8, 12, generator=torch.Generator().manual_seed(1))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(network: UNet, image: Tensor, n: int, *, generator: torch.Generator) -> Tensor:
    return torch.stack(list(each_sample(network, image, n, generator=generator)))


def network_of(config: NetworkConfig) -> UNet:
    torch.manual_seed(0)
    return UNet(config, samples=5).eval()


def distribution(*, scale: float = 1.0, shape: tuple[int, ...] = (2, 3, 2, 2, 2)) -> LogitNormal:
    drawn = generator(5)
    b, classes, *rest = shape
    return LogitNormal(
        mean_bczyx=torch.randn(shape, generator=drawn),
        features_bfzyx=torch.randn((b, 4, *rest), generator=drawn),
        weight_rcf=scale * torch.randn((2, classes, 4), generator=drawn),
        deviation_bczyx=scale * torch.rand(shape, generator=drawn),
    )


def factor_brv(it: LogitNormal) -> Tensor:
    """F, written out: (B, rank, C · voxels)."""
    return torch.einsum("rcf,bfzyx->brczyx", it.weight_rcf, it.features_bfzyx).flatten(2)


# ---- the distribution


def test_samples_have_the_mean_and_the_covariance_that_the_factors_say() -> None:
    it = distribution(shape=(1, 3, 1, 2, 2))
    drawn = it.sample(200_000, generator=generator()).flatten(1)
    factor, own = factor_brv(it)[0], it.deviation_bczyx.flatten()
    expected = factor.T @ factor + torch.diag(own.square())
    # 200,000 draws: the standard error of a covariance of 10 is about 0.03.
    torch.testing.assert_close(drawn.mean(0), it.mean_bczyx.flatten(), rtol=0, atol=0.05)
    torch.testing.assert_close(torch.cov(drawn.T), expected, rtol=0.02, atol=0.1)


def test_the_likelihood_on_a_brute_force() -> None:
    it = distribution()
    g = torch.softmax(torch.randn(it.mean_bczyx.shape, generator=generator(7)), dim=1)
    found = negative_log_likelihood(it.sample(3, generator=generator(9)), g)
    log_p = it.sample(3, generator=generator(9)).double().log_softmax(2)
    expected = 0.0
    for b in range(2):
        likelihoods = [math.exp(float((g[b].double() * log_p[s, b]).sum())) for s in range(3)]
        expected += -math.log(sum(likelihoods) / 3) / 8 / 2
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_the_likelihood_of_a_distribution_without_spread_is_the_cross_entropy() -> None:
    it = distribution(scale=0.0)
    g = torch.softmax(torch.randn(it.mean_bczyx.shape, generator=generator(7)), dim=1)
    cross_entropy = -(g * it.mean_bczyx.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(negative_log_likelihood(it.sample(4), g), cross_entropy)


def test_covariances_that_torch_cannot_factorise_are_sampled_and_learnt_from() -> None:
    it = distribution(scale=1e12)
    with pytest.raises((ValueError, RuntimeError)):
        torch.distributions.LowRankMultivariateNormal(
            it.mean_bczyx.flatten(1), factor_brv(it).mT, 1e-30 * it.deviation_bczyx.flatten(1)
        )
    weight = it.weight_rcf.requires_grad_()
    g = torch.softmax(it.mean_bczyx, dim=1)
    value = negative_log_likelihood(replace(it, weight_rcf=weight).sample(3, generator=generator()), g)
    value.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert bool(value.isfinite())
    assert bool(weight.grad.isfinite().all())


def test_deviations_are_bounded() -> None:
    made = deviation(torch.tensor([-1e4, 0.0, 1e4]))
    expected = [math.exp(-LOG_DEVIATION), math.exp(FIRST_LOG_DEVIATION), math.exp(LOG_DEVIATION)]
    torch.testing.assert_close(made, torch.tensor(expected))


def test_the_air_around_the_body_has_no_spread() -> None:
    image = torch.full((1, 1, 16, 48, 48), -2.0)
    image[..., 16:32, 16:32] = 0.0
    mask = body(image)
    assert bool((mask[..., 16:32, 16:32] == 1).all())
    assert bool((mask[..., :8, :] == 0).all())
    drawn = sample(network_of(SSN), image, 3, generator=generator())
    assert bool((drawn.var(0)[..., :8, :] == 0).all())
    assert bool((drawn.var(0)[..., 16:32, 16:32] > 0).all())


@pytest.mark.parametrize("share", [0.5, 1.7])
def test_the_body_does_not_depend_on_contrast_or_brightness(share: float) -> None:
    image = torch.randn(2, 1, 16, 32, 32, generator=generator())
    image[..., :12] -= 4
    assert torch.equal(body(image), body(image * share - 0.3))


def test_the_body_of_a_scan_is_not_its_air() -> None:
    # Each scan by its own range: a bright neighbour in the batch must not darken it.
    image = torch.randn(1, 1, 16, 32, 32, generator=generator())
    both = torch.cat((image, 100 * image.flip(0)))
    assert torch.equal(body(both)[:1], body(image))


# ---- networks


@pytest.mark.parametrize("config", [SSN, DROPOUT, PLAIN], ids=lambda config: config.stochastic)
def test_samples_are_drawn_by_the_generator_alone(config: NetworkConfig) -> None:
    network = network_of(config)
    before = torch.random.get_rng_state()
    first = sample(network, IMAGE, 3, generator=generator(4))
    again = sample(network, IMAGE, 3, generator=generator(4))
    assert first.shape == (3, 2, 3, 8, 8, 12)
    assert torch.equal(first, again)
    assert torch.equal(torch.random.get_rng_state(), before)
    other = sample(network, IMAGE, 3, generator=generator(5))
    assert torch.equal(first, other) == (config.stochastic == "none")
    assert torch.equal(first[0], first[1]) == (config.stochastic == "none")


@pytest.mark.parametrize("config", [SSN, DROPOUT], ids=lambda config: config.stochastic)
def test_sampling_leaves_the_network_as_it_was(config: NetworkConfig) -> None:
    network = network_of(config)
    answer, state = network(IMAGE), {k: v.clone() for k, v in network.state_dict().items()}
    sample(network, IMAGE, 2, generator=generator())
    assert torch.equal(network(IMAGE), answer)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert not any(module.training for module in network.modules())


def test_dropout_samples_scatter_around_the_answer_without_dropout() -> None:
    # Group norm of fewer channels moves the mean: only with fixed statistics does it stay where the answer is.
    network = network_of(replace(DROPOUT, norm="batch"))
    drawn = sample(network, IMAGE, 200, generator=generator()).softmax(2)
    answer = network(IMAGE).detach().softmax(1)
    assert float((drawn.mean(0) - answer).abs().mean()) < 0.5 * float((drawn - answer).abs().mean())


def test_ssn_answers_with_its_mean() -> None:
    network = network_of(SSN)
    torch.testing.assert_close(network.distribution(IMAGE).mean_bczyx, network(IMAGE))


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_what_a_network_with_ssn_gives_in_training(deep_supervision: bool) -> None:
    network = network_of(replace(SSN, deep_supervision=deep_supervision)).train()
    *levels, samples = network(IMAGE)
    assert len(levels) == (2 if deep_supervision else 1)
    assert samples.shape == (5, 2, 3, 8, 8, 12)
    g = torch.softmax(torch.randn(2, 3, 8, 8, 12, generator=generator()), dim=1)
    value = outputs_loss((*levels, samples), g, LossConfig(), stochastic="ssn")
    expected = levels_loss(tuple(levels), g, LossConfig()) + negative_log_likelihood(samples, g)
    torch.testing.assert_close(value, expected)


def test_the_spread_learns_and_the_network_learns_as_without_it() -> None:
    g = torch.softmax(torch.randn(2, 3, 8, 8, 12, generator=generator()), dim=1)
    gradients = []
    for config in (SSN, replace(SSN, stochastic="none")):
        network = network_of(config).train()
        loss = outputs_loss(network(IMAGE), g, LossConfig(), stochastic=config.stochastic)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    with_spread, without = gradients
    still = [name for name, grad in with_spread.items() if grad is None or not bool(grad.abs().sum() > 0)]
    assert not still
    own = with_spread.keys() - without.keys()
    assert own == {"factor_rcf", "deviation.weight", "deviation.bias"}
    for name, grad in without.items():
        torch.testing.assert_close(with_spread[name], grad)


def test_training_an_ssn_gives_the_network_without_it_and_a_spread(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    base = tiny_config(epochs=2, steps=2)
    base = replace(base, model=replace(base.model, dropout=0.0), loss=LossConfig(likelihood_samples=3))
    with_spread = replace(base, model=replace(base.model, stochastic="ssn", rank=2))
    plain, ssn = (
        train(tiny_world.store, tmp_path / name, config, resume=False, watcher=SILENT).network
        for name, config in (("plain", base), ("ssn", with_spread))
    )
    weights = ssn.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in plain.state_dict().items())
    torch.manual_seed(base.seed)
    assert not torch.equal(UNet(with_spread.model).factor_rcf, weights["factor_rcf"])


def test_an_ssn_learns_how_far_two_readers_differ() -> None:
    # Scans that look alike, and whose truth is all liver or no liver: no mean can be right, one sample in two can.
    network = network_of(SSN).train()
    truth = torch.zeros(2, 3, 8, 8, 12)
    truth[0, 1], truth[1, 0] = 1.0, 1.0
    image = IMAGE[:1].expand(2, -1, -1, -1, -1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-2)
    torch.manual_seed(0)
    for _ in range(150):
        optimizer.zero_grad()
        outputs_loss(
            network(image), truth, LossConfig(name="dice_cross_entropy"), stochastic="ssn"
        ).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    network.eval()
    liver_share = (
        sample(network, IMAGE[:1], 40, generator=generator()).argmax(2).eq(1).float().mean((1, 2, 3, 4))
    )
    # Whole segmentations, not voxels that each toss their own coin, which would all come to about one half.
    assert float((liver_share > 0.8).float().mean()) > 0.15
    assert float((liver_share < 0.2).float().mean()) > 0.15


@pytest.mark.parametrize(
    ("kinds", "n", "expected"),
    [
        (("dropout",), 16, (16,)),
        (("dropout", "dropout", "ssn"), 16, (6, 6, 6)),
        (("none", "none", "none"), 16, (1, 1, 1)),
        (("none", "dropout"), 8, (4, 4)),
        (("ssn", "ssn", "ssn"), 2, (1, 1, 1)),
    ],
)
def test_shares_of_an_ensemble(kinds: tuple[Stochastic, ...], n: int, expected: tuple[int, ...]) -> None:
    networks = [network_of(replace(SSN, stochastic=kind, dropout=0.1)) for kind in kinds]
    assert shares(networks, n) == expected


# ---- configuration and training


def test_faults_of_the_configuration() -> None:
    with pytest.raises(ConfigError, match="stochastic = 'dropout' needs dropout above 0"):
        NetworkConfig(stochastic="dropout")
    with pytest.raises(ConfigError, match="rank must be at least 1, got 0"):
        NetworkConfig(stochastic="ssn", rank=0)
    with pytest.raises(ConfigError, match="likelihood_samples must be at least 1"):
        LossConfig(likelihood_samples=0)


def test_training_an_ssn_is_repeatable(tiny_world: TinyWorld, tmp_path: Path) -> None:
    base = tiny_config(epochs=2, steps=2)
    model = replace(base.model, stochastic="ssn", rank=2, deep_supervision=True)
    config = replace(base, model=model, loss=LossConfig(likelihood_samples=3))
    first, again = (
        train(tiny_world.store, tmp_path / name, config, resume=False, watcher=SILENT) for name in "ab"
    )
    assert [row["train_loss"] for row in first.history] == [row["train_loss"] for row in again.history]
    weights = zip(first.network.parameters(), again.network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    assert first.network.samples == 3


def test_members_draw_different_samples() -> None:
    networks = [network_of(DROPOUT), network_of(DROPOUT)]
    one = generator()
    drawn = [sample(network, IMAGE, 2, generator=one) for network in networks]
    flat = [logits for part in drawn for logits in part]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(flat, 2))
