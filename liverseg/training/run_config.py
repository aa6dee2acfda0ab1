"""The configuration that a training run starts with: what the command ``train`` and ``liverseg.train`` have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_cache.errors import ConfigError
from liverseg.device import choose_device
from liverseg.model.network import parameter_count
from liverseg.training.config import TrainConfig, load_config
from liverseg.training.train import CONFIG


def run_config(run: Path, file: Path | None, overrides: Sequence[str], *, resume: bool) -> TrainConfig:
    """Read the configuration of a run that is to be started or resumed.

    Args:
        run: Folder of the run.
        file: TOML file; None for the built-in values, or, when resuming, for those of the run.
        overrides: As ``load_config`` takes them.
        resume: Whether the run is to be continued.

    Raises:
        ConfigError: What ``load_config`` finds; or nobody has chosen a network, and the built-in one, which is meant for
            a GPU, would be trained on a CPU.
    """
    if resume and file is None and (run / CONFIG).exists():
        file = run / CONFIG
    config = load_config(file, overrides)
    if file is None and not any(o.partition("=")[0].strip() == "model.base_channels" for o in overrides):
        _refuse_cpu(config)
    return config


def _refuse_cpu(config: TrainConfig) -> None:
    if choose_device(config.device).type == "cpu":
        raise ConfigError(
            f"the built-in network has {parameter_count(config.model) / 1e6:.0f} million parameters, which are meant for "
            "a GPU, and this would train on the CPU: name a configuration file such as configs/demo.toml, or set "
            "model.base_channels=8, or device=cuda for a GPU"
        )
