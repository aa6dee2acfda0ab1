"""Checkpoints: written aside and renamed, read without running code, refused where they do not fit."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from data_cache.errors import RunError
from data_cache.files import replacing
from data_cache.records import differences, parse, to_json
from data_cache.schema import PreprocessSpec
from liverseg.training.config import TrainConfig, config_from_json
from liverseg.training.state import TrainState

LAST, BEST = "last.pt", "best.pt"
VERSION = 1
FIXED = ("seed", "data.folds", "data.fold", "data.train_cases", "data.val_cases", "data.split")


def save_checkpoint(path: Path, state: TrainState, config: TrainConfig, spec: PreprocessSpec) -> None:
    """Write a checkpoint so that ``path`` always is a whole one, whenever the process is killed."""
    content = {
        "version": VERSION,
        "software": software(),
        "config": to_json(config),
        "spec": to_json(spec),
        "network": state.network.state_dict(),
        "average": state.average.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "epoch": state.epoch,
        "step": state.step,
        "best_score": state.best_score,
        "history": state.history,
    }
    with replacing(path) as file:
        torch.save(content, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint's content onto the CPU.

    Raises:
        RunError: There is none, it is damaged, of another version, or holds more than plain data.
    """
    if not path.exists():
        raise RunError(f"{path}: no such checkpoint: train first, or name the folder of a run")
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as failure:
        raise RunError(f"{path}: cannot be opened: {failure.strerror}") from failure
    except (
        Exception
    ) as failure:  # whatever unpickling runs into: its words are about torch.load, not about the file
        raise RunError(f"{path}: is no readable checkpoint: {_unreadable(path)}") from failure
    if not isinstance(content, dict) or content.get("version") != VERSION:
        found = content.get("version") if isinstance(content, dict) else type(content).__name__
        raise RunError(f"{path}: checkpoint version {found!r}, this software reads {VERSION}")
    return content


def _unreadable(path: Path) -> str:
    """What is wrong with a file that torch cannot load, and what is left to do."""
    other = path.with_name(BEST if path.name == LAST else LAST)
    size = path.stat().st_size
    if not zipfile.is_zipfile(path):  # the directory of a zip file is at its end
        what = f"truncated, or another kind of file ({size} bytes): copy it again"
    else:
        what = "damaged, or it holds more than plain data, which is not loaded: copy it again"
    left = f"put a copy of {other.name} in its place" if other.exists() else "train again"
    return f"{what}, or {left}"


def restore(state: TrainState, content: dict[str, Any], config: TrainConfig, *, path: Path) -> None:
    """Put a checkpoint's content into ``state``, in place: the only function that does.

    Raises:
        RunError: The checkpoint is of another architecture; says which settings differ.
    """
    saved = config_from_json(content["config"], source=str(path))
    changed = "; ".join(_changed(to_json(saved.model), to_json(config.model), key="model"))
    if changed:
        raise RunError(f"{path}: the checkpoint is of another network ({changed})")
    # The split is the run's own and all chance follows from the seed: another one is another run.
    changed = "; ".join(d for key in FIXED for d in _changed(_part(saved, key), _part(config, key), key=key))
    if changed:
        raise RunError(f"{path}: resuming cannot change these settings ({changed}): name another folder")
    state.network.load_state_dict(content["network"])
    state.average.load_state_dict(content["average"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.epoch, state.step = content["epoch"], content["step"]
    state.best_score, state.history = content["best_score"], list(content["history"])


def check_same_spec(content: dict[str, Any], spec: PreprocessSpec, *, path: Path) -> None:
    """Raises RunError where a checkpoint learnt from a cache that was built otherwise; says what differs."""
    saved = parse(PreprocessSpec, content["spec"], source=str(path), error=RunError)
    changed = "; ".join(
        differences(to_json(saved), to_json(spec), found_in="checkpoint", expected_by="cache", key="spec")
    )
    if changed:
        raise RunError(
            f"{path}: trained from a cache of another spec ({changed}): name the cache it was started with, "
            "or a new folder"
        )


def changes(content: dict[str, Any], config: TrainConfig, *, path: Path) -> Iterator[str]:
    """What else is not as it was when a checkpoint was written: the run goes on, but otherwise than it would have."""
    there = content.get("software", "an earlier version")
    if there != software():
        yield f"software: checkpoint has {there}, this is {software()}"
    saved = config_from_json(content["config"], source=str(path))
    yield from _changed(to_json(saved), to_json(config))


def _changed(saved: Any, config: Any, *, key: str = "") -> Iterator[str]:
    return differences(saved, config, found_in="checkpoint", expected_by="configuration", key=key)


def software() -> str:
    """Versions that decide the numbers of a run."""
    return f"liverseg {version('liverseg')}, torch {torch.__version__}"


def _part(config: TrainConfig, name: str) -> Any:
    return reduce(getattr, name.split("."), config)
