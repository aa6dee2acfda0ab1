"""The processes that train together under ``torchrun``, each with a device of its own."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_cache.errors import ConfigError
from liverseg.device import choose_device

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessGroup:
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
    def is_main_process(self) -> bool:
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


def is_main_process() -> bool:
    """Whether this process is the one that prints, before it has joined its team."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def process_group(device: str) -> Iterator[ProcessGroup]:
    """The team that ``torchrun`` has started this process in; alone without it.

    Raises:
        ConfigError: The device does not exist here.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ProcessGroup(rank=0, size=1, device=choose_device(device))
        return
    chosen = _own_device(choose_device(device))
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield ProcessGroup(rank=dist.get_rank(), size=size, device=chosen)
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


def wrap(network: nn.Module, group: ProcessGroup) -> nn.Module:
    """The network as it is trained: with several devices, gradients are averaged over them."""
    if group.size == 1:
        return network
    ids = [group.device] if group.device.type == "cuda" else None
    # Buffers are equal on all devices already, since batch norm is synchronised.
    return nn.parallel.DistributedDataParallel(network, device_ids=ids, broadcast_buffers=False)


def synchronise_norms(network: nn.Module, group: ProcessGroup) -> None:
    """Let batch norms see the batches of all devices; weights keep their names.

    Raises:
        ConfigError: On several CPU processes, for which torch has no such norm.
    """
    if group.size == 1 or not any(isinstance(m, nn.BatchNorm3d) for m in network.modules()):
        return
    if group.device.type != "cuda":
        raise ConfigError(
            "model.norm = 'batch' needs torch's synchronised batch norm, which only GPUs have: "
            "with several CPU processes, set it to instance or group"
        )
    replace_norms(network)


def replace_norms(network: nn.Module) -> None:
    """Put torch's SyncBatchNorm in the place of every BatchNorm3d, with its weights and statistics, in place."""
    for name, child in list(network.named_children()):
        setattr(network, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))  # type: ignore[no-untyped-call]
