"""The losses: against a brute force, at their optimum, at the ends of the numbers, and with classes absent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from data_cache.errors import ConfigError
from data_cache.records import parse, to_json
from liverseg.model.losses import REFERENCE_SHARE, LossConfig, LossName, Overlap, Sums, loss

Array = NDArray[np.float64]
NAMES: tuple[LossName, ...] = get_args(LossName)
OVERLAPS: tuple[Overlap, ...] = get_args(Overlap)
# Those that the module promises to be best at p = g, but for linear overlaps.
PROPER: tuple[LossName, ...] = ("dice_focal", "dice", "tp_tn_dice", "generalised_dice", "dice_cross_entropy")
TUMOUR = 2
BARE = LossConfig(overlap="squared", cross_entropy=0)
ONLY_TUMOUR = replace(BARE, alpha=1, gamma=0, class_weights=(0, 0, 1))

every_loss = pytest.mark.parametrize("name", NAMES)
either_sum = pytest.mark.parametrize("sums", get_args(Sums))
every_overlap = pytest.mark.parametrize("overlap", OVERLAPS)


def random_case(shape: Sequence[int] = (2, 3, 3, 4, 2), *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Float64 logits and interior fractions."""
    generator = torch.Generator().manual_seed(seed)
    logits, other = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return 2 * logits, other.softmax(dim=1)


def hard(ids_bzyx: Tensor, classes: int = 3) -> Tensor:
    return torch.nn.functional.one_hot(ids_bzyx, classes).movedim(-1, 1).double()


def value_and_gradient(logits: Tensor, fractions: Tensor, config: LossConfig) -> tuple[float, Tensor]:
    logits = logits.detach().requires_grad_()
    value = loss(logits, fractions, config)
    value.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    return value.item(), logits.grad


# --- the brute force: DESIGN.md section 4, one sample and class after another, in NumPy


def brute_overlap(p: Array, g: Array, overlap: Overlap) -> float:
    below = float((p**2 + g**2).sum() if overlap == "squared" else (p + g).sum())
    if g.sum() < 1e-6 * g.size:
        extra = 2e-3 * g.size
        return extra / (below + extra)
    return (
        1 - float(abs(p - g).sum()) / below if overlap == "semimetric" else 2 * float((p * g).sum()) / below
    )


def brute_class(name: LossName, p: Array, g: Array, config: LossConfig) -> float:
    if name == "thresholded_dice":
        p = np.where(p > 0.9, 1.0, np.where(p < 0.1, 0.0, p))
    t, n = (brute_overlap(*pair, config.used_overlap) for pair in ((p, g), (1 - p, 1 - g)))
    d = config.alpha * t + (1 - config.alpha) * n
    match name:
        case "dice_focal":
            return -math.pow(1 - d, config.gamma) * math.log(d)
        case "tp_tn_dice":
            return 1 - d
        case "focal":
            return float(np.mean(-((1 - p) ** config.gamma) * g * np.log(p)))
        case _:
            return 1 - t


def brute_generalised(p_vc: Array, g_vc: Array, config: LossConfig) -> float:
    over = under = 0.0
    for w, p, g in zip(config.class_weights, p_vc.T, g_vc.T, strict=True):
        volume = 1e-3 * g.size if g.sum() < 1e-6 * g.size else float(g.sum())
        below = float((p**2 + g**2).sum() if config.used_overlap == "squared" else (p + g).sum())
        shared = np.minimum(p, g) if config.used_overlap == "semimetric" else p * g
        over += w / volume**2 * 2 * float(shared.sum())
        under += w / volume**2 * below
    return 1 - over / under


def brute_group(p_vc: Array, g_vc: Array, config: LossConfig) -> float:
    """The loss of voxels that are summed together, (voxels, classes)."""
    entropy = -float((g_vc * np.log(p_vc)).sum(axis=1).mean())
    entropy *= config.used_cross_entropy
    if config.name == "generalised_dice":
        return brute_generalised(p_vc, g_vc, config) + entropy
    classes = zip(config.class_weights, p_vc.T, g_vc.T, strict=True)
    return sum(w * brute_class(config.name, p, g, config) for w, p, g in classes) + entropy


def brute_loss(logits: Tensor, fractions: Tensor, config: LossConfig) -> float:
    x, g = (v.double().numpy().transpose(0, 2, 3, 4, 1) for v in (logits, fractions))
    p = np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)
    classes = x.shape[-1]
    groups = [(p, g)] if config.sums != "sample" else list(zip(p, g, strict=True))
    values = [brute_group(a.reshape(-1, classes), b.reshape(-1, classes), config) for a, b in groups]
    return float(np.mean(values))


