"""A trained network as one file to share: weights, and a header with all that is needed to apply and judge it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from data_cache.errors import RunError
from data_cache.files import read_json, replacing
from data_cache.outputs import SEAL, is_intact, require_replaceable
from data_cache.records import parse
from data_cache.schema import LABEL_NAMES, PreprocessSpec
from liverseg.measure.summary import ROWS, SUMMARY, WEIGHTS
from liverseg.model.network import UNet
from liverseg.training.checkpoint import BEST, content_checksum, load_checkpoint
from liverseg.training.config import TrainConfig, config_from_json
from liverseg.training.training_data import NOT_RECORDED, TrainingData

SUFFIX = ".safetensors"
KEY, CHECKSUM = "liverseg", "sha256"  # keys in the header's metadata, which maps strings to strings
FORMAT = 2  # since 2 with a checksum
_AGAIN = "copy or export it again"
_MARK = re.compile(rb'(?s).{8}\{"__metadata__":\{.*?"liverseg":')


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trained:
    """A network with its weights, its configuration, the spec of its input, and what it learned from."""

    network: UNet
    config: TrainConfig
    spec: PreprocessSpec
    training: TrainingData | None


def load_trained(path: Path) -> Trained:
    """The best network of a run's folder, or the network in a file written by ``export_model``.

    Raises:
        RunError: The folder or file does not exist or is damaged.
    """
    if path.is_file():
        return _load_file(path)
    if not path.is_dir():
        raise RunError(
            f"{path}: no such file or folder: name a training run or a file written by liverseg export"
        )
    content = load_checkpoint(path / BEST)
    return _trained(content, content["average"], source=str(path / BEST))


def export_model(run: Path, path: Path, *, licence: str | None = None) -> Path:
    """Write the best network of ``run`` to ``path``, without the optimizer's state, and return the path.

    The header contains the configuration, the spec, label names, the validation score, the summary of
    ``RUN/evaluation`` if it is that of these weights alone, what the network was trained on as far as the run records
    it, and ``licence``: by default what the training data's dataset.json states. Folders of this machine are left out.

    Raises:
        RunError: ``path`` does not end in .safetensors, the run has no readable checkpoint, or its summary is damaged.
    """
    if path.suffix != SUFFIX:
        raise RunError(f"{path}: expected a file name that ends in {SUFFIX}")
    require_replaceable(path, _MARK, command="export")
    content = load_checkpoint(run / BEST)
    about = {
        "format": FORMAT,
        "software": f"liverseg {version('liverseg')}",
        "config": _without_paths(content["config"]),
        "spec": content["spec"],
        "labels": list(LABEL_NAMES),
        "epoch": content["epoch"],
        "validation_dice": content["best_score"],
        "evaluation": _evaluation(run, content["average"]),
        "training": content.get("training"),
        "licence": _terms(content, source=str(run / BEST)) if licence is None else licence,
    }
    weights = {name: value.contiguous() for name, value in content["average"].items()}
    text = json.dumps(about)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(save(weights, metadata={KEY: text, CHECKSUM: _checksum(text, weights)}))
    return path


def describe(path: Path) -> dict[str, Any]:
    """The header of an exported file.

    Raises:
        RunError: The file is damaged, was not written by ``export_model``, or has another format.
    """
    about, _ = _read(path)
    return about


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the weights, checked against the checksum of both."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except Exception as failure:  # safetensors raises whatever a damaged header leads to
        raise RunError(f"{path}: not a readable {SUFFIX} file ({failure}): {_AGAIN}") from failure
    if KEY not in metadata:
        raise RunError(f"{path}: contains weights, but was not written by liverseg export")
    if CHECKSUM not in metadata:
        raise RunError(f"{path}: has no checksum: written by an older version, or damaged: {_AGAIN}")
    if metadata[CHECKSUM] != _checksum(metadata[KEY], weights):
        raise RunError(f"{path}: damaged: its checksum does not match: {_AGAIN}")
    about: dict[str, Any] = json.loads(metadata[KEY])
    if about.get("format") != FORMAT:
        raise RunError(f"{path}: expected file format {FORMAT}, found {about.get('format')!r}")
    return about, weights


def _checksum(text: str, weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of the header's text and of each tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name, value in sorted(weights.items()):
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _load_file(path: Path) -> Trained:
    about, weights = _read(path)
    not_finite = [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]
    if not_finite:
        raise RunError(f"{path}: {not_finite[0]} has weights that are not finite: export another run")
    return _trained(about, weights, source=str(path))


def _trained(content: dict[str, Any], weights: dict[str, Tensor], *, source: str) -> Trained:
    config = config_from_json(content["config"], source=source)
    network = UNet(config.model)
    try:
        network.load_state_dict(weights)
    except RuntimeError as failure:
        raise RunError(
            f"{source}: its weights do not fit the network that it describes: {failure}"
        ) from failure
    spec = parse(PreprocessSpec, content["spec"], source=source, error=RunError)
    training = TrainingData.from_json(content.get("training"), source=source)
    return Trained(network=network, config=config, spec=spec, training=training)


def _terms(content: dict[str, Any], *, source: str) -> str:
    training = TrainingData.from_json(content.get("training"), source=source)
    return NOT_RECORDED if training is None else training.licence_note()


def _without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the folders that it names, which often carry names of people."""
    data, watch = {**config["data"], "split": None}, {**config["watch"], "raw": None}
    return {**config, "data": data, "watch": watch}


def _evaluation(run: Path, weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The summary of ``RUN/evaluation``; None where there is none, or where it is of other weights or of an ensemble."""
    path = run / "evaluation" / SUMMARY
    if not path.exists():
        return None
    try:
        summary = read_json(path)
    except (OSError, ValueError) as failure:
        raise RunError(f"{path}: unreadable ({failure}): run liverseg evaluate again, or delete it") from None
    if not isinstance(summary, dict) or summary.get(WEIGHTS) != [content_checksum(weights)]:
        return None
    if not is_intact(summary):
        raise RunError(f"{path}: was changed since it was written: run liverseg evaluate again, or delete it")
    return {key: value for key, value in summary.items() if key not in ("models", WEIGHTS, ROWS, SEAL)}
