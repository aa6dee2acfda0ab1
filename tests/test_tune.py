"""Successive halving on one case: who goes on, what a stop costs, what is reported."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from test_overfit import TINY, Killed, assert_is_drawn, curve
from tiny import TinyWorld

from data_cache.errors import ConfigError, RunError
from liverseg.cli import main
from liverseg.laboratory.halving import Attempt, Halving, Setting, ranked, survivors
from liverseg.laboratory.loss_choice import loss_configs
from liverseg.laboratory.one_case import experiment_config
from liverseg.laboratory.tune import (
    TRIED,
    LaboratoryCallbacks,
    Tuning,
    arguments,
    read_attempt,
    settings_of,
    tune,
)
from liverseg.model.losses import LossName
from liverseg.training.config import TrainConfig, load_config
from pipeline.workers import Failure

SILENT = LaboratoryCallbacks(
    warned=lambda _: None, entered=lambda *_: None, stepped=lambda *_: None, advanced=lambda *_: None
)
CASE = "liver_2"
HALVING = Halving(steps=8, every=2, rungs=2, keep=2)


def tiny_tuning(loss: LossName = "dice_focal", *, halving: Halving = HALVING) -> TrainConfig:
    sets = tuple(s for s in TINY if not s.startswith("optim.learning_rate"))
    config = experiment_config(
        None, sets, case_id=CASE, steps=halving.steps, every=halving.every, tried=TRIED
    )
    return replace(config, loss=loss_configs((loss,), None, ())[0])


def grid(*rates: float, config: TrainConfig | None = None) -> tuple[Setting, ...]:
    return settings_of(config or tiny_tuning(), learning_rates=rates, gammas=(0.3,), alphas=(0.99,))


def tried(world: TinyWorld, run: Path, settings: Sequence[Setting], **options: Any) -> Tuning:
    options = {"jobs": 1, "halving": HALVING, "callbacks": SILENT, **options}
    return tune(world.store, run, tiny_tuning(halving=options["halving"]), settings=settings, **options)


def without_times(tuning: Tuning) -> list[Attempt]:
    return [replace(attempt, seconds=0.0) for attempt in tuning.attempts]


def setting(rate: float) -> Setting:
    return Setting(learning_rate=rate, gamma=1.0, alpha=1.0)


def attempt(rate: float, *dice: float, **state: Any) -> Attempt:
    """Points 10 steps apart with that tumour Dice, and a liver Dice of 0.9."""
    return Attempt(setting=setting(rate), curve=curve(*dice), **state)


# ---- halving by hand


def test_rungs_on_the_sizes_of_the_original_project() -> None:
    halving = Halving(steps=300, every=10, rungs=3, keep=3)
    assert halving.ends() == (30, 100, 300)
    assert (halving.kept(27), halving.kept(9), halving.kept(3), halving.kept(1)) == (9, 3, 1, 1)
    # 27 · 30 + 9 · 70 + 3 · 200; without halving it would be 27 · 300.
    assert halving.steps_of(27, rung=1) == 2040
    assert halving.steps_of(9, rung=2) == 1230
    assert Halving(steps=300, every=10, rungs=1, keep=3).ends() == (300,)


def test_too_few_steps_for_the_rungs() -> None:
    with pytest.raises(ConfigError, match="30 steps, scored every 10, are too few for 3 rungs"):
        Halving(steps=30, every=10, rungs=3, keep=3).ends()


def test_the_best_go_on_in_the_order_of_the_grid() -> None:
    # Tumour Dice at step 20, where the rung ends; what came later or earlier does not count.
    attempts = [
        attempt(0.1, 0.9, 0.1),
        attempt(0.2, 0.1, 0.5),
        attempt(0.3, 0.2, 0.2, 0.99),
        attempt(0.4, 0.3, 0.7),
        attempt(0.5, 0.8, diverged=True),
    ]
    assert survivors(attempts, end=20, count=2) == [setting(0.2), setting(0.4)]
    assert survivors(attempts, end=20, count=9) == [setting(r) for r in (0.1, 0.2, 0.3, 0.4)]
    # At the end of the first rung the fifth was not lost yet.
    assert survivors(attempts, end=10, count=2) == [setting(0.1), setting(0.5)]


def test_who_ties_with_the_last_stays() -> None:
    attempts = [attempt(0.1, 0.0), attempt(0.2, 0.5), attempt(0.3, 0.0), attempt(0.4, diverged=True)]
    assert survivors(attempts, end=10, count=1) == [setting(0.2)]
    assert survivors(attempts, end=10, count=2) == [setting(0.1), setting(0.2), setting(0.3)]
    assert survivors([attempt(0.4, diverged=True)], end=10, count=1) == []


def test_the_ranking_puts_who_came_further_first_and_who_is_lost_last() -> None:
    far, further_but_worse = attempt(0.1, 0.9), attempt(0.2, 0.3, 0.2)
    diverged, killed = attempt(0.3, 0.9, 0.9, diverged=True), Attempt(setting=setting(0.4), failure="SIGKILL")
    assert ranked([killed, far, diverged, further_but_worse]) == (further_but_worse, far, diverged, killed)
    assert further_but_worse.score == pytest.approx((0.9 + 0.2) / 2)
    assert diverged.score == killed.score == 0


# ---- the grid


def test_the_grid_of_the_original_project() -> None:
    settings = settings_of(tiny_tuning(), learning_rates=None, gammas=None, alphas=None)
    assert len(set(settings)) == len(settings) == 27
    assert settings[0] == Setting(learning_rate=0.1, gamma=1.0, alpha=0.5)
    # What a loss does not look at is not tried.
    of_focal = settings_of(tiny_tuning("focal"), learning_rates=None, gammas=None, alphas=None)
    assert {s.gamma for s in of_focal} == {1.0, 1.5, 2.0}
    assert len(of_focal) == 9
    assert len(settings_of(tiny_tuning("dice"), learning_rates=(1.0, 1.0), gammas=None, alphas=None)) == 1


def test_numbers_that_make_no_sense_are_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="alpha must be in"):
        settings_of(tiny_tuning(), learning_rates=None, gammas=None, alphas=(1.5,))
    with pytest.raises(ConfigError, match="learning_rate must be above 0"):
        settings_of(tiny_tuning(), learning_rates=(0.0,), gammas=None, alphas=None)
    with pytest.raises(ConfigError, match="--gammas: the loss dice has no gamma"):
        settings_of(tiny_tuning("dice"), learning_rates=None, gammas=(1.0,), alphas=None)


def test_the_best_setting_as_arguments_of_train() -> None:
    best = Setting(learning_rate=1.2345678e-5, gamma=1.5, alpha=0.75)
    line = arguments(best, tiny_tuning())
    config = load_config(None, line.replace("--set ", "").split())
    assert (config.loss.name, config.loss.gamma, config.loss.alpha) == ("dice_focal", 1.5, 0.75)
    assert config.optim.learning_rate == 1.2345678e-5
    assert "alpha" not in arguments(best, tiny_tuning("focal"))


# ---- running


def test_halving_stops_the_worse_and_changes_nothing_for_the_better(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    settings = grid(1e-6, 0.02)
    found = tried(
        tiny_world, tmp_path / "halved", settings, halving=Halving(steps=40, every=10, rungs=2, keep=2)
    )
    assert [(a.setting.learning_rate, a.step) for a in found.attempts] == [(0.02, 40), (1e-6, 20)]
    alone = tried(
        tiny_world, tmp_path / "alone", settings[1:], halving=Halving(steps=40, every=10, rungs=1, keep=2)
    )
    # In two parts, from a checkpoint, it is the same as in one.
    assert without_times(alone)[0] == without_times(found)[0]
    assert not list((tmp_path / "halved" / "settings").glob("*.pt"))


def test_the_number_of_processes_changes_nothing(tiny_world: TinyWorld, tmp_path: Path) -> None:
    settings, threads = grid(0.01, 0.05), set[int]()
    halving = replace(HALVING, rungs=1)  # a rung starts its own processes
    watching = replace(SILENT, stepped=lambda *_: threads.add(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    one = tried(tiny_world, tmp_path / "one", settings, halving=halving, callbacks=watching)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    assert threads == {1}
    two = tried(tiny_world, tmp_path / "two", settings, halving=halving, jobs=2)
    assert without_times(one) == without_times(two)


def test_a_killed_run_loses_one_setting_of_one_rung(tiny_world: TinyWorld, tmp_path: Path) -> None:
    settings = grid(0.01, 0.02, 0.05, 0.1)
    whole = tried(tiny_world, tmp_path / "whole", settings)
    steps: list[tuple[float, int]] = []

    def kill_in_second_rung(which: Setting, step: int) -> None:
        steps.append((which.learning_rate, step))
        if step == 6 and len({rate for rate, s in steps if s > 4}) == 2:
            raise Killed

    with pytest.raises(Killed):
        tried(tiny_world, tmp_path / "run", settings, callbacks=replace(SILENT, stepped=kill_in_second_rung))
    lost = steps[-1][0]
    steps.clear()
    watching = replace(SILENT, stepped=lambda which, step: steps.append((which.learning_rate, step)))
    resumed = tried(tiny_world, tmp_path / "run", settings, callbacks=watching)
    assert steps == [(lost, step) for step in (5, 6, 7, 8)]
    assert without_times(resumed) == without_times(whole)
    steps.clear()
    again = tried(tiny_world, tmp_path / "run", settings, callbacks=watching)
    assert steps == []
    assert again == resumed


def test_a_setting_that_diverges_is_reported_and_stops_nothing(tiny_world: TinyWorld, tmp_path: Path) -> None:
    # AdamW's steps are as long as the learning rate: the weights overflow.
    settings = grid(1e30, 0.05)
    found = tried(tiny_world, tmp_path / "run", settings)
    assert [(a.setting.learning_rate, a.diverged) for a in found.attempts] == [(0.05, False), (1e30, True)]
    rows = list(csv.DictReader((tmp_path / "run" / "results.csv").read_text().splitlines()))
    assert (rows[1]["note"], float(rows[1]["score"])) == ("diverged", 0.0)
    everything = tried(tiny_world, tmp_path / "all", settings[:1])
    assert everything.best is None
    assert json.loads((tmp_path / "all" / "summary.json").read_text())["arguments"] is None


def test_a_killed_worker_loses_its_own_setting_only(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = grid(0.01, 0.05)

    def one_is_killed(task: Any, items: Sequence[Setting], *, jobs: int) -> Any:
        assert jobs == 1
        for item in items:
            failure = Failure(item=item, reason="SIGKILL (out of memory?)")
            yield failure if item == settings[0] else task(item)

    with monkeypatch.context() as patch:
        patch.setattr("liverseg.laboratory.tune.run_parallel", one_is_killed)
        found = tried(tiny_world, tmp_path / "run", settings)
    assert [(a.setting, a.failure) for a in found.attempts] == [
        (settings[1], None),
        (settings[0], "SIGKILL (out of memory?)"),
    ]
    # The next time it is tried again.
    assert read_attempt(tmp_path / "run", settings[0]) is None
    assert all(a.failure is None for a in tried(tiny_world, tmp_path / "run", settings).attempts)


def test_another_grid_is_refused(tiny_world: TinyWorld, tmp_path: Path) -> None:
    tried(tiny_world, tmp_path / "run", grid(0.05))
    with pytest.raises(
        RunError, match=r"grid.learning_rate: the folder has \[0.05\], this command has \[0.01, 0.05\]"
    ):
        tried(tiny_world, tmp_path / "run", grid(0.01, 0.05))
    with pytest.raises(RunError, match="rungs: the folder has 2, this command has 1"):
        tried(tiny_world, tmp_path / "run", grid(0.05), halving=replace(HALVING, rungs=1))


def test_one_gpu_takes_no_several_processes(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liverseg.laboratory.tune.choose_device", lambda _: torch.device("cuda"))
    with pytest.raises(ConfigError, match="--jobs 2: a GPU does one setting after another"):
        tried(tiny_world, tmp_path / "run", grid(0.05), jobs=2)


# ---- as a person meets it


def command(world: TinyWorld, run: Path, *more: str) -> list[str]:
    sets = [part for s in TINY if "learning_rate" not in s for part in ("--set", s)]
    return [
        "tune",
        str(world.cache),
        CASE,
        str(run),
        "--every",
        "2",
        "--keep",
        "2",
        "--rungs",
        "2",
        *sets,
        *more,
    ]


def test_the_command_from_end_to_end(tiny_world: TinyWorld, tmp_path: Path) -> None:
    run = tmp_path / "run"
    values = ["--learning-rates", "0.05,1e30", "--gammas", "0.3", "--alphas", "0.5,0.99"]
    result = CliRunner().invoke(main, command(tiny_world, run, "--steps", "20", "--jobs", "1", *values))
    assert result.exit_code == 0, result.output
    assert "learning rate 1e+30, γ 0.3, α 0.5: diverged" in result.output
    summary = json.loads((run / "summary.json").read_text())
    assert f"best: liverseg train … {summary['arguments']}" in result.output
    assert summary["rungs_end_at_step"] == [10, 20]
    rows = list(csv.DictReader((run / "results.csv").read_text().splitlines()))
    assert [row["steps"] for row in rows[:2]] in (["20", "10"], ["20", "20"])
    assert [row["note"] for row in rows] == ["", "", "diverged", "diverged"]
    assert summary["best"]["score"] == float(rows[0]["score"])
    assert_is_drawn(run / "heat_maps.png")


def test_what_the_grid_decides_cannot_be_set(tiny_world: TinyWorld, tmp_path: Path) -> None:
    line = command(tiny_world, tmp_path / "run", "--steps", "8", "--set", "loss.gamma=2")
    result = CliRunner().invoke(main, line)
    assert result.exit_code == 1
    assert "--set loss.gamma=2: the experiment itself decides loss.gamma" in result.output
    wrong = CliRunner().invoke(main, command(tiny_world, tmp_path / "run", "--gammas", "1,x"))
    assert wrong.exit_code == 2
    assert "comma-separated numbers such as 0.1,0.01, got '1,x'" in wrong.output


@pytest.mark.slow
def test_a_command_that_is_killed_goes_on(tiny_world: TinyWorld, tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = command(
        tiny_world, run, "--steps", "20", "--jobs", "2", "--learning-rates", "0.05,0.01", "--alphas", "1"
    )
    arguments = [sys.executable, "-m", "liverseg", *line]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(run.glob("settings/*.json")):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in run.glob("settings/*.json")}
    result = CliRunner().invoke(main, line)
    assert result.exit_code == 0, result.output
    assert len(kept) < 6 == len(list(run.glob("settings/*.json")))