@every_loss
@either_sum
@every_overlap
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_equals_the_brute_force(
    name: LossName, sums: Sums, overlap: Overlap, alpha: float, gamma: float
) -> None:
    config = LossConfig(
        name=name,
        sums=sums,
        overlap=overlap,
        cross_entropy=gamma,
        alpha=alpha,
        gamma=gamma,
        class_weights=(0.5, 1.0, 3.0),
    )
    logits, fractions = random_case()
    assert loss(logits, fractions, config).item() == pytest.approx(brute_loss(logits, fractions, config))
    # In float32 as well, where training runs.
    single = loss(logits.float(), fractions.float(), config).item()
    assert single == pytest.approx(brute_loss(logits, fractions, config), rel=1e-5)


@every_loss
@either_sum
@every_overlap
def test_equals_the_brute_force_with_absent_and_full_classes(
    name: LossName, sums: Sums, overlap: Overlap
) -> None:
    logits, _ = random_case()
    config = LossConfig(name=name, sums=sums, overlap=overlap, alpha=0.7)
    ids = torch.zeros(2, 3, 4, 2, dtype=torch.long)
    full = hard(ids)
    ids[1, 0] = 1
    for fractions in (full, hard(ids)):
        expected = brute_loss(logits, fractions, config)
        assert loss(logits, fractions, config).item() == pytest.approx(expected)


def test_dice_focal_by_hand() -> None:
    # One voxel, p = (1/4, 3/4), g = (1, 0): t_0 = 2·(1/4)/(1/16 + 1) = 8/17, the complement of class 1 likewise;
    # class 1 is absent, e = 0.001: t_1 = 0.002/(9/16 + 0.002). n_0 = t_1 and n_1 = t_0, which is where α counts.
    t, absent = 8 / 17, 0.002 / (9 / 16 + 0.002)
    d0, d1 = 0.75 * t + 0.25 * absent, 0.75 * absent + 0.25 * t
    expected = -2 * (1 - d0) ** 2 * math.log(d0) - 5 * (1 - d1) ** 2 * math.log(d1)
    logits = torch.tensor([0.25, 0.75]).log().view(1, 2, 1, 1, 1)
    fractions = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1, 1)
    config = replace(BARE, alpha=0.75, gamma=2, class_weights=(2, 5))
    assert loss(logits, fractions, config).item() == pytest.approx(expected, rel=1e-5)


def test_thresholded_dice_by_hand() -> None:
    # p = (.95, .05) is cut to (1, 0): t_0 = 2·0.8/(1 + 0.64), t_1 = 0.
    logits = torch.tensor([0.95, 0.05]).log().view(1, 2, 1, 1, 1)
    fractions = torch.tensor([0.8, 0.2]).view(1, 2, 1, 1, 1)
    config = LossConfig(name="thresholded_dice", class_weights=(2, 5))
    value, gradient = value_and_gradient(logits, fractions, config)
    assert value == pytest.approx(2 * (1 - 1.6 / 1.64) + 5, rel=1e-5)
    assert gradient.abs().max() > 0.01  # straight through the cut


# --- laws


@pytest.mark.parametrize("name", PROPER)
@either_sum
@pytest.mark.parametrize("overlap", ["squared", "semimetric"])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
def test_the_optimum_is_at_the_fractions(name: LossName, sums: Sums, overlap: Overlap, gamma: float) -> None:
    _, fractions = random_case()
    config = LossConfig(name=name, sums=sums, overlap=overlap, cross_entropy=gamma, alpha=0.8, gamma=gamma)
    best, gradient = value_and_gradient(fractions.log(), fractions, config)
    if overlap == "squared":  # the other has a kink there
        assert gradient.abs().max() < 1e-9
    for seed in range(5):
        step, _ = random_case(seed=seed)
        assert loss(fractions.log() + 0.05 * step, fractions, config).item() > best


def test_the_linear_overlap_is_best_at_a_hard_mask() -> None:
    _, fractions = random_case()
    config = LossConfig(name="dice", overlap="linear")
    at_fractions = loss(fractions.log(), fractions, config)
    assert loss(100 * hard(fractions.argmax(1)), fractions, config) < at_fractions


