"""A pretended CUDA device: shapes, dtypes, layouts, devices and storages of tensors, and no numbers.

Run in a process of its own, since what it loads and patches stays: ``python tests/fake_cuda.py LIBRARY CACHE CHECK``, where
LIBRARY is ``fake_cuda.cpp`` compiled, and CHECK ``segment`` or a precision, with settings after it. Tensors on ``cuda:0`` are fake (torch's FakeTensorMode); those on the CPU are real, so
that drawing and reading work. An operation on tensors of two devices raises, and so does ``.item()`` on the pretended device.
"""

# mypy: ignore-errors
# What asks for a real device is replaced by name, which no type allows.

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import importlib.util

    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    for library in (Path(spec.origin).parent / "lib" / "libtorch_cpu.so", Path(sys.argv[1])):
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
TESTS = Path(__file__).resolve().parent
LARGE = 1 << 20  # elements of a tensor whose layout matters


class FakeCuda(FakeTensorMode):
    """Counts the bytes of the storages on the device, and the large convolutions in the wrong layout."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes_now = self.bytes_peak = 0
        self.wrong_layout: list[str] = []

    @property
    def avoid_device_init(self) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        on_device = (isinstance(x, torch.device) and x.type == "cuda" for x in leaves)
        if not any(isinstance(x, FakeTensor) for x in leaves) and not any(on_device):
            return func(*args, **(kwargs or {}))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        found = [x for x in tree_leaves(result) if isinstance(x, FakeTensor) and x.fake_device.type == "cuda"]
        for tensor in found:
            self._track(tensor)
        if "convolution" in str(func) and found:  # the first is an activation or its gradient
            self._look_at_layout(found[0], str(func))
        return result

    def _track(self, tensor: FakeTensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.alive:
            return
        self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.bytes_now += storage.nbytes()
        if self.bytes_now > self.bytes_peak:
            self.forget_freed()
            self.bytes_peak = max(self.bytes_peak, self.bytes_now)

    def forget_freed(self) -> None:
        """Bring ``bytes_now`` up to date; done only when it matters, since it looks at every storage."""
        for key in [key for key, (alive, _) in self.alive.items() if alive.expired()]:
            self.bytes_now -= self.alive.pop(key)[1]

    def _look_at_layout(self, tensor: FakeTensor, name: str) -> None:
        matters = tensor.dim() == 5 and tensor.numel() > LARGE and tensor.shape[1] > 1
        if matters and not tensor.is_contiguous(memory_format=torch.channels_last_3d):
            self.wrong_layout.append(f"{name} {tuple(tensor.shape)}")


def _move(module: nn.Module, *args: Any, **options: Any) -> nn.Module:
    """``Module.to`` as new parameters: in place, torch cannot change a tensor's device under the mode."""
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, value in store.items():
                if value is not None and (value.dim() == 5 or "memory_format" not in options):
                    moved = value.detach().to(*args, **options)
                    is_weight = isinstance(value, nn.Parameter)
                    store[name] = (
                        nn.Parameter(moved, requires_grad=value.requires_grad) if is_weight else moved
                    )
    return module


@contextmanager
def fake_cuda(*, native_bf16: bool = True) -> Iterator[FakeCuda]:
    """The mode, with what asks for a real device answered."""
    from liverseg.model.network import UNet
    from liverseg.training import augment, train

    def noise(image: Tensor, *, seed: int) -> Tensor:  # noqa: ARG001 (a generator needs a real device)
        return torch.randn(image.shape, device=image.device, dtype=image.dtype)

    answers: dict[str, Callable[..., object]] = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: native_bf16 or including_emulation,
        "get_device_capability": lambda _=None: (8, 0) if native_bf16 else (7, 5),
        "mem_get_info": lambda _=None: (int(15e9), int(16e9)),
        "synchronize": lambda _=None: None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    Tensor.pin_memory = lambda self, *_: self
    UNet.to = _move
    augment._noise_like = noise
    train.matmul_peak = lambda *_: 1e12
    train.Prefetch = _Eager
    with FakeCuda() as mode:
        yield mode


class _Eager:
    """Fetches in this thread, where the mode is on."""

    waited_s = 0.0

    def __init__(self, items: Any, fetch: Callable[[Any], Any]) -> None:
        self._batches = map(fetch, items)

    def __iter__(self) -> Iterator[Any]:
        return self._batches


