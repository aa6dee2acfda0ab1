"""Training and inference on a pretended CUDA device: what a GPU would refuse or waste is caught without one.

It shows that no tensors of two devices meet, that the host does not wait for the device in a step, that large tensors are
channels-last, and how much memory storages take; nothing of numbers, kernels or speed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_case

from data_cache.schema import PreprocessSpec
from data_cache.writer import open_or_create, write_case
from liverseg.training.config import load_config
from liverseg.training.memory import GIB, step_memory

TESTS = Path(__file__).parent
COMPILER = shutil.which("c++") or shutil.which("g++")

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="loads torch's libraries by their Linux names"),
    pytest.mark.skipif(
        torch.version.cuda is not None, reason="this build of torch has a CUDA device of its own"
    ),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("guard") / "fake_cuda.so"
    include = Path(torch.__file__).parent / "include"
    source = TESTS / "fake_cuda.cpp"
    command = [
        str(COMPILER),
        "-std=c++20",
        "-shared",
        "-fPIC",
        f"-I{include}",
        str(source),
        "-o",
        str(target),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return target


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, spec = tmp_path_factory.mktemp("guard") / "cache.zarr", PreprocessSpec()
    open_or_create(path, spec)
    for i in range(2):
        write_case(path, random_case(f"liver_{i}", seed=i, spec=spec), spec)
    return path


def run(library: Path, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(TESTS / "fake_cuda.py"),
        str(library),
        str(cache),
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=TESTS.parent)


def found(library: Path, cache: Path, *arguments: str) -> Any:
    result = run(library, cache, *arguments)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("precision", "base_channels", "budget_gib"), [("bf16", 64, 7.1), ("fp32", 64, 12.2), ("bf16", 32, 3.4)]
)
def test_a_step_of_the_real_run_fits_its_budget_and_is_channels_last(
    library: Path, cache: Path, precision: str, base_channels: int, budget_gib: float
) -> None:
    setting = f"model.base_channels={base_channels}"
    step = found(library, cache, precision, setting)
    assert step["wrong_layout"] == []
    # Weights, gradients, two moments and the average alone are 1.7 GiB at 64 channels.
    assert 2.0 < step["peak_gib"] < budget_gib
    config = load_config(TESTS.parent / "configs" / "liver.toml", [setting])
    dtype = torch.bfloat16 if precision == "bf16" else None
    estimate = step_memory(config, PreprocessSpec().shape_zyx, dtype).total / GIB
    assert estimate == pytest.approx(step["peak_gib"], rel=0.15)


def test_inference_is_channels_last(library: Path, cache: Path) -> None:
    assert found(library, cache, "segment")["wrong_layout"] == []
    assert found(library, cache, "segment", "contiguous")["wrong_layout"]


@pytest.mark.parametrize(
    ("fault", "words"),
    [("cpu", "at least two devices, cuda:0 and cpu"), ("item", "_local_scalar_dense")],
    ids=["a tensor left on the CPU", "a host that waits"],
)
def test_a_fault_is_caught(library: Path, cache: Path, fault: str, words: str) -> None:
    result = run(library, cache, "bf16", fault)
    assert result.returncode
    assert words in result.stderr
