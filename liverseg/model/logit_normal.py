"""What a stochastic segmentation network says: one normal distribution over all logits of a scan together.

Monteiro et al. 2020, arXiv:2006.06015: covariance F Fᵀ + diag(s²), F of low rank, so that a sample is a whole
segmentation whose voxels agree with each other. Three things are done otherwise:

Training and sampling only ever draw, mean + F ε + s ε', and never ask for a density. The paper's code builds torch's
``LowRankMultivariateNormal``, whose Cholesky factorisation fails once covariances are large, and falls back on the
diagonal; here nothing is factorised and nothing can fail.

F and s are zero in the air around the body. There every loss is flat once the logits are sure, so that nothing holds
the covariance back, and it grows until it overflows.

In training the mean has a loss of its own, and the likelihood's gradient stops at it and at the features
(``UNet.forward``): the network learns what it would without a spread, and the spread what is left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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

    F is linear in the network's last features, a 1×1×1 convolution of them, and is never formed: at a rank of 10 it would
    be 30 channels of full size. F ε is the convolution whose weights are mixed by ε.

    Attributes:
        mean_bczyx: (B, C, Z, Y, X).
        features_bfzyx: What F is made of, zero in the air.
        weight_rcf: (rank, C, features), from ``features_bfzyx`` to F.
        deviation_bczyx: s, the standard deviation of what voxels do not share.
    """

    mean_bczyx: Tensor
    features_bfzyx: Tensor
    weight_rcf: Tensor
    deviation_bczyx: Tensor

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw n segmentations of each scan: float32 logits (n, B, C, Z, Y, X), with gradients.

        Args:
            n: At least 1.
            generator: On the device of the logits; torch's own if not given.
        """
        mean = self.mean_bczyx.float()
        shared_nbr = self._noise(n, mean.shape[0], self.weight_rcf.shape[0], generator=generator)
        own_nbczyx = self._noise(n, *mean.shape, generator=generator)
        mixed_bncf = torch.einsum("nbr,rcf->bncf", shared_nbr, self.weight_rcf)
        # One product of (n · C, features) and (features, voxels) a scan.
        together = torch.matmul(
            mixed_bncf.flatten(1, 2).to(self.features_bfzyx.dtype), self.features_bfzyx.flatten(2)
        )
        shared_nbczyx = together.float().view(mean.shape[0], n, *mean.shape[1:]).transpose(0, 1)
        return mean + shared_nbczyx + self.deviation_bczyx.float() * own_nbczyx

    def _noise(self, *shape: int, generator: torch.Generator | None) -> Tensor:
        return torch.randn(shape, generator=generator, device=self.mean_bczyx.device)


def negative_log_likelihood(samples_nbczyx: Tensor, fractions_bczyx: Tensor) -> Tensor:
    """-log of the mean over samples of Π_voxels Π_c p_c^g_c, a voxel, the mean over scans; equation 9 of the paper.

    The product over a scan makes the best sample outweigh all others: the distribution learns to put one near the truth.

    Args:
        samples_nbczyx: Logits that were drawn, with gradients to the distribution.
        fractions_bczyx: Class fractions, summing to 1 over C.
    """
    g = fractions_bczyx.to(samples_nbczyx.dtype)
    # Σ_c g_c log p_c, with Σ_c g_c = 1: a third of the memory of all log p.
    log_p_nbzyx = (g * samples_nbczyx).sum(2) - samples_nbczyx.logsumexp(2)
    log_likelihood_nb = log_p_nbzyx.flatten(2).sum(2)
    log_mean_b = log_likelihood_nb.logsumexp(0) - math.log(len(samples_nbczyx))
    return -log_mean_b.mean() / math.prod(g.shape[2:])


def deviation(raw_bczyx: Tensor) -> Tensor:
    """s from a head's output, any finite number: between e⁻⁵ and e⁵, e⁻² at 0."""
    return (raw_bczyx.float() + FIRST_LOG_DEVIATION).clamp(-LOG_DEVIATION, LOG_DEVIATION).exp()


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
