"""Callbacks of the trainer, and the ones that draw its progress in a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from liverseg.console import number, progress_bar, say
from liverseg.training.config import TrainConfig
from liverseg.training.process_group import is_main_process
from liverseg.training.state import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Callbacks:
    """What is called while training runs; the command line draws a live line with it."""

    started: Callable[[str], None]
    stepped: Callable[[int, int, float], None]  # epoch, step within it, samples per second
    finished_epoch: Callable[[Row], None]


SILENT = Callbacks(started=lambda _: None, stepped=lambda *_: None, finished_epoch=lambda _: None)


@contextlib.contextmanager
def console_progress(config: TrainConfig) -> Iterator[Callbacks]:
    """A watcher that draws on the console until the block ends; silent in all processes of a team but the first."""
    if not is_main_process():
        yield SILENT
        return
    steps = config.optim.steps_per_epoch
    with progress_bar() as bar:
        task = bar.add_task("train", total=config.optim.epochs * steps, note="")

        def stepped(epoch: int, step: int, rate: float) -> None:
            note = f"epoch {epoch}, {rate:.2f} samples/s"
            bar.update(task, completed=(epoch - 1) * steps + step, note=note)

        yield Callbacks(started=say, stepped=stepped, finished_epoch=lambda row: say(epoch_line(row, config)))


def epoch_line(row: Row, config: TrainConfig) -> str:
    """One epoch in one line."""
    return (
        f"epoch {row['epoch']:>3.0f}/{config.optim.epochs}  loss {number(row['train_loss'])}"
        f"  val {number(row['val_loss'])}  Dice liver {number(row['val_dice_liver'])}"
        f" tumour {number(row['val_dice_tumour'])}{_native(row)}  {number(row['samples_per_second'], 2)} samples/s,"
        f" {100 * (row['mfu'] or 0):.0f} % of matmul peak,"
        f" {100 * (row['wait_share'] or 0):.1f} % waiting for data, {number(row['seconds'], 1)} s"
    )


def _native(row: Row) -> str:
    if "native_dice_liver" not in row:
        return ""
    liver, tumour = number(row["native_dice_liver"]), number(row["native_dice_tumour"])
    return f", native {liver} and {tumour}"
