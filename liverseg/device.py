"""What a network computes on: the device, its precision and its measured peak."""

from __future__ import annotations

import ctypes
import sys
import time
from functools import cache
from typing import Literal

import torch

from data_cache.errors import ConfigError

Precision = Literal["auto", "bf16", "fp32"]
PEAK_SECONDS = 0.2
# Of glibc's malloc.h.
MALLOPT_TRIM_THRESHOLD, MALLOPT_MMAP_MAX = -1, -4


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


def reuse_freed_memory() -> None:
    """Have this process keep what it frees for its next tensors, instead of giving it back to the system.

    glibc unmaps every large block that is freed, and the system clears its pages again at the next step: a quarter
    of the time of a training step of 8 base channels on a CPU. The peak is some 10 % higher for it. Without effect
    where there is no glibc.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(MALLOPT_MMAP_MAX, 0)
        libc.mallopt(MALLOPT_TRIM_THRESHOLD, -1)


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
