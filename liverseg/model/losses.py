"""One family of losses on logits and class fractions: overlap (Dice) terms, focal terms, and their sums.

Throughout, p is the softmax of the logits, g the class fractions (soft targets, summing to 1 over the classes), and
Σ runs over the voxels of one class, of the whole batch or of one sample. The TP term t is one of three overlaps, the TN
term n the same one of 1-p and 1-g, and d = α t + (1-α) n:

    squared       t = 2 Σpg / (Σp² + Σg²)              Milletari et al. 2016, arXiv:1606.04797
    semimetric    t = 1 - Σ|p-g| / Σ(p+g)              Wang et al. 2023, arXiv:2303.16296
                    = 2 Σ min(p,g) / Σ(p+g)
    linear        t = 2 Σpg / Σ(p+g)                   the Dice of hard masks, with p in it

**Where they are best.** For fractions g that are known, squared and semimetric are 1 at p = g alone; linear, at a hard
mask. For hard labels that are 1 with probability q, squared is best at p = min(1, q/t): all that is uncertain grows by
1/t. Semimetric and linear, which are one for hard labels, are best at the mask q > t/2, which is what the Dice of a
mask asks for. Cross-entropy is best at p = q in all of these, and pulls back what the overlaps inflate.

**Haze**, a small p at each of many voxels without the class: Σp² hardly notices it, Σp does, in proportion to p.

**Absent classes.** Where Σg is less than ``PRESENT_SHARE`` of the voxels, t would be about 0 whatever is predicted and
log t would explode. Such a class is scored as if ``REFERENCE_SHARE`` of the voxels were in it, besides those there are,
and had all been found: with e that number of voxels and D what t has below, t = 2e / (D + 2e). That is 1 when nothing
is predicted, falls with each false positive, and never below 0.002, so that -log t is at most 6.3. Its gradient per
false-positive voxel is that of a class of 0.1 % of the volume, which a tumour is. With sums over the batch, absent means
in no sample of it; with sums over a sample, in that one. A class that fills everything has an absent complement: n
likewise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar, Literal, get_args

import torch
from pydantic import ConfigDict
from torch import Tensor

from data_cache.errors import ConfigError
from data_cache.records import STRICT
from liverseg.model.all_reduce import all_reduce_logsumexp, all_reduce_sum, devices

LossName = Literal[
    "dice_focal", "dice", "generalised_dice", "tp_tn_dice", "focal", "thresholded_dice", "dice_cross_entropy"
]
Sums = Literal["batch", "sample", "devices"]
Overlap = Literal["squared", "semimetric", "linear"]

# One voxel of a 64×128×128 grid: less is a sliver that interpolation or the edge of a window has left.
PRESENT_SHARE = 1e-6
# A usual tumour burden, 1000 voxels of that grid.
REFERENCE_SHARE = 1e-3
# Of a loss whose overlap or cross-entropy is not given. Those that are not named here: squared, and none. What
# dice-focal has was found by experiment, over three seeds (EXPERIMENTS.md).
USUAL_OVERLAP: Mapping[LossName, Overlap] = {"dice_focal": "semimetric"}
USUAL_CROSS_ENTROPY: Mapping[LossName, float] = {"dice_focal": 8.0, "dice_cross_entropy": 1.0}
# Keeps the derivative of (1-d)^γ finite at d = 1 for γ < 1.
_SMALLEST_MISS = 1e-7


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """Which loss, and its numbers.

    Attributes:
        name: The loss. With t the soft Dice of a class, n that of everything else, d = α t + (1-α) n, and sums over the
            classes: ``dice`` is Σ w (1-t), ``tp_tn_dice`` Σ w (1-d), and ``dice_focal`` -Σ w (1-d)^γ log d.
            ``generalised_dice`` weighs each class by its volume to the power of -2, ``thresholded_dice`` takes
            probabilities below 0.1 for 0 and those above 0.9 for 1, ``dice_cross_entropy`` is ``dice`` and cross-entropy,
            and ``focal`` has no Dice: it is the cross-entropy of each class times (1-p)^γ.
        alpha: α, share of t in d. n is nearly 1 for a class of few voxels whatever is predicted, and
            holds d above 1-α, where -log d no longer pulls on a class that is missed altogether: stay close to 1.
        gamma: γ, how much what is already good is turned down, in ``dice_focal`` and ``focal``. By the
            derivative, a class at d = 0.9 pulls 0.67 times as hard as one at 0.6 with γ = 0, 0.46 with 0.3 and 0.18
            with 1. ``focal`` alone is usually given 2.
        overlap: How the soft Dice t compares probabilities p with fractions g: ``squared`` is 2 Σpg / (Σp² + Σg²),
            ``linear`` 2 Σpg / Σ(p+g), ``semimetric`` 2 Σ min(p,g) / Σ(p+g). If not set, it is ``semimetric`` for
            ``dice_focal`` and ``squared`` for the others.
        cross_entropy: Weight of the cross-entropy that is added to the loss. If not set, it is 8 for ``dice_focal``, 1 for
            ``dice_cross_entropy`` and 0 for the others.
        class_weights: w, one number per class: background, liver, tumour.
        sums: Voxels that each Dice sums over: those of the ``batch``, in which fewer classes are absent, or of each
            ``sample``, then averaged. ``devices`` are the batches of all devices of a run, the same as ``batch`` where
            there is one: training does so in place of ``batch``.
        likelihood_samples: Of ``model.stochastic = "ssn"``: how many segmentations its likelihood is estimated from.
            It is added to this loss, which is of the mean, and learns the spread around that.

    Raises:
        ConfigError: On construction, listing every fault.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    name: LossName = "dice_focal"
    alpha: float = 0.99
    gamma: float = 0.3
    overlap: Overlap | None = None
    cross_entropy: float | None = None
    class_weights: tuple[float, ...] = (0.2, 0.3, 0.5)
    sums: Sums = "batch"
    likelihood_samples: int = 20

    def __post_init__(self) -> None:
        faults = list(_faults(self))
        if faults:
            raise ConfigError("loss: " + "; ".join(faults))

    @property
    def used_overlap(self) -> Overlap:
        """The overlap that is given, or that is usual for the loss."""
        return self.overlap or USUAL_OVERLAP.get(self.name, "squared")

    @property
    def used_cross_entropy(self) -> float:
        """The weight that is given, or that is usual for the loss."""
        usual = USUAL_CROSS_ENTROPY.get(self.name, 0.0)
        return usual if self.cross_entropy is None else self.cross_entropy


