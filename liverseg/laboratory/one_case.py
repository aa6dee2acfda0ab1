"""One case learnt by heart: what the experiments on losses and on their numbers have in common."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import ConfigDict

from data_cache.errors import CacheError, ConfigError, DivergedError
from data_cache.reader import CacheStore
from data_cache.records import STRICT
from liverseg.device import choose_device, freed_memory_reused
from liverseg.model.inputs import class_fractions, decide
from liverseg.training.augment import AugmentConfig
from liverseg.training.callbacks import SILENT, Callbacks
from liverseg.training.config import DataConfig, TrainConfig, WatchConfig, load_config
from liverseg.training.process_group import ProcessGroup
from liverseg.training.split import make_split
from liverseg.training.state import Row, TrainState, class_shares, new_state, selection_score
from liverseg.training.stream import WHOLE, SampleSpec, Volumes
from liverseg.training.train import Trainer
from liverseg.training.validate import ValidationOutput

# Without --config: a network that takes 0.6 s per step of 64×128×128 on two CPU cores, so that seven losses of 300
# steps are done in half an hour, and the learning rate of configs/overfit.toml.
NARROW = (
    "model.base_channels=8",
    "optim.batch_size=1",
    "optim.learning_rate=5e-3",
    "optim.warmup_steps=10",
)
# What the experiment itself decides; --set cannot.
GIVEN = (
    "data",
    "augment",
    "watch",
    "loss.name",
    "optim.epochs",
    "optim.steps_per_epoch",
    "optim.ema_decay",
    "optim.patience",
)
STILL = AugmentConfig(
    elastic_probability=0.0,
    rotation_degrees=0.0,
    scale=0.0,
    flip=False,
    noise_level=0.0,
    contrast_random_level=0.0,
    brightness_random_level=0.0,
    gamma_random_level=0.0,
    blur_level=0.0,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Where a network stood after ``step`` steps: its Dice on the case in eval mode, None for an absent class.

    Attributes:
        loss: Mean over the steps since the last point.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    step: int
    loss: float
    liver: float | None
    tumour: float | None

    @property
    def score(self) -> float:
        """The mean Dice of the classes that the case has."""
        return selection_score({"val_dice_liver": self.liver, "val_dice_tumour": self.tumour})


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The case of an experiment, as its cached liver view shows it.

    Attributes:
        image_sha256, label_sha256: Of the files it was made from.
        tumour_voxels: Cached voxels that are mostly tumour.
        tumour_share: Of the liver with its tumours, native voxels.
    """

    case_id: str
    image_sha256: str
    label_sha256: str
    tumour_voxels: int
    tumour_share: float


def find_subject(store: CacheStore, case_id: str) -> Subject:
    """The case, if it can be learnt.

    Raises:
        CacheError: It is not in the store, or has no label or no liver.
    """
    meta = store.meta(case_id)
    if meta.label is None or meta.voxel_counts is None:
        labelled = [i for i in store.case_ids if store.meta(i).label is not None]
        known = ", ".join(labelled[:8]) + (", …" if len(labelled) > 8 else "")
        raise CacheError(f"{store.path}: case {case_id} has no label; these have one: {known or 'none'}")
    if "liver" not in meta.boxes:
        raise CacheError(f"{store.path}: the label of case {case_id} has no liver: name another case")
    volumes = Volumes(store, [case_id], resident="stream", device=choose_device("cpu"))
    batch = volumes.fetch([SampleSpec(case_id=case_id, view="liver", part_zyx=WHOLE)])
    truth = decide(class_fractions(batch.fractions_bczyx)[:, 1:])
    _, liver, tumour = meta.voxel_counts
    return Subject(
        case_id=case_id,
        image_sha256=meta.image.sha256,
        label_sha256=meta.label.sha256,
        tumour_voxels=int((truth == 2).sum()),
        tumour_share=tumour / (liver + tumour),
    )


def _overlap(key: str, other: str) -> bool:
    """Whether setting one key, or a section at once, touches the other."""
    return key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.")


