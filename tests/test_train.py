"""Training: exact resume, checkpoints that are whole and run no code, splits, the schedule."""

from __future__ import annotations

import csv
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, get_args

import numpy as np
import pytest
import torch
from tiny import SILENT, SPEC, TinyWorld, tiny_config

from data_cache.errors import ConfigError, DivergedError, RunError
from data_cache.reader import CacheStore
from data_cache.schema import PreprocessSpec
from liverseg.device import (
    Precision,
    autocast_dtype,
    check_kernels,
    choose_device,
    compiles,
    matmul_peak,
    training_dtype,
)
from liverseg.model.losses import LossConfig, loss
from liverseg.model.network import NetworkConfig, Norm, UNet
from liverseg.training.callbacks import Callbacks
from liverseg.training.checkpoint import (
    BEST,
    LAST,
    content_checksum,
    load_checkpoint,
    restore,
    save_checkpoint,
    write_checkpoint,
)
from liverseg.training.config import (
    DataConfig,
    OptimConfig,
    TrainConfig,
    WatchConfig,
    load_config,
    save_config,
)
from liverseg.training.provenance import RUN, git_commit
from liverseg.training.run_files import HISTORY, PROGRESS
from liverseg.training.split import SPLIT, k_fold_split, load_split, make_split, save_split
from liverseg.training.state import (
    Row,
    class_shares,
    learning_rate,
    new_state,
    out_of_patience,
    selection_score,
    update_average,
)
from liverseg.training.train import levels_loss, train
from liverseg.training.validate import NOT_VALIDATED, class_dice, native_dice
from pipeline.build import build
from pipeline.decathlon import read_data_set

TIMES = {"seconds", "samples_per_second", "wait_share", "mfu"}
CPU = torch.device("cpu")
PRECISIONS: tuple[Precision, ...] = ("fp16", "fp32")


class Killed(BaseException):
    """Stands for a process that ends at once."""


def assert_same_run(a: Path, b: Path) -> None:
    first, second = load_checkpoint(a / LAST), load_checkpoint(b / LAST)
    for part in ("network", "average"):
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name]), (part, name)
    moments = [c["optimizer"]["state"] for c in (first, second)]
    for i, state in moments[0].items():
        for name, value in state.items():
            assert torch.equal(value, moments[1][i][name]), (i, name)
    rows = [
        [{k: v for k, v in row.items() if k not in TIMES} for row in c["history"]] for c in (first, second)
    ]
    assert rows[0] == rows[1]


def test_resuming_continues_bit_for_bit(tiny_world: TinyWorld, tmp_path: Path) -> None:
    config = tiny_config(epochs=4)
    train(tiny_world.store, tmp_path / "straight", config, resume=False, watcher=SILENT)

    def kill_in_third_epoch(epoch: int, step: int, _: float) -> None:
        if (epoch, step) == (3, 2):
            raise Killed

    killing = replace(SILENT, stepped=kill_in_third_epoch)
    with pytest.raises(Killed):
        train(tiny_world.store, tmp_path / "killed", config, resume=False, watcher=killing)
    assert load_checkpoint(tmp_path / "killed" / LAST)["epoch"] == 2
    train(tiny_world.store, tmp_path / "killed", config, resume=True, watcher=SILENT)
    assert_same_run(tmp_path / "straight", tmp_path / "killed")
    rows = list(csv.DictReader((tmp_path / "killed" / HISTORY).read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]


def test_where_voxels_wait_does_not_change_what_is_learnt(tiny_world: TinyWorld, tmp_path: Path) -> None:
    for place in ("device", "memory", "stream"):
        config = tiny_config()
        config = replace(config, data=replace(config.data, resident=place))
        train(tiny_world.store, tmp_path / place, config, resume=False, watcher=SILENT)
    assert_same_run(tmp_path / "device", tmp_path / "memory")
    assert_same_run(tmp_path / "device", tmp_path / "stream")


def test_another_seed_is_another_run(tiny_world: TinyWorld, tmp_path: Path) -> None:
    for seed in (0, 1):
        config = replace(tiny_config(epochs=1), seed=seed)
        train(tiny_world.store, tmp_path / str(seed), config, resume=False, watcher=SILENT)
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "0", tmp_path / "1")


def test_a_run_keeps_what_it_needs_to_be_repeated(tiny_run: Path, tiny_world: TinyWorld) -> None:
    assert load_config(tiny_run / "config.toml") == tiny_config(epochs=6, steps=20)
    split = load_split(tiny_run)
    assert {*split.train, *split.val} == set(tiny_world.store.case_ids)
    assert (tiny_run / PROGRESS).read_bytes().startswith(b"\x89PNG")
    assert (tiny_run / BEST).exists()
    best = load_checkpoint(tiny_run / BEST)
    scores = [selection_score(row) for row in load_checkpoint(tiny_run / LAST)["history"]]
    assert best["best_score"] == max(scores)
    assert best["epoch"] == 1 + int(np.argmax(scores))


def test_the_tiny_network_learns(tiny_run: Path) -> None:
    history = load_checkpoint(tiny_run / LAST)["history"]
    assert history[-1]["train_loss"] < 0.8 * history[0]["train_loss"]
    assert max(row["val_dice_liver"] for row in history) > 0.5


def test_a_run_is_not_overwritten(tiny_run: Path, tiny_world: TinyWorld) -> None:
    with pytest.raises(RunError, match="--resume"):
        train(tiny_world.store, tiny_run, tiny_config(), resume=False, watcher=SILENT)


def test_resume_starts_where_there_is_nothing_yet(tiny_world: TinyWorld, tmp_path: Path) -> None:
    state = train(
        tiny_world.store, tmp_path / "new", tiny_config(epochs=1, steps=1), resume=True, watcher=SILENT
    )
    assert (state.epoch, state.step) == (1, 1)


