"""A run's configuration: frozen records, TOML on disk, ``--set section.key=value`` on the command line."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import tomli_w
from pydantic import ConfigDict

from data_cache.errors import ConfigError
from data_cache.files import parse_toml, read_toml, write_text
from data_cache.records import STRICT, parse, to_json
from liverseg.device import Precision
from liverseg.model.inputs import InputConfig
from liverseg.model.losses import LossConfig
from liverseg.model.network import NetworkConfig
from liverseg.training.augment import AugmentConfig

CHANNELS, CLASSES = 1, 3  # the CT; background, liver and tumour
SEEDS = 2**63  # torch takes no more

_FILE, _NULL = "configuration", "null"

Resident = Literal["auto", "device", "memory", "stream"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which cases are learnt from, and how often each view is shown.

    Attributes:
        folds, fold: Cases are dealt into ``folds`` by a hash of their id and the seed; number ``fold`` validates.
        train_cases, val_cases: Name cases instead; with ``train_cases`` alone, these validate, too.
        split: Or take them from this file: a run's ``split.json``, or number ``fold`` of nnU-Net's
            ``splits_final.json``.
        scan_share: Share of samples that show the whole scan, as the first pass of inference does.
        scan_widening_zyx: How far the view of the whole scan may reach beyond it at each face, as a share of its size; the
            border repeats there, as if the scan went on. A scan with more of the body than any in training is then not
            new.
        between_share: Share of samples that show a random box between the liver's and the whole scan.
        box_jitter: How far each face of the liver's box is moved in all other samples at most, as a share of its size:
            the box that inference predicts is not exactly the label's.
        tumour_share: Share of samples that are drawn from the cases with a tumour; the rest, from all.
        resident: Where the cached volumes are kept: on the ``device``, in main ``memory``, or left in the store and read
            when they are needed (``stream``). ``auto`` takes the first of these that has room.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    folds: int = 5
    fold: int = 0
    train_cases: tuple[str, ...] = ()
    val_cases: tuple[str, ...] = ()
    split: str | None = None
    scan_share: float = 0.2
    scan_widening_zyx: tuple[float, float, float] = (0.6, 0.1, 0.1)
    between_share: float = 0.2
    box_jitter: float = 0.08
    tumour_share: float = 0.5
    resident: Resident = "auto"

    def __post_init__(self) -> None:
        _refuse("data", _data_faults(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019) with linear warm-up, cosine decay and an average of the weights.

    Attributes:
        epochs: How often validation and checkpoints come, times ``steps_per_epoch``, is how long a run takes.
        steps_per_epoch: Batches that the weights are updated with in an epoch.
        batch_size: Samples that a device sees at once.
        accumulate: Batches whose gradients are averaged for one step. Each has a loss of its own: with
            ``loss.sums = "sample"`` and no batch norm it is the same as one batch of all of them.
        patience: Stop after so many epochs without a better score; never if not given.
        learning_rate: At the end of the warm-up; it falls to zero along half a cosine.
        weight_decay: Share of a weight, times the learning rate, that is taken off at each step.
        warmup_steps: Steps of linear warm-up.
        clip_norm: Gradients are scaled down to this norm.
        ema_decay: Of the exponential moving average of the weights that validates and is saved as best.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    epochs: int = 200
    steps_per_epoch: int = 250
    batch_size: int = 2
    accumulate: int = 1
    patience: int | None = None
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    warmup_steps: int = 500
    clip_norm: float = 1.0
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        _refuse("optim", _optim_faults(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchConfig:
    """How closely a run is watched; nothing here changes what the weights learn.

    Attributes:
        log_every: Steps between two looks at the loss, at which the host waits for the device.
        validate_every: Epochs between two validations; the last epoch always has one. Only a validated epoch can
            become best.pt.
        pictures_every: Epochs between two pictures of a validation case, truth beside prediction; 0 for none.
        raw: Folder of the raw data set. With it, ``native_every`` epochs, and at the last one, validation cases are
            also scored on their own grid against their own label, in the label's window.
        native_every: Epochs between two such scores.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    log_every: int = 10
    validate_every: int = 1
    pictures_every: int = 10
    raw: str | None = None
    native_every: int = 25

    def __post_init__(self) -> None:
        _refuse("watch", _watch_faults(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run besides its cache.

    Attributes:
        seed: Of the split, the weights, the order of samples and the augmentation.
        device: ``auto`` takes a GPU if there is one; or ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        precision: ``auto`` computes in bfloat16 where the hardware has it, else in float16 on GPUs with tensor cores
            for it, with the loss scaled; weights stay float32.
        compile: Let ``torch.compile`` fuse the network: a minute or more at the start for faster steps. ``auto`` does
            on one GPU of compute capability 8.0 or more, without ``recompute``.
        recompute: For small cards: keep less from the forward pass, and compute the rest again for the gradient. It takes
            less memory and a third more time; what is learnt is the same.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    seed: int = 0
    device: str = "auto"
    precision: Precision = "auto"
    compile: bool | Literal["auto"] = "auto"
    recompute: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    input: InputConfig = field(default_factory=InputConfig)
    model: NetworkConfig = field(default_factory=NetworkConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    def __post_init__(self) -> None:
        faults = list(_train_faults(self))
        if faults:
            raise ConfigError("; ".join(faults))


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a TOML file, or start from the defaults, and apply ``section.key=value`` overrides; ``null`` unsets a value.

    Raises:
        ConfigError: The file is missing or no TOML, or keys or values are wrong; lists every fault.
    """
    content = {} if path is None else _read_toml(path)
    for override in overrides:
        _override(content, override)
    try:
        return config_from_json(content, source=_FILE)
    except ConfigError as failure:
        faults = str(failure).removeprefix(f"{_FILE}: ")
    # What is wrong stands in the file or in an override; the file is named last where both are possible.
    keys = ", ".join(dict.fromkeys(override.partition("=")[0].strip() for override in overrides))
    if path is None:
        raise ConfigError(faults)
    raise ConfigError(f"{faults} ({path}, with {keys} replaced)" if keys else f"{path}: {faults}")


def as_override(key: str, value: object) -> str:
    """``key=value`` as ``load_config`` takes it, of a value as Python has it; None unsets a setting that may be unset.

    JSON is TOML, but for its escapes of characters beyond the first 65536, such as 📁 in a folder's name, and for DEL.

    Raises:
        ConfigError: No setting has a value of that type.
    """
    text = json.dumps(_plain(key, value), ensure_ascii=False)
    return f"{key}={text}".replace("\x7f", "\\u007f")


def _plain(key: str, value: object) -> Any:
    """A value as JSON has it: paths as text, numbers and arrays of NumPy as Python's."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain(key, item) for item in value]
    if isinstance(value, os.PathLike):
        return _plain(key, os.fspath(value))
    if hasattr(value, "tolist"):
        return _plain(key, value.tolist())
    raise ConfigError(
        f"{key}: expected text, a number, True, False, None, or a list of these, found {type(value).__name__}"
    )


def config_from_json(content: object, *, source: str) -> TrainConfig:
    """Parse plain dicts, lists and numbers; raises ConfigError with every fault."""
    try:
        return parse(TrainConfig, content, source=source, error=ConfigError)
    except ConfigError as failure:
        raise ConfigError(_with_suggestions(str(failure))) from None


def _with_suggestions(message: str) -> str:
    """A message in which each unknown key is followed by the one that may have been meant."""
    from liverseg.training.settings import nearest_key  # which reads the records of this module

    def suggest(found: re.Match[str]) -> str:
        near = nearest_key(found[1])
        return f"{found[0]}; did you mean {near}?" if near else f"{found[0]}; liverseg config lists the keys"

    return re.sub(r"([\w.]+): unknown key", suggest, message)


def save_config(config: TrainConfig, path: Path) -> None:
    """Write a configuration as TOML that ``load_config`` reads back to an equal one."""
    write_text(path, tomli_w.dumps(_without_none(to_json(config))))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return read_toml(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file: configs/ has examples") from None
    except (OSError, ValueError) as failure:
        raise ConfigError(f"{path}: unreadable: {failure}") from failure


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, name = key.strip().split(".")
    if not equals or not name:
        raise ConfigError(f"{override}: write section.key=value, such as optim.epochs=50")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise ConfigError(f"{override}: {section!r} is a value, not a section")
    content[name] = _value(text.strip())


def _value(text: str) -> Any:
    """A TOML value, or None for null, which TOML lacks, or else the text itself, so that strings need no quotes."""
    if text == _NULL:
        return None
    try:
        return parse_toml(f"value = {text}")["value"]
    except ValueError:
        return text


def _without_none(content: Any) -> Any:
    """TOML has no null: a key that is left out takes its default, which None must therefore be."""
    if isinstance(content, dict):
        return {key: _without_none(value) for key, value in content.items() if value is not None}
    return content


def _refuse(section: str, faults: Iterator[str]) -> None:
    found = list(faults)
    if found:
        raise ConfigError(f"{section}: " + "; ".join(found))


def _train_faults(config: TrainConfig) -> Iterator[str]:
    if not 0 <= config.seed < SEEDS:
        yield f"seed must be at least 0 and below 2**63, got {config.seed}"
    # A UNet may have others; what a run feeds it with, and asks of it, is fixed.
    for name, value in (("in_channels", CHANNELS), ("classes", CLASSES)):
        found = getattr(config.model, name)
        if found != value:
            yield f"model.{name} must be {value} in a training run, got {found}"
    if len(config.loss.class_weights) != CLASSES:
        yield f"loss.class_weights has {len(config.loss.class_weights)} numbers for {CLASSES} classes"
    if config.compile is True and config.recompute:
        yield "compile = true and recompute exclude each other: torch.compile plans memory by itself"


def _data_faults(config: DataConfig) -> Iterator[str]:
    if config.folds < 2 or not 0 <= config.fold < config.folds:
        yield f"fold must be in 0..folds-1 and folds at least 2, got fold {config.fold} of {config.folds}"
    for name in ("scan_share", "between_share", "tumour_share"):
        if not 0 <= getattr(config, name) <= 1:
            yield f"{name} must be in [0, 1], got {getattr(config, name)!r}"
    for name, values in (
        ("scan_widening_zyx", config.scan_widening_zyx),
        ("box_jitter", (config.box_jitter,)),
    ):
        # A box that shrinks by half at both faces is empty; a scan of three times its size is hardly one.
        limit = 0.5 if name == "box_jitter" else 2.0
        if not all(0 <= value < limit for value in values):
            yield f"{name} must be at least 0 and below {limit:g}, got {getattr(config, name)}"
    if config.scan_share + config.between_share > 1:
        yield f"scan_share and between_share add up to {config.scan_share + config.between_share:g}, more than 1"
    if config.val_cases and not config.train_cases:
        yield "val_cases needs train_cases"
    if config.split is not None and config.train_cases:
        yield "split and train_cases exclude each other"


def _optim_faults(config: OptimConfig) -> Iterator[str]:
    if config.patience is not None and config.patience < 1:
        yield f"patience must be at least 1, got {config.patience}"
    for name in ("epochs", "steps_per_epoch", "batch_size", "accumulate"):
        if getattr(config, name) < 1:
            yield f"{name} must be at least 1, got {getattr(config, name)}"
    for name in ("learning_rate", "clip_norm"):
        if not 0 < getattr(config, name) < math.inf:
            yield f"{name} must be above 0 and finite, got {getattr(config, name)}"
    if config.weight_decay < 0 or config.warmup_steps < 0:
        yield f"weight_decay and warmup_steps must not be negative, got {config.weight_decay}, {config.warmup_steps}"
    if not 0 <= config.ema_decay < 1:
        yield f"ema_decay must be in [0, 1), got {config.ema_decay}"


def _watch_faults(config: WatchConfig) -> Iterator[str]:
    for name, least in (("log_every", 1), ("validate_every", 1), ("pictures_every", 0), ("native_every", 1)):
        if getattr(config, name) < least:
            yield f"{name} must be at least {least}, got {getattr(config, name)}"
