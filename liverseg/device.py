"""What a network computes on: the device, its precision and its measured peak."""

from __future__ import annotations

import ctypes
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch

from data_cache.errors import ConfigError

Precision = Literal["auto", "bf16", "fp16", "fp32"]
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
PEAK_SECONDS = 0.2
# Of glibc's malloc.h.
MALLOPT_TRIM_THRESHOLD, MALLOPT_MMAP_MAX = -1, -4
GLIBC_TRIM_THRESHOLD, GLIBC_MMAP_MAX = 128 << 10, 65536  # as it starts
TENSOR_CORES = (
    7,
    0,
)  # compute capability of the first cards that multiply fp16 several times faster than float32
COMPILE_PAYS = (8, 0)
CUDNN_FAULTY = (90800, 91500)  # from 9.8.0 on, and mended in 9.15.0


def choose_device(name: str) -> torch.device:
    """The device of that name; ``auto`` takes a CUDA GPU if there is one, else the CPU.

    Raises:
        ConfigError: The name means nothing, there is no such device here, or this torch cannot compute on it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as failure:
        reason = str(failure).splitlines()[0]
        raise ConfigError(f"device {name!r}: not available ({reason}): use auto or cpu") from None
    check_kernels(device)
    if device.type == "cuda":
        _prefer_speed()
    if device.type == "mps":
        warnings.warn(
            "mps lacks some 3-D operators, depending on the version of torch: where one is missing, use cpu",
            stacklevel=2,
        )
    return device


@cache
def check_kernels(device: torch.device) -> None:
    """Compute one small convolution and wait for it: a card may be found that this torch has no kernels for.

    Raises:
        ConfigError: It fails; says on which device, and why.
    """
    try:
        image, weight = (torch.zeros(1, 1, 4, 4, 4, device=device) for _ in range(2))
        torch.nn.functional.conv3d(image, weight).sum().item()
    except (RuntimeError, NotImplementedError) as failure:
        reason = str(failure).splitlines()[0]
        raise ConfigError(
            f"device {str(device)!r}: this build of torch ({torch.__version__}) cannot compute on it ({reason}): "
            f"install a build for this card{_capability_note(device)}, or use cpu"
        ) from failure


def _capability_note(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    return f" (sm_{major}{minor}; this build has {', '.join(torch.cuda.get_arch_list())})"


def _prefer_speed() -> None:
    """Shapes never change, so the fastest convolutions are worth looking for; float32 products use TF32."""
    torch.backends.cudnn.benchmark = True
    # cuDNN's convolutions use TF32 by default. Matrix products must, too: they are the peak that MFU is a share of.
    torch.set_float32_matmul_precision("high")


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """What autocast computes in; None for float32.

    ``auto`` is bfloat16 where the hardware multiplies it natively, else float16 on GPUs with tensor cores for it
    (T4, V100), else float32. torch's own test for bfloat16 also says yes where it is only emulated.
    """
    if precision != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float16 if torch.cuda.get_device_capability(device) >= TENSOR_CORES else None
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if native else None


def training_dtype(
    precision: Precision, device: torch.device, *, slices: int, poolings: int
) -> torch.dtype | None:
    """``autocast_dtype``, but never bfloat16 on a CPU where a level of the network is two slices deep.

    There oneDNN (torch 2.13) makes the bf16 gradient of a convolution's weights from memory that nobody has
    written: mostly zeros, sometimes NaN.

    Args:
        precision: As configured.
        device: Where.
        slices: Depth of the input.
        poolings: Each halves it.
    """
    dtype = autocast_dtype(precision, device)
    two_deep = any(slices >> level == 2 for level in range(poolings + 1))
    return None if dtype == torch.bfloat16 and device.type == "cpu" and two_deep else dtype


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to ``dtype`` on ``device``; does nothing for None."""
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def cudnn_warning(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """What is wrong with this cuDNN where it would be used in ``dtype``; None where nothing is.

    cuDNN 9.8 to 9.14 computes some 3-D convolutions in half precision wrongly (pytorch/pytorch#163539). torch 2.9.0
    takes another path for all of them, and from 2.9.1 on for contiguous tensors, with many times the memory; earlier
    versions use cuDNN as it is. The network is channels-last: only its first convolution can be taken for contiguous.
    """
    version = torch.backends.cudnn.version() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    if version is None or dtype not in (torch.bfloat16, torch.float16):
        return None
    if not CUDNN_FAULTY[0] <= version < CUDNN_FAULTY[1]:
        return None
    name = f"{version // 10000}.{version // 100 % 100}.{version % 100}"
    return (
        f"cuDNN {name} has a fault in 3-D convolutions in {DTYPE_NAMES[dtype]}: they may be wrong, or take another path "
        "that needs more memory: install cuDNN 9.15 or newer, or compute with precision = fp32"
    )


def compiles(compile_network: bool | Literal["auto"], device: torch.device, *, devices: int) -> bool:
    """Whether ``torch.compile`` is used: as asked, or with ``auto`` on one modern GPU, where it pays."""
    if compile_network != "auto":
        return compile_network
    if device.type != "cuda" or devices > 1:
        return False
    return torch.cuda.get_device_capability(device) >= COMPILE_PAYS


@contextmanager
def freed_memory_reused(device: torch.device) -> Iterator[None]:
    """Have this process keep what it frees for its next tensors while the block runs, and give it back at its end.

    glibc unmaps every large block that is freed, and the system clears its pages again at the next step: a quarter
    of the time of a training step of 8 base channels on a CPU. The peak is some 10 % higher for it. It does nothing
    on other devices or without glibc.
    """
    if device.type != "cpu" or sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        yield
        return
    libc.mallopt(MALLOPT_MMAP_MAX, 0)
    libc.mallopt(MALLOPT_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        libc.mallopt(MALLOPT_MMAP_MAX, GLIBC_MMAP_MAX)
        libc.mallopt(MALLOPT_TRIM_THRESHOLD, GLIBC_TRIM_THRESHOLD)
        libc.malloc_trim(0)


@cache
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product: what a network could reach at most here.

    Measured once per process, in about a fifth of a second; the fastest repeat counts.
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
