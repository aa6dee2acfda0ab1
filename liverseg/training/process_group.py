"""The processes that train together under ``torchrun``, each with a device of its own."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_cache.errors import ConfigError, LiversegError, RunError
from data_cache.text import pluralise
from liverseg.device import choose_device

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessGroup:
    """The processes that train together, each with a device of its own; one that trains alone is a group of 1.

    Attributes:
        rank: Number of this process, from 0; the main process, number 0, writes the files.
        size: Number of processes.
        device: The device of this process.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Σ over the processes, the same on all; without gradient. The argument is left alone."""
        if self.size == 1:
            return values
        result = values.clone()
        dist.all_reduce(result)
        return result

    def gather(self, items: Sequence[T]) -> list[T]:
        """The items of all processes, on all; item i of process r is at r + i · size, the order that ``share`` took apart."""
        if self.size == 1:
            return list(items)
        parts: list[list[tuple[int, T]] | None] = [None] * self.size
        dist.all_gather_object(parts, [(self.rank + i * self.size, item) for i, item in enumerate(items)])
        numbered = [pair for part in parts if part is not None for pair in part]
        return [item for _, item in sorted(numbered, key=lambda pair: pair[0])]

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of some work: every ``size``-th item."""
        return items[self.rank :: self.size]

    def from_main(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in the main process, in all of them: nodes need not share a disk.

        Raises:
            LiversegError: ``make`` raised it in the main process; raised in all, so that none waits for it. Of another
                exception the others raise a RunError with its words.
        """
        if self.size == 1:
            return make()
        made: list[T | LiversegError | None] = [None]
        if self.is_main_process:
            try:
                made = [make()]
            except LiversegError as failure:
                made = [failure]
            except Exception as failure:
                # The others would wait for what never comes; the failure itself may hold what cannot be sent.
                said = RunError(f"the main process failed: {type(failure).__name__}: {failure}")
                dist.broadcast_object_list([said], src=0)
                raise
        dist.broadcast_object_list(made, src=0)
        if isinstance(made[0], LiversegError):
            raise made[0]
        return cast("T", made[0])


def is_main_process() -> bool:
    """Whether this process is the one that prints, before it has joined its group."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def process_group(device: str) -> Iterator[ProcessGroup]:
    """The group that ``torchrun`` has started this process in; a group of one without it.

    Raises:
        ConfigError: The device does not exist here, or there are more processes than GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ProcessGroup(rank=0, size=1, device=choose_device(device))
        return
    chosen = choose_device(_own_device(device))
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield ProcessGroup(rank=dist.get_rank(), size=size, device=chosen)
    except Exception:
        # A process that fails must end at once with its message, by which torchrun ends the others: it neither waits
        # for them while they wait for it, nor lets the threads of its group abort it while Python winds down.
        atexit.register(_end)
        raise
    dist.barrier()
    # gloo aborts the process at its end when a reducer outlives its group: models must be gone before it.
    gc.collect()
    dist.destroy_process_group()


def _end() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _own_device(name: str) -> str:
    """This process's device, made current before anything is computed: contexts on the first GPU would cost its memory."""
    if name == "cpu" or not (name.startswith("cuda") or torch.cuda.is_available()):
        return name
    if name not in ("auto", "cuda"):
        raise ConfigError(f"device {name!r}: torchrun gives each process a GPU of its own: use auto or cuda")
    local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local_rank >= gpus:
        started = os.environ.get("LOCAL_WORLD_SIZE", "more")
        raise ConfigError(
            f"torchrun started {started} processes on this machine, which has {pluralise(gpus, 'GPU')}: "
            f"use --nproc-per-node={max(1, gpus)}"
        )
    torch.cuda.set_device(local_rank)
    return f"cuda:{local_rank}"


def wrap(network: nn.Module, group: ProcessGroup) -> nn.Module:
    """The network as it is trained: with several devices, gradients are averaged over them."""
    if group.size == 1:
        return network
    ids = [group.device] if group.device.type == "cuda" else None
    # Buffers are equal on all devices already, since batch norm is synchronised.
    return nn.parallel.DistributedDataParallel(
        network, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def synchronise_norms(network: nn.Module, group: ProcessGroup, *, compiled: bool) -> None:
    """Let batch norms see the batches of all devices; weights keep their names.

    Raises:
        ConfigError: On several CPU processes, for which torch has no such norm, or with ``torch.compile``.
    """
    if group.size == 1 or not any(isinstance(m, nn.BatchNorm3d) for m in network.modules()):
        return
    if group.device.type != "cuda":
        raise ConfigError(
            "model.norm = 'batch' needs torch's synchronised batch norm, which only GPUs have: "
            "with several CPU processes, set it to instance or group"
        )
    if compiled:
        raise ConfigError(
            "compile = true breaks at each of torch's synchronised batch norms: with several devices, set it to "
            "false, or model.norm to instance or group"
        )
    replace_norms(network)


def replace_norms(network: nn.Module) -> None:
    """Put torch's SyncBatchNorm in the place of every BatchNorm3d, with its weights and statistics, in place."""
    for name, child in list(network.named_children()):
        setattr(network, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))  # type: ignore[no-untyped-call]
