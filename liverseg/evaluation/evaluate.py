"""Score a run in native space: case by case, then all cases in tables."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_cache.errors import CacheError, ConfigError
from data_cache.outputs import csv_mark, json_mark, require_replaceable
from data_cache.reader import CacheStore
from liverseg.evaluation.artifacts import artifacts, write_artifacts
from liverseg.evaluation.case import CaseEvaluation, evaluate_case
from liverseg.evaluation.raw_case import require_raw
from liverseg.evaluation.tables import set_unfinished, write_tables
from liverseg.evaluation.uncertainty_summary import FILES, NO_CASES, write_uncertainty_summary
from liverseg.inference.calibration import CALIBRATION, Calibration, weight_checksums
from liverseg.inference.segment import Predictor
from liverseg.inference.uncertainty_files import UncertaintySummary
from liverseg.measure.summary import (
    BOUNDS,
    CLASSES,
    SCORES,
    SUMMARY,
    WEIGHTS,
    interval,
    score_columns,
    summarise_scores,
)
from liverseg.training.split import Split, image_identity


def choose_cases(store: CacheStore, split: Split, named: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """The cases to score, and whether the run has never trained on any of them.

    These are the named cases, each once; without names, all labelled cases whose images the run was not trained on, whatever
    the cases are called; and if there are none, all labelled cases.

    Raises:
        CacheError: A named case is damaged.
        ConfigError: A named case is not in the store, or the store has no labelled case.
    """
    store.require_sound(named)
    labelled = [case_id for case_id in store.case_ids if store.meta(case_id).label is not None]
    unknown = sorted(set(named) - set(labelled))
    if unknown or not labelled:
        raise ConfigError(f"{store.path}: has no labelled case{' ' if unknown else ''}{', '.join(unknown)}")
    unseen = [case_id for case_id in labelled if not _is_trained_on(store, split, case_id)]
    chosen = tuple(dict.fromkeys(named)) or tuple(unseen or labelled)
    return chosen, set(chosen) <= set(unseen)


def _is_trained_on(store: CacheStore, split: Split, case_id: str) -> bool:
    with contextlib.suppress(CacheError):  # damaged: whatever scores the case says so
        return not split.trained_on.isdisjoint(image_identity(store, case_id))
    return store.meta(case_id).image.sha256 in split.train_sha256


def require_own_evaluation(
    out: Path, case_ids: Sequence[str], *, samples: bool = False, calibrated: bool = False
) -> None:
    """Raise OutputError if ``evaluate`` would replace a file in ``out`` that ``liverseg evaluate`` did not write.

    Args:
        out: Folder of the evaluation.
        case_ids: What will be scored.
        samples: Whether samples will be drawn.
        calibrated: Whether a calibration will be fitted.
    """
    outputs = [
        (out / SCORES, csv_mark("case", "trained_on", "liver_found")),
        (out / SUMMARY, json_mark("evaluate")),
        *(output for case_id in case_ids for output in artifacts(out, case_id, samples=samples)),
    ]
    if samples:
        outputs += [(out / name, mark) for name, mark in FILES.items()]
    if calibrated:
        outputs.append((out / CALIBRATION, json_mark("evaluate")))
    for path, mark in outputs:
        require_replaceable(path, mark, command="evaluate")


def evaluate(
    predictor: Predictor,
    store: CacheStore,
    split: Split,
    *,
    case_ids: Sequence[str],
    raw: Path,
    out: Path,
    report: Callable[[str, CaseEvaluation | Exception], None],
    calibration: Calibration | None = None,
    shifted: Mapping[str, UncertaintySummary] = NO_CASES,
) -> list[CaseEvaluation]:
    """Score cases one by one, and write ``scores.csv``, ``summary.json`` and the artifacts of each case into ``out``.

    With samples, also write what ``write_uncertainty_summary`` writes. The summary of an earlier evaluation is deleted
    before anything else is replaced, and the new one is written last: without it, an evaluation is unfinished.

    Args:
        predictor: The network.
        store: The cache, built with the spec that the network was trained with.
        split: What the run was trained on.
        case_ids: What to score.
        raw: Folder of the data set that the cache was built from.
        out: Created if it does not exist.
        report: Called with each case's scores, or with why it has none; a case that fails does not stop the others.
        calibration: Fitted on other cases, for the samples.
        shifted: By case ID, what ``measure_shifted`` found in scans that differ from the training data.

    Raises:
        CacheError: The store was built with another spec than the network was trained with.
        DataSetError: ``raw`` is another data set.
        OutputError: ``out`` has a file that would be replaced and that ``liverseg evaluate`` did not write.
    """
    require_own_evaluation(out, case_ids, samples=predictor.samples > 0, calibrated=calibration is not None)
    require_raw(store, case_ids, raw)
    if store.schema.spec != predictor.spec:
        raise CacheError(f"{store.path}: built with another spec than the network was trained with")
    done, failed = [], []
    for case_id in case_ids:
        try:
            case = evaluate_case(
                case_id,
                predictor,
                store,
                raw=raw,
                trained_on=_is_trained_on(store, split, case_id),
                calibration=calibration,
            )
            set_unfinished(out)
            write_artifacts(out, case)
        except Exception as failure:  # of whatever kind: it must not cost the other cases
            failed.append(case_id)
            report(case_id, failure)
        else:
            done.append(case.scores)
            report(case_id, case.scores)
    if done:
        _write_all_tables(out, predictor, done, failed, calibration, shifted)
    return done


# ---- tables


def _write_all_tables(
    out: Path,
    predictor: Predictor,
    done: Sequence[CaseEvaluation],
    failed: Sequence[str],
    calibration: Calibration | None,
    shifted: Mapping[str, UncertaintySummary],
) -> None:
    if calibration is not None:
        calibration.write(out / CALIBRATION)
    uncertainties = [e.uncertainty for e in done if e.uncertainty is not None]
    write_uncertainty_summary(out, uncertainties, calibration, shifted)
    content = {
        "models": list(predictor.sources),
        # So that export can tell these scores from those of what was trained since.
        WEIGHTS: list(weight_checksums(predictor)),
        "samples": predictor.n_drawn,
        "failed": list(failed),
        **summarise(done),
    }
    write_tables(out, [score_row(e) for e in done], content, command="evaluate")


def summarise(evaluations: Sequence[CaseEvaluation]) -> dict[str, Any]:
    """Everything of ``summarise_scores``, the cases that were trained on or have no liver, and both other crops' Dice."""
    summary = {
        "n_cases": len(evaluations),
        "trained_on": [e.case_id for e in evaluations if e.trained_on],
        "no_liver_found": [e.case_id for e in evaluations if not e.found],
        "not_plausible": [e.case_id for e in evaluations if not e.plausibility.plausible],
        **summarise_scores([e.predicted for e in evaluations]),
    }
    for name in CLASSES:
        scored = [e for e in evaluations if e.predicted.of(name).volume_truth_ml > 0]
        summary[name]["dice_with_label_crop"] = _dice_interval(scored, "label_crop", name)
        summary[name]["dice_grid_ceiling"] = _dice_interval(scored, "ceiling", name)
    return summary


def _dice_interval(
    evaluations: Sequence[CaseEvaluation], crop: str, name: str
) -> dict[str, float | int | None]:
    found = [getattr(evaluation, crop) for evaluation in evaluations]
    values = [None if scores is None else getattr(scores, name).dice for scores in found]
    return interval(values, bounds=BOUNDS["dice"])


def score_row(e: CaseEvaluation) -> dict[str, Any]:
    """A case as a row of ``scores.csv``."""
    row: dict[str, Any] = {
        "case": e.case_id,
        "trained_on": e.trained_on,
        "liver_found": e.found,
        "plausible": e.plausibility.plausible,
        "not_plausible_because": "; ".join(e.plausibility.reasons),
    }
    row |= score_columns(e.predicted)
    for name in CLASSES:
        row[f"{name}_dice_label_crop"] = None if e.label_crop is None else getattr(e.label_crop, name).dice
        row[f"{name}_dice_grid_ceiling"] = None if e.ceiling is None else getattr(e.ceiling, name).dice
    return row
