"""Commands that generate a synthetic data set and show a cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from data_cache.errors import CacheError
from liverseg.cli.common import FILE, FOLDER, Shape, report_damaged
from liverseg.cli.outcome import Outcome

if TYPE_CHECKING:
    from data_cache.reader import CacheStore
    from data_cache.schema import CaseMeta
    from liverseg.pictures.histogram import HistogramBin
    from pipeline.phantom.anatomy import DomainShift


@click.command()
@click.argument("raw", type=FOLDER)
@click.option(
    "--cases", default=16, show_default=True, type=click.IntRange(min=1), help="Number of labelled cases."
)
@click.option(
    "--tests", default=2, show_default=True, type=click.IntRange(min=0), help="Number of unlabelled cases."
)
@click.option("--shape", default="192x192x96", show_default=True, type=Shape(), help="Voxels along x, y, z.")
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="The same seed writes the same files.",
)
@click.option(
    "--domain-shift",
    type=click.Choice(["noise", "contrast", "tumour"]),
    help="The same patients with double noise, hardly any contrast, or dense tumours: unlike any other phantom.",
)
@click.option(
    "--jobs",
    default=None,
    type=click.IntRange(min=1),
    help="Number of processes. Default: the physical cores.",
)
def phantom(
    raw: Path,
    *,
    cases: int,
    tests: int,
    shape: tuple[int, int, int],
    seed: int,
    domain_shift: DomainShift | None,
    jobs: int | None,
) -> Outcome:
    """Write a synthetic Decathlon data set to RAW.

    \b
    Example: liverseg phantom data/phantoms --cases 16
             liverseg phantom data/noisy --cases 16 --domain-shift noise
    """
    from liverseg.console import progress_bar, say
    from pipeline.build import physical_cores
    from pipeline.phantom import PhantomSpec, write_phantoms

    try:
        PhantomSpec(shape_xyz=shape)
    except ValueError as failure:
        raise click.BadParameter(str(failure), param_hint="--shape") from None
    with progress_bar() as bar:
        task = bar.add_task("phantoms", total=cases + tests, note="")
        write_phantoms(
            raw,
            cases=cases,
            tests=tests,
            shape_xyz=shape,
            seed=seed,
            domain_shift=domain_shift,
            jobs=jobs or physical_cores(),
            progress=lambda name: bar.update(task, advance=1, note=name),
        )
    say(f"{cases} labelled and {tests} unlabelled cases in {raw}")
    return Outcome(result={"raw": raw, "labelled": cases, "unlabelled": tests, "seed": seed})


@click.command()
@click.argument("cache", type=FOLDER)
@click.argument("cases", nargs=-1, metavar="[CASE]...")
@click.option("--png", type=FILE, help="Write a picture of one CASE.")
@click.option(
    "--view",
    type=click.Choice(["liver", "scan"]),
    default=None,
    help="View for --png and --histogram. Default: liver, if the case has one.",
)
@click.option("--augment", is_flag=True, help="Show each strength of augmentation in --png.")
@click.option("--histogram", is_flag=True, help="Print a histogram of the intensities of one CASE.")
@click.option("--html", type=FILE, help="Write a page with a slice viewer of the CASES. Default: all.")
def inspect(
    cache: Path,
    cases: tuple[str, ...],
    png: Path | None,
    view: str | None,
    augment: bool,
    histogram: bool,
    html: Path | None,
) -> Outcome:
    """Show the store CACHE as a table, or some of its CASES as text, a picture, or a page to scroll through.

    A damaged case is reported, does not stop the others, and makes the exit code 1.

    \b
    Example: liverseg inspect data/liver.zarr liver_0 --png liver_0.png
             liverseg inspect data/liver.zarr liver_0 --augment --png strengths.png
             liverseg inspect data/liver.zarr --html cache.html
    """
    from data_cache.inspection import summarise_case
    from data_cache.outputs import html_mark, png_mark, require_replaceable
    from data_cache.reader import CacheStore
    from liverseg.console import case_table, console, say, store_table

    if (png or view or histogram) and len(cases) != 1:
        raise click.UsageError("--png, --view and --histogram need one CASE")
    if augment and not png:
        raise click.UsageError("--augment needs --png FILE for its picture")
    for path, mark in ((png, png_mark("inspect")), (html, html_mark("inspect"))):
        if path:
            require_replaceable(path, mark, command="inspect")
    store = CacheStore.open(cache, skip_damaged=True)
    if png or view or histogram:
        store.require_sound(cases)
    damaged = report_damaged(store, cases)
    shown = [case for case in cases or store.case_ids if case not in damaged]
    summaries = [summarise_case(store, case) for case in shown]
    if not cases and not html:
        console.print(store_table(str(cache), store.schema, summaries))
    for case in shown if cases else ():
        console.print(case_table(store.meta(case)))
    if png:
        say(f"wrote {_draw_case(store, cases[0], view, png, augment=augment)}")
    bins = _print_histogram(store, cases[0], view) if histogram else None
    if html:
        from liverseg.evaluation.report import write_cache_page

        unreadable = _report_unreadable(store, shown)
        damaged |= unreadable
        readable = [case for case in shown if case not in unreadable]
        if not readable:
            raise CacheError(f"{cache}: no case can be shown: {html} was not written")
        say(f"wrote {write_cache_page(store, readable, html).line()}")
    written = [path for path in (png, html) if path]
    result = {"cache": cache, "cases": summaries, "damaged": damaged, "histogram": bins, "written": written}
    return Outcome(result=result, complete=not damaged)


def _report_unreadable(store: CacheStore, cases: Sequence[str]) -> dict[str, str]:
    """Say which cases have voxels that cannot be read, each in a line, and return what is wrong with them."""
    from liverseg.console import complain

    bad = {}
    for case in cases:
        try:
            for view in store.meta(case).boxes:
                store.read(case, view)
        except CacheError as failure:
            bad[case] = str(failure)
            complain(f"{case}: {failure}")
    return bad


def _draw_case(store: CacheStore, case: str, view: str | None, png: Path, *, augment: bool) -> Path:
    from liverseg.pictures.figures import case_montage
    from liverseg.pictures.sheet import save

    meta = store.meta(case)
    view = view or _closest_view(meta)
    voxels = store.read(case, view)
    if augment:
        from liverseg.training.augment_figure import augment_figure

        title = f"{case}, {view} view\nsigma in voxels, noise in 200 HU; the mesh was squares of 8 voxels"
        figure = augment_figure(voxels, title=title)
    else:
        title = f"{case}, {view} view\nnative voxels {meta.boxes[view]} (z, y, x)"
        figure = case_montage(
            voxels.image_zyx,
            voxels.fractions_czyx,
            voxels.grid.spacing_zyx_mm,
            title=title,
            box_zyx=_liver_box_in(meta, voxels.image_zyx.shape) if view == "scan" else None,
        )
    png.parent.mkdir(parents=True, exist_ok=True)
    return save(figure, png, command="inspect")


def _liver_box_in(meta: CaseMeta, shape_zyx: tuple[int, ...]) -> tuple[slice, slice, slice] | None:
    """The box of the close view in voxels of the scan's view; None for a case without a liver."""
    box = meta.boxes.get("liver")
    if box is None:
        return None
    ends = zip(box.start_zyx, box.stop_zyx, meta.grid.shape_zyx, shape_zyx, strict=True)
    z, y, x = (slice(round(a * m / n), max(round(b * m / n), round(a * m / n) + 1)) for a, b, n, m in ends)
    return z, y, x


def _print_histogram(store: CacheStore, case: str, view: str | None) -> list[HistogramBin]:
    from liverseg.console import console, table
    from liverseg.pictures.histogram import BAR_CELLS, intensity_histogram

    view = view or _closest_view(store.meta(case))
    bins = intensity_histogram(store.read(case, view))
    widest = max(share for b in bins for share in (b.everything, b.liver, b.tumour))
    rows = (
        (
            f"{b.low_hu} to {b.high_hu}",
            *(
                f"{'█' * round(BAR_CELLS * share / widest)} {share:6.1%}"
                for share in (b.everything, b.liver, b.tumour)
            ),
        )
        for b in bins
    )
    headers = ("HU", "all", "liver", "tumour")
    console.print(table(f"{case}, {view} view: share of each class's voxels", headers, rows))
    return bins


def _closest_view(meta: CaseMeta) -> str:
    return "liver" if "liver" in meta.boxes else "scan"


COMMANDS = (phantom, inspect)
