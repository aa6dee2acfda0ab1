"""One case learnt by heart with one loss after another: which of them find the tumour, and how fast?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict

from data_cache.errors import RunError
from data_cache.files import read_json, write_csv, write_json
from data_cache.reader import CacheStore
from data_cache.records import STRICT, parse, to_json
from liverseg.laboratory.experiment import begin, description
from liverseg.laboratory.figures import curves_figure
from liverseg.laboratory.hypotheses import (
    GOOD_DICE,
    HYPOTHESES,
    LEARNT_DICE,
    Class,
    TrainingCurve,
    Verdict,
    judge,
    steps_to,
)
from liverseg.laboratory.loss_choice import ALL, NUMBERS, numbers_of, numbers_text
from liverseg.laboratory.one_case import (
    Learner,
    Point,
    Subject,
    curve_of,
    find_subject,
    refuse_process_groups,
    seconds_per_step,
)
from liverseg.model.losses import LossConfig, LossName
from liverseg.model.network import require_divisible
from liverseg.pictures.probability_figure import probability_figure
from liverseg.pictures.sheet import save
from liverseg.training.config import TrainConfig

LOSSES, CURVES, CURVES_FIGURE, TABLE, SUMMARY = (
    "losses",
    "curves.csv",
    "curves.png",
    "table.csv",
    "summary.json",
)
CLASSES: tuple[Class, ...] = ("liver", "tumour")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossResult:
    """What came out of one loss.

    Attributes:
        curve: In the order of steps; ends early where the loss was not finite.
        diverged: It was not finite in the steps after the last point.
        seconds_per_step: Without scoring; None before the first point.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    loss: LossConfig
    curve: tuple[Point, ...]
    diverged: bool
    seconds_per_step: float | None

    def final(self, of: Class) -> float | None:
        """Dice after the last step; None for a class that the case does not have, or before the first point."""
        value: float | None = getattr(self.curve[-1], of) if self.curve else None
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class LaboratoryCallbacks:
    """Told about progress."""

    warned: Callable[[str], None]
    stepped: Callable[[str, int, float], None]  # loss, step, steps per second
    finished: Callable[[LossResult], None]  # also of what was there already


@dataclass(frozen=True, slots=True, kw_only=True)
class Overfit:
    """An experiment as it stands: the losses that are done, in the order of ``ALL``, and the hypotheses."""

    subject: Subject
    results: tuple[LossResult, ...]
    verdicts: tuple[Verdict, ...]


def overfit(
    store: CacheStore,
    run: Path,
    config: TrainConfig,
    *,
    losses: Sequence[LossConfig],
    callbacks: LaboratoryCallbacks,
) -> Overfit:
    """Learn the case of ``config`` with each of ``losses``, from the same weights, and write what comes out.

    Losses that ``run`` has already are not learnt again; one that is stopped half-way is. A run may be given more
    losses later: tables, curves and verdicts are of all that it has.

    Args:
        store: The cache.
        run: Gets config.toml, losses/NAME.json and NAME.png, curves.csv and .png, table.csv, summary.json.
        config: From ``experiment_config``; its loss is not looked at.
        losses: From ``loss_configs``.
        callbacks: Told about progress.

    Raises:
        RunError: ``run`` was begun with something else.
        CacheError: The case is missing, or has no label or no liver.
    """
    refuse_process_groups()
    (case_id,) = config.data.train_cases
    subject = find_subject(store, case_id)
    require_divisible(config.model, store.schema.spec.shape_zyx)
    asked = description("overfit", store, subject, config, without=("name", *NUMBERS["dice_focal"]))
    # First: the results of a folder that is not ours are not results.
    begin(run, asked, config, warned=callbacks.warned)
    done = read_results(run)
    _refuse_other_numbers(run, done, losses)
    if not subject.tumour_voxels:
        callbacks.warned(f"{case_id}: {subject_text(subject)}")
    for loss in losses:
        result = done.get(loss.name)
        if result is None:
            result = _learn(store, run, replace(config, loss=loss), subject, callbacks)
            done[loss.name] = result
        callbacks.finished(result)
        _write(run, _experiment(subject, done), config)
    return _experiment(subject, done)


def read_results(run: Path) -> dict[LossName, LossResult]:
    """The losses that a run has done; raises RunError for a damaged result."""
    return {name: _read_result(path) for name in ALL if (path := _result_path(run, name)).exists()}


def _experiment(subject: Subject, done: Mapping[LossName, LossResult]) -> Overfit:
    courses = {
        name: TrainingCurve(curve=result.curve, diverged=result.diverged) for name, result in done.items()
    }
    return Overfit(
        subject=subject,
        results=tuple(done[name] for name in ALL if name in done),
        verdicts=tuple(judge(hypothesis, courses) for hypothesis in HYPOTHESES),
    )


