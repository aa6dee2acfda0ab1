"""Commands that build a cache and verify it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from data_cache.text import pluralise
from liverseg.cli.common import FOLDER, Shard
from liverseg.cli.failures import in_words
from liverseg.cli.notes import warn_of_scan, warn_of_units
from liverseg.cli.outcome import Outcome

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from data_cache.schema import CacheSchema, Crop
    from pipeline.build import CaseResult
    from pipeline.decathlon import RawDataSet
    from pipeline.workers import RunningTask

TIMEOUT_S = 600.0  # a case takes about a second
HEARTBEAT_S = 30.0


# ---- preprocess


@click.command()
@click.argument("raw", type=FOLDER)
@click.argument("cache", type=FOLDER)
@click.option(
    "--jobs",
    default=None,
    type=click.IntRange(min=1),
    help="Number of processes. Default: the physical cores, or as many as fit into memory.",
)
@click.option(
    "--crop",
    default="box",
    show_default=True,
    type=click.Choice(["box", "depth"]),
    help="Close view: the label's bounding box, or its slices at full width as the original project had it.",
)
@click.option(
    "--timeout",
    "timeout_s",
    default=None,
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help=f"Stop a case that takes longer than this.  [default: {TIMEOUT_S:.0f}]",
)
@click.option("--verify-sources", is_flag=True, help="Compare the SHA-256 of files, not only size and time.")
@click.option(
    "--shard",
    type=Shard(),
    help="Build only the i-th of n parts of the cases, such as 1/4: one part per machine.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Also build scans that are not CT in HU or have an impossible grid.",
)
@click.option("--backend", default="local", show_default=True, type=click.Choice(["local", "dask"]))
@click.option(
    "--scheduler", metavar="ADDRESS", help="Address of the dask scheduler, such as tcp://10.0.0.1:8786."
)
def preprocess(
    raw: Path,
    cache: Path,
    jobs: int | None,
    crop: Crop,
    timeout_s: float | None,
    verify_sources: bool,
    force: bool,
    shard: tuple[int, int] | None,
    backend: str,
    scheduler: str | None,
) -> Outcome:
    """Crop and resample every case of RAW once, into the Zarr store CACHE.

    Cases that are already in CACHE are skipped: run the same command again to resume. A case that fails is
    reported, does not stop the others, and makes the exit code 1; so does a case whose worker is killed twice or
    takes too long. Several machines can fill one CACHE at the same time, each with its own --shard. With --backend
    dask, RAW and CACHE must have the same path on every machine of the cluster.

    \b
    Example: liverseg preprocess data/Task03_Liver data/liver.zarr --jobs 8
             liverseg preprocess data/Task03_Liver data/liver.zarr --shard 2/4
             liverseg preprocess data/Task03_Liver data/liver.zarr --backend dask --scheduler tcp://10.0.0.1:8786
    """
    from data_cache.schema import PreprocessSpec
    from liverseg.console import progress_bar, warn
    from pipeline.build import build, physical_cores
    from pipeline.decathlon import read_data_set, take_shard
    from pipeline.workers import WorkerOptions

    _check_backend(backend, scheduler, jobs=jobs, timeout_s=timeout_s)
    data_set = read_data_set(raw)
    _print_oddities(raw, data_set)
    if shard is not None:
        data_set = take_shard(data_set, *shard)
    with progress_bar() as bar:
        task = bar.add_task("preprocess", total=len(data_set.cases), note="")

        def report(result: CaseResult) -> None:
            bar.update(task, advance=1, note=result.case_id)
            _report_case(result)

        options = WorkerOptions(
            timeout_s=TIMEOUT_S if timeout_s is None else timeout_s,
            scheduler=scheduler,
            watch=_heartbeat(bar, task),
            warn=warn,
        )
        results = build(
            data_set,
            cache,
            PreprocessSpec(crop=crop),
            jobs=jobs or physical_cores(),
            report=report,
            options=options,
            verify_sources=verify_sources,
            force=force,
        )
    return _print_outcomes(cache, results, misnamed=[case.image for case in data_set.misnamed])


def _print_oddities(raw: Path, data_set: RawDataSet) -> None:
    from liverseg.console import complain, warn
    from pipeline.decathlon import NO_CASE_ID, RENAME

    for note in data_set.notes:
        warn(f"{raw}: {note}")
    for path in data_set.unlisted:
        warn(f"{path}: ignored: not in dataset.json")
    for case in data_set.misnamed:
        complain(f"{case.image}: {NO_CASE_ID}: {RENAME}")


def _print_outcomes(cache: Path, results: Sequence[CaseResult], *, misnamed: Sequence[Path]) -> Outcome:
    """One line of counts, and all of it as the command's result."""
    from liverseg.console import say

    outcomes = [result.outcome for result in results]
    done, skipped, failed = (outcomes.count(o) for o in ("done", "skipped", "failed"))
    failed += len(misnamed)
    warn_of_units([(result.case_id, result.notes) for result in results])
    were = "was" if skipped == 1 else "were"
    say(f"{cache}: {pluralise(done, 'case')} built, {skipped} {were} up to date, {failed} failed")
    # Not the details: a traceback is for --debug.
    cases = [{key: getattr(r, key) for key in ("case_id", "outcome", "message", "notes")} for r in results]
    return Outcome(result={"cache": cache, "cases": cases, "misnamed": misnamed}, complete=not failed)


