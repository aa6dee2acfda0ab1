"""Where a run comes from: everything besides its configuration and split that repeating it needs."""

from __future__ import annotations

import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from data_cache.files import read_json, write_json
from data_cache.outputs import require_replaceable
from data_cache.reader import CacheStore
from data_cache.records import to_json
from liverseg.training.process_group import ProcessGroup
from liverseg.training.training_data import TrainingData

RUN = "run.json"
RUN_MARK = re.compile(rb'\[\s*\{\s*"time": "[^"]*",\s*"command": ')
LIBRARIES = ("liverseg", "torch", "numpy", "zarr", "numcodecs")


def require_own_run(run: Path, names: Iterable[str]) -> None:
    """Check that training may write into a folder: its ``run.json`` says that it is a run, or none of these names exist.

    Args:
        run: The folder, without a checkpoint to resume from.
        names: What training writes besides ``run.json``, which is written first.

    Raises:
        OutputError: A file would be replaced that ``liverseg train`` did not write.
    """
    require_replaceable(run / RUN, RUN_MARK, command="train")
    for name in () if (run / RUN).exists() else names:
        require_replaceable(run / name, RUN_MARK, command="train")


def record_start(run: Path, store: CacheStore, group: ProcessGroup, training: TrainingData) -> None:
    """Add a start to ``run.json``, a list: a run that is resumed may go on elsewhere.

    Raises:
        OutputError: There is a file of this name that ``liverseg train`` did not write.
    """
    path = run / RUN
    require_replaceable(path, RUN_MARK, command="train")
    try:
        starts = list(read_json(path))
    except (OSError, ValueError, TypeError):
        starts = []  # none yet, or nothing that could be kept
    starts.append(_start(store, group, training))
    write_json(path, starts)


def _start(store: CacheStore, group: ProcessGroup, training: TrainingData) -> dict[str, Any]:
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "cuda": torch.version.cuda,
        "commit": git_commit(Path(__file__).parent),
        "device": device_name(group.device),
        "devices": group.size,
        "cache": str(store.path.resolve()),
        "cache_fingerprint": store.schema.fingerprint,
        "cache_spec": to_json(store.schema.spec),
        "cache_software": store.schema.software,
        "training": to_json(training),
    }


def git_commit(folder: Path) -> str | None:
    """The commit that is checked out around a folder, with ``-dirty`` where files differ; None outside of git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def device_name(device: torch.device) -> str:
    """The device as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device}: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