@every_loss
def test_hard_labels_make_the_semimetric_linear(name: LossName) -> None:
    logits, fractions = random_case()
    fractions = hard(fractions.argmax(1))
    linear, semimetric = (
        value_and_gradient(logits, fractions, LossConfig(name=name, overlap=overlap, alpha=0.7))
        for overlap in ("linear", "semimetric")
    )
    assert linear[0] == pytest.approx(semimetric[0])
    torch.testing.assert_close(linear[1], semimetric[1])


# Of each sort of voxel there are a hundred, labelled tumour with this frequency.
POSTERIORS = torch.tensor([0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.8], dtype=torch.float64)


def uncertain() -> Tensor:
    """Hard labels (1, 2, 7, 1, 100)."""
    tumour = torch.arange(100) < 100 * POSTERIORS.view(1, 7, 1, 1)
    return hard(tumour.long(), classes=2)


def fitted(config: LossConfig) -> Tensor:
    """The best p of each sort of voxel, where the voxels of a sort cannot be told apart."""
    fractions, logit = uncertain(), torch.zeros(7, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logit], lr=0.1)
    for _ in range(1000):
        optimizer.zero_grad()
        loss(two_classes(logit).expand_as(fractions), fractions, config).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return logit.detach().sigmoid()


def two_classes(logit: Tensor) -> Tensor:
    return torch.stack([torch.zeros_like(logit), logit]).view(1, 2, 7, 1, 1)


@pytest.mark.parametrize("name", ["dice", "dice_focal"])
@every_overlap
def test_where_uncertain_labels_have_their_optimum(name: LossName, overlap: Overlap) -> None:
    config = LossConfig(name=name, overlap=overlap, cross_entropy=0, alpha=1, class_weights=(0, 1))
    p = fitted(config)
    both = (p**2 + POSTERIORS).sum() if overlap == "squared" else (p + POSTERIORS).sum()
    t = 2 * (p * POSTERIORS).sum() / both
    expected = (POSTERIORS / t).clamp(max=1) if overlap == "squared" else POSTERIORS.gt(t / 2).double()
    torch.testing.assert_close(p, expected, atol=0.03, rtol=0)


def test_cross_entropy_pulls_uncertain_labels_to_their_posterior() -> None:
    entropy = LossConfig(name="focal", gamma=0, class_weights=(0, 0.0001), cross_entropy=1)
    torch.testing.assert_close(fitted(entropy), POSTERIORS, atol=0.03, rtol=0)
    alone, with_it = (
        fitted(LossConfig(overlap="semimetric", class_weights=(0, 1), cross_entropy=w)) for w in (0.0, 1.0)
    )
    assert (with_it - POSTERIORS).abs().sum() < 0.7 * (alone - POSTERIORS).abs().sum()


@pytest.mark.parametrize(("overlap", "power"), [("squared", 2), ("semimetric", 1), ("linear", 1)])
def test_what_haze_costs(overlap: Overlap, power: int) -> None:
    # 10 voxels of tumour, found; 990 of background at p = h: 1/t = 1 + 990 h^power / 20.
    fractions = torch.zeros(1, 3, 1, 1, 1000, dtype=torch.float64)
    fractions[:, TUMOUR, ..., :10] = fractions[:, 0, ..., 10:] = 1
    for haze in (0.1, 0.01, 0.001):
        p = fractions.clone()
        p[:, TUMOUR, ..., 10:] = haze
        p[:, 0, ..., 10:] = 1 - haze
        value = loss(p.log().clamp(min=-1e4), fractions, replace(ONLY_TUMOUR, overlap=overlap)).item()
        assert math.expm1(value) == pytest.approx(990 * haze**power / 20)


