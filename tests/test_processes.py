"""Which process has ended: not one that runs, not one of another machine, and not by its number alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_cache.processes import has_ended, own_machine, own_name, process_name


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits for its end."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_a_process_has_ended_when_it_is_over(process: subprocess.Popen[bytes]) -> None:
    name = process_name(process.pid)
    assert not has_ended(name)
    process.kill()
    process.wait()
    assert has_ended(name)


def test_a_zombie_has_ended(process: subprocess.Popen[bytes]) -> None:
    name = process_name(process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # over, but nobody has asked for its exit code
    assert Path(f"/proc/{process.pid}").exists() or not Path("/proc").exists()
    assert has_ended(name)


def test_a_process_has_ended_whose_number_another_one_has_now(process: subprocess.Popen[bytes]) -> None:
    time.sleep(0.05)  # starts are counted in hundredths of a second
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as later:
        start = process_name(process.pid).rpartition("-")[2]
        machine, _, pid_and_start = process_name(later.pid).rpartition("@")
        assert not has_ended(f"{machine}@{pid_and_start}")
        assert has_ended(f"{machine}@{later.pid}-{start}")
        later.communicate(b"\n")


def test_where_starts_are_not_known_a_running_number_counts(process: subprocess.Popen[bytes]) -> None:
    assert not has_ended(f"{own_machine()}@{process.pid}-0")
    assert not has_ended(f"{own_machine()}@1-0")  # not ours to signal, but running


def test_processes_of_other_machines_and_containers_may_be_running(process: subprocess.Popen[bytes]) -> None:
    pid_and_start = process_name(process.pid).rpartition("@")[2]
    process.kill()
    process.wait()
    assert has_ended(f"{own_machine()}@{pid_and_start}")
    assert own_machine() != f"{socket.gethostname()}+1"
    for machine in ("elsewhere", f"{own_machine()}-b", f"{socket.gethostname()}+1"):
        assert not has_ended(f"{machine}@{pid_and_start}")


@pytest.mark.parametrize("name", ["", "a", f"{own_machine()}@", f"{own_machine()}@1", f"{own_machine()}@x-1"])
def test_what_is_not_the_name_of_a_process_has_not_ended(name: str) -> None:
    assert not has_ended(name)


def test_a_number_that_no_process_can_have_has_ended() -> None:
    assert has_ended(f"{own_machine()}@{10**30}-5")


def test_a_forked_process_has_a_name_of_its_own() -> None:
    code = (
        "import os; from data_cache.processes import own_name; print(own_name(), flush=True); "
        "pid = os.fork(); pid and os.wait(); pid or print(own_name(), flush=True)"
    )
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = names.stdout.split()
    assert first != second
    assert own_name() not in (first, second)