def test_another_architecture_says_what_differs(
    tiny_run: Path, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    for name in (LAST, "split.json"):
        (tmp_path / name).write_bytes((tiny_run / name).read_bytes())
    config = replace(tiny_config(), model=NetworkConfig(base_channels=4, depth=3, dropout=0.1))
    with pytest.raises(RunError, match="base_channels: checkpoint has 2, configuration has 4"):
        train(tiny_world.store, tmp_path, config, resume=True, watcher=SILENT)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": NetworkConfig(base_channels=4, depth=3)}, "another network"),
        ({"seed": 5}, "cannot change these settings (seed: checkpoint has 0, configuration has 5)"),
        ({"data": DataConfig(folds=2)}, "(data.folds: checkpoint has 3, configuration has 2)"),
    ],
    ids=["network", "seed", "split"],
)
def test_a_resume_that_is_refused_leaves_the_run_as_it_was(
    tiny_run: Path, tiny_world: TinyWorld, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    config = replace(tiny_config(epochs=7, steps=20), **change)
    with pytest.raises(RunError, match=re.escape(words)):
        train(tiny_world.store, run, config, resume=True, watcher=SILENT)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_history_without_its_checkpoint_is_not_overwritten(tiny_world: TinyWorld, tmp_path: Path) -> None:
    (tmp_path / HISTORY).write_text("epoch\n1\n")
    for resume, words in ((True, "but no last.pt to resume from"), (False, "holds a run already")):
        with pytest.raises(RunError, match=words):
            train(tiny_world.store, tmp_path, tiny_config(), resume=resume, watcher=SILENT)


@pytest.mark.parametrize("depth", [5, 10])
def test_a_network_too_deep_for_the_cache_is_refused_before_anything_is_written(
    tiny_world: TinyWorld, tmp_path: Path, depth: int
) -> None:
    config = tiny_config()
    deep = replace(config, model=replace(config.model, depth=depth))
    with pytest.raises(ConfigError, match=rf"model.depth: {depth} poolings .* 16×32×32 .* at most 4"):
        train(tiny_world.store, tmp_path / "run", deep, resume=False, watcher=SILENT)
    assert not (tmp_path / "run").exists()


def test_a_raw_folder_that_is_not_there_is_said_at_once(tiny_world: TinyWorld, tmp_path: Path) -> None:
    config = replace(tiny_config(), watch=WatchConfig(raw=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="none: no such folder"):
        train(tiny_world.store, tmp_path / "run", config, resume=False, watcher=SILENT)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [None, b"another"], ids=["missing", "of another size"])
def test_a_raw_folder_of_another_data_set_is_said_at_once(
    tiny_world: TinyWorld, tmp_path: Path, content: bytes | None
) -> None:
    config = replace(tiny_config(), watch=WatchConfig(raw=str(tmp_path / "raw"), native_every=25))
    case_id = make_split(tiny_world.store, config.data, seed=config.seed).val[-1]
    raw = shutil.copytree(tiny_world.raw, tmp_path / "raw")
    label = raw / "labelsTr" / f"{case_id}.nii.gz"
    label.unlink()
    if content is not None:
        label.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{case_id}.nii.gz: .*watch.raw \\(--raw\\) names the data set"):
        train(tiny_world.store, tmp_path / "run", config, resume=False, watcher=SILENT)
    assert not (tmp_path / "run").exists()


def test_a_case_that_left_the_store_is_named(tiny_run: Path, tiny_world: TinyWorld, tmp_path: Path) -> None:
    split = load_split(tiny_run)
    save_split(replace(split, val=(*split.val, "liver_99")), tmp_path)
    shutil.copy(tiny_run / "run.json", tmp_path)  # which says that the folder is a run's
    with pytest.raises(RunError, match="liver_99"):
        train(tiny_world.store, tmp_path, tiny_config(), resume=True, watcher=SILENT)


def test_a_loss_that_is_not_finite_names_the_first_step_and_its_cases(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()

    def broken(logits: torch.Tensor, fractions: torch.Tensor, config: LossConfig) -> torch.Tensor:
        value = loss(logits, fractions, config)
        return value * float("inf") if next(calls) == 6 else value

    monkeypatch.setattr("liverseg.training.train.loss_of", broken)
    looked: list[int] = []
    watcher = replace(SILENT, stepped=lambda _, step, __: looked.append(step))
    config = tiny_config(epochs=1, steps=9)
    config = replace(
        config,
        optim=replace(config.optim, accumulate=2, batch_size=1),
        watch=WatchConfig(log_every=5),
        data=DataConfig(train_cases=("liver_4", "liver_5"), tumour_share=0.0),
    )
    # Batches 7 and 8 are step 4, which is seen at step 5, when the host next looks at the device.
    with pytest.raises(
        DivergedError, match=r"the loss is inf in epoch 1, step 4, on cases liver_[45], liver_[45]:"
    ):
        train(tiny_world.store, tmp_path / "run", config, resume=False, watcher=watcher)
    assert looked == [1, 2, 3, 4]
    assert not (tmp_path / "run" / LAST).exists()  # what it has spoilt is not kept


def test_a_gradient_that_is_not_finite_in_the_last_step_is_not_written(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()

    def broken(logits: torch.Tensor, fractions: torch.Tensor, config: LossConfig) -> torch.Tensor:
        value = loss(logits, fractions, config)
        return value + (0 * logits).sum().sqrt() if next(calls) == 2 else value  # + 0, with the gradient NaN

    monkeypatch.setattr("liverseg.training.train.loss_of", broken)
    with pytest.raises(DivergedError, match="the weights are not finite after epoch 1"):
        train(tiny_world.store, tmp_path / "run", tiny_config(epochs=1), resume=False, watcher=SILENT)
    assert not (tmp_path / "run" / LAST).exists()


def test_a_validation_case_that_is_trained_on_under_another_name_is_said(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    raw = Path(shutil.copytree(tiny_world.raw, tmp_path / "raw"))
    for folder in ("imagesTr", "labelsTr"):
        shutil.copy(raw / folder / "liver_2.nii.gz", raw / folder / "liver_0.nii.gz")
    build(read_data_set(raw), tmp_path / "c.zarr", SPEC, jobs=1, report=lambda _: None)
    data = DataConfig(train_cases=("liver_1", "liver_2"), val_cases=("liver_0", "liver_3"))
    said: list[str] = []
    train(
        CacheStore.open(tmp_path / "c.zarr"),
        tmp_path / "run",
        replace(tiny_config(epochs=1), data=data),
        resume=False,
        watcher=replace(SILENT, started=said.append),
    )
    (warning,) = (line for line in said if "same scan" in line)
    assert warning.startswith(
        "warning: liver_0 validates and is the same scan as liver_2, which is trained on"
    )


def test_accumulated_batches_are_one_batch(tiny_world: TinyWorld, tmp_path: Path) -> None:
    for accumulate, batch_size in ((1, 4), (4, 1)):
        config = tiny_config(epochs=1, learning_rate=1e-3)
        config = replace(
            config,
            model=NetworkConfig(base_channels=2, depth=2, norm="group"),
            loss=LossConfig(sums="sample"),
            # Unclipped, and compared in AdamW's moments: weights hardly show how large a gradient was.
            optim=replace(config.optim, accumulate=accumulate, batch_size=batch_size, clip_norm=1e9),
        )
        train(tiny_world.store, tmp_path / str(accumulate), config, resume=False, watcher=SILENT)
    whole, parts = (load_checkpoint(tmp_path / name / LAST) for name in ("1", "4"))
    assert parts["step"] == whole["step"] == 3
    assert parts["history"][0]["train_loss"] == pytest.approx(whole["history"][0]["train_loss"], rel=1e-4)
    for name, value in whole["network"].items():
        torch.testing.assert_close(value, parts["network"][name], rtol=1e-2, atol=1e-3)
    expected, found = (
        torch.cat([state["exp_avg"].flatten() for state in c["optimizer"]["state"].values()])
        for c in (whole, parts)
    )
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_patience_ends_a_run_and_resuming_does_not_begin_it_again(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    # Nothing is learnt at such a rate: no epoch is better than the first, or only just.
    config = tiny_config(epochs=30, steps=1, learning_rate=1e-12)
    config = replace(config, optim=replace(config.optim, patience=2))
    state = train(tiny_world.store, tmp_path / "run", config, resume=False, watcher=SILENT)
    best = int(np.argmax([selection_score(row) for row in state.history]))
    assert len(state.history) == best + 3 < 30
    told: list[str] = []
    watcher = replace(SILENT, started=told.append)
    again = train(tiny_world.store, tmp_path / "run", config, resume=True, watcher=watcher)
    assert again.epoch == state.epoch
    assert told[0].endswith("nothing is trained: raise optim.patience, or set it to null, to continue")


def test_out_of_patience_on_a_hand_example() -> None:
    rows: list[Row] = [
        {"val_loss": 1.0, "val_dice_liver": score, "val_dice_tumour": None} for score in (0.1, 0.5, 0.5, 0.4)
    ]
    # Best was epoch 2, two epochs ago: an equal score is not a better one.
    assert [out_of_patience(rows, patience) for patience in (None, 1, 2, 3)] == [False, True, True, False]
    assert not out_of_patience([], 1)
    # An epoch that was not validated cannot be the best, but time passes with it.
    assert [out_of_patience([*rows, {**NOT_VALIDATED}], patience) for patience in (3, 4)] == [True, False]
    assert not out_of_patience([{**NOT_VALIDATED}] * 5, 1)


def test_epochs_between_validations_have_no_scores_and_are_never_the_best(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    config = replace(tiny_config(epochs=4, steps=1), watch=WatchConfig(validate_every=3))
    state = train(tiny_world.store, tmp_path / "run", config, resume=False, watcher=SILENT)
    assert [row["val_loss"] is not None for row in state.history] == [False, False, True, True]
    assert load_checkpoint(tmp_path / "run" / BEST)["epoch"] in (3, 4)
    always = train(
        tiny_world.store,
        tmp_path / "always",
        replace(config, watch=WatchConfig()),
        resume=False,
        watcher=SILENT,
    )
    for name in ("train_loss", "val_loss"):
        assert state.history[-1][name] == always.history[-1][name]


@pytest.mark.parametrize("norm", get_args(Norm))
def test_recomputing_changes_nothing_but_memory(norm: Norm) -> None:
    config = NetworkConfig(base_channels=2, depth=2, norm=norm, dropout=0.3, deep_supervision=True)
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        network = UNet(config, recompute=recompute)
        image = torch.randn(2, 1, 8, 8, 8)
        for _ in range(2):
            torch.stack([x.square().mean() for x in network(image)]).sum().backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        results.append((network.state_dict(), gradients))
    (states, first), (again, second) = results
    assert all(torch.equal(value, again[name]) for name, value in states.items())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_recomputing_keeps_less() -> None:
    config = NetworkConfig(base_channels=4, depth=2)
    kept = []
    for recompute in (False, True):
        sizes: list[int] = []

        def pack(x: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            UNet(config, recompute=recompute)(torch.randn(1, 1, 16, 16, 16))
        kept.append(sum(sizes))
    assert kept[1] < 0.6 * kept[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, at the import of its compiler
def test_a_compiled_network_learns_the_same(tiny_world: TinyWorld, tmp_path: Path) -> None:
    for name in ("plain", "compiled"):
        config = replace(tiny_config(epochs=1, learning_rate=1e-3), compile=name == "compiled")
        config = replace(config, model=NetworkConfig(base_channels=2, depth=1))
        train(tiny_world.store, tmp_path / name, config, resume=False, watcher=SILENT)
    plain, compiled = (load_checkpoint(tmp_path / n / LAST)["history"][0] for n in ("plain", "compiled"))
    assert compiled["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-3)


def test_the_untrained_network_answers_with_the_class_shares(tiny_world: TinyWorld) -> None:
    store = tiny_world.store
    shares = class_shares([store.meta(i) for i in store.case_ids])
    fractions = [store.read(i, "liver").fractions_czyx for i in store.case_ids]
    liver, tumour = np.mean([f.mean(axis=(1, 2, 3)) / 255 for f in fractions if f is not None], axis=0)
    # Cases weigh by their native voxels there and equally here.
    assert shares[1] == pytest.approx(liver, rel=0.2)
    assert shares[2] == pytest.approx(max(tumour, 1e-4), rel=0.5)
    state = new_state(tiny_config(), CPU, class_shares=(0.7, 0.2, 0.1))
    with torch.no_grad():
        for head in state.network.heads:
            head.get_parameter("weight").zero_()
        logits = state.network.eval()(torch.randn(1, 1, 16, 32, 32))
    answer = torch.softmax(logits, dim=1).mean(dim=(0, 2, 3, 4))
    torch.testing.assert_close(answer, torch.tensor([0.7, 0.2, 0.1]))


# ---- checkpoints


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"version": 2, "config": Malicious(tmp_path / "owned")}, tmp_path / LAST)
    with pytest.raises(RunError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / LAST)
    assert not (tmp_path / "owned").exists()
    with (tmp_path / BEST).open("wb") as file:
        pickle.dump(Malicious(tmp_path / "owned"), file)
    with pytest.raises(RunError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / BEST)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda whole: whole[: len(whole) // 2], "truncated, or another kind of file ("),
        (lambda _: b"", "truncated, or another kind of file (0 bytes): copy it again"),
        (lambda _: b"\x00garbage" * 99, "truncated, or another kind of file (792 bytes): copy it again"),
        (lambda whole: whole.replace(b"data.pkl", b"dota.pkl"), "damaged, or it holds more than plain data"),
    ],
    ids=["truncated", "empty", "garbage", "damaged"],
)
def test_a_spoilt_checkpoint_says_what_to_do(
    tiny_run: Path, tmp_path: Path, content: Any, words: str
) -> None:
    (tmp_path / LAST).write_bytes(content((tiny_run / LAST).read_bytes()))
    with pytest.raises(RunError) as caught:
        load_checkpoint(tmp_path / LAST)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / LAST}: not a readable checkpoint: ")
    assert words in message
    assert message.endswith("copy it again, or train again")
    # None of torch's words, which are about its own parts and options.
    assert not any(word in message for word in ("Error", "torch", "weights_only", "pickle", "PytorchStream"))
    # last.pt holds all that best.pt does.
    (tmp_path / LAST).rename(tmp_path / BEST)
    (tmp_path / LAST).touch()
    with pytest.raises(RunError, match=r"or put a copy of last.pt in its place$"):
        load_checkpoint(tmp_path / BEST)


def test_a_folder_in_the_place_of_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / LAST).mkdir()
    with pytest.raises(RunError, match="last.pt: cannot be opened: Is a directory"):
        load_checkpoint(tmp_path / LAST)


def test_a_checkpoint_of_another_cache_says_what_differs(
    tiny_run: Path, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    content = load_checkpoint(tiny_run / LAST)
    content["spec"]["margin_fraction"] = 0.1
    write_checkpoint(tmp_path / LAST, content)
    with pytest.raises(RunError, match=r"spec.margin_fraction: checkpoint has 0.1, cache has 0.02"):
        train(tiny_world.store, tmp_path, tiny_config(epochs=6, steps=20), resume=True, watcher=SILENT)


def test_resuming_says_what_else_is_no_longer_as_it_was(
    tiny_run: Path, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    content = load_checkpoint(tiny_run / LAST)
    content["software"] = "liverseg 0.0.1, torch 1.0"
    write_checkpoint(tmp_path / LAST, content)
    told: list[str] = []
    config = tiny_config(epochs=7, steps=1)
    train(tiny_world.store, tmp_path, config, resume=True, watcher=replace(SILENT, started=told.append))
    assert told[0].startswith(f"{tmp_path}: resumed with other settings or software than before: software: ")
    assert "software: checkpoint has liverseg 0.0.1, torch 1.0, this is liverseg" in told[0]
    assert "optim.steps_per_epoch: checkpoint has 20, configuration has 1" in told[0]
    assert len(told) == 2


def test_resuming_a_finished_run_says_so_and_keeps_its_settings(
    tiny_run: Path, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    told: list[str] = []
    watcher = replace(SILENT, started=told.append)
    config = tiny_config(epochs=6, steps=20)
    other = replace(config, loss=LossConfig(name="dice", cross_entropy=3.0))
    train(tiny_world.store, run, other, resume=True, watcher=watcher)
    assert told[0] == (
        f"{run}: is finished after 6 epochs: nothing is trained; these changes have no effect: loss.name: checkpoint has "
        "'dice_focal', configuration has 'dice': raise optim.epochs above 6 to continue"
    )
    assert load_config(run / "config.toml") == config
    told.clear()
    train(tiny_world.store, run, config, resume=True, watcher=watcher)
    assert (
        told[0]
        == f"{run}: is finished after 6 epochs: nothing is trained: raise optim.epochs above 6 to continue"
    )
    shorter = tiny_config(epochs=3, steps=20)
    train(tiny_world.store, run, shorter, resume=True, watcher=watcher)
    assert load_config(run / "config.toml") == config


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04truncated"])
def test_damaged_checkpoints_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LAST).write_bytes(content)
    with pytest.raises(RunError, match=LAST):
        load_checkpoint(tmp_path / LAST)


def test_checkpoint_of_another_version(tmp_path: Path) -> None:
    torch.save({"version": 99}, tmp_path / LAST)
    with pytest.raises(RunError, match="version is 99, this software reads 2"):
        load_checkpoint(tmp_path / LAST)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    state = new_state(config, CPU)
    save_checkpoint(tmp_path / LAST, state, config, PreprocessSpec())
    before = (tmp_path / LAST).read_bytes()

    def full_disk(_: object, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path / LAST, state, config, PreprocessSpec())
    assert (tmp_path / LAST).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [LAST]


def test_restore_gives_back_everything(tmp_path: Path) -> None:
    config = tiny_config()
    state = new_state(config, CPU)
    state.epoch, state.step, state.best_score, state.history = 3, 9, 0.5, [{"epoch": 1.0}]
    save_checkpoint(tmp_path / LAST, state, config, PreprocessSpec())
    other = new_state(replace(config, seed=5), CPU)
    restore(other, load_checkpoint(tmp_path / LAST), config, path=tmp_path / LAST)
    assert (other.epoch, other.step, other.best_score, other.history) == (3, 9, 0.5, [{"epoch": 1.0}])
    for name, value in state.network.state_dict().items():
        assert torch.equal(value, other.network.state_dict()[name])


def test_every_flipped_bit_of_a_checkpoint_is_caught_or_harmless(tiny_run: Path, tmp_path: Path) -> None:
    whole = (tiny_run / BEST).read_bytes()
    expected = content_checksum(load_checkpoint(tiny_run / BEST))
    rng = np.random.default_rng(0)
    caught = 0
    for place in rng.integers(8 * len(whole), size=150).tolist():
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        (tmp_path / BEST).write_bytes(flipped)
        try:
            assert content_checksum(load_checkpoint(tmp_path / BEST)) == expected  # in what zip only pads
        except RunError:
            caught += 1
    assert caught > 75


def test_weights_that_are_not_finite_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    content = load_checkpoint(tiny_run / LAST)
    next(iter(content["average"].values())).view(-1)[0] = float("nan")
    write_checkpoint(tmp_path / LAST, content)
    with pytest.raises(RunError, match=r"the weights .* are not finite"):
        load_checkpoint(tmp_path / LAST)


def test_best_holds_the_averaged_weights_alone_and_cannot_be_resumed(
    tiny_run: Path, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    best, last = load_checkpoint(tiny_run / BEST), load_checkpoint(tiny_run / LAST)
    assert last.keys() - best.keys() == {"network", "optimizer", "scaler"}
    assert (tiny_run / BEST).stat().st_size < 0.4 * (tiny_run / LAST).stat().st_size
    shutil.copytree(tiny_run, tmp_path / "run")
    shutil.copy(tiny_run / BEST, tmp_path / "run" / LAST)
    with pytest.raises(RunError, match="holds averaged weights alone"):
        train(
            tiny_world.store, tmp_path / "run", tiny_config(epochs=6, steps=20), resume=True, watcher=SILENT
        )


def test_resuming_writes_again_what_follows_from_the_checkpoint(
    tiny_run: Path, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    whole = (run / HISTORY).read_bytes()
    # Killed between last.pt and history.csv of the last epoch: nothing is left to train.
    (run / HISTORY).write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    (run / PROGRESS).unlink()
    train(tiny_world.store, run, tiny_config(epochs=6, steps=20), resume=True, watcher=SILENT)
    assert (run / HISTORY).read_bytes() == whole
    assert (run / PROGRESS).exists()


def test_a_disk_that_fills_up_ends_the_run(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("liverseg.training.run_files.write_checkpoint", full_disk)
    for epochs in (1, 3):  # noticed at the end, and before the next epoch is written
        with pytest.raises(OSError, match="No space left"):
            train(
                tiny_world.store,
                tmp_path / str(epochs),
                tiny_config(epochs=epochs, steps=1),
                resume=False,
                watcher=SILENT,
            )


def test_a_run_that_began_elsewhere_gets_this_device_s_optimizer(tmp_path: Path) -> None:
    config = tiny_config()
    state = new_state(config, CPU)
    save_checkpoint(tmp_path / LAST, state, config, PreprocessSpec())
    content = load_checkpoint(tmp_path / LAST)
    content["optimizer"]["param_groups"][0]["fused"] = True  # as on a GPU
    restore(state, content, config, path=tmp_path / LAST)
    assert state.optimizer.param_groups[0]["fused"] is False


def test_average_on_a_hand_example() -> None:
    # Step 1: the decay is min(0.9, 2/11) = 2/11, so 2/11 · 0 + 9/11 · 11 = 9. Step 10 000: 0.9 · 9 + 0.1 · 11 = 9.2.
    network, average = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        network.weight.fill_(11)
        average.weight.fill_(0)
    update_average(average, network, decay=0.9, step=1)
    assert average.weight.item() == pytest.approx(9)
    update_average(average, network, decay=0.9, step=10_000)
    assert average.weight.item() == pytest.approx(9.2)


def test_kill_9_never_leaves_a_broken_checkpoint(tiny_world: TinyWorld, tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_config(tiny_config(epochs=1000, steps=1), tmp_path / "config.toml")
    command = [sys.executable, "-m", "liverseg", "train", str(tiny_world.cache), str(run), "--resume"]
    command += ["--config", str(tmp_path / "config.toml")]
    epochs = 0
    for pause_s in (0.0, 0.21, 0.4):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not _has_passed(run, epochs):
            time.sleep(0.02)
        time.sleep(pause_s)
        process.send_signal(signal.SIGKILL)
        process.wait()
        reached = load_checkpoint(run / LAST)["epoch"]
        assert reached > epochs
        epochs = reached
        load_checkpoint(run / BEST)


def _has_passed(run: Path, epochs: int) -> bool:
    try:
        return len((run / HISTORY).read_text().splitlines()) - 1 > epochs
    except FileNotFoundError:
        return False


# ---- split


def test_folds_are_disjoint_and_cover_everything() -> None:
    ids = [f"liver_{i}" for i in range(13)]
    held_back = [k_fold_split(ids, folds=5, fold=fold, seed=0)[1] for fold in range(5)]
    assert sorted(i for val in held_back for i in val) == sorted(ids)
    assert sorted(map(len, held_back)) == [2, 2, 3, 3, 3]
    for fold, val in enumerate(held_back):
        assert k_fold_split(ids, folds=5, fold=fold, seed=0) == ([i for i in ids if i not in val], val)
    assert k_fold_split(ids, folds=5, fold=0, seed=1) != k_fold_split(ids, folds=5, fold=0, seed=0)
    assert k_fold_split(list(reversed(ids)), folds=5, fold=0, seed=0)[1][::-1] == held_back[0]


def test_named_cases_make_the_split(tiny_world: TinyWorld) -> None:
    split = make_split(tiny_world.store, DataConfig(train_cases=("liver_1",)), seed=0)
    assert (split.train, split.val) == (("liver_1",), ("liver_1",))
    split = make_split(tiny_world.store, DataConfig(train_cases=("liver_1",), val_cases=("liver_2",)), seed=0)
    assert (split.train, split.val) == (("liver_1",), ("liver_2",))
    assert split.train_sha256 == (tiny_world.store.meta("liver_1").image.sha256,)


def test_a_named_case_that_does_not_exist(tiny_world: TinyWorld) -> None:
    with pytest.raises(ConfigError, match="no labelled case liver_77"):
        make_split(tiny_world.store, DataConfig(train_cases=("liver_1", "liver_77")), seed=0)


def test_a_split_is_taken_from_a_file(tiny_world: TinyWorld, tmp_path: Path) -> None:
    own = make_split(tiny_world.store, DataConfig(folds=3), seed=4)
    save_split(own, tmp_path)
    assert make_split(tiny_world.store, DataConfig(split=str(tmp_path / SPLIT)), seed=0) == own
    # nnU-Net's file is a list of folds.
    folds = [{"train": ["liver_0"], "val": ["liver_1"]}, {"train": ["liver_2"], "val": ["liver_3"]}]
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps(folds))
    split = make_split(tiny_world.store, DataConfig(split=str(path), fold=1), seed=0)
    assert (split.train, split.val) == (("liver_2",), ("liver_3",))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense", "unreadable"),
        ('{"train": ["liver_1"]}', "val: missing"),
        ('{"train": ["liver_1"], "val": ["liver_88"]}', "no labelled case liver_88"),
        ('[{"train": ["liver_1"], "val": ["liver_2"]}]', "has 1 fold, counted from 0, and no fold 2"),
    ],
)
def test_a_split_file_that_cannot_be_used(
    tiny_world: TinyWorld, tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        make_split(tiny_world.store, DataConfig(split=str(tmp_path / "split.json"), fold=2), seed=0)


# ---- what a run leaves behind


class FakeWriter:
    """TensorBoard's writer, which need not be installed."""

    written: ClassVar[list[tuple[str, float, int]]] = []

    def __init__(self, folder: str, *, purge_step: int) -> None:
        self.written.append((folder, 0.0, purge_step))

    def add_scalar(self, name: str, value: float, epoch: int) -> None:
        self.written.append((name, value, epoch))

    def flush(self) -> None:
        pass


def test_pictures_native_scores_and_tensorboard(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=FakeWriter))
    config = replace(
        tiny_config(epochs=3, steps=1),
        watch=WatchConfig(pictures_every=2, raw=str(tiny_world.raw), native_every=2),
    )
    state = train(tiny_world.store, tmp_path / "run", config, resume=False, watcher=SILENT)
    examples = sorted((tmp_path / "run" / "examples").iterdir())
    assert [path.name for path in examples] == ["epoch_0002.png"]
    assert examples[0].read_bytes().startswith(b"\x89PNG")
    assert ["native_dice_liver" in row for row in state.history] == [False, True, True]
    rows = list(csv.DictReader((tmp_path / "run" / HISTORY).read_text().splitlines()))
    assert [row["native_dice_liver"] != "" for row in rows] == [False, True, True]
    assert FakeWriter.written[0] == (str(tmp_path / "run" / "tensorboard"), 0.0, 1)
    assert ("val_loss", state.history[1]["val_loss"], 2) in FakeWriter.written


def test_native_dice_of_the_cached_truth_is_what_the_grid_allows(tiny_world: TinyWorld) -> None:
    store, case_id = tiny_world.store, "liver_1"
    fractions = store.read(case_id, "liver").fractions_czyx
    assert fractions is not None
    foreground = fractions.astype(np.float32) / np.float32(255)
    liver, _ = native_dice(foreground, store.meta(case_id), view="liver", raw=tiny_world.raw)
    assert liver > 0.9
    nothing = native_dice(np.zeros_like(foreground), store.meta(case_id), view="liver", raw=tiny_world.raw)
    assert nothing[0] == 0


def test_run_json_says_where_a_run_comes_from(tiny_run: Path, tiny_world: TinyWorld) -> None:
    (start,) = json.loads((tiny_run / RUN).read_text())
    assert start["cache_fingerprint"] == tiny_world.store.schema.fingerprint
    assert start["versions"]["torch"] == torch.__version__
    assert start["devices"] == 1
    assert start["device"].startswith("cpu")
    assert Path(start["cache"]) == tiny_world.cache.resolve()


def test_git_commit_of_a_repository_and_of_none(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@x"]
    for command in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "--message", "m"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert git_commit(tmp_path) == found.stdout.strip()


def test_the_speed_of_a_run_is_a_share_of_the_peak(tiny_run: Path) -> None:
    for row in load_checkpoint(tiny_run / LAST)["history"]:
        assert 0 < row["mfu"] < 1
        assert row["samples_per_second"] > 0


def test_bf16_is_for_gpus_and_for_cpus_that_get_its_gradients_right() -> None:
    cuda = torch.device("cuda")
    # 64 slices and 4 poolings end at 4 slices, 5 poolings at 2; 16 slices pass through 2 on the way to 1.
    for slices, poolings, on_cpu in ((64, 4, True), (64, 5, False), (16, 4, False), (16, 2, True)):
        found = training_dtype("bf16", CPU, slices=slices, poolings=poolings)
        assert found == (torch.bfloat16 if on_cpu else None)
        assert training_dtype("bf16", cuda, slices=slices, poolings=poolings) == torch.bfloat16
    assert training_dtype("fp32", CPU, slices=64, poolings=4) is None


@pytest.mark.parametrize(
    ("capability", "native_bf16", "dtype", "compiled"),
    [
        ((6, 0), False, None, False),
        ((7, 5), False, torch.float16, False),
        ((8, 0), True, torch.bfloat16, True),
    ],
    ids=["P100", "T4", "A100"],
)
def test_each_card_gets_the_precision_that_it_multiplies_fast(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    native_bf16: bool,
    dtype: torch.dtype | None,
    compiled: bool,
) -> None:
    # torch says yes to bfloat16 on a T4, too, unless it is asked about native support.
    supported = lambda including_emulation=True: native_bf16 or including_emulation  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    cuda = torch.device("cuda")
    assert autocast_dtype("auto", cuda) == dtype
    assert compiles("auto", cuda, devices=1) == compiled
    assert not compiles("auto", cuda, devices=2)
    assert not compiles("auto", CPU, devices=1)


def test_a_card_without_kernels_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernels(*_: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore lines")

    check_kernels.cache_clear()
    monkeypatch.setattr(torch.nn.functional, "conv3d", no_kernels)
    for name in ("cpu", "auto"):
        with pytest.raises(ConfigError, match="cannot compute on it .*no kernel image") as caught:
            choose_device(name)
        assert "\n" not in str(caught.value)


# ---- float16


def half_config(precision: Precision, *, learning_rate: float = 1e-3) -> TrainConfig:
    config = replace(tiny_config(epochs=1, steps=5, learning_rate=learning_rate), precision=precision)
    return replace(config, model=NetworkConfig(base_channels=2, depth=2))


def test_float16_learns_what_float32_does(tiny_world: TinyWorld, tmp_path: Path) -> None:
    states = {
        precision: train(
            tiny_world.store, tmp_path / precision, half_config(precision), resume=False, watcher=SILENT
        )
        for precision in PRECISIONS
    }
    half, full = states["fp16"], states["fp32"]
    assert half.step == full.step == 5
    assert half.scaler.get_scale() == 65536
    assert half.history[0]["train_loss"] == pytest.approx(full.history[0]["train_loss"], rel=5e-3)
    # Not the same numbers: float16 was indeed used.
    assert half.history[0]["train_loss"] != full.history[0]["train_loss"]
    for name, value in full.network.state_dict().items():
        torch.testing.assert_close(half.network.state_dict()[name], value, rtol=2e-2, atol=5e-3)


def test_a_gradient_that_overflows_float16_skips_a_step_and_resuming_keeps_the_scale(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()

    def overflows_once(logits: torch.Tensor, fractions: torch.Tensor, config: LossConfig) -> torch.Tensor:
        value = loss(logits, fractions, config)
        if next(calls) == 2:  # finite, with a gradient that float16 cannot hold
            value = value + 1e9 * (logits - logits.detach()).sum()
        return value

    run = tmp_path / "run"
    monkeypatch.setattr("liverseg.training.train.loss_of", overflows_once)
    state = train(tiny_world.store, run, half_config("fp16"), resume=False, watcher=SILENT)
    assert (state.epoch, state.step, state.scaler.get_scale()) == (1, 4, 32768)
    longer = replace(half_config("fp16"), optim=replace(half_config("fp16").optim, epochs=2))
    again = train(tiny_world.store, run, longer, resume=True, watcher=SILENT)
    assert (again.epoch, again.step, again.scaler.get_scale()) == (2, 9, 32768)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_used_again_and_given_back_in_the_end() -> None:
    code = """
import contextlib, resource, sys, torch
from pathlib import Path
from liverseg.device import freed_memory_reused
torch.set_num_threads(1)
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def pages(): return [int(n) for n in Path("/proc/self/statm").read_text().split()[:2]]
def kept():  # of 1 GiB, which no hole of the heap has room for, once it is freed
    before, _ = pages()
    torch.empty(2**28)
    return pages()[0] - before
with freed_memory_reused(torch.device("cpu")) if sys.argv[1] == "reuse" else contextlib.nullcontext():
    for _ in range(5): torch.ones(2**24)  # until the heap has grown
    before = faults()
    for _ in range(20): torch.ones(2**24)
    print(faults() - before, kept(), pages()[1])
print(pages()[1], kept())
"""
    (reused, kept, held, left, kept_after), (usual, kept_as_usual, *_) = (
        map(
            int,
            subprocess.run([sys.executable, "-c", code, how], capture_output=True, check=True).stdout.split(),
        )
        for how in ("reuse", "as usual")
    )
    gibibyte = 2**30 // os.sysconf("SC_PAGE_SIZE")
    assert 4 * reused < usual
    assert left < held - gibibyte / 32  # half of a tensor, which filled 64 MiB
    assert kept > gibibyte / 2 > 100 * max(kept_as_usual, kept_after)


def test_matmul_peak_is_measured_once() -> None:
    assert matmul_peak(CPU, torch.float32) == matmul_peak(CPU, torch.float32) > 1e8


# ---- schedule, levels, device


def test_learning_rate_on_a_hand_example() -> None:
    config = OptimConfig(epochs=1, steps_per_epoch=10, warmup_steps=2, learning_rate=1.0)
    rates = [learning_rate(step, config) for step in range(11)]
    # Warm-up 1/2 and 2/2; then half a cosine over eight steps: 1 at its start, 0.5 half-way, 0 past the end.
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5)
    assert rates[10] == pytest.approx(0.0)
    assert rates[2:] == sorted(rates[2:], reverse=True)


@pytest.mark.parametrize("name", ["liver", "kaggle"])
def test_the_schedule_of_a_real_run_warms_up_ends_at_zero_and_is_averaged_from_the_start(name: str) -> None:
    config = load_config(Path(__file__).parents[1] / "configs" / f"{name}.toml").optim
    total = config.epochs * config.steps_per_epoch
    rates = [learning_rate(step, config) for step in range(total)]
    assert int(np.argmax(rates)) in (config.warmup_steps - 1, config.warmup_steps)
    assert config.warmup_steps <= 0.02 * total
    assert rates[-1] < 1e-6 * config.learning_rate
    # The average's age in steps, and what it keeps of the first, random weights.
    network, average = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    age, ages = 0.0, []
    torch.nn.init.zeros_(network.weight)
    torch.nn.init.ones_(average.weight)
    for step in range(1, 2001):
        before = average.weight.item()
        update_average(average, network, decay=config.ema_decay, step=step)
        age = (age + 1) * (average.weight.item() / before if before > 1e-30 else 1.0)
        ages.append(age)
    first = config.steps_per_epoch
    assert ages[first - 1] < 0.2 * first
    assert average.weight.item() < 1e-6
    # At the end it lags by less than the steps in which the rate is below a thousandth of its height.
    assert 1 / (1 - config.ema_decay) < sum(rate < 2e-3 * config.learning_rate for rate in rates)


def test_warm_up_is_at_most_half_of_a_short_run() -> None:
    config = OptimConfig(epochs=1, steps_per_epoch=4, warmup_steps=500, learning_rate=1.0)
    assert [learning_rate(step, config) for step in range(2)] == [0.5, 1.0]


def test_levels_weigh_half_of_the_next_finer_one() -> None:
    torch.manual_seed(0)
    config = LossConfig()
    fractions = torch.softmax(torch.randn(1, 3, 8, 8, 8), dim=1)
    fine, coarse = torch.randn(1, 3, 8, 8, 8), torch.randn(1, 3, 4, 4, 4)
    pooled = fractions.reshape(1, 3, 4, 2, 4, 2, 4, 2).mean(dim=(3, 5, 7))
    expected = (loss(fine, fractions, config) + 0.5 * loss(coarse, pooled, config)) / 1.5
    torch.testing.assert_close(levels_loss((fine, coarse), fractions, config), expected)
    torch.testing.assert_close(levels_loss(fine, fractions, config), loss(fine, fractions, config))


def test_class_dice_on_a_hand_example() -> None:
    # Liver (label >= 1): 2 predicted, 3 true, 2 shared: 4/5. Tumour: 1 predicted, 2 true, 1 shared: 2/3.
    predicted, truth = torch.tensor([[[[1, 2, 0, 0]]]]), torch.tensor([[[[1, 2, 2, 0]]]])
    assert class_dice(predicted, truth) == pytest.approx((0.8, 2 / 3))
    none = class_dice(predicted, torch.tensor([[[[1, 1, 0, 0]]]]))
    assert none[0] == 1.0
    assert np.isnan(none[1])


def test_selection_score_leaves_out_an_absent_tumour() -> None:
    assert selection_score({"val_dice_liver": 0.8, "val_dice_tumour": 0.4}) == pytest.approx(0.6)
    assert selection_score({"val_dice_liver": 0.8, "val_dice_tumour": None}) == pytest.approx(0.8)


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "qpu:0"])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        choose_device(name)


def test_the_watcher_is_told_everything(tiny_world: TinyWorld, tmp_path: Path) -> None:
    told: list[tuple[object, ...]] = []
    watcher = Callbacks(
        started=lambda text: told.append(("started", text)),
        stepped=lambda epoch, step, _: told.append((epoch, step)),
        finished_epoch=lambda row: told.append(("epoch", row["epoch"])),
    )
    train(tiny_world.store, tmp_path / "run", tiny_config(epochs=2, steps=2), resume=False, watcher=watcher)
    assert told[1:] == [(1, 1), (1, 2), ("epoch", 1), (2, 1), (2, 2), ("epoch", 2)]
    assert "4 training and 2 validation cases" in str(told[0][1])
