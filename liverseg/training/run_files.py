"""What a run leaves behind while it goes on: checkpoints, history, curves, pictures, TensorBoard where it is installed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_cache.files import write_csv
from data_cache.reader import CacheStore
from liverseg.model.inputs import decide
from liverseg.pictures.figures import overlay_figure
from liverseg.pictures.progress import progress_figure
from liverseg.pictures.sheet import save
from liverseg.training.checkpoint import BEST, LAST, save_checkpoint
from liverseg.training.config import TrainConfig
from liverseg.training.state import Row, TrainState
from liverseg.training.validate import Validation, class_dice

HISTORY, PROGRESS = "history.csv", "progress.png"
EXAMPLES, TENSORBOARD = "examples", "tensorboard"


def keep(run: Path, state: TrainState, store: CacheStore, config: TrainConfig, *, is_best: bool) -> None:
    """Write history, curves and checkpoints of the epoch that has just ended."""
    if is_best:
        save_checkpoint(run / BEST, state, config, store.schema.spec)
    save_checkpoint(run / LAST, state, config, store.schema.spec)
    write_csv(run / HISTORY, state.history)
    columns = {name: [_number(row.get(name)) for row in state.history] for name in _names(state.history)}
    save(progress_figure(columns), run / PROGRESS)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _names(history: Sequence[Row]) -> list[str]:
    """Columns of all rows: scores on native grids come every so many epochs only."""
    return list(dict.fromkeys(name for row in history for name in row))


def draw_example(run: Path, state: TrainState, validation: Validation, store: CacheStore) -> Path:
    """A picture of a validation case, truth beside prediction, on the cached grid; returns where it is."""
    case_id = validation.example
    answer = validation.answer(state.average, case_id)
    truth, predicted = decide(answer.truth_bczyx), decide(answer.foreground_bczyx)
    scores = zip(("liver", "tumour"), class_dice(predicted, truth), strict=True)
    dice = " · ".join(f"{name} Dice {value:.3f}" for name, value in scores if not math.isnan(value))
    figure = overlay_figure(
        answer.image_bczyx[0, 0].cpu().numpy(),
        truth[0].cpu().numpy(),
        predicted[0].cpu().numpy(),
        store.meta(case_id).view_grid(answer.view, store.schema.spec.shape_zyx).spacing_zyx_mm,
        title=f"{case_id}, epoch {state.epoch}\n{dice}",
    )
    folder = run / EXAMPLES
    folder.mkdir(exist_ok=True)
    return save(figure, folder / f"epoch_{state.epoch:04d}.png")


def tensorboard_writer(run: Path, *, epoch: int) -> Any | None:
    """TensorBoard's writer for a run that goes on after ``epoch``, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # What a killed run wrote of later epochs is dropped.
    return SummaryWriter(str(run / TENSORBOARD), purge_step=epoch + 1)


def write_tensorboard(writer: Any, row: Row) -> None:
    """Every number of an epoch's row, under its own name."""
    for name, value in row.items():
        if value is not None and name != "epoch":
            writer.add_scalar(name, value, int(row["epoch"] or 0))
    writer.flush()
