"""A grid over learning rate, γ and α on one case, in which bad settings stop early."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from data_cache.errors import ConfigError, RunError
from data_cache.files import read_json, write_csv, write_json
from data_cache.reader import CacheStore
from data_cache.records import parse, to_json
from liverseg.device import choose_device
from liverseg.laboratory.experiment import begin, description
from liverseg.laboratory.figures import Cell, heat_figure
from liverseg.laboratory.halving import Attempt, Halving, Setting, ranked, survivors
from liverseg.laboratory.loss_choice import NUMBERS
from liverseg.laboratory.one_case import Learner, Subject, curve_of, find_subject, refuse_process_groups
from liverseg.laboratory.overfit import SUMMARY, subject_text
from liverseg.model.network import require_divisible
from liverseg.pictures.sheet import save
from liverseg.training.checkpoint import load_checkpoint, restore, save_checkpoint
from liverseg.training.config import TrainConfig
from pipeline.workers import Failure, run_parallel

# The original project's grid.
LEARNING_RATES, GAMMAS, ALPHAS = (1e-1, 1e-2, 1e-3), (1.0, 1.5, 2.0), (0.5, 0.75, 1.0)
# What the grid decides besides what every experiment does.
TRIED = ("optim.learning_rate", "loss.gamma", "loss.alpha")
SETTINGS, RESULTS, HEAT_MAPS = "settings", "results.csv", "heat_maps.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class LaboratoryCallbacks:
    """Told about progress."""

    warned: Callable[[str], None]
    entered: Callable[[int, int], None]  # a rung, from 1, and how many settings enter it
    stepped: Callable[[Setting, int], None]  # in this process only
    advanced: Callable[[Attempt, int, int], None]  # with the rung, from 1, and its last step


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What came out: attempts, the best first."""

    subject: Subject
    attempts: tuple[Attempt, ...]

    @property
    def best(self) -> Attempt | None:
        """The first, unless nothing has been learnt."""
        return self.attempts[0] if self.attempts and self.attempts[0].score > 0 else None


def settings_of(
    config: TrainConfig,
    *,
    learning_rates: Sequence[float] | None,
    gammas: Sequence[float] | None,
    alphas: Sequence[float] | None,
) -> tuple[Setting, ...]:
    """The grid; what is None is as in the original project, or one number where the loss does not look at it.

    Raises:
        ConfigError: A number is out of range, or the loss does not look at it.
    """
    used = NUMBERS[config.loss.name]
    for name, values in (("gamma", gammas), ("alpha", alphas)):
        if values is not None and name not in used:
            raise ConfigError(f"--{name}s: the loss {config.loss.name} has no {name}")
    gammas = gammas or (GAMMAS if "gamma" in used else (config.loss.gamma,))
    alphas = alphas or (ALPHAS if "alpha" in used else (config.loss.alpha,))
    places = itertools.product(*map(dict.fromkeys, (learning_rates or LEARNING_RATES, gammas, alphas)))
    settings = tuple(Setting(learning_rate=lr, gamma=gamma, alpha=alpha) for lr, gamma, alpha in places)
    for setting in settings:
        setting.within(config)
    return settings


