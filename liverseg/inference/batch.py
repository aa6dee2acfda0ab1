"""Many scans through ``predict``: the next one is read and the last one written while the network works on another."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from liverseg.inference.inputs import ScanInput
from liverseg.inference.predict import (
    LABEL_ALONE,
    Prediction,
    PredictOptions,
    Stages,
    finish,
    predict_stages,
)
from liverseg.inference.segment import Predictor
from pipeline.memory import free_bytes
from pipeline.restore import one_thread

READ_AHEAD_SHARE = 0.25  # of the free memory: a scan that may take more waits until no other is in memory


def predict_scans(
    scans: Sequence[ScanInput], out: Path, predictor: Predictor, options: PredictOptions = LABEL_ALONE
) -> Generator[Prediction | Exception, None, None]:
    """``predict_scan`` of each scan, in their order; the exception of one that fails, which costs itself alone.

    One thread reads a scan ahead, one writes the scan before, and this one, whose device it is, runs the network. At
    most three scans are under way, of which two hold their voxels; with samples all three do. A scan that would take
    more than ``READ_AHEAD_SHARE`` of the free memory is read when all others are written.

    Closed or interrupted, it finishes the file that is being written and deletes what was converted for reading.

    Args:
        scans: What to segment, each of another name.
        out: Folder of the labels; made if it is missing.
        predictor: The networks.
        options: What else is written.
    """
    every = [predict_stages(scan, out, predictor, options) for scan in scans]
    reader, writer = (ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("read", "write"))
    # Limits and filters are the process's: threads that each put theirs back would leave another's behind.
    with one_thread(), warnings.catch_warnings():
        try:
            yield from _overlap(every, reader, writer)
        finally:
            for pool in (reader, writer):
                pool.shutdown(cancel_futures=True)
            for stages in every:
                stages.close()


def _overlap(
    every: Sequence[Stages], reader: ThreadPoolExecutor, writer: ThreadPoolExecutor
) -> Iterator[Prediction | Exception]:
    behind: Future[Prediction | Exception] | None = None
    ahead = reader.submit(_read_ahead, every[0]) if every else None
    for number, stages in enumerate(every, 1):
        assert ahead is not None
        outcome = ahead.result()
        if outcome is False:
            if behind is not None:
                yield behind.result()
                behind = None
            outcome = _advance(stages)
        ahead = reader.submit(_read_ahead, every[number]) if number < len(every) else None
        if not isinstance(outcome, Exception):
            outcome = _advance(stages)
        if behind is not None:
            yield behind.result()
        behind = writer.submit(_write, stages, outcome)
    if behind is not None:
        yield behind.result()


def _read_ahead(stages: Stages) -> bool | Exception:
    """Open a scan, and read it where there is memory for it beside the others; whether it was read."""
    try:
        needed = next(stages)
        free = free_bytes()
        if free is not None and needed > READ_AHEAD_SHARE * free:
            return False
        next(stages)
    except Exception as failure:
        return failure
    return True


def _advance(stages: Stages) -> bool | Exception:
    try:
        next(stages)
    except Exception as failure:
        return failure
    return True


def _write(stages: Stages, outcome: bool | Exception) -> Prediction | Exception:
    if isinstance(outcome, Exception):
        return outcome
    try:
        return finish(stages)
    except Exception as failure:
        return failure