def _learn(
    store: CacheStore, run: Path, config: TrainConfig, subject: Subject, callbacks: LaboratoryCallbacks
) -> LossResult:
    learner, name = Learner(store, config), config.loss.name
    steps = config.optim.epochs * config.optim.steps_per_epoch
    learner.learn(until_step=steps, stepped=lambda step, rate: callbacks.stepped(name, step, rate))
    history = learner.state.history
    result = LossResult(
        loss=config.loss,
        curve=curve_of(history),
        diverged=learner.diverged,
        seconds_per_step=seconds_per_step(history, samples_per_step=learner.samples_per_step),
    )
    (run / LOSSES).mkdir(exist_ok=True)
    if not learner.diverged:
        _draw(store, run, learner, result, subject)
    # Last: it marks the loss as done.
    write_json(_result_path(run, name), to_json(result))
    return result


def _draw(store: CacheStore, run: Path, learner: Learner, result: LossResult, subject: Subject) -> None:
    answer = learner.answer()
    dice = " · ".join(f"{of} Dice {v:.3f}" for of in CLASSES if (v := result.final(of)) is not None)
    grid = store.meta(subject.case_id).view_grid(answer.view, store.schema.spec.shape_zyx)
    title = f"{result.loss.name} after {result.curve[-1].step} steps on {subject.case_id}\n{dice}"
    figure = probability_figure(
        answer.image_bczyx[0, 0].cpu().numpy(),
        answer.truth_bczyx[0].cpu().numpy(),
        answer.foreground_bczyx[0].cpu().numpy(),
        grid.spacing_zyx_mm,
        title=f"{title} · {numbers_text(result.loss)}",
    )
    save(figure, run / LOSSES / f"{result.loss.name}.png")


# ---- files


def _result_path(run: Path, name: LossName) -> Path:
    return run / LOSSES / f"{name}.json"


def _read_result(path: Path) -> LossResult:
    try:
        content = read_json(path)
    except (OSError, ValueError) as failure:
        raise RunError(
            f"{path}: unreadable ({failure}): delete it to have the loss learnt again"
        ) from failure
    return parse(LossResult, content, source=str(path), error=RunError)


def _refuse_other_numbers(
    run: Path, done: Mapping[LossName, LossResult], losses: Sequence[LossConfig]
) -> None:
    for loss in losses:
        if loss.name not in done:
            continue
        there, here = numbers_of(done[loss.name].loss), numbers_of(loss)
        changed = [
            f"{key} {there[key]}, this asks for {here[key]}" for key in there if there[key] != here[key]
        ]
        if changed:
            raise RunError(f"{run}: has {loss.name} with {'; '.join(changed)}: name another folder for that")


def _write(run: Path, experiment: Overfit, config: TrainConfig) -> None:
    results, subject = experiment.results, experiment.subject
    write_csv(run / CURVES, [_point_row(r, point) for r in results for point in r.curve])
    rows = list(map(summary_row, results))
    write_csv(run / TABLE, rows)
    figure = curves_figure(
        {r.loss.name: r.curve for r in results},
        steps=config.optim.epochs * config.optim.steps_per_epoch,
        learnt=LEARNT_DICE,
        title=f"One case learnt by heart: {subject.case_id}\n{subject_text(subject)}",
    )
    save(figure, run / CURVES_FIGURE)
    write_json(run / SUMMARY, summary_json(experiment))


def _point_row(result: LossResult, point: Point) -> dict[str, Any]:
    dice = {"liver_dice": point.liver, "tumour_dice": point.tumour}
    return {"loss": result.loss.name, "step": point.step, "value": point.loss, **dice}


def subject_text(subject: Subject) -> str:
    """What is to be found, in words."""
    if not subject.tumour_voxels:
        return "no tumour on the cached grid: only the liver can be judged"
    share = f"tumour is {100 * subject.tumour_share:.2g} % of the liver"
    return f"{share}, {subject.tumour_voxels} voxels of the cached grid"


def summary_row(result: LossResult) -> dict[str, Any]:
    """One loss in plain numbers."""
    row: dict[str, Any] = {"loss": result.loss.name, "numbers": numbers_text(result.loss)}
    row |= {f"{of}_dice": result.final(of) for of in CLASSES}
    for of, dice in ((of, dice) for of in CLASSES for dice in (LEARNT_DICE, GOOD_DICE)):
        row[f"{of}_steps_to_{dice:g}"] = steps_to(result.curve, of, dice)
    row["seconds_per_step"] = result.seconds_per_step
    row["steps"] = result.curve[-1].step if result.curve else 0
    row["diverged"] = result.diverged
    return row


def summary_json(experiment: Overfit) -> dict[str, Any]:
    """The content of ``summary.json``."""
    hypotheses = [
        {"hypothesis": v.hypothesis.text, "outcome": v.outcome, "reason": v.reason}
        for v in experiment.verdicts
    ]
    return {
        "case": experiment.subject.case_id,
        "tumour_share_of_liver": experiment.subject.tumour_share,
        "tumour_voxels_of_grid": experiment.subject.tumour_voxels,
        "learnt_means_tumour_dice": LEARNT_DICE,
        "losses": list(map(summary_row, experiment.results)),
        "hypotheses": hypotheses,
    }
