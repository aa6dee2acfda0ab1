"""Commands that try losses and their numbers on one case."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_cache.text import pluralise
from liverseg.cli.common import FILE, FOLDER
from liverseg.cli.outcome import Outcome

if TYPE_CHECKING:
    from liverseg.laboratory.halving import Halving
    from liverseg.laboratory.overfit import LaboratoryCallbacks as LossCallbacks
    from liverseg.laboratory.overfit import Overfit
    from liverseg.laboratory.tune import LaboratoryCallbacks as SettingCallbacks
    from liverseg.laboratory.tune import Tuning
    from liverseg.training.config import TrainConfig


class Numbers(click.ParamType[tuple[float, ...]]):
    """``0.1,0.01``: one or more numbers."""

    name = "A,B,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"expected comma-separated numbers such as 0.1,0.01, got {value!r}", param, ctx)


CONFIG = click.option(
    "--config", type=FILE, help="TOML file of a training. Default: a network of 8 base channels."
)
SET = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Such as device=cuda; repeatable."
)
STEPS = click.option("--steps", default=300, show_default=True, type=click.IntRange(min=1))
EVERY_STEPS = 10
EVERY = click.option(
    "--every",
    type=click.IntRange(min=1),
    help="Steps between two scores. Default: 10, or --steps if these are less.",
)


@click.command()
@click.argument("cache", type=FOLDER)
@click.argument("case")
@click.argument("run", type=FOLDER)
@click.option("--losses", default="all", show_default=True, help="all, or names with commas between.")
@STEPS
@EVERY
@CONFIG
@SET
def overfit(
    cache: Path,
    case: str,
    run: Path,
    losses: str,
    steps: int,
    every: int | None,
    config: Path | None,
    overrides: tuple[str, ...],
) -> Outcome:
    """Learn CASE of the store CACHE by heart with one loss after another: which of them find the tumour?

    Every loss starts from the same weights and sees the same: the liver view of the case, a batch of one unless
    optim.batch_size says otherwise, no augmentation. Writes into the folder RUN the curves, a picture of the
    probabilities beside the truth for each loss, tables, and what became of the original project's claims.

    Of --config, the network, the optimizer, the input, the seed and the device are used; its [loss] section for the
    loss that it names. Run the same command again to resume, or with other --losses to add them.

    \b
    Example: liverseg overfit data/liver.zarr liver_31 runs/losses
             liverseg overfit data/liver.zarr liver_31 runs/focal --losses focal,dice_focal --set loss.gamma=1
    """
    from data_cache.reader import CacheStore
    from liverseg.console import complain, say
    from liverseg.laboratory.loss_choice import choose_losses, loss_configs, numbers_text
    from liverseg.laboratory.one_case import experiment_config
    from liverseg.laboratory.overfit import overfit as learn
    from liverseg.laboratory.overfit import summary_json

    chosen = loss_configs(choose_losses(losses), config, overrides)
    every = every or min(EVERY_STEPS, steps)
    settings = experiment_config(config, overrides, case_id=case, steps=steps, every=every)
    store = CacheStore.open(cache)
    with _watching_losses(steps, count=len(chosen)) as callbacks:
        for loss in chosen:
            say(f"{loss.name}: {numbers_text(loss)}")
        found = learn(store, run, settings, losses=chosen, callbacks=callbacks)
    _print_losses(found)
    n_pictures = pluralise(sum(not result.diverged for result in found.results), "picture")
    say(f"wrote summary.json, table.csv, curves.csv, curves.png and {n_pictures} of probabilities to {run}")
    all_diverged = all(result.diverged for result in found.results)
    if all_diverged:
        complain("every loss diverged: lower optim.learning_rate")
    return Outcome(result={"run": run, **summary_json(found)}, complete=not all_diverged)


@contextmanager
def _watching_losses(steps: int, *, count: int) -> Iterator[LossCallbacks]:
    from liverseg.console import number, progress_bar, say, warn
    from liverseg.laboratory.overfit import LaboratoryCallbacks, LossResult

    with progress_bar() as bar:
        task, done = bar.add_task("overfit", total=count * steps, note=""), 0

        def stepped(loss: str, step: int, rate: float) -> None:
            bar.update(task, completed=done * steps + step, note=f"{loss}, {rate:.2f} steps/s")

        def finished(result: LossResult) -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=done * steps)
            end = result.curve[-1].step if result.curve else 0
            what = f"diverged after step {end}" if result.diverged else f"{end} steps"
            dice = f"liver {number(result.final('liver'))} tumour {number(result.final('tumour'))}"
            say(f"{result.loss.name}: {what}, Dice {dice}, {number(result.seconds_per_step, 2)} s per step")

        yield LaboratoryCallbacks(warned=warn, stepped=stepped, finished=finished)


def _print_losses(found: Overfit) -> None:
    from liverseg.console import console, number, say, table
    from liverseg.laboratory.hypotheses import GOOD_DICE, LEARNT_DICE, steps_to
    from liverseg.laboratory.overfit import CLASSES, subject_text

    levels = (LEARNT_DICE, GOOD_DICE)
    rows = []
    for result in found.results:
        row = [result.loss.name + (" (diverged)" if result.diverged else "")]
        for of in CLASSES:
            steps = (steps_to(result.curve, of, level) for level in levels)
            row += [number(result.final(of)), *(number(step, 0) for step in steps)]
        rows.append((*row, number(result.seconds_per_step, 2)))
    to = [f"{level:g} at step" for level in levels]
    headers = ("loss", "liver Dice", *to, "tumour Dice", *to, "s per step")
    console.print(table(f"{found.subject.case_id}: {subject_text(found.subject)}", headers, rows))
    for verdict in found.verdicts:
        say(verdict.text)


@click.command()
@click.argument("cache", type=FOLDER)
@click.argument("case")
@click.argument("run", type=FOLDER)
@click.option("--loss", default="dice_focal", show_default=True, help="Whose numbers are tried.")
@click.option("--learning-rates", type=Numbers(), help="Default: 0.1,0.01,0.001.")
@click.option("--gammas", type=Numbers(), help="Default: 1,1.5,2, where the loss has a γ.")
@click.option("--alphas", type=Numbers(), help="Default: 0.5,0.75,1, where the loss has an α.")
@STEPS
@EVERY
@click.option("--rungs", default=3, show_default=True, type=click.IntRange(min=1), help="1 stops none early.")
@click.option(
    "--keep",
    default=3,
    show_default=True,
    type=click.IntRange(min=2),
    help="One in so many goes on after each rung, with so many times the steps.",
)
@click.option("--jobs", type=click.IntRange(min=1), help="Processes. Default: physical cores; 1 on a GPU.")
@CONFIG
@SET
def tune(
    cache: Path,
    case: str,
    run: Path,
    *,
    loss: str,
    learning_rates: tuple[float, ...] | None,
    gammas: tuple[float, ...] | None,
    alphas: tuple[float, ...] | None,
    steps: int,
    every: int | None,
    rungs: int,
    keep: int,
    jobs: int | None,
    config: Path | None,
    overrides: tuple[str, ...],
) -> Outcome:
    """Try a grid of learning rate, γ and α on CASE of the store CACHE, and stop the bad ones early.

    Successive halving: all settings get a few steps, the best third three times as many, and so on; the last get
    --steps. The score is the mean of the liver's and the tumour's Dice on the case. Writes into the folder RUN a
    sorted table, heat maps, and the best setting; run the same command again to resume.

    \b
    Example: liverseg tune data/liver.zarr liver_31 runs/tune
             liverseg tune data/liver.zarr liver_31 runs/tune2 --learning-rates 0.02,0.005 --gammas 0.3 --alphas 0.99,1
    """
    from data_cache.reader import CacheStore
    from liverseg.console import say
    from liverseg.device import choose_device
    from liverseg.laboratory.halving import Halving
    from liverseg.laboratory.loss_choice import choose_loss, loss_configs
    from liverseg.laboratory.one_case import experiment_config
    from liverseg.laboratory.tune import TRIED, settings_of, summary_json
    from liverseg.laboratory.tune import tune as try_all
    from pipeline.build import physical_cores

    (chosen,) = loss_configs((choose_loss(loss),), config, overrides)
    every = every or min(EVERY_STEPS, steps)
    given = experiment_config(config, overrides, case_id=case, steps=steps, every=every, tried=TRIED)
    settings = replace(given, loss=chosen)
    grid = settings_of(settings, learning_rates=learning_rates, gammas=gammas, alphas=alphas)
    halving = Halving(steps=steps, every=every, rungs=rungs, keep=keep)
    jobs = jobs or (physical_cores() if choose_device(settings.device).type == "cpu" else 1)
    with _watching_settings(halving) as callbacks:
        found = try_all(
            CacheStore.open(cache),
            run,
            settings,
            settings=grid,
            halving=halving,
            jobs=jobs,
            callbacks=callbacks,
        )
    _print_settings(found, settings)
    say(f"wrote results.csv, heat_maps.png and summary.json to {run}")
    return Outcome(result={"run": run, **summary_json(found, settings, halving.ends())})


@contextmanager
def _watching_settings(halving: Halving) -> Iterator[SettingCallbacks]:
    from liverseg.console import number, progress_bar, say, warn
    from liverseg.laboratory.halving import Attempt, Setting
    from liverseg.laboratory.tune import LaboratoryCallbacks, note_of

    ends = (0, *halving.ends())
    with progress_bar() as bar:
        task, done = bar.add_task("tune", total=None, note=""), 0

        def entered(rung: int, count: int) -> None:
            bar.update(task, total=done + halving.steps_of(count, rung=rung))

        def stepped(setting: Setting, step: int) -> None:
            start = max(end for end in ends if end < step)
            bar.update(task, completed=done + step - start, note=setting.text)

        def advanced(attempt: Attempt, rung: int, end: int) -> None:
            nonlocal done
            done += end - ends[rung - 1]
            bar.update(task, completed=done)
            score = f"score {number(attempt.score_at(end))} at step {end}"
            say(f"rung {rung}, {attempt.setting.text}: {note_of(attempt) or score}")

        yield LaboratoryCallbacks(warned=warn, entered=entered, stepped=stepped, advanced=advanced)


def _print_settings(found: Tuning, config: TrainConfig) -> None:
    from liverseg.console import console, number, say, table
    from liverseg.laboratory.tune import arguments, attempt_row

    rows = []
    for row in map(attempt_row, found.attempts):
        setting = (f"{row[key]:g}" for key in ("learning_rate", "gamma", "alpha"))
        scores = (number(row[key]) for key in ("score", "liver_dice", "tumour_dice"))
        rows.append((*setting, *scores, str(row["steps"]), number(row["seconds"], 0), row["note"]))
    headers = ("learning rate", "γ", "α", "score", "liver Dice", "tumour Dice", "steps", "s", "note")
    console.print(table(f"{config.loss.name} on {found.subject.case_id}", headers, rows))
    if found.best is None:
        say("no setting has learnt anything: try lower learning rates, or more steps")
    else:
        say(f"best: liverseg train … {arguments(found.best.setting, config)}")


COMMANDS = (overfit, tune)
