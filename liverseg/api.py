"""liverseg from Python, the steps of the command line as functions; torch is loaded when one needs it, and not before."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from data_cache.errors import RunError
from liverseg.results import Cache, Progress, Run, Scores

if TYPE_CHECKING:
    from data_cache.schema import Crop
    from liverseg.inference.model import Model
    from liverseg.training.callbacks import Callbacks
    from liverseg.training.config import TrainConfig

AnyPath = str | os.PathLike[str]
ShowProgress = bool | Callable[[Progress], None]


def preprocess(
    raw: AnyPath,
    cache: AnyPath,
    *,
    jobs: int | None = None,
    crop: Crop = "box",
    progress: ShowProgress = True,
) -> Cache:
    """Crop and resample every raw volume once, into a store; cases that are up to date are skipped.

    Args:
        raw: Folder in the Decathlon's layout: ``dataset.json``, ``imagesTr``, ``labelsTr``.
        cache: The store; created where there is none.
        jobs: Worker processes; None for the physical cores.
        crop: What the close view shows: "box", the label's bounding box, or "depth", its slices at full width.
        progress: True draws a bar, False is silent, a function is called with a ``Progress`` after each case.

    Returns:
        The cache. A case that could not be built is in its ``failed`` and does not stop the others.

    Raises:
        DataSetError: ``raw`` is not such a folder.
        CacheError: ``cache`` is something else, or was built with other settings.
        ConfigError: ``crop`` is neither.
    """
    from data_cache.errors import ConfigError
    from data_cache.schema import Crop, PreprocessSpec
    from pipeline.build import CaseResult, build, physical_cores
    from pipeline.decathlon import read_data_set

    if crop not in get_args(Crop):
        raise ConfigError(f"crop: expected {' or '.join(map(repr, get_args(Crop)))}, found {crop!r}")
    data_set = read_data_set(Path(raw))
    with _reporter("preprocess", len(data_set.cases), progress) as advance:

        def report(result: CaseResult) -> None:
            advance(f"{result.case_id}: {result.outcome}")

        results = build(
            data_set, Path(cache), PreprocessSpec(crop=crop), jobs=jobs or physical_cores(), report=report
        )
    failed = {result.case_id: result.message for result in results if result.outcome == "failed"}
    return Cache(Path(cache), failed)


def train(
    cache: AnyPath,
    run: AnyPath,
    *,
    config: AnyPath | None = None,
    set: Mapping[str, object] | None = None,  # noqa: A002 (the command's --set)
    raw: AnyPath | None = None,
    resume: bool = False,
    progress: ShowProgress = True,
) -> Run:
    """Train a network on a cache and keep everything in the folder ``run``.

    Args:
        cache: What ``preprocess`` built.
        run: Folder of the run.
        config: TOML file; None for the built-in values, or, with ``resume``, those of the run. The built-in network is
            meant for a GPU: for a CPU, name a file or set ``model.base_channels``.
        set: Values that replace single ones of it, such as ``{"optim.epochs": 50}``; None unsets one.
        raw: The raw data set, to validate on native grids every so many epochs, too.
        resume: Continue the run where it stopped.
        progress: True draws a bar and prints a line per epoch, False is silent, a function is called with a
            ``Progress`` after each step.

    Returns:
        The run: give it to ``evaluate`` or ``load``.

    Raises:
        ConfigError: A key or a value of the configuration is wrong (lists every fault), or the built-in network would be
            trained on a CPU.
        CacheError: There is no cache.
        RunError: ``run`` holds a run already, or training failed.
    """
    from data_cache.reader import CacheStore
    from liverseg.training.config import as_override
    from liverseg.training.run_config import run_config
    from liverseg.training.train import train as run_training

    store = CacheStore.open(Path(cache))
    values = {**(set or {}), **({} if raw is None else {"watch.raw": raw})}
    overrides = [as_override(key, value) for key, value in values.items()]
    settings = run_config(Path(run), None if config is None else Path(config), overrides, resume=resume)
    with _training_callbacks(settings, progress) as callbacks:
        run_training(store, Path(run), settings, resume=resume, watcher=callbacks)
    return Run(Path(run))


def evaluate(
    cache: AnyPath,
    run: AnyPath,
    *,
    raw: AnyPath,
    cases: str | Sequence[str] = (),
    device: str = "auto",
    samples: int = 0,
    out: AnyPath | None = None,
    progress: ShowProgress = True,
) -> Scores:
    """Score a run in native space, on cases that it never trained on if there are any.

    Args:
        cache: The store that holds the cases.
        run: Folder of the run.
        raw: The data set that the cache was built from.
        cases: Their ids, or one id; by default all labelled ones that the run never trained on, or else all.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, …
        samples: Segmentations to draw per case, to measure what uncertainty is worth.
        out: Where to write; ``run/evaluation`` by default.
        progress: As in ``preprocess``.

    Returns:
        The scores. A case that could not be scored is in their ``failed`` and does not stop the others.

    Raises:
        RunError: ``run`` is not the folder of a run, or holds no model.
        CacheError: There is no cache, or its settings differ from those that the run was trained with.
        ConfigError: The cache has no labelled case, or not one of ``cases``.
        DataSetError: ``raw`` is another data set.
    """
    from data_cache.reader import CacheStore
    from liverseg.evaluation.case import CaseEvaluation
    from liverseg.evaluation.evaluate import choose_cases, summarise
    from liverseg.evaluation.evaluate import evaluate as run_evaluation
    from liverseg.inference.segment import load_predictor
    from liverseg.training.split import load_split

    if Path(run).is_file():
        raise RunError(
            f"{os.fspath(run)}: is a file: evaluate needs the folder of a run, which says what it was trained on"
        )
    store, split = CacheStore.open(Path(cache), skip_damaged=True), load_split(Path(run))
    predictor = load_predictor(Path(run), device=device, samples=samples)
    case_ids, _ = choose_cases(store, split, (cases,) if isinstance(cases, str) else cases)
    folder = Path(run) / "evaluation" if out is None else Path(out)
    failed = {} if cases else {case_id: str(failure) for case_id, failure in store.damaged.items()}
    with _reporter("evaluate", len(case_ids), progress) as advance:

        def report(case_id: str, result: CaseEvaluation | Exception) -> None:
            if isinstance(result, Exception):
                failed[case_id] = str(result)
            advance(case_id)

        scored = run_evaluation(
            predictor, store, split, case_ids=case_ids, raw=Path(raw), out=folder, report=report
        )
    summary = summarise(scored) if scored else {}
    return Scores(cases=tuple(scored), failed=failed, summary=summary, out=folder)


def load(
    *paths: AnyPath, device: str = "auto", fast: bool = False, tta: bool = False, samples: int = 0
) -> Model:
    """A model ready to be applied::

        model = liverseg.load("runs/liver")
        found = model.segment("scan.nii.gz")  # or a DICOM folder, a nibabel image, an array and its affine
        found.label, found.liver_ml, found.tumour_ml
        found.save("segmentation.nii.gz")

    Args:
        paths: Folders of runs, or files of ``liverseg export``; the probabilities of several are averaged.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, …
        fast: Segment in the coarse pass alone.
        tta: Average looks through several windows.
        samples: Segmentations to draw, whose mean is the answer and whose differences are ``found.uncertainty``.

    Raises:
        RunError: No path is given, a path holds no model, or the models were trained with different specs.
    """
    if not paths:
        raise RunError("load needs the folder of a run, or a file of liverseg export: none was given")
    from liverseg.inference.model import Model
    from liverseg.inference.segment import load_predictor

    predictor = load_predictor(*map(Path, paths), device=device, fast=fast, tta=tta, samples=samples)
    return Model(predictor=predictor)


# ---- progress


@contextlib.contextmanager
def _reporter(name: str, total: int, progress: ShowProgress) -> Iterator[Callable[[str], None]]:
    """What is to be called after each case with a note."""
    done = 0
    if progress is True:
        from liverseg.console import progress_bar

        with progress_bar() as bar:
            task = bar.add_task(name, total=total, note="")
            yield lambda note: bar.update(task, advance=1, note=note)
        return

    def advance(note: str) -> None:
        nonlocal done
        done += 1
        if callable(progress):
            progress(Progress(done=done, total=total, note=note))

    yield advance


@contextlib.contextmanager
def _training_callbacks(config: TrainConfig, progress: ShowProgress) -> Iterator[Callbacks]:
    from liverseg.training.callbacks import SILENT, Callbacks, console_progress, epoch_line

    if progress is True:
        with console_progress(config) as callbacks:
            yield callbacks
        return
    if not callable(progress):
        yield SILENT
        return
    call, note, steps = progress, "", config.optim.steps_per_epoch

    def stepped(epoch: int, step: int, _: float) -> None:
        call(Progress(done=(epoch - 1) * steps + step, total=config.optim.epochs * steps, note=note))

    def finished_epoch(row: Any) -> None:
        nonlocal note
        note = epoch_line(row, config)
        call(Progress(done=int(row["epoch"]) * steps, total=config.optim.epochs * steps, note=note))

    yield Callbacks(started=lambda _: None, stepped=stepped, finished_epoch=finished_epoch)