def experiment_config(
    file: Path | None,
    overrides: Sequence[str],
    *,
    case_id: str,
    steps: int,
    every: int,
    tried: Sequence[str] = (),
) -> TrainConfig:
    """The configuration of an experiment: ``file`` or else the narrow network, then ``overrides``.

    The case is shown in its liver view and always the same, without augmentation, and judged by the weights
    themselves rather than by their average. An epoch is the ``every`` steps between two points of the curve; the
    learning rate warms up and falls along the whole of ``steps``. A batch of several holds copies of the case.

    Args:
        file: TOML, or None.
        overrides: As ``load_config`` takes them.
        case_id: The case.
        steps: In all.
        every: Steps between two points of the curve.
        tried: Further keys that the experiment decides, besides ``GIVEN``.

    Raises:
        ConfigError: ``steps`` is not a multiple of ``every``, an override is of something that the experiment decides,
            or what ``load_config`` finds.
    """
    if steps % every:
        raise ConfigError(f"--steps {steps} is not a multiple of --every {every}")
    for override in overrides:
        key = override.partition("=")[0].strip()
        decided = next((given for given in (*GIVEN, *tried) if _overlap(key, given)), None)
        if decided is not None:
            raise ConfigError(f"--set {override}: the experiment itself decides {decided}")
    base = load_config(file, (*(NARROW if file is None else ()), *overrides))
    if base.model.stochastic == "ssn":
        # Its likelihood, a cross-entropy, is added to any loss: nothing could be said of one alone.
        raise ConfigError("model.stochastic = 'ssn' adds a loss of its own: take 'none' to compare losses")
    return replace(
        base,
        data=DataConfig(train_cases=(case_id,), scan_share=0.0, between_share=0.0, box_jitter=0.0),
        augment=STILL,
        optim=replace(base.optim, epochs=steps // every, steps_per_epoch=every, ema_decay=0.0, patience=None),
        watch=WatchConfig(log_every=every, pictures_every=0),
    )


class Learner:
    """A network that learns its one case with the trainer's own epochs.

    Attributes:
        diverged: A loss was not finite. The state is spoilt then, and its history ends before.
    """

    def __init__(self, store: CacheStore, config: TrainConfig) -> None:
        (self.case_id,) = config.data.train_cases
        group = ProcessGroup(rank=0, size=1, device=choose_device(config.device))
        shares = class_shares([store.meta(self.case_id)])
        state = new_state(config, group.device, class_shares=shares)
        self._trainer = Trainer(store, make_split(store, config.data, seed=config.seed), config, group, state)
        self.diverged = False

    @property
    def state(self) -> TrainState:
        """What has been learnt so far."""
        return self._trainer.state

    @property
    def samples_per_step(self) -> int:
        """Of which all are the one case."""
        return self._trainer.samples_at_once * self._trainer.config.optim.accumulate

    def learn(self, *, until_step: int, stepped: Callable[[int, float], None]) -> None:
        """Go on until so many steps are done, or the loss is not finite.

        Args:
            until_step: Counted from the beginning; a multiple of the steps between two points.
            stepped: Told the step and the steps per second.
        """
        optim, state = self._trainer.config.optim, self.state

        def told(epoch: int, step: int, samples_per_s: float) -> None:
            stepped((epoch - 1) * optim.steps_per_epoch + step, samples_per_s / self.samples_per_step)

        watcher = replace(SILENT, stepped=told)
        with freed_memory_reused(self._trainer.group.device):
            while not self.diverged and state.epoch * optim.steps_per_epoch < until_step:
                self._run_epoch(watcher)

    def _run_epoch(self, watcher: Callbacks) -> None:
        history = self.state.history
        try:
            self._trainer.run_epoch(watcher)
        except DivergedError:
            self.diverged = True
            return
        # The last of the steps may have spoilt weights that its own loss did not see yet.
        if not _is_finite(history[-1]["val_loss"]):
            history.pop()
            self.diverged = True

    def answer(self) -> ValidationOutput:
        """What the network says of its case now."""
        return self._trainer.validation.answer(self.state.average, self.case_id)


def curve_of(history: Sequence[Row]) -> tuple[Point, ...]:
    """The points that a trainer's history holds."""
    return tuple(
        Point(
            step=int(row["step"] or 0),
            loss=float(row["train_loss"] or 0.0),
            liver=row["val_dice_liver"],
            tumour=row["val_dice_tumour"],
        )
        for row in history
    )


def seconds_per_step(history: Sequence[Row], *, samples_per_step: int) -> float | None:
    """The median over the points of a curve, without what scoring took; None before the first."""
    rates = [row["samples_per_second"] for row in history]
    times = [samples_per_step / rate for rate in rates if rate]
    return float(np.median(times)) if times else None


def refuse_process_groups() -> None:
    """Raises ConfigError under ``torchrun``, whose processes would all write the same files."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("one case is learnt on one device: start this without torchrun")


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
