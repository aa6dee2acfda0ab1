"""What the machine refuses: each in one line that says which memory, disk or right, and what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from tiny import TinyWorld

from data_cache.files import partial_name
from liverseg.cli import main
from liverseg.cli.failures import memory_message, operator_message, os_message
from liverseg.training.config import load_config

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    return lambda *arguments: CliRunner().invoke(main, [str(a) for a in arguments])


def error_line(result: Result) -> str:
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("error:")]
    return line


def caught(provoke: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as info:  # noqa: PT011 (which one is what is tested)
        provoke()
    return info.value


# ---- memory


def test_arrays_that_no_machine_holds() -> None:
    """The libraries' own errors: their words change with versions."""
    numpy_failure = caught(lambda: np.ones((1 << 20, 1 << 20, 1 << 10), dtype=np.float64))
    message = memory_message(numpy_failure, "preprocess")
    assert message == (
        "out of main memory (8.00 PiB more were requested): use --jobs 1, or close other programs"
    )
    torch_failure = caught(lambda: torch.empty(1 << 50, dtype=torch.float64))
    message = memory_message(torch_failure, "train")
    assert message is not None
    assert message.startswith("out of main memory (9007199254740992 bytes more were requested): use a")
    assert "optim.batch_size=1" in message
    assert memory_message(OSError(errno.ENOMEM, "Cannot allocate memory"), None) is not None


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", "--set optim.batch_size=1"),
        ("train", "--set recompute=true"),
        ("train", "--set data.resident=memory"),
        ("train", "--set precision=fp16"),
        ("predict", "--device cpu"),
        ("bench", "close other programs that use it, or use bench train --base-channels 32"),
    ],
)
def test_a_full_gpu(command: str, words: str) -> None:
    failure = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 8 GiB"
    )
    message = memory_message(failure, command)
    assert message is not None
    assert message.startswith("out of GPU memory (2.00 GiB more were requested): ")
    assert words in message
    assert memory_message(RuntimeError("CUDA error: out of memory"), command) is not None


def test_what_is_advised_exists() -> None:
    advised = [
        "optim.batch_size=1",
        "optim.accumulate=2",
        "recompute=true",
        "data.resident=memory",
        "precision=fp16",
    ]
    config = load_config(None, [*advised, "model.base_channels=16"])
    assert (config.recompute, config.data.resident) == (True, "memory")


def test_other_errors_are_not_about_memory() -> None:
    for failure in (
        RuntimeError("shapes do not fit"),
        KeyError("memory"),
        OSError(errno.ENOENT, "No such file"),
    ):
        assert memory_message(failure, "train") is None


@pytest.mark.parametrize("failure", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_a_command_without_memory_says_so(
    run: Run, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr("data_cache.reader.CacheStore.open", fail)
    line = error_line(run("train", "cache", "run"))
    assert "memory: use a smaller batch" in line
    assert "internal" not in line


# ---- what a device lacks

NOT_ON_MPS = (
    "The operator 'aten::max_pool3d_with_indices' is not currently implemented for the MPS device. If you want this op "
    "to be considered for addition please comment on a page. As a temporary fix, you can set the environment variable "
    "`PYTORCH_ENABLE_MPS_FALLBACK=1` to use the CPU as a fallback for this op."
)
NOT_RUN = "Could not run 'aten::slow_conv3d_forward' with arguments from the 'MPS' backend. 'aten::…' is only available"


@pytest.mark.parametrize(
    ("words", "operator"), [(NOT_ON_MPS, "max_pool3d_with_indices"), (NOT_RUN, "slow_conv3d_forward")]
)
def test_a_missing_operator_is_named(words: str, operator: str) -> None:
    failure = NotImplementedError(words)
    for command, remedy in (("train", "use --set device=cpu"), ("predict", "use --device cpu")):
        assert operator_message(failure, command) == (
            f"this build of torch cannot compute {operator} on mps: {remedy}, or set PYTORCH_ENABLE_MPS_FALLBACK=1 to "
            "compute that operator alone on the CPU"
        )
    assert operator_message(RuntimeError(words), "train") is None
    assert operator_message(NotImplementedError("a method of ours"), "train") is None


def test_a_command_that_meets_a_missing_operator_says_so(
    run: Run, tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lack(*_: Any, **__: Any) -> None:
        raise NotImplementedError(NOT_ON_MPS)

    monkeypatch.setattr(torch.nn.MaxPool3d, "forward", lack)
    image = tiny_world.raw / "imagesTr" / "liver_0.nii.gz"
    line = error_line(run("predict", tiny_run, image, "--out", tmp_path / "out"))
    assert (
        f"{image}: this build of torch cannot compute max_pool3d_with_indices on mps: use --device cpu"
        in line
    )
    line = error_line(
        run(
            "train",
            tiny_world.cache,
            tmp_path / "run",
            "--set",
            "model.depth=2",
            "--set",
            "model.base_channels=2",
            "--set",
            "device=cpu",
        )
    )
    assert "max_pool3d_with_indices on mps: use --set device=cpu" in line
    assert "internal" not in line


# ---- files


def test_a_file_where_a_folder_should_be(
    run: Run, tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("a file")
    image = tiny_world.raw / "imagesTr" / "liver_0.nii.gz"
    line = error_line(run("predict", tiny_run, image, "--out", tmp_path / "taken" / "deeper" / "out"))
    assert (
        line
        == f"error: {tmp_path / 'taken'}: is a file where a folder should be: choose another folder, or move the file away"
    )
    line = error_line(
        run("train", tiny_world.cache, tmp_path / "taken" / "run", "--set", "model.base_channels=2")
    )
    assert "taken: is a file where a folder should be" in line


def test_a_full_disk(run: Run, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    line = error_line(run("export", tiny_run, tmp_path / "m.safetensors"))
    assert line.startswith("error: the disk is full: free some space or choose a path on another disk")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.EACCES, "model.pt: permission denied: choose another path, or change its permissions"),
        (errno.EROFS, "model.pt: the disk is mounted read-only"),
        (errno.EISDIR, "model.pt: is a folder where a file should be"),
        (errno.ENOENT, "model.pt: no such file or folder"),
        (errno.ENOSPC, "model.pt: the disk is full"),
        (errno.EIO, f"model.pt: {os.strerror(errno.EIO)}"),
    ],
)
def test_each_refusal_is_a_sentence_about_a_file(code: int, words: str) -> None:
    assert words in os_message(OSError(code, os.strerror(code), "/x/model.pt"))
    # While it is written it has a name that nobody knows.
    assert os_message(OSError(code, os.strerror(code), f"/x/{partial_name('model.pt')}")).startswith(
        f"/x/{words}"
    )
    assert "Errno" not in os_message(OSError(code, os.strerror(code), "/x/model.pt"))


def test_a_connection_has_no_file() -> None:
    assert os_message(ConnectionResetError("the line is dead")) == "the line is dead"
    assert "Connection refused" in os_message(
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
    )
