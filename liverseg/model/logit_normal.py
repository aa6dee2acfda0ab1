"""What a stochastic segmentation network says: one normal distribution over all logits of a scan together.

Monteiro et al. 2020, arXiv:2006.06015: covariance F Fᵀ + diag(s²), F of low rank, so that a sample is a whole
segmentation whose voxels agree with each other. Two things are done otherwise:

Training and sampling only ever draw, mean + F ε + s ε', and never ask for a density. The paper's code builds torch's
``LowRankMultivariateNormal``, whose Cholesky factorisation fails once covariances are large, and falls back on the
diagonal; here nothing is factorised and nothing can fail.

F and s are zero in the air around the body. There every loss is flat once the logits are sure, so that nothing holds
the covariance back, and it grows until it overflows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

# Standard deviations of a logit stay between e⁻⁵ and e⁵: beyond, a softmax changes no more.
LOG_DEVIATION = 5.0
# An untrained network is almost sure of its mean, and learns that before how far to trust it.
FIRST_LOG_DEVIATION = -2.0
# Of the way from a scan's darkest to its brightest: with the standard window -270 HU, between lung and fat.
BODY_SHARE = 0.1
BLOCK = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LogitNormal:
    """The distribution of the logits of each scan of a batch.

    Attributes:
        mean_bczyx: (B, C, Z, Y, X).
        factor_brczyx: F, (B, rank, C, Z, Y, X).
        deviation_bczyx: s, the standard deviation of what voxels do not share.
    """

    mean_bczyx: Tensor
    factor_brczyx: Tensor
    deviation_bczyx: Tensor

    @classmethod
    def of(cls, mean_bczyx: Tensor, spread_bczyx: Tensor) -> Self:
        """From logits and what ``spread`` makes: (rank + 1) · C channels."""
        b, classes, *shape_zyx = mean_bczyx.shape
        parts = spread_bczyx.float().reshape(b, -1, classes, *shape_zyx)
        return cls(mean_bczyx=mean_bczyx.float(), factor_brczyx=parts[:, :-1], deviation_bczyx=parts[:, -1])

    def sample(self, n: int, *, generator: torch.Generator | None) -> Tensor:
        """Draw n segmentations of each scan: logits (n, B, C, Z, Y, X), with gradients (``None``: torch's own)."""
        mean, device = self.mean_bczyx, self.mean_bczyx.device
        b, rank = self.factor_brczyx.shape[:2]
        shared_nbr = torch.randn(n, b, rank, generator=generator, device=device)
        own_nbczyx = torch.randn(n, *mean.shape, generator=generator, device=device)
        # One product of (n, rank) and (rank, voxels) a scan.
        together = torch.einsum("nbr,brv->nbv", shared_nbr, self.factor_brczyx.flatten(2))
        return mean + together.view(n, *mean.shape) + self.deviation_bczyx * own_nbczyx


def negative_log_likelihood(
    distribution: LogitNormal,
    fractions_bczyx: Tensor,
    *,
    samples: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """-log of the mean over samples of Π_voxels Π_c p_c^g_c, a voxel, the mean over scans; equation 9 of the paper.

    The product over a scan makes the best sample outweigh all others: the distribution learns to put one near the truth.

    Args:
        distribution: Of the logits.
        fractions_bczyx: Class fractions, summing to 1 over C.
        samples: How many are drawn.
        generator: On the device of the logits; None for torch's own.
    """
    logits_nbczyx = distribution.sample(samples, generator=generator)
    g = fractions_bczyx.to(logits_nbczyx.dtype)
    # Σ_c g_c log p_c, with Σ_c g_c = 1: a third of the memory of all log p.
    log_p_nbzyx = (g * logits_nbczyx).sum(2) - logits_nbczyx.logsumexp(2)
    log_likelihood_nb = log_p_nbzyx.flatten(2).sum(2)
    log_mean_b = log_likelihood_nb.logsumexp(0) - math.log(samples)
    return -log_mean_b.mean() / math.prod(g.shape[2:])


def spread(raw_bczyx: Tensor, image_bczyx: Tensor, *, classes: int) -> Tensor:
    """A head's output as F and s: (rank + 1) · ``classes`` channels, the last ``classes`` log s; zero in the air."""
    factor, log_deviation = raw_bczyx.float().tensor_split([raw_bczyx.shape[1] - classes], dim=1)
    deviation = (log_deviation + FIRST_LOG_DEVIATION).clamp(-LOG_DEVIATION, LOG_DEVIATION).exp()
    return torch.cat((factor, deviation), dim=1) * body(image_bczyx)


@torch.no_grad()
def body(image_bczyx: Tensor) -> Tensor:
    """1 where a scan shows the body or is within a few voxels of it, 0 in the air: (B, 1, Z, Y, X), float32.

    Blocks of 4×4×4 voxels brighter than ``BODY_SHARE`` of the scan's range, and their neighbours. Relative to the scan, so
    that neither the window nor augmented contrast matters.
    """
    nz, ny, nx = image_bczyx.shape[2:]
    coarse = (max(1, nz // BLOCK), max(1, ny // BLOCK), max(1, nx // BLOCK))
    blocks = F.adaptive_avg_pool3d(image_bczyx.float(), coarse)
    low, high = blocks.amin((1, 2, 3, 4), keepdim=True), blocks.amax((1, 2, 3, 4), keepdim=True)
    bright = (blocks.amax(1, keepdim=True) > low + BODY_SHARE * (high - low)).float()
    near = F.max_pool3d(bright, kernel_size=3, stride=1, padding=1)
    return F.interpolate(near, size=(nz, ny, nx), mode="nearest")
