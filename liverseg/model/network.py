"""The network: a 3-D U-Net written out in full, and what it costs to run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar, Literal, cast, get_args

import torch
from pydantic import ConfigDict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data_cache.errors import ConfigError
from data_cache.records import STRICT
from liverseg.model.group_norm import GroupNorm
from liverseg.model.logit_normal import LogitNormal, body, deviation

Norm = Literal["batch", "instance", "group"]
Stochastic = Literal["none", "dropout", "ssn"]
SPREAD_STD = 0.02
# Far beyond what any device holds; from there on, numbers of weights overflow.
MOST = {"base_channels": 1024, "depth": 10, "rank": 1024}


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """The architecture; two networks with equal configurations have interchangeable weights.

    Attributes:
        base_channels: Channels of the first level; each level below has twice as many.
        depth: Number of poolings, and of transposed convolutions.
        norm: ``batch`` normalises over the batch, ``instance`` and ``group`` (up to 8 groups) over one sample.
        dropout: Probability of dropping a whole channel after each convolution, 0 for none.
        deep_supervision: Add an output to every level of the decoder, so that the loss is also of coarser answers.
        stochastic: How samples of a segmentation are drawn, whose differences are its uncertainty: not at all (``none``),
            with ``dropout`` kept on, or from the distribution that a stochastic segmentation network learns (``ssn``,
            Monteiro et al. 2020, arXiv:2006.06015). Without samples all three give one answer, that of the mean.
        rank: Rank of the covariance of ``ssn``.
        in_channels: Channels of the image; 1 in a training run.
        classes: Channels of the logits, background included; 3 in a training run.

    Raises:
        ConfigError: On construction, listing every fault.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    base_channels: int = 64
    depth: int = 4
    norm: Norm = "group"
    dropout: float = 0.0
    deep_supervision: bool = False
    stochastic: Stochastic = "none"
    rank: int = 10
    in_channels: int = 1
    classes: int = 3

    def __post_init__(self) -> None:
        faults = list(_faults(self))
        if faults:
            raise ConfigError("network: " + "; ".join(faults))

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level, from the finest to the bottom: ``depth + 1`` numbers."""
        return tuple(self.base_channels * 2**level for level in range(self.depth + 1))


def _faults(config: NetworkConfig) -> Iterator[str]:
    leasts = {"base_channels": 1, "depth": 1, "rank": 1, "in_channels": 1, "classes": 2}
    for name, least in leasts.items():
        value, most = getattr(config, name), MOST.get(name)
        if value < least:
            yield f"{name} must be at least {least}, got {value}"
        elif most is not None and value > most:
            yield f"{name} must be at most {most}, got {value}"
    for name, allowed in (("norm", get_args(Norm)), ("stochastic", get_args(Stochastic))):
        if getattr(config, name) not in allowed:
            yield f"{name} must be one of {', '.join(allowed)}, got {getattr(config, name)!r}"
    if not 0 <= config.dropout < 1:
        yield f"dropout must be in [0, 1), got {config.dropout}"
    if config.stochastic == "dropout" and config.dropout == 0:
        yield "stochastic = 'dropout' needs dropout above 0, such as 0.1"


class UNet(nn.Module):
    """3-D U-Net (Çiçek et al. 2016, arXiv:1606.06650) with channels doubling after each pooling.

    Convolutions have no bias, since the norm that follows has one; transposed convolutions and heads do.

    Attributes:
        recompute: In training, keep only what goes in and out of each pair of convolutions, and compute the rest
            again for the gradient (Chen et al. 2016, arXiv:1604.06174): less memory for a third more time. Weights,
            gradients and running statistics are the same.
        samples: In training with ``ssn``, how many samples of the logits come with them, for the likelihood.
    """

    def __init__(self, config: NetworkConfig, *, recompute: bool = False, samples: int = 1) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.samples = samples
        channels = config.channels
        inputs = (config.in_channels, *channels[:-1])
        self.encoder = nn.ModuleList(
            _double_conv(i, o, config=config) for i, o in zip(inputs, channels, strict=True)
        )
        self.pool = nn.MaxPool3d(2)
        # Listed from the bottom up, in the order in which they run.
        steps = tuple(pairwise(reversed(channels)))
        self.up = nn.ModuleList(nn.ConvTranspose3d(i, o, kernel_size=2, stride=2) for i, o in steps)
        self.decoder = nn.ModuleList(_double_conv(2 * o, o, config=config) for _, o in steps)
        # Finest first: the head that is always there keeps its name with and without deep supervision.
        heads = config.depth if config.deep_supervision else 1
        self.heads = nn.ModuleList(nn.Conv3d(c, config.classes, kernel_size=1) for c in channels[:heads])
        self.apply(_initialise)
        if config.stochastic == "ssn":
            # After the rest, so that a seed gives the same network with and without them.
            self.factor_rcf = nn.Parameter(torch.empty(config.rank, config.classes, channels[0]))
            self.deviation = nn.Conv3d(channels[0], config.classes, kernel_size=1)
            nn.init.zeros_(cast("Tensor", self.deviation.bias))
            # Kaiming's weights would begin with deviations of several logits, and drown the mean.
            for weight in (self.factor_rcf, self.deviation.weight):
                nn.init.normal_(weight, std=SPREAD_STD)

    def forward(self, image_bczyx: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Logits of the input's size, or in training all that the loss needs.

        It is ``forward`` that returns it all because DistributedDataParallel and ``torch.compile`` hook only that,
        and tensors because those know tensors best.

        Args:
            image_bczyx: (B, in_channels, Z, Y, X), each of Z, Y and X divisible by ``2**depth``.

        Returns:
            (B, classes, Z, Y, X); in train mode with ``deep_supervision`` the logits of every level, finest
            first, and with ``ssn`` these (or the one) and then the samples (n, B, classes, Z, Y, X).

        Raises:
            ValueError: The shape does not fit; says which would.
        """
        features = self._features(image_bczyx)
        if not self.training or (self.config.stochastic != "ssn" and not self.config.deep_supervision):
            return cast("Tensor", self.heads[0](features[0]))
        levels = self._levels(features)
        if self.config.stochastic != "ssn":
            return levels
        # The likelihood learns the spread, from features and around a mean that the loss of the levels learns alone.
        # A cross-entropy, it has most of the gradient otherwise, and no tumour was found at all (EXPERIMENTS.md).
        spread = self._distribution(levels[0].detach(), features[0].detach(), image_bczyx)
        return (*levels, spread.sample(self.samples))

    def distribution(self, image_bczyx: Tensor) -> LogitNormal:
        """The distribution over logits that a network with ``ssn`` has learnt."""
        features = self._features(image_bczyx)
        return self._distribution(self.heads[0](features[0]), features[0], image_bczyx)

    def parts(self) -> tuple[list[nn.Parameter], ...]:
        """What learns apart: the weights that the loss of the levels reaches, and with ``ssn`` those of the spread.

        Clipped together, a batch that is hard for the likelihood would count less for the network.
        """
        if self.config.stochastic != "ssn":
            return (list(self.parameters()),)
        spread = [self.factor_rcf, *self.deviation.parameters()]
        return [p for p in self.parameters() if all(p is not s for s in spread)], spread

    def _distribution(self, mean_bczyx: Tensor, features_bfzyx: Tensor, image_bczyx: Tensor) -> LogitNormal:
        inside = body(image_bczyx).to(features_bfzyx.dtype)
        return LogitNormal(
            mean_bczyx=mean_bczyx,
            features_bfzyx=features_bfzyx * inside,
            weight_rcf=self.factor_rcf,
            deviation_bczyx=deviation(self.deviation(features_bfzyx)) * inside,
        )

    def forward_levels(self, image_bczyx: Tensor) -> tuple[Tensor, ...]:
        """Logits of every level that has a head, finest first; level i is 2**i times coarser."""
        return self._levels(self._features(image_bczyx))

    def _levels(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        # Without deep supervision there are fewer heads than levels.
        return tuple(head(x) for head, x in zip(self.heads, features, strict=False))

    def _features(self, image_bczyx: Tensor) -> list[Tensor]:
        """Decoder features (B, channels, Z, Y, X), finest first."""
        _check_shape(image_bczyx, config=self.config)
        skips, x = self._encode(image_bczyx)
        features: list[Tensor] = []
        for up, decode, skip in zip(self.up, self.decoder, reversed(skips), strict=True):
            x = self._run(decode, torch.cat((skip, up(x)), dim=1))
            features.insert(0, x)
        return features

    def _encode(self, image_bczyx: Tensor) -> tuple[list[Tensor], Tensor]:
        skips: list[Tensor] = []
        x = self._run(self.encoder[0], image_bczyx)
        for encode in self.encoder[1:]:
            skips.append(x)
            # Autocast pools in float32 on a CPU, at twice the memory and three times the time, for the same maximum.
            with torch.autocast("cpu", enabled=False):
                pooled = self.pool(x)
            x = self._run(encode, pooled)
        return skips, x

    def _run(self, convolutions: nn.Module, x: Tensor) -> Tensor:
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return cast("Tensor", convolutions(x))
        contexts = partial(_again_contexts, convolutions)
        return cast("Tensor", checkpoint(convolutions, x, use_reentrant=False, context_fn=contexts))


def _again_contexts(
    convolutions: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What surrounds the first and the second computation of ``UNet.recompute``."""
    return nullcontext(), _statistics_kept(convolutions)


@contextmanager
def _statistics_kept(convolutions: nn.Module) -> Iterator[None]:
    """Batch norms normalise as ever, but count the same batch into copies of their running statistics."""
    norms = [m for m in convolutions.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [dict(norm.named_buffers()) for norm in norms]
    for norm, buffers in zip(norms, kept, strict=True):
        norm._buffers.update({name: buffer.clone() for name, buffer in buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)


def to_channels_last(network: UNet) -> UNet:
    """The network with its weights in the layout that tensor cores and oneDNN convolve in; the input follows suit.

    An input of one channel is in both layouts at once, so that the weights alone decide.
    """
    return cast("UNet", network.to(memory_format=torch.channels_last_3d))  # type: ignore[call-overload]


def forward_flops(config: NetworkConfig, shape_zyx: tuple[int, int, int]) -> int:
    """Floating-point operations of one sample's forward pass in eval mode: 2 for each multiply-accumulate.

    Only convolutions count: they are over 99 %. A training step is about three times as much.

    Args:
        config: The architecture.
        shape_zyx: Size of the input in voxels.
    """
    channels, voxels = config.channels, math.prod(shape_zyx)
    inputs = (config.in_channels, *channels[:-1])
    macs = config.classes * channels[0] * voxels
    for level, (i, o) in enumerate(zip(inputs, channels, strict=True)):
        macs += 27 * (i * o + o * o) * (voxels >> 3 * level)
    for level, (fine, coarse) in enumerate(pairwise(channels)):
        # Each output voxel of a transposed convolution of kernel 2 and stride 2 sees one input voxel.
        macs += (coarse * fine + 27 * (2 * fine * fine + fine * fine)) * (voxels >> 3 * level)
    return 2 * macs


def require_divisible(config: NetworkConfig, shape_zyx: tuple[int, int, int]) -> None:
    """Raise ConfigError unless every pooling halves the shape of the cached views exactly."""
    factor = 2**config.depth
    if any(n % factor for n in shape_zyx):
        deepest = min((n & -n).bit_length() - 1 for n in shape_zyx)
        raise ConfigError(
            f"model.depth: {config.depth} poolings need a shape that is divisible by {factor}, and the cache's views are "
            f"{'×'.join(map(str, shape_zyx))} (z×y×x): set model.depth to at most {deepest}"
        )


def parameter_count(config: NetworkConfig) -> int:
    """Numbers that the network learns; nothing is allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in UNet(config).parameters())


def _double_conv(inputs: int, outputs: int, *, config: NetworkConfig) -> nn.Sequential:
    return nn.Sequential(*_conv(inputs, outputs, config=config), *_conv(outputs, outputs, config=config))


def _conv(inputs: int, outputs: int, *, config: NetworkConfig) -> Iterator[nn.Module]:
    yield nn.Conv3d(inputs, outputs, kernel_size=3, padding=1, bias=False)
    yield _norm(outputs, norm=config.norm)
    yield nn.ReLU(inplace=True)
    # Whole channels: neighbouring voxels of a feature map are nearly copies of each other, so dropping single
    # ones drops nothing (Tompson et al. 2015, arXiv:1411.4280), and their mask would be as large as the features.
    # It stays in the list at probability 0, so that the weights' names do not depend on it.
    yield nn.Dropout3d(config.dropout)


def _norm(channels: int, *, norm: Norm) -> nn.Module:
    match norm:
        case "batch":
            return nn.BatchNorm3d(channels)
        case "instance":
            return GroupNorm(channels, channels)
        case "group":
            return GroupNorm(math.gcd(8, channels), channels)


def _initialise(module: nn.Module) -> None:
    """Kaiming's normal initialisation (He et al. 2015, arXiv:1502.01852): variance 2 / fan-in, biases 0."""
    if isinstance(module, nn.ConvTranspose3d):
        # torch takes the fan-in of a transposed convolution from the wrong axis, times the 8 taps of which an
        # output voxel sees only one.
        nn.init.normal_(module.weight, std=math.sqrt(2 / module.in_channels))
    elif isinstance(module, nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    if isinstance(module, nn.ConvTranspose3d | nn.Conv3d) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _check_shape(image_bczyx: Tensor, *, config: NetworkConfig) -> None:
    shape, factor = tuple(image_bczyx.shape), 2**config.depth
    if len(shape) != 5 or shape[1] != config.in_channels:
        raise ValueError(f"the network takes (batch, {config.in_channels}, z, y, x), got shape {shape}")
    if any(n == 0 or n % factor for n in shape[2:]):
        nearest = tuple(max(1, math.ceil(n / factor)) * factor for n in shape[2:])
        raise ValueError(
            f"{config.depth} poolings need a spatial shape divisible by {factor}, got {shape[2:]};"
            f" pad or resample to {nearest}"
        )
