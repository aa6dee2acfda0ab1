"""Commands that measure speed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from data_cache.text import pluralise
from liverseg.cli.common import FILE, FOLDER, Shape
from liverseg.cli.outcome import Outcome

if TYPE_CHECKING:
    import torch

    from data_cache.reader import CacheStore
    from liverseg.bench.timing import Timing


@click.group()
def bench() -> None:
    """Measure speed, as ratios within one run; EXPERIMENTS.md keeps the results."""


@bench.command("preprocess")
@click.option("--shape", default="512x512x400", show_default=True, type=Shape(), help="Of the phantom.")
@click.option("--image", type=FILE, help="Use this case instead of a phantom; needs --label.")
@click.option("--label", type=FILE, help="Its label.")
@click.option(
    "--repeats", default=3, show_default=True, type=click.IntRange(min=1), help="The fastest counts."
)
def bench_preprocess(
    shape: tuple[int, int, int], image: Path | None, label: Path | None, repeats: int
) -> Outcome:
    """Time one case's preprocessing beside inflating its files, and beside TorchIO and MONAI where installed.

    \b
    Example: liverseg bench preprocess
             liverseg bench preprocess --image ct.nii.gz --label ct_label.nii.gz
    """
    from liverseg.bench.preprocess import Measurement, measure, write_case
    from liverseg.console import console, say, table

    if (image is None) != (label is None):
        raise click.UsageError("--image and --label go together")
    with tempfile.TemporaryDirectory() as folder:
        if image is None or label is None:
            say(f"painting a phantom of {'×'.join(map(str, shape))} …")
            image, label = write_case(Path(folder), shape)
        sizes = f"{image.stat().st_size / 2**20:.0f} + {label.stat().st_size / 2**20:.1f} MiB compressed"
        results = measure(image, label, repeats=repeats)
    limit = next(r for r in results if r.name == "inflate")
    own = next(r for r in results if r.name == "liverseg")

    def row(r: Measurement) -> tuple[str, ...]:
        wall, cpu = r.seconds / limit.seconds, r.cpu_seconds / limit.cpu_seconds
        slower, memory = r.seconds / own.seconds, r.peak_mib / own.peak_mib
        speed = (f"{r.seconds:.3f}", f"{wall:.2f}×", f"{slower:.1f}×", f"{r.cpu_seconds:.3f}", f"{cpu:.2f}×")
        return r.name, *speed, f"{r.peak_mib:.0f}", f"{memory:.1f}×"

    headers = ("", "s", "of inflating", "of liverseg", "CPU s", "of inflating", "peak MiB", "of liverseg")
    console.print(table(f"one case, {sizes}, fastest of {repeats}", headers, map(row, results)))
    return Outcome(result={"contenders": results})


@bench.command("workers")
@click.argument("raw", type=FOLDER)
@click.option(
    "--cases", "n_cases", default=16, show_default=True, type=click.IntRange(min=1), help="How many of RAW's."
)
def bench_workers(raw: Path, n_cases: int) -> Outcome:
    """Find the number of preprocess --jobs that is the fastest on this machine, and say what bounds it.

    The same cases of RAW go into temporary stores, with 1, 2, 4, … workers up to the number of cores and half
    as many again; files are read from the disk each time where the system allows to forget them.

    \b
    Example: liverseg bench workers data/Task03_Liver
    """
    from liverseg.bench.workers import fastest, memory_limit, numbers_to_try, try_workers, what_bounds
    from liverseg.console import console, progress_bar, say, table, warn
    from pipeline.build import physical_cores
    from pipeline.decathlon import read_data_set

    data_set, cores = read_data_set(raw), physical_cores()
    n_cases = min(n_cases, len(data_set.cases))
    memory_jobs = memory_limit(data_set, jobs=2 * cores)
    numbers = numbers_to_try(cores, most=min(memory_jobs, n_cases))
    if n_cases < 2 * numbers[-1]:
        warn(
            f"{pluralise(n_cases, 'case')} for {pluralise(numbers[-1], 'worker')} are work for a moment only: take more"
        )
    with progress_bar() as bar:
        task = bar.add_task("trials", total=len(numbers), note="")
        trials = try_workers(data_set, numbers, n_cases=n_cases, report=lambda _: bar.update(task, advance=1))
    rows = (
        (
            str(t.jobs),
            f"{t.cases_per_s:.2f}",
            f"{t.cases_per_s / trials[0].cases_per_s:.2f}×",
            f"{t.cores_used:.2f}",
            f"{t.cpu_s_per_case:.3f}",
            f"{t.computing:.0%}",
            f"{t.queued:.0%}",
            f"{max(0.0, 1 - t.computing - t.queued):.0%}",
            f"{t.read_mib_per_s:.1f}",
        )
        for t in trials
    )
    headers = (
        "jobs",
        "cases/s",
        "of one",
        "cores",
        "CPU s per case",
        "computing",
        "no core",
        "disk",
        "MiB/s read",
    )
    console.print(
        table(f"{pluralise(n_cases, 'case')} of {raw} on {pluralise(cores, 'core')}", headers, rows)
    )
    bound = what_bounds(trials, cores=cores, memory_jobs=memory_jobs)
    say(f"fastest: --jobs {fastest(trials).jobs}, bound by {bound}")
    return Outcome(result={"trials": trials, "fastest_jobs": fastest(trials).jobs, "bound_by": bound})


seconds_option = click.option(
    "--seconds", default=5.0, show_default=True, type=click.FloatRange(min=0), help="For each contender."
)
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1.")


@bench.command("augment")
@device_option
@seconds_option
def bench_augment(device: str, seconds: float) -> Outcome:
    """Time elastic, noise and contrast of a sample of 64×128×128, beside every library that is installed.

    SimpleITK, TorchIO, MONAI and batchgeneratorsv2 are, where Python can import them.

    \b
    Example: liverseg bench augment
    """
    from liverseg.device import choose_device

    return Outcome(result={"augment": _print_augment(choose_device(device), seconds)})


@bench.command("load")
@click.option("--cache", type=FOLDER, help="Use this cache of 64×128×128 instead of four phantoms.")
@device_option
@seconds_option
def bench_load(cache: Path | None, device: str, seconds: float) -> Outcome:
    """Time loading from the cache to the device, beside MONAI and TorchIO where installed.

    \b
    Example: liverseg bench load
             liverseg bench load --cache data/liver.zarr
    """
    from liverseg.device import choose_device

    with tempfile.TemporaryDirectory() as folder:
        timings = _print_load(_store(cache, Path(folder)), Path(folder), choose_device(device), seconds)
    return Outcome(result={"load": timings})


@bench.command("train")
@click.option("--base-channels", type=click.IntRange(min=1), help="Default: 64 on a GPU, 8 on a CPU.")
@click.option("--cache", type=FOLDER, help="Use this cache of 64×128×128 instead of four phantoms.")
@device_option
@seconds_option
def bench_train(base_channels: int | None, cache: Path | None, device: str, seconds: float) -> Outcome:
    """Time a training step beside MONAI's networks where installed, and the trainer beside its bare steps.

    On a GPU with batches of 2 and 4, with and without torch.compile; on a CPU with batches of 2.

    \b
    Example: liverseg bench train
    """
    from liverseg.device import choose_device

    with tempfile.TemporaryDirectory() as folder:
        store = _store(cache, Path(folder))
        measured = _print_train(store, choose_device(device), base_channels=base_channels, seconds=seconds)
    return Outcome(result={"train": measured})


@bench.command("all")
@device_option
@seconds_option
def bench_all(device: str, seconds: float) -> Outcome:
    """Run augment, load and train, one after another: with a GPU, everything that is to be shown on one.

    \b
    Example: liverseg bench all --device cuda
    """
    from liverseg.device import choose_device

    chosen = choose_device(device)
    with tempfile.TemporaryDirectory() as folder:
        store = _store(None, Path(folder))
        result: dict[str, object] = {}
        with _leaving_out("augmentation"):
            result["augment"] = _print_augment(chosen, seconds)
        with _leaving_out("loading"):
            result["load"] = _print_load(store, Path(folder), chosen, seconds)
        result["train"] = _print_train(store, chosen, base_channels=None, seconds=seconds)
    return Outcome(result=result)


def _store(cache: Path | None, folder: Path) -> CacheStore:
    from data_cache.reader import CacheStore
    from liverseg.bench.load import make_store

    return make_store(folder) if cache is None else CacheStore.open(cache)


@contextmanager
def _leaving_out(what: str) -> Iterator[None]:
    """Where memory runs out, this figure is left out with a warning, and the next one is measured."""
    from liverseg.cli.failures import memory_message
    from liverseg.console import warn

    try:
        yield
    except Exception as failure:
        message = memory_message(failure, "bench")
        if message is None:
            raise
        warn(f"{what}: left out: {message}")


def _print_augment(device: torch.device, seconds: float) -> Sequence[Timing]:
    from liverseg.bench.augment import measure

    timings = measure(device, seconds=seconds)
    _print_timings("augmentation of one sample", timings)
    return timings


def _print_load(store: CacheStore, folder: Path, device: torch.device, seconds: float) -> Sequence[Timing]:
    from liverseg.bench.load import measure

    timings = measure(store, folder, device, seconds=seconds)
    _print_timings(f"loading to {device}", timings)
    return timings


def _print_timings(title: str, timings: Sequence[Timing]) -> None:
    """The first is what the others are compared with."""
    from liverseg.console import console, table

    rows = (
        (t.name, f"{1000 * t.seconds:.2f}", f"{1 / t.seconds:.1f}", f"{t.seconds / timings[0].seconds:.1f}×")
        for t in timings
    )
    console.print(table(title, ("", "ms per sample", "samples/s", f"of {timings[0].name}"), rows))


def _print_train(
    store: CacheStore, device: torch.device, *, base_channels: int | None, seconds: float
) -> dict[str, object]:
    from liverseg.bench.train import measure_steps, measure_whole
    from liverseg.console import console, number, say, table, warn
    from liverseg.device import DTYPE_NAMES, autocast_dtype

    on_gpu = device.type == "cuda"
    base = base_channels or (64 if on_gpu else 8)
    steps = list(
        measure_steps(
            device, base_channels=base, batch_sizes=(2, 4) if on_gpu else (2,), seconds=seconds, skipped=warn
        )
    )
    own = {step.batch_size: step.seconds for step in steps if step.name == "liverseg"}
    rows = (
        (
            step.name,
            str(step.batch_size),
            f"{1000 * step.seconds:.1f}",
            f"{step.seconds / own[step.batch_size]:.2f}×" if step.batch_size in own else "–",
            f"{step.samples_per_second:.2f}",
            f"{step.mfu:.1%}",
            number(step.peak_mib, 0),
        )
        for step in steps
    )
    headers = ("", "batch", "ms per step", "of liverseg", "samples/s", "of matmul peak", "peak MiB")
    dtype = DTYPE_NAMES[autocast_dtype("auto", device) or torch.float32]
    console.print(table(f"steps at {base} channels on {device} in {dtype}", headers, rows))
    result = {"device": str(device), "dtype": dtype, "base_channels": base, "steps": steps}
    with _leaving_out("the trainer beside its bare steps"):
        whole = measure_whole(store, device, base_channels=base, batch_size=2, steps=50 if on_gpu else 4)
        say(
            f"trainer: {whole.end_to_end:.2f} samples/s end to end, {whole.compute_only:.2f} of its bare steps "
            f"({whole.end_to_end / whole.compute_only:.3f}); augmentation {whole.augment_share:.1%} of a step, "
            f"{whole.wait_share:.2%} waiting for data"
        )
        result["trainer"] = whole
    return result


COMMANDS = (bench,)
