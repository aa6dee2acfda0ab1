"""One case, one loss after another: the same for a seed, resumed, refused, judged, and drawn."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import SMALL_SPEC, random_case
from matplotlib.image import imread
from tiny import TinyWorld
from torch import Tensor

from data_cache.errors import CacheError, ConfigError, RunError
from data_cache.reader import CacheStore
from data_cache.schema import Case
from data_cache.writer import open_or_create, write_case
from liverseg.cli import main
from liverseg.laboratory.experiment import begin
from liverseg.laboratory.hypotheses import HYPOTHESES, Hypothesis, Outcome, TrainingCurve, judge, steps_to
from liverseg.laboratory.loss_choice import ALL, choose_losses, loss_configs, numbers_of
from liverseg.laboratory.one_case import Learner, Point, experiment_config, find_subject
from liverseg.laboratory.overfit import LaboratoryCallbacks, LossResult, overfit, read_results
from liverseg.model.losses import LossConfig, LossName
from liverseg.training.augment import AugmentParams, Context, apply
from liverseg.training.config import TrainConfig, save_config

SILENT = LaboratoryCallbacks(warned=lambda _: None, stepped=lambda *_: None, finished=lambda _: None)
TINY = (
    "model.base_channels=2",
    "model.norm=batch",
    "model.depth=3",
    "model.dropout=0.1",
    "precision=fp32",
    "device=cpu",
    "optim.learning_rate=0.02",
    "optim.warmup_steps=2",
)
CASE = "liver_2"  # with a tumour of 26 voxels; that of liver_5 is lost on the grid of the tiny world


class Killed(BaseException):
    """Stands for a process that ends at once."""


def tiny_experiment(
    case: str = CASE, *, steps: int = 6, every: int = 2, more: Sequence[str] = ()
) -> TrainConfig:
    return experiment_config(None, (*TINY, *more), case_id=case, steps=steps, every=every)


def losses(*names: LossName) -> tuple[LossConfig, ...]:
    return loss_configs(names, None, ())


def without_times(results: Any) -> list[LossResult]:
    return [replace(result, seconds_per_step=None) for result in results]


def curve(*tumour: float | None, every: int = 10) -> tuple[Point, ...]:
    return tuple(Point(step=every * i, loss=1.0, liver=0.9, tumour=dice) for i, dice in enumerate(tumour, 1))


# ---- the experiment


def test_a_seed_decides_everything(tiny_world: TinyWorld, tmp_path: Path) -> None:
    store, chosen = tiny_world.store, losses("dice", "focal")
    a, b = (
        overfit(store, tmp_path / run, tiny_experiment(), losses=chosen, callbacks=SILENT)
        for run in ("a", "b")
    )
    assert without_times(a.results) == without_times(b.results)
    assert [len(result.curve) for result in a.results] == [3, 3]
    assert a.results[0].curve != a.results[1].curve


def test_another_seed_is_another_network(tiny_world: TinyWorld) -> None:
    a, b = (
        Learner(tiny_world.store, tiny_experiment(more=[f"seed={seed}"])).answer().foreground_bczyx
        for seed in (0, 1)
    )
    assert (a != b).any()


def test_all_losses_start_from_the_same_network(tiny_world: TinyWorld) -> None:
    store = tiny_world.store
    starts = [
        Learner(store, replace(tiny_experiment(), loss=loss)).answer().foreground_bczyx
        for loss in loss_configs(ALL, None, ())
    ]
    assert len(starts) == 7
    for start in starts:
        np.testing.assert_array_equal(start.cpu().numpy(), starts[0].cpu().numpy())


def test_the_case_is_shown_as_it_is_cached(tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def remember(
        image: Tensor, fractions: Tensor, params: AugmentParams, *, context: Context | None
    ) -> tuple[Tensor, Tensor]:
        seen.append(apply(image, fractions, params, context=context))
        return seen[-1]

    monkeypatch.setattr("liverseg.training.train.apply", remember)
    Learner(tiny_world.store, tiny_experiment()).learn(until_step=4, stepped=lambda *_: None)
    view = tiny_world.store.read(CASE, "liver")
    assert view.fractions_czyx is not None
    assert len(seen) == 4
    for image, fractions in seen:
        hu = np.clip(view.image_zyx.astype(np.float32), -150, 250)
        np.testing.assert_allclose(image[0, 0].numpy(), (hu - 50) / 200, rtol=1e-6)
        np.testing.assert_allclose(fractions[0].numpy(), view.fractions_czyx / np.float32(255), rtol=1e-6)


def test_it_learns_and_its_score_is_of_the_weights_themselves(tiny_world: TinyWorld) -> None:
    learner = Learner(tiny_world.store, tiny_experiment(steps=60, every=20))
    learner.learn(until_step=60, stepped=lambda *_: None)
    history = learner.state.history
    assert (history[-1]["train_loss"] or 9) < 0.7 * (history[0]["train_loss"] or 0)
    assert (history[-1]["val_dice_liver"] or 0) > 0.5
    for own, average in zip(
        learner.state.network.state_dict().values(), learner.state.average.state_dict().values(), strict=True
    ):
        assert (own == average).all()


def test_a_stopped_experiment_goes_on_with_the_next_loss(tiny_world: TinyWorld, tmp_path: Path) -> None:
    store, chosen, config = tiny_world.store, losses("dice", "focal"), tiny_experiment()
    whole = overfit(store, tmp_path / "whole", config, losses=chosen, callbacks=SILENT)
    learnt = []

    def kill_in_focal(loss: str, step: int, _: float) -> None:
        learnt.append(loss)
        if (loss, step) == ("focal", 3):
            raise Killed

    with pytest.raises(Killed):
        overfit(
            store, tmp_path / "run", config, losses=chosen, callbacks=replace(SILENT, stepped=kill_in_focal)
        )
    assert set(read_results(tmp_path / "run")) == {"dice"}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["losses"][0]["loss"] == "dice"
    learnt.clear()
    watching = replace(SILENT, stepped=lambda loss, *_: learnt.append(loss))
    resumed = overfit(store, tmp_path / "run", config, losses=chosen, callbacks=watching)
    assert set(learnt) == {"focal"}
    assert without_times(resumed.results) == without_times(whole.results)


def test_losses_can_be_added_later(tiny_world: TinyWorld, tmp_path: Path) -> None:
    config = tiny_experiment(steps=2)
    overfit(tiny_world.store, tmp_path / "run", config, losses=losses("focal"), callbacks=SILENT)
    both = overfit(tiny_world.store, tmp_path / "run", config, losses=losses("dice"), callbacks=SILENT)
    assert [result.loss.name for result in both.results] == ["dice", "focal"]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (tiny_experiment("liver_0"), "case: the folder has 'liver_2', this command has 'liver_0'"),
        (tiny_experiment(steps=8), "steps: the folder has 6, this command has 8"),
        (tiny_experiment(every=3), "every: the folder has 2, this command has 3"),
        (
            tiny_experiment(more=["optim.learning_rate=0.03"]),
            "optim.learning_rate: the folder has 0.02, this command has 0.03",
        ),
    ],
)
def test_a_run_of_something_else_is_refused(
    tiny_world: TinyWorld, tmp_path: Path, other: TrainConfig, named: str
) -> None:
    overfit(tiny_world.store, tmp_path, tiny_experiment(), losses=(), callbacks=SILENT)
    with pytest.raises(RunError, match=named):
        overfit(tiny_world.store, tmp_path, other, losses=losses("dice"), callbacks=SILENT)
    assert read_results(tmp_path) == {}


def test_a_network_too_deep_for_the_cache_is_refused_before_anything_is_written(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    deep = tiny_experiment(more=["model.depth=5"])
    with pytest.raises(ConfigError, match="model.depth"):
        overfit(tiny_world.store, tmp_path / "run", deep, losses=losses("dice"), callbacks=SILENT)
    assert not (tmp_path / "run").exists()


def test_a_loss_with_other_numbers_is_refused(tiny_world: TinyWorld, tmp_path: Path) -> None:
    config = tiny_experiment(steps=2)
    overfit(tiny_world.store, tmp_path / "run", config, losses=losses("focal"), callbacks=SILENT)
    changed = loss_configs(("focal",), None, ["loss.gamma=1.0"])
    with pytest.raises(RunError, match="has focal with gamma 2.0, this asks for 1.0"):
        overfit(tiny_world.store, tmp_path / "run", config, losses=changed, callbacks=SILENT)


def test_a_folder_of_something_else_is_refused(tiny_world: TinyWorld, tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(b"a training run")
    with pytest.raises(RunError, match="holds something else"):
        overfit(tiny_world.store, tmp_path, tiny_experiment(), losses=(), callbacks=SILENT)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_other_software_is_said_and_damage_is_named(tiny_world: TinyWorld, tmp_path: Path) -> None:
    run, warnings = tmp_path / "run", list[str]()
    overfit(tiny_world.store, run, tiny_experiment(), losses=(), callbacks=SILENT)
    path = run / "experiment.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "software": "liverseg 0"}))
    watching = replace(SILENT, warned=warnings.append)
    overfit(tiny_world.store, run, tiny_experiment(), losses=(), callbacks=watching)
    assert len(warnings) == 1
    assert "was begun with liverseg 0, this is liverseg" in warnings[0]
    (run / "losses").mkdir()
    (run / "losses" / "dice.json").write_text("{")
    with pytest.raises(RunError, match="dice.json: unreadable .* delete it"):
        overfit(tiny_world.store, run, tiny_experiment(), losses=(), callbacks=SILENT)
    path.write_text("[]")
    with pytest.raises(RunError, match="experiment.json: unreadable"):
        begin(run, {}, tiny_experiment(), warned=warnings.append)


def test_a_team_is_refused(tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without torchrun"):
        overfit(tiny_world.store, tmp_path / "run", tiny_experiment(), losses=(), callbacks=SILENT)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_diverges_does_not_stop_the_next(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from liverseg.model.losses import loss

    def spoilt(logits: Any, fractions: Any, config: LossConfig) -> Any:
        value = loss(logits, fractions, config)
        spoilt.calls += 1  # type: ignore[attr-defined]
        return value * float("nan") if config.name == "dice" and spoilt.calls > 3 else value  # type: ignore[attr-defined]

    spoilt.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr("liverseg.training.train.loss_of", spoilt)
    found = overfit(
        tiny_world.store,
        tmp_path / "run",
        tiny_experiment(),
        losses=losses("dice", "focal"),
        callbacks=SILENT,
    )
    dice, focal = found.results
    assert (dice.diverged, [p.step for p in dice.curve]) == (True, [2])
    assert (focal.diverged, [p.step for p in focal.curve]) == (False, [2, 4, 6])
    assert not (tmp_path / "run" / "losses" / "dice.png").exists()
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())["losses"]
    assert [(row["steps"], row["diverged"]) for row in rows] == [(2, True), (6, False)]
    assert (
        overfit(
            tiny_world.store, tmp_path / "run", tiny_experiment(), losses=losses("dice"), callbacks=SILENT
        ).results[0]
        == dice
    )


# ---- which case


@pytest.fixture
def odd_store(tmp_path: Path) -> CacheStore:
    """A case without a label, and one whose label has no liver."""
    unlabelled, empty = random_case("no_label", labelled=False), random_case("no_liver")
    scan = {"scan": empty.meta.boxes["scan"]}
    empty = replace(empty, meta=replace(empty.meta, boxes=scan), views={"scan": empty.views["scan"]})
    path = tmp_path / "odd.zarr"
    open_or_create(path, SMALL_SPEC)
    for case in (unlabelled, empty):
        write_case(path, case, SMALL_SPEC)
    return CacheStore.open(path)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("liver_9", "has no case 'liver_9'; it has no_label, no_liver"),
        ("no_label", "case no_label has no label; these have one: no_liver"),
        ("no_liver", "the label of case no_liver has no liver"),
    ],
)
def test_a_case_that_cannot_be_learnt(odd_store: CacheStore, case: str, said: str) -> None:
    with pytest.raises(CacheError, match=said):
        find_subject(odd_store, case)


def without_tumour(store: CacheStore, case_id: str, path: Path) -> CacheStore:
    """A store of one case whose tumours are too small for any cached voxel to be more than half of one."""
    meta = store.meta(case_id)
    views = {name: store.read(case_id, name) for name in meta.boxes}
    bare = {}
    for name, view in views.items():
        assert view.fractions_czyx is not None
        liver, tumour = view.fractions_czyx
        bare[name] = replace(view, fractions_czyx=np.stack([liver + tumour, np.zeros_like(tumour)]))
    open_or_create(path, store.schema.spec)
    write_case(path, Case(meta=meta, views=bare), store.schema.spec)
    return CacheStore.open(path)


def test_a_case_without_a_tumour_is_judged_by_its_liver(tiny_world: TinyWorld, tmp_path: Path) -> None:
    warnings: list[str] = []
    found = overfit(
        without_tumour(tiny_world.store, "liver_5", tmp_path / "c.zarr"),
        tmp_path / "run",
        tiny_experiment("liver_5", steps=2),
        losses=losses("dice"),
        callbacks=replace(SILENT, warned=warnings.append),
    )
    assert warnings == ["liver_5: no tumour on the cached grid: only the liver can be judged"]
    assert found.results[0].final("tumour") is None
    assert found.results[0].final("liver") is not None
    assert found.verdicts[0].reason == "the case has no tumour"
    assert_is_drawn(tmp_path / "run" / "losses" / "dice.png")


# ---- which losses, which numbers


def test_each_loss_has_its_own_numbers(tmp_path: Path) -> None:
    assert [loss.name for loss in loss_configs(choose_losses("all"), None, ())] == list(ALL)
    focal, dice_focal = losses("focal", "dice_focal")
    assert (focal.gamma, dice_focal.gamma) == (2.0, 0.3)
    assert [loss.gamma for loss in loss_configs(("focal", "dice_focal"), None, ["loss.gamma=1.5"])] == [
        1.5,
        1.5,
    ]
    # A file's numbers are those of the loss that it names.
    save_config(TrainConfig(loss=LossConfig(name="dice_focal", gamma=0.7)), tmp_path / "file.toml")
    of_file = loss_configs(("focal", "dice_focal"), tmp_path / "file.toml", ())
    assert [loss.gamma for loss in of_file] == [2.0, 0.7]
    assert numbers_of(focal) == {"gamma": 2.0, "cross_entropy": 0.0, "class_weights": (0.2, 0.3, 0.5)}


def test_options_that_would_do_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="loss.gamma: none of dice has it"):
        loss_configs(("dice",), None, ["loss.gamma=1"])
    for override in (
        "augment.noise_level=0.1",
        "optim.epochs=3",
        "data.folds=2",
        "loss.name=dice",
        'loss={name="focal"}',
    ):
        with pytest.raises(ConfigError, match="the experiment itself decides"):
            tiny_experiment(more=[override])
    with pytest.raises(ConfigError, match="adds a loss of its own"):
        tiny_experiment(more=["model.stochastic=ssn"])
    with pytest.raises(ConfigError, match="--steps 7 is not a multiple of --every 2"):
        tiny_experiment(steps=7)
    with pytest.raises(ConfigError, match="'dice,dise'.*generalised_dice"):
        choose_losses("dice,dise")
    assert choose_losses("focal, dice") == ("dice", "focal")


# ---- hypotheses


def test_steps_to_on_a_hand_example() -> None:
    points = curve(0.1, 0.5, 0.4, 0.9)
    assert [steps_to(points, "tumour", dice) for dice in (0.05, 0.5, 0.8, 0.95)] == [10, 20, 40, None]
    assert steps_to(curve(None, None), "tumour", 0.5) is None
    assert steps_to(points, "liver", 0.8) == 10


NOT_IN_300 = Hypothesis(loss="dice", learns=False, within=300)
IN_100 = Hypothesis(loss="dice_focal", learns=True, within=100)


@pytest.mark.parametrize(
    ("hypothesis", "points", "outcome", "reason"),
    [
        (NOT_IN_300, curve(*[0.49] * 30), "confirmed", "was 0.490 at most within 300 steps"),
        (NOT_IN_300, curve(*[0.49] * 29, 0.5), "refuted", "reached 0.5 at step 300"),
        (NOT_IN_300, curve(*[0.49] * 30, 0.6), "confirmed", "it reached 0.5 at step 310"),
        (NOT_IN_300, curve(*[0.49] * 29), "not decided", "only 290 steps were run"),
        # What is learnt early is learnt, however short the run.
        (NOT_IN_300, curve(0.1, 0.6), "refuted", "at step 20"),
        (IN_100, curve(*[0.1] * 9, 0.5), "confirmed", "at step 100"),
        (
            IN_100,
            curve(*[0.1] * 10, 0.5),
            "refuted",
            "was 0.100 at most within 100 steps; it reached 0.5 at step 110",
        ),
        (IN_100, curve(0.1, 0.2), "not decided", "only 20 steps"),
        (IN_100, curve(*[None] * 10), "not decided", "no tumour"),
        (IN_100, (), "not decided", "only 0 steps"),
    ],
)
def test_verdicts(hypothesis: Hypothesis, points: tuple[Point, ...], outcome: Outcome, reason: str) -> None:
    verdict = judge(hypothesis, {hypothesis.loss: TrainingCurve(curve=points, diverged=False)})
    assert verdict.outcome == outcome
    assert reason in verdict.reason


def test_nothing_is_concluded_from_a_loss_that_diverged_or_was_not_run() -> None:
    diverged = TrainingCurve(curve=curve(0.1, 0.2), diverged=True)
    assert judge(NOT_IN_300, {"dice": diverged}).text == (
        "dice does not learn the tumour within 300 steps: not decided "
        "(the loss was not finite: lower optim.learning_rate)"
    )
    assert judge(NOT_IN_300, {"dice_focal": diverged}).reason == "this loss was not run"
    assert [hypothesis.loss for hypothesis in HYPOTHESES] == ["dice", "focal", "dice_focal"]


# ---- as a person meets it


def assert_is_drawn(path: Path) -> None:
    pixels = imread(path)[..., :3]
    assert pixels.shape[0] > 200
    assert pixels.shape[1] > 400
    # Each quarter of the picture shows something.
    for half in np.array_split(pixels, 2, axis=0):
        for quarter in np.array_split(half, 2, axis=1):
            assert quarter.std() > 0.03


def test_the_command_from_end_to_end(tiny_world: TinyWorld, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sets = [part for setting in TINY for part in ("--set", setting)]
    line = ["overfit", str(tiny_world.cache), CASE, str(run), "--losses", "dice,dice_focal"]
    result = CliRunner().invoke(main, [*line, "--steps", "4", "--every", "2", *sets])
    assert result.exit_code == 0, result.output
    assert "dice_focal: α 0.99, γ 0.3, overlap semimetric, cross-entropy 8.0, weights" in result.output
    assert "dice does not learn the tumour within 300 steps: not decided (only 4 steps" in result.output
    assert (
        "focal does not learn the tumour within 300 steps: not decided (this loss was not run)"
        in result.output
    )
    for picture in ("curves.png", "losses/dice.png", "losses/dice_focal.png"):
        assert_is_drawn(run / picture)
    points = list(csv.DictReader((run / "curves.csv").read_text().splitlines()))
    assert [(p["loss"], p["step"]) for p in points] == [
        (loss, step) for loss in ("dice_focal", "dice") for step in ("2", "4")
    ]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["losses"][1]["liver_dice"] == float(points[3]["liver_dice"])
    assert summary["losses"][1]["seconds_per_step"] > 0
    assert [hypothesis["outcome"] for hypothesis in summary["hypotheses"]] == ["not decided"] * 3
    table = list(csv.DictReader((run / "table.csv").read_text().splitlines()))
    assert [row["loss"] for row in table] == ["dice_focal", "dice"]


def test_the_command_says_in_one_line_what_is_wrong(tiny_world: TinyWorld, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["overfit", str(tiny_world.cache), "liver_99", str(tmp_path / "run")])
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].startswith(f"error: {tiny_world.cache}: has no case 'liver_99'")
    assert not (tmp_path / "run").exists()
