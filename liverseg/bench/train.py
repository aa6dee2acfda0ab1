"""``liverseg bench train``: a training step, beside MONAI's networks of the same widths, and what the rest of it costs."""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from data_cache.reader import CacheStore
from liverseg.bench.augment import SHAPE_ZYX
from liverseg.bench.timing import fastest
from liverseg.device import autocast, autocast_dtype, freed_memory_reused, matmul_peak, synchronise
from liverseg.model.losses import LossConfig, loss
from liverseg.model.network import NetworkConfig, UNet
from liverseg.training.augment import AugmentConfig, augment
from liverseg.training.callbacks import SILENT
from liverseg.training.config import OptimConfig, TrainConfig
from liverseg.training.process_group import ProcessGroup
from liverseg.training.split import Split
from liverseg.training.state import new_state, update_average
from liverseg.training.train import PASSES, Trainer

Make = Callable[[tuple[int, ...]], nn.Module]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTiming:
    """Forward, loss, backward, clipping and AdamW of one network on voxels that are already there.

    Attributes:
        seconds: Of the fastest step.
        mfu: Share of the device's measured matmul peak that the network's own operations come to.
        peak_mib: Most memory that the step held on a GPU; None on the CPU.
    """

    name: str
    batch_size: int
    seconds: float
    mfu: float
    peak_mib: float | None

    @property
    def samples_per_second(self) -> float:
        """Of training."""
        return self.batch_size / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeTiming:
    """An epoch of the trainer, and what it would be if only the network took time.

    Attributes:
        end_to_end: Samples per second, with loading, augmentation and the weights' average.
        compute_only: Samples per second of the same steps on one batch that is already there and augmented.
        augment_share: Of a step.
        wait_share: Of the epoch, waiting for voxels.
    """

    end_to_end: float
    compute_only: float
    augment_share: float
    wait_share: float


def measure_steps(
    device: torch.device,
    *,
    base_channels: int,
    batch_sizes: Sequence[int],
    seconds: float,
    skipped: Callable[[str], None],
) -> Iterator[StepTiming]:
    """Steps of every network that is importable, same widths, dtype, loss and optimizer; on a GPU compiled, too.

    One that does not fit the device's memory is left out, and ``skipped`` is told.
    """
    channels = NetworkConfig(base_channels=base_channels).channels
    for batch_size in batch_sizes:
        for name, make in _contenders().items():
            network = _build(make, channels, device)
            networks = {name: network}
            if device.type == "cuda":
                networks[f"{name}, compiled"] = cast("nn.Module", torch.compile(network))
            flops = _flops(make, channels)
            for label, each in networks.items():
                try:
                    yield _measure(label, each, device, batch_size=batch_size, flops=flops, seconds=seconds)
                except torch.OutOfMemoryError:
                    skipped(f"{label}, batch {batch_size}: out of memory on {device}")
            del network, networks


def _contenders() -> dict[str, Make]:
    return {"liverseg": _unet} | (PEERS if importlib.util.find_spec("monai") else {})


def _unet(channels: tuple[int, ...]) -> nn.Module:
    return UNet(NetworkConfig(base_channels=channels[0]))


def _monai_basic(channels: tuple[int, ...]) -> nn.Module:
    """The same plan: two convolutions a level, transposed convolutions, concatenation; biases in addition."""
    from monai.networks.nets import BasicUNet

    features = (*channels, channels[0])
    network: nn.Module = BasicUNet(
        3, 1, 3, features=features, act=("ReLU", {"inplace": True}), norm="batch", upsample="deconv"
    )
    return network


def _monai_unet(channels: tuple[int, ...]) -> nn.Module:
    """Strided convolutions, one per level: a fraction of the work."""
    from monai.networks.nets import UNet as Strided

    network: nn.Module = Strided(3, 1, 3, channels=channels, strides=(2,) * (len(channels) - 1), norm="batch")
    return network


PEERS: dict[str, Make] = {"MONAI BasicUNet": _monai_basic, "MONAI UNet": _monai_unet}


def _build(make: Make, channels: tuple[int, ...], device: torch.device) -> nn.Module:
    network = make(channels).to(device)
    return network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload,no-any-return]


def _flops(make: Make, channels: tuple[int, ...]) -> int:
    """Of one sample's forward pass, counted by torch without computing anything."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        make(channels).eval()(torch.empty(1, 1, *SHAPE_ZYX))
    return int(counter.get_total_flops())


def _measure(
    name: str, network: nn.Module, device: torch.device, *, batch_size: int, flops: int, seconds: float
) -> StepTiming:
    dtype = autocast_dtype("auto", device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step = fastest(_step(network, device, batch_size, dtype=dtype), device, seconds=seconds)
    peak = matmul_peak(device, dtype or torch.float32)
    memory = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    mfu = PASSES * flops * batch_size / step / peak
    return StepTiming(name=name, batch_size=batch_size, seconds=step, mfu=mfu, peak_mib=memory)


def _step(
    network: nn.Module,
    device: torch.device,
    batch_size: int,
    *,
    dtype: torch.dtype | None,
    average: nn.Module | None = None,
) -> Callable[[], None]:
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), fused=device.type == "cuda")
    image = torch.randn(batch_size, 1, *SHAPE_ZYX, device=device)
    image = image.contiguous(memory_format=torch.channels_last_3d)
    fractions = torch.rand(batch_size, 3, *SHAPE_ZYX, device=device).softmax(dim=1)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, dtype):
            logits: Tensor = network(image)
        loss(logits, fractions, LossConfig()).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if average is not None:
            update_average(average, network, decay=0.999, step=1)

    return run


def measure_whole(
    store: CacheStore, device: torch.device, *, base_channels: int, batch_size: int, steps: int
) -> WholeTiming:
    """Two epochs of the trainer, of which the second counts, and the same steps without all that feeds them."""
    config = TrainConfig(
        device=str(device),
        model=NetworkConfig(base_channels=base_channels),
        optim=OptimConfig(epochs=10, steps_per_epoch=steps, batch_size=batch_size),
    )
    split = Split(train=store.case_ids, val=store.case_ids[:1], train_sha256=())
    group = ProcessGroup(rank=0, size=1, device=device)
    state = new_state(config, device)
    trainer = Trainer(store, split, config, group, state)
    with freed_memory_reused(device):
        trainer.train_epoch(SILENT)
        synchronise(device)
        start = time.perf_counter()
        _, waited_s = trainer.train_epoch(SILENT)
        epoch_s = time.perf_counter() - start
        step = _step(
            state.network, device, batch_size, dtype=trainer.dtype, average=copy.deepcopy(state.average)
        )
        step_s = fastest(step, device, seconds=0.5 * epoch_s)
    return WholeTiming(
        end_to_end=steps * batch_size / epoch_s,
        compute_only=batch_size / step_s,
        augment_share=_augment_seconds(device, batch_size) / (epoch_s / steps),
        wait_share=waited_s / epoch_s,
    )


def _augment_seconds(device: torch.device, batch_size: int) -> float:
    generator = torch.Generator().manual_seed(0)
    image, fractions = (torch.rand(batch_size, c, *SHAPE_ZYX, device=device) for c in (1, 3))
    config = AugmentConfig()
    return fastest(lambda: augment(image, fractions, config, generator=generator), device, seconds=1.0)