def _faults(config: LossConfig) -> Iterator[str]:
    for name, allowed in (("name", LossName), ("sums", Sums), ("overlap", Overlap)):
        value = getattr(config, name)
        if value not in get_args(allowed) and not (name == "overlap" and value is None):
            yield f"{name} must be one of {', '.join(get_args(allowed))}, got {value!r}"
    if not 0 <= config.alpha <= 1:
        yield f"alpha must be in [0, 1], got {config.alpha}"
    for name in ("gamma", "cross_entropy"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < math.inf:
            yield f"{name} must be finite and at least 0, got {value}"
    weights = config.class_weights
    if len(weights) < 2 or not all(0 <= w < math.inf for w in weights) or not any(weights):
        yield f"class_weights must be two or more finite numbers of at least 0, not all 0, got {weights}"
    if config.likelihood_samples < 1:
        yield f"likelihood_samples must be at least 1, got {config.likelihood_samples}"


def loss(logits_bczyx: Tensor, fractions_bczyx: Tensor, config: LossConfig) -> Tensor:
    """The loss that ``config`` names, in float32 (float64 for float64 logits) also under autocast.

    Args:
        logits_bczyx: (B, C, Z, Y, X), any floating dtype, finite.
        fractions_bczyx: The same shape, in [0, 1], summing to 1 over C.
        config: Its ``class_weights`` has C numbers.

    Returns:
        A scalar of at least 0, finite and with finite gradients.

    Raises:
        ValueError: Shapes or the number of classes differ.
    """
    _check_shapes(logits_bczyx, fractions_bczyx, config)
    dtype = torch.promote_types(logits_bczyx.dtype, torch.float32)
    # The cast is enough under autocast: no operation below is one that it runs in half precision.
    log_p = torch.log_softmax(logits_bczyx.to(dtype), dim=1)
    # Background made as 1 - Σ of the rest comes out at -6e-8 here and there, whose logarithm is NaN.
    g = fractions_bczyx.to(dtype).clamp(0, 1)
    value, weight = _by_name(log_p, g, config), config.used_cross_entropy
    return value + weight * cross_entropy(log_p, g) if weight else value


def _by_name(log_p: Tensor, g: Tensor, config: LossConfig) -> Tensor:
    match config.name:
        case "dice_focal":
            return dice_focal(log_p, g, config)
        case "dice" | "dice_cross_entropy":
            return dice(log_p, g, config)
        case "generalised_dice":
            return generalised_dice(log_p, g, config)
        case "tp_tn_dice":
            return tp_tn_dice(log_p, g, config)
        case "focal":
            return focal(log_p, g, config)
        case "thresholded_dice":
            return thresholded_dice(log_p, g, config)


def dice_focal(log_p: Tensor, g: Tensor, config: LossConfig) -> Tensor:
    """-Σ_c w_c (1-d_c)^γ log d_c.

    Takes ``log_p`` = log p and g, both (B, C, Z, Y, X); so do all below. d is never formed: its logarithm comes
    from sums of logarithms, so that a class whose p underflows is pulled back with full force.
    """
    log_d = _log_overlap(log_p, g, config)
    if config.alpha < 1:
        log_n = _log_overlap(_log_complement(log_p), 1 - g, config)
        log_d = torch.logaddexp(_log(config.alpha) + log_d, _log(1 - config.alpha) + log_n)
    miss = (-torch.expm1(log_d)).clamp(min=_SMALLEST_MISS)
    return _weighted(-(miss**config.gamma) * log_d, config)


def dice(log_p: Tensor, g: Tensor, config: LossConfig) -> Tensor:
    """Σ_c w_c (1-t_c)."""
    return _weighted(1 - _overlap(log_p.exp(), g, config), config)


def tp_tn_dice(log_p: Tensor, g: Tensor, config: LossConfig) -> Tensor:
    """Σ_c w_c (1-d_c)."""
    p = log_p.exp()
    t, n = _overlap(p, g, config), _overlap(1 - p, 1 - g, config)
    return _weighted(1 - config.alpha * t - (1 - config.alpha) * n, config)


def generalised_dice(log_p: Tensor, g: Tensor, config: LossConfig) -> Tensor:
    """1 - Σ_c v_c N_c / Σ_c v_c D_c where t_c = N_c / D_c, and v_c = w_c / (Σg)².

    Sudre et al. 2017, arXiv:1707.03237, who have it linear. An absent class has the reference volume in v.
    """
    volume, shared, both = _sums(g, *_above_and_below(log_p.exp(), g, config.used_overlap), sums=config.sums)
    voxels = _voxels(g, sums=config.sums)
    v = _weights(g, config) / torch.where(_absent(volume, voxels), REFERENCE_SHARE * voxels, volume).square()
    # Volumes squared reach 1e12, their inverses 1e-12: scaled, the sums stay far from float32's ends.
    v = v / v.sum(dim=-1, keepdim=True)
    return (1 - 2 * (v * shared).sum(-1) / (v * both).sum(-1)).mean()


def thresholded_dice(log_p: Tensor, g: Tensor, config: LossConfig) -> Tensor:
    """``dice`` of p cut to 1 above 0.9 and to 0 below 0.1, with the gradient of p passed straight through.

    The gradient is that of the cut p's score (Bengio et al. 2013, arXiv:1308.3432), so that a voxel that is sure and
    right no longer pulls. For fractional g it is a coarse tool: the optimum is not p = g outside [0.1, 0.9].
    """
    p = log_p.exp()
    cut = torch.where(p > 0.9, 1.0, torch.where(p < 0.1, 0.0, p))
    return _weighted(1 - _overlap(p + (cut - p).detach(), g, config), config)


def focal(log_p: Tensor, g: Tensor, config: LossConfig) -> Tensor:
    """-Σ_c w_c (1-p_c)^γ g_c log p_c, the mean over voxels (Lin et al. 2017, arXiv:1708.02002).

    A sum over voxels already, it knows no absent class. For γ > 0 and fractional g the optimum is not p = g.
    """
    miss = (-torch.expm1(log_p)).clamp(min=_SMALLEST_MISS)
    per_voxel = -(miss**config.gamma) * g * log_p
    return (per_voxel.mean((0, 2, 3, 4)) * _weights(g, config)).sum()


def cross_entropy(log_p: Tensor, g: Tensor) -> Tensor:
    """-Σ_c g_c log p_c, the mean over voxels, unweighted; the optimum is p = g."""
    return -(g * log_p).sum(dim=1).mean()


def _overlap(p: Tensor, g: Tensor, config: LossConfig) -> Tensor:
    """t of each class: (C,) with sums over the batch, (B, C) over each sample; see the module for absent ones."""
    volume, shared, both = _sums(g, *_above_and_below(p, g, config.used_overlap), sums=config.sums)
    voxels = _voxels(g, sums=config.sums)
    absent = _absent(volume, voxels)
    extra = absent * REFERENCE_SHARE * voxels
    return 2 * torch.where(absent, extra, shared) / (both + 2 * extra)


def _above_and_below(p: Tensor, g: Tensor, overlap: Overlap) -> tuple[Tensor, Tensor]:
    """Voxel by voxel, half of what t has above its fraction bar, and what it has below."""
    match overlap:
        case "squared":
            return p * g, p.square() + g.square()
        case "linear":
            return p * g, p + g
        case "semimetric":
            return _smaller(p, g), p + g


def _smaller(p: Tensor, g: Tensor) -> Tensor:
    """min(p, g), with the gradients that training wants where p = g.

    ``minimum`` gives p half of it there, and that of t is then 0 at p = g. But where g is 0 or 1, p has only one side
    to come from, and the whole of that side's is wanted: half of it would pull at p = 0, and never be answered.
    """
    return torch.where((g == 0) | (g == 1), p * g, torch.minimum(p, g))


def _log_overlap(log_p: Tensor, g: Tensor, config: LossConfig) -> Tensor:
    """log of ``_overlap``, with gradients that do not vanish where p underflows."""
    sums, dims, voxels = config.sums, _dims(config.sums), _voxels(g, sums=config.sums)
    below = log_p.exp() + g if config.used_overlap != "squared" else (2 * log_p).exp() + g.square()
    volume, both = _sums(g, below, sums=sums)
    absent = _absent(volume, voxels)
    # The branch not taken must be finite as well, or its gradient is 0 · NaN: an absent class sums over everything,
    # and so does one that is there but has no voxel on this device.
    none_here = g.sum(dims, keepdim=True) == 0
    log_g = torch.where(none_here | absent.view_as(none_here), 0.0, g.log())
    log_shared = torch.minimum(log_p, log_g) if config.used_overlap == "semimetric" else log_p + log_g
    log_here = torch.logsumexp(log_shared, dims)
    if sums == "devices":
        log_here = all_reduce_logsumexp(torch.where(none_here.squeeze(dims) & ~absent, -math.inf, log_here))
    log_shared = torch.where(absent, _log(REFERENCE_SHARE * voxels), log_here)
    return math.log(2) + log_shared - (both + 2 * REFERENCE_SHARE * voxels * absent).log()


def _log_complement(log_p: Tensor) -> Tensor:
    """log(1-p) of each class, as the log of the sum of the others: 1-p itself rounds to 0 from p = 1 - 6e-8 on."""
    classes = log_p.unbind(dim=1)
    others = [classes[:c] + classes[c + 1 :] for c in range(len(classes))]
    return torch.stack([reduce(torch.logaddexp, log_q) for log_q in others], dim=1)


def _absent(volume: Tensor, voxels: int) -> Tensor:
    return volume < PRESENT_SHARE * voxels


def _sums(*values: Tensor, sums: Sums) -> tuple[Tensor, ...]:
    """Each value's sum over voxels, in one message where several devices share it."""
    added = torch.stack([value.sum(_dims(sums)) for value in values])
    return (all_reduce_sum(added) if sums == "devices" else added).unbind()


def _dims(sums: Sums) -> tuple[int, ...]:
    return (2, 3, 4) if sums == "sample" else (0, 2, 3, 4)


def _voxels(g: Tensor, *, sums: Sums) -> int:
    voxels = math.prod([g.shape[dim] for dim in _dims(sums)])  # a generator would break torch.compile's graph
    return voxels * devices() if sums == "devices" else voxels


def _weights(g: Tensor, config: LossConfig) -> Tensor:
    # Filled on the device: a tensor made from a list would have the host wait for the device in every step.
    return torch.stack([g.new_full((), weight) for weight in config.class_weights])


def _weighted(terms: Tensor, config: LossConfig) -> Tensor:
    """Σ_c w_c terms_c, the mean over samples where ``terms`` has them."""
    return (terms * _weights(terms, config)).sum(dim=-1).mean()


def _log(value: float) -> float:
    """log with log 0 = -∞, which ``logaddexp`` takes as it should."""
    return math.log(value) if value > 0 else -math.inf


def _check_shapes(logits_bczyx: Tensor, fractions_bczyx: Tensor, config: LossConfig) -> None:
    logits, fractions, weights = logits_bczyx.shape, fractions_bczyx.shape, len(config.class_weights)
    if len(logits) != 5 or logits != fractions or logits[1] != weights:
        raise ValueError(
            f"logits and fractions must both be (batch, {weights}, z, y, x) for {weights} class weights,"
            f" got {tuple(logits)} and {tuple(fractions)}"
        )
