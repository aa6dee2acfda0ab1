"""Commands that score: a run, several runs, label files of any tool, and the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from data_cache.text import pluralise
from liverseg.cli.common import DRAWN, FILE, FOLDER, report_damaged
from liverseg.cli.failures import in_words
from liverseg.cli.notes import warn_of_scan, warn_of_units
from liverseg.cli.outcome import Outcome
from liverseg.cli.score_tables import print_cases, print_differences, print_summary, print_uncertainty

if TYPE_CHECKING:
    from data_cache.reader import CacheStore
    from liverseg.evaluation.case import CaseEvaluation
    from liverseg.inference.calibration import Calibration
    from liverseg.inference.segment import Predictor
    from liverseg.inference.uncertainty_files import UncertaintySummary
    from liverseg.measure.summary import LabelScores
    from liverseg.training.split import Split

Command = TypeVar("Command", bound=Callable[..., Any])

RAW = click.option("--raw", required=True, type=FOLDER, help="The data set that CACHE was built from.")
CASES = click.option(
    "--case", "cases", multiple=True, help="Score this case; repeatable. Default: all never trained on."
)
DEVICE = click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, …")


def _needs_cache_first(command: Command) -> Command:
    """The arguments CACHE and RUN..., checked for the order that earlier versions took."""
    runs = click.argument("runs", type=FOLDER, nargs=-1, required=True, metavar="RUN...")
    return click.argument("cache", type=FOLDER)(runs(command))


def _check_order(command: str, cache: Path, runs: tuple[Path, ...], *, n_runs: range) -> None:
    """Raise UsageError unless the cache comes first and as many runs follow as ``command`` takes."""
    from data_cache.reader import METADATA

    if not (cache / METADATA).exists() and (runs[-1] / METADATA).exists():
        line = " ".join(map(str, (runs[-1], cache, *runs[:-1])))
        raise click.UsageError(f"CACHE comes before RUN: liverseg {command} {line}")
    if len(runs) not in n_runs:
        raise click.UsageError(
            f"{command} takes {WANTED[command]}, got {len(runs)}; evaluate scores one run, compare compares two, "
            "pool pools the folds of a cross-validation"
        )


WANTED = {"evaluate": "one RUN", "compare": "two RUNs", "pool": "two or more RUNs"}


@click.command()
@_needs_cache_first
@RAW
@click.option("--out", type=FOLDER, help="Default: RUN/evaluation, or RUN/ensemble with --with.")
@CASES
@DEVICE
@click.option("--with", "others", multiple=True, type=FOLDER, help="Average RUN with this run; repeatable.")
@click.option(
    "--samples",
    default=0,
    type=click.IntRange(min=0),
    metavar="N",
    help="Draw N segmentations per case, and compare their uncertainty with the errors.",
)
@click.option(
    "--calibrate",
    type=(FOLDER, FOLDER),
    metavar="CACHE RAW",
    help="Fit a temperature and interval widths on the cases of this store that are neither trained on nor scored, "
    "and write calibration.json for predict.",
)
@click.option(
    "--shifted",
    type=(FOLDER, FOLDER),
    metavar="CACHE RAW",
    help="Also segment the scans of this store, which differ from the training data, and report how well the uncertainty tells them (AUROC).",
)
def evaluate(
    cache: Path,
    runs: tuple[Path, ...],
    *,
    raw: Path,
    out: Path | None,
    cases: tuple[str, ...],
    device: str,
    others: tuple[Path, ...],
    samples: int,
    calibrate: tuple[Path, Path] | None,
    shifted: tuple[Path, Path] | None,
) -> Outcome:
    """Score RUN in native space on the cases of CACHE that it was never trained on.

    Writes scores.csv, summary.json, one overlay picture per case, and what `liverseg report` shows. Each case is
    scored as a user gets it (predicted crop), with the label's crop, and for what the grid itself allows.

    With --samples, uncertainty.json, uncertainty.csv and pictures say how well the probabilities are calibrated,
    how well uncertainty ranks voxels and cases by their errors, and whether volume intervals hold the truth.

    \b
    Example: liverseg evaluate data/liver.zarr runs/liver --raw data/Task03_Liver
             liverseg evaluate data/test.zarr runs/ssn --raw data/test --samples 16 --calibrate data/liver.zarr data/Task03_Liver
             liverseg evaluate data/test.zarr runs/a --raw data/test --with runs/b --with runs/c --samples 3
    """
    _check_order("evaluate", cache, runs, n_runs=range(1, 2))
    if calibrate is not None and not samples:
        raise click.UsageError("--calibrate needs samples: add --samples 16")
    if shifted is not None and not samples:
        raise click.UsageError("--shifted needs samples: add --samples 16")
    (run,) = runs
    options = _Options(cases=cases, device=device, samples=samples, calibrate=calibrate, shifted=shifted)
    folder = out or run / ("ensemble" if others else "evaluation")
    done = _evaluate_run(cache, (run, *others), raw=raw, out=folder, options=options)
    return Outcome(result=done.result, complete=done.complete)


@click.command()
@_needs_cache_first
@RAW
@click.option("--out", type=FOLDER, help="Write comparison.json into this folder.")
@CASES
@DEVICE
def compare(
    cache: Path, runs: tuple[Path, ...], *, raw: Path, out: Path | None, cases: tuple[str, ...], device: str
) -> Outcome:
    """Compare two RUNs case by case on the cases of CACHE that neither was trained on.

    Each run is evaluated into its own folder RUN/evaluation. Where no such case is left, as with two folds of one
    cross-validation, the comparison is refused unless --case names cases. The table has the second run minus the first, with
    95 % intervals and the p value of Wilcoxon's signed-rank test.

    \b
    Example: liverseg compare data/test.zarr runs/a runs/b --raw data/test --out runs/a_b
    """
    from data_cache.reader import CacheStore
    from liverseg.console import say
    from liverseg.evaluation.compare import paired_differences, require_own_comparison, write_comparison
    from liverseg.evaluation.evaluate import choose_cases, require_own_evaluation
    from liverseg.training.split import load_split, together

    _check_order("compare", cache, runs, n_runs=range(2, 3))
    split = together([load_split(run) for run in runs])
    store = CacheStore.open(cache, skip_damaged=True)
    chosen, unseen = choose_cases(store, split, cases)
    if not (cases or unseen):
        raise click.UsageError(
            f"{cache}: has no case that neither {runs[0]} nor {runs[1]} was trained on: name a cache of other cases; for "
            "the folds of one cross-validation use liverseg pool; or name cases that were trained on with --case"
        )
    damaged = {} if cases else report_damaged(store)
    for run in runs:
        require_own_evaluation(run / "evaluation", chosen)
    if out is not None:
        require_own_comparison(out)
    options = _Options(cases=chosen, device=device)
    first, second = (
        _evaluate_run(
            cache,
            (run,),
            raw=raw,
            out=run / "evaluation",
            options=replace(options, tell_notes=run == runs[0]),
        )
        for run in runs
    )
    differences = paired_differences(first.scores, second.scores)
    print_differences(f"{runs[1]} minus {runs[0]}, {pluralise(len(chosen), 'case')}", differences)
    if out is not None:
        write_comparison(out, (str(runs[0]), str(runs[1])), differences)
        say(f"wrote comparison.json to {out}")
    result = {"first": first.result, "second": second.result, "differences": differences, "damaged": damaged}
    return Outcome(result=result, complete=first.complete and second.complete and not damaged)


@click.command()
@_needs_cache_first
@RAW
@click.option("--out", type=FOLDER, help="Write scores.csv and summary.json of all cases into this folder.")
@DEVICE
def pool(cache: Path, runs: tuple[Path, ...], *, raw: Path, out: Path | None, device: str) -> Outcome:
    """Pool the folds of a cross-validation: each RUN scores the cases of CACHE that it was never trained on.

    Each run is evaluated into its own folder RUN/evaluation. Folds that share a case are refused.

    \b
    Example: liverseg pool data/liver.zarr runs/fold0 runs/fold1 --raw data/Task03_Liver --out runs/folds
    """
    from liverseg.console import say
    from liverseg.evaluation.compare import require_own_folds, write_folds
    from liverseg.measure.summary import summarise_scores

    _check_order("pool", cache, runs, n_runs=range(2, 1000))
    _check_folds(cache, runs)
    if out is not None:
        require_own_folds(out)
    options = _Options(device=device)
    done = {
        str(run): _evaluate_run(cache, (run,), raw=raw, out=run / "evaluation", options=options)
        for run in runs
    }
    scored = {run: result.scores for run, result in done.items()}
    everything = [scores for cases in scored.values() for scores in cases.values()]
    say(f"{pluralise(len(runs), 'fold')}, {pluralise(len(everything), 'case')}")
    failed = sorted({case_id for each in done.values() for case_id in each.result["failed"]})
    summary = summarise_scores(everything) if out is None else write_folds(out, scored, failed=failed)
    print_summary(summary)
    if out is not None:
        say(f"wrote scores.csv and summary.json to {out}")
    result = {"runs": {run: each.result for run, each in done.items()}, "summary": summary}
    return Outcome(result=result, complete=all(each.complete for each in done.values()))


def _check_folds(cache: Path, runs: tuple[Path, ...]) -> None:
    """Check what ``pool`` will evaluate.

    Raises:
        UsageError: Two runs would score the same case, or a run has no case that it was not trained on.
        OutputError: A run's evaluation would replace a file that ``liverseg evaluate`` did not write.
    """
    from data_cache.reader import CacheStore
    from liverseg.evaluation.compare import shared_cases
    from liverseg.evaluation.evaluate import choose_cases, require_own_evaluation
    from liverseg.training.split import load_split

    store = CacheStore.open(cache, skip_damaged=True)
    chosen = [choose_cases(store, load_split(run), ()) for run in runs]
    for run, (_, unseen) in zip(runs, chosen, strict=True):
        if not unseen:
            raise click.UsageError(f"{run}: was trained on every case of {cache}: not a fold of it")
    shared = shared_cases([case_ids for case_ids, _ in chosen])
    if shared:
        raise click.UsageError(
            f"{pluralise(len(shared), 'case')} ({shared[0]}, …) would be scored by several runs: these are not the "
            "folds of one cross-validation; compare two runs with liverseg compare"
        )
    for run, (case_ids, _) in zip(runs, chosen, strict=True):
        require_own_evaluation(run / "evaluation", case_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """How a run is evaluated."""

    cases: tuple[str, ...] = ()
    device: str
    samples: int = 0
    calibrate: tuple[Path, Path] | None = None
    shifted: tuple[Path, Path] | None = None
    tell_notes: bool = True  # False where another run has been evaluated on the same scans


@dataclass(frozen=True, slots=True, kw_only=True)
class _Evaluated:
    """What was measured of a run.

    Attributes:
        scores: By case.
        result: Everything that was measured, for JSON.
        complete: Whether every case could be scored.
    """

    scores: Mapping[str, LabelScores]
    result: Mapping[str, Any]
    complete: bool


def _evaluate_run(
    cache: Path, runs: tuple[Path, ...], *, raw: Path, out: Path, options: _Options
) -> _Evaluated:
    """Evaluate a run, or the ensemble of several, into ``out``, and print the tables."""
    from data_cache.reader import CacheStore
    from liverseg.console import say, warn
    from liverseg.evaluation.evaluate import choose_cases, require_own_evaluation
    from liverseg.evaluation.raw_case import require_raw
    from liverseg.inference.segment import load_predictor
    from liverseg.training.split import load_split, together

    store = CacheStore.open(cache, skip_damaged=True)
    predictor = load_predictor(*runs, device=options.device, samples=options.samples)
    split = together([load_split(each) for each in runs])
    case_ids, unseen = choose_cases(store, split, options.cases)
    require_raw(store, case_ids, raw)
    damaged = {} if options.cases else report_damaged(store)
    calibrated = options.calibrate is not None
    require_own_evaluation(out, case_ids, samples=options.samples > 0, calibrated=calibrated)
    if not unseen:
        warn("some of these cases were trained on: their scores say how well they were learned, no more")
    if predictor.n_drawn != options.samples:
        warn(DRAWN.format(predictor.n_drawn, options.samples))
    scored, result = _score_cases(predictor, store, split, case_ids, raw=raw, out=out, options=options)
    if scored:
        say(f"wrote scores.csv, summary.json and {pluralise(len(scored), 'overlay')} to {out}")
        scores_option = "" if out == runs[0] / "evaluation" else f" --scores {out}"
        say(f"look at them: liverseg report {runs[0]}{scores_option}")
    else:
        warn(f"no case could be scored: nothing was written to {out}, anything there is older")
    result["failed"] |= damaged
    scores = {e.case_id: e.predicted for e in scored}
    complete = not any(result.get(key) for key in ("failed", "calibrate_failed", "shifted_failed"))
    return _Evaluated(scores=scores, result={"out": out, **result}, complete=complete)


def _score_cases(
    predictor: Predictor,
    store: CacheStore,
    split: Split,
    case_ids: tuple[str, ...],
    *,
    raw: Path,
    out: Path,
    options: _Options,
) -> tuple[list[CaseEvaluation], dict[str, Any]]:
    """Score the cases with a progress bar, and print the summaries; returns them for JSON, too."""
    from liverseg.console import progress_bar
    from liverseg.evaluation.evaluate import evaluate as score
    from liverseg.evaluation.evaluate import score_row

    failed: dict[str, str] = {}
    others_failed: dict[str, dict[str, str]] = {"calibrate": {}, "shifted": {}}
    calibration = None
    if options.calibrate is not None:
        say_failed = partial(_report_failed, others_failed["calibrate"])
        calibration = _calibrate(predictor, store, split, case_ids, *options.calibrate, report=say_failed)
    shifted = {}
    if options.shifted is not None:
        say_failed = partial(_report_failed, others_failed["shifted"])
        shifted = _measure_shifted(predictor, *options.shifted, report=say_failed)
    with progress_bar() as bar:
        task = bar.add_task("evaluate", total=len(case_ids), note="")

        def report(case_id: str, result: CaseEvaluation | Exception) -> None:
            bar.update(task, advance=1, note=case_id)
            if isinstance(result, Exception):
                _report_failed(failed, case_id, result)
            elif options.tell_notes:
                warn_of_scan(case_id, result.notes)

        scored = score(
            predictor,
            store,
            split,
            case_ids=case_ids,
            raw=raw,
            out=out,
            report=report,
            calibration=calibration,
            shifted=shifted,
        )
    if options.tell_notes:
        warn_of_units([(e.case_id, e.notes) for e in scored])
    notes = {e.case_id: e.notes for e in scored if e.notes}
    result: dict[str, Any] = {"cases": list(map(score_row, scored)), "failed": failed, "notes": notes}
    result |= {f"{name}_failed": cases for name, cases in others_failed.items() if cases}
    return scored, result | _print_summaries(scored, calibration, shifted)


def _print_summaries(
    scored: Sequence[CaseEvaluation],
    calibration: Calibration | None,
    shifted: Mapping[str, UncertaintySummary],
) -> dict[str, Any]:
    """Print what all cases say together, if there are any; returns it for JSON, too."""
    from liverseg.evaluation.evaluate import summarise
    from liverseg.evaluation.uncertainty_summary import summarise_uncertainties

    result: dict[str, Any] = {}
    if scored:
        seen = any(e.trained_on for e in scored)
        title = f"native space, predicted crop, cases {'TRAINED ON' if seen else 'never trained on'}"
        print_cases(title, {e.case_id: e.predicted for e in scored})
        result["summary"] = summarise(scored)
        print_summary(result["summary"])
        _warn_of_answers(scored)
    uncertainties = [e.uncertainty for e in scored if e.uncertainty is not None]
    if uncertainties:
        result["uncertainty"] = summarise_uncertainties(uncertainties, calibration, shifted)
        print_uncertainty(result["uncertainty"])
    return result


def _warn_of_answers(scored: Sequence[CaseEvaluation]) -> None:
    from liverseg.console import warn

    doubtful = [e.case_id for e in scored if not e.plausibility.plausible]
    if doubtful:
        warn(f"not plausible, {len(doubtful)} of {pluralise(len(scored), 'case')}: {', '.join(doubtful)}")


def _report_failed(failed: dict[str, str], case_id: str, failure: Exception | None) -> None:
    """Print why a case failed and keep it; nothing for a case that did not."""
    from liverseg.console import complain

    if failure is not None:
        failed[case_id] = in_words(failure, "evaluate")
        complain(f"{case_id}: {failed[case_id]}")


def _calibrate(
    predictor: Predictor,
    store: CacheStore,
    split: Split,
    case_ids: Sequence[str],
    other: Path,
    raw: Path,
    *,
    report: Callable[[str, Exception | None], None],
) -> Calibration:
    """Fit on the cases of another store that are neither trained on nor scored in this one."""
    from data_cache.reader import CacheStore
    from liverseg.evaluation.calibrate import calibrate_apart
    from liverseg.training.split import image_identity

    return calibrate_apart(
        predictor,
        CacheStore.open(other, skip_damaged=True),
        split,
        raw=raw,
        scored={part for case_id in case_ids for part in image_identity(store, case_id)},
        report=report,
    )


def _measure_shifted(
    predictor: Predictor, cache: Path, raw: Path, *, report: Callable[[str, Exception | None], None]
) -> dict[str, UncertaintySummary]:
    """The uncertainty of shifted scans, with a progress bar."""
    from data_cache.reader import CacheStore
    from liverseg.console import progress_bar
    from liverseg.evaluation.shifted import measure_shifted

    store = CacheStore.open(cache, skip_damaged=True)
    with progress_bar() as bar:
        task = bar.add_task("shifted", total=len(store.case_ids) + len(store.damaged), note="")

        def measured(case_id: str, result: UncertaintySummary | Exception) -> None:
            bar.update(task, advance=1, note=case_id)
            report(case_id, result if isinstance(result, Exception) else None)

        return measure_shifted(predictor, store, raw=raw, report=measured)


@click.command()
@click.argument("predicted", type=click.Path(path_type=Path))
@click.argument("truth", type=click.Path(path_type=Path))
@click.option("--out", type=FOLDER, help="Write scores.csv and summary.json into this folder.")
def score(predicted: Path, truth: Path, out: Path | None) -> Outcome:
    """Score label files PREDICTED by any tool against TRUTH: two folders, matched by name, or two files.

    Labels are 0, 1 (liver) and 2 (tumour). The two files of a pair may differ in orientation, but not in grid.
    A file without a counterpart, or one that cannot be scored, is named, and the exit code is 1.

    \b
    Example: liverseg score segmentations data/Task03_Liver/labelsTr --out scores
    """
    from liverseg.console import complain, progress_bar, say, warn
    from liverseg.evaluation.label_files import pair_labels, require_own_scores, score_pairs, write_scores
    from liverseg.measure.summary import score_columns, summarise_scores

    if out is not None:
        require_own_scores(out)
    pairs, alone = pair_labels(predicted, truth)
    for line in alone:
        warn(line)
    failed: dict[str, str] = {}
    with progress_bar() as bar:
        task = bar.add_task("score", total=len(pairs), note="")

        def report(name: str, result: LabelScores | Exception) -> None:
            bar.update(task, advance=1, note=name)
            if isinstance(result, Exception):
                failed[name] = in_words(result, "score")
                complain(f"{name}: {failed[name]}")

        scored = score_pairs(pairs, report=report)
    rows = [{"case": name} | score_columns(case) for name, case in scored.items()]
    result: dict[str, Any] = {"cases": rows, "failed": failed, "alone": alone}
    if scored:
        print_cases("native space", scored)
        result["summary"] = (
            summarise_scores(list(scored.values()))
            if out is None
            else write_scores(out, scored, failed=list(failed), alone=len(alone))
        )
        print_summary(result["summary"])
        if out is not None:
            say(f"wrote scores.csv and summary.json to {out}")
    return Outcome(result=result, complete=not (alone or failed))


@click.command()
@click.argument("run", type=FOLDER)
@click.option("--scores", type=FOLDER, help="What evaluate wrote. Default: RUN/evaluation.")
@click.option("--out", type=FILE, help="Default: report.html beside the scores.")
def report(run: Path, scores: Path | None, out: Path | None) -> Outcome:
    """Write one HTML page about RUN: scores, training curves, and a slice viewer of every scored case, worst first.

    The page needs no server and no network, and opens from a file.

    \b
    Example: liverseg report runs/liver
    """
    from liverseg.console import say
    from liverseg.evaluation.report import write_report

    folder = scores or run / "evaluation"
    page = write_report(run, folder, out or folder / "report.html")
    say(f"wrote {page.line()}")
    return Outcome(result={"page": page})


COMMANDS = (evaluate, compare, pool, score, report)
