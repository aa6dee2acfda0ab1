"""Several processes train as one does, end cleanly, and their run goes on in one."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import SILENT, TinyWorld, tiny_config
from torch import nn

from data_cache.errors import ConfigError
from liverseg.model.network import NetworkConfig, UNet
from liverseg.training.checkpoint import LAST, load_checkpoint
from liverseg.training.config import TrainConfig, save_config
from liverseg.training.process_group import ProcessGroup, process_group, replace_norms, synchronise_norms
from liverseg.training.train import train

TESTS = Path(__file__).parent


def torchrun(arguments: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """Two processes that find each other on a free port of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=180, cwd=TESTS
    )


def alone(batch_size: int) -> TrainConfig:
    """What one process does as two do: no dropout, which draws on each device something else, no batch norm."""
    config = tiny_config(epochs=2)
    return replace(
        config,
        model=NetworkConfig(base_channels=2, depth=2, norm="instance", deep_supervision=True),
        optim=replace(config.optim, batch_size=batch_size, accumulate=2, learning_rate=1e-3),
    )


def test_two_processes_learn_what_one_does_and_one_goes_on(tiny_world: TinyWorld, tmp_path: Path) -> None:
    save_config(alone(1), tmp_path / "two.toml")
    arguments: list[str | Path] = ["-m", "liverseg", "train", tiny_world.cache, tmp_path / "two"]
    result = torchrun([*arguments, "--config", tmp_path / "two.toml"])
    # Nothing more than a word of torchrun's on threads: gloo, ended in the wrong order, aborts.
    assert result.returncode == 0, result.stderr
    assert "terminate" not in result.stderr
    assert result.stdout.count("epoch   2/2") == 1  # one process speaks
    train(tiny_world.store, tmp_path / "one", alone(2), resume=False, watcher=SILENT)
    two, one = (load_checkpoint(tmp_path / run / LAST) for run in ("two", "one"))
    for name in ("train_loss", "val_loss", "val_dice_liver"):
        for a, b in zip(two["history"], one["history"], strict=True):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
    for name, value in two["average"].items():
        # A gradient of nearly nothing is a full step of Adam's in either direction, here at most 6 of 1e-3.
        torch.testing.assert_close(value, one["average"][name], rtol=1e-2, atol=1e-3)

    longer = replace(alone(2), optim=replace(alone(2).optim, epochs=3))
    state = train(tiny_world.store, tmp_path / "two", longer, resume=True, watcher=SILENT)
    assert (state.epoch, state.step) == (3, 9)


def test_a_process_that_fails_ends_all_with_its_message(tiny_world: TinyWorld, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LAST).write_bytes(b"spoilt")
    save_config(alone(1), tmp_path / "two.toml")
    arguments: list[str | Path] = ["-m", "liverseg", "train", tiny_world.cache, tmp_path / "run", "--resume"]
    start = time.monotonic()
    result = torchrun([*arguments, "--config", tmp_path / "two.toml"])
    assert result.returncode
    assert "not a readable checkpoint" in result.stderr
    assert "terminate" not in result.stderr
    assert time.monotonic() - start < 120  # neither waits for the other, as collectives do for half an hour


def test_more_processes_than_gpus_and_a_named_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("WORLD_SIZE", "3"), ("LOCAL_WORLD_SIZE", "3"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(
            ConfigError, match="3 processes on this machine, which has 2 GPUs: use --nproc-per-node=2"
        ),
        process_group("auto"),
    ):
        pass
    with pytest.raises(ConfigError, match="gives each process a GPU of its own"), process_group("cuda:1"):
        pass


def test_losses_over_devices_are_those_of_the_whole_batch() -> None:
    result = torchrun([TESTS / "losses_in_processes.py"])
    assert result.returncode == 0, result.stderr
    assert "terminate" not in result.stderr


def test_shares_and_gathering_alone_change_nothing() -> None:
    group = ProcessGroup(rank=0, size=1, device=torch.device("cpu"))
    assert group.gather(group.share([3, 1, 2])) == [3, 1, 2]
    assert group.is_main_process


def test_batch_norm_is_refused_on_several_cpus_and_replaced_on_gpus() -> None:
    network = UNet(NetworkConfig(base_channels=2, depth=1))
    with pytest.raises(ConfigError, match="set it to instance or group"):
        synchronise_norms(network, ProcessGroup(rank=0, size=2, device=torch.device("cpu")), compiled=False)
    with pytest.raises(ConfigError, match="compile = true breaks"):
        synchronise_norms(network, ProcessGroup(rank=0, size=2, device=torch.device("cuda")), compiled=True)
    names = list(network.state_dict())
    parameters = list(network.parameters())
    replace_norms(network)
    assert not any(isinstance(m, nn.BatchNorm3d) for m in network.modules())
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in network.modules()) == 6
    assert list(network.state_dict()) == names
    # The optimizer holds these very parameters.
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))


def test_instance_norm_needs_no_synchronising() -> None:
    network = UNet(NetworkConfig(base_channels=2, depth=1, norm="instance"))
    synchronise_norms(network, ProcessGroup(rank=0, size=2, device=torch.device("cpu")), compiled=False)