def train_steps(cache: Path, *, overrides: Sequence[str], fault: str = "") -> dict[str, Any]:
    """Two steps of ``configs/liver.toml``; peak of the second, and what was convolved in the wrong layout."""
    from data_cache.reader import CacheStore
    from liverseg.training import train as trainer_module
    from liverseg.training.callbacks import SILENT
    from liverseg.training.config import load_config
    from liverseg.training.process_group import ProcessGroup
    from liverseg.training.split import Split
    from liverseg.training.state import new_state

    store = CacheStore.open(cache)
    config = load_config(TESTS.parent / "configs" / "liver.toml", [*overrides, "compile=false"])
    config = replace(
        config, optim=replace(config.optim, steps_per_epoch=1), watch=replace(config.watch, log_every=99)
    )
    with fake_cuda() as mode:
        _break(fault)
        state = new_state(config, CUDA)
        split = Split(train=store.case_ids, val=store.case_ids[:1], train_sha256=())
        group = ProcessGroup(rank=0, size=1, device=CUDA)
        trainer = trainer_module.Trainer(store, split, config, group, state)
        # In the first step torch tries its own decompositions, whose tensors no device would hold.
        for _ in range(2):
            mode.forget_freed()
            mode.bytes_peak = mode.bytes_now
            _one_step(trainer, SILENT)
    held = trainer.volumes.size_bytes / 2**30
    return {"peak_gib": mode.bytes_peak / 2**30 - held, "wrong_layout": mode.wrong_layout}


def _one_step(trainer: Any, watcher: Any) -> None:  # noqa: ARG001
    import numpy as np

    from liverseg.training.stream import epoch_draws

    optim = trainer.config.optim
    count = optim.batch_size * optim.accumulate
    draws = epoch_draws(trainer.metas, trainer.config.data, count=count, rng=np.random.default_rng(0))
    trainer.state.network.train()
    batches = (trainer.volumes.fetch(draws[part]) for part in trainer._parts())
    trainer._step(batches, draws, torch.Generator().manual_seed(0))


def segment_once(cache: Path, *, fault: str = "") -> dict[str, Any]:
    """One look of the predictor at a scan."""
    from data_cache.reader import CacheStore
    from liverseg.inference.segment import Member, Predictor
    from liverseg.model.inputs import InputConfig
    from liverseg.model.network import NetworkConfig, Norm, UNet, to_channels_last

    spec = CacheStore.open(cache).schema.spec
    with fake_cuda() as mode:
        # Group norm gives channels last whatever comes in: only with another does a forgotten layout go on.
        norm: Norm = "batch" if fault == "contiguous" else "group"
        network = UNet(NetworkConfig(norm=norm)).eval().to(CUDA)
        if fault != "contiguous":
            to_channels_last(network)
        member = Member(network=network, input=InputConfig(), source="")
        predictor = Predictor(members=(member,), spec=spec, device=CUDA, dtype=torch.bfloat16)
        with torch.no_grad():
            image = torch.zeros(1, 1, *spec.shape_zyx, dtype=torch.int16).to(CUDA)
            found = predictor._probabilities(member, image)
    assert found.device == CUDA
    return {"peak_gib": mode.bytes_peak / 2**30, "wrong_layout": mode.wrong_layout}


def _break(fault: str) -> None:
    """Put in a fault that the guard must catch."""
    from liverseg.training import train

    whole = train.add_background
    if fault == "cpu":
        train.add_background = lambda x: whole(x).cpu()  # a tensor left on the CPU
    if fault == "item":
        train.add_background = lambda x: whole(x) * (1 + x.sum().item())  # the host waits


if __name__ == "__main__":
    # torch 2.13 aborts where a collection clears a fake tensor that C++ still holds; references alone free the storages.
    gc.disable()
    _, _, cache_path, check, *rest = sys.argv
    name = next((word for word in rest if "=" not in word), "")
    settings = [f"precision={check}", *(word for word in rest if "=" in word)]
    found = (
        segment_once(Path(cache_path), fault=name)
        if check == "segment"
        else train_steps(Path(cache_path), overrides=settings, fault=name)
    )
    print(json.dumps(found), flush=True)
    import os

    os._exit(0)  # the pretended device has nothing that could be torn down