def tune(
    store: CacheStore,
    run: Path,
    config: TrainConfig,
    *,
    settings: Sequence[Setting],
    halving: Halving,
    jobs: int,
    callbacks: LaboratoryCallbacks,
) -> Tuning:
    """Try ``settings`` on the case of ``config``, and write what comes out.

    Each of ``jobs`` processes computes on one CPU thread, which is how ``run_parallel`` calls a task, so that their number
    changes nothing but the time; a GPU does one setting after another. Started again, everything that was finished in ``run`` is kept.

    Args:
        store: The cache.
        run: Gets config.toml, settings/, results.csv, heat_maps.png and summary.json.
        config: From ``experiment_config``, with the loss whose numbers are tried.
        settings: From ``settings_of``.
        halving: When who stops; its steps are those of ``config``.
        jobs: Processes.
        callbacks: Told about progress.

    Raises:
        RunError: ``run`` was begun with something else.
        ConfigError: Several processes for one GPU, or too few steps for the rungs.
        CacheError: The case is missing, or has no label or no liver.
    """
    refuse_process_groups()
    if jobs > 1 and choose_device(config.device).type != "cpu":
        raise ConfigError(f"--jobs {jobs}: a GPU does one setting after another, leave --jobs out")
    ends = halving.ends()
    (case_id,) = config.data.train_cases
    subject = find_subject(store, case_id)
    require_divisible(config.model, store.schema.spec.shape_zyx)
    begin(run, _asked(store, subject, config, settings, halving), config, warned=callbacks.warned)
    if not subject.tumour_voxels:
        callbacks.warned(f"{case_id}: {subject_text(subject)}")
    (run / SETTINGS).mkdir(exist_ok=True)
    attempts = {setting: Attempt(setting=setting) for setting in settings}
    left = list(settings)
    for rung, end in enumerate(ends, 1):
        callbacks.entered(rung, len(left))
        for attempt in _rung(store, run, config, left, end=end, jobs=jobs, callbacks=callbacks):
            attempts[attempt.setting] = attempt
            callbacks.advanced(attempt, rung, end)
        _write(run, _tuning(subject, attempts), config, ends)
        going_on = survivors([attempts[s] for s in left], end=end, count=halving.kept(len(left)))
        for setting in left if end == ends[-1] else set(left) - set(going_on):
            _checkpoint(run, setting).unlink(missing_ok=True)
        left = going_on
    return _tuning(subject, attempts)


def arguments(setting: Setting, config: TrainConfig) -> str:
    """What gives ``liverseg train`` this setting."""
    numbers = {"gamma": setting.gamma, "alpha": setting.alpha}
    used = {key: value for key, value in numbers.items() if key in NUMBERS[config.loss.name]}
    parts = [f"loss.name={config.loss.name}", *(f"loss.{key}={value!r}" for key, value in used.items())]
    parts.append(f"optim.learning_rate={setting.learning_rate!r}")
    return " ".join(f"--set {part}" for part in parts)


def _tuning(subject: Subject, attempts: Mapping[Setting, Attempt]) -> Tuning:
    return Tuning(subject=subject, attempts=ranked(list(attempts.values())))


def _asked(
    store: CacheStore, subject: Subject, config: TrainConfig, settings: Sequence[Setting], halving: Halving
) -> dict[str, Any]:
    asked = description("tune", store, subject, config, without=("gamma", "alpha"))
    asked["optim"].pop("learning_rate")
    axes = ("learning_rate", "gamma", "alpha")
    grid = {axis: list(dict.fromkeys(getattr(s, axis) for s in settings)) for axis in axes}
    return {**asked, "rungs": halving.rungs, "keep": halving.keep, "grid": grid}


# ---- one rung


def _rung(
    store: CacheStore,
    run: Path,
    config: TrainConfig,
    settings: Sequence[Setting],
    *,
    end: int,
    jobs: int,
    callbacks: LaboratoryCallbacks,
) -> Iterator[Attempt]:
    """Each setting when it has come to ``end``: first those that have already."""
    todo = []
    for setting in settings:
        attempt = read_attempt(run, setting)
        if attempt is not None and (attempt.step >= end or attempt.lost):
            yield attempt
        else:
            todo.append(setting)
    own = jobs == 1 or len(todo) <= 1  # then nothing is sent to another process
    task = partial(_advance, store.path, run, config, end=end, stepped=callbacks.stepped if own else _nothing)
    with closing(run_parallel(task, todo, jobs=jobs)) as outcomes:
        for outcome in outcomes:
            yield _failed(run, outcome) if isinstance(outcome, Failure) else outcome


def _nothing(_: Setting, __: int) -> None:
    pass


def _failed(run: Path, failure: Failure[Setting]) -> Attempt:
    setting = failure.item
    return replace(read_attempt(run, setting) or Attempt(setting=setting), failure=failure.reason)


