"""The files of a run while it is trained: checkpoints, history, curves, pictures, TensorBoard where it is installed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Self

from data_cache.files import write_csv
from data_cache.reader import CacheStore
from data_cache.schema import PreprocessSpec
from liverseg.model.inputs import decide
from liverseg.pictures.figures import overlay_figure
from liverseg.pictures.progress import progress_figure
from liverseg.pictures.sheet import save
from liverseg.training.checkpoint import BEST, LAST, applicable_part, snapshot, write_checkpoint
from liverseg.training.config import TrainConfig
from liverseg.training.state import Row, TrainState
from liverseg.training.training_data import TrainingData
from liverseg.training.validate import Validation, class_dice

HISTORY, PROGRESS = "history.csv", "progress.png"
EXAMPLES, TENSORBOARD = "examples", "tensorboard"
PROGRESS_S = 30.0  # between two drawings of progress.png, which takes almost a second of a core


class RunWriter:
    """Writes a run's files in a thread of its own, one epoch after another, while the next epoch is trained.

    Its block ends when everything is written. A failure, such as a full disk, is raised by the next call.
    """

    def __init__(self, run: Path, config: TrainConfig, spec: PreprocessSpec, training: TrainingData) -> None:
        self._run, self._config, self._spec, self._training = run, config, spec, training
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="run-files")
        self._pending: list[Future[Any]] = []
        self._drawn_s = -math.inf

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            self._wait()

    def keep(self, state: TrainState, *, is_best: bool, is_last: bool) -> None:
        """Write checkpoints, history and curves of the epoch that has just ended; they hold what is learnt so far."""
        self._wait()  # so that there is never more than one copy of the weights
        content = snapshot(state, self._config, self._spec, self._training)
        self._pending.append(self._pool.submit(self._keep, content, is_best=is_best, is_last=is_last))

    def draw_example(self, draw: Callable[[], object]) -> None:
        """Draw a picture, after what ``keep`` was given: matplotlib is used by one thread at a time."""
        self._pending.append(self._pool.submit(draw))

    def _keep(self, content: dict[str, Any], *, is_best: bool, is_last: bool) -> None:
        # best.pt first: killed in between, the run resumes before the epoch and writes both again.
        if is_best:
            write_checkpoint(self._run / BEST, applicable_part(content))
        write_checkpoint(self._run / LAST, content)
        due = is_last or time.monotonic() - self._drawn_s >= PROGRESS_S
        write_history(self._run, content["history"], draw=due)
        if due:
            self._drawn_s = time.monotonic()

    def _wait(self) -> None:
        pending, self._pending = self._pending, []
        for written in pending:
            written.result()


def write_history(run: Path, history: Sequence[Row], *, draw: bool = True) -> None:
    """Write what follows from a checkpoint's history: history.csv and, if it is to be drawn, progress.png."""
    write_csv(run / HISTORY, history, sealed=True)
    if draw:
        columns = {name: [_number(row.get(name)) for row in history] for name in _names(history)}
        save(progress_figure(columns), run / PROGRESS)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _names(history: Sequence[Row]) -> list[str]:
    """Columns of all rows: scores on native grids come every so many epochs only."""
    return list(dict.fromkeys(name for row in history for name in row))


def example_of(run: Path, state: TrainState, validation: Validation, store: CacheStore) -> Callable[[], Path]:
    """Segment a validation case now; what is returned draws truth beside prediction, and gives the picture's path."""
    case_id = validation.example
    answer = validation.answer(state.average, case_id)
    truth, predicted = decide(answer.truth_bczyx), decide(answer.foreground_bczyx)
    scores = zip(("liver", "tumour"), class_dice(predicted, truth), strict=True)
    dice = " · ".join(f"{name} Dice {value:.3f}" for name, value in scores if not math.isnan(value))
    return partial(
        _draw_example,
        run / EXAMPLES / f"epoch_{state.epoch:04d}.png",
        *(volume[0].cpu().numpy() for volume in (answer.image_bczyx[:, 0], truth, predicted)),
        store.meta(case_id).view_grid(answer.view, store.schema.spec.shape_zyx).spacing_zyx_mm,
        title=f"{case_id}, epoch {state.epoch}\n{dice}",
    )


def _draw_example(path: Path, *panels: Any, title: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    return save(overlay_figure(*panels, title=title), path)


def tensorboard_writer(run: Path, *, epoch: int) -> Any | None:
    """TensorBoard's writer for a run that continues after ``epoch``, or None where TensorBoard is not installed."""
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
