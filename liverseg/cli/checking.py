"""Commands that fetch and examine data: download, check, fidelity, fingerprint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_cache.errors import DataSetError
from data_cache.text import pluralise, visible
from liverseg.cli.common import FILE, FOLDER, report_damaged
from liverseg.cli.outcome import Outcome

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from data_cache.schema import CaseMeta
    from pipeline.check import ScanCheck
    from pipeline.decathlon import CaseFiles
    from pipeline.fidelity import CaseFidelity
    from pipeline.fingerprint import CaseFingerprint
    from pipeline.listing import Finding
    from pipeline.workers import Failure

JOBS = click.option(
    "--jobs",
    default=None,
    type=click.IntRange(min=1),
    help="Number of processes. Default: the physical cores.",
)


# ---- download


@click.command()
@click.argument("raw", type=FOLDER)
@click.option("--url", help="URL of the tar file. Default: the public Decathlon bucket that MONAI uses.")
@click.option("--md5", help="MD5 checksum of that file. Default: that of Task03_Liver.tar.")
@click.option(
    "--keep-archive",
    is_flag=True,
    help="Keep the downloaded tar file next to RAW; one that lay there before always stays.",
)
def download(raw: Path, url: str | None, md5: str | None, keep_archive: bool) -> Outcome:
    """Download the liver data of the Medical Segmentation Decathlon (27 GB) and unpack it to RAW.

    Twice that disk space is needed until the archive is deleted. If the download is interrupted, run the same command
    again to resume. The archive's checksum is verified, and nothing in it can be written outside RAW.

    \b
    Example: liverseg download data/Task03_Liver
    """
    from liverseg.console import say, warn
    from pipeline.download import MD5, URL
    from pipeline.download import download as fetch

    with _transfer_bar() as bar:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        data_set = fetch(
            raw,
            url=URL if url is None else url,
            md5=MD5 if md5 is None else md5,
            keep_archive=keep_archive,
            progress=progress,
            notify=warn,
        )
    labelled, unlabelled = (
        pluralise(len(cases), f"{kind} case")
        for kind, cases in (("labelled", data_set.cases), ("unlabelled", data_set.tests))
    )
    was_there = "" if tasks else ", already complete"
    say(f"{raw}: {labelled} and {unlabelled}{was_there}")
    numbers = {"labelled": len(data_set.cases), "unlabelled": len(data_set.tests)}
    return Outcome(result={"raw": raw, **numbers, "was_complete": not tasks})


def _transfer_bar() -> RichProgress:
    """A bar with bytes, rate and remaining time; invisible where the output is not a terminal."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from liverseg.console import progress_bar

    return progress_bar(
        TextColumn("{task.description:8}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )


# ---- check


@click.command()
@click.argument("raw", type=FOLDER)
@JOBS
def check(raw: Path, jobs: int | None) -> Outcome:
    """Read every file of the data set RAW once and list everything that is wrong with it.

    A fault would stop preprocess or make it cache something wrong; the exit code is then 1. A warning is worth a
    look.

    \b
    Example: liverseg check data/Task03_Liver --jobs 8
    """
    from liverseg.console import console, progress_bar, say
    from pipeline.build import physical_cores
    from pipeline.check import check_data_set, has_faults

    checked: list[ScanCheck] = []
    with progress_bar() as bar:
        task = bar.add_task("check", total=None, note="")

        def report(result: ScanCheck, total: int) -> None:
            checked.append(result)
            bar.update(task, advance=1, total=total, note=visible(result.scan.name))

        findings = check_data_set(raw, jobs=jobs or physical_cores(), report=report)
    if findings:
        console.print(_findings_table(raw, findings))
    faults = sum(finding.severity == "fault" for finding in findings)
    warnings = len(findings) - faults
    say(
        f"{raw}: {pluralise(len(checked), 'scan')} read, {pluralise(faults, 'fault')}, "
        f"{pluralise(warnings, 'warning')}"
    )
    result = {"raw": raw, "scans": len(checked), "findings": findings}
    return Outcome(result=result, complete=not has_faults(findings))


def merge_units(findings: Sequence[Finding]) -> list[Finding]:
    """The findings with one in place of all that say that a scan states no unit; one of a single scan stays."""
    from pipeline.nifti import NO_UNIT

    alike = [finding for finding in findings if finding.what == NO_UNIT]
    if len(alike) < 2:
        return list(findings)
    one = replace(alike[0], case=pluralise(len(alike), "scan"))
    return [one, *(finding for finding in findings if finding.what != NO_UNIT)]


def _findings_table(raw: Path, findings: list[Finding]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    styles = {"fault": "bold red", "warning": "yellow"}
    result = Table(title=escape(visible(str(raw))), title_justify="left", show_lines=True)
    for header in ("case", "severity", "what", "what to do"):
        result.add_column(header, overflow="fold")
    for finding in merge_units(findings):
        severity = f"[{styles[finding.severity]}]{finding.severity}[/]"
        case, what, remedy = (escape(visible(t)) for t in (finding.case, finding.what, finding.remedy))
        result.add_row(case, severity, what, remedy)
    return result


# ---- fidelity


@click.command()
@click.argument("raw", type=FOLDER)
@click.argument("cache", type=FOLDER)
@click.option("--json", "json_path", type=FILE, help="Write the numbers to a JSON file.")
@JOBS
def fidelity(raw: Path, cache: Path, json_path: Path | None, jobs: int | None) -> Outcome:
    """Show the best Dice that the grid of CACHE allows: RAW's labels, cached and restored.

    Liver means label 1 or 2. The usual way, label ids sampled at the nearest voxel, is shown next to the cached
    fractions; a second table compares the lesions by size with what is restored of each. A case that fails is
    reported, does not stop the others, and makes the exit code 1.

    \b
    Example: liverseg fidelity data/Task03_Liver data/liver.zarr --json fidelity.json
    """
    from data_cache.outputs import json_mark, require_replaceable, write_signed_json
    from data_cache.reader import CacheStore
    from liverseg.console import complain, console, progress_bar, say
    from pipeline.build import physical_cores
    from pipeline.fidelity import measure, to_json
    from pipeline.workers import Failure

    if not raw.is_dir():
        raise DataSetError(f"{raw}: no such folder: expected the data set that {cache} was built from")
    if json_path:
        require_replaceable(json_path, json_mark("fidelity"), command="fidelity")
    store = CacheStore.open(cache, skip_damaged=True)
    failed = report_damaged(store)
    with progress_bar() as bar:
        task = bar.add_task("fidelity", total=len(store.case_ids), note="")

        def report(result: CaseFidelity | Failure[CaseMeta]) -> None:
            case_id = result.item.case_id if isinstance(result, Failure) else result.case
            bar.update(task, advance=1, note=case_id)
            if isinstance(result, Failure):
                failed[case_id] = result.reason
                complain(f"{case_id}: {result.reason}")

        results = measure(raw, store, jobs=jobs or physical_cores(), report=report)
    if results:
        console.print(_fidelity_table(cache, results))
        console.print(_size_table(results))
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        write_signed_json(json_path, to_json(results), command="fidelity")
        say(f"wrote {json_path}")
    return Outcome(result={**to_json(results), "failed": failed}, complete=not failed)


def _fidelity_table(cache: Path, results: list[CaseFidelity]) -> Any:
    from liverseg.console import number, table
    from pipeline.lesion_fidelity import mean

    fields = ("liver", "nearest_liver", "tumour", "nearest_tumour")
    columns = [[getattr(result, field) for result in results] for field in fields]
    rows = [
        (result.case, *(number(value, 4) for value in values))
        for result, *values in zip(results, *columns, strict=True)
    ]
    means = ("mean", *(number(mean(column), 4) for column in columns))
    title = f"{cache}: Dice of the cached and restored label at native resolution"
    return table(title, ("case", "liver", "nearest ids", "tumour", "nearest ids"), [*rows, means])


def _size_table(results: list[CaseFidelity]) -> Any:
    from liverseg.console import number, table
    from pipeline.lesion_fidelity import by_diameter

    rows = [
        (
            size.diameter_mm,
            str(size.lesions),
            str(size.found),
            number(size.dice, 4),
            number(size.volume_ratio, 3),
        )
        for size in by_diameter([lesion for result in results for lesion in result.lesions])
    ]
    headers = ("diameter mm", "lesions", "that come back", "mean Dice", "volume, share of the true one")
    return table("The same by lesion: what the grid allows at each size", headers, rows)


# ---- fingerprint


@click.command()
@click.argument("data", metavar="CACHE|RAW", type=FOLDER)
@click.option("--json", "json_path", type=FILE, help="Write the numbers to a JSON file.")
@click.option("--png", type=FILE, help="Write plots to a PNG file.")
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Seed of the draw of 20 images that augmentation levels are measured on.",
)
@JOBS
def fingerprint(data: Path, json_path: Path | None, png: Path | None, seed: int, jobs: int | None) -> Outcome:
    """Measure a data set: classes, intensities, grids, tumours and augmentation levels.

    Intensities are those of the cached (box-averaged) voxels around the liver, weighted by class fractions. A RAW data
    set is prepared in memory, case by case, and gives the same numbers as its cache.

    \b
    Example: liverseg fingerprint data/liver.zarr --json fingerprint.json --png fingerprint.png
    """
    from data_cache.outputs import json_mark, png_mark, require_replaceable, write_signed_json
    from liverseg.console import console, say
    from pipeline.fingerprint import fingerprint as summarise

    for path, mark in ((json_path, json_mark("fingerprint")), (png, png_mark("fingerprint"))):
        if path:
            require_replaceable(path, mark, command="fingerprint")
    cases, failed = _measured(data, jobs)
    if not cases:
        raise DataSetError(f"{data}: no case could be measured")
    content = summarise(cases, seed=seed)
    for part in _fingerprint_tables(data, content):
        console.print(part)
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        write_signed_json(json_path, content, command="fingerprint")
        say(f"wrote {json_path}")
    if png:
        from liverseg.pictures.fingerprint_figure import fingerprint_figure
        from liverseg.pictures.sheet import save

        png.parent.mkdir(parents=True, exist_ok=True)
        figure = fingerprint_figure(cases, content, name=data.name)
        say(f"wrote {save(figure, png, command='fingerprint')}")
    return Outcome(result={**content, "failed": failed}, complete=not failed)


def _measured(data: Path, jobs: int | None) -> tuple[list[CaseFingerprint], list[str]]:
    """The cases of a store or a raw data set, and the names of those that failed."""
    from data_cache.reader import METADATA, CacheStore
    from data_cache.schema import PreprocessSpec
    from liverseg.console import complain, progress_bar
    from pipeline.build import physical_cores
    from pipeline.decathlon import NO_CASE_ID, RENAME, read_data_set
    from pipeline.fingerprint import fingerprint_cache, fingerprint_raw

    with progress_bar() as bar:
        task = bar.add_task("fingerprint", total=None, note="")
        if (data / METADATA).exists():
            store = CacheStore.open(data, skip_damaged=True)
            bar.update(task, total=len(store.case_ids))
            report, failed = _fingerprint_report(bar, task)
            failed += report_damaged(store)
            cases = fingerprint_cache(store, report=report)
        else:
            data_set = read_data_set(data)
            bar.update(task, total=len(data_set.cases))
            report, failed = _fingerprint_report(bar, task)
            for misnamed in data_set.misnamed:
                failed.append(misnamed.case_id)
                complain(f"{misnamed.image}: {NO_CASE_ID}: {RENAME}")
            cases = fingerprint_raw(data_set, PreprocessSpec(), jobs=jobs or physical_cores(), report=report)
    return cases, failed


def _fingerprint_report(
    bar: RichProgress, task: Any
) -> tuple[Callable[[CaseFingerprint | Failure[CaseMeta] | Failure[CaseFiles]], None], list[str]]:
    from liverseg.console import complain
    from pipeline.workers import Failure

    failed: list[str] = []

    def report(result: CaseFingerprint | Failure[CaseMeta] | Failure[CaseFiles]) -> None:
        case_id = result.item.case_id if isinstance(result, Failure) else result.case_id
        bar.update(task, advance=1, note=case_id)
        if isinstance(result, Failure):
            failed.append(case_id)
            complain(f"{case_id}: {result.reason}")

    return report, failed


def _fingerprint_tables(data: Path, content: dict[str, Any]) -> list[Any]:
    return [_intensity_table(data, content), _spread_table(content), _levels_table(content)]


def _intensity_table(data: Path, content: dict[str, Any]) -> Any:
    from liverseg.console import number, table

    percentiles = ("0.5", "5", "25", "50", "75", "95", "99.5")
    rows = []
    for name, hu in content["hu"].items():
        at = hu["percentiles"] or {}
        values = (number(at.get(p), 0) for p in percentiles)
        rows.append((name, number(hu["mean"], 1), number(hu["sd"], 1), *values))
    title = (
        f"{data}: {pluralise(content['n_cases'], 'case')}; HU of cached voxels, weighted by class fractions"
    )
    return table(title, ("class", "mean", "SD", *(f"{p} %" for p in percentiles)), rows)


def _spread_table(content: dict[str, Any]) -> Any:
    from liverseg.console import number, table

    keys = ("min", "q25", "median", "q75", "max", "mean")
    measured = {
        "slices": content["shape"]["z"],
        "slice spacing mm": content["spacing_mm"]["z"],
        "pixel spacing mm": content["spacing_mm"]["x"],
        "liver with tumour mL": content["volume_ml"]["liver_with_tumour"],
        "tumour mL, in cases with tumour": content["volume_ml"]["tumour"],
        "tumours per case": content["tumours"]["per_case"],
        "tumour diameter mm": content["tumours"]["diameter_mm"],
    }
    rows = [(name, *(number((values or {}).get(k), 2) for k in keys)) for name, values in measured.items()]
    return table("grids, volumes, tumours", ("", *keys), rows)


def _levels_table(content: dict[str, Any]) -> Any:
    from liverseg.console import number, table

    levels, ratios = content["augmentation"], content["voxel_ratio"]
    written = {
        name: "–" if ratio is None else " : ".join(f"{part:.4g}" for part in ratio)
        for name, ratio in ratios.items()
    }
    n, plain = len(levels["images"]), levels["without_padding"]
    rows = [
        ("background : liver : tumour, native voxels", written["native"]),
        ("background : liver : tumour, cached voxels", written["view"]),
        (f"brightness level, {pluralise(n, 'image')}, in 200 HU", number(levels["brightness"])),
        (f"contrast level, {pluralise(n, 'image')}", number(levels["contrast"])),
        (
            "  with padding below -1024 HU as air",
            f"{number(plain['brightness'])}, {number(plain['contrast'])}",
        ),
    ]
    return table("classes and augmentation", ("", ""), rows)


COMMANDS = (download, check, fidelity, fingerprint)