def _advance(
    cache: Path,
    run: Path,
    config: TrainConfig,
    setting: Setting,
    *,
    end: int,
    stepped: Callable[[Setting, int], None],
) -> Attempt:
    """Take a setting from where it stands to the end of a rung."""
    own, path, store = setting.within(config), _checkpoint(run, setting), CacheStore.open(cache)
    learner = Learner(store, own)
    if path.exists():
        restore(learner.state, load_checkpoint(path), own, path=path)
    learner.learn(until_step=end, stepped=lambda step, _: stepped(setting, step))
    history = learner.state.history
    if not learner.diverged:
        save_checkpoint(path, learner.state, own, store.schema.spec)
    attempt = Attempt(
        setting=setting,
        curve=curve_of(history),
        diverged=learner.diverged,
        seconds=sum(row["seconds"] or 0.0 for row in history),
    )
    # After the checkpoint: it marks the rung as done.
    write_json(_record(run, setting), to_json(attempt))
    return attempt


# ---- files


def _checkpoint(run: Path, setting: Setting) -> Path:
    return run / SETTINGS / f"{setting.name}.pt"


def _record(run: Path, setting: Setting) -> Path:
    return run / SETTINGS / f"{setting.name}.json"


def read_attempt(run: Path, setting: Setting) -> Attempt | None:
    """How far a setting has come in a run; raises RunError where its record is damaged."""
    path = _record(run, setting)
    try:
        content = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as failure:
        raise RunError(
            f"{path}: unreadable ({failure}): delete it to have the setting tried again"
        ) from failure
    return parse(Attempt, content, source=str(path), error=RunError)


def attempt_row(attempt: Attempt) -> dict[str, Any]:
    """One setting in plain numbers."""
    last = attempt.curve[-1] if attempt.curve else None
    return {
        "learning_rate": attempt.setting.learning_rate,
        "gamma": attempt.setting.gamma,
        "alpha": attempt.setting.alpha,
        "score": attempt.score,
        "liver_dice": None if last is None else last.liver,
        "tumour_dice": None if last is None else last.tumour,
        "steps": attempt.step,
        "seconds": attempt.seconds,
        "note": note_of(attempt),
    }


def note_of(attempt: Attempt) -> str:
    """What a reader must know of a setting besides its numbers."""
    return "diverged" if attempt.diverged else attempt.failure or ""


def _write(run: Path, tuning: Tuning, config: TrainConfig, ends: Sequence[int]) -> None:
    best, summary = tuning.best, summary_json(tuning, config, ends)
    write_csv(run / RESULTS, summary["settings"])
    write_json(run / SUMMARY, summary)
    cells = {attempt.setting: _cell(attempt) for attempt in tuning.attempts}
    figure = heat_figure(
        list(cells.values()),
        steps=ends[-1],
        best=None if best is None else cells[best.setting],
        title=f"{config.loss.name} on {tuning.subject.case_id}: {summary['score']}\n"
        f"rungs end at step {', '.join(map(str, ends))}",
    )
    save(figure, run / HEAT_MAPS)


def summary_json(tuning: Tuning, config: TrainConfig, ends: Sequence[int]) -> dict[str, Any]:
    """The content of ``summary.json``; ``ends`` are the last steps of the rungs."""
    best = tuning.best
    return {
        "case": tuning.subject.case_id,
        "loss": config.loss.name,
        "score": "mean of liver and tumour Dice" if tuning.subject.tumour_voxels else "liver Dice",
        "rungs_end_at_step": list(ends),
        "best": None if best is None else attempt_row(best),
        "arguments": None if best is None else arguments(best.setting, config),
        "settings": list(map(attempt_row, tuning.attempts)),
    }


def _cell(attempt: Attempt) -> Cell:
    setting = attempt.setting
    return Cell(
        learning_rate=setting.learning_rate,
        gamma=setting.gamma,
        alpha=setting.alpha,
        score=attempt.score,
        steps=attempt.step,
        note="diverged" if attempt.diverged else "killed" if attempt.failure else "",
    )
