"""The benchmarks: on shapes of no importance, that each contender runs and the figures are what they are called."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny import SPEC, TinyWorld

import liverseg.bench.train as bench_train
from liverseg.bench.contenders import CONTENDERS, available
from liverseg.bench.preprocess import measure
from liverseg.bench.timing import fastest
from liverseg.bench.train import measure_steps, measure_whole
from liverseg.cli import main
from liverseg.device import matmul_peak
from liverseg.model.network import NetworkConfig, forward_flops
from pipeline.build import CaseResult, build_case
from pipeline.decathlon import CaseFiles

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    # In fp32: oneDNN's bf16 gradient of a convolution two slices deep reads memory that nobody has written.
    monkeypatch.setattr("liverseg.bench.train.autocast_dtype", lambda *_: None)
    for module in ("augment", "train"):
        monkeypatch.setattr(f"liverseg.bench.{module}.SHAPE_ZYX", SPEC.shape_zyx)


def test_the_fastest_repeat_counts_and_the_first_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    # Clock readings in pairs: 0.1 s that does not count, then 3, 2 and 4 s: 9 s are at least 6.
    readings = itertools.accumulate([0.0, 0.1, 1.0, 3.0, 1.0, 2.0, 1.0, 4.0])
    monkeypatch.setattr("liverseg.bench.timing.time.perf_counter", lambda: next(readings))
    assert fastest(lambda: None, CPU, seconds=6) == pytest.approx(2)


def test_preprocessing_is_timed_with_and_without_its_second_thread(
    phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("inflate", "liverseg", "liverseg, one thread")
    assert set(names) <= set(available())
    monkeypatch.setattr("liverseg.bench.preprocess.available", lambda: names)
    image, label = (phantoms / folder / "liver_0.nii.gz" for folder in ("imagesTr", "labelsTr"))
    found = measure(image, label, repeats=2)
    assert tuple(m.name for m in found) == names
    assert all(m.cpu_seconds > 0 and m.seconds > 0 and m.peak_mib > 10 for m in found)
    assert found[0].cpu_seconds < min(found[1].cpu_seconds, found[2].cpu_seconds)


def test_the_peak_is_that_of_the_contender_and_not_of_its_parent(
    phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liverseg.bench.preprocess.available", lambda: ("inflate",))
    image, label = (phantoms / folder / "liver_0.nii.gz" for folder in ("imagesTr", "labelsTr"))
    (before,) = measure(image, label, repeats=1)
    held = torch.ones(2**28)  # 1 GiB in this process, as after painting a phantom
    (after,) = measure(image, label, repeats=1)
    del held
    assert after.peak_mib < before.peak_mib + 100


@pytest.mark.parametrize(
    ("name", "cores", "prefetch"),
    [("liverseg", 1, False), ("liverseg", 2, True), ("liverseg, one thread", 2, False)],
)
def test_the_second_thread_is_where_the_name_says(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, cores: int, prefetch: bool
) -> None:
    asked = []

    def noted(files: CaseFiles, **options: Any) -> CaseResult:
        asked.append(options["prefetch"])
        return build_case(files, **options)

    monkeypatch.setattr("pipeline.build.physical_cores", lambda: cores)
    monkeypatch.setattr("pipeline.build.build_case", noted)
    CONTENDERS[name](phantoms / "imagesTr/liver_0.nii.gz", phantoms / "labelsTr/liver_0.nii.gz", tmp_path)
    assert asked == [prefetch]


def test_share_of_the_peak_is_counted_from_the_network() -> None:
    (own,) = (
        s
        for s in measure_steps(CPU, base_channels=2, batch_sizes=(2,), seconds=0, skipped=pytest.fail)
        if s.name == "liverseg"
    )
    flops = 3 * forward_flops(NetworkConfig(base_channels=2), SPEC.shape_zyx)
    assert own.mfu == pytest.approx(own.samples_per_second * flops / matmul_peak(CPU, torch.float32))
    assert own.peak_mib is None


def test_a_network_that_does_not_fit_costs_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bench_train._measure

    def full(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "liverseg" and options["batch_size"] == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(name, *arguments, **options)

    monkeypatch.setattr(bench_train, "_contenders", lambda: {"liverseg": bench_train._unet})
    monkeypatch.setattr(bench_train, "_measure", full)
    skipped: list[str] = []
    steps = measure_steps(CPU, base_channels=2, batch_sizes=(4, 2), seconds=0, skipped=skipped.append)
    assert [step.batch_size for step in steps] == [2]
    assert skipped == ["liverseg, batch 4: out of memory on cpu"]


def test_the_trainer_is_timed_beside_its_bare_steps(tiny_world: TinyWorld) -> None:
    whole = measure_whole(tiny_world.store, CPU, base_channels=2, batch_size=2, steps=2)
    assert whole.end_to_end > 0
    assert whole.compute_only > 0
    assert 0 < whole.augment_share < 1
    assert 0 <= whole.wait_share < 1


def test_the_commands_print_ratios(tiny_world: TinyWorld) -> None:
    common = ["--device", "cpu", "--seconds", "0"]
    cache = ["--cache", str(tiny_world.cache)]
    for command, words in (
        (["augment", *common], "of liverseg, cpu"),
        (["load", *common, *cache], "liverseg, stream"),
        (["train", *common, *cache, "--base-channels", "2"], "of its bare steps"),
    ):
        result = CliRunner().invoke(main, ["bench", *command])
        assert result.exit_code == 0, result.output
        assert words in result.output
        assert "1.0" in result.output


def test_one_command_does_everything(tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liverseg.bench.load.make_store", lambda _: tiny_world.store)
    result = CliRunner().invoke(main, ["bench", "all", "--device", "cpu", "--seconds", "0"])
    assert result.exit_code == 0, result.output
    for words in ("augmentation of one sample", "loading to cpu", "steps at 8 channels", "end to end"):
        assert words in result.output


def test_what_does_not_fit_is_left_out_and_the_rest_is_measured(
    tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("liverseg.bench.load.make_store", lambda _: tiny_world.store)
    monkeypatch.setattr("liverseg.bench.augment.measure", full)
    monkeypatch.setattr(bench_train, "measure_whole", full)
    result = CliRunner().invoke(main, ["bench", "all", "--device", "cpu", "--seconds", "0"])
    assert result.exit_code == 0, result.output
    for what in ("augmentation", "the trainer beside its bare steps"):
        assert f"warning: {what}: left out: out of GPU memory (2.00 GiB more were requested)" in result.output
    for words in ("loading to cpu", "steps at 8 channels"):
        assert words in result.output
    monkeypatch.setattr("liverseg.bench.augment.measure", lambda *_, **__: 1 / 0)
    assert CliRunner().invoke(main, ["bench", "all", "--device", "cpu", "--seconds", "0"]).exit_code == 1
