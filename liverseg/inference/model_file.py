"""A trained network as one file to hand on: weights, and in the header all that is needed to apply and judge it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from data_cache.errors import RunError
from data_cache.files import replacing
from data_cache.records import parse
from data_cache.schema import LABEL_NAMES, PreprocessSpec
from liverseg.measure.summary import SUMMARY
from liverseg.model.network import UNet
from liverseg.training.checkpoint import BEST, load_checkpoint
from liverseg.training.config import TrainConfig, config_from_json

SUFFIX = ".safetensors"
KEY = "liverseg"  # of the header's metadata, which maps strings to strings
FORMAT = 1
LICENCE_NOTE = (
    "Weights inherit the terms of the data that they were trained on (Decathlon Task03_Liver: CC-BY-SA 4.0). "
    "Not a medical device."
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trained:
    """A network with its weights, how it was trained, and the spec of what it sees."""

    network: UNet
    config: TrainConfig
    spec: PreprocessSpec


def load_trained(path: Path) -> Trained:
    """The best network of a run's folder, or of a file that ``export_model`` wrote.

    Raises:
        RunError: There is no such folder or file, or it is damaged.
    """
    if path.is_file():
        return _load_file(path)
    if not path.is_dir():
        raise RunError(f"{path}: no such folder: name a training run, or a file of liverseg export")
    content = load_checkpoint(path / BEST)
    return _trained(content, content["average"], source=str(path / BEST))


def export_model(run: Path, path: Path, *, licence: str = LICENCE_NOTE) -> Path:
    """Write the best network of ``run`` as ``path`` and return it; nothing of the optimizer goes along.

    The header holds the configuration, the spec, label names, the validation score, the summary of
    ``RUN/evaluation`` where there is one of this network alone, and ``licence``.

    Raises:
        RunError: ``path`` does not end in .safetensors, or the run has no checkpoint that can be read.
    """
    if path.suffix != SUFFIX:
        raise RunError(f"{path}: name a file that ends in {SUFFIX}")
    content = load_checkpoint(run / BEST)
    about = {
        "format": FORMAT,
        "software": f"liverseg {version('liverseg')}",
        "config": content["config"],
        "spec": content["spec"],
        "labels": list(LABEL_NAMES),
        "epoch": content["epoch"],
        "validation_dice": content["best_score"],
        "evaluation": _evaluation(run),
        "licence": licence,
    }
    weights = {name: value.contiguous() for name, value in content["average"].items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(save(weights, metadata={KEY: json.dumps(about)}))
    return path


def describe(path: Path) -> dict[str, Any]:
    """What the header of an exported file says.

    Raises:
        RunError: It is no safetensors file, not one of ours, or of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as failure:
        raise RunError(f"{path}: is no readable {SUFFIX} file ({failure})") from failure
    if KEY not in metadata:
        raise RunError(f"{path}: holds weights, but not of liverseg export")
    about: dict[str, Any] = json.loads(metadata[KEY])
    if about.get("format") != FORMAT:
        raise RunError(f"{path}: file format {about.get('format')!r}, this software reads {FORMAT}")
    return about


def _load_file(path: Path) -> Trained:
    about = describe(path)
    with safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    return _trained(about, weights, source=str(path))


def _trained(content: dict[str, Any], weights: dict[str, Tensor], *, source: str) -> Trained:
    config = config_from_json(content["config"], source=source)
    network = UNet(config.model)
    try:
        network.load_state_dict(weights)
    except RuntimeError as failure:
        raise RunError(f"{source}: its weights are not of the network it describes: {failure}") from failure
    spec = parse(PreprocessSpec, content["spec"], source=source, error=RunError)
    return Trained(network=network, config=config, spec=spec)


def _evaluation(run: Path) -> dict[str, Any] | None:
    path = run / "evaluation" / SUMMARY
    if not path.exists():
        return None
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    # Scores of an ensemble are not those of the one network that goes along.
    return summary if len(summary.get("models", [run])) == 1 else None