@every_loss
@every_overlap
def test_cross_entropy_is_added_with_its_weight(name: LossName, overlap: Overlap) -> None:
    logits, fractions = random_case()
    without, one, two = (
        loss(logits, fractions, LossConfig(name=name, overlap=overlap, cross_entropy=weight))
        for weight in (0, 1, 2)
    )
    entropy = -(fractions * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(one - without, entropy)
    torch.testing.assert_close(two - one, entropy)


def test_focal_without_gamma_is_weighted_cross_entropy() -> None:
    logits, fractions = random_case()
    weights = (0.5, 1.0, 3.0)
    config = LossConfig(name="focal", gamma=0, class_weights=weights)
    w = torch.tensor(weights, dtype=torch.float64).view(1, 3, 1, 1, 1)
    expected = -(w * fractions * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss(logits, fractions, config), expected)


@every_loss
@every_overlap
def test_sample_sums_are_the_mean_of_the_samples(name: LossName, overlap: Overlap) -> None:
    logits, fractions = random_case((3, 3, 2, 3, 2))
    config = LossConfig(name=name, sums="sample", overlap=overlap, cross_entropy=0.5)
    apart = [loss(logits[i, None], fractions[i, None], config) for i in range(3)]
    torch.testing.assert_close(loss(logits, fractions, config), torch.stack(apart).mean())


@every_loss
@every_overlap
def test_one_sample_is_its_own_batch(name: LossName, overlap: Overlap) -> None:
    logits, fractions = random_case((1, 3, 2, 3, 2))
    configs = (LossConfig(name=name, sums=sums, overlap=overlap) for sums in get_args(Sums))
    batch, *others = (loss(logits, fractions, config) for config in configs)
    for other in others:
        torch.testing.assert_close(batch, other)


@every_loss
@either_sum
def test_a_shift_of_all_logits_and_the_order_of_voxels_do_not_matter(name: LossName, sums: Sums) -> None:
    logits, fractions = random_case()
    config = LossConfig(name=name, sums=sums)
    expected = loss(logits, fractions, config)
    torch.testing.assert_close(loss(logits + 7, fractions, config), expected)
    torch.testing.assert_close(loss(logits.flip(2, 4), fractions.flip(2, 4), config), expected)


@every_loss
@every_overlap
def test_gradients_are_those_of_finite_differences(name: LossName, overlap: Overlap) -> None:
    # The cut of thresholded_dice has no honest difference, but between 0.1 and 0.9 there is no cut.
    logits, fractions = random_case((1, 3, 1, 2, 2))
    config = LossConfig(name=name, overlap=overlap, cross_entropy=0.5, alpha=0.6, gamma=1.5)
    assert torch.autograd.gradcheck(lambda x: loss(x, fractions, config), (0.3 * logits).requires_grad_())


@every_loss
def test_autocast_and_half_precision_compute_in_float32(name: LossName) -> None:
    logits, fractions = (x.float() for x in random_case())
    config = LossConfig(name=name, overlap="semimetric", cross_entropy=1)
    half = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = loss(half, fractions, config)
    assert result.dtype == torch.float32
    assert torch.equal(result, loss(half.float(), fractions, config))


@every_loss
def test_arguments_are_never_edited(name: LossName) -> None:
    logits, fractions = random_case()
    kept = logits.clone(), fractions.clone()
    loss(logits, fractions, LossConfig(name=name))
    assert torch.equal(logits, kept[0])
    assert torch.equal(fractions, kept[1])


# --- the ends of the numbers

SHAPES = st.sampled_from([(1, 3, 1, 1, 1), (2, 3, 1, 1, 1), (1, 3, 2, 3, 2), (2, 3, 2, 2, 2)])
CONFIGS = st.builds(
    LossConfig,
    name=st.sampled_from(NAMES),
    alpha=st.sampled_from([0.0, 0.3, 0.99, 1.0]),
    gamma=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    overlap=st.sampled_from(OVERLAPS),
    cross_entropy=st.sampled_from([0.0, 1.0]),
    sums=st.sampled_from(get_args(Sums)),
)
# A class everywhere, one voxel of it, a sliver of it, or every voxel another mixture.
FRACTIONS = st.sampled_from(["full", "voxel", "sliver", "mixed"])


def extreme_fractions(kind: str, shape: tuple[int, ...], tumour: int, seed: int) -> Tensor:
    if kind == "mixed":
        return random_case(shape, seed=seed)[1].float()
    ids = torch.full((shape[0], *shape[2:]), tumour)
    if kind == "full":
        return hard(ids).float()
    share = 1.0 if kind == "voxel" else 1e-7
    fractions = hard(ids).float()
    fractions[0, :, 0, 0, 0] *= 1 - share
    fractions[0, (tumour + 1) % 3, 0, 0, 0] += share
    return fractions


@settings(deadline=None, max_examples=400)
@given(
    shape=SHAPES,
    config=CONFIGS,
    kind=FRACTIONS,
    tumour=st.integers(0, 2),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.0, 1.0, 50.0, 200.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_value_and_gradient_are_finite(
    shape: tuple[int, ...],
    config: LossConfig,
    kind: str,
    tumour: int,
    seed: int,
    scale: float,
    dtype: torch.dtype,
) -> None:
    logits = (scale * random_case(shape, seed=seed)[0].sign()).to(dtype)
    value, gradient = value_and_gradient(logits, extreme_fractions(kind, shape, tumour, seed), config)
    assert math.isfinite(value)
    assert value > -1e-5
    assert torch.isfinite(gradient).all()


@every_overlap
@pytest.mark.parametrize("logit", [-5.0, -50.0, -1000.0])
def test_a_missed_class_pulls_with_full_force(overlap: Overlap, logit: float) -> None:
    # p underflows float32 from a logit of about -100 on. -log t ends in -log Σpg, whose gradient over the voxels
    # of the class adds up to -(1-p), however small p is.
    fractions = hard(torch.tensor([0, 0, 0, 2, 2, 1]).view(1, 1, 2, 3)).float()
    logits = torch.zeros(1, 3, 1, 2, 3)
    logits[:, TUMOUR] = logit
    _, gradient = value_and_gradient(logits, fractions, replace(ONLY_TUMOUR, overlap=overlap))
    assert gradient[:, TUMOUR].sum().item() == pytest.approx(-1, abs=0.03)


@every_loss
@every_overlap
def test_a_saturated_and_right_voxel_is_left_alone(name: LossName, overlap: Overlap) -> None:
    # p is 0 and 1 in float32, as is g: a tie everywhere. One voxel is wrong, so that t is not 1.
    fractions = hard(torch.tensor([0, 1, 2, 0, 1, 2, 0, 0]).view(1, 1, 1, 8)).float()
    logits = 200 * fractions
    logits[..., 0] = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1)
    _, gradient = value_and_gradient(logits, fractions, LossConfig(name=name, overlap=overlap, alpha=0.7))
    assert gradient[..., 0].abs().max() > 0
    assert gradient[..., 1:].abs().max() == 0


def test_a_cut_voxel_of_the_background_is_not_pulled_up() -> None:
    # p = 0.05 is cut to 0 = g, whose minimum has half of p's gradient: up, if it were taken.
    fractions = hard(torch.tensor([0, 0, 0, 2]).view(1, 1, 1, 4)).float()
    p = torch.tensor([[0.9, 0.05, 0.05]] * 3 + [[0.3, 0.3, 0.4]]).T.reshape(1, 3, 1, 1, 4)
    config = replace(ONLY_TUMOUR, name="thresholded_dice", overlap="semimetric")
    _, gradient = value_and_gradient(p.log(), fractions, config)
    assert (gradient[:, TUMOUR, ..., :3] > 0).all()
    assert (gradient[:, TUMOUR, ..., 3] < 0).all()


def test_a_background_of_minus_epsilon_is_no_nan() -> None:
    logits, fractions = random_case((1, 3, 2, 2, 2))
    fractions = hard(fractions.argmax(1))
    for name in NAMES:
        slack = loss(logits, fractions - 6e-8, LossConfig(name=name))
        torch.testing.assert_close(
            slack, loss(logits, fractions, LossConfig(name=name)), rtol=1e-5, atol=1e-6
        )


# --- absent classes


def tumourless(false_positives: int, *, voxels: int = 1000) -> tuple[Tensor, Tensor]:
    """No tumour; ``false_positives`` voxels are called tumour with certainty, the others background."""
    logits = torch.zeros(1, 3, 1, 1, voxels)
    logits[:, 0] = 100
    logits[..., :false_positives] = torch.tensor([0.0, 0.0, 100.0]).view(1, 3, 1, 1, 1)
    return logits, hard(torch.zeros(1, 1, 1, voxels, dtype=torch.long)).float()


@every_overlap
@pytest.mark.parametrize("false_positives", [0, 1, 10, 1000])
def test_the_penalty_of_an_absent_class_by_hand(overlap: Overlap, false_positives: int) -> None:
    # 1000 voxels, e = 1: t = 2/(false positives + 2).
    value = loss(*tumourless(false_positives), replace(ONLY_TUMOUR, overlap=overlap)).item()
    assert value == pytest.approx(math.log(1 + false_positives / 2), abs=1e-6)


@every_overlap
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_penalty_of_an_absent_class_is_bounded(overlap: Overlap, alpha: float) -> None:
    bound = math.log((1 + 2 * REFERENCE_SHARE) / (2 * REFERENCE_SHARE) / alpha)
    logits, fractions = random_case((2, 3, 8, 8, 8))
    fractions = hard(fractions[:, :2].argmax(1))
    for scale in (1, 10, 1e4):
        logits = logits.clone()
        logits[:, TUMOUR] = scale
        config = replace(ONLY_TUMOUR, overlap=overlap, alpha=alpha)
        assert loss(logits, fractions, config).item() <= bound + 1e-6


@every_overlap
def test_an_absent_class_pushes_its_false_positives_down(overlap: Overlap) -> None:
    logits, fractions = tumourless(0)
    logits[:, TUMOUR, ..., :5] = 100  # as likely as the background
    for name in ("dice_focal", "dice", "tp_tn_dice", "generalised_dice"):
        _, gradient = value_and_gradient(logits, fractions, LossConfig(name=name, overlap=overlap))
        assert (gradient[:, TUMOUR, ..., :5] > 0).all()


def test_batch_sums_see_the_tumour_of_the_other_sample() -> None:
    # Sample 0 has a tumour and finds it; sample 1 has none and calls one voxel tumour.
    fractions = hard(torch.tensor([[2, 0, 0, 0], [0, 0, 0, 0]]).view(2, 1, 1, 4)).float()
    logits = 200 * fractions
    logits[1, :, 0, 0, 0] = torch.tensor([0.0, 0.0, 200.0])
    # Of the batch: t = 2·1/(2 + 1). By sample: t = 1, and 2e/(1 + 2e) with e = 0.004.
    assert loss(logits, fractions, ONLY_TUMOUR).item() == pytest.approx(-math.log(2 / 3), rel=1e-5)
    by_sample = loss(logits, fractions, replace(ONLY_TUMOUR, sums="sample")).item()
    assert by_sample == pytest.approx(-math.log(0.008 / 1.008) / 2, rel=1e-5)


def test_a_sliver_counts_as_absent_and_a_voxel_does_not() -> None:
    logits, fractions = tumourless(0)
    for share, present in ((0.0009, False), (0.002, True)):  # of 1000 voxels: 0.9e-6 and 2e-6
        some = fractions.clone()
        some[0, :, 0, 0, 0] = torch.tensor([1 - share, 0, share])
        assert (loss(logits, some, ONLY_TUMOUR).item() > 1) is present


# --- what is refused


def test_shapes_that_do_not_fit_are_named() -> None:
    logits, fractions = random_case()
    with pytest.raises(ValueError, match=r"\(2, 3, 3, 4, 2\) and \(2, 2, 3, 4, 2\)"):
        loss(logits, fractions[:, 1:], LossConfig())
    with pytest.raises(ValueError, match="for 2 class weights"):
        loss(logits, fractions, LossConfig(class_weights=(1, 1)))


def test_a_loss_is_what_it_is_known_as_unless_told_otherwise() -> None:
    used = {
        name: (LossConfig(name=name).used_overlap, LossConfig(name=name).used_cross_entropy) for name in NAMES
    }
    assert used.pop("dice_focal") == ("semimetric", 8.0)
    assert used.pop("dice_cross_entropy") == ("squared", 1.0)
    assert set(used.values()) == {("squared", 0.0)}
    told = LossConfig(overlap="linear", cross_entropy=0)
    assert (told.used_overlap, told.used_cross_entropy) == ("linear", 0)


def test_a_bad_configuration_lists_every_fault() -> None:
    with pytest.raises(ConfigError) as caught:
        LossConfig(
            name="dise",  # type: ignore[arg-type]
            alpha=1.5,
            gamma=-1,
            overlap="cubed",  # type: ignore[arg-type]
            cross_entropy=-1,
            class_weights=(1, -1),
            sums="volume",  # type: ignore[arg-type]
        )
    for name in ("name", "alpha", "gamma", "overlap", "cross_entropy", "class_weights", "sums"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LossConfig(alpha=float("nan")),
        lambda: LossConfig(gamma=float("inf")),
        lambda: LossConfig(cross_entropy=float("nan")),
        lambda: LossConfig(class_weights=(0, 0, 0)),
        lambda: LossConfig(class_weights=(1,)),
        lambda: LossConfig(class_weights=(1, float("nan"))),
    ],
)
def test_each_fault_alone_is_found(make: Callable[[], LossConfig]) -> None:
    with pytest.raises(ConfigError, match=r"^loss: \w+ must be"):
        make()


def test_a_configuration_survives_its_file_and_an_unknown_key_does_not() -> None:
    config = LossConfig(name="focal", class_weights=(1, 2))
    assert parse(LossConfig, to_json(config), source="run.toml", error=ConfigError) == config
    with pytest.raises(ConfigError, match="typo: unknown key"):
        parse(LossConfig, {"typo": 1}, source="run.toml", error=ConfigError)
