"""What a folder of experiments was begun with: gone on with the same, refused with anything else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_cache.errors import RunError
from data_cache.files import read_json, write_json
from data_cache.reader import CacheStore
from data_cache.records import differences, to_json
from liverseg.laboratory.one_case import Subject
from liverseg.training.checkpoint import software
from liverseg.training.config import TrainConfig, save_config
from liverseg.training.train import CONFIG

EXPERIMENT = "experiment.json"


def description(
    kind: str, store: CacheStore, subject: Subject, config: TrainConfig, *, without: tuple[str, ...]
) -> dict[str, Any]:
    """Everything that decides what comes out, under the names that a user knows.

    Args:
        kind: The command.
        store: Its preprocessing decides what a case looks like.
        subject: The case.
        config: Of the experiment.
        without: Keys of ``config.loss`` that may differ from part to part of the experiment.
    """
    settings = to_json(config)
    optim = settings["optim"]
    every, epochs = optim.pop("steps_per_epoch"), optim.pop("epochs")
    for key in without:
        settings["loss"].pop(key)
    for decided in ("data", "augment", "watch"):
        del settings[decided]
    return {
        "command": kind,
        "case": subject.case_id,
        "image_sha256": subject.image_sha256,
        "label_sha256": subject.label_sha256,
        "spec": store.schema.fingerprint,
        "steps": every * epochs,
        "every": every,
        **settings,
    }


def begin(run: Path, asked: Mapping[str, Any], config: TrainConfig, *, warned: Callable[[str], None]) -> None:
    """Make the folder, or check that it was begun with the same.

    Args:
        run: The folder.
        asked: From ``description``.
        config: Written there as config.toml.
        warned: Told where other software has begun it, whose numbers may differ in the last digits.

    Raises:
        RunError: It was begun with something else, which is named; or it holds what no experiment has written.
    """
    path = run / EXPERIMENT
    if path.exists():
        there = _read(path)
        asked_json = json.loads(json.dumps(asked))
        changed = "; ".join(
            differences(there["asked"], asked_json, found_in="the folder", expected_by="this command")
        )
        if changed:
            raise RunError(f"{run}: another experiment ({changed}): name another folder")
        if there["software"] != software():
            warned(f"{run}: was begun with {there['software']}, this is {software()}")
        if not (run / CONFIG).exists():
            save_config(config, run / CONFIG)
        return
    if run.exists() and any(not p.name.startswith(".") for p in run.iterdir()):
        raise RunError(f"{run}: holds something else: name a folder that is new or empty")
    run.mkdir(parents=True, exist_ok=True)
    # First, since it says what the folder is: killed in between, the same command goes on.
    write_json(path, {"software": software(), "asked": asked})
    save_config(config, run / CONFIG)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
        return {"software": str(content["software"]), "asked": dict(content["asked"])}
    except (OSError, ValueError, KeyError, TypeError) as failure:
        raise RunError(f"{path}: unreadable ({failure}): name another folder") from failure
