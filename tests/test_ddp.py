"""Several processes train as one does, end cleanly, and their run goes on in one."""

from __future__ import annotations

import os
import shutil
import socket
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
from liverseg.training.checkpoint import LAST, content_checksum, load_checkpoint
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


def nodes(runs: Sequence[Path], *arguments: str | Path) -> list[tuple[int, str]]:
    """Two processes as on two machines, which know of each other by their addresses alone: exit codes and output.

    Args:
        runs: The folder of each.
        arguments: Of ``train_in_processes.py``: the cache, and what follows the run.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cache, *rest = map(str, arguments)
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "train_in_processes.py"), cache, str(run), *rest],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=TESTS,
            env={**os.environ, **common, "RANK": str(rank)},
        )
        for rank, run in enumerate(runs)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in started]
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


def weights(output: str) -> str:
    (line,) = (line for line in output.splitlines() if line.startswith("weights "))
    return line


def test_nodes_that_share_no_disk_resume_as_those_that_do(tiny_world: TinyWorld, tmp_path: Path) -> None:
    """Only the main process's folder has a checkpoint; the other's is not even there."""
    begun = replace(alone(2), optim=replace(alone(2).optim, epochs=1))
    train(tiny_world.store, tmp_path / "shared", begun, resume=False, watcher=SILENT)
    shutil.copytree(tmp_path / "shared", tmp_path / "main")
    save_config(alone(1), tmp_path / "two.toml")
    ended = {}
    for name, runs in (("shared", ("shared", "shared")), ("apart", ("main", "other"))):
        found = nodes([tmp_path / run for run in runs], tiny_world.cache, tmp_path / "two.toml")
        assert [code for code, _ in found] == [0, 0], found
        ended[name] = [weights(output) for _, output in found]
    assert len({*ended["shared"], *ended["apart"]}) == 1
    shared, apart = (load_checkpoint(tmp_path / run / LAST) for run in ("shared", "main"))
    assert [row["epoch"] for row in apart["history"]] == [1, 2]
    assert content_checksum(apart["average"]) == content_checksum(shared["average"])
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "fault", ["fetch", "begin"], ids=["one process of two", "the main process, before they start"]
)
def test_an_error_of_the_machine_s_ends_both_processes(
    tiny_world: TinyWorld, tmp_path: Path, fault: str
) -> None:
    save_config(alone(1), tmp_path / "two.toml")
    found = nodes([tmp_path / "a", tmp_path / "b"], tiny_world.cache, tmp_path / "two.toml", fault)
    ended = time.time()
    assert all(code for code, _ in found), found
    output = "".join(output for _, output in found)
    assert "OSError: the disk is gone" in output
    if fault == "begin":
        assert "the main process failed: OSError: the disk is gone" in found[1][1]
    (failed,) = (float(line.split()[-1]) for line in output.splitlines() if line.startswith("failed at "))
    assert ended - failed < 30


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
    network = UNet(NetworkConfig(base_channels=2, depth=1, norm="batch"))
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