def _check_backend(backend: str, scheduler: str | None, *, jobs: int | None, timeout_s: float | None) -> None:
    if (backend == "dask") != (scheduler is not None):
        raise click.UsageError("--backend dask and --scheduler ADDRESS must be used together")
    if backend == "dask" and (jobs is not None or timeout_s is not None):
        raise click.UsageError(
            "--jobs and --timeout apply to local workers only: leave them out with --backend dask"
        )


def _report_case(result: CaseResult) -> None:
    from liverseg.console import complain, errors

    if result.outcome == "failed":
        complain(f"{result.case_id}: {result.message}")
        if result.details and click.get_current_context().find_root().params["debug"]:
            errors.print(result.details, markup=False)
    warn_of_scan(result.case_id, result.notes)


def _heartbeat(bar: Progress, task: TaskID) -> Callable[[Sequence[RunningTask]], None]:
    """Show the running cases next to the bar, or in a line now and then where the output is not a terminal."""
    from liverseg.console import console, say

    spoken = time.monotonic()

    def watch(running: Sequence[RunningTask]) -> None:
        nonlocal spoken
        note = ", ".join(f"{case.item.case_id} {case.seconds:.0f} s" for case in running)
        bar.update(task, note=note)
        if not console.is_terminal and time.monotonic() - spoken >= HEARTBEAT_S:
            spoken = time.monotonic()
            progress = bar.tasks[task]
            say(f"{progress.completed:.0f} of {pluralise(int(progress.total or 0), 'case')}; running: {note}")

    return watch


# ---- verify


@click.command()
@click.argument("cache", type=FOLDER)
@click.option(
    "--raw",
    type=FOLDER,
    help="Also compare the SHA-256 of this data set's files, and expect its cases in CACHE.",
)
def verify(cache: Path, raw: Path | None) -> Outcome:
    """Check every byte of the store CACHE against its checksums and list what is damaged.

    Voxels have a CRC, metadata a checksum. A damaged case is marked in its folder and stays readable as far as it
    can be read; preprocess then rebuilds the marked cases only. The exit code is 1 if anything is damaged.

    \b
    Example: liverseg verify data/liver.zarr --raw data/Task03_Liver
    """
    from data_cache.inspection import set_root_aside, verify_root
    from data_cache.reader import read_schema
    from data_cache.schema import CacheSchema, PreprocessSpec
    from liverseg.console import console, say, table
    from pipeline.decathlon import read_data_set

    expected = () if raw is None else [case.case_id for case in read_data_set(raw).cases]
    root_faults = verify_root(cache)
    if root_faults:
        set_root_aside(cache)
    # A new root is of the spec that preprocess builds with.
    schema = CacheSchema.of(PreprocessSpec()) if root_faults else read_schema(cache)
    verdicts = _verify_cases(cache, schema, raw=raw, expected=expected)
    bad = {case_id: faults for case_id, faults in verdicts.items() if faults}
    rows = [("its zarr.json", what) for what in root_faults]
    rows += [(case_id, what) for case_id, faults in bad.items() for what in faults]
    if rows:
        console.print(table(f"{cache}: damage", ("case", "what"), rows))
    say(
        f"{cache}: {pluralise(len(verdicts), 'case')} verified, {len(bad)} bad{' and the store itself' * bool(root_faults)}"
    )
    if rows:
        say(f"liverseg preprocess {'RAW' if raw is None else raw} {cache} rebuilds what is damaged")
    result = {"cache": cache, "cases": len(verdicts), "damaged": bad, "store_faults": root_faults}
    return Outcome(result=result, complete=not rows)


def _verify_cases(
    cache: Path, schema: CacheSchema, *, raw: Path | None, expected: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """The faults of each case; those of an existing case are also recorded in its folder."""
    from data_cache.inspection import cases_to_verify, verify_case
    from data_cache.reader import mark_for_rebuild
    from liverseg.console import progress_bar

    case_ids, verdicts = cases_to_verify(cache, expected=expected), {}
    with progress_bar() as bar:
        task = bar.add_task("verify", total=len(case_ids), note="")
        for case_id in case_ids:
            bar.update(task, note=case_id)
            try:
                faults = verify_case(cache, case_id, schema=schema, raw=raw)
            except Exception as failure:  # of whatever kind: the other cases are still to be verified
                faults = (in_words(failure, "verify"),)
            if faults and (cache / case_id).exists():
                mark_for_rebuild(cache, case_id, faults)
            verdicts[case_id] = faults
            bar.update(task, advance=1)
    return verdicts


COMMANDS = (preprocess, verify)
