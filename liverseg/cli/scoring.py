"""Commands that score: runs, folds, two runs against each other, label files of any tool, and the report."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from data_cache.errors import LiversegError
from data_cache.text import pluralise
from liverseg.cli.common import DRAWN, FILE, FOLDER

if TYPE_CHECKING:
    from liverseg.evaluation.case import CaseEvaluation
    from liverseg.measure.summary import LabelScores

SIZES = {"below_10_mm": "< 10 mm", "from_10_to_20_mm": "10–20 mm", "above_20_mm": "> 20 mm", "overall": "all"}
CROPS = {"dice_with_label_crop": "label's crop", "dice_grid_ceiling": "grid's ceiling"}


@click.command()
@click.argument("runs", type=FOLDER, nargs=-1, metavar="RUNS...")
@click.argument("cache", type=FOLDER)
@click.option("--raw", required=True, type=FOLDER, help="The data set that CACHE was built from.")
@click.option(
    "--out",
    type=FOLDER,
    help="Default: RUN/evaluation, or RUN/ensemble. Of several runs: of their common table or comparison.",
)
@click.option(
    "--case", "cases", multiple=True, help="Score this case; repeatable. Default: all never trained on."
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, …")
@click.option("--with", "others", multiple=True, type=FOLDER, help="Average RUN with this run; repeatable.")
@click.option(
    "--samples",
    default=0,
    type=click.IntRange(min=0),
    metavar="N",
    help="Draw N segmentations a case, and measure what their uncertainty is worth.",
)
@click.option(
    "--calibrate",
    type=FOLDER,
    metavar="CACHE",
    help="Fit a temperature and interval widths on the cases of this store that are neither trained on nor scored.",
)
def evaluate(
    runs: tuple[Path, ...],
    cache: Path,
    *,
    raw: Path,
    out: Path | None,
    cases: tuple[str, ...],
    device: str,
    others: tuple[Path, ...],
    samples: int,
    calibrate: Path | None,
) -> None:
    """Score RUNS in native space on the cases of CACHE that they were never trained on.

    Writes scores.csv, summary.json, one overlay picture a case, and what `liverseg report` shows. Each case is
    scored as a user gets it (predicted crop), with the label's crop, and for what the grid itself allows.

    Several runs are scored one after another, each into its own folder. If they share no case they are folds,
    and are pooled into one table; two runs that do share cases are compared, case by case.

    With --samples: calibration error and reliability diagram, how well entropy finds wrong voxels and doubtful cases bad ones,
    whether volume intervals hold the truth, how the samples differ; in uncertainty.json, .csv and pictures.

    \b
    Example: liverseg evaluate runs/liver data/liver.zarr --raw data/Task03_Liver
             liverseg evaluate runs/ssn data/test.zarr --raw data/test --samples 16 --calibrate data/liver.zarr
             liverseg evaluate runs/a data/test.zarr --raw data/test --with runs/b --with runs/c --samples 3
             liverseg evaluate runs/fold0 runs/fold1 data/liver.zarr --raw data/Task03_Liver --out runs/folds
    """
    if not runs:
        _complain_of_one_path(cache)
    if len(runs) > 1 and others:
        raise click.UsageError("--with makes an ensemble of one RUN and others: name one RUN")
    if calibrate is not None and not samples:
        raise click.UsageError("--calibrate is of what --samples measures: add --samples 16")
    complete = True
    scored: dict[str, dict[str, LabelScores]] = {}
    for run in runs:
        target = out if out is not None and len(runs) == 1 else run / ("ensemble" if others else "evaluation")
        settings = _Settings(others=others, cases=cases, device=device, samples=samples, calibrate=calibrate)
        results, asked = _evaluate_run(run, cache, raw=raw, out=target, settings=settings)
        complete &= len(results) == asked
        scored[str(run)] = {e.case_id: e.predicted for e in results}
    if len(runs) > 1:
        _print_together(scored, out)
    if not complete:
        sys.exit(1)


def _complain_of_one_path(path: Path) -> NoReturn:
    """A single path goes to CACHE, the last one, and click would miss RUNS: but it may well be the run."""
    from data_cache.reader import METADATA

    if (path / METADATA).exists():
        raise click.UsageError(
            f"Missing argument 'RUNS...': {path} is a cache: name the run to score before it"
        )
    raise click.UsageError(f"Missing argument 'CACHE': after {path}, name the store that it was trained on")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """What ``evaluate`` does the same with each run."""

    others: tuple[Path, ...]
    cases: tuple[str, ...]
    device: str
    samples: int
    calibrate: Path | None


def _evaluate_run(
    run: Path, cache: Path, *, raw: Path, out: Path, settings: _Settings
) -> tuple[list[CaseEvaluation], int]:
    """What was scored, and how many cases should have been."""
    from data_cache.reader import CacheStore
    from liverseg.console import complain, progress_bar, say, warn
    from liverseg.evaluation.calibrate import calibrate_apart
    from liverseg.evaluation.evaluate import choose_cases
    from liverseg.evaluation.evaluate import evaluate as score
    from liverseg.evaluation.uncertainty_summary import summarise_uncertainties
    from liverseg.inference.segment import load_predictor
    from liverseg.training.split import load_split, together

    runs, store = (run, *settings.others), CacheStore.open(cache)
    predictor = load_predictor(*runs, device=settings.device, samples=settings.samples)
    split = together([load_split(each) for each in runs])
    case_ids, unseen = choose_cases(store, split, settings.cases)
    if not unseen:
        warn("some of these cases were trained on: their scores say how well they were learnt, no more")
    if predictor.n_drawn != settings.samples:
        warn(DRAWN.format(predictor.n_drawn, settings.samples))
    calibration = None
    if settings.calibrate is not None:
        calibration = calibrate_apart(
            predictor,
            CacheStore.open(settings.calibrate),
            split,
            scored={store.meta(case_id).image.sha256 for case_id in case_ids},
        )
    with progress_bar() as bar:
        task = bar.add_task("evaluate", total=len(case_ids), note="")

        def report(case_id: str, result: CaseEvaluation | LiversegError) -> None:
            bar.update(task, advance=1, note=case_id)
            if isinstance(result, LiversegError):
                complain(f"{case_id}: {result}")

        scored = score(
            predictor,
            store,
            split,
            case_ids=case_ids,
            raw=raw,
            out=out,
            report=report,
            calibration=calibration,
        )
    if not scored:
        warn(f"no case could be scored: nothing was written to {out}, what lies there is older")
        return scored, len(case_ids)
    _print_evaluation(scored, kind="never trained on" if unseen else "TRAINED ON")
    trusts = [e.uncertainty for e in scored if e.uncertainty is not None]
    if trusts:
        _print_uncertainty(summarise_uncertainties(trusts, calibration))
        say(
            f"wrote uncertainty.json, uncertainty.csv, reliability.png, risk_coverage.png and pictures to {out}"
        )
    say(f"wrote scores.csv, summary.json and {pluralise(len(scored), 'overlay')} to {out}")
    say(f"look at them: liverseg report {run}" + ("" if out == run / "evaluation" else f" --scores {out}"))
    return scored, len(case_ids)


def _print_evaluation(scored: list[CaseEvaluation], *, kind: str) -> None:
    from liverseg.evaluation.evaluate import summarise

    if scored:
        _print_cases(f"native space, predicted crop, cases {kind}", {e.case_id: e.predicted for e in scored})
        _print_summary(summarise(scored))


def _print_together(scored: Mapping[str, Mapping[str, LabelScores]], out: Path | None) -> None:
    from liverseg.console import say, warn
    from liverseg.evaluation.compare import (
        paired_differences,
        shared_cases,
        write_comparison,
        write_folds,
    )
    from liverseg.measure.summary import summarise_scores

    shared = shared_cases(list(scored.values()))
    if not shared:
        everything = [scores for cases in scored.values() for scores in cases.values()]
        say(
            f"\n{pluralise(len(scored), 'fold')}, {pluralise(len(everything), 'case')}, each scored by a run that never saw it"
        )
        _print_summary(summarise_scores(everything) if out is None else write_folds(out, scored))
    elif len(scored) == 2:
        first, second = scored
        differences = paired_differences(scored[first], scored[second])
        _print_differences(f"{second} minus {first}, {pluralise(len(shared), 'shared case')}", differences)
        if out is not None:
            write_comparison(out, (first, second), differences)
    else:
        warn(
            f"{pluralise(len(shared), 'case')} scored by several runs: no folds; compare the runs two by two"
        )
        return
    if out is not None:
        say(f"wrote to {out}")


@click.command()
@click.argument("predicted", type=click.Path(path_type=Path))
@click.argument("truth", type=click.Path(path_type=Path))
@click.option("--out", type=FOLDER, help="Write scores.csv and summary.json into this folder.")
def score(predicted: Path, truth: Path, out: Path | None) -> None:
    """Score label files PREDICTED by any tool against TRUTH: two folders, matched by name, or two files.

    Labels are 0, 1 (liver) and 2 (tumour). The two files of a pair may differ in orientation, not in grid.
    A file without its counterpart is named, and makes the exit code 1 as a file that fails does.

    \b
    Example: liverseg score segmentations data/Task03_Liver/labelsTr --out scores
    """
    from liverseg.console import complain, progress_bar, say, warn
    from liverseg.evaluation.label_files import pair_labels, score_pairs, write_scores
    from liverseg.measure.summary import summarise_scores

    pairs, alone = pair_labels(predicted, truth)
    for line in alone:
        warn(line)
    with progress_bar() as bar:
        task = bar.add_task("score", total=len(pairs), note="")

        def report(name: str, result: LabelScores | LiversegError) -> None:
            bar.update(task, advance=1, note=name)
            if isinstance(result, LiversegError):
                complain(f"{name}: {result}")

        scored = score_pairs(pairs, report=report)
    if scored:
        _print_cases("native space", scored)
        _print_summary(summarise_scores(list(scored.values())) if out is None else write_scores(out, scored))
        if out is not None:
            say(f"wrote scores.csv and summary.json to {out}")
    if alone or len(scored) < len(pairs):
        sys.exit(1)


@click.command()
@click.argument("run", type=FOLDER)
@click.option("--scores", type=FOLDER, help="What evaluate wrote. Default: RUN/evaluation.")
@click.option("--out", type=FILE, help="Default: report.html beside the scores.")
def report(run: Path, scores: Path | None, out: Path | None) -> None:
    """Write one HTML page of RUN: scores, training curves, and a slice viewer of every scored case, worst first.

    The page needs no server and no network, and opens from a file.

    \b
    Example: liverseg report runs/liver
    """
    from liverseg.console import say
    from liverseg.evaluation.report import write_report

    folder = scores or run / "evaluation"
    path = write_report(run, folder, out or folder / "report.html")
    say(f"wrote {path} ({path.stat().st_size / 2**20:.1f} MiB)")


# ---- tables


def _print_cases(title: str, cases: Mapping[str, LabelScores]) -> None:
    from liverseg.console import console, table

    headers = (
        "case",
        "liver Dice",
        "HD95 mm",
        "mL",
        "of mL",
        "tumour Dice",
        "HD95 mm",
        "mL",
        "of mL",
        "found",
    )
    console.print(table(title, headers, (_case_row(name, scores) for name, scores in cases.items())))


def _case_row(name: str, scores: LabelScores) -> tuple[str, ...]:
    from liverseg.console import number

    row = [name]
    for of in (scores.liver, scores.tumour):
        row += [number(of.dice), number(of.hd95_mm, 1)]
        row += [number(of.volume_pred_ml, 1), number(of.volume_truth_ml, 1)]
    counts = scores.lesions[0].overall
    real = counts.true_positives + counts.false_negatives
    invented = f" +{counts.false_positives}" if counts.false_positives else ""
    return (*row, f"{counts.true_positives}/{real}{invented}")


def _print_summary(summary: Mapping[str, Any]) -> None:
    from liverseg.console import console, number, say, table

    metrics = {"dice": ("Dice", 3), "voe_percent": ("VOE %", 1), "rvd_percent": ("RVD %", 1)}
    metrics |= {
        "assd_mm": ("ASSD mm", 2),
        "hd_mm": ("HD mm", 1),
        "hd95_mm": ("HD95 mm", 1),
        "nsd": ("NSD", 3),
    }
    metrics |= {key: (f"Dice, {name}", 3) for key, name in CROPS.items() if key in summary["liver"]}
    rows = [
        (name, *(_interval(summary[of][key], digits) for of in ("liver", "tumour")))
        for key, (name, digits) in metrics.items()
    ]
    rows.append(("global Dice", *(number(summary[of]["global_dice"]) for of in ("liver", "tumour"))))
    cases = {of: summary[of]["n_cases_with_it"] for of in ("liver", "tumour")}
    headers = (
        "mean [95 %]",
        f"liver, {pluralise(cases['liver'], 'case')}",
        f"tumour, {pluralise(cases['tumour'], 'case')}",
    )
    console.print(table("summary (cases that have it)", headers, rows))
    _print_lesions(summary["lesions"])
    burden = summary["burden"]
    say(f"tumour burden: RMSE {number(burden['rmse'], 4)}, largest error {number(burden['max_error'], 4)}")
    say(f"NSD at {summary['nsd_tolerance_mm']:g} mm; rule: {summary['rule']}")


def _interval(mean: Mapping[str, float | None], digits: int) -> str:
    from liverseg.console import number

    if mean["mean"] is None:
        return "–"
    text = (
        f"{number(mean['mean'], digits)} [{number(mean['low95'], digits)}, {number(mean['high95'], digits)}]"
    )
    return f"{text}, {mean['n_undefined']} undefined" if mean["n_undefined"] else text


def _print_lesions(thresholds: Sequence[Mapping[str, Any]]) -> None:
    from liverseg.console import console, number, table

    rows = []
    for at in thresholds:
        for key, size in SIZES.items():
            c = at[key]
            counts = (c["true_positives"] + c["false_negatives"], c["true_positives"], c["false_positives"])
            ratios = (number(c[ratio], 2) for ratio in ("precision", "recall", "f1"))
            rows.append((f"IoU > {at['iou_threshold']:g}, {size}", *map(str, counts), *ratios))
    headers = ("lesions of all cases", "true", "found", "invented", "precision", "recall", "F1")
    console.print(table("detection", headers, rows))


def _print_uncertainty(summary: Mapping[str, Any]) -> None:
    from liverseg.console import console, number, say, table

    after, fitted = summary["calibration_tempered"], summary["fitted"]
    rows = []
    for name in ("liver", "tumour"):
        counts, covered = summary["calibration"][name], summary["volume_intervals"][name]
        tempered = "–" if after is None else number(after[name]["ece"], 4)
        rows.append((name, number(counts["ece"], 4), tempered, *map(_covered, covered.values())))
    headers = ("class", "ECE", "tempered", "volume in interval", "widened")
    title = (
        f"uncertainty, {pluralise(summary['n_cases'], 'case')}, within {summary['near_mm']:g} mm of the liver"
    )
    console.print(table(title, headers, rows))
    errors, rank = summary["errors"], summary["spearman"]
    say(
        f"entropy finds wrong voxels: AUROC {number(errors['auroc'])}, average precision {number(errors['auprc'])} "
        f"of {number(errors['rate'], 4)} by chance"
    )
    say(
        f"doubtful cases are the bad ones: AURC {number(summary['aurc'], 4)} (excess {number(summary['excess_aurc'], 4)}), "
        f"Spearman with Dice {number(rank['rho'], 2)} (p {number(rank['p_value'])})"
    )
    say(
        f"samples: energy distance² {number(summary['ged_iou']['mean'])}, diversity {number(summary['diversity']['mean'])}"
    )
    if fitted is not None and fitted["temperature"] is not None:
        short = [name for name, factor in fitted["widening_sd"].items() if factor is None]
        few = (
            f"; too few of them to widen intervals of {' and '.join(short)}: nine that have it"
            if short
            else ""
        )
        n_other = pluralise(len(fitted["case_ids"]), "other case")
        say(f"temperature {fitted['temperature']['temperature']:.2f}, fitted on {n_other}{few}")


def _covered(coverage: Mapping[str, Any] | None) -> str:
    if coverage is None or not coverage["n_cases"]:
        return "–"
    return f"{coverage['n_covered']} of {coverage['n_cases']}"


def _print_differences(title: str, differences: Sequence[Any]) -> None:
    from liverseg.console import console, number, table

    rows = [
        (
            d.metric,
            str(d.n_cases),
            "–" if d.mean is None else f"{d.mean:+.3f} [{d.low95:+.3f}, {d.high95:+.3f}]",
            f"{d.rose} / {d.fell}",
            number(d.wilcoxon_p),
        )
        for d in differences
    ]
    headers = ("metric", "cases", "mean difference [95 %]", "higher / lower", "Wilcoxon p")
    console.print(table(title, headers, rows))


COMMANDS = (evaluate, score, report)
