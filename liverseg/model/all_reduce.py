"""Sums over the devices of a run, with gradients: what a loss over a global batch is made of."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def devices() -> int:
    """Processes that train together: 1 outside of ``torchrun``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(values: Tensor) -> Tensor:
    """Σ over devices, the same on each.

    Its gradient is summed over devices, too: it is that of the sum of all devices' losses, of which
    DistributedDataParallel's mean makes that of one loss, when all devices compute the same one from the totals.
    """
    if devices() == 1:
        return values
    result: Tensor = _Total.apply(values)  # type: ignore[no-untyped-call]
    return result


def all_reduce_logsumexp(log_values: Tensor) -> Tensor:
    """log Σ exp over devices, without under- or overflow; one of -∞ adds nothing, and all may not be."""
    if devices() == 1:
        return log_values
    largest = log_values.detach().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest + all_reduce_sum((log_values - largest).exp()).log()


class _Total(torch.autograd.Function):
    """``torch.distributed.nn.functional.all_reduce``, which torch has deprecated for one without a gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # noqa: ARG004
        values = values.contiguous().clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        return gradient
