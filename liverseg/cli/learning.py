"""Commands that train."""

from __future__ import annotations

from pathlib import Path

import click

from data_cache.text import pluralise
from liverseg.cli.common import FILE, FOLDER
from liverseg.cli.outcome import Outcome


@click.command()
@click.argument("cache", type=FOLDER)
@click.argument("run", type=FOLDER)
@click.option("--config", type=FILE, help="TOML file; configs/ has examples. Default: the built-in values.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Such as optim.epochs=50; repeatable."
)
@click.option("--raw", type=FOLDER, help="Raw data set: also validate on native grids, every so many epochs.")
@click.option("--resume", is_flag=True, help="Continue the run, with its own configuration.")
def train(
    cache: Path, run: Path, config: Path | None, overrides: tuple[str, ...], raw: Path | None, resume: bool
) -> Outcome | None:
    """Train a 3-D U-Net on the store CACHE and keep everything in the folder RUN.

    The built-in network is meant for a GPU: on a CPU, choose another by --config or --set model.base_channels=8.

    \b
    Example: liverseg train data/liver.zarr runs/liver --config configs/liver.toml
             liverseg train data/liver.zarr runs/liver --resume
             torchrun --nproc-per-node=4 -m liverseg train data/liver.zarr runs/liver
    """
    from data_cache.reader import CacheStore
    from liverseg.console import say
    from liverseg.training.callbacks import console_progress
    from liverseg.training.config import as_override
    from liverseg.training.process_group import is_main_process
    from liverseg.training.run_config import run_config
    from liverseg.training.train import train as run_training

    if raw is not None:
        overrides += (as_override("watch.raw", str(raw)),)
    store = CacheStore.open(cache)
    settings = run_config(run, config, overrides, resume=resume)
    with console_progress(settings) as watcher:
        state = run_training(store, run, settings, resume=resume, watcher=watcher)
    if not is_main_process():
        return None
    say(f"{run}: {pluralise(state.epoch, 'epoch')}, best mean validation Dice {state.best_score:.3f}")
    return Outcome(result={"run": run, "best_mean_dice": state.best_score, "history": state.history})


COMMANDS = (train,)
