"""Commands that measure speed."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from liverseg.cli.common import FILE, Shape


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
) -> None:
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
        times, memory = r.seconds / limit.seconds, r.peak_mib / own.peak_mib
        slower = f"{r.seconds / own.seconds:.1f}×"
        return r.name, f"{r.seconds:.3f}", f"{times:.2f}×", slower, f"{r.peak_mib:.0f}", f"{memory:.1f}×"

    headers = ("", "s", "of inflating", "of liverseg", "peak MiB", "of liverseg")
    console.print(table(f"one case, {sizes}, fastest of {repeats}", headers, map(row, results)))


COMMANDS = (bench,)
