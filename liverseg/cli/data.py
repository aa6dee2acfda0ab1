"""Commands on raw data sets and caches."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from liverseg.cli.common import FILE, FOLDER, Shape

if TYPE_CHECKING:
    from pipeline.build import CaseResult


@click.command()
@click.argument("raw", type=FOLDER)
@click.option("--cases", default=16, show_default=True, type=click.IntRange(min=1), help="Labelled cases.")
@click.option("--tests", default=2, show_default=True, type=click.IntRange(min=0), help="Unlabelled ones.")
@click.option("--shape", default="192x192x96", show_default=True, type=Shape(), help="Voxels along x, y, z.")
@click.option("--seed", default=0, show_default=True, help="The same seed writes the same files.")
@click.option("--jobs", default=None, type=click.IntRange(min=1), help="Processes; default: physical cores.")
def phantom(
    raw: Path, cases: int, tests: int, shape: tuple[int, int, int], seed: int, jobs: int | None
) -> None:
    """Write a synthetic Decathlon data set to RAW.

    \b
    Example: liverseg phantom data/phantoms --cases 16
    """
    from liverseg.console import progress_bar, say
    from pipeline.build import physical_cores
    from pipeline.phantom import write_phantoms

    with progress_bar() as bar:
        task = bar.add_task("phantoms", total=cases + tests, note="")
        write_phantoms(
            raw,
            cases=cases,
            tests=tests,
            shape_xyz=shape,
            seed=seed,
            jobs=jobs or physical_cores(),
            progress=lambda name: bar.update(task, advance=1, note=name),
        )
    say(f"{cases} labelled and {tests} unlabelled cases in {raw}")


@click.command()
@click.argument("raw", type=FOLDER)
@click.argument("cache", type=FOLDER)
@click.option("--jobs", default=None, type=click.IntRange(min=1), help="Processes; default: physical cores.")
def preprocess(raw: Path, cache: Path, jobs: int | None) -> None:
    """Crop and resample every raw volume of RAW once, into the Zarr store CACHE.

    Cases that CACHE holds already are skipped, so that an interrupted run goes on where it stopped. A case
    that fails is reported, does not stop the others, and makes the exit code 1.

    \b
    Example: liverseg preprocess data/Task03_Liver data/liver.zarr --jobs 8
    """
    from data_cache.schema import PreprocessSpec
    from liverseg.console import progress_bar, say, warn
    from pipeline.build import build, physical_cores
    from pipeline.decathlon import read_data_set

    data_set = read_data_set(raw)
    for path in data_set.unlisted:
        warn(f"{path}: not in dataset.json, left out")
    with progress_bar() as bar:
        task = bar.add_task("preprocess", total=len(data_set.cases), note="")

        def report(result: CaseResult) -> None:
            bar.update(task, advance=1, note=result.case_id)
            _report_case(result)

        results = build(data_set, cache, PreprocessSpec(), jobs=jobs or physical_cores(), report=report)
    outcomes = [result.outcome for result in results]
    done, skipped, failed = (outcomes.count(o) for o in ("done", "skipped", "failed"))
    say(f"{cache}: {done} cases built, {skipped} were up to date, {failed} failed")
    if failed:
        sys.exit(1)


def _report_case(result: CaseResult) -> None:
    from liverseg.console import complain, errors, warn

    if result.outcome == "failed":
        complain(f"{result.case_id}: {result.message}")
        if result.details and click.get_current_context().find_root().params["debug"]:
            errors.print(result.details, markup=False)
    for note in result.notes:
        warn(f"{result.case_id}: {note}")


@click.command()
@click.argument("cache", type=FOLDER)
@click.argument("case", required=False)
@click.option("--png", type=FILE, help="Write a picture of CASE.")
@click.option(
    "--view", type=click.Choice(["liver", "scan"]), default=None, help="Default: liver if there is."
)
def inspect(cache: Path, case: str | None, png: Path | None, view: str | None) -> None:
    """Show the table of the store CACHE, or one CASE of it, in words and as a picture.

    \b
    Example: liverseg inspect data/liver.zarr liver_0 --png liver_0.png
    """
    from data_cache.inspection import summarise_store
    from data_cache.reader import CacheStore
    from liverseg.console import case_table, console, say, store_table

    store = CacheStore.open(cache)
    if case is None:
        if png or view:
            raise click.UsageError("--png and --view need a CASE")
        console.print(store_table(str(cache), store.schema, summarise_store(store)))
        return
    meta = store.meta(case)
    console.print(case_table(meta))
    if png:
        from liverseg.inference.figures import case_montage, save

        view = view or ("liver" if "liver" in meta.windows else "scan")
        voxels = store.read(case, view)
        title = f"{case}, {view} view\nnative slices {meta.windows[view].start}:{meta.windows[view].stop}"
        figure = case_montage(
            voxels.image_zyx, voxels.fractions_czyx, voxels.grid.spacing_zyx_mm, title=title
        )
        png.parent.mkdir(parents=True, exist_ok=True)
        say(f"wrote {save(figure, png)}")


COMMANDS = (phantom, preprocess, inspect)
