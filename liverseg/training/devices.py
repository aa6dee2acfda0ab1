"""What a run computes on: the device, its precision and its measured peak, and the processes that share the work."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_cache.errors import ConfigError
from liverseg.training.config import Precision

T = TypeVar("T")

PEAK_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """The processes that train together, each with a device of its own; one that trains alone is a team of 1.

    Attributes:
        rank: This process, from 0; number 0 writes the files.
        size: How many there are.
        device: This one's.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Σ over the team, the same on all; without gradient. The argument is left alone."""
        if self.size == 1:
            return values
        result = values.clone()
        dist.all_reduce(result)
        return result

    def gather(self, items: Sequence[T]) -> list[T]:
        """Everyone's items, on all; item i of process r is at r + i · size, the order that ``share`` took apart."""
        if self.size == 1:
            return list(items)
        parts: list[list[tuple[int, T]] | None] = [None] * self.size
        dist.all_gather_object(parts, [(self.rank + i * self.size, item) for i, item in enumerate(items)])
        numbered = [pair for part in parts if part is not None for pair in part]
        return [item for _, item in sorted(numbered, key=lambda pair: pair[0])]

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of some work: every ``size``-th item."""
        return items[self.rank :: self.size]


def leads() -> bool:
    """Whether this process is the one that prints, before it has joined its team."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def team_of(device: str) -> Iterator[Team]:
    """The team that ``torchrun`` has started this process in; alone without it.

    Raises:
        ConfigError: The device does not exist here.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team(rank=0, size=1, device=choose_device(device))
        return
    chosen = _own_device(choose_device(device))
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Team(rank=dist.get_rank(), size=size, device=chosen)
        dist.barrier()
    finally:
        # gloo aborts the process at its end when a reducer outlives its group: models must be gone before it.
        gc.collect()
        dist.destroy_process_group()


def _own_device(device: torch.device) -> torch.device:
    if device.type != "cuda":
        return device
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(own)
    return own


def wrap(network: nn.Module, team: Team) -> nn.Module:
    """The network as it is trained: with several devices, gradients are averaged over them."""
    if team.size == 1:
        return network
    ids = [team.device] if team.device.type == "cuda" else None
    # Buffers are equal on all devices already, since batch norm is synchronised.
    return nn.parallel.DistributedDataParallel(network, device_ids=ids, broadcast_buffers=False)


def synchronise_norms(network: nn.Module, team: Team) -> None:
    """Let batch norms see the batches of all devices; weights keep their names.

    Raises:
        ConfigError: On several CPU processes, for which torch has no such norm.
    """
    if team.size == 1 or not any(isinstance(m, nn.BatchNorm3d) for m in network.modules()):
        return
    if team.device.type != "cuda":
        raise ConfigError(
            "model.norm = 'batch' needs torch's synchronised batch norm, which only GPUs have: "
            "with several CPU processes, set it to instance or group"
        )
    replace_norms(network)


def replace_norms(network: nn.Module) -> None:
    """Put torch's SyncBatchNorm in the place of every BatchNorm3d, with its weights and statistics, in place."""
    for name, child in list(network.named_children()):
        setattr(network, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))  # type: ignore[no-untyped-call]


def choose_device(name: str) -> torch.device:
    """The device of that name; ``auto`` takes CUDA if there is any, else the CPU.

    Raises:
        ConfigError: The name means nothing, or there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as failure:
        reason = str(failure).splitlines()[0]
        raise ConfigError(f"device {name!r}: not available ({reason}): use auto or cpu") from None
    return device


def computes_in_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether autocast to bfloat16 is on: as asked, or where the hardware multiplies it natively."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def trains_in_bf16(precision: Precision, device: torch.device, *, slices: int, poolings: int) -> bool:
    """``computes_in_bf16``, but on no CPU where a level of the network is two slices deep.

    There oneDNN (torch 2.13) makes the bf16 gradient of a convolution's weights from memory that nobody has
    written: mostly zeros, sometimes NaN.

    Args:
        precision: As configured.
        device: Where.
        slices: Depth of the input.
        poolings: Each halves it.
    """
    two_deep = any(slices >> level == 2 for level in range(poolings + 1))
    return computes_in_bf16(precision, device) and not (device.type == "cpu" and two_deep)


@cache
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product: what a network could reach at most here.

    Measured once a process, in a fifth of a second or so; the fastest repeat counts.
    """
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    start = time.perf_counter()
    seconds: list[float] = []
    while not seconds or time.perf_counter() - start < PEAK_SECONDS:
        before = time.perf_counter()
        a @ a
        synchronise(device)
        seconds.append(time.perf_counter() - before)
    return 2 * n**3 / min(seconds)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
