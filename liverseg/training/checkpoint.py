"""Checkpoints: checksummed, written aside and renamed, read without running code, refused where they do not fit."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_cache.errors import RunError
from data_cache.files import replacing
from data_cache.records import differences, parse, to_json
from data_cache.schema import PreprocessSpec
from liverseg.training.config import TrainConfig, config_from_json
from liverseg.training.state import TrainState
from liverseg.training.training_data import TrainingData

LAST, BEST = "last.pt", "best.pt"
VERSION = 2
FIXED = ("seed", "data.folds", "data.fold", "data.train_cases", "data.val_cases", "data.split")
CHECKSUM = "sha256"
# What only resuming needs: best.pt is applied, and goes without it.
RESUMES = ("network", "optimizer", "scaler")


def snapshot(
    state: TrainState, config: TrainConfig, spec: PreprocessSpec, training: TrainingData | None = None
) -> dict[str, Any]:
    """A checkpoint's content as it is now: tensors are copied to main memory, and training can go on."""
    content: dict[str, Any] = _copied(
        {
            "version": VERSION,
            "software": software(),
            "config": to_json(config),
            "spec": to_json(spec),
            "training": None if training is None else to_json(training),
            "network": state.network.state_dict(),
            "average": state.average.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "scaler": state.scaler.state_dict(),
            "epoch": state.epoch,
            "step": state.step,
            "best_score": state.best_score,
            "history": state.history,
        }
    )
    return content


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint so that ``path`` is always a complete one, whenever the process is killed."""
    with replacing(path) as file:
        torch.save({**content, CHECKSUM: content_checksum(content)}, file)


def applicable_part(content: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a checkpoint that applying it needs: the averaged weights, and how they came about."""
    return {key: value for key, value in content.items() if key not in RESUMES}


def save_checkpoint(path: Path, state: TrainState, config: TrainConfig, spec: PreprocessSpec) -> None:
    """Write everything that resuming needs."""
    write_checkpoint(path, snapshot(state, config, spec))


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
        raise RunError(f"{path}: not a readable checkpoint: {_unreadable(path)}") from failure
    if not isinstance(content, dict) or content.get("version") != VERSION:
        found = content.get("version") if isinstance(content, dict) else type(content).__name__
        raise RunError(f"{path}: checkpoint version is {found!r}, this software reads {VERSION}: train again")
    _verify(content, path)
    return content


def _verify(content: dict[str, Any], path: Path) -> None:
    checksum = content.pop(CHECKSUM, None)
    if checksum != content_checksum(content):
        raise RunError(f"{path}: damaged: its content does not match its checksum: {_remedy(path)}")
    for part in ("network", "average"):
        for name, value in content.get(part, {}).items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise RunError(f"{path}: the weights {name} are not finite: {_remedy(path)}")


def content_checksum(content: object) -> str:
    """SHA-256 of plain data and tensors: every name, number, shape and bit counts, the order of a dict's keys does not."""
    digest = hashlib.sha256()
    _digest(content, digest)
    return digest.hexdigest()


def _digest(value: object, digest: hashlib._Hash) -> None:
    if isinstance(value, Mapping):
        digest.update(f"dict {len(value)}\n".encode())
        for key in sorted(value, key=str):
            digest.update(f"{key!r}\n".encode())
            _digest(value[key], digest)
    elif isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}\n".encode())
        # A flat copy in the order of the axes, however the tensor lies in memory.
        flat = value.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        digest.update(f"list {len(value)}\n".encode())
        for item in value:
            _digest(item, digest)
    else:
        digest.update(f"{value!r}\n".encode())


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _unreadable(path: Path) -> str:
    """What is wrong with a file that torch cannot load, and what to do."""
    if not zipfile.is_zipfile(path):  # the directory of a zip file is at its end
        what = f"truncated, or another kind of file ({path.stat().st_size} bytes)"
    else:
        what = "damaged, or it holds more than plain data, which is not loaded"
    return f"{what}: {_remedy(path)}"


def _remedy(path: Path) -> str:
    """What is left to do about a spoilt file: last.pt holds all that best.pt does, of a later epoch."""
    last = path.with_name(LAST)
    if path.name == BEST and last.exists():
        return f"copy it again, or put a copy of {LAST} in its place"
    return "copy it again, or train again"


def restore(state: TrainState, content: dict[str, Any], config: TrainConfig, *, path: Path) -> None:
    """Put a checkpoint's content into ``state``, in place: the only function that does.

    Raises:
        RunError: The checkpoint is of another architecture, which is named, or holds averaged weights alone.
    """
    saved = config_from_json(content["config"], source=str(path))
    changed = "; ".join(_changed(to_json(saved.model), to_json(config.model), key="model"))
    if changed:
        raise RunError(f"{path}: the checkpoint is of another network ({changed})")
    # The split is the run's own and all chance follows from the seed: another one is another run.
    changed = "; ".join(d for key in FIXED for d in _changed(_part(saved, key), _part(config, key), key=key))
    if changed:
        raise RunError(f"{path}: resuming cannot change these settings ({changed}): name another folder")
    if any(part not in content for part in RESUMES):
        raise RunError(
            f"{path}: holds averaged weights alone, as {BEST} does: training cannot resume from it"
        )
    state.network.load_state_dict(content["network"])
    state.average.load_state_dict(content["average"])
    state.optimizer.load_state_dict(_for_device(content["optimizer"], state.optimizer))
    if (
        content["scaler"] and state.scaler.is_enabled()
    ):  # a run that changed its precision begins with a new one
        state.scaler.load_state_dict(content["scaler"])
    state.epoch, state.step = content["epoch"], content["step"]
    state.best_score, state.history = content["best_score"], list(content["history"])


def _for_device(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state with the fused kernel of this device: a run may have begun on another one."""
    groups = zip(saved["param_groups"], optimizer.param_groups, strict=True)
    return {**saved, "param_groups": [{**there, "fused": here["fused"]} for there, here in groups]}


def check_same_spec(content: dict[str, Any], spec: PreprocessSpec, *, path: Path) -> None:
    """Raises RunError where a checkpoint learnt from a cache that was built with another spec; says what differs."""
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
    """What else has changed since a checkpoint was written: the run continues, but not as it would have."""
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
